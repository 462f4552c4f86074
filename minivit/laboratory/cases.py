"""What `minivit gradcheck` and the tests check: every layer, every option, the losses, small models, at shapes that
reveal.

All sizes differ from one another and the token counts are odd, so that a transposed axis, a sum over the wrong one or a
factor of B, N or h cannot hide. A case is a function of a Generator that gives (forward, backward, args, argument
names). The blocks, embeddings and heads of a model come from its configuration, as `minivit.model.compose` makes them:
a new option needs one line in `MODELS`.
"""

from functools import partial

import numpy as np

from minivit.base.backend import array_module
from minivit.base.pairs import Pair, Part, chain
from minivit.laboratory.builders import SMALL, by_the_book, composed, drawn, layer, masked_model, of_part
from minivit.layers.attention import ATTENTION, attention_backward, attention_forward
from minivit.layers.drop_path import drop_path_backward, drop_path_forward
from minivit.layers.dropout import dropout_backward, dropout_forward
from minivit.layers.gelu import GELU
from minivit.layers.head import head_backward, head_forward
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
from minivit.masked import MaskedConfig
from minivit.masked.corrupt import corrupt_backward, corrupt_forward
from minivit.masked.gather import gather_backward, gather_forward
from minivit.model import ViTConfig
from minivit.options.attention_dropout import dropped_attention_backward, dropped_attention_forward
from minivit.options.axial import from_axis, to_axis
from minivit.options.exact_gelu import EXACT_GELU
from minivit.options.first_tokens import first_queries_backward, first_queries_forward, with_first_queries
from minivit.options.flash_attention import flash_attention_backward, flash_attention_forward
from minivit.options.gated_mlp import swiglu_backward, swiglu_forward
from minivit.options.layer_scale import layer_scale_backward, layer_scale_forward
from minivit.options.pooling import (
    first_token_backward,
    first_token_forward,
    mean_backward,
    mean_forward,
    patches_backward,
    patches_forward,
    tanh_backward,
    tanh_forward,
)
from minivit.options.position import position_backward, position_forward
from minivit.options.position2d import position2d_backward, position2d_forward
from minivit.options.qk_norm import QK_NORM, normed_attention_backward, normed_attention_forward
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
DH, READS = D // HEADS, 3


# ---- cases of their own kind -----------------------------------------------------------------------------------------


def bottleneck(channels, stride, downsample):
    """A residual unit of the stem."""
    narrow = 4
    kernels, names = (
        [(1, 1, channels, narrow), (3, 3, narrow, narrow), (1, 1, narrow, 4 * narrow)],
        CONV1 + CONV2 + CONV3,
    )
    if downsample:
        kernels, names = [*kernels, (1, 1, channels, 4 * narrow)], names + DOWNSAMPLE
    shapes = [shape for kernel in kernels for shape in (kernel, kernel[3:], kernel[3:])]
    unit = Part(partial(bottleneck_forward, stride=stride, groups=2), bottleneck_backward, names)
    return of_part(lambda: unit, (B, 5, 3, channels), dict(zip(names, shapes, strict=True)))


def resnet(units):
    """A stem; two weights of a channel, standardised, are 1 and -1 and have no gradient, hence three channels."""
    layers = convolutions(1, 3, units)
    shapes = {
        name: shape for c in layers for name, shape in zip(c.names, (c.kernel, c.kernel[3:], c.kernel[3:]), strict=True)
    }
    forward, backward = partial(resnet_forward, units=units, groups=1), partial(resnet_backward, need_dimages=True)
    return of_part(lambda: Part(forward, backward, tuple(shapes)), (B, 9, 11, 1), shapes)


def bytes_embedded(rng):
    """The embedding of bytes, which have no gradient."""
    images = rng.integers(0, 256, (3, 4, 6, 4), dtype=np.uint8)

    def forward(W, *others):
        return patch_embed_forward(array_module(W).asarray(images), W, *others, patch_size=2)

    shapes = {"W": (16, D), "b": (D,), "cls_token": (1, 1, D), "pos_embed": (1, 7, D)}
    args = [rng.standard_normal(shape) for shape in shapes.values()]
    return forward, lambda dz, cache: patch_embed_backward(dz, cache)[1:], args, tuple(shapes)


