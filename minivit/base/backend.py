"""Which array library an array belongs to, devices, and the switch between plain functions and accelerated twins.

The arrays decide where the work is done: ``a @ b`` and ``a * b`` run on their own device, and a layer that needs a
function takes it from their library, ``array_module(x).exp``. Importing minivit never imports CuPy.

A function marked ``@accelerated`` is the specification; a function of the same name and signature in
`minivit.kernels.cpu` (NumPy arrays) or `minivit.kernels.cuda` (CuPy arrays), its *twin*, may stand in for it. A twin
returns NotImplemented for what it does not cover (complex numbers, unusual sizes), and the plain body runs then. A
backward goes the way its forward went: to the twin where the cache is the twin's own, else to the plain body. Inside
``with plain():``, or with the environment variable ``MINIVIT_KERNELS=plain``, every forward runs its plain body.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import re
import sys
import threading
from contextlib import contextmanager

import numpy as np

from minivit.base.errors import InputError

TWINS = {"numpy": "minivit.kernels.cpu", "cupy": "minivit.kernels.cuda"}  # where each library's twins are
_TWIN_MODULES = frozenset(TWINS.values())
_plain = 0  # how many `plain` blocks are active, in all threads: workers follow their caller
_plain_lock = threading.Lock()


def array_module(*arrays):
    """The library, ``numpy`` or ``cupy``, that all of ``arrays`` belong to.

    Raises
        TypeError: one of them is not an array, or NumPy and CuPy arrays are mixed.
    """
    if all(type(array) is np.ndarray for array in arrays):  # the usual case, quickly
        return np
    modules = set()
    for array in arrays:
        root = type(array).__module__.partition(".")[0]
        if root not in TWINS and isinstance(array, np.ndarray):
            root = "numpy"  # a subclass, such as one that counts operations
        if root not in TWINS:
            raise TypeError(f"expected a NumPy or CuPy array, got {type(array).__name__}")
        modules.add(root)
    if len(modules) != 1:
        raise TypeError("NumPy and CuPy arrays are mixed in one call; move them to one device first")
    return sys.modules[modules.pop()]


def accelerated(function):
    """Let the twin of a layer's function, where there is one, stand in for its plain body.

    The name says which argument chooses: of ``X_forward`` the first, of ``X_backward`` the second, its cache. The plain
    body is ``function.__wrapped__``; another function put there runs in its place. While there is a watcher (see
    `watching`), all calls go through it.
    """
    name = function.__name__
    backward = name.endswith("_backward")
    which = 1 if backward else 0  # the argument that chooses
    chooser = list(inspect.signature(function).parameters)[which]

    @functools.wraps(function)
    def dispatch(*arguments, **settings):
        if _watcher is not None:
            return _watcher(dispatch, arguments, settings)
        return choose(*arguments, **settings)

    def choose(*arguments, **settings):
        """Call the twin, or the plain body."""
        kind = type(arguments[which] if len(arguments) > which else settings.get(chooser)).__module__
        if backward:  # the way of the forward
            if _is_of_twins(kind) and (twin := _twin(kind, name)) is not None:
                return twin(*arguments, **settings)
        elif kernels_wanted():
            twin = _twin(TWINS.get(kind.partition(".")[0]), name)
            if twin is not None and (result := twin(*arguments, **settings)) is not NotImplemented:
                return result
        return dispatch.__wrapped__(*arguments, **settings)

    dispatch.choose = choose
    return dispatch


_watcher = None  # what sees every call of an accelerated function, or None


@contextmanager
def watching(watcher):
    """While active, ``watcher(function, arguments, settings)`` is called in place of every accelerated function.

    It calls ``function.choose(*arguments, **settings)`` to have the work done. One at a time, for all threads.
    Raises  RuntimeError: another watcher is active.
    """
    global _watcher
    if _watcher is not None:
        raise RuntimeError("calls are being watched already")
    _watcher = watcher
    try:
        yield
    finally:
        _watcher = None


def _twin(module, name):
    """The twin of that name in one of the modules of twins, or None."""
    if module is None:
        return None
    twin = getattr(sys.modules.get(module) or importlib.import_module(module), name, None)
    return twin if _is_of_twins(getattr(twin, "__module__", None)) else None  # not what it imports from elsewhere


def _is_of_twins(module):
    return module in _TWIN_MODULES or module in TWINS.values()


@functools.cache
def _environment():
    value = os.environ.get("MINIVIT_KERNELS", "auto")
    if value not in ("auto", "plain"):
        raise InputError(f"MINIVIT_KERNELS must be auto or plain, got {value!r}")
    return value


def kernels_wanted():
    """Whether twins may stand in now.

    Raises  InputError: the environment variable MINIVIT_KERNELS is neither "auto" nor "plain".
    """
    return not _plain and _environment() == "auto"


@contextmanager
def plain():
    """While active, every forward runs its plain body, in all threads; a backward goes the way its forward went."""
    global _plain
    with _plain_lock:
        _plain += 1
    try:
        yield
    finally:
        with _plain_lock:
            _plain -= 1


def find_device(name):
    """The device that a user means: "cpu", or "cuda:0", "cuda:1", ...; "auto" is the first GPU if there is one.

    Raises  InputError: another name, CuPy is missing, or there is no such GPU.
    """
    if name == "cpu":
        return name
    if not (match := re.fullmatch(r"auto|cuda(?::(\d+))?", name)):
        raise InputError(f"device must be cpu, cuda, cuda:1 (the second GPU, and so on) or auto; got {name!r}")
    try:
        import cupy
    except ImportError:
        if name == "auto":
            return "cpu"
        raise InputError(
            f'device {name} needs CuPy: pip install "minivit[gpu]" (CUDA 13), or cupy-cuda12x for CUDA 12'
        ) from None
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        if name == "auto":
            return "cpu"
        raise InputError(f"device {name}: CUDA says {error}; is there an NVIDIA GPU and its driver?") from None
    number = int(match[1] or 0)
    if number >= count:
        raise InputError(f"device {name}: there are {count} GPUs, counted from cuda:0")
    return f"cuda:{number}"


def use_device(device):
    """Make a GPU the one on which this thread's CuPy arrays are made, on a stream of its own; nothing for "cpu"."""
    if device != "cpu":
        import cupy

        cupy.cuda.Device(int(device.removeprefix("cuda:"))).use()
        cupy.cuda.Stream(non_blocking=True).use()  # CUDA graphs cannot be recorded on the default stream


