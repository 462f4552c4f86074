"""The Vision Transformer (Dosovitskiy et al. 2020, arXiv:2010.11929).

Letters, as in the paper, here and in every layer:

    B images      N tokens      D width       L depth       h heads       Dh = D // h
    P patch       C channels    M MLP width   K classes     H, W image    R pre-logits width

Data flows  images (B, H, W, C) -> tokens (B, N, D) -> L blocks -> logits (B, K)  and back the same way.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from minivit.base import params as parameters
from minivit.base.backend import array_module, plain
from minivit.base.errors import InputError
from minivit.layers.block import BlockCache, block_backward, block_forward, block_jvp
from minivit.layers.dropout import DropoutCache, dropout_backward, dropout_forward, dropout_jvp
from minivit.layers.head import HeadCache, head_backward, head_forward, head_jvp
from minivit.layers.msa import attention_map
from minivit.layers.patch_embed import (
    PatchEmbedCache,
    patch_embed_backward,
    patch_embed_forward,
    patch_embed_jvp,
    scale_pixels,
    sincos2d,
)
from minivit.model.table import STEM, block_parameters, parameter_table, position_parameters
from minivit.options.axial import axial_map, from_axis, to_axis
from minivit.options.position import PositionCache, position_backward, position_forward, position_jvp
from minivit.options.position2d import Position2dCache, position2d_backward, position2d_forward, position2d_jvp
from minivit.options.registers import RegistersCache, registers_backward, registers_forward, registers_jvp
from minivit.options.stem.resnet import (
    ResNetCache,
    resnet_backward,
    resnet_forward,
    resnet_jvp,
)


def checked_images(images, dtype):
    """Pictures as the patch embedding takes them: uint8 as it is, floats, which are taken as scaled, of a dtype.

    Shapes  images (B, H, W, C)  ->  (B, H, W, C), uint8 or of the given dtype
    Raises  InputError: pictures of another integer type; (on the host) a float picture that is not finite.
    """
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind in "iub":
        raise InputError(f"pictures are {images.dtype}; give them as uint8 (0..255), or as floats scaled to -1..1")
    if array_module(images) is np and not np.isfinite(images).all():
        bad = int(np.argmin(np.isfinite(images).reshape(len(images), -1).all(axis=1)))
        raise InputError(f"picture {bad} of the batch has a pixel that is NaN or infinite")
    return images.astype(dtype, copy=False)


def pixels(images, dtype):
    """Pictures as numbers: uint8 is scaled to (x - 127.5) / 127.5; floats are taken as scaled already.

    Shapes  images (B, H, W, C)  ->  (B, H, W, C) of the given dtype
    Raises  as `checked_images`.
    """
    images = checked_images(images, dtype)
    return scale_pixels(images, dtype) if images.dtype == np.uint8 else images


class BlockInput(NamedTuple):
    """What makes a block's cache again: all that is kept of it with ``recompute``."""

    z: Any  # (B, N, D)
    rng: np.random.Generator | None  # as it was before the block


class ViTCache(NamedTuple):
    """What `ViT.backward` reads: the caches of the stem, the embedding, its dropout, each block and the head.

    ``positions`` are those of the positions that were added before each block; None where none was, or where the patch
    embedding did it.
    """

    stem: ResNetCache | None
    embed: PatchEmbedCache
    registers: RegistersCache | None
    dropout: DropoutCache
    positions: tuple[PositionCache | Position2dCache | None, ...]
    blocks: tuple[BlockCache | BlockInput, ...]
    head: HeadCache


class Intermediates(NamedTuple):
    """What `ViT.intermediates` saw on the way."""

    logits: Any  # (B, K)
    attention: tuple  # L arrays (B, h, N, N): the attention maps of each block; zero where an axial one does not look
    features: tuple  # 1 + L arrays (B, N, D): the embedded tokens, then the output of each block