def axial(columns):
    """Rows or columns of nine patches as sequences; its backward is its inverse."""
    forward = lambda z: (to_axis(z, 3, columns=columns), columns)  # noqa: E731
    return layer(forward, lambda dy, columns: from_axis(dy, 3, columns=columns), z=(B, 9, D))


def cross_entropy(soft, label_smoothing):
    """The loss of class indices or of probabilities."""

    def case(rng):
        logits = 2.0 * rng.standard_normal((5, K))
        labels = rng.dirichlet(np.ones(K), 5) if soft else rng.integers(0, K, 5)

        def forward(logits):
            there = array_module(logits).asarray(labels)
            return softmax_cross_entropy_forward(logits, there, label_smoothing=label_smoothing, denominator=7)

        return forward, softmax_cross_entropy_backward, [logits], ("logits",)

    return case


def squared_error(rng):
    """The loss of numbers."""
    y, targets = rng.standard_normal((2, 5, K))

    def forward(y):
        return squared_error_forward(y, array_module(y).asarray(targets, dtype=y.real.dtype), denominator=7)

    return forward, squared_error_backward, [y], ("y",)


def corrupted(rng):
    """Patches that stay, are masked, copied once, twice and never, and one that is replaced and copied elsewhere."""
    sources = np.array([[0, N, 0, 1, 1], [3, 1, N, N, 4]])
    forward = lambda e, mask: corrupt_forward(e, mask, array_module(e).asarray(sources))  # noqa: E731
    return layer(forward, corrupt_backward, e=(B, N, D), mask_token=(1, 1, D))(rng)


def gathered(rng):
    """Some tokens of each image, in another order."""
    index = np.array([[4, 0, 1], [2, 3, 0]])
    forward = lambda z: gather_forward(z, array_module(z).asarray(index))  # noqa: E731
    return layer(forward, gather_backward, z=(B, N, D))(rng)


# ---- models ----------------------------------------------------------------------------------------------------------

_TINY = {
    "image_size": 4,  # N = 5: four patches and the class token; other poolings take 6 pixels, so that N = 9
    "patch_size": 2, "channels": 3, "num_classes": K, "width": D, "depth": 2, "num_heads": HEADS, "mlp_dim": M,
}  # fmt: skip
_STEM = {  # N = 5: every position of a map of 2 x 2 is a patch
    "image_size": 8, "patch_size": 1, "channels": 1, "stem": "1", "stem_width": 4, "stem_groups": 2,
}  # fmt: skip
_NINE = {**_TINY, "image_size": 6}
MODELS = {
    "vit": _TINY,
    "vit-mean": {**_NINE, "pooling": "mean", "num_heads": 1},
    "vit-avg": {**_NINE, "pooling": "avg", "registers": 1},
    "vit-seq": {**_NINE, "pooling": "seq", "registers": 2},
    "vit-cls+mean": {**_NINE, "pooling": "cls+mean", "registers": 1},
    "vit-cls+register": {**_TINY, "pooling": "cls+register", "registers": 1},
    "vit-registers": {**_TINY, "registers": 3, "dropout": 0.2},
    "vit-erf": {**_TINY, "gelu": "erf"},
    "vit-swiglu": {**_TINY, "mlp": "swiglu", "mlp_dim": 14},
    "vit-pre_logits": {**_TINY, "pre_logits": 10, "pos_embed": "sincos2d"},
    "vit-layer_scale": {**_TINY, "layer_scale": 0.1},
    "vit-qk_norm": {**_TINY, "qk_norm": True},
    # no class token: without a position of its own it is so small that LayerNorm bends its central differences
    "vit-learned2d": {**_NINE, "pooling": "mean", "pos_embed": "learned2d", "registers": 2, "pos_at": "shared"},
    "vit-relative": {**_TINY, "pos_embed": "relative", "pos_at": "shared"},
    "vit-every": {**_TINY, "pos_at": "every", "registers": 2},
    "vit-axial": {**_NINE, "pooling": "mean", "attention": "axial"},
    "vit-stem": {**_TINY, **_STEM},
    "vit-dropout": {**_TINY, "dropout": 0.2, "attention_dropout": 0.3, "drop_path": 0.4, "pos_embed": "none"},
}
MODEL_BATCH = 8  # images, for the models

# nine patches of one channel, and hence eight colours
_MASKED = ViTConfig(image_size=6, patch_size=2, channels=1, num_classes=3, width=4, depth=1, num_heads=2, mlp_dim=5,
                    registers=1, drop_path=0.3)  # fmt: skip


