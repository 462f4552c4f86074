"""A recorder of calls: what went in and came out of every forward and backward, what it cost and what it kept.

    with recording() as recorder:
        logits, cache = model.forward(images)           # anything of the layer protocol, forward or backward
    recorder.name(cache)                                # so that calls are called by their place in the model
    for record in recorder.records:
        print(record.path, record.output, record.shape, record.seconds)

While active, every call of a function that is ``@accelerated`` goes through the recorder (`backend.watching`), which
lets the plain body do the work. The layers know nothing of it, their numbers stay the same to the last bit, and the
recorder knows no layer: a new one is recorded like the others, and nothing has to be entered anywhere.

A forward call's **path** is where its cache is kept: that of the call around it, and the field of that one's cache in
which its own cache is. At the top it is the field of the cache given to `Recorder.name`, the model's: the linear map
that makes queries, keys and values in the first block is ``blocks.0.msa.qkv``. A call whose cache is kept nowhere has
the name of its function, with a number where several are alike. A backward call's path is that of the forward which
made its cache: the same object, hence no guess.

**Bytes cached** are those of the buffers which a cache keeps alive: each array in it is followed to the array that
owns its memory, and that one is counted once, at the first call whose cache holds it. Parameters are not counted.
q, k and v are three views of one buffer; a linear layer's cache holds the output of the layer before it.

**FLOPs** are counted while they are done, see `minivit.laboratory.counting`: those of the function's own lines and of
the calls inside it. So they are those of the plain bodies, also where a twin saves some.

NumPy's warnings of overflow and the like are noted in the record of the call that caused them instead of being issued.
Times leave out what the recorder does itself. Arrays are those of NumPy: on a GPU, calls return before they are done.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from time import perf_counter
from typing import NamedTuple

import numpy as np

from minivit.base.backend import column_sum, plain, row_sum, watching
from minivit.laboratory import naming
from minivit.laboratory.counting import Counter, activate, counted, uncounted


class Record(NamedTuple):
    """One call. Figures of work, time and memory include the calls inside it, those of values are of its result.

    The result is y in a forward; in a backward dx, or the first gradient that there is (the stem of a training step
    returns none at all: it adds those of its parameters into ``grads``).
    ``mean``, ``std`` and ``largest`` are over its finite entries, NaN where there is none.
    """

    path: str  # e.g. blocks.0.msa.attention.softmax
    function: str  # e.g. softmax_forward
    direction: str  # forward or backward
    depth: int  # how many recorded calls it lies in
    equation: str  # the paper's, that of the call around it if it has none of its own, or ""
    input: str  # name of the tensor that went in; in a backward, of the gradient
    output: str  # name of the result
    shape: tuple
    dtype: str
    bytes: int  # of the result
    cached: int  # bytes that its cache keeps alive and no earlier one did
    matmul_flops: int  # in matrix products
    flops: int  # in all
    seconds: float
    own_seconds: float  # without the calls inside it
    mean: float
    std: float
    largest: float  # magnitude
    nonfinite: int  # entries, over every array that it returned
    incoming: float  # backward: norm of the gradient that came in
    norms: dict  # backward: norms of the gradients that it returned, {"dx": ..., "dW": ..., ...}
    alarms: str  # what NumPy would have warned of in its own lines: "overflow", ...; matrix products apart
    bad_input: str  # the first argument, or entry of its cache, that was not finite; "" if there was none

    @property
    def rate(self):
        """GFLOP/s."""
        return 1e-9 * self.flops / max(self.seconds, 1e-9)


def arrays_in(value, name=""):
    """Yield (name, array) for every array in an argument or a cache: itself, or those of a tuple or a dict."""
    if isinstance(value, np.ndarray | np.generic):
        yield name, np.asarray(value)
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from arrays_in(part, key)
    elif isinstance(value, tuple):
        for key, part in zip(getattr(value, "_fields", range(len(value))), value, strict=True):
            yield from arrays_in(part, f"{name}.{key}")


def owner(array):
    """The array that owns the memory which ``array`` is a view of."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def norm(array):
    """Euclidean length, in float64: the squares of float32 numbers overflow soon."""
    return float(np.linalg.norm(np.asarray(array, np.float64).ravel()))


def statistics(array):
    """(mean, standard deviation, largest magnitude) of the finite entries; NaN if there is none."""
    finite = np.isfinite(array)
    values = array if finite.all() else array[finite]
    if not values.size:
        return (float("nan"),) * 3
    largest = max(-float(values.min()), float(values.max()))
    return float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64)), largest


