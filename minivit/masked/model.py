r"""Self-supervised pre-training: guess what is under masked patches.

Masked patch prediction, ``method="mpp"`` (Dosovitskiy et al. 2020, section 4.6 and appendix B.1.2)
    Half of the patch embeddings of a picture are corrupted, before positions are added: of them 80 % become the learned
    [mask] embedding, 10 % that of a random other patch, 10 % stay as they are (BERT's recipe). From the representation
    of each corrupted patch, y_i = LN(z_L)_i, one of three is predicted:

        colour       its mean colour, 3 bits per channel: 8^C = 512 classes, softmax cross-entropy (what the paper took)
        downsized    the colours of its 4 x 4 downsized version, 16 predictions of 512 classes
        pixels       all of its pixels, by regression with the squared error

    The paper does not say from which picture the random other patch comes. Here it is the same one: then pictures do
    not depend on which others are in their batch. Half means half: round(ratio N) patches of every picture.

Masked autoencoder, ``method="mae"`` (He et al. 2021, arXiv:2111.06377)
    Three quarters of the patches are left out, and the encoder sees the others alone. A small decoder of the same
    blocks gets what the encoder made of them, a learned mask token for each place left out, and sine-cosine positions:

        u = LN(z_L) W_enter + b;    decoder([mask, ..., mask; u] + E_pos);    pixels = LN(.) W_pred + b

    The squared error of the pixels counts at the masked patches alone. With target "normalised" a patch's pixels have
    their mean taken off and are divided by their standard deviation, sqrt(var + 1e-6), var with n - 1 as in the
    authors' code.

Order
    Attention does not know of an order: what tells a token's place is the position that was added to it. So the tokens
    that are to be predicted are put first, with `gather`, and nothing after the last block's keys and values is worked
    out for the others (see `minivit.layers.block`).

What is masked is drawn on the host, for a whole batch at a time, as a *plan* (B, 2, N): a random order of the patches,
of which the first n are predicted, and for each place the patch that it shows (N: the mask). A plan goes where labels
go otherwise, through `minivit.training.engine`, to GPUs as well.

The encoder is an ordinary `ViT` whose parameters are the first of the flat buffer, with their names; its head is not
used and stays zero. A checkpoint of pre-training can therefore be opened as a classifier, one that knows nothing yet.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from minivit.base import params as parameters
from minivit.base.backend import array_module
from minivit.base.errors import InputError
from minivit.base.params import ParameterSpec, normal, ones, xavier_uniform, zeros
from minivit.base.settings import check_choice, check_range, check_types, setting
from minivit.layers.block import BLOCK_PARAMETERS, BlockCache, block_backward, block_forward, block_jvp
from minivit.layers.dropout import DropoutCache, dropout_backward, dropout_forward, dropout_jvp
from minivit.layers.layernorm import LayerNormCache, layernorm_backward, layernorm_forward, layernorm_jvp
from minivit.layers.linear import LinearCache, linear_backward, linear_forward, linear_jvp
from minivit.layers.loss import (
    softmax_cross_entropy_backward,
    softmax_cross_entropy_forward,
    squared_error_backward,
    squared_error_forward,
)
from minivit.layers.patch_embed import (
    PatchEmbedCache,
    patch_embed_backward,
    patch_embed_forward,
    patch_embed_jvp,
    patchify,
    sincos2d,
    unpatchify,
)
from minivit.masked.corrupt import CorruptCache, corrupt_backward, corrupt_forward, corrupt_jvp
from minivit.masked.gather import GatherCache, gather_backward, gather_forward, gather_jvp
from minivit.model import BlockInput, ViT, ViTConfig, checked_images, parameter_table, pixels
from minivit.options.registers import RegistersCache, registers_backward, registers_forward, registers_jvp

TARGETS = {"mpp": ("colour", "downsized", "pixels"), "mae": ("normalised", "pixels")}  # the first is the default
RATIOS = {"mpp": 0.5, "mae": 0.75}
LEVELS = 8  # of a colour channel: 3 bits
SIDE = 4  # of a downsized patch
UNREAD = ("attention_pool.", "pre_logits.", "head.")  # parameters of a ViT that pre-training does not use
EPS = 1e-6  # added to the variance of a patch's pixels, as in the MAE's code


@dataclass(frozen=True)
class MaskedConfig:
    """What is hidden of a picture and what is to be said of it.

    Raises  InputError (a ValueError): from the constructor, for any impossible setting.
    """

    method: str = setting("mpp", "mpp (masked patch prediction, of the ViT paper) or mae (masked autoencoder)")
    target: str = setting(
        "auto",
        "what is predicted of a patch: mpp colour, downsized or pixels; mae normalised or pixels; auto: the first",
    )
    ratio: float = setting(0.0, "share of the patches that are predicted; 0 for 0.5 with mpp, 0.75 with mae")
    mask_share: float = setting(0.8, "mpp: share of these that become the mask")
    random_share: float = setting(0.1, "mpp: share of these that become another patch; the rest stays")
    decoder_width: int = setting(128, "mae: width of the decoder")
    decoder_depth: int = setting(2, "mae: blocks of the decoder, with MLPs of 4 x its width")
    decoder_heads: int = setting(4, "mae: attention heads of the decoder")

    def __post_init__(self):
        check_types(self)
        check_choice(self, "method", tuple(TARGETS))
        if self.target == "auto":
            object.__setattr__(self, "target", TARGETS[self.method][0])
        check_choice(self, "target", TARGETS[self.method])
        if self.ratio == 0.0:
            object.__setattr__(self, "ratio", RATIOS[self.method])
        check_range(self, 0.0, 1.0, "ratio", "mask_share", "random_share")
        if self.mask_share + self.random_share > 1.0:
            raise InputError(
                f"mask_share {self.mask_share} and random_share {self.random_share} are more than all patches together"
            )
        check_range(self, 1, None, "decoder_width", "decoder_depth", "decoder_heads")
        if self.decoder_width % self.decoder_heads or self.decoder_width % 4:
            raise InputError(
                f"decoder_width {self.decoder_width} must be a multiple of decoder_heads {self.decoder_heads} and of 4"
            )


def check_fit(config, masked):
    """Raises InputError unless pictures of a `ViTConfig` can be masked as asked for."""
    plain = {"stem": "", "attention": "full", "pos_at": "input"}
    if other := [name for name, value in plain.items() if getattr(config, name) != value]:
        raise InputError(f"pre-training is of models without {other[0]} {getattr(config, other[0])}; leave it out")
    if config.pos_embed == "learned2d":
        raise InputError('pre-training takes positions "learned", "sincos2d" or "none", not "learned2d"')
    N = config.grid_size**2
    if not 0 < predicted_count(config, masked) < N:
        raise InputError(
            f"ratio {masked.ratio} of {N} patches is none or all of them; take another ratio or a smaller patch_size"
        )
    if masked.target == "downsized" and config.patch_size % SIDE:
        raise InputError(f"target downsized needs a patch_size that is a multiple of {SIDE}, not {config.patch_size}")
    if classes(config, masked) and config.channels > 3:
        raise InputError(f"{LEVELS} levels of {config.channels} channels are too many classes; take target pixels")


def predicted_count(config, masked):
    """n: how many patches of each picture are predicted."""
    return round(masked.ratio * config.grid_size**2)


def classes(config, masked):
    """How many classes a prediction has; 0 for regression."""
    return LEVELS**config.channels if masked.target in ("colour", "downsized") else 0


def outputs(config, masked):
    """How many numbers are predicted for a patch."""
    each = {"colour": 1, "downsized": SIDE * SIDE}.get(masked.target, 0)
    return each * classes(config, masked) or config.patch_size**2 * config.channels


# ---- what is hidden, and what was there ------------------------------------------------------------------------------


def draw_plan(config, masked, count, rng):
    """What happens to the patches of ``count`` pictures, drawn from a Generator of the host.

    Shapes  ->  plan (count, 2, N) int64. plan[:, 0] is a random order of the patches; the first n are predicted.
            plan[:, 1] holds for each place the patch that it shows, N for the mask (mae: all as they are).
    """
    N, n = config.grid_size**2, predicted_count(config, masked)
    order = np.argsort(rng.random((count, N)), axis=1)
    source = np.tile(np.arange(N), (count, 1))
    if masked.method == "mpp":
        chosen = order[:, :n]
        dice = rng.random((count, n))
        other = (chosen + rng.integers(1, N, (count, n))) % N
        shown = np.where(dice < masked.mask_share + masked.random_share, other, chosen)
        np.put_along_axis(source, chosen, np.where(dice < masked.mask_share, N, shown), axis=1)
    return np.stack([order, source], axis=1)


def colour_classes(colours):
    """Colours as classes: 3 bits per channel, the first channel the highest.

    Math    sum_c floor(v_c / 32) 8^(C - 1 - c)
    Shapes  colours (..., C) from 0 to 255  ->  (...,) int64
    """
    xp = array_module(colours)
    levels = xp.clip(xp.floor(colours / (256 // LEVELS)), 0, LEVELS - 1).astype(np.int64)
    result = levels[..., 0]
    for channel in range(1, colours.shape[-1]):
        result = LEVELS * result + levels[..., channel]
    return result


def class_colours(labels, channels):
    """The colours in the middle of their classes: what `colour_classes` cannot tell from one another.

    Shapes  labels (...,) integers  ->  (..., C) float64 from 0 to 255
    """
    levels = np.stack([labels // LEVELS ** (channels - 1 - c) % LEVELS for c in range(channels)], axis=-1)
    return (levels + 0.5) * (256 // LEVELS)


def patch_targets(images, config, masked, dtype=np.float32):
    """What is to be predicted of every patch.

    Shapes  images (B, H, W, C) uint8, or floats scaled to -1..1  ->  (B, N) classes, (B, N, 16) classes with target
            "downsized", or (B, N, P P C) numbers for regression
    """
    P, C = config.patch_size, config.channels
    x = pixels(images, dtype)
    if not classes(config, masked):
        x = patchify(x, P)
        if masked.target == "normalised":
            x = x - x.mean(axis=-1, keepdims=True)
            x /= _standard_deviation(x)
        return x
    # sums of whole numbers are exact, so that a mean on the edge of two levels belongs to the upper one
    x = images.astype(dtype) if images.dtype == np.uint8 else x * 127.5 + 127.5
    B, N = len(x), config.grid_size**2
    if masked.target == "colour":
        return colour_classes(patchify(x, P).reshape(B, N, P * P, C).mean(axis=2))
    cells = patchify(x, P).reshape(B, N, SIDE, P // SIDE, SIDE, P // SIDE, C)
    return colour_classes(cells.mean(axis=(3, 5))).reshape(B, N, SIDE * SIDE)


def _standard_deviation(centred):
    """Of the last axis, with n - 1, and with `EPS`."""
    xp = array_module(centred)
    return xp.sqrt((centred * centred).sum(axis=-1, keepdims=True) / max(centred.shape[-1] - 1, 1) + EPS)


def shown(images, plan, config, masked):
    """The pictures as the model sees them: grey where a patch is hidden, another patch where one was exchanged.

    Shapes  images (B, H, W, C) uint8, plan (B, 2, N), on the host  ->  (B, H, W, C) uint8
    """
    patches = patchify(images, config.patch_size)  # (B, N, P P C)
    grey = np.full_like(patches[:, :1], 127)
    source = plan[:, 1].copy()
    if masked.method == "mae":
        np.put_along_axis(source, plan[:, 0, : predicted_count(config, masked)], config.grid_size**2, axis=1)
    patches = np.take_along_axis(np.concatenate([patches, grey], axis=1), source[:, :, None], axis=1)
    return unpatchify(patches, images.shape, config.patch_size)


def painted(images, plan, values, config, masked):
    """The pictures with predictions, or targets, in the place of the n patches.

    Shapes  images (B, H, W, C) uint8, plan (B, 2, N), values (B, n, outputs) predicted or targets of n patches, on the
            host  ->  (B, H, W, C) uint8
    Classes are painted in the colour of their middle. Normalised pixels get the mean and the standard deviation that
    the patch really has, as in the MAE paper's figures: the model does not say them.
    """
    P, C, n = config.patch_size, config.channels, predicted_count(config, masked)
    chosen = plan[:, 0, :n, None]
    patches = patchify(images, P)  # (B, N, P P C)
    B = len(images)
    if K := classes(config, masked):
        labels = values if values.dtype.kind == "i" else values.reshape(B, n, -1, K).argmax(axis=-1)
        side = SIDE if masked.target == "downsized" else 1
        colours = class_colours(labels.reshape(B, n, side, side), C)
        colours = colours.repeat(P // side, axis=2).repeat(P // side, axis=3).reshape(B, n, P * P * C)
    else:
        if masked.target == "normalised":
            true = np.take_along_axis(patchify(pixels(images, np.float64), P), chosen, axis=1)
            mean = true.mean(axis=-1, keepdims=True)
            values = values * _standard_deviation(true - mean) + mean
        colours = values * 127.5 + 127.5
    np.put_along_axis(patches, chosen, np.clip(np.rint(colours), 0, 255).astype(np.uint8), axis=1)
    return unpatchify(patches, images.shape, P)


class PatchLossCache(NamedTuple):
    """What `patch_loss_gradient` reads."""

    loss: Any  # the cache of softmax cross-entropy or of the squared error
    shape: tuple  # of the predictions


def patch_loss(prediction, targets, num_classes=0, *, denominator=None):
    """Mean loss over the predicted patches of all pictures, and how many guesses are right.

    Math    softmax cross-entropy of ``num_classes`` classes, or for 0 of them the squared error; the mean over pictures
            (or the sum over ``denominator``), patches, and the guesses or numbers of each
    Shapes  prediction (B, n, outputs), targets as `patch_targets` gives them for n patches  ->  loss (), right ()
    Returns  (loss, right, cache); right is 0 for regression
    """
    xp = array_module(prediction)
    B, n, _ = prediction.shape
    denominator = B if denominator is None else denominator
    if not num_classes:
        y = prediction.reshape(B * n, -1)
        loss, cache = squared_error_forward(y, targets.reshape(B * n, -1), denominator=denominator * n)
        return loss, xp.zeros((), np.int64), PatchLossCache(cache, prediction.shape)
    logits, labels = prediction.reshape(-1, num_classes), targets.reshape(-1)
    per_picture = labels.size // B
    loss, cache = softmax_cross_entropy_forward(logits, labels, denominator=denominator * per_picture)
    return loss, (logits.argmax(axis=1) == labels).sum(), PatchLossCache(cache, prediction.shape)


def patch_loss_gradient(dloss, cache):
    """Backward of `patch_loss`.

    Shapes  dloss ()  ->  dprediction (B, n, outputs)
    """
    squared = hasattr(cache.loss, "difference")
    dy = (squared_error_backward if squared else softmax_cross_entropy_backward)(dloss, cache.loss)
    return dy.reshape(cache.shape)


# ---- the model -------------------------------------------------------------------------------------------------------


def masked_table(config, masked):
    """The encoder's parameters, those of its `parameter_table`, followed by what pre-training adds.

    The names are those of the MAE's code where it has them. Weight decay leaves alone what is not used.
    """
    D, width, out = config.width, masked.decoder_width, outputs(config, masked)
    table = [spec._replace(decay=spec.decay and not spec.name.startswith(UNREAD)) for spec in parameter_table(config)]

    def add(name, shape, init, decay=False):
        table.append(ParameterSpec(name, shape, init, decay))

    def dense(name, n_in, n_out, init):
        add(f"{name}.weight", (n_in, n_out), init, decay=True)
        add(f"{name}.bias", (n_out,), zeros)

    if masked.method == "mpp":
        add("mask_token", (1, 1, D), normal(0.02))
        dense("mpp_head", D, out, zeros)
        return tuple(table)
    dense("decoder_embed", D, width, xavier_uniform(D, width))
    add("mask_token", (1, 1, width), normal(0.02))
    # a decoder's block is a block: its table is that of a ViT of its width
    decoder = decoder_config(config, masked)
    for spec in parameter_table(decoder):
        if spec.name.startswith("blocks."):
            table.append(spec._replace(name=f"decoder_{spec.name}"))
    add("decoder_norm.weight", (width,), ones)
    add("decoder_norm.bias", (width,), zeros)
    dense("decoder_pred", width, out, xavier_uniform(width, out))
    return tuple(table)


def decoder_config(config, masked):
    """The `ViTConfig` of which a decoder's blocks are: plain ones, without dropout."""
    return ViTConfig(
        image_size=config.image_size, patch_size=config.patch_size, width=masked.decoder_width,
        depth=masked.decoder_depth, num_heads=masked.decoder_heads, gelu=config.gelu,
        layernorm_eps=config.layernorm_eps,
    )  # fmt: skip


