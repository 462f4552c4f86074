"""A stand-in for CuPy that runs on the CPU, refuses what CuPy refuses, and counts what a GPU would have to do.

``launches`` counts kernels by name, ``waits`` what makes the host wait for the device, ``doubles`` the results in
float64. The names that CuPy 14.2 has are in tests/data; arrays are NumPy's, of a class that mixes with no other.
``np.asarray(x)`` slips through.

A graph is recorded as on a GPU: what is launched meanwhile is repeated by each replay, on the same memory, and nothing
else of the program is; nothing may wait meanwhile, and CuPy's own matrix products are refused. Here the recording does
the work of the first replay, which then does nothing.
"""

import itertools
import sys
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np

_LINES = (Path(__file__).parent / "data" / "cupy-14.2-names.txt").read_text().splitlines()
NAMES, METHODS = set(_LINES[1].split()), set(_LINES[3].split())
STRIDE_TRICKS = {"sliding_window_view", "as_strided"}
VIEWS = STRIDE_TRICKS | {
    "broadcast_to",
    "expand_dims",
    "swapaxes",
    "transpose",
    "reshape",
    "squeeze",
    "moveaxis",
}
NO_LAUNCH = VIEWS | {"empty", "empty_like", "result_type", "asarray", "array"}
PRODUCTS = {"dot", "vdot", "inner", "outer", "tensordot", "einsum"}  # matmul is a ufunc
SCALARS = (bool, int, float, np.float32, np.int32, np.int64, np.uint64)

launches, waits, doubles = Counter(), Counter(), Counter()


def clear():
    """Forget all counts."""
    for counter in (launches, waits, doubles):
        counter.clear()


def _check(value):
    if isinstance(value, (tuple, list)):
        for one in value:
            _check(one)
    elif isinstance(value, np.ndarray) and not isinstance(value, ndarray):
        raise TypeError("Unsupported type <class 'numpy.ndarray'>: a host array among device arrays")
    elif isinstance(value, np.float64):
        raise TypeError("a np.float64 scalar would make the result float64; use float() or np.float32()")


def _bare(value):
    if isinstance(value, (tuple, list)):
        return type(value)(_bare(one) for one in value)
    return value.view(np.ndarray) if isinstance(value, ndarray) else value


def _wrap(value, name):
    if isinstance(value, (tuple, list)):
        return type(value)(_wrap(one, name) for one in value)
    if isinstance(value, (np.ndarray, np.generic)):
        value = np.asarray(value)
        if value.dtype == np.float64:
            doubles[name] += 1
        return value.view(ndarray)
    return value


class Stream:
    """The one stream, which records graphs."""

    ptr, tape = 0, None  # while a graph is recorded: a list of calls, each of which makes one launch again

    def use(self):
        return self

    def begin_capture(self):
        assert self.tape is None
        self.tape, self.kept = [], []

    def end_capture(self):
        tape, kept, self.tape = self.tape, self.kept, None
        replays = itertools.count()

        def launch(stream, kept=kept):
            launches["graph"] += 1
            for again in tape if next(replays) else ():
                again()

        return SimpleNamespace(upload=lambda stream: None, launch=launch)

    def refuse(self, what):
        """Raise an error if a graph is being recorded."""
        if self.tape is not None:
            raise RuntimeError(f"{what}: operation not permitted when stream is capturing")

    def refuse_products(self):
        """Raise CuPy's error if a graph is being recorded: it calls cuBLAS then for nobody."""
        if self.tape is not None:
            raise NotImplementedError("calling cuBLAS API during stream capture is currently unsupported")

    def synchronize(self):
        self.refuse("synchronize")
        waits["synchronize"] += 1

    def do(self, function, *kept):
        """``function()``, which launches something; a replay writes its results where those of now are."""
        made = function()
        if self.tape is not None:

            def again():
                for old, new in zip(_arrays(made), _arrays(function()), strict=True):
                    if not np.shares_memory(old, new):  # else a view, which needs no launch
                        old[...] = new

            self.tape.append(again)
            self.kept.append(kept)  # what the function knows the address of alone
        return made


def _arrays(value):
    if isinstance(value, (tuple, list)):
        return [one for each in value for one in _arrays(each)]
    return [] if value is None else [value]


