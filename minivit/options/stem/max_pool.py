r"""Max-pooling of feature maps over windows of 3 x 3 in steps of 2, with TensorFlow's SAME padding.

Forward
    y is the largest number that a window sees, each channel for itself:

        y[b, r, c, k] = max_ij padded[b, 2 * r + i, 2 * c + j, k]

    The border that completes the windows is -infinity: it is never the largest. Where it lies is said in
    `minivit.options.stem.conv2d`; for an even number of rows, one comes after the last. The loop is over nine positions
    (i, j) of a window, all windows at once, and remembers for each which position won.

Backward, dy is given
    Where one number of a window is the largest, a small change of it changes y by as much, and a small change of
    another one changes nothing: y has the slope 1 with the winner and 0 with the others. All of dy goes to the winner,
    and a pixel that wins in several windows (they overlap) sums their gradients:

        dpadded[b, 2 * r + i, 2 * c + j, k] += dy[b, r, c, k]      where (i, j) won window (r, c)

    Of several that are equally large (after a ReLU, the zeros) the first one, in the order of rows, gets all of it: if
    each of them got dy, it would count twice. dx is dpadded without the border.

    Complex numbers (the complex step of `minivit.laboratory.gradcheck`) are compared by their real parts.

Example: a row of five pixels; the windows see the pixels 1-2, 2-4 and 4-5
    >>> import numpy as np
    >>> y, cache = max_pool_forward(np.array([1.0, 4.0, 2.0, 3.0, 0.0]).reshape(1, 1, 5, 1))
    >>> y.ravel().tolist()
    [4.0, 4.0, 3.0]
    >>> max_pool_backward(np.array([1.0, 10.0, 100.0]).reshape(1, 1, 3, 1), cache).ravel().tolist()   # 4 wins twice
    [0.0, 11.0, 0.0, 100.0, 0.0]
"""

from typing import Any, NamedTuple

from minivit.base.backend import accelerated, array_module
from minivit.options.stem.conv2d import interior, pad, padded_shape, taps

KERNEL, STRIDE = (3, 3), 2


class MaxPoolCache(NamedTuple):
    """What `max_pool_backward` reads."""

    winner: Any  # (B, H', W', C) uint8: 3 * i + j
    shape: tuple  # of x


@accelerated
def max_pool_forward(x):
    """The largest entry of each window.

    Math    y[b, r, c, k] = max_ij padded[b, 2 * r + i, 2 * c + j, k]
    Shapes  x (B, H, W, C)  ->  y (B, ceil(H / 2), ceil(W / 2), C)
    Cache   which entry won, a byte each
    """
    xp = array_module(x)
    padded = pad(x, KERNEL, STRIDE, float("-inf"))
    y = winner = None
    for t, (_, met) in enumerate(taps(padded, KERNEL, STRIDE)):
        if y is None:
            y, winner = met.copy(), xp.zeros(met.shape, xp.uint8)
            continue
        larger = met.real > y.real  # not >=: of equal ones the first stays
        winner = xp.maximum(winner, larger * xp.uint8(t))  # t grows: the last one that was larger
        y = xp.maximum(y, met)  # quicker than where(larger, met, y); complex numbers go by their real parts
    return y, MaxPoolCache(winner, x.shape)


@accelerated
def max_pool_backward(dy, cache):
    """Backward of `max_pool_forward`.

    Math    dpadded[b, 2 * r + i, 2 * c + j, k] += dy[b, r, c, k] where (i, j) won window (r, c)
    Shapes  dy (B, H', W', C)  ->  dx (B, H, W, C)
    """
    dpadded = array_module(dy).zeros(padded_shape(cache.shape, KERNEL, STRIDE), dy.dtype)
    # y[b, r, c, k] = max_ij padded[b, 2 * r + i, 2 * c + j, k]
    for t, (_, met) in enumerate(taps(dpadded, KERNEL, STRIDE)):
        met += dy * (cache.winner == t)
    # padded: x in a border of -infinity
    return dpadded[interior(cache.shape, KERNEL, STRIDE)]
