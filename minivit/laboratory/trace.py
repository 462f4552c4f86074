r"""What happens in one batch, call by call: a recorder around the layers, and the numbers it must find.

    with recording() as recorder:
        logits, cache = model.forward(images)           # anything of the layer protocol, forward or backward
    for record in recorder.records:
        print(record.path, record.output, record.shape, record.seconds)

While active, every ``X_forward`` and ``X_backward`` of `minivit.layers` and `minivit.options` is replaced, wherever the
package imported it, by a wrapper that calls the original and notes what went in and came out. The layers know nothing
of it, and their numbers stay the same to the last bit.

A forward call's **path** follows from the order of calls: the second LayerNorm inside the first block is
``blocks.0.norm2``. A backward call's path is that of the forward which made its cache: the same object, hence no
guess. Attention's backward calls `dropout_backward` once more than its forward called dropout: it makes the dropped
map again, which is cheaper than keeping it.

**Bytes cached** are those of the buffers which a cache keeps alive: each array in it is followed to the array that
owns its memory, and that one is counted once, at the first call whose cache holds it. Parameters are not counted.
q, k and v are three views of one buffer; a linear layer's cache holds the output of the layer before it.

**FLOPs**. A multiply-add is 2. Matrix products are counted exactly, from their shapes:

    linear     forward   2 n d m for n rows          backward  4 n d m, or 2 n d m without the input's gradient
    attention  forward   4 B h Q N Dh                backward  8 B h Q N Dh, where Q of the N tokens ask
    relative_attention   the same and, for queries and offsets, forward 2 B h Q (N + Q - 1) Dh, backward twice that
    sequence_pool   the scores are a linear layer; the mixture: forward 2 B N D, backward 4 B N D
    conv2d     a linear layer of kh kw I and O numbers, with a row for each output position

Everything else by operations per element, exp, tanh, erf and comparisons being one each, figures of a row none:

    linear's bias     1 forward (the addition)       1 backward (the sum over rows)
    layernorm         7                              11
    layer_scale       1                              3
    softmax           5                              4
    attention scores  1 (the scale)                  1
    relative scores   2 (extra logits, scale)        1, and 1 per entry of q (the sum of two gradients)
    gelu              8 "tanh", 5 "erf"              11 "tanh", 7 "erf"
    dropout           2 where there is a mask        2
    block             2 (two additions)              2, and 1 per parameter (adding into its gradient)
    registers         0                              1 per register's gradient entry
    position          1 per token with a position    1
    position2d        1 per patch's entry            1, and 1 per entry of half a patch sum, of each axis
    patch_embed       1 with a position embedding    1, and 1 per class token's gradient entry
    sequence_pool     0                              1 (the sum of two gradients)
    head              mean: 1 per token's entry; tanh: 1 forward, 3 backward per entry; 1 per parameter
    cross-entropy     8                              3
    groupnorm         7                              11
    weight_standardization 5                         7
    relu              2                              2
    max_pool          9 comparisons per output       18
    bottleneck        1 per output (the addition)    1 per input, and 1 per parameter
    root              0                              1 per parameter

NumPy's warnings of overflow and the like are noted in the record of the call that caused them instead of being issued.
Times leave out what the recorder does itself. Arrays are those of NumPy: on a GPU, calls return before they are done.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
import threading
from contextlib import contextmanager
from time import perf_counter
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np

from minivit.base.backend import plain
from minivit.layers.loss import softmax_cross_entropy_backward, softmax_cross_entropy_forward
from minivit.model import ViT, ViTConfig
from minivit.options.flash_attention import LONG
from minivit.options.stem.resnet import convolutions

# Path (of any block) -> the paper's equations, the tensor that goes in, the tensor that comes out. In the backward
# pass d(in) comes out. "{}" and "{+}" stand for the block's index and the next one. A path that is not listed
# belongs to the nearest listed one above it.
TENSORS = {
    "stem": ("", "images", "map"),
    "stem.root": ("", "images", "map"),
    "stem.stages": ("", "map", "map"),
    "patch_embed": ("1", "images", "z_0"),
    "patch_embed.proj": ("1", "patches", "tokens"),
    "position2d": ("1", "z_0", "z_0"),
    "registers": ("1", "z_0", "z_0"),
    "corrupt": ("1", "tokens", "shown"),
    "gather": ("", "z_0", "seen"),
    "dropout": ("1", "z_0", "z_0"),
    "blocks": ("2-3", "z_{}", "z_{+}"),
    "blocks.position": ("", "z_{}", "z_{}"),
    "blocks.position2d": ("", "z_{}", "z_{}"),
    "blocks.norm1": ("2", "z_{}", "u"),
    "blocks.msa": ("5-8", "u", "msa"),
    "blocks.msa.qkv": ("5", "u", "qkv"),
    "blocks.msa.q_norm": ("5", "q", "q"),
    "blocks.msa.k_norm": ("5", "k", "k"),
    "blocks.msa.attention": ("6-7", "q", "heads"),
    "blocks.msa.attention.softmax": ("6", "scores", "attn"),
    "blocks.msa.attention.dropout": ("7", "attn", "dropped"),
    "blocks.msa.proj": ("8", "heads", "msa"),
    "blocks.dropout1": ("2", "msa", "msa"),
    "blocks.ls1": ("2", "msa", "msa"),
    "blocks.path1": ("2", "msa", "msa"),
    "blocks.norm2": ("3", "z'_{+}", "v"),
    "blocks.mlp": ("3", "v", "mlp"),
    "blocks.mlp.fc1": ("3", "v", "hidden"),
    "blocks.mlp.gelu": ("3", "hidden", "gelu"),
    "blocks.mlp.dropout": ("3", "gelu", "gelu"),
    "blocks.mlp.fc2": ("3", "gelu", "mlp"),
    "blocks.dropout2": ("3", "mlp", "mlp"),
    "blocks.ls2": ("3", "mlp", "mlp"),
    "blocks.path2": ("3", "mlp", "mlp"),
    "head": ("4", "z_L", "logits"),
    "head.norm": ("4", "z_L", "y"),
    "head.pool": ("4", "y", "y"),
    "head.pool.scores": ("", "y", "scores"),
    "head.pool.softmax": ("", "scores", "attn"),
    "head.pre_logits": ("4", "y", "pre"),
    "head.head": ("4", "y", "logits"),
    "loss": ("", "logits", "loss"),
}

# What the calls of one function inside another one are called, in their order.
NAMES = {
    ("patch_embed", "linear"): ("proj",),
    ("block", "layernorm"): ("norm1", "norm2"),
    ("block", "dropout"): ("dropout1", "dropout2"),
    ("block", "layer_scale"): ("ls1", "ls2"),
    ("block", "drop_path"): ("path1", "path2"),
    ("msa", "linear"): ("qkv", "proj"),
    ("msa", "layernorm"): ("q_norm", "k_norm"),
    ("msa", "flash_attention"): ("attention",),
    ("msa", "relative_attention"): ("attention",),
    ("mlp", "linear"): ("fc1", "fc2"),
    ("head", "layernorm"): ("norm",),
    ("head", "sequence_pool"): ("pool",),
    ("sequence_pool", "linear"): ("scores",),
    ("head", "linear"): ("head",),  # after "pre_logits", if there is one
    ("", "softmax_cross_entropy"): ("loss",),
    ("", "squared_error"): ("loss",),
    ("", "resnet"): ("stem",),
    ("root", "conv_norm"): ("conv",),
    ("bottleneck", "conv_norm"): ("conv1", "conv2", "conv3", "downsample"),
    ("bottleneck", "relu"): ("relu1", "relu2", "relu3"),
    ("conv_norm", "weight_standardization"): ("standardize",),
    ("conv_norm", "groupnorm"): ("norm",),
}

PER_ELEMENT = {
    "layernorm_forward": 7, "layernorm_backward": 11, "softmax_forward": 5, "softmax_backward": 4,
    "layer_scale_forward": 1, "layer_scale_backward": 3, "groupnorm_forward": 7, "groupnorm_backward": 11,
    "weight_standardization_forward": 5, "weight_standardization_backward": 7, "relu_forward": 2, "relu_backward": 2,
}  # fmt: skip
GELU_PER_ELEMENT = {("forward", "tanh"): 8, ("forward", "erf"): 5, ("backward", "tanh"): 11, ("backward", "erf"): 7}


class Record(NamedTuple):
    """One call. Figures of work, time and memory include the calls inside it, those of values are of its result.

    The result is y in a forward; in a backward dx, or the first gradient that there is (the patch embedding of a
    training step has no dx, and a stem returns none at all: it adds those of its parameters into ``grads``).
    ``mean``, ``std`` and ``largest`` are over its finite entries, NaN where there is none.
    """

    path: str  # e.g. blocks.0.msa.attention.softmax
    function: str  # e.g. softmax_forward
    direction: str  # forward or backward
    depth: int  # how many recorded calls it lies in
    equation: str  # the paper's, or ""
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


def tensors(path):
    """(equation, name of what goes in, name of what comes out) for a path: see `TENSORS`."""
    parts = path.split(".")
    block = int(parts.pop(1)) if parts[0] == "blocks" and len(parts) > 1 else 0
    while parts and ".".join(parts) not in TENSORS:
        parts.pop()
    equation, *names = TENSORS.get(".".join(parts), ("", "x", "y"))
    return equation, *(name.replace("{+}", str(block + 1)).replace("{}", str(block)) for name in names)


def work(function, arguments, result):
    """Floating-point operations of one call, without those of the recorded calls inside it.

    Math    see the module's docstring
    Returns  (in matrix products, in everything else)
    """
    stem, _, direction = function.rpartition("_")
    a, forward = arguments, direction == "forward"
    first = next(iter(a.values()))  # x, or what else comes in, or dy
    if function in PER_ELEMENT:
        return 0, PER_ELEMENT[function] * first.size
    if stem == "linear":
        if forward:
            return 2 * first.size * a["W"].shape[1], result[0].size
        x, W = a["cache"]
        return (4 if result[0] is not None else 2) * x.size * W.shape[1], first.size
    if stem == "conv2d":
        _, w, _ = result[1] if forward else a["cache"]
        rows = (result[0] if forward else first).size // w.shape[3]
        return (2 if forward or result[0] is None else 4) * rows * w.size, 0
    if stem == "max_pool":
        return 0, 9 * result[0].size if forward else 18 * first.size
    if stem in ("bottleneck", "root"):
        if forward:
            return 0, result[0].size if stem == "bottleneck" else 0
        parameters = sum(g.size for g in a["grads"].values())
        return 0, parameters + (result.size if stem == "bottleneck" else 0)
    if stem in ("attention", "flash_attention"):
        q = a["q"] if forward else a["cache"].q
        scores = q.size // q.shape[-1] * (a["k"] if forward else a["cache"].k).shape[-2]
        again = 2 if stem == "flash_attention" else 0  # its backward makes the scores again
        return (4 if forward else 8 + again) * scores * q.shape[-1], scores
    if stem == "relative_attention":
        q, k = (a["q"], a["k"]) if forward else (a["cache"].q, a["cache"].k)
        queries, keys = q.shape[-2], k.shape[-2]
        products = q.size * (2 * keys + keys + queries - 1)  # of contents, of the map and values, of offsets
        scores = q.size // q.shape[-1] * keys
        return (2 if forward else 4) * products, 2 * scores if forward else scores + q.size
    if stem == "gelu":
        cache = result[1] if forward else a["cache"]
        return 0, GELU_PER_ELEMENT[direction, cache.kind] * first.size
    if stem == "dropout":
        mask = (result[1] if forward else a["cache"]).mask
        return 0, 0 if mask is None else 2 * first.size
    if stem == "block":
        if forward:
            return 0, 2 * result[0].size
        return 0, 2 * first.size + sum(g.size for g in a["grads"].values())
    if stem == "patch_embed":
        if forward:
            return 0, result[0].size if a.get("pos_embed") is not None else 0
        per_picture = first[0].size * a["cache"].has_position + first.shape[2] * a["cache"].has_class_token
        return 0, len(first) * per_picture
    if stem == "registers":
        return 0, 0 if forward else len(first) * a["cache"].count * first.shape[2]
    if stem == "position":
        added = len(first) * first.shape[2] * (first.shape[1] - (result[1] if forward else a["cache"]).registers)
        return 0, added
    if stem == "position2d":
        g = (result[1] if forward else a["cache"]).grid_size
        return 0, (len(first) if forward else len(first) + 1) * first.shape[2] * g * g
    if stem == "sequence_pool":
        tokens = first.size if forward else a["cache"].scores.x.size
        return (2 if forward else 4) * tokens, 0 if forward else tokens
    if stem == "head":
        cache = result[1] if forward else a["cache"]
        pooled = first[:, cache.read].size if cache.pooling in ("mean", "avg") and forward else 0
        squashed = 0 if cache.tanh is None else (1 if forward else 3) * cache.tanh.size
        own = (
            []
            if forward
            else [g for name, g in a["grads"].items() if name.startswith(("norm.", "attention_pool.", "pre_", "head."))]
        )
        return 0, pooled + squashed + sum(g.size for g in own)
    if stem == "softmax_cross_entropy":
        return 0, 8 * first.size if forward else 3 * result.size
    return 0, 0  # msa, mlp, drop_path, conv_norm, stage, resnet: all of it is inside


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
    """A call under way: where it is, and what the calls inside it have summed up to."""

    def __init__(self, path, stem, arguments):
        self.path, self.stem, self.arguments = path, stem, arguments
        self.count = {}  # calls inside it so far, by function
        self.seconds, self.cached, self.matmul_flops, self.flops = 0.0, 0, 0, 0  # of the calls inside it


class Recorder:
    """Wraps functions of the layer protocol and keeps a `Record` of each call; see `recording`.

    ``records`` lists them in the order in which they began. Their caches are kept as long as the recorder is.
    """

    def __init__(self, known=(), *, keep=False, figures=True, calls=False):
        self.records, self._figures = [], figures
        self.kept = {} if keep else None
        self.calls = {} if calls else None
        self._calls = [_Call("", "", {})]  # the calls under way, under one that stands for the caller
        self._paths = {}  # (id of a cache, function's stem) -> (the cache itself, so that its id stays its own; path)
        self._counted = {id(owner(array)): owner(array) for array in known}
        self._paused = 0.0  # seconds spent on recording
        self._blocks = 0
        self._thread = threading.get_ident()

    def _name(self, call, stem):
        """The next name for a call of ``stem`` inside ``call``."""
        n = call.count[stem] = call.count.get(stem, -1) + 1
        if stem == "block":
            self._blocks += 1
            return f"blocks.{self._blocks - 1}"
        if stem in ("position", "position2d") and self._blocks:
            return f"blocks.{self._blocks}.{stem}"  # of the block to come
        if stem in ("stage", "bottleneck"):
            return f"{'stages' if stem == 'stage' else 'blocks'}.{n}"
        names = NAMES.get((call.stem, stem), (stem,))
        if (call.stem, stem) == ("head", "linear") and "pre_logits.weight" in call.arguments["params"]:
            names = ("pre_logits", *names)
        return names[n % len(names)]

    def _path(self, stem, direction, arguments):
        if direction == "backward":
            _, path = self._paths.get((id(arguments["cache"]), stem), (None, ""))
            if path:
                return path
        elif stem == "patch_embed":  # another forward pass is about to come to its blocks
            self._blocks = 0
        parent = self._calls[-1]
        return ".".join(part for part in (parent.path, self._name(parent, stem)) if part)

    def _new_bytes(self, cache):
        total = 0
        for _, array in arrays_in(cache):
            base = owner(array)
            if id(base) not in self._counted:
                self._counted[id(base)] = base
                total += base.nbytes
        return total

    def wrap(self, function):
        """The function, recorded. Calls from another thread than the recorder's are not recorded."""
        name = function.__name__
        stem, _, direction = name.rpartition("_")
        names = tuple(inspect.signature(function).parameters)

        @functools.wraps(function)
        def recorded(*args, **keywords):
            if threading.get_ident() != self._thread:
                return function(*args, **keywords)
            entered = perf_counter()
            arguments = dict(zip(names, args, strict=False)) | keywords
            call = _Call(self._path(stem, direction, arguments), stem, arguments)
            inputs = {key: value for key, value in arguments.items() if key not in ("out", "grads")}  # not read
            bad = next((key for key, array in arrays_in(inputs) if not np.isfinite(array).all()), "")
            incoming = norm(next(iter(inputs.values()))) if self._figures and direction == "backward" else 0.0
            slot, alarms = len(self.records), set()
            self.records.append(None)
            self._calls.append(call)
            self._paused += perf_counter() - entered
            started = perf_counter() - self._paused
            try:
                with np.errstate(over="call", divide="call", invalid="call", call=lambda kind, _: alarms.add(kind)):
                    result = function(*args, **keywords)
            finally:
                self._calls.pop()
            seconds = perf_counter() - self._paused - started
            entered = perf_counter()
            if stem in ("linear", "conv2d") or stem.endswith(
                "attention"
            ):  # some BLAS sound false alarms; the result is seen
                alarms.clear()
            record = self._record(call, name, result, seconds, incoming, ", ".join(sorted(alarms)), bad)
            if self.calls is not None:
                self.calls[call.path, direction] = function, args, keywords, arguments, result
            self.records[slot] = record
            parent = self._calls[-1]
            parent.seconds += record.seconds
            parent.cached += record.cached
            parent.matmul_flops += record.matmul_flops
            parent.flops += record.flops
            self._paused += perf_counter() - entered
            return result

        return recorded

    def _record(self, call, function, result, seconds, incoming, alarms, bad):
        equation, source, output = tensors(call.path)
        cached, norms = call.cached, {}
        if function.endswith("_forward"):
            direction, (y, cache) = "forward", result
            results = {output: y}
            if self._calls[-1].stem != "flash_attention":  # which keeps no mask of its blocks
                cached += self._new_bytes(cache)
            self._paths[id(cache), call.stem] = cache, call.path
        else:
            direction, results = "backward", self._gradients(call.stem, result)
            if not self._is_forward_again(call):
                given = next(iter(results), "")  # that of x, unless nobody asked for it
                of_x = given in ("", f"d{ARGUMENTS.get(call.stem, ('x',))[0]}")
                source, output = f"d{output}", f"d{source}" if of_x else given
            norms = {key: norm(g) for key, g in results.items()} if self._figures else {}
        if self.kept is not None and not (direction == "backward" and self._is_forward_again(call)):
            # a forward's result goes by the name "y"; copies, since some owners work on in place
            keys = ("y",) if direction == "forward" else tuple(results)
            self.kept |= {
                (call.path, direction, key): np.array(a) for key, a in zip(keys, results.values(), strict=True)
            }
        array = np.asarray(next(iter(results.values()), np.empty(0)))  # none: the root of a training step
        matmul_flops, other_flops = work(function, call.arguments, result)
        mean, std, largest = statistics(array) if self._figures else (float("nan"),) * 3
        return Record(
            call.path, function, direction, len(self._calls) - 1, equation, source, output, array.shape,
            str(array.dtype), array.nbytes, cached, call.matmul_flops + matmul_flops,
            call.flops + matmul_flops + other_flops, seconds, seconds - call.seconds, mean, std, largest,
            sum(int(np.size(each) - np.isfinite(each).sum()) for each in results.values()), incoming,
            norms, alarms, bad,
        )  # fmt: skip

    def _is_forward_again(self, call):
        """Is it attention's backward, which has dropout's backward make the dropped map again from the map?"""
        parent = self._calls[-1]
        if parent.stem not in ("attention", "relative_attention") or call.stem != "dropout":
            return False
        return call.arguments["dy"] is parent.arguments["cache"].softmax.y

    @staticmethod
    def _gradients(stem, result):
        """What a backward returned, without None, by names made of those of the forward's arguments."""
        result = result if isinstance(result, tuple) else (result,)
        pairs = zip(ARGUMENTS.get(stem, ("x",)), result, strict=True)
        return {f"d{name}": gradient for name, gradient in pairs if gradient is not None}