STREAM = Stream()


class ndarray(np.ndarray):
    """An array on the device that is not there."""

    def __array__(self, *arguments, **keywords):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **keywords):
        name = ufunc.__name__
        if name not in NAMES:
            raise AttributeError(f"cupy has no {name}")
        if (name, method) == ("add", "at") and inputs[0].dtype != np.int64:  # of whole numbers, CuPy has 32 bits alone
            launches["add.at"] += 1
            return _check(inputs) or STREAM.do(lambda: ufunc.at(*_bare(inputs)))
        if method != "__call__" or set(keywords) - {"dtype", "casting"}:
            raise TypeError(f"cupy.{name} does not take {method} {sorted(keywords)}")
        _check([*inputs, *(out or ())])
        launches[name] += 1
        if name == "matmul":
            STREAM.refuse_products()
            # of more than two axes, operands that are not contiguous are copied first
            launches["copy"] += sum(x.ndim > 2 and not x.flags.c_contiguous for x in inputs)
        settings = {"out": _bare(out)} if out else {}
        result = STREAM.do(lambda: np.asanyarray(ufunc(*_bare(inputs), **settings, **keywords)))
        return out[0] if out else _wrap(result, name)

    def __array_function__(self, function, types, arguments, keywords):
        return getattr(sys.modules["cupy"], function.__name__)(*arguments, **keywords)

    def __getitem__(self, index):
        parts = index if isinstance(index, tuple) else (index,)
        _check([part for part in parts if isinstance(part, np.ndarray)])
        if any(isinstance(part, np.ndarray) and part.dtype == bool for part in parts):
            waits["mask"] += 1
        if not any(isinstance(part, np.ndarray) for part in parts):
            rest = () if any(part is Ellipsis for part in parts) else (Ellipsis,)
            return _wrap(self.view(np.ndarray)[*parts, *rest], "take")  # of one element a view too, not its value
        launches["take"] += 1
        return _wrap(STREAM.do(lambda: self.view(np.ndarray)[_bare(index)]), "take")

    def __setitem__(self, index, value):
        _check(value)
        launches["fill"] += 1
        STREAM.do(lambda: self.view(np.ndarray).__setitem__(_bare(index), _bare(value)))

    @property
    def data(self):
        memory = self.view(np.ndarray).reshape(-1).view(np.uint8)

        def copy_from_device_async(source, size, stream):
            launches["memcpy"] += 1
            STREAM.do(lambda: memory.__setitem__(slice(size), source.memory[:size]))

        return SimpleNamespace(ptr=memory.ctypes.data, memory=memory, copy_from_device_async=copy_from_device_async)

    def _wait(self, what):
        STREAM.refuse(what)
        waits[what] += 1
        return self.view(np.ndarray)

    def __float__(self):
        return float(self._wait("float"))

    def __int__(self):
        return int(self._wait("int"))

    def __bool__(self):
        return bool(self._wait("bool"))

    def item(self):
        return self._wait("item").item()

    def tolist(self):
        return self._wait("tolist").tolist()

    def get(self):
        return self._wait("get").copy()

    def set(self, host):
        """Copy from the host, which need not wait."""
        if isinstance(host, ndarray) or host.dtype != self.dtype or host.shape != self.shape:
            raise TypeError(f"set takes a host array of {self.dtype} {self.shape}")
        STREAM.refuse("set")
        self.view(np.ndarray)[...] = host

    def astype(self, dtype, copy=True):
        launches["astype"] += copy or np.dtype(dtype) != self.dtype
        return _wrap(STREAM.do(lambda: self.view(np.ndarray).astype(dtype, copy=copy)), "astype")

    def dot(self, other):
        return sys.modules["cupy"].dot(self, other)

    def copy(self):
        launches["copy"] += 1
        return _wrap(STREAM.do(lambda: self.view(np.ndarray).copy()), "copy")

    def reshape(self, *shape):
        result = STREAM.do(lambda: self.view(np.ndarray).reshape(*shape))
        launches["copy"] += not np.shares_memory(result, self.view(np.ndarray)) and result.size > 0
        return _wrap(result, "reshape")