class _Call:
    """A call: where it is, and what became of it. The recorder's own, which has no caller, stands for all outside."""

    def __init__(self, caller=None, function=None, arguments=None):
        self.caller, self.function, self.arguments = caller, function, arguments
        self.stem, _, self.direction = function.__name__.rpartition("_") if function else ("", "", "")
        self.depth = caller.depth + 1 if caller else -1
        self.inside = []  # the calls inside it
        self.cache, self.result, self.replay = None, {}, None
        self.origin = None  # of a backward: the forward that made its cache
        self.place = None  # of a forward: where the caller's cache keeps its own
        self.number = None  # of a forward that has no place: among those of the same function
        self.figures = None  # the `Record`, but for the path, the equation and the bytes cached; None if cut short
        self.seconds_inside, self.cached = 0.0, 0

    @property
    def path(self):
        if self.caller is None:
            return ""
        if self.origin is not None:
            return self.origin.path
        name = self.place or naming.joined(self.stem, "" if self.number is None else self.number)
        return naming.joined(self.caller.path, name)

    @property
    def equation(self):
        if self.caller is None:
            return ""
        return naming.equation((self.origin or self).function) or (self.origin or self).caller.equation

    def find_places(self, places):
        """Learn where the caches of the forward calls inside are kept, and number those that are kept nowhere."""
        alike = {}
        for call in self.inside:
            if call.direction == "forward":
                call.place = places.get(id(call.cache))
                if not call.place:
                    alike.setdefault(call.stem, []).append(call)
        for calls in alike.values():
            for number, call in enumerate(calls):
                call.number = number if len(calls) > 1 else None


