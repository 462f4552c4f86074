"""The Vision Transformer (Dosovitskiy et al. 2020, arXiv:2010.11929).

Letters, as in the paper, here and in every layer:

    B images      N tokens      D width       L depth       h heads       Dh = D // h
    P patch       C channels    M MLP width   K classes     H, W image    R pre-logits width

Data flows  images (B, H, W, C) -> tokens (B, N, D) -> L blocks -> logits (B, K)  and back the same way.

The L + 2 parts, from `minivit.model.compose`: `minivit.layers.patch_embed` (Eq. 1), L times `minivit.layers.block`
(Eq. 2-3), `minivit.layers.head` (Eq. 4). The last block computes what the head reads, (B, 1, D) for a class token: see
`minivit.options.first_tokens`. `minivit.training.task.cross_entropy` joins forward, loss and backward.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from minivit.base import params as parameters
from minivit.base.backend import array_module
from minivit.base.pairs import Part
from minivit.model import compose
from minivit.model.images import check_images
from minivit.model.table import parameter_table
from minivit.options.positions import pooled_to_half


class Parts(NamedTuple):
    """What a forward pass runs through, and its backward in reverse."""

    embedding: Part
    blocks: tuple[Part, ...]
    head: Part


class ViTCache(NamedTuple):
    """What `ViT.backward` reads: the parts, and the cache of each."""

    parts: Parts
    embedding: Any
    blocks: tuple
    head: Any


class ViT:
    """A configuration and its parameters; a forward changes nothing in it, so threads may share one model.

    ``flat`` holds every parameter (its dtype and device are the model's), ``params`` are the named views into it. Give
    ``flat`` to wrap a buffer without copying it; otherwise the parameters are initialised from ``seed``.
    """

    def __init__(self, config, *, seed=0, dtype=np.float32, flat=None):
        self.config = config
        self.table = parameter_table(config)
        self.flat = parameters.initialise(self.table, seed=seed, dtype=dtype) if flat is None else flat
        xp = array_module(self.flat)
        fixed = {name: xp.asarray(a, dtype=self.flat.dtype) for name, a in compose.constants(config).items()}
        self.params = parameters.views(self.flat, self.table)
        self.inputs = parameters.Named(self.params | fixed)  # what the parts take: parameters and constants
        self.parts = self.compose()

    def __repr__(self):
        return f"ViT({self.config}, {self.flat.size:,} parameters, {self.flat.dtype})"

    def compose(self, *, rng=None, recompute=False, every_token=False):
        """The parts of a forward pass. Dropout draws from ``rng``; without one nothing is dropped."""
        c = self.config
        only_class_token = c.pooling == "cls" and not every_token  # the head reads no other row of the last block
        reads = [1 if only_class_token and i == c.depth - 1 else None for i in range(c.depth)]
        blocks = [compose.block(c, i, rng=rng, reads=reads[i], recompute=recompute) for i in range(c.depth)]
        return Parts(compose.embedding(c, rng), tuple(blocks), compose.head(c))

    def forward(self, images, *, rng=None, recompute=False):
        """Logits, and the cache for `backward` (Eq. 1-4).

        Shapes  images (B, H, W, C) uint8, or floats scaled to about [-1, 1]  ->  logits (B, K)
        Dropout acts only when a Generator is given (training). ``recompute``: see `minivit.options.recompute`.
        Raises  InputError: images of another shape, or with NaN pixels.
        """
        parts = self.parts if rng is None and not recompute else self.compose(rng=rng, recompute=recompute)
        z, embedding_cache = parts.embedding.forward(check_images(images, self), self.inputs)  # (B, N, D)  (Eq. 1)
        caches = []
        for i, block in enumerate(parts.blocks):
            z, cache = block.forward(z, self.of_block(self.inputs, i))  # (B, N, D)                         (Eq. 2-3)
            caches.append(cache)
        logits, head_cache = parts.head.forward(z, self.inputs)  # (B, K)                                   (Eq. 4)
        return logits, ViTCache(parts, embedding_cache, tuple(caches), head_cache)

    def backward(self, dlogits, cache, grads):
        """Backward of `forward`: every parameter's gradient is *added* into ``grads`` (see `gradient_buffer`).

        Shapes  dlogits (B, K)  ->  dimages (B, H, W, C), of the scaled pixels; None if a twin embedded bytes
        """
        # logits = head(z)                                                                                  (Eq. 4)
        dz = cache.parts.head.backward(dlogits, cache.head, grads)  # (B, N, D)
        # z = block(z), for each block                                                                      (Eq. 2-3)
        for i in reversed(range(self.config.depth)):
            dz = cache.parts.blocks[i].backward(dz, cache.blocks[i], self.of_block(grads, i))  # (B, N, D)
        # z = embedding(images)                                                                             (Eq. 1)
        return cache.parts.embedding.backward(dz, cache.embedding, grads)

    def of_block(self, named, i):
        """What belongs to block i, by the names within a block."""
        return named.renamed(i, {name: compose.full_name(i, name) for name in self.parts.blocks[i].names})

    def gradient_buffer(self):
        """A flat buffer of zeros like the parameters, and its named views: what `backward` adds into."""
        flat = array_module(self.flat).zeros_like(self.flat)
        return flat, parameters.views(flat, self.table)

    def predict(self, images):
        """Logits alone, with no dropout; each block's cache is dropped at once.

        Shapes  images (B, H, W, C)  ->  logits (B, K)
        """
        return self.read(images, self.parts.head)

    def features(self, images):
        """What the head reads, with no dropout: an image as the model sees it, for other classifiers to start from.

        Math    y of Eq. 4: after the final LayerNorm, the pooling, and the pre-logits layer if there is one
        Shapes  images (B, H, W, C)  ->  (B, R), or (B, D) without a pre-logits layer
        """
        return self.read(images, compose.features(self.config))

    def read(self, images, head, *, parts=None, visit=None):
        """The result of a head; ``visit(i, z, cache)``, if given, sees the tokens before and after every block."""
        parts = parts or self.parts
        z, cache = parts.embedding.forward(check_images(images, self), self.inputs)
        if visit:
            visit(0, z, cache)
        for i, block in enumerate(parts.blocks):
            z, cache = block.forward(z, self.of_block(self.inputs, i))
            if visit:
                visit(i + 1, z, cache)
        return head.forward(z, self.inputs)[0]

    def at_half_size(self):
        """The same parameters, in the same buffer, as a model of images of half the height and width.

        A patch there stands for four of the others, and has the mean of their positions.
        Raises  InputError: positions are learned, or the patches of a side cannot be halved.
        """
        fixed = pooled_to_half(self.config, self.inputs["pos_embed"])
        small = ViT(replace(self.config, image_size=self.config.image_size // 2), flat=self.flat)
        small.inputs["pos_embed"][...] = fixed
        return small
