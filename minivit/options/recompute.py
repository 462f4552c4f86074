r"""Blocks that keep their input alone, and run again in the backward pass (Chen et al. 2016, arXiv:1604.06174).

Forward
    That of the block. Of its cache nothing is kept but what makes it again: z, and what dropout draws from, as it was.

Backward
    The block's forward once more, which gives the same cache to the last bit, and then the block's backward: a third
    more work, and memory for one block instead of all.
"""

from copy import deepcopy
from typing import Any, NamedTuple

from minivit.base.pairs import Part


class RecomputeCache(NamedTuple):
    """What makes a block's cache again."""

    z: Any  # (B, N, D)
    params: dict
    rng: Any  # as it was before the block; None without dropout


def recomputed(make, rng):
    """The Part that ``make(rng)`` gives, as one that keeps its input alone."""
    inner = make(rng)

    def forward(z, params):
        cache = RecomputeCache(z, params, deepcopy(rng))
        return inner.forward(z, params)[0], cache

    def backward(dz, cache, grads):
        # y = inner(z)
        again = make(deepcopy(cache.rng))
        _, inner_cache = again.forward(cache.z, cache.params)
        return again.backward(dz, inner_cache, grads)

    return Part(forward, backward, inner.names)