class ViT:
    """A configuration and its parameters; calls leave nothing behind, so threads may share one model.

    ``flat`` is the buffer that holds every parameter (the model's dtype and device are its), ``params`` the
    named views into it. Give ``flat`` to wrap an existing buffer (an average, a perturbed copy, a GPU array)
    without copying; otherwise the parameters are initialised from ``seed``.
    """

    def __init__(self, config, *, seed=0, dtype=np.float32, flat=None):
        self.config = config
        self.table = parameter_table(config)
        self.flat = parameters.initialise(self.table, seed=seed, dtype=dtype) if flat is None else flat
        self.params = parameters.views(self.flat, self.table)
        self._block_names = block_parameters(config)
        self._blocks = [self._of_block(self.params, i) for i in range(config.depth)]
        self._stem = self._of_stem(self.params)
        self._position_names = position_parameters(config)
        self._positions = [tuple(self.params[name] for name in names) for names in self._position_names]
        if config.pos_embed == "sincos2d":
            fixed = sincos2d(config.grid_size, config.width, prefix_tokens=int(config.pooling == "cls"))
            fixed = (array_module(self.flat).asarray(fixed, dtype=self.flat.dtype),)
            self._positions = [fixed] + [fixed if config.pos_at == "shared" else ()] * (config.depth - 1)
        # what the patch embedding adds; rows and columns are added behind it
        self._position = self._positions[0][0] if len(self._positions[0]) == 1 else None

    def __repr__(self):
        return f"ViT({self.config}, {self.flat.size:,} parameters, {self.flat.dtype})"

    def _of_block(self, named, i):
        """A block's own by their names in it; a table of relative positions may be that of all blocks."""
        shared = {"attn.rel_pos": named["rel_pos"]} if "rel_pos" in named else {}
        return {name: named[f"blocks.{i}.{name}"] for name in self._block_names if name not in shared} | shared

    @staticmethod
    def _of_stem(named):
        return {name.removeprefix(STEM): value for name, value in named.items() if name.startswith(STEM)}

    def drop_path_rate(self, i):
        """Stochastic depth's rate of block i: it rises linearly from 0 to the configuration's."""
        c = self.config
        return c.drop_path * (i / (c.depth - 1) if c.depth > 1 else 1.0)

    def _block_settings(self, i):
        c = self.config
        only_class_token = c.pooling == "cls" and i == c.depth - 1
        return {
            "num_heads": c.num_heads,
            "queries": 1 if only_class_token else None,  # the head reads no other row of the last block
            "gelu": c.gelu,
            "eps": c.layernorm_eps,
            "dropout": c.dropout,
            "attention_dropout": c.attention_dropout,
            "drop_path": self.drop_path_rate(i),
        }

    def positions(self):
        """What is added to class token and patches before the first block, as one table, whatever makes it.

        Math    learned2d: [x_b, y_a] for the patch in row a and column b, zeros for the class token; none: zeros
        Shapes  ->  (1, N, D), of N tokens without registers
        """
        c, added = self.config, self._positions[0]
        if len(added) == 1:
            return added[0]
        empty = array_module(self.flat).zeros((1, c.num_tokens - c.registers, c.width), self.flat.dtype)
        return position2d_forward(empty, *added)[0] if added else empty

    def feature_map(self, images):
        """What patches are cut from, the pictures themselves or the stem's map of them, and the stem's cache or None.

        Shapes  images (B, H, W, C)  ->  (B, H / stride, W / stride, C'), with ``stem_stride`` and ``patch_channels``
        """
        c = self.config
        if not c.stem:
            return checked_images(images, self.flat.dtype), None
        return resnet_forward(pixels(images, self.flat.dtype), self._stem, units=c.stem_units, groups=c.stem_groups)

    def _embed(self, images, rng):
        c, p = self.config, self.params
        if images.ndim != 4 or images.shape[1:] != (c.image_size, c.image_size, c.channels):
            expected = f"(B, {c.image_size}, {c.image_size}, {c.channels})"
            raise InputError(f"this model takes pictures of shape {expected}, got {tuple(images.shape)}")
        x, stem = self.feature_map(images)
        z, embed = patch_embed_forward(
            x,
            p["patch_embed.proj.weight"],
            p["patch_embed.proj.bias"],
            p.get("cls_token"),
            self._position,
            patch_size=c.patch_size,
        )
        position = registers = None
        if len(self._positions[0]) == 2:
            z, position = position2d_forward(z, *self._positions[0])
        if c.registers:
            z, registers = registers_forward(z, p["reg_token"], at=int(c.pooling == "cls"))
        z, dropout = dropout_forward(z, rate=c.dropout, rng=rng)
        return z, position, (stem, embed, registers, dropout)

    def _add_position(self, i, z):
        """The input of block i, from the output of the one before: with a position added, where there is one."""
        c, position = self.config, self._positions[i]
        if i == 0 or not position:  # the embedding has added that of the first block
            return z, None
        if len(position) == 2:
            return position2d_forward(z, *position)
        return position_forward(z, *position, at=int(c.pooling == "cls"), registers=c.registers)

    def _position_backward(self, i, dz, cache, grads):
        """Backward of the position added before block i; its gradients are added into ``grads``."""
        if cache is None:
            return dz
        back = position_backward if isinstance(cache, PositionCache) else position2d_backward
        dz, *gradients = back(dz, cache)
        for name, gradient in zip(self._position_names[i], gradients, strict=False):  # fixed positions have no name
            grads[name] += gradient
        return dz

    def _head(self, z):
        c = self.config
        return head_forward(z, self.params, pooling=c.pooling, registers=c.registers, eps=c.layernorm_eps)

    def at_half_size(self):
        """The same parameters, in the same buffer, as a model of pictures of half the height and width.

        A patch there stands for four of the others, and has the mean of their positions.
        Raises  InputError: positions are learned, or the patches of a side cannot be halved.
        """
        c = self.config
        if c.pos_embed not in ("sincos2d", "none"):
            raise InputError('pictures of half the size need fixed positions: pos_embed "sincos2d" or "none"')
        if c.grid_size % 2:
            raise InputError(f"pictures of half the size need an even number of patches on a side, not {c.grid_size}")
        small = ViT(replace(c, image_size=c.image_size // 2), flat=self.flat)
        if self._position is not None:  # one array, also where all blocks share it
            g, D = c.grid_size, c.width
            grid = self._position[:, -g * g :].reshape(g // 2, 2, g // 2, 2, D).mean(axis=(1, 3))
            small._position[:, -((g // 2) ** 2) :] = grid.reshape(1, -1, D)
        return small

    def gradient_buffer(self):
        """A flat buffer of zeros like the parameters, and its named views: what `backward` adds into."""
        flat = array_module(self.flat).zeros_like(self.flat)
        return flat, parameters.views(flat, self.table)

    def _axis(self, i, move, array):
        """`to_axis` or `from_axis` for block i: even ones attend along rows, odd ones along columns."""
        return move(array, self.config.grid_size, columns=i % 2 == 1) if self.config.attention == "axial" else array

    def _block(self, i, z, rng, **changes):
        settings = self._block_settings(i) | changes
        z, cache = block_forward(self._axis(i, to_axis, z), self._blocks[i], **settings, rng=rng)
        return self._axis(i, from_axis, z), cache

    def forward(self, images, *, rng=None, recompute=False):
        """Logits, and the cache for `backward`.

        Math    Eq. 1-4: embed (behind the stem, if there is one), L blocks, final LayerNorm, pooling, head
        Shapes  images (B, H, W, C) uint8, or floats scaled to about [-1, 1]  ->  logits (B, K)
        Dropout and stochastic depth act only when a Generator is given (training).
        With ``recompute``, the cache holds of each block its input alone, and `backward` runs the block forward once
        more, with the same dropout masks (Chen et al. 2016, arXiv:1604.06174).
        Raises  InputError: pictures of another shape, or with NaN pixels.
        """
        z, position, embedding = self._embed(images, rng)  # (B, N, D)
        positions, blocks = [position], []
        for i in range(self.config.depth):
            if i:
                z, position = self._add_position(i, z)
                positions.append(position)
            block_input = BlockInput(z, deepcopy(rng)) if recompute else None
            z, cache = self._block(i, z, rng)  # (B, N, D); (B, 1, D) at the end
            blocks.append(block_input or cache)
        logits, head = self._head(z)  # (B, K)
        return logits, ViTCache(*embedding, tuple(positions), tuple(blocks), head)

    def backward(self, dlogits, cache, grads, *, need_dimages=False):
        """Backward of `forward`: every parameter's gradient is *added* into ``grads`` (see `gradient_buffer`).

        Shapes  dlogits (B, K)  ->  dimages (B, H, W, C) with respect to the scaled pixels, or None unless asked for
        """
        # logits = head(z_L)
        dz = head_backward(dlogits, cache.head, grads)  # (B, N, D) or (B, 1, D)
        # z_l = block(position(z_{l-1})), in rows or columns where attention is axial
        for i in reversed(range(self.config.depth)):
            block = cache.blocks[i]
            if isinstance(block, BlockInput):
                _, block = self._block(i, block.z, deepcopy(block.rng))
            dz = block_backward(self._axis(i, to_axis, dz), block, self._of_block(grads, i))
            dz = self._axis(i, from_axis, dz)  # (B, N, D)
            if i:
                dz = self._position_backward(i, dz, cache.positions[i], grads)
        # z_0 = dropout(registers(position2d(embed(stem(images)))))
        dz = dropout_backward(dz, cache.dropout)
        if cache.registers is not None:
            dz, dreg_token = registers_backward(dz, cache.registers)
            grads["reg_token"] += dreg_token
        dz = self._position_backward(0, dz, cache.positions[0], grads)
        need_dx = need_dimages or cache.stem is not None
        dimages, dW, db, dcls_token, dpos_embed = patch_embed_backward(dz, cache.embed, need_dimages=need_dx)
        grads["patch_embed.proj.weight"] += dW
        grads["patch_embed.proj.bias"] += db
        if "cls_token" in grads:
            grads["cls_token"] += dcls_token
        if len(self._position_names[0]) == 1:  # a fixed sine-cosine embedding has no gradient to keep
            grads[self._position_names[0][0]] += dpos_embed
        if cache.stem is not None:
            dimages = resnet_backward(dimages, cache.stem, self._of_stem(grads), need_dimages=need_dimages)
        return dimages

    def jvp(self, imagesdot, flatdot, cache):
        """Forward-mode derivative of `forward`: how the logits move when pictures and parameters move.

        Shapes  imagesdot (B, H, W, C) in scaled pixels, flatdot (n,) like the parameters  ->  logitsdot (B, K)
        """
        if any(isinstance(block, BlockInput) for block in cache.blocks):
            raise ValueError("the cache of a forward with recompute=True holds no intermediate values to differentiate")
        tangents = parameters.views(flatdot, self.table)
        positions = [[tangents[name] for name in names] for names in self._position_names]
        if cache.stem is not None:
            imagesdot = resnet_jvp(imagesdot, self._of_stem(tangents), cache.stem)
        zdot = patch_embed_jvp(
            imagesdot,
            tangents["patch_embed.proj.weight"],
            tangents["patch_embed.proj.bias"],
            tangents.get("cls_token"),
            positions[0][0] if positions[0] else 0.0,  # a fixed sine-cosine embedding does not move
            cache.embed,
        )
        if cache.positions[0] is not None:
            zdot = position2d_jvp(zdot, *positions[0], cache.positions[0])
        if cache.registers is not None:
            zdot = registers_jvp(zdot, tangents["reg_token"], cache.registers)
        zdot = dropout_jvp(zdot, cache.dropout)
        for i in range(self.config.depth):
            if i and positions[i]:
                move = position_jvp if isinstance(cache.positions[i], PositionCache) else position2d_jvp
                zdot = move(zdot, *positions[i], cache.positions[i])
            zdot = block_jvp(self._axis(i, to_axis, zdot), self._of_block(tangents, i), cache.blocks[i])
            zdot = self._axis(i, from_axis, zdot)  # (B, N, D); (B, 1, D) at the end
        return head_jvp(zdot, tangents, cache.head)  # (B, K)

    def predict(self, images):
        """Logits alone, with no dropout; each block's cache is dropped at once.

        Shapes  images (B, H, W, C)  ->  logits (B, K)
        """
        return self._predicted(images)[0]

    def features(self, images):
        """What the head reads, with no dropout: a picture as the model sees it, for other classifiers to start from.

        Math    y of Eq. 4: after the final LayerNorm, the pooling, and the tanh of a pre-logits layer if there is one
        Shapes  images (B, H, W, C)  ->  (B, R), or (B, D) without a pre-logits layer
        """
        return self._predicted(images)[1].head.x

    def _predicted(self, images):
        z, *_ = self._embed(images, None)
        for i in range(self.config.depth):
            z, _ = self._block(i, self._add_position(i, z)[0], None)
        return self._head(z)

    def intermediates(self, images):
        """Logits, attention maps and token features of every block, with no dropout.

        Shapes  images (B, H, W, C)  ->  Intermediates: logits (B, K), L maps (B, h, N, N), 1 + L features (B, N, D)
        """
        with plain():  # kernels keep no attention maps
            z, *_ = self._embed(images, None)
            attention, features = [], [z]
            for i in range(self.config.depth):
                z, cache = self._block(i, self._add_position(i, z)[0], None, queries=None)  # every token
                seen = attention_map(cache.msa)
                if self.config.attention == "axial":
                    seen = self._axis(i, axial_map, seen)
                attention.append(seen)
                features.append(z)
            return Intermediates(self._head(z)[0], tuple(attention), tuple(features))
