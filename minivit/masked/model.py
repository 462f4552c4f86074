r"""Self-supervised pre-training: guess what is under masked patches.

Masked patch prediction, ``method="mpp"`` (Dosovitskiy et al. 2020, section 4.6 and appendix B.1.2)
    Half of the patch embeddings of an image are corrupted, before positions are added: of them 80 % become the learned
    [mask] embedding, 10 % that of a random other patch, 10 % stay as they are (BERT's recipe). From the representation
    of each corrupted patch, y_i = LN(z_L)_i, one of three is predicted:

        colour       its mean colour, 3 bits per channel: 8^C = 512 classes, softmax cross-entropy (what the paper took)
        downsized    the colours of its 4 x 4 downsized version, 16 predictions of 512 classes
        pixels       all of its pixels, by regression with the squared error

    The paper does not say from which image the random other patch comes. Here it is the same one: then images do
    not depend on which others are in their batch. Half means half: round(ratio * N) patches of every image.

Masked autoencoder, ``method="mae"`` (He et al. 2021, arXiv:2111.06377)
    Three quarters of the patches are left out, and the encoder sees the others alone. A small decoder of the same
    blocks gets what the encoder made of them, a learned mask token for each place left out, and sine-cosine positions:

        u      = LN(z_L) @ W_enter + b_enter
        z      = decoder([mask; ...; mask; u] + E_pos)
        pixels = LN(z) @ W_pred + b_pred

    The squared error of the pixels counts at the masked patches alone. With target "normalised" a patch's pixels have
    their mean taken off and are divided by their standard deviation, sqrt(var + 1e-6), var with n - 1 as in the
    authors' code.

Order
    Attention does not know of an order: what tells a token's place is the position that was added to it. So the tokens
    that are to be predicted are put first, with `gather`, and nothing after the last block's keys and values is worked
    out for the others (see `minivit.layers.block`).

What is masked is drawn on the host, for a whole batch at a time, as a *plan* (B, 2, N): a random order of the patches,
of which the first n are predicted, and for each place the patch that it shows (N: the mask). A plan goes where labels
go otherwise, through `minivit.training.engines`, to GPUs as well.

The encoder is an ordinary `ViT` whose parameters are the first of the flat buffer, with their names; its head is not
used and stays zero. A checkpoint of pre-training can therefore be opened as a classifier, one that knows nothing yet.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from minivit.base import params as parameters
from minivit.base.backend import array_module
from minivit.base.pairs import add_gradients
from minivit.base.params import ParameterSpec, normal, ones, xavier_uniform, zeros
from minivit.layers.dropout import DropoutCache, dropout_backward, dropout_forward
from minivit.layers.layernorm import LayerNormCache, layernorm_backward, layernorm_forward
from minivit.layers.linear import LinearCache, linear_backward, linear_forward
from minivit.layers.patch_embed import PatchEmbedCache, patch_embed_backward, patch_embed_forward
from minivit.masked.config import UNREAD, check_fit, classes, outputs, predicted_count
from minivit.masked.corrupt import CorruptCache, corrupt_backward, corrupt_forward
from minivit.masked.gather import GatherCache, gather_backward, gather_forward
from minivit.masked.targets import patch_targets
from minivit.model import ViT, ViTConfig, compose, parameter_table
from minivit.model.images import check_images
from minivit.options.positions import sincos2d
from minivit.options.registers import RegistersCache, registers_backward, registers_forward


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
    dropout: DropoutCache | None
    gather: GatherCache


class DecoderCache(NamedTuple):
    """Of the decoder, in the order of the forward."""

    enter: LinearCache
    masks: RegistersCache
    blocks: BlocksCache
    norm: LayerNormCache


class BlocksCache(NamedTuple):
    """Of the blocks of the encoder or of the decoder: the parts, where their parameters are, and their caches."""

    parts: tuple
    prefix: str
    caches: tuple


class MaskedCache(NamedTuple):
    """What `MaskedViT.backward` reads; ``decoder`` is None with mpp."""

    embed: EmbedCache
    blocks: BlocksCache
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
        self.prefix = config.registers + config.class_tokens  # tokens that are no patches
        xp = array_module(self.flat)
        # the patches alone: Eq. 1 with no class token and a table of zeros; both are put in later
        N, D = config.grid_size**2, config.width
        self._nothing = [xp.zeros(shape, self.flat.dtype) for shape in ((1, 0, D), (1, N, D))]
        if masked.method == "mae":
            fixed = sincos2d(config.grid_size, masked.decoder_width, prefix_tokens=self.prefix)[0]
            self._decoder_position = xp.asarray(fixed, dtype=self.flat.dtype)

    def __repr__(self):
        return f"MaskedViT({self.config}, {self.masked}, {self.flat.size:,} parameters, {self.flat.dtype})"

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

    def _blocks(self, z, part, rng, recompute):
        """The blocks of the encoder or of the decoder: tokens, and their `BlocksCache`."""
        if part == "encoder":
            config, prefix, last = self.config, "blocks", self.predicted if self.masked.method == "mpp" else None
        else:
            config, prefix, last = decoder_config(self.config, self.masked), "decoder_blocks", self.predicted
        L, caches = config.depth, []
        parts = tuple(
            compose.block(config, i, rng=rng, reads=last if i == L - 1 else None, recompute=recompute) for i in range(L)
        )
        for i, block in enumerate(parts):
            z, cache = block.forward(z, _of_block(self.params, block, prefix, i))
            caches.append(cache)
        return z, BlocksCache(parts, prefix, tuple(caches))

    def forward(self, images, plan, *, rng=None, recompute=False):
        """Predictions for the n patches that the plan names first, and the cache for `backward`.

        Shapes  images (B, H, W, C) uint8 or floats scaled to about [-1, 1], plan (B, 2, N)  ->  (B, n, outputs)
        Dropout, stochastic depth (of the encoder) and ``recompute`` are as in `ViT.forward`.
        Raises  InputError: images of another shape, or with NaN pixels.
        """
        c, p = self.config, self.params
        z, embed = self._embed(check_images(images, self), plan, rng)
        z, blocks = self._blocks(z, "encoder", rng, recompute)
        y, norm = layernorm_forward(z, p["norm.weight"], p["norm.bias"], eps=c.layernorm_eps)
        decoder, name = None, "mpp_head"
        if self.masked.method == "mae":
            y, decoder = self._decode(y, plan, recompute)
            name = "decoder_pred"
        prediction, predict = linear_forward(y, p[f"{name}.weight"], p[f"{name}.bias"])  # (B, n, outputs)
        return prediction, MaskedCache(embed, blocks, norm, decoder, predict)

    def _embed(self, images, plan, rng):
        c, p = self.config, self.params
        corrupt = class_token = registers = dropout = None
        W, b = p["patch_embed.proj.weight"], p["patch_embed.proj.bias"]
        z, patches = patch_embed_forward(images, W, b, *self._nothing, patch_size=c.patch_size)  # (B, N, D)
        if self.masked.method == "mpp":
            z, corrupt = corrupt_forward(z, p["mask_token"], plan[:, 1])
        # Eq. 1; a class token is put in as registers are
        if c.class_tokens:
            z, class_token = registers_forward(z, p["cls_token"], at=0)
        z = z + self.encoder.inputs["pos_embed"]
        if c.registers:
            z, registers = registers_forward(z, p["reg_token"], at=c.class_tokens)
        if rng is not None and c.dropout:
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
        z, blocks = self._blocks(z, "decoder", None, recompute)  # (B, n, width)
        y, norm = layernorm_forward(z, p["decoder_norm.weight"], p["decoder_norm.bias"], eps=self.config.layernorm_eps)
        return y, DecoderCache(enter, masks_cache, blocks, norm)

    def backward(self, dprediction, cache, grads):
        """Backward of `forward`: every parameter's gradient is *added* into ``grads`` (see `gradient_buffer`).

        Shapes  dprediction (B, n, outputs)
        """
        # prediction = y @ W + b
        dy, *dlinear = linear_backward(dprediction, cache.predict)  # (B, n, width)
        _add(grads, "mpp_head" if cache.decoder is None else "decoder_pred", dlinear)
        if cache.decoder is not None:
            # y = LN(decoder([masks; u] + position)), u = y @ W_enter + b
            dz, *dnorm = layernorm_backward(dy, cache.decoder.norm)
            _add(grads, "decoder_norm", dnorm)
            dz = _blocks_backward(dz, cache.decoder.blocks, grads)
            du, dmasks = registers_backward(dz, cache.decoder.masks)
            grads["mask_token"] += dmasks.sum(axis=1, keepdims=True)  # one token, broadcast to n places
            dy, *dlinear = linear_backward(du, cache.decoder.enter)
            _add(grads, "decoder_embed", dlinear)
        # y = LN(z_L)
        dz, *dnorm = layernorm_backward(dy, cache.norm)
        _add(grads, "norm", dnorm)
        dz = _blocks_backward(dz, cache.blocks, grads)
        self._embed_backward(dz, cache.embed, grads)

    def _embed_backward(self, dz, cache, grads):
        # z_0 = gather(dropout(registers([x_class; corrupt(patches)] + E_pos)))
        dz = gather_backward(dz, cache.gather)
        if cache.dropout is not None:
            dz = dropout_backward(dz, cache.dropout)
        if cache.registers is not None:
            dz, dreg_token = registers_backward(dz, cache.registers)
            grads["reg_token"] += dreg_token
        if "pos_embed" in grads:
            grads["pos_embed"] += dz.sum(axis=0, keepdims=True)
        if cache.class_token is not None:
            dz, dcls_token = registers_backward(dz, cache.class_token)
            grads["cls_token"] += dcls_token
        if cache.corrupt is not None:
            dz, dmask_token = corrupt_backward(dz, cache.corrupt)
            grads["mask_token"] += dmask_token
        _, dW, db, _, _ = patch_embed_backward(dz, cache.patches)
        _add(grads, "patch_embed.proj", (dW, db))


def _add(grads, name, dparameters):
    """Add the gradients of a weight and a bias."""
    add_gradients(grads, (f"{name}.weight", f"{name}.bias"), dparameters)


def _of_block(named, block, prefix, i):
    """A block's own, by their names within it."""
    return named.renamed((prefix, i), {name: f"{prefix}.{i}.{name}" for name in block.names})


def _blocks_backward(dz, cache, grads):
    """Backward of the blocks: their gradients are added into ``grads``."""
    # z = block(z), for each block
    for i in reversed(range(len(cache.parts))):
        block = cache.parts[i]
        dz = block.backward(dz, cache.caches[i], _of_block(grads, block, cache.prefix, i))
    return dz