ARGUMENTS = {  # of the forwards, where there are others than x
    "linear": ("x", "W", "b"),
    "layernorm": ("x", "w", "b"),
    "layer_scale": ("x", "gamma"),
    "attention": ("q", "k", "v"),
    "flash_attention": ("q", "k", "v"),
    "relative_attention": ("q", "k", "v", "r"),
    "msa": ("x", "Wqkv", "bqkv", "Wproj", "bproj", "wq", "bq", "wk", "bk", "r"),
    "mlp": ("x", "W1", "b1", "W2", "b2"),
    "block": ("z",),
    "patch_embed": ("images", "W", "b", "cls_token", "pos_embed"),
    "registers": ("z", "reg_token"),
    "position": ("z", "pos_embed"),
    "position2d": ("z", "X", "Y"),
    "corrupt": ("e", "mask_token"),
    "gather": ("z",),
    "sequence_pool": ("x", "W", "b"),
    "head": ("z",),
    "softmax_cross_entropy": ("logits",),
    "squared_error": ("y",),
    "conv2d": ("x", "w"),
    "weight_standardization": ("w",),
    "groupnorm": ("x", "w", "b"),
    "conv_norm": ("x", "kernel", "w", "b"),
    "root": ("images",),
    "resnet": ("images",),
}


