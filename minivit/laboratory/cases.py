"""What `minivit gradcheck` and the tests check: every layer, the loss, small models, at shapes that reveal.

All sizes differ from one another and the token counts are odd, so that a transposed axis, a sum over the
wrong one or a factor of B, N or h cannot hide. A case is a function of a Generator that gives (forward,
backward, args, argument names).
"""

from typing import Any, NamedTuple

import numpy as np

from minivit.base.backend import array_module
from minivit.layers.attention import attention_backward, attention_forward, attention_jvp
from minivit.layers.block import (
    ATTN,
    BLOCK_PARAMETERS,
    LS1,
    LS2,
    MLP,
    QK_NORM,
    RELATIVE,
    block_backward,
    block_forward,
    block_jvp,
)
from minivit.layers.drop_path import drop_path_backward, drop_path_forward, drop_path_jvp
from minivit.layers.dropout import dropout_backward, dropout_forward, dropout_jvp
from minivit.layers.gelu import gelu_backward, gelu_forward, gelu_jvp
from minivit.layers.head import head_backward, head_forward, head_jvp
from minivit.layers.layernorm import layernorm_backward, layernorm_forward, layernorm_jvp
from minivit.layers.linear import linear_backward, linear_forward, linear_jvp
from minivit.layers.loss import (
    softmax_cross_entropy_backward,
    softmax_cross_entropy_forward,
    softmax_cross_entropy_jvp,
    squared_error_backward,
    squared_error_forward,
    squared_error_jvp,
)
from minivit.layers.mlp import mlp_backward, mlp_forward, mlp_jvp
from minivit.layers.msa import msa_backward, msa_forward, msa_jvp
from minivit.layers.patch_embed import patch_embed_backward, patch_embed_forward, patch_embed_jvp
from minivit.layers.softmax import softmax_backward, softmax_forward, softmax_jvp
from minivit.masked import MaskedConfig, MaskedViT, draw_plan, masked_table
from minivit.masked.corrupt import corrupt_backward, corrupt_forward, corrupt_jvp
from minivit.masked.gather import gather_backward, gather_forward, gather_jvp
from minivit.model import ViTConfig
from minivit.options.axial import from_axis, to_axis
from minivit.options.flash_attention import flash_attention_backward, flash_attention_forward, flash_attention_jvp
from minivit.options.layer_scale import layer_scale_backward, layer_scale_forward, layer_scale_jvp
from minivit.options.position import position_backward, position_forward, position_jvp
from minivit.options.position2d import position2d_backward, position2d_forward, position2d_jvp
from minivit.options.registers import registers_backward, registers_forward, registers_jvp
from minivit.options.relative_attention import (
    relative_attention_backward,
    relative_attention_forward,
    relative_attention_jvp,
)
from minivit.options.sequence_pool import sequence_pool_backward, sequence_pool_forward, sequence_pool_jvp
from minivit.options.stem.conv2d import conv2d_backward, conv2d_forward, conv2d_jvp
from minivit.options.stem.groupnorm import groupnorm_backward, groupnorm_forward, groupnorm_jvp
from minivit.options.stem.max_pool import max_pool_backward, max_pool_forward, max_pool_jvp
from minivit.options.stem.relu import relu_backward, relu_forward, relu_jvp
from minivit.options.stem.resnet import (
    CONV1,
    CONV2,
    CONV3,
    DOWNSAMPLE,
    bottleneck_backward,
    bottleneck_forward,
    bottleneck_jvp,
    convolutions,
    resnet_backward,
    resnet_forward,
    resnet_jvp,
)
from minivit.options.stem.weight_standardization import (
    weight_standardization_backward,
    weight_standardization_forward,
    weight_standardization_jvp,
)

B, N, D, HEADS, M, K = 2, 5, 12, 3, 7, 6  # pictures, tokens, width, heads (so Dh = 4), MLP width, classes


def _arrays(rng, *shapes):
    return [rng.standard_normal(shape) for shape in shapes]