def _reduction(name):
    def reduce(self, axis=None, dtype=None, out=None, keepdims=False):
        launches[name] += 1
        keywords = {} if name in ("max", "min") else {"dtype": dtype}
        bare = getattr(self.view(np.ndarray), name)
        return _wrap(STREAM.do(lambda: np.asarray(bare(axis=axis, keepdims=keepdims, **keywords))), name)

    return reduce


for _name in ("sum", "mean", "max", "min"):
    setattr(ndarray, _name, _reduction(_name))


def _argmax(self, axis=None):
    launches["argmax"] += 1
    return _wrap(STREAM.do(lambda: np.asarray(self.view(np.ndarray).argmax(axis=axis))), "argmax")


ndarray.argmax = _argmax
ndarray.__module__ = "cupy"


class Event:
    """A point of the stream's time; here all work is done when it is given."""

    def record(self):
        STREAM.refuse("an event with a time")
        self.time = time.perf_counter()

    def synchronize(self):
        STREAM.synchronize()


class Module(ModuleType):
    """What ``import cupy`` gives."""

    def __init__(self):
        super().__init__("cupy")
        self.ndarray, self.lib = ndarray, SimpleNamespace(stride_tricks=self)
        NAMES.update(STRIDE_TRICKS)  # of cupy.lib.stride_tricks
        self.__version__, self.freed, self.pools = "14.2", 0, []
        attributes = {"MultiProcessorCount": 132, "MaxSharedMemoryPerBlockOptin": 227 << 10}  # of an H100
        chosen = SimpleNamespace(
            id=0, use=lambda: None, synchronize=STREAM.synchronize, attributes=attributes, compute_capability="90"
        )  # fmt: skip
        runtime = SimpleNamespace(
            getDeviceCount=lambda: 1, getDeviceProperties=lambda number: {"name": b"stand-in"},
            CUDARuntimeError=RuntimeError,
        )  # fmt: skip
        self.cuda = SimpleNamespace(
            runtime=runtime, Device=lambda number=0: chosen, Stream=lambda **settings: STREAM,
            Event=Event, get_elapsed_time=lambda before, after: 1e3 * (after.time - before.time),
            get_current_stream=lambda: STREAM, using_allocator=nullcontext,
            MemoryPool=self._pool,
        )  # fmt: skip

    def get_default_memory_pool(self):
        return SimpleNamespace(free_all_blocks=self._free)

    def _free(self):
        STREAM.refuse("cudaFree")
        self.freed += 1

    def _pool(self):
        """A pool of a graph's own, which is among ``pools`` until its memory was given back."""
        pool = SimpleNamespace(malloc=None, total_bytes=lambda: 0)
        self.pools.append(pool)

        def free_all_blocks():
            STREAM.refuse("cudaFree")
            self.pools.remove(pool)

        pool.free_all_blocks = free_all_blocks
        return pool

    def __getattr__(self, name):
        if name not in NAMES:
            raise AttributeError(f"module 'cupy' has no attribute {name!r}")
        function = getattr(np.lib.stride_tricks if name in STRIDE_TRICKS else np, name)
        if isinstance(function, (type, np.ufunc)):
            return function

        def call(*arguments, **keywords):
            if name not in ("asarray", "array"):
                _check([*arguments, *keywords.values()])
            if set(keywords) & {"where", "initial"}:
                raise TypeError(f"cupy.{name} takes no {sorted(keywords)}")
            if name in PRODUCTS:
                STREAM.refuse_products()
            if any(isinstance(x, np.ndarray) and not isinstance(x, ndarray) for x in arguments):
                STREAM.refuse("copying from the host")
            bare = {key: _bare(value) for key, value in keywords.items()}
            run = lambda: function(*_bare(arguments), **bare)  # noqa: E731
            result = run() if name in NO_LAUNCH else STREAM.do(run)
            copied = name == "ascontiguousarray" and not np.shares_memory(result, _bare(arguments[0]))
            launches[name] += copied if name == "ascontiguousarray" else name not in NO_LAUNCH
            return _wrap(result, name)

        return call


@contextmanager
def installed():
    """While active, ``cupy`` is the stand-in."""
    before = sys.modules.get("cupy")
    sys.modules["cupy"] = Module()
    clear()
    try:
        yield sys.modules["cupy"]
    finally:
        if before is None:
            del sys.modules["cupy"]
        else:
            sys.modules["cupy"] = before