@contextmanager
def recording(known=(), *, keep=False, figures=True, calls=False):
    """While active, every call of a layer's forward or backward, or the loss's, is recorded: yields a `Recorder`.

    ``known`` are arrays, such as a model's ``flat``, whose memory is not counted as cached. With ``keep``, copies of
    all that the calls returned are in ``recorder.kept``: {(path, direction, name): array}, a forward's by the name "y".
    With ``calls``, ``recorder.calls`` is {(path, direction): (function, args, keywords, arguments by name, result)}.
    Without ``figures``, norms and statistics are left out (NaN, {}), which saves a third of the time.
    Plain bodies run (`backend.plain`), so that each step is seen.
    The functions are put back at the end, whatever happens; records of calls that an exception cut short are dropped.
    It changes the package for the whole process but records its own thread alone: not for production, and not two at
    once in different threads.
    """
    recorder, changed, wrapped = Recorder(known, keep=keep, figures=figures, calls=calls), [], {}
    for module in list(sys.modules.values()):
        if not getattr(module, "__name__", "").startswith("minivit"):
            continue
        for key, value in list(vars(module).items()):
            if _is_layer_function(value):
                changed.append((module, key, value))
                wrapped[value] = wrapped.get(value) or recorder.wrap(value)
    try:
        for module, key, function in changed:
            setattr(module, key, wrapped[function])
        with plain():
            yield recorder
    finally:
        for module, key, function in changed:
            setattr(module, key, function)
        recorder.records = [record for record in recorder.records if record is not None]