class Recorder:
    """Keeps what is known of each call, and with it all caches; see `recording`."""

    def __init__(self, known=(), *, keep=False, figures=True, calls=False):
        self._keep, self._figures, self._calls = keep, figures, calls
        self._outside = self._current = _Call()
        self._order = []  # every call, in the order in which they began
        self._makers = {}  # id of a cache -> the forward calls that returned it
        self._roots, self._places = [], {}  # the caches given to `name`, and where what they hold is kept
        self._known = {id(owner(array)): owner(array) for array in known}
        self._counter = Counter()
        self._paused = 0.0  # seconds spent on recording
        self._thread = threading.get_ident()

    def name(self, cache, path=""):
        """Let the calls that nobody called, such as those of a model's steps, be called by their place in a cache."""
        self._roots.append(cache)  # so that the ids stay those of its parts
        for key, place in naming.places(cache, path).items():
            self._places.setdefault(key, place)

    @property
    def records(self):
        """A `Record` of each call, in the order in which they began; those that an exception cut short are left out."""
        return [
            call.figures._replace(path=call.path, equation=call.equation, cached=call.cached)
            for call in self._ended()
        ]  # fmt: skip

    def _ended(self):
        """The calls that have ended, with their paths known."""
        self._outside.find_places(self._places)
        return [call for call in self._order if call.figures is not None]

    @property
    def kept(self):
        """Copies of all that the calls returned: {(path, direction, name): array}; a forward's by the name "y"."""
        return {
            (call.path, call.direction, name): array
            for call in self._ended() for name, array in call.result.items()
        }  # fmt: skip

    @property
    def calls(self):
        """{(path, direction): (function, args, keywords, arguments by name, result)}."""
        return {(call.path, call.direction): call.replay for call in self._ended()}

    def watch(self, function, args, keywords):
        """Do a call, and record it if it is a layer's and of this thread."""
        if threading.get_ident() != self._thread:
            return function.choose(*args, **keywords)
        if not function.__name__.endswith(("_forward", "_backward")):  # matmul, a step of an optimiser, ...
            self._counter.sums, before = function in (column_sum, row_sum), self._counter.sums
            try:
                return function.choose(*args, **keywords)
            finally:
                self._counter.sums = before
        entered = perf_counter()
        call, incoming, bad = self._enter(function, args, keywords)
        args, keywords = counted(args), {key: counted(value) for key, value in keywords.items()}
        before, alarms = (self._counter.products, self._counter.others), set()
        self._paused += perf_counter() - entered
        started = perf_counter() - self._paused - self._counter.seconds
        active = activate(self._counter)
        try:
            with np.errstate(over="call", divide="call", invalid="call", call=lambda kind, _: alarms.add(kind)):
                result = function.choose(*args, **keywords)
        except BaseException:
            call.caller.inside.remove(call)
            raise
        finally:
            activate(active)
            self._current = call.caller
        seconds = perf_counter() - self._paused - self._counter.seconds - started
        entered = perf_counter()
        work = self._counter.products - before[0], self._counter.others - before[1]
        if self._calls:
            call.replay = function, uncounted(args), uncounted(keywords), uncounted(call.arguments), uncounted(result)
        self._leave(call, result, work, seconds, incoming, ", ".join(sorted(alarms)), bad)
        if call.depth == 0:  # what leaves the layers is an ordinary array
            result = (uncounted(result[0]), result[1]) if call.direction == "forward" else uncounted(result)
        self._paused += perf_counter() - entered
        return result

    def _enter(self, function, args, keywords):
        """The `_Call` that begins, the norm of the gradient that comes in, and what of the input is not finite."""
        arguments = dict(zip(naming.argument_names(function), args, strict=False)) | keywords
        call = _Call(self._current, function, arguments)
        backward = call.direction == "backward"
        inputs = dict(list(arguments.items())[:2]) if backward else arguments  # a backward writes to the others
        entries = (entry for name, value in inputs.items() for entry in arrays_in(value, name))
        bad = next((name for name, array in entries if not np.isfinite(array).all()), "")
        incoming = norm(next(iter(inputs.values()))) if self._figures and backward else 0.0
        if backward:
            call.cache = list(inputs.values())[1]
            makers = self._makers.get(id(call.cache), ())
            call.origin = next((c for c in reversed(makers) if c.stem == call.stem), makers[-1] if makers else None)
        call.caller.inside.append(call)
        self._order.append(call)
        self._current = call
        return call, incoming, bad

    def _leave(self, call, result, work, seconds, incoming, alarms, bad):
        """Note what became of a call that has ended."""
        source, results, norms = next(iter(call.arguments), ""), {}, {}
        if call.direction == "forward":
            y, call.cache = result
            results = {naming.output_name(call.function): y}
            if naming.is_unique(call.cache):
                self._makers.setdefault(id(call.cache), []).append(call)
            call.find_places(naming.places(call.cache))
        else:
            each = result if type(result) is tuple else (result,)
            names = naming.gradient_names(call.function, call.origin and call.origin.function, len(each))
            results = {name: g for name, g in zip(names, each, strict=True) if g is not None}
            norms = {name: norm(g) for name, g in results.items()} if self._figures else {}
            call.find_places({})
        if call.depth == 0:
            self._count_bytes(call, call.direction == "forward")
        if self._keep:  # copies, since some owners work on in place
            call.result = {"y" if call.direction == "forward" else key: np.array(a) for key, a in results.items()}
        call.caller.seconds_inside += seconds
        array = np.asarray(next(iter(results.values()), np.empty(0)))  # none: the stem of a training step
        mean, std, largest = statistics(array) if self._figures else (float("nan"),) * 3
        call.figures = Record(
            "", call.function.__name__, call.direction, call.depth, "", source, next(iter(results), ""), array.shape,
            str(array.dtype), array.nbytes, 0, work[0], sum(work), seconds, seconds - call.seconds_inside, mean, std,
            largest, sum(int(np.size(a) - np.isfinite(a).sum()) for a in map(np.asarray, results.values())), incoming,
            norms, alarms, bad,
        )  # fmt: skip
        call.arguments = None

    def _count_bytes(self, call, kept):
        """The new bytes of a call's cache and of those inside it, in the order in which they ended."""
        for inner in call.inside:
            call.cached += self._count_bytes(inner, kept and inner.direction == "forward" and inner.place is not None)
        if kept:
            for _, array in arrays_in(call.cache):
                base = owner(array)
                if id(base) not in self._known:
                    self._known[id(base)] = base
                    call.cached += base.nbytes
        return call.cached


@contextmanager
def recording(known=(), *, model=None, keep=False, figures=True, calls=False):
    """While active, every call of a layer's forward or backward, or the loss's, is recorded: yields a `Recorder`.

    ``known`` are arrays, such as a model's ``flat``, whose memory is not counted as cached. With a ``model``, its
    parameters are known, and the calls of its ``forward`` are named by the cache that it returns. With ``keep``, copies
    of all that the calls returned are in ``recorder.kept``. With ``calls``, ``recorder.calls`` holds what it takes to
    make them again. Without ``figures``, norms and statistics are left out (NaN, {}), which saves a third of the time.
    Plain bodies run (`backend.plain`), so that each step is seen, and calls of other threads are not recorded.
    Raises  RuntimeError: another recording is under way.
    """
    recorder = Recorder(
        [*known, *([model.flat] if model is not None else [])], keep=keep, figures=figures, calls=calls
    )  # fmt: skip
    if model is not None:

        def forward(*args, **keywords):
            result = type(model).forward(model, *args, **keywords)
            recorder.name(result[1])
            return result

        model.forward = forward
    try:
        with plain(), watching(recorder.watch):
            yield recorder
    finally:
        if model is not None:
            del model.forward