# ---- layers ----------------------------------------------------------------------------------------------------------

_QKV = {"q": (B, HEADS, N, DH), "k": (B, HEADS, N, DH), "v": (B, HEADS, N, DH)}
_FEW = {**_QKV, "q": (B, HEADS, READS, DH)}
_NORMS = dict.fromkeys(("wq", "bq", "wk", "bk"), (DH,))
_OFFSETS = {"r": (1, 2 * N - 1, DH)}
_MSA = {"x": (B, N, D), "Wqkv": (D, 3 * D), "bqkv": (3 * D,), "Wproj": (D, D), "bproj": (D,)}
_MLP = {"x": (B, N, D), "W1": (D, M), "b1": (M,), "W2": (M, D), "b2": (D,)}
_BLOCK = {
    "attn.qkv.weight": (D, 3 * D), "attn.qkv.bias": (3 * D,), "attn.proj.weight": (D, D),
    "mlp.fc1.weight": (D, M), "mlp.fc1.bias": (M,), "mlp.fc2.weight": (M, D),
}  # fmt: skip
_RELATIVE = Pair(relative_attention_forward, relative_attention_backward, ("attn.rel_pos",), {"relative": True})
_NORMED = Pair(normed_attention_forward, normed_attention_backward, QK_NORM, {"qk_norm": True})


def msa(attend, **own):
    """Multi-head self-attention with an attention and its parameters."""
    forward = partial(msa_forward, num_heads=HEADS, attend=attend)
    return layer(forward, partial(msa_backward, attend=attend), weights=SMALL, **_MSA, **own)


def attention_over(forward, backward, attend, **shapes):
    """A pair that wraps an attention."""
    return layer(partial(forward, attend=attend), partial(backward, attend=attend), **shapes)


def mlp_dropout(rng):
    """The MLP with dropout after its activation, the same mask at each call."""

    def dropped():
        return chain(GELU, Pair(drawn(dropout_forward, rate=0.3), dropout_backward), "dropout")

    forward, backward = partial(mlp_forward, activation=dropped()), partial(mlp_backward, activation=dropped())
    return layer(forward, backward, **_MLP)(rng)


def embedded(class_tokens):
    """Patches of 2 x 2 pixels and C = 4 channels: 2 x 3 of them, or 3 x 5 without a class token."""
    height, width = (4, 6) if class_tokens else (6, 10)
    tokens = height * width // 4 + class_tokens
    forward, backward = partial(patch_embed_forward, patch_size=2), patch_embed_backward
    if not class_tokens:

        def forward(images, W, b, pos_embed):
            nothing = array_module(W).zeros((1, 0, D), W.dtype)
            return patch_embed_forward(images, W, b, nothing, pos_embed, patch_size=2)

        def backward(dz, cache):
            dimages, dW, db, _, dpos_embed = patch_embed_backward(dz, cache)
            return dimages, dW, db, dpos_embed

    own = {"cls_token": (1, 1, D)} if class_tokens else {}
    return layer(forward, backward, images=(3, height, width, 4), W=(16, D), b=(D,), **own, pos_embed=(1, tokens, D))