def _is_layer_function(value):
    return (
        isinstance(value, FunctionType)
        and value.__name__.endswith(("_forward", "_backward"))
        and value.__module__.startswith(("minivit.layers.", "minivit.options."))
    )


class Totals(NamedTuple):
    """Sums over a trace. FLOPs are per batch; see the module's docstring for what is counted."""

    forward_matmul_flops: int
    backward_matmul_flops: int
    forward_flops: int
    backward_flops: int
    parameters: int
    cached: int  # bytes
    forward_seconds: float
    backward_seconds: float


class Trace(NamedTuple):
    """One recorded batch."""

    config: ViTConfig
    batch: int
    dtype: str
    records: list[Record]
    totals: Totals
    logits: Any  # (B, K)
    loss: Any  # ()
    gradient: Any  # flat, or None without a backward pass


def trace_batch(config, images, labels, *, flat=None, seed=0, dtype=np.float32, rng=None, label_smoothing=0.0,
                backward=True):  # fmt: skip
    """One batch, forward and backward through model and loss, recorded.

    Shapes  images (B, H, W, C), labels (B,) or (B, K)  ->  Trace
    The parameters are ``flat``, or new ones from ``seed`` in ``dtype``. Dropout acts if a Generator is given.
    Raises  InputError: pictures that do not fit the configuration;  ValueError: labels that do not.
    """
    model = ViT(config, seed=seed, dtype=dtype, flat=flat)
    images = np.array(images)  # its own buffer, so that its bytes are those of this batch
    gradient, grads = model.gradient_buffer() if backward else (None, None)
    with recording([model.flat]) as recorder:
        logits, cache = model.forward(images, rng=rng)
        loss, loss_cache = softmax_cross_entropy_forward(logits, labels, label_smoothing=label_smoothing)
        if backward:
            model.backward(softmax_cross_entropy_backward(1.0, loss_cache), cache, grads)
    records = recorder.records

    def total(field, direction):
        return sum(getattr(r, field) for r in records if r.depth == 0 and r.direction == direction)

    totals = Totals(
        total("matmul_flops", "forward"), total("matmul_flops", "backward"), total("flops", "forward"),
        total("flops", "backward"), int(model.flat.size), total("cached", "forward"), total("seconds", "forward"),
        total("seconds", "backward"),
    )  # fmt: skip
    return Trace(config, len(images), str(model.flat.dtype), records, totals, logits, loss, gradient)