def _linear(rng):
    return linear_forward, linear_backward, _arrays(rng, (B, N, D), (D, M), (M,)), ("x", "W", "b")


def _layernorm(rng):
    return layernorm_forward, layernorm_backward, _arrays(rng, (B, N, D), (D,), (D,)), ("x", "w", "b")


def _layer_scale(rng):
    return layer_scale_forward, layer_scale_backward, _arrays(rng, (B, N, D), (D,)), ("x", "gamma")


def _gelu(kind):
    def case(rng):
        x = 3.0 * rng.standard_normal((B, N, M))
        return lambda x: gelu_forward(x, kind=kind), gelu_backward, [x], ("x",)

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


def _attention(dropout):
    def case(rng):
        def forward(q, k, v):
            return attention_forward(q, k, v, dropout=dropout, rng=np.random.default_rng(1))

        shapes = [(B, HEADS, N, D // HEADS)] * 3
        return forward, attention_backward, _arrays(rng, *shapes), ("q", "k", "v")

    return case


def _flash_attention(dropout, shapes=((B, HEADS, N, D // HEADS),) * 3):
    def case(rng):
        def forward(q, k, v):  # two keys at a time: blocks of 2, 2 and 1
            return flash_attention_forward(q, k, v, dropout=dropout, rng=np.random.default_rng(1), keys=2)

        return forward, flash_attention_backward, _arrays(rng, *shapes), ("q", "k", "v")

    return case


def _relative_attention(dropout, queries=N):
    def case(rng):
        def forward(q, k, v, r):
            return relative_attention_forward(q, k, v, r, dropout=dropout, rng=np.random.default_rng(1))

        Dh = D // HEADS
        args = _arrays(rng, (B, HEADS, queries, Dh), (B, HEADS, N, Dh), (B, HEADS, N, Dh), (1, 2 * N - 1, Dh))
        return forward, relative_attention_backward, args, ("q", "k", "v", "r")

    return case


def _msa(qk_norm, queries=None, relative=False):
    def case(rng):
        def forward(*args):
            return msa_forward(
                *args, num_heads=HEADS, queries=queries, attention_dropout=0.3, rng=np.random.default_rng(2)
            )

        x, *weights = _arrays(rng, (B, N, D), (D, 3 * D), (3 * D,), (D, D), (D,))
        args = [x, *(0.3 * W for W in weights)]  # scores of order 1: softmax's gradients vanish where it saturates
        args += _arrays(rng, *[(D // HEADS,)] * 4) if qk_norm else [None] * 4
        args += _arrays(rng, (1, 2 * N - 1, D // HEADS)) if relative else [None]
        return forward, msa_backward, args, ("x", "Wqkv", "bqkv", "Wproj", "bproj", "wq", "bq", "wk", "bk", "r")

    return case


def _mlp(rng):
    def forward(*args):
        return mlp_forward(*args, dropout=0.3, rng=np.random.default_rng(3))

    args = _arrays(rng, (B, N, D), (D, M), (M,), (M, D), (D,))
    return forward, mlp_backward, args, ("x", "W1", "b1", "W2", "b2")


class _Named(NamedTuple):
    """The cache of a glue function, and the names of the parameters that it was given."""

    names: tuple
    cache: Any


def _by_position(forward, backward, names):
    """A glue function, which takes and fills mappings, in the protocol of the layers."""

    def positional_forward(z, *values):
        y, cache = forward(z, dict(zip(names, values, strict=True)))
        return y, _Named(names, cache)

    def positional_backward(dy, cache, values):
        grads = {name: array_module(dy).zeros(value.shape, dy.dtype) for name, value in zip(names, values, strict=True)}
        dz = backward(dy, cache.cache, grads)
        return (dz, *grads.values())

    return positional_forward, positional_backward


def _block(dropout, options=()):
    names = BLOCK_PARAMETERS + options

    def case(rng):
        shapes = {"attn.qkv.weight": (D, 3 * D), "attn.qkv.bias": (3 * D,), "attn.proj.weight": (D, D)}
        shapes |= dict.fromkeys(QK_NORM, (D // HEADS,)) | dict.fromkeys(RELATIVE, (1, 2 * N - 1, D // HEADS))
        shapes |= {"mlp.fc1.weight": (D, M), "mlp.fc1.bias": (M,), "mlp.fc2.weight": (M, D)}
        values = _arrays(rng, *[shapes.get(name, (D,)) for name in names])
        values = [0.3 * v if name in ATTN + MLP else v for name, v in zip(names, values, strict=True)]

        def block(z, params):
            return block_forward(
                z, params, num_heads=HEADS, dropout=dropout, attention_dropout=dropout, drop_path=dropout,
                rng=np.random.default_rng(4),
            )  # fmt: skip

        forward, backward = _by_position(block, block_backward, names)
        z = rng.standard_normal((8, N, D))  # enough pictures for stochastic depth to drop some
        return forward, lambda dy, cache: backward(dy, cache, values), [z, *values], ("z", *names)

    return case


def _patch_embed(cls_token, position):
    def case(rng):
        P, C = 2, 4
        height, width = (4, 6) if cls_token else (6, 10)  # 2 x 3 patches and the class token, or 3 x 5 patches
        tokens = height * width // P**2 + cls_token
        args = _arrays(rng, (3, height, width, C), (P * P * C, D), (D,))
        args += _arrays(rng, (1, 1, D)) if cls_token else [None]
        args += _arrays(rng, (1, tokens, D)) if position else [None]
        names = ("images", "W", "b", "cls_token", "pos_embed")
        return lambda *a: patch_embed_forward(*a, patch_size=P), patch_embed_backward, args, names

    return case


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


def _head(pooling, pre_logits, registers=0):
    def case(rng):
        R = 6
        shapes = {"norm.weight": (D,), "norm.bias": (D,)}
        shapes |= {"attention_pool.weight": (D, 1), "attention_pool.bias": (1,)} if pooling == "seq" else {}
        shapes |= {"pre_logits.weight": (D, R), "pre_logits.bias": (R,)} if pre_logits else {}
        shapes |= {"head.weight": (R if pre_logits else D, K), "head.bias": (K,)}
        values = _arrays(rng, *shapes.values())

        def head(z, params):
            return head_forward(z, params, pooling=pooling, registers=registers)

        forward, backward = _by_position(head, head_backward, tuple(shapes))
        z = rng.standard_normal((B, N, D))
        return forward, lambda dy, cache: backward(dy, cache, values), [z, *values], ("z", *shapes)

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

        def bottleneck(x, params):
            return bottleneck_forward(x, params, stride=stride, groups=2)

        forward, backward = _by_position(bottleneck, bottleneck_backward, names)
        x = rng.standard_normal((B, 5, 3, channels))
        return forward, lambda dy, cache: backward(dy, cache, values), [x, *values], ("x", *names)

    return case


def _resnet(units):
    def case(rng):
        layers = convolutions(1, 3, units)  # two weights of a channel, standardised, are 1 and -1 and have no gradient
        names = tuple(name for layer in layers for name in layer.names)
        values = [a for layer in layers for a in _arrays(rng, layer.kernel, layer.kernel[3:], layer.kernel[3:])]

        def resnet(images, params):
            return resnet_forward(images, params, units=units, groups=1)

        def with_dimages(dy, cache, grads):
            return resnet_backward(dy, cache, grads, need_dimages=True)

        forward, backward = _by_position(resnet, with_dimages, names)
        images = rng.standard_normal((B, 9, 11, 1))
        return forward, lambda dy, cache: backward(dy, cache, values), [images, *values], ("images", *names)

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

LAYERS = {
    "linear": _linear,
    "layernorm": _layernorm,
    "layer_scale": _layer_scale,
    "gelu": _gelu("tanh"),
    "gelu-erf": _gelu("erf"),
    "softmax": _softmax,
    "dropout": _dropout,
    "dropout-off": _dropout_off,
    "drop_path": _drop_path,
    "attention": _attention(0.0),
    "attention-dropout": _attention(0.3),
    "flash_attention": _flash_attention(0.0),
    "flash_attention-dropout": _flash_attention(0.3),
    "flash_attention-sizes": _flash_attention(0.0, [(B, 3, 4), (B, N, 4), (B, N, M)]),  # fewer queries, wider values
    "relative_attention": _relative_attention(0.0),
    "relative_attention-dropout": _relative_attention(0.3),
    "relative_attention-queries": _relative_attention(0.0, queries=3),
    "relative_attention-query": _relative_attention(0.0, queries=1),
    "msa": _msa(False),
    "msa-qk_norm": _msa(True),
    "msa-qk_norm-queries": _msa(True, queries=3),
    "msa-relative": _msa(True, queries=3, relative=True),
    "mlp": _mlp,
    "block": _block(0.0),
    "block-dropout": _block(0.3),
    "block-options": _block(0.3, QK_NORM + LS1 + LS2),
    "block-relative": _block(0.3, RELATIVE),
    "axial": _axial(False),
    "axial-columns": _axial(True),
    "patch_embed": _patch_embed(True, True),
    "patch_embed-mean": _patch_embed(False, False),
    "head": _head("cls", False),
    "head-mean": _head("mean", False),
    "registers": _registers(1),
    "registers-front": _registers(0),
    "position": _position(0, 0),
    "position-registers": _position(1, 2),
    "position-front": _position(0, 2),
    "position2d": _position2d,
    "corrupt": _corrupt,
    "gather": _gather,
    "sequence_pool": _sequence_pool,
    "head-avg": _head("avg", False, registers=1),
    "head-seq": _head("seq", False),
    "head-registers": _head("mean", False, registers=2),
    "head-pre_logits": _head("cls", True),
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


def _named_jvp(jvp):
    """The derivative of a glue function, which takes a mapping, in the protocol of the layers."""

    def positional(zdot, *rest):
        *tangents, (names, cache) = rest
        return jvp(zdot, dict(zip(names, tangents, strict=True)), cache)

    return positional


def _masked_jvp(*arguments):
    *tangents, (model, cache) = arguments
    xp = array_module(*tangents)
    return model.jvp(xp.concatenate([tangent.ravel() for tangent in tangents]), cache)


JVPS = {
    "linear": linear_jvp,
    "layernorm": layernorm_jvp,
    "layer_scale": layer_scale_jvp,
    "gelu": gelu_jvp,
    "softmax": softmax_jvp,
    "dropout": dropout_jvp,
    "drop_path": drop_path_jvp,
    "attention": attention_jvp,
    "flash_attention": flash_attention_jvp,
    "relative_attention": relative_attention_jvp,
    "msa": msa_jvp,
    "mlp": mlp_jvp,
    "block": _named_jvp(block_jvp),
    "axial": lambda zdot, columns: to_axis(zdot, 3, columns=columns),
    "patch_embed": patch_embed_jvp,
    "registers": registers_jvp,
    "position": position_jvp,
    "position2d": position2d_jvp,
    "corrupt": corrupt_jvp,
    "gather": gather_jvp,
    "sequence_pool": sequence_pool_jvp,
    "head": _named_jvp(head_jvp),
    "conv2d": conv2d_jvp,
    "weight_standardization": weight_standardization_jvp,
    "groupnorm": groupnorm_jvp,
    "relu": relu_jvp,
    "max_pool": max_pool_jvp,
    "bottleneck": _named_jvp(bottleneck_jvp),
    "resnet": _named_jvp(resnet_jvp),
    "loss": softmax_cross_entropy_jvp,
    "squared_error": squared_error_jvp,
    "masked": _masked_jvp,
}  # of each case in LAYERS, by the part of its name before "-"

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
    "vit-dropout": {**_TINY, "dropout": 0.2, "attention_dropout": 0.3, "drop_path": 0.4, "pos_embed": "none"},
}
MODEL_BATCH = 8  # pictures, for the models

NEED_SCIPY = ("gelu-erf", "vit-erf")  # SciPy is optional