BOOK = {
    "linear": layer(linear_forward, linear_backward, x=(B, N, D), W=(D, M), b=(M,)),
    "linear-one": layer(linear_forward, linear_backward, x=(1, D), W=(D, M), b=(M,)),
    "layernorm": layer(layernorm_forward, layernorm_backward, x=(B, N, D), w=(D,), b=(D,)),
    "gelu": layer(GELU.forward, GELU.backward, x=(B, N, M)),
    "gelu-erf": layer(EXACT_GELU.forward, EXACT_GELU.backward, x=(B, N, M)),
    "softmax": layer(softmax_forward, softmax_backward, x=(B, HEADS, N, M)),
    "dropout": layer(drawn(dropout_forward, rate=0.4), dropout_backward, x=(B, N, D)),
    "dropout-off": layer(partial(dropout_forward, rate=0.4), dropout_backward, x=(B, N, D)),
    "drop_path": layer(drawn(drop_path_forward, rate=0.4), drop_path_backward, x=(11, N, M)),
    "attention": layer(attention_forward, attention_backward, **_QKV),
    "attention-queries": layer(attention_forward, attention_backward, **_FEW),
    "attention-dropout": layer(drawn(dropped_attention_forward, rate=0.3), dropped_attention_backward, **_QKV),
    # two keys at a time: blocks of 2, 2 and 1
    "flash_attention": layer(partial(flash_attention_forward, keys=2), flash_attention_backward, **_QKV),
    "flash_attention-dropout": layer(
        drawn(flash_attention_forward, rate=0.3, keys=2), flash_attention_backward, **_QKV
    ),
    "flash_attention-sizes": layer(  # fewer queries, wider values
        partial(flash_attention_forward, keys=2), flash_attention_backward, q=(B, 3, 4), k=(B, N, 4), v=(B, N, M)
    ),
    "relative_attention": layer(relative_attention_forward, relative_attention_backward, **_QKV, **_OFFSETS),
    "relative_attention-dropout": layer(
        drawn(relative_attention_forward, rate=0.3), relative_attention_backward, **_QKV, **_OFFSETS
    ),
    "relative_attention-queries": layer(relative_attention_forward, relative_attention_backward, **_FEW, **_OFFSETS),
    "relative_attention-query": layer(
        relative_attention_forward, relative_attention_backward, **{**_QKV, "q": (B, HEADS, 1, DH)}, **_OFFSETS
    ),
    "attention-qk_norm": attention_over(
        normed_attention_forward, normed_attention_backward, ATTENTION, **_QKV, **_NORMS
    ),
    "attention-qk_norm-relative": attention_over(
        normed_attention_forward, normed_attention_backward, _RELATIVE, **_QKV, **_NORMS, **_OFFSETS
    ),
    "attention-first": attention_over(
        partial(first_queries_forward, reads=READS), first_queries_backward, ATTENTION, **_QKV
    ),
    "attention-first-relative": attention_over(
        partial(first_queries_forward, reads=READS), first_queries_backward, _RELATIVE, **_QKV, **_OFFSETS
    ),
    "msa": msa(ATTENTION),
    "msa-first": msa(with_first_queries(ATTENTION, READS)),
    "msa-qk_norm": msa(_NORMED, **_NORMS),
    "msa-relative": msa(_RELATIVE, **_OFFSETS),
    "mlp": layer(mlp_forward, mlp_backward, **_MLP),
    "mlp-dropout": mlp_dropout,
    "mlp-erf": layer(
        partial(mlp_forward, activation=EXACT_GELU), partial(mlp_backward, activation=EXACT_GELU), **_MLP
    ),
    "gated_mlp": layer(swiglu_forward, swiglu_backward, hidden=(B, N, 2 * M)),
    "block": composed(_TINY, "block"),
    "block-first": composed(_TINY, "block", reads=2),
    "block-dropout": composed({**_TINY, "dropout": 0.3, "attention_dropout": 0.3, "drop_path": 0.3}, "block"),
    "block-options": composed(
        {**_TINY, "dropout": 0.3, "qk_norm": True, "layer_scale": 0.1, "gelu": "erf"}, "block", reads=3
    ),
    "block-relative": composed(
        {**_TINY, "pos_embed": "relative", "pos_at": "every", "attention_dropout": 0.3}, "block"
    ),
    "block-relative-first": composed({**_TINY, "pos_embed": "relative", "pos_at": "shared"}, "block", reads=3),
    "block-shared": composed(
        {**_TINY, "pos_embed": "learned2d", "pos_at": "shared", "registers": 2, "mlp": "swiglu", "mlp_dim": 8}, "block"
    ),
    "block-axial": composed({**_NINE, "attention": "axial", "pooling": "mean", "pos_at": "every"}, "block"),
    "block-recompute": composed(MODELS["vit-dropout"], "block", recompute=True),
    "layer_scale": layer(layer_scale_forward, layer_scale_backward, x=(B, N, D), gamma=(D,)),
    "axial": axial(False),
    "axial-columns": axial(True),
    "patch_embed": embedded(1),
    "patch_embed-mean": embedded(0),
    "patch_embed-bytes": bytes_embedded,
    "registers": layer(partial(registers_forward, at=1), registers_backward, z=(B, N, D), reg_token=(1, 3, D)),
    "registers-front": layer(partial(registers_forward, at=0), registers_backward, z=(B, N, D), reg_token=(1, 3, D)),
    **{
        f"position{name}": layer(
            partial(position_forward, at=at, registers=count), position_backward,
            z=(B, N, D), pos_embed=(1, N - count, D),
        )
        for name, at, count in (("", 0, 0), ("-registers", 1, 2), ("-front", 0, 2))
    },
    "position2d": layer(  # nine patches behind two other tokens
        position2d_forward, position2d_backward, z=(B, 2 + 9, D), X=(1, 3, D // 2), Y=(1, 3, D // 2)
    ),
    "patches": layer(partial(patches_forward, first=2), patches_backward, z=(B, N, D)),
    "patches-all": layer(partial(patches_forward, first=0), patches_backward, z=(B, N, D)),
    "first_token": layer(first_token_forward, first_token_backward, z=(B, N, D)),
    "mean": layer(mean_forward, mean_backward, x=(B, N, D)),
    "tanh": layer(tanh_forward, tanh_backward, x=(B, N, D)),
    "sequence_pool": layer(sequence_pool_forward, sequence_pool_backward, weights=SMALL, x=(B, N, D), W=(D, 1), b=(1,)),
    "head": layer(head_forward, head_backward, z=(B, N, D), w=(D,), b=(D,), W=(D, K), bias=(K,)),
    "corrupt": corrupted,
    "gather": gathered,
    "conv2d": layer(conv2d_forward, conv2d_backward, x=(B, 5, 4, 3), w=(3, 2, 3, 4)),
    # one column of zeros before the map, none before its rows
    "conv2d-stride": layer(partial(conv2d_forward, stride=2), conv2d_backward, x=(B, 6, 5, 3), w=(3, 3, 3, 4)),
    "conv2d-pointwise": layer(partial(conv2d_forward, stride=2), conv2d_backward, x=(B, 5, 4, 3), w=(1, 1, 3, 4)),
    "weight_standardization": layer(weight_standardization_forward, weight_standardization_backward, w=(3, 2, 4, 5)),
    "groupnorm": layer(partial(groupnorm_forward, groups=3), groupnorm_backward, x=(B, 5, 3, 6), w=(6,), b=(6,)),
    "relu": layer(relu_forward, relu_backward, x=(B, N, M)),
    "max_pool": layer(max_pool_forward, max_pool_backward, x=(B, 6, 5, 3)),
    "max_pool-odd": layer(max_pool_forward, max_pool_backward, x=(B, 7, 3, 3)),
    "bottleneck": bottleneck(16, 1, False),
    "bottleneck-downsample": bottleneck(6, 2, True),
    "resnet": resnet((1, 1)),
    "resnet-root": resnet(()),
    "loss": cross_entropy(False, 0.1),
    "loss-soft": cross_entropy(True, 0.0),
    "squared_error": squared_error,
    "head-mean": composed({**_TINY, "pooling": "mean"}, "head"),
    "head-avg": composed({**_TINY, "pooling": "avg", "registers": 1}, "head"),
    "head-seq": composed({**_TINY, "pooling": "seq"}, "head"),
    "head-cls+mean": composed({**_NINE, "pooling": "cls+mean", "registers": 1, "pre_logits": 7}, "head"),
    "head-cls+register": composed({**_TINY, "pooling": "cls+register", "registers": 2}, "head"),
    "head-registers": composed({**_TINY, "pooling": "mean", "registers": 2}, "head"),
    "head-pre_logits": composed({**_TINY, "pre_logits": 7}, "head"),
    **{
        f"embedding-{name}": composed(MODELS[f"vit-{name}"], "embedding")
        for name in ("registers", "learned2d", "every", "axial", "dropout", "stem")
    },
    "masked-mpp": masked_model(_MASKED, MaskedConfig()),
    "masked-mae": masked_model(_MASKED, MaskedConfig(method="mae", decoder_width=4, decoder_heads=1, decoder_depth=1)),
}  # fmt: skip
TWINS = (
    "linear", "layernorm", "gelu", "softmax", "attention", "attention-queries", "msa", "msa-first", "block",
    "block-first", "patch_embed-bytes",
)  # fmt: skip  # cases of which `minivit.kernels.cpu` has a twin

LAYERS = {name: by_the_book(case) for name, case in BOOK.items()} | {f"{name}-twin": BOOK[name] for name in TWINS}

NEED_SCIPY = ("gelu-erf", "mlp-erf", "block-options", "vit-erf")  # SciPy is optional