class ExpectedFLOPs(NamedTuple):
    """FLOPs of the matrix products of a batch."""

    forward: int
    backward: int


def _asking_tokens(config, every_token=False):
    """How many tokens of a picture ask: (in all blocks together, in those blocks that keep no attention map)."""
    N = config.num_tokens
    last = 1 if config.pooling == "cls" and not every_token else N
    asking = (config.depth - 1) * N + last
    if config.sequence_length < LONG or config.pos_embed == "relative":
        return asking, 0
    return asking, asking if last >= LONG else asking - last


def _stem_maps(config):
    """Yield (convolution, positions that it gives) for each convolution of a picture's way through the stem."""
    side = config.image_size
    if not config.stem:
        return
    for layer in convolutions(config.channels, config.stem_width, config.stem_units):
        conv = layer.names[0].rpartition(".weight")[0].rpartition(".")[2]
        if "downsample" in layer.names[0]:
            yield layer, side**2  # conv2 has halved it already
            continue
        side = -(-side // layer.stride)
        yield layer, side**2
        if conv == "conv":
            side = -(-side // 2)  # the root's pooling


def expected_flops(config, batch, *, every_token=False):
    """FLOPs in matrix products that one batch takes, from the configuration alone.

    Math    forward / B = 2 n P^2 C D + sum_blocks (6 N D^2 + 4 Q N D + 2 Q (D^2 + 2 D M)) + 2 (D R + R K), or 2 D K for
            the last term without a pre-logits layer, and 4 n D for sequence pooling; n patches, N tokens, of which Q
            ask: 1 in the last block if the head reads the class token alone, else N; ``every_token`` counts N, as
            published figures do
            axial attention: 4 Q g D in place of 4 Q N D, for g patches in a row; relative positions, with S tokens in a
            sequence (N, or g): 2 Q (S + Q - 1) D more in each block, 2 N (2 g - 1) D with axial attention
            a stem adds 2 H' W' kh kw I O for each convolution; C is then the channels of its map
            backward = 2 forward - the first product, 2 B n P^2 C D or the root's: two products for each one, but no
            gradient of the images; and 2 B Q N D for each block of Q >= `msa.LONG`, which makes its attention map again
    Returns  ExpectedFLOPs
    """
    c, D = config, config.width
    embed = 2 * c.grid_size**2 * c.patch_size**2 * c.patch_channels * D
    stem = [2 * positions * math.prod(layer.kernel) for layer, positions in _stem_maps(c)]
    N, (asking, again) = c.num_tokens, _asking_tokens(c, every_token)
    S = c.sequence_length
    blocks = c.depth * 6 * N * D**2 + asking * (4 * S * D + 2 * (D**2 + 2 * D * c.mlp_dim))
    if c.pos_embed == "relative":
        last = asking - (c.depth - 1) * N  # tokens that ask in the last block
        blocks += 2 * D * ((c.depth - 1) * N * (2 * S - 1) + last * (S + min(S, last) - 1))
    pool = 4 * c.grid_size**2 * D if c.pooling == "seq" else 0
    head = pool + 2 * (D * c.pre_logits + (c.pre_logits or D) * c.num_classes)
    forward = sum(stem) + embed + blocks + head
    first = stem[0] if stem else embed
    return ExpectedFLOPs(batch * forward, batch * (2 * forward - first + 2 * again * S * D))


def attention_flops(config, batch):
    """Those of `expected_flops`, forward and backward together, that grow with N^2, without those of offsets.

    Math    sum_blocks B (12 Q N D + 2 [Q >= `msa.LONG`] Q N D): two products forward and four backward, q k^T again;
            g in place of N with axial attention
    """
    asking, again = _asking_tokens(config)
    return batch * (12 * asking + 2 * again) * config.sequence_length * config.width


def expected_cache_bytes(config, batch, dtype=np.float32, *, dropout=True):
    """Bytes that the caches of one forward pass and its loss keep alive, from the configuration alone.

    Math    numbers / B = n P^2 C + sum_blocks (N (5 D + 1) + Q (3 D + 3 M + 1 + h N)) + rows (D + 1) + D + R + 2 K + 1
            Q = 1 in the last block if the head reads the class token alone, else N
            where Q >= `msa.LONG`, h Q takes the place of h Q N, and there is no mask of attention, unless positions are
            relative; axial attention has h Q g in its place; positions keep nothing
            rows = 1 normalised by the head for the class token or the mean "avg", n for "mean" and sequence pooling,
            which keeps n (D + 1) more
            LayerScale: 2 Q D more in each block; QK-norm: (Q + N) (D + h)
            masks / B, one byte per entry, each only with its rate above 0 and ``dropout`` (a Generator was given):
            N D for the embedding;  Q (2 D + M) in each block;  h Q N of its attention;  1 per branch of the blocks
            whose drop path has a rate above 0: all but the first, or the only one (axial attention: g)
            a stem adds, per picture, the picture; for each convolution xhat and the O rstd of its GroupNorm; ReLU's
            results, of a unit those of conv1, conv2 and the unit; and of the pooling its result and a byte for each
            winner. And once, whatever B, each standardised kernel and its O deviations. What is cut into patches is
            counted among the patches where these are views of it: where P = 1 or n = 1.
    """
    c, n, N, D, M = config, config.grid_size**2, config.num_tokens, config.width, config.mlp_dim
    patches = n * c.patch_size**2 * c.patch_channels
    asking, again = _asking_tokens(c)
    stem, constant, winners = _stem_cache(c)
    # norm1: xhat, rstd; what it gives to qkv; q, k, v
    blocks = c.depth * N * ((D + 1) + D + 3 * D)
    # heads; norm2: xhat, rstd; what it gives to fc1; the GELU's x and gate; what it gives
    blocks += asking * (D + (D + 1) + D + 3 * M)
    blocks += (c.layer_scale > 0) * asking * 2 * D  # what it scales, in both branches
    blocks += c.qk_norm * (asking + c.depth * N) * (D + c.num_heads)  # xhat and rstd of queries and keys
    maps = c.num_heads * c.sequence_length * (asking - again)
    blocks += maps + c.num_heads * again  # the attention maps, or the logarithms of their rows' sums
    rows = 1 if c.pooling in ("cls", "avg") else n
    pool = n * (D + 1) if c.pooling == "seq" else 0
    numbers = stem + patches + blocks + rows * (D + 1) + pool + D + c.pre_logits + 2 * c.num_classes + 1
    masks = 0
    if dropout:
        masks += (c.dropout > 0) * (N * D + asking * (2 * D + M))
        masks += (c.attention_dropout > 0) * maps
        sequences = c.num_tokens // c.sequence_length
        masks += (c.drop_path > 0) * 2 * max(c.depth - 1, 1) * sequences  # of several blocks, the first has rate 0
    itemsize = np.dtype(dtype).itemsize
    return batch * (numbers * itemsize + winners + masks) + constant * itemsize


def _stem_cache(config):
    """What a stem's cache holds: (numbers per picture, numbers whatever the batch, bytes of winners per picture)."""
    c, numbers, constant, winners = config, 0, 0, 0
    if not c.stem:
        return 0, 0, 0
    numbers += c.image_size**2 * c.channels
    for layer, positions in _stem_maps(c):
        O = layer.kernel[3]  # noqa: E741
        numbers += positions * O + O  # xhat, rstd
        constant += math.prod(layer.kernel) + O
        if "downsample" not in layer.names[0]:
            numbers += positions * O  # what ReLU makes of it; of conv3, the unit's result
        if layer.kernel[0] == 7:
            side = -(-math.isqrt(positions) // 2)
            winners = side**2 * O
            numbers += side**2 * O if c.stem_units else 0  # the pooled map, which the first unit keeps
    if c.stem_units and (c.patch_size == 1 or c.grid_size == 1):
        numbers -= positions * O  # the last unit's result, of which the patches are views
    return numbers, constant, winners


class NonFinite(NamedTuple):
    """The first tensor that is not finite, and where it came from."""

    tensor: str
    direction: str
    made_by: str  # path and function; "" if it came from outside
    inputs_finite: bool  # was all that this operation read finite?
    message: str


def events(records):
    """Yield ("in" or "out", record, the record around it or None) in the order in which calls began and ended."""
    open_calls = []
    for record in [*records, None]:
        while open_calls and (record is None or record.depth <= open_calls[-1].depth):
            ended = open_calls.pop()
            yield "out", ended, open_calls[-1] if open_calls else None
        if record is not None:
            yield "in", record, open_calls[-1] if open_calls else None
            open_calls.append(record)


def first_non_finite(trace):
    """The first tensor of a trace, forward or backward, that holds a NaN or an infinity.

    ``trace`` is a `Trace` or a `Recorder`. A tensor is seen where a recorded call reads it or returns it: one that a
    call is the first to read was made between calls, by the function around it. A temporary that overflowed inside a
    call is known from NumPy's warning; what the call returns may well be finite (LayerNorm of huge numbers is 0).
    Returns  NonFinite, or None if every tensor is finite
    """
    for event, r, around in events(trace.records):
        where = f"{r.path} ({r.function})"
        if event == "in" and r.bad_input:
            tensor = r.bad_input
            if tensor in ("x", "z", "q", "dy", "dz"):
                tensor = r.input
            if around is None:
                return NonFinite(
                    tensor, r.direction, "", False,
                    f"{tensor}, which {where} reads in the {r.direction} pass, is not finite: it is a parameter or an "
                    "argument, no tensor before it is at fault",
                )  # fmt: skip
            maker = f"{around.path} ({around.function})"
            return NonFinite(
                tensor, r.direction, maker, True,
                f"{tensor}, made by {maker} in its own lines and then read by {where}, is the first tensor of the "
                f"{r.direction} pass that is not finite; all that {around.function} read was finite",
            )  # fmt: skip
        if event == "out" and r.nonfinite:
            return NonFinite(
                r.output, r.direction, where, True,
                f"{r.output}, made by {where}, is the first tensor of the {r.direction} pass that is not finite "
                f"({r.nonfinite:,} entries); all that {r.function} read was finite",
            )  # fmt: skip
        if event == "out" and r.alarms:
            return NonFinite(
                "a temporary", r.direction, where, True,
                f"a temporary of {where} is the first tensor of the {r.direction} pass that is not finite "
                f"({r.alarms}), though what {r.function} returned, {r.output}, is finite again",
            )  # fmt: skip
    return None