class EmbedCache(NamedTuple):
    """Of the tokens that the encoder sees: caches in the order of the forward; None for what was not done."""

    patches: PatchEmbedCache
    corrupt: CorruptCache | None
    class_token: RegistersCache | None
    registers: RegistersCache | None
    dropout: DropoutCache
    gather: GatherCache


class DecoderCache(NamedTuple):
    """Of the decoder, in the order of the forward."""

    enter: LinearCache
    masks: RegistersCache
    blocks: tuple[BlockCache | BlockInput, ...]
    norm: LayerNormCache


class MaskedCache(NamedTuple):
    """What `MaskedViT.backward` reads; ``decoder`` is None with mpp."""

    embed: EmbedCache
    blocks: tuple[BlockCache | BlockInput, ...]
    norm: LayerNormCache
    decoder: DecoderCache | None
    predict: LinearCache


class MaskedViT:
    """A ViT that guesses masked patches: an encoder, and what turns its output into predictions.

    ``encoder`` is a `ViT` on the first part of the same flat buffer. ``config`` is its configuration; ``flat``,
    ``table``, ``params`` are like a `ViT`'s and hold everything. Calls leave nothing behind.
    Raises  InputError: the settings do not fit the model.
    """

    def __init__(self, config, masked, *, seed=0, dtype=np.float32, flat=None):
        check_fit(config, masked)
        self.config, self.masked = config, masked
        self.table = masked_table(config, masked)
        self.flat = parameters.initialise(self.table, seed=seed, dtype=dtype) if flat is None else flat
        self.params = parameters.views(self.flat, self.table)
        self.encoder = ViT(config, flat=self.flat[: parameters.count(parameter_table(config))])
        self.predicted = predicted_count(config, masked)
        self.classes = classes(config, masked)
        self.prefix = config.registers + (config.pooling == "cls")  # tokens that are no patches
        if masked.method == "mae":
            fixed = sincos2d(config.grid_size, masked.decoder_width, prefix_tokens=self.prefix)[0]
            self._decoder_position = array_module(self.flat).asarray(fixed, dtype=self.flat.dtype)

    def __repr__(self):
        return f"MaskedViT({self.config}, {self.masked}, {self.flat.size:,} parameters, {self.flat.dtype})"

    def drop_path_rate(self, i):
        """Stochastic depth's rate of block i of the encoder."""
        return self.encoder.drop_path_rate(i)

    def gradient_buffer(self):
        """A flat buffer of zeros like the parameters, and its named views: what `backward` adds into."""
        flat = array_module(self.flat).zeros_like(self.flat)
        return flat, parameters.views(flat, self.table)

    def targets(self, images, plan):
        """What is to be predicted: `patch_targets` of the n patches that the plan names first."""
        rows = array_module(plan).arange(len(plan))[:, None]
        return patch_targets(images, self.config, self.masked, self.flat.dtype)[rows, plan[:, 0, : self.predicted]]

    def seen(self, plan):
        """The tokens that the encoder sees, (B, n'), as rows of [class token; registers; patches].

        With mpp all of them, what is to be predicted first; with mae without what is to be predicted.
        """
        xp, n = array_module(plan), self.predicted
        patches = plan[:, 0] + self.prefix
        first = xp.broadcast_to(xp.arange(self.prefix), (len(plan), self.prefix))
        parts = [first, patches[:, n:]] if self.masked.method == "mae" else [patches[:, :n], first, patches[:, n:]]
        return xp.concatenate(parts, axis=1)

    # Blocks, of the encoder or of the decoder, as (names of the parameters without the block's, prefix, settings).

    def _blocks(self, part):
        n = self.predicted
        if part == "encoder":
            settings = [self.encoder._block_settings(i) for i in range(self.config.depth)]
            queries = n if self.masked.method == "mpp" else None
            names, prefix = self.encoder._block_names, "blocks"
        else:
            masked, c = self.masked, self.config
            common = {"num_heads": masked.decoder_heads, "gelu": c.gelu, "eps": c.layernorm_eps}
            settings, queries = [common] * masked.decoder_depth, n
            names, prefix = BLOCK_PARAMETERS, "decoder_blocks"
        last = len(settings) - 1
        return [
            (names, f"{prefix}.{i}.", each | {"queries": queries if i == last else None})
            for i, each in enumerate(settings)
        ]

    def _blocks_forward(self, z, part, rng, recompute):
        caches = []
        for block in self._blocks(part):
            block_input = BlockInput(z, deepcopy(rng)) if recompute else None
            z, cache = self._block(block, z, rng)
            caches.append(block_input or cache)
        return z, tuple(caches)

    def _block(self, block, z, rng):
        names, prefix, settings = block
        return block_forward(z, {name: self.params[prefix + name] for name in names}, **settings, rng=rng)

    def _blocks_backward(self, dz, part, caches, grads):
        for block, cache in zip(reversed(self._blocks(part)), reversed(caches), strict=True):
            if isinstance(cache, BlockInput):
                _, cache = self._block(block, cache.z, deepcopy(cache.rng))
            names, prefix, _ = block
            dz = block_backward(dz, cache, {name: grads[prefix + name] for name in names})
        return dz

    def _blocks_jvp(self, zdot, part, caches, tangents):
        for (names, prefix, _), cache in zip(self._blocks(part), caches, strict=True):
            zdot = block_jvp(zdot, {name: tangents[prefix + name] for name in names}, cache)
        return zdot

    def forward(self, images, plan, *, rng=None, recompute=False):
        """Predictions for the n patches that the plan names first, and the cache for `backward`.

        Shapes  images (B, H, W, C) uint8 or floats scaled to about [-1, 1], plan (B, 2, N)  ->  (B, n, outputs)
        Dropout, stochastic depth (of the encoder) and ``recompute`` are as in `ViT.forward`.
        Raises  InputError: pictures of another shape, or with NaN pixels.
        """
        c, p = self.config, self.params
        if images.ndim != 4 or images.shape[1:] != (c.image_size, c.image_size, c.channels):
            expected = f"(B, {c.image_size}, {c.image_size}, {c.channels})"
            raise InputError(f"this model takes pictures of shape {expected}, got {tuple(images.shape)}")
        z, embed = self._embed(images, plan, rng)
        z, blocks = self._blocks_forward(z, "encoder", rng, recompute)
        y, norm = layernorm_forward(z, p["norm.weight"], p["norm.bias"], eps=c.layernorm_eps)
        decoder, name = None, "mpp_head"
        if self.masked.method == "mae":
            y, decoder = self._decode(y, plan, recompute)
            name = "decoder_pred"
        prediction, predict = linear_forward(y, p[f"{name}.weight"], p[f"{name}.bias"])  # (B, n, outputs)
        return prediction, MaskedCache(embed, blocks, norm, decoder, predict)

    def _embed(self, images, plan, rng):
        c, p = self.config, self.params
        corrupt = class_token = registers = None
        W, b = p["patch_embed.proj.weight"], p["patch_embed.proj.bias"]
        images = checked_images(images, self.flat.dtype)
        z, patches = patch_embed_forward(images, W, b, patch_size=c.patch_size)  # (B, N, D)
        if self.masked.method == "mpp":
            z, corrupt = corrupt_forward(z, p["mask_token"], plan[:, 1])
        # Eq. 1; a class token is put in as registers are
        if c.pooling == "cls":
            z, class_token = registers_forward(z, p["cls_token"], at=0)
        for position in self.encoder._positions[0]:  # one or none
            z = z + position
        if c.registers:
            z, registers = registers_forward(z, p["reg_token"], at=int(c.pooling == "cls"))
        z, dropout = dropout_forward(z, rate=c.dropout, rng=rng)
        z, gather = gather_forward(z, self.seen(plan))
        return z, EmbedCache(patches, corrupt, class_token, registers, dropout, gather)

    def _decode(self, y, plan, recompute):
        xp, p, n = array_module(y), self.params, self.predicted
        u, enter = linear_forward(y, p["decoder_embed.weight"], p["decoder_embed.bias"])
        masks = xp.broadcast_to(p["mask_token"], (1, n, u.shape[-1]))
        z, masks_cache = registers_forward(u, masks, at=0)  # (B, prefix + N, width), what is to be predicted first
        places = xp.concatenate([self.prefix + plan[:, 0, :n], self.seen(plan)], axis=1)
        z = z + self._decoder_position[places]
        z, blocks = self._blocks_forward(z, "decoder", None, recompute)  # (B, n, width)
        y, norm = layernorm_forward(z, p["decoder_norm.weight"], p["decoder_norm.bias"], eps=self.config.layernorm_eps)
        return y, DecoderCache(enter, masks_cache, blocks, norm)

    def backward(self, dprediction, cache, grads):
        """Backward of `forward`: every parameter's gradient is *added* into ``grads`` (see `gradient_buffer`).

        Shapes  dprediction (B, n, outputs)
        """

        def add(name, dW, db):
            grads[f"{name}.weight"] += dW
            grads[f"{name}.bias"] += db

        # prediction = y W + b
        dy, dW, db = linear_backward(dprediction, cache.predict)  # (B, n, width)
        add("mpp_head" if cache.decoder is None else "decoder_pred", dW, db)
        if cache.decoder is not None:
            # y = LN(decoder([masks; u] + position)), u = y W_enter + b
            dz, dw, db = layernorm_backward(dy, cache.decoder.norm)
            add("decoder_norm", dw, db)
            dz = self._blocks_backward(dz, "decoder", cache.decoder.blocks, grads)
            du, dmasks = registers_backward(dz, cache.decoder.masks)
            grads["mask_token"] += dmasks.sum(axis=1, keepdims=True)  # one token, broadcast to n places
            dy, dW, db = linear_backward(du, cache.decoder.enter)
            add("decoder_embed", dW, db)
        # y = LN(z_L)
        dz, dw, db = layernorm_backward(dy, cache.norm)
        add("norm", dw, db)
        dz = self._blocks_backward(dz, "encoder", cache.blocks, grads)
        # z_0 = gather(dropout(registers([x_class; corrupt(patches)] + E_pos)))
        embed = cache.embed
        dz = gather_backward(dz, embed.gather)
        dz = dropout_backward(dz, embed.dropout)
        if embed.registers is not None:
            dz, dreg_token = registers_backward(dz, embed.registers)
            grads["reg_token"] += dreg_token
        if "pos_embed" in grads:
            grads["pos_embed"] += dz.sum(axis=0, keepdims=True)
        if embed.class_token is not None:
            dz, dcls_token = registers_backward(dz, embed.class_token)
            grads["cls_token"] += dcls_token
        if embed.corrupt is not None:
            dz, dmask_token = corrupt_backward(dz, embed.corrupt)
            grads["mask_token"] += dmask_token
        _, dW, db, _, _ = patch_embed_backward(dz, embed.patches, need_dimages=False)
        add("patch_embed.proj", dW, db)

    def jvp(self, flatdot, cache):
        """Forward-mode derivative of `forward` with respect to the parameters.

        Shapes  flatdot (n,) like the parameters  ->  predictiondot (B, n, outputs)
        """
        t = parameters.views(flatdot, self.table)

        def take(name):
            return t[f"{name}.weight"], t[f"{name}.bias"]

        embed = cache.embed
        still = array_module(flatdot).zeros(embed.patches.image_shape, flatdot.dtype)  # pictures do not move
        zdot = patch_embed_jvp(still, *take("patch_embed.proj"), None, None, embed.patches)
        if embed.corrupt is not None:
            zdot = corrupt_jvp(zdot, t["mask_token"], embed.corrupt)
        if embed.class_token is not None:
            zdot = registers_jvp(zdot, t["cls_token"], embed.class_token)
        if "pos_embed" in t:
            zdot = zdot + t["pos_embed"]
        if embed.registers is not None:
            zdot = registers_jvp(zdot, t["reg_token"], embed.registers)
        zdot = gather_jvp(dropout_jvp(zdot, embed.dropout), embed.gather)
        zdot = self._blocks_jvp(zdot, "encoder", cache.blocks, t)
        ydot = layernorm_jvp(zdot, *take("norm"), cache.norm)
        decoder = cache.decoder
        if decoder is None:
            return linear_jvp(ydot, *take("mpp_head"), cache.predict)
        udot = linear_jvp(ydot, *take("decoder_embed"), decoder.enter)
        masks = array_module(flatdot).broadcast_to(t["mask_token"], (1, self.predicted, self.masked.decoder_width))
        zdot = registers_jvp(udot, masks, decoder.masks)
        zdot = self._blocks_jvp(zdot, "decoder", decoder.blocks, t)
        return linear_jvp(
            layernorm_jvp(zdot, *take("decoder_norm"), decoder.norm), *take("decoder_pred"), cache.predict
        )
