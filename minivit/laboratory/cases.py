"""What `minivit gradcheck` and the tests check: every layer, the loss, small models, at shapes that reveal.

All sizes differ from one another and the token counts are odd, so that a transposed axis, a sum over the
wrong one or a factor of B, N or h cannot hide. A case is a function of a Generator that gives (forward,
backward, args, argument names).
"""

from functools import partial

import numpy as np

from minivit.base.backend import array_module, plain
from minivit.base.pairs import Pair, Step, chain
from minivit.layers.attention import ATTENTION
from minivit.layers.drop_path import drop_path_backward, drop_path_forward
from minivit.layers.dropout import dropout_backward, dropout_forward
from minivit.layers.gelu import GELU
from minivit.layers.layernorm import layernorm_backward, layernorm_forward
from minivit.layers.linear import linear_backward, linear_forward
from minivit.layers.loss import (
    softmax_cross_entropy_backward,
    softmax_cross_entropy_forward,
    squared_error_backward,
    squared_error_forward,
)
from minivit.layers.mlp import mlp_backward, mlp_forward
from minivit.layers.msa import msa_backward, msa_forward
from minivit.layers.patch_embed import patch_embed_backward, patch_embed_forward
from minivit.layers.softmax import softmax_backward, softmax_forward
from minivit.masked import MaskedConfig, MaskedViT, draw_plan, masked_table
from minivit.masked.corrupt import corrupt_backward, corrupt_forward
from minivit.masked.gather import gather_backward, gather_forward
from minivit.model import ViTConfig, compose
from minivit.model.table import block_table, parameter_table
from minivit.options.attention_dropout import dropped_attention_backward, dropped_attention_forward
from minivit.options.axial import from_axis, to_axis
from minivit.options.exact_gelu import EXACT_GELU
from minivit.options.first_tokens import with_first_queries
from minivit.options.flash_attention import flash_attention_backward, flash_attention_forward
from minivit.options.gated_mlp import gated_mlp_backward, gated_mlp_forward
from minivit.options.layer_scale import layer_scale_backward, layer_scale_forward
from minivit.options.position import position_backward, position_forward
from minivit.options.position2d import position2d_backward, position2d_forward
from minivit.options.qk_norm import normed_attention_backward, normed_attention_forward
from minivit.options.registers import registers_backward, registers_forward
from minivit.options.relative_attention import relative_attention_backward, relative_attention_forward
from minivit.options.sequence_pool import sequence_pool_backward, sequence_pool_forward
from minivit.options.stem.conv2d import conv2d_backward, conv2d_forward
from minivit.options.stem.groupnorm import groupnorm_backward, groupnorm_forward
from minivit.options.stem.max_pool import max_pool_backward, max_pool_forward
from minivit.options.stem.relu import relu_backward, relu_forward
from minivit.options.stem.resnet import (
    CONV1,
    CONV2,
    CONV3,
    DOWNSAMPLE,
    bottleneck_backward,
    bottleneck_forward,
    convolutions,
    resnet_backward,
    resnet_forward,
)
from minivit.options.stem.weight_standardization import (
    weight_standardization_backward,
    weight_standardization_forward,
)

B, N, D, HEADS, M, K = 2, 5, 12, 3, 7, 6  # images, tokens, width, heads (so Dh = 4), MLP width, classes


def _arrays(rng, *shapes):
    return [rng.standard_normal(shape) for shape in shapes]


def _linear(rng):
    return linear_forward, linear_backward, _arrays(rng, (B, N, D), (D, M), (M,)), ("x", "W", "b")


def _layernorm(rng):
    return layernorm_forward, layernorm_backward, _arrays(rng, (B, N, D), (D,), (D,)), ("x", "w", "b")


def _layer_scale(rng):
    return layer_scale_forward, layer_scale_backward, _arrays(rng, (B, N, D), (D,)), ("x", "gamma")


def _activation(pair):
    def case(rng):
        return pair.forward, pair.backward, [3.0 * rng.standard_normal((B, N, M))], ("x",)

    return case


def _softmax(rng):
    return softmax_forward, softmax_backward, [3.0 * rng.standard_normal((B, HEADS, N, M))], ("x",)


