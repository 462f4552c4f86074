r"""A position embedding of rows and columns (appendix D.4 of the ViT paper).

Forward
    Patches lie in a grid of g rows and g columns. Two tables are learned, one for each axis, of half the width each;
    the patch in row a and column c gets the X-embedding of its column beside the Y-embedding of its row:

        z'_ac = z_ac + [x_c, y_a]          x_c, y_a of D/2 numbers, the same in every image

    2 * g vectors of D/2 numbers stand for the g * g vectors of D numbers of `minivit.layers.patch_embed`. Tokens in
    front of the patches, the class token and registers, lie in no row and no column and get nothing; the class token is
    learned itself.

Backward, dz' is given
    A sum hands its gradient to both of its terms, dz = dz'. x_c was added to the first half of every patch of column c,
    y_a to the second half of every patch of row a, in every image b; each gradient is the sum over these places:

        dx_c = sum_b sum_a dz'_bac[first half]          dy_a = sum_b sum_c dz'_bac[second half]

Example: one image, a grid of 2 x 2, D = 2
    >>> import numpy as np
    >>> X, Y = np.array([[[1.0], [2.0]]]), np.array([[[10.0], [20.0]]])
    >>> y, cache = position2d_forward(np.zeros((1, 4, 2)), X, Y)
    >>> y.tolist()
    [[[1.0, 10.0], [2.0, 10.0], [1.0, 20.0], [2.0, 20.0]]]
    >>> dz, dX, dY = position2d_backward(np.array([[[1.0, 1.0], [2.0, 2.0], [4.0, 4.0], [8.0, 8.0]]]), cache)
    >>> dX.ravel().tolist(), dY.ravel().tolist()          # columns: 1 + 4, 2 + 8; rows: 1 + 2, 4 + 8
    ([5.0, 10.0], [3.0, 12.0])
"""

from typing import NamedTuple

from minivit.base.backend import accelerated


class Position2dCache(NamedTuple):
    """What `position2d_backward` reads."""

    grid_size: int  # g


@accelerated
def position2d_forward(z, X, Y):
    """Add the embedding of column and row to the patches, the last g * g tokens.

    Math    z'_ac = z_ac + [x_c, y_a]
    Shapes  z (B, N, D), X, Y (1, g, D/2)  ->  z' (B, N, D)
    Cache   g
    Source  arXiv:2010.11929, appendix D.4
    """
    g, half = X.shape[1:]
    z = z.copy()
    grid = z[:, -g * g :].reshape(len(z), g, g, 2 * half)  # (B, rows, columns, D), a view
    grid[..., :half] += X[:, None]
    grid[..., half:] += Y[:, :, None]
    return z, Position2dCache(g)


@accelerated
def position2d_backward(dz, cache):
    """Backward of `position2d_forward`.

    Math    dz = dz';  dx_c = sum_b sum_a dz'_bac[first half];  dy_a = sum_b sum_c dz'_bac[second half]
    Shapes  dz (B, N, D)  ->  dz (B, N, D), itself, dX, dY (1, g, D/2)
    """
    g, D = cache.grid_size, dz.shape[-1]
    # z'_ac = z_ac + [x_c, y_a], X broadcast over images and rows, Y over images and columns
    dgrid = dz[:, -g * g :].sum(axis=0).reshape(1, g, g, D)
    dX = dgrid[..., : D // 2].sum(axis=1)  # (1, g, D/2)
    dY = dgrid[..., D // 2 :].sum(axis=2)
    return dz, dX, dY
