r"""Gradient clipping by the global norm (Pascanu et al. 2013, arXiv:1211.5063).

    g <- g * min(1, max_norm / |g|),        |g| = sqrt(sum of g * g) over all parameters

A gradient that is too long is made as long as allowed and keeps its direction.

Example
    >>> import numpy as np
    >>> g = np.array([3.0, 4.0])
    >>> round(float(clip_by_global_norm(g, 1.0)), 9), g.round(9).tolist()
    (5.0, [0.6, 0.8])
"""

from __future__ import annotations

from minivit.base.backend import array_module


def clip_by_global_norm(grad, max_norm):
    """Scale the whole gradient, in place, so that its norm is at most ``max_norm``; 0 means no clipping.

    Math    g <- g * min(1, max_norm / |g|)
    Shapes  grad (n,)  ->  the norm before clipping, () on the gradient's device (nothing is read back to the host)
    """
    xp = array_module(grad)
    norm = xp.sqrt(grad @ grad)
    if max_norm:
        # no branch on the norm, which would wait for the device; the tiny number keeps 0 / 0 away
        grad *= xp.minimum(1.0, max_norm / (norm + 1e-12)).astype(grad.dtype)
    return norm
