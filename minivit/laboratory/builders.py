"""Builders of cases: of functions of arrays, of parts of a model, which take parameters by name, of a model.

A case is a function of a Generator that gives (forward, backward, args, argument names).
"""

from typing import Any, NamedTuple

import numpy as np

from minivit.base.backend import array_module, plain
from minivit.base.pairs import Part
from minivit.masked import MaskedViT, draw_plan, masked_table
from minivit.model import ViT, ViTConfig, compose

SMALL = 0.3  # a factor of the weights: softmax's gradients vanish where it saturates


def layer(forward, backward, *, weights=1.0, **shapes):
    """A case of arrays of normal numbers; those but the first are multiplied by ``weights``."""

    def case(rng):
        first, *others = (rng.standard_normal(shape) for shape in shapes.values())
        return forward, backward, [first, *(weights * value for value in others)], tuple(shapes)

    return case


def drawn(forward, **settings):
    """A forward that draws the same numbers at each call."""
    return lambda *args: forward(*args, rng=np.random.default_rng(1), **settings)


class PartCache(NamedTuple):
    """The cache of a part, the part itself, and the shapes of the parameters that it was given."""

    cache: Any
    part: Part
    shapes: tuple


def of_part(make, x, shapes, *, weights=SMALL):
    """A case of a `Part`, which takes and fills mappings; ``make()`` makes it anew, and what it draws, at each call.

    ``x`` is the shape of the input, ``shapes`` maps names of parameters to theirs.
    """
    names = tuple(shapes)

    def forward(z, *values):
        part = make()
        y, cache = part.forward(z, dict(zip(names, values, strict=True)))
        return y, PartCache(cache, part, tuple(value.shape for value in values))

    def backward(dy, cache):
        xp = array_module(dy)
        grads = {name: xp.zeros(shape, dy.dtype) for name, shape in zip(names, cache.shapes, strict=True)}
        dz = cache.part.backward(dy, cache.cache, grads)
        return (dz, *grads.values())

    def case(rng):
        values = [rng.standard_normal(shape) for shape in shapes.values()]
        values = [weights * v if v.ndim == 2 else v for v in values]
        return forward, backward, [rng.standard_normal(x), *values], ("z", *names)

    return case


def composed(fields, part, **settings):
    """A case of a part of a model, "embedding", "block" (the last one) or "head", as its configuration makes it."""

    def case(rng):
        config = ViTConfig(**fields)
        model, last = ViT(config, dtype=np.float64), config.depth - 1
        images = (3, config.image_size, config.image_size, config.channels)
        x = images if part == "embedding" else (4, config.num_tokens, config.width)

        def make():
            own = np.random.default_rng(1)
            if part == "block":
                return compose.block(config, last, rng=own, **settings)
            return compose.embedding(config, own) if part == "embedding" else compose.head(config)

        full = {name: compose.full_name(last, name) if part == "block" else name for name in make().names}
        shapes = {name: model.inputs[inputs].shape for name, inputs in full.items()}
        shapes = {name: shape for name, shape in shapes.items() if 0 not in shape}
        missing = {name: np.zeros(model.inputs[full[name]].shape) for name in full if name not in shapes}
        return of_part(lambda: with_constants(make(), missing), x, shapes)(rng)

    return case


def with_constants(inner, fixed):
    """A part that is given some of its parameters: those that are empty."""

    def forward(x, params):
        xp, dtype = array_module(x), next(iter(params.values())).dtype
        return inner.forward(x, params | {name: xp.asarray(a, dtype=dtype) for name, a in fixed.items()})

    return Part(forward, inner.backward, inner.names)


def masked_model(config, masked):
    """A whole model that guesses masked patches, as a function of its parameters."""

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
