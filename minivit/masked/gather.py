r"""Gather: some of the tokens of each image, in an order of one's choice.

Forward
    Row i of image b is the token that an index names, no token twice:

        y_bi = z_{b, k_bi}

    The encoder of a masked autoencoder sees a quarter of the patches in this way (He et al. 2021, arXiv:2111.06377).
    Attention does not know of an order: what tells a token's place was added to it before.

Backward, dy is given
    Every row goes back to where it came from (a scatter). Since no token was taken twice, no two rows meet; what was
    not taken reached nothing:

        dz_{b, k_bi} = dy_bi,      zero elsewhere

Example: of three tokens the last and the first, D = 1
    >>> import numpy as np
    >>> y, cache = gather_forward(np.array([[[1.0], [2.0], [3.0]]]), np.array([[2, 0]]))
    >>> y.tolist()
    [[[3.0], [1.0]]]
    >>> gather_backward(np.array([[[10.0], [20.0]]]), cache).tolist()
    [[[20.0], [0.0], [10.0]]]
"""

from typing import Any, NamedTuple

from minivit.base.backend import accelerated, array_module


class GatherCache(NamedTuple):
    """What `gather_backward` reads."""

    index: Any  # (B, n)
    count: int  # N


@accelerated
def gather_forward(z, index):
    """The rows of each image that an index names, none of them twice.

    Math    y_bi = z_{b, k_bi}
    Shapes  z (B, N, D), index (B, n) integers  ->  y (B, n, D)
    Cache   the index, N
    """
    rows = array_module(z, index).arange(len(z))[:, None]
    return z[rows, index], GatherCache(index, z.shape[1])


@accelerated
def gather_backward(dy, cache):
    """Backward of `gather_forward`.

    Math    dz_{b, k_bi} = dy_bi, zero elsewhere
    Shapes  dy (B, n, D)  ->  dz (B, N, D)
    """
    xp = array_module(dy)
    B, _, D = dy.shape
    dz = xp.zeros((B, cache.count, D), dy.dtype)
    # y = z[rows, index], that is y_bi = z_{b, k_bi}
    dz[xp.arange(B)[:, None], cache.index] = dy
    return dz
