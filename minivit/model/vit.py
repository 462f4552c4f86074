"""The Vision Transformer (Dosovitskiy et al. 2020, arXiv:2010.11929).

Letters, as in the paper, here and in every layer:

    B images      N tokens      D width       L depth       h heads       Dh = D // h
    P patch       C channels    M MLP width   K classes     H, W image    R pre-logits width

Data flows  images (B, H, W, C) -> tokens (B, N, D) -> L blocks -> logits (B, K)  and back the same way.

A model is L + 2 steps: `minivit.layers.patch_embed` (Eq. 1), L times `minivit.layers.block` (Eq. 2-3),
`minivit.layers.head` (Eq. 4). `minivit.model.compose` puts the options of the configuration around them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from minivit.base import params as parameters
from minivit.base.backend import array_module
from minivit.base.pairs import Step
from minivit.model import compose
from minivit.model.images import check_images
from minivit.model.table import parameter_table
from minivit.options.positions import pooled_to_half


class Steps(NamedTuple):
    """What a forward pass runs through, and its backward in reverse."""

    embedding: Step
    blocks: tuple[Step, ...]
    head: Step


class ViTCache(NamedTuple):
    """What `ViT.backward` reads: the steps, and the cache of each."""

    steps: Steps
    embedding: Any
    blocks: tuple
    head: Any


class ViT:
    """A configuration and its parameters; calls leave nothing behind, so threads may share one model.

    ``flat`` holds every parameter (the model's dtype and device are its), ``params`` are the named views into it. Give
    ``flat`` to wrap a buffer without copying it; otherwise the parameters are initialised from ``seed``.
    """

    def __init__(self, config, *, seed=0, dtype=np.float32, flat=None):
        self.config = config
        self.table = parameter_table(config)
        self.flat = parameters.initialise(self.table, seed=seed, dtype=dtype) if flat is None else flat
        xp = array_module(self.flat)
        fixed = {name: xp.asarray(a, dtype=self.flat.dtype) for name, a in compose.constants(config).items()}
        self.params = parameters.views(self.flat, self.table)
        self.inputs = parameters.Named(self.params | fixed)  # what the steps take: parameters and constants
        self.steps = self.compose()

    def __repr__(self):
        return f"ViT({self.config}, {self.flat.size:,} parameters, {self.flat.dtype})"

    def compose(self, *, rng=None, recompute=False, every_token=False):
        """The steps of a forward pass. What is dropped is drawn from ``rng``; without one nothing is."""
        c = self.config
        only_class_token = c.pooling == "cls" and not every_token  # the head reads no other row of the last block
        reads = [1 if only_class_token and i == c.depth - 1 else None for i in range(c.depth)]
        blocks = [compose.block(c, i, rng=rng, reads=reads[i], recompute=recompute) for i in range(c.depth)]
        return Steps(compose.embedding(c, rng), tuple(blocks), compose.head(c))

    def forward(self, images, *, rng=None, recompute=False):
        """Logits, and the cache for `backward`.

        Math    Eq. 1-4: embed, L blocks, final LayerNorm, head
        Shapes  images (B, H, W, C) uint8, or floats scaled to about [-1, 1]  ->  logits (B, K)
        Dropout acts only when a Generator is given (training). ``recompute``: see `minivit.options.recompute`.
        Raises  InputError: images of another shape, or with NaN pixels.
        """
        steps = self.steps if rng is None and not recompute else self.compose(rng=rng, recompute=recompute)
        z, embedding = steps.embedding.forward(check_images(images, self), self.inputs)  # (B, N, D)        (Eq. 1)
        caches = []
        for i, block in enumerate(steps.blocks):
            z, cache = block.forward(z, self.of_block(self.inputs, i))  # (B, N, D)                         (Eq. 2-3)
            caches.append(cache)
        logits, head = steps.head.forward(z, self.inputs)  # (B, K)                                         (Eq. 4)
        return logits, ViTCache(steps, embedding, tuple(caches), head)

    def backward(self, dlogits, cache, grads):
        """Backward of `forward`: every parameter's gradient is *added* into ``grads`` (see `gradient_buffer`).

        Shapes  dlogits (B, K)  ->  dimages (B, H, W, C) by the scaled pixels, or None where a twin met bytes
        """
        # logits = head(z)                                                                                  (Eq. 4)
        dz = cache.steps.head.backward(dlogits, cache.head, grads)  # (B, N, D)
        # z = block(z), for each block                                                                      (Eq. 2-3)
        for i in reversed(range(self.config.depth)):
            dz = cache.steps.blocks[i].backward(dz, cache.blocks[i], self.of_block(grads, i))  # (B, N, D)
        # z = embedding(images)                                                                             (Eq. 1)
        return cache.steps.embedding.backward(dz, cache.embedding, grads)

    def of_block(self, named, i):
        """A block's own, by their names within it."""
        return named.part(i, {name: compose.full_name(i, name) for name in self.steps.blocks[i].names})

    def gradient_buffer(self):
        """A flat buffer of zeros like the parameters, and its named views: what `backward` adds into."""
        flat = array_module(self.flat).zeros_like(self.flat)
        return flat, parameters.views(flat, self.table)

    def predict(self, images):
        """Logits alone, with no dropout; each block's cache is dropped at once.

        Shapes  images (B, H, W, C)  ->  logits (B, K)
        """
        return self.read(images, self.steps.head)

    def features(self, images):
        """What the head reads, with no dropout: an image as the model sees it, for other classifiers to start from.

        Math    y of Eq. 4: after the final LayerNorm, the pooling, and the pre-logits layer if there is one
        Shapes  images (B, H, W, C)  ->  (B, R), or (B, D) without a pre-logits layer
        """
        return self.read(images, compose.features(self.config))

    def read(self, images, head, *, steps=None, visit=None):
        """The result of a head; ``visit(i, z, cache)``, if given, sees the tokens before and after every block."""
        steps = steps or self.steps
        z, cache = steps.embedding.forward(check_images(images, self), self.inputs)
        if visit:
            visit(0, z, cache)
        for i, block in enumerate(steps.blocks):
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
