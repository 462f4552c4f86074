r"""Dropout (Srivastava et al. 2014), in the inverted form that needs no change at test time.

Forward
    Each entry is kept with probability 1 - rate and scaled so that its expectation stays what it was:

        y = x * m / (1 - rate),      m_i in {0, 1},  P(m_i = 1) = 1 - rate.

Backward
    The mask is a constant, so the derivative of y_i by x_i is m_i / (1 - rate), and dx = dy * m / (1 - rate). It must
    be the same mask: that is why it is in the cache.

Example
    >>> import numpy as np
    >>> y, cache = dropout_forward(np.array([1.0, 2.0]), rate=0.5, mask=np.array([True, False]))
    >>> y.tolist()
    [2.0, 0.0]
    >>> dropout_backward(np.array([3.0, 4.0]), cache).tolist()
    [6.0, 0.0]
"""

from typing import Any, NamedTuple

import numpy as np

from minivit.base.backend import accelerated, array_module


class DropoutCache(NamedTuple):
    """What `dropout_backward` reads; ``mask`` is None where nothing was dropped."""

    mask: Any  # (...) bool, or None
    scale: float  # 1 / (1 - rate)


def dropout_mask(shape, rate, rng, xp=np):
    """Keep-mask of the given shape, True with probability 1 - rate, drawn on the host from a NumPy Generator.

    Drawn on the host so that a seed means the same mask on every device.
    Raises  ValueError: rate is outside [0, 1).
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout rate must lie in [0, 1), got {rate}")
    return xp.asarray(rng.random(shape, dtype=np.float32) >= rate)


@accelerated
def dropout_forward(x, *, rate=0.0, rng=None, mask=None):
    """Zero entries at random while training.

    Math    y = x * m / (1 - rate)
    Shapes  x (...), mask (...) or broadcastable to it  ->  y (...)
    Cache   mask (bool), scale
    Give a Generator to draw the mask or the mask itself; with neither, or at rate 0, y is x (evaluation).
    """
    if mask is None:
        if rng is None or rate == 0.0:
            return x, DropoutCache(None, 1.0)
        mask = dropout_mask(x.shape, rate, rng, array_module(x))
    scale = 1.0 / (1.0 - rate)
    y = x * mask * scale
    return y, DropoutCache(mask, scale)


@accelerated
def dropout_backward(dy, cache):
    """Backward of `dropout_forward`.

    Math    dx = dy * m / (1 - rate)
    Shapes  dy (...)  ->  dx (...)
    """
    mask, scale = cache
    if mask is None:
        return dy
    # y = x * mask * scale
    return dy * mask * scale
