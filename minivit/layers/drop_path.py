r"""Stochastic depth, or drop path (Huang et al. 2016, arXiv:1603.09382): dropout of a whole residual branch.

Forward
    Let f(x) be a residual branch, so that the block computes x + f(x). With probability ``rate`` an image
    skips the branch; otherwise the branch is scaled to keep its expectation, so that nothing changes at test
    time (the paper scales there instead):

        y_b = f_b * m_b / (1 - rate),      m_b in {0, 1}, one number for each image b.

Backward
    y is linear in f: df_b = dy_b * m_b / (1 - rate). It is dropout with a mask of shape (B, 1, ..., 1).

Example: the branch of the second image is dropped
    >>> import numpy as np
    >>> y, cache = drop_path_forward(np.ones((2, 3)), rate=0.5, mask=np.array([[True], [False]]))
    >>> y.tolist()
    [[2.0, 2.0, 2.0], [0.0, 0.0, 0.0]]
"""

from minivit.base.backend import accelerated, array_module
from minivit.layers.dropout import dropout_backward, dropout_forward, dropout_mask


@accelerated
def drop_path_forward(x, *, rate=0.0, rng=None, mask=None):
    """Drop the branch for whole images at random while training.

    Math    y_b = x_b * m_b / (1 - rate)
    Shapes  x (B, ...), mask (B, 1, ..., 1)  ->  y (B, ...)
    Cache   `DropoutCache` of mask and scale
    Give a Generator to draw the mask or the mask itself; with neither, or at rate 0, y is x (evaluation).
    """
    if mask is None and rng is not None and rate > 0.0:
        mask = dropout_mask((len(x),) + (1,) * (x.ndim - 1), rate, rng, array_module(x))
    return dropout_forward(x, rate=rate, mask=mask)


@accelerated
def drop_path_backward(dy, cache):
    """Backward of `drop_path_forward`.

    Math    dx_b = dy_b * m_b / (1 - rate)
    Shapes  dy (B, ...)  ->  dx (B, ...)
    """
    # y_b = x_b * m_b * scale
    return dropout_backward(dy, cache)