def _dropout(rng):
    seed = int(rng.integers(1 << 30))  # the same mask at each call

    def forward(x):
        return dropout_forward(x, rate=0.4, rng=np.random.default_rng(seed))

    return forward, dropout_backward, _arrays(rng, (B, N, D)), ("x",)


def _dropout_off(rng):
    return lambda x: dropout_forward(x, rate=0.4), dropout_backward, _arrays(rng, (B, N, D)), ("x",)


def _drop_path(rng):
    seed = int(rng.integers(1 << 30))

    def forward(x):
        return drop_path_forward(x, rate=0.4, rng=np.random.default_rng(seed))

    return forward, drop_path_backward, _arrays(rng, (11, N, M)), ("x",)


def _attention(pair, queries=N, own=()):
    def case(rng):
        Dh = D // HEADS
        args = _arrays(rng, (B, HEADS, queries, Dh), (B, HEADS, N, Dh), (B, HEADS, N, Dh), *own)
        return pair.forward, pair.backward, args, ("q", "k", "v", *("abcd"[: len(own)]))

    return case


def _seeded(function, **settings):
    """The function with a Generator that draws the same numbers at each call."""
    return lambda *args: function(*args, rng=np.random.default_rng(1), **settings)


def _flash_attention(rate, shapes=((B, HEADS, N, D // HEADS),) * 3):
    def case(rng):
        forward = _seeded(flash_attention_forward, rate=rate, keys=2)  # blocks of 2, 2 and 1 keys
        return forward, flash_attention_backward, _arrays(rng, *shapes), ("q", "k", "v")

    return case


def _relative_attention(rate, queries=N):
    def case(rng):
        Dh = D // HEADS
        args = _arrays(rng, (B, HEADS, queries, Dh), (B, HEADS, N, Dh), (B, HEADS, N, Dh), (1, 2 * N - 1, Dh))
        return _seeded(relative_attention_forward, rate=rate), relative_attention_backward, args, ("q", "k", "v", "r")

    return case


def _msa(attend, own=()):
    def case(rng):
        x, *weights = _arrays(rng, (B, N, D), (D, 3 * D), (3 * D,), (D, D), (D,))
        args = [x, *(0.3 * W for W in weights)]  # scores of order 1: softmax's gradients vanish where it saturates
        args += _arrays(rng, *own)
        names = ("x", "Wqkv", "bqkv", "Wproj", "bproj", *("abcd"[: len(own)]))
        forward = partial(msa_forward, num_heads=HEADS, attend=attend)
        return forward, partial(msa_backward, attend=attend), args, names

    return case


def _mlp(rng):
    args = _arrays(rng, (B, N, D), (D, M), (M,), (M, D), (D,))
    return mlp_forward, mlp_backward, args, ("x", "W1", "b1", "W2", "b2")


def _gated_mlp(rng):
    args = _arrays(rng, (B, N, D), (D, 2 * M), (2 * M,), (M, D), (D,))
    return gated_mlp_forward, gated_mlp_backward, args, ("x", "W1", "b1", "W2", "b2")


def _mlp_dropout(rng):
    def pair():  # the same mask at each call
        drop = Pair(partial(dropout_forward, rate=0.3, rng=np.random.default_rng(3)), dropout_backward)
        return chain(GELU, drop, "dropout")

    args = _arrays(rng, (B, N, D), (D, M), (M,), (M, D), (D,))
    return (
        lambda *args: mlp_forward(*args, activation=pair()), partial(mlp_backward, activation=pair()), args,
        ("x", "W1", "b1", "W2", "b2"),
    )  # fmt: skip


def _by_name(make, names):
    """A step, which takes and fills mappings, in the protocol of the layers; ``make()`` composes it anew."""

    def forward(z, *values):
        step = make()
        y, cache = step.forward(z, dict(zip(names, values, strict=True)))
        return y, (step, cache, [value.shape for value in values])

    def backward(dy, cache):
        step, inner, shapes = cache
        zeros = array_module(dy).zeros
        grads = {name: zeros(shape, dy.dtype) for name, shape in zip(names, shapes, strict=True)}
        dz = step.backward(dy, inner, grads)
        return (dz, *grads.values())

    return forward, backward


def _block(reads=None, **options):
    """A block of any options, as a model composes it."""

    def case(rng):
        config = ViTConfig(**{**_TINY, "depth": 2, **options})

        def make():
            return compose.block(config, 1, rng=np.random.default_rng(4), reads=reads)

        shapes = {f"/{row.name}": row.shape for row in parameter_table(config)}
        shapes |= {row.name: row.shape for row in block_table(config)}
        names = make().names
        values = [0.3 * rng.standard_normal(shapes[name]) for name in names]
        forward, backward = _by_name(make, names)
        z = rng.standard_normal((8, config.num_tokens, D))  # enough images for stochastic depth to drop some
        return forward, backward, [z, *values], ("z", *names)

    return case


def _patch_embed(class_tokens):
    def case(rng):
        P, C = 2, 4
        height, width = (4, 6) if class_tokens else (6, 10)  # 2 x 3 patches and the class token, or 3 x 5 patches
        tokens = height * width // P**2 + class_tokens
        args = _arrays(rng, (3, height, width, C), (P * P * C, D), (D,), (1, tokens, D))
        if class_tokens:
            forward = partial(patch_embed_forward, patch_size=P)
            names = ("images", "W", "b", "cls_token", "pos_embed")
            return forward, patch_embed_backward, [*args[:3], *_arrays(rng, (1, 1, D)), args[3]], names

        def without(images, W, b, pos_embed):
            nothing = array_module(W).zeros((1, 0, D), W.dtype)
            return patch_embed_forward(images, W, b, nothing, pos_embed, patch_size=P)

        def backward(dz, cache):
            dimages, dW, db, dnothing, dpos_embed = patch_embed_backward(dz, cache)
            assert dnothing.shape == (1, 0, D)
            return dimages, dW, db, dpos_embed

        return without, backward, args, ("images", "W", "b", "pos_embed")

    return case


def _patch_embed_bytes(rng):
    P, C = 2, 4
    images = rng.integers(0, 256, (3, 4, 6, C), dtype=np.uint8)

    def forward(*args):
        return patch_embed_forward(array_module(*args).asarray(images), *args, patch_size=P)

    args = _arrays(rng, (P * P * C, D), (D,), (1, 1, D), (1, 7, D))
    names = ("W", "b", "cls_token", "pos_embed")
    return forward, lambda dz, cache: patch_embed_backward(dz, cache)[1:], args, names


def _registers(at):
    def case(rng):
        args = _arrays(rng, (B, N, D), (1, 3, D))
        return lambda *a: registers_forward(*a, at=at), registers_backward, args, ("z", "reg_token")

    return case


def _position(at, registers):
    def case(rng):
        args = _arrays(rng, (B, N, D), (1, N - registers, D))
        return lambda *a: position_forward(*a, at=at, registers=registers), position_backward, args, ("z", "pos_embed")

    return case


def _position2d(rng):
    args = _arrays(rng, (B, 2 + 3 * 3, D), (1, 3, D // 2), (1, 3, D // 2))  # nine patches behind two other tokens
    return position2d_forward, position2d_backward, args, ("z", "X", "Y")


def _axial(columns):
    def case(rng):
        def forward(z):
            return to_axis(z, 3, columns=columns), columns

        return forward, lambda dy, columns: from_axis(dy, 3, columns=columns), _arrays(rng, (B, 9, D)), ("z",)

    return case


def _corrupt(rng):
    # patches that stay, are masked, are copied once, twice and never, and one that is replaced and copied elsewhere
    sources = np.array([[0, N, 0, 1, 1], [3, 1, N, N, 4]])

    def forward(e, mask_token):
        return corrupt_forward(e, mask_token, array_module(e).asarray(sources))

    return forward, corrupt_backward, _arrays(rng, (B, N, D), (1, 1, D)), ("e", "mask_token")


def _gather(rng):
    index = np.array([[4, 0, 1], [2, 3, 0]])
    return lambda z: gather_forward(z, array_module(z).asarray(index)), gather_backward, _arrays(rng, (B, N, D)), ("z",)


def _sequence_pool(rng):
    x, W, b = _arrays(rng, (B, N, D), (D, 1), (1,))
    return sequence_pool_forward, sequence_pool_backward, [x, 0.3 * W, b], ("x", "W", "b")


def _head(**options):
    def case(rng):
        config = ViTConfig(**{**_TINY, **options})
        shapes = {row.name: row.shape for row in parameter_table(config)}

        def make():
            return compose.head(config)

        names = make().names
        forward, backward = _by_name(make, names)
        z, *values = _arrays(rng, (B, config.num_tokens, D), *[shapes[name] for name in names])
        return forward, backward, [z, *values], ("z", *names)

    return case


def _conv2d(kernel, stride, size):
    def case(rng):
        args = _arrays(rng, (B, *size, 3), (*kernel, 3, 4))
        return lambda *a: conv2d_forward(*a, stride=stride), conv2d_backward, args, ("x", "w")

    return case


def _weight_standardization(rng):
    return weight_standardization_forward, weight_standardization_backward, _arrays(rng, (3, 2, 4, 5)), ("w",)


def _groupnorm(rng):
    args = _arrays(rng, (B, 5, 3, 6), (6,), (6,))
    return lambda *a: groupnorm_forward(*a, groups=3), groupnorm_backward, args, ("x", "w", "b")


def _relu(rng):
    return relu_forward, relu_backward, _arrays(rng, (B, N, M)), ("x",)


def _max_pool(size):
    def case(rng):
        return max_pool_forward, max_pool_backward, _arrays(rng, (B, *size, 3)), ("x",)

    return case


def _bottleneck(channels, stride, downsample):
    narrow = 4

    def case(rng):
        kernels = [(1, 1, channels, narrow), (3, 3, narrow, narrow), (1, 1, narrow, 4 * narrow)]
        names = CONV1 + CONV2 + CONV3
        if downsample:
            kernels, names = [*kernels, (1, 1, channels, 4 * narrow)], names + DOWNSAMPLE
        values = [a for kernel in kernels for a in _arrays(rng, kernel, kernel[3:], kernel[3:])]

        step = Step(partial(bottleneck_forward, stride=stride, groups=2), bottleneck_backward, names)
        x = rng.standard_normal((B, 5, 3, channels))
        return *_by_name(lambda: step, names), [x, *values], ("x", *names)

    return case


def _resnet(units):
    def case(rng):
        layers = convolutions(1, 3, units)  # two weights of a channel, standardised, are 1 and -1 and have no gradient
        names = tuple(name for layer in layers for name in layer.names)
        values = [a for layer in layers for a in _arrays(rng, layer.kernel, layer.kernel[3:], layer.kernel[3:])]

        step = Step(
            partial(resnet_forward, units=units, groups=1), partial(resnet_backward, need_dimages=True), names
        )  # fmt: skip
        images = rng.standard_normal((B, 9, 11, 1))
        return *_by_name(lambda: step, names), [images, *values], ("images", *names)

    return case


def _loss(soft, label_smoothing):
    def case(rng):
        logits = 2.0 * rng.standard_normal((5, K))
        labels = rng.dirichlet(np.ones(K), 5) if soft else rng.integers(0, K, 5)

        def forward(logits):
            at = array_module(logits).asarray(labels)
            return softmax_cross_entropy_forward(logits, at, label_smoothing=label_smoothing, denominator=7)

        return forward, softmax_cross_entropy_backward, [logits], ("logits",)

    return case


def _squared_error(rng):
    y, targets = _arrays(rng, (5, K), (5, K))

    def forward(y):
        return squared_error_forward(y, array_module(y).asarray(targets, dtype=y.real.dtype), denominator=7)

    return forward, squared_error_backward, [y], ("y",)


def _masked(config, masked):
    def case(rng):
        table = masked_table(config, masked)
        images = rng.integers(0, 256, (3, config.image_size, config.image_size, config.channels), dtype=np.uint8)
        plan = draw_plan(config, masked, 3, rng)

        def forward(*values):
            xp = array_module(*values)
            model = MaskedViT(config, masked, flat=xp.concatenate([value.ravel() for value in values]))
            prediction, cache = model.forward(xp.asarray(images), xp.asarray(plan), rng=np.random.default_rng(5))
            return prediction, (model, cache)

        def backward(dy, cache):
            model, cache = cache
            _, grads = model.gradient_buffer()
            model.backward(dy, cache, grads)
            return tuple(grads.values())

        values = [0.5 * rng.standard_normal(spec.shape) for spec in table]
        return forward, backward, values, tuple(spec.name for spec in table)

    return case


# nine patches of one channel, and hence eight colours
_SMALL = ViTConfig(image_size=6, patch_size=2, channels=1, num_classes=3, width=4, depth=1, num_heads=2, mlp_dim=5,
                   registers=1, drop_path=0.3)  # fmt: skip

_TINY = {
    "image_size": 4,  # N = 5: four patches and the class token; mean pooling takes 6 pixels, so that N = 9
    "patch_size": 2,
    "channels": 3,
    "num_classes": K,
    "width": D,
    "depth": 2,
    "num_heads": HEADS,
    "mlp_dim": M,
}

_DROPPED = Pair(_seeded(dropped_attention_forward, rate=0.3), dropped_attention_backward)
_NORMED = Pair(normed_attention_forward, normed_attention_backward)
_RELATIVE = Pair(_seeded(relative_attention_forward, rate=0.3), relative_attention_backward)
_HEAD = (D // HEADS,)
_OFFSETS = (1, 2 * N - 1, D // HEADS)

BOOK = {
    "linear": _linear,
    "layernorm": _layernorm,
    "layer_scale": _layer_scale,
    "gelu": _activation(GELU),
    "gelu-erf": _activation(EXACT_GELU),
    "softmax": _softmax,
    "dropout": _dropout,
    "dropout-off": _dropout_off,
    "drop_path": _drop_path,
    "attention": _attention(ATTENTION),
    "attention-queries": _attention(ATTENTION, queries=3),
    "attention-dropout": _attention(_DROPPED),
    "attention-qk_norm": _attention(_NORMED, own=(_HEAD,) * 4),
    "attention-first": _attention(with_first_queries(ATTENTION, 3)),
    "flash_attention": _flash_attention(0.0),
    "flash_attention-dropout": _flash_attention(0.3),
    "flash_attention-sizes": _flash_attention(0.0, [(B, 3, 4), (B, N, 4), (B, N, M)]),  # fewer queries, wider values
    "relative_attention": _relative_attention(0.0),
    "relative_attention-dropout": _relative_attention(0.3),
    "relative_attention-queries": _relative_attention(0.0, queries=3),
    "relative_attention-query": _relative_attention(0.0, queries=1),
    "msa": _msa(ATTENTION),
    "msa-first": _msa(with_first_queries(ATTENTION, 3)),
    "msa-qk_norm": _msa(_NORMED, (_HEAD,) * 4),
    "msa-relative": _msa(_RELATIVE, (_OFFSETS,)),
    "mlp": _mlp,
    "mlp-dropout": _mlp_dropout,
    "gated_mlp": _gated_mlp,
    "block": _block(),
    "block-first": _block(reads=2),
    "block-dropout": _block(dropout=0.3, attention_dropout=0.3, drop_path=0.3),
    "block-options": _block(reads=3, dropout=0.3, qk_norm=True, layer_scale=0.1, gelu="erf"),
    "block-relative": _block(pos_embed="relative", pos_at="every", attention_dropout=0.3),
    "block-shared": _block(pos_embed="learned2d", pos_at="shared", registers=2, mlp="swiglu", mlp_dim=8),
    "block-axial": _block(attention="axial", pooling="mean", image_size=6, pos_at="every"),
    "axial": _axial(False),
    "axial-columns": _axial(True),
    "patch_embed": _patch_embed(1),
    "patch_embed-mean": _patch_embed(0),
    "patch_embed-bytes": _patch_embed_bytes,
    "head": _head(),
    "head-mean": _head(pooling="mean"),
    "registers": _registers(1),
    "registers-front": _registers(0),
    "position": _position(0, 0),
    "position-registers": _position(1, 2),
    "position-front": _position(0, 2),
    "position2d": _position2d,
    "corrupt": _corrupt,
    "gather": _gather,
    "sequence_pool": _sequence_pool,
    "head-avg": _head(pooling="avg", registers=1),
    "head-seq": _head(pooling="seq"),
    "head-registers": _head(pooling="mean", registers=2),
    "head-pre_logits": _head(pre_logits=7),
    "conv2d": _conv2d((3, 2), 1, (5, 4)),
    "conv2d-stride": _conv2d((3, 3), 2, (6, 5)),  # one column of zeros before the map, none before its rows
    "conv2d-pointwise": _conv2d((1, 1), 2, (5, 4)),
    "weight_standardization": _weight_standardization,
    "groupnorm": _groupnorm,
    "relu": _relu,
    "max_pool": _max_pool((6, 5)),
    "max_pool-odd": _max_pool((7, 3)),
    "bottleneck": _bottleneck(16, 1, False),
    "bottleneck-downsample": _bottleneck(6, 2, True),
    "resnet": _resnet((1, 1)),
    "resnet-root": _resnet(()),
    "loss": _loss(False, 0.1),
    "loss-soft": _loss(True, 0.0),
    "squared_error": _squared_error,
    "masked-mpp": _masked(_SMALL, MaskedConfig()),
    "masked-mae": _masked(_SMALL, MaskedConfig(method="mae", decoder_width=4, decoder_heads=1, decoder_depth=1)),
}
TWINS = (
    "linear", "layernorm", "gelu", "softmax", "attention", "attention-queries", "msa", "msa-first", "block",
    "block-first", "patch_embed-bytes",
)  # fmt: skip  # cases of which `minivit.kernels.cpu` has a twin


def by_the_book(case):
    """The case with twins switched off."""

    def plain_case(rng):
        forward, backward, args, names = case(rng)

        def plain_forward(*args):
            with plain():
                return forward(*args)

        def plain_backward(dy, cache):
            with plain():
                return backward(dy, cache)

        return plain_forward, plain_backward, args, names

    return plain_case


LAYERS = {name: by_the_book(case) for name, case in BOOK.items()} | {f"{name}-twin": BOOK[name] for name in TWINS}

_STEM = {  # N = 5: every position of a map of 2 x 2 is a patch
    "image_size": 8, "patch_size": 1, "channels": 1, "stem": "1", "stem_width": 4, "stem_groups": 2,
}  # fmt: skip
MODELS = {
    "vit": _TINY,
    "vit-mean": {**_TINY, "image_size": 6, "pooling": "mean", "num_heads": 1},
    "vit-avg": {**_TINY, "image_size": 6, "pooling": "avg", "registers": 1},
    "vit-seq": {**_TINY, "image_size": 6, "pooling": "seq", "registers": 2},
    "vit-registers": {**_TINY, "registers": 3, "dropout": 0.2},
    "vit-erf": {**_TINY, "gelu": "erf"},
    "vit-pre_logits": {**_TINY, "pre_logits": 10, "pos_embed": "sincos2d"},
    "vit-layer_scale": {**_TINY, "layer_scale": 0.1},
    "vit-qk_norm": {**_TINY, "qk_norm": True},
    # no class token: without a position of its own it is so small that LayerNorm bends its central differences
    "vit-learned2d": {
        **_TINY,
        "image_size": 6,
        "pooling": "mean",
        "pos_embed": "learned2d",
        "registers": 2,
        "pos_at": "shared",
    },
    "vit-relative": {**_TINY, "pos_embed": "relative", "pos_at": "shared"},
    "vit-every": {**_TINY, "pos_at": "every", "registers": 2},
    "vit-axial": {**_TINY, "image_size": 6, "pooling": "mean", "attention": "axial"},
    "vit-stem": {**_TINY, **_STEM},
    "vit-swiglu": {**_TINY, "mlp": "swiglu", "mlp_dim": 8},
    "vit-dropout": {**_TINY, "dropout": 0.2, "attention_dropout": 0.3, "drop_path": 0.4, "pos_embed": "none"},
}
MODEL_BATCH = 8  # images, for the models

NEED_SCIPY = ("gelu-erf", "block-options", "vit-erf")  # SciPy is optional