def device_name(device):
    """What the device is called by its maker; "cpu" for the processor."""
    if device == "cpu":
        return device
    import cupy

    return cupy.cuda.runtime.getDeviceProperties(int(device.removeprefix("cuda:")))["name"].decode()


def to_device(array, device):
    """The array on a device of `find_device`, which must be the one in use; itself if it is there already."""
    if device == "cpu":
        return to_host(array)
    import cupy

    return cupy.asarray(array)


def to_host(array):
    """The array as a NumPy array: itself if it is one already, a copy if it lives on a GPU."""
    return array.get() if hasattr(array, "get") else np.asarray(array)


def synchronize(device):
    """Wait until all work given to a GPU is done; nothing for "cpu"."""
    if device != "cpu":
        import cupy

        cupy.cuda.Device().synchronize()


@accelerated
def matmul(a, b, *, out=None):
    """``a @ b``, with a twin for GPUs: a step with CuPy's own products cannot be recorded as a graph."""
    return a @ b if out is None else array_module(a, b, out).matmul(a, b, out=out)


def matmul_rows(x, W):
    """``x @ W`` for x (..., n) and a matrix W (n, m), as one two-dimensional product.

    A batched product with a broadcast matrix would be cut into many small ones; one large product is what
    BLAS is good at.
    """
    return matmul(x.reshape(-1, x.shape[-1]), W).reshape(*x.shape[:-1], W.shape[-1])


@accelerated
def column_sum(x):
    """Sums over the rows of a matrix, as a product with ones: BLAS is quicker than ``x.sum(axis=0)``.

    Shapes  x (rows, n)  ->  (n,)
    """
    return array_module(x).ones(len(x), x.dtype) @ x


@accelerated
def row_sum(x):
    """Sums over the last axis, kept as an axis of length 1, as a product with ones: BLAS is quicker than ``x.sum``.

    Shapes  x (..., n)  ->  (..., 1)
    """
    return x @ array_module(x).ones((x.shape[-1], 1), x.dtype)


def row_mean(x):
    """Means over the last axis, kept as an axis of length 1.

    Shapes  x (..., n)  ->  (..., 1)
    """
    return row_sum(x) / x.shape[-1]


def erf(x):
    """The error function, elementwise, from SciPy (or from CuPy for CuPy arrays).

    Raises
        ImportError: SciPy is not installed.
    """
    try:
        if array_module(x) is np:
            from scipy.special import erf as function
        else:
            from cupyx.scipy.special import erf as function
    except ImportError:
        raise ImportError('gelu="erf" needs SciPy: pip install "minivit[interop]"') from None
    return function(x)
