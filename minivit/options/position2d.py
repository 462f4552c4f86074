r"""A position embedding of rows and columns (appendix D.4 of the ViT paper).

Forward
    Patches lie in a grid of g rows and g columns. Two tables are learned, one for each axis, of half the width each;
    the patch in row a and column b gets the X-embedding of its column beside the Y-embedding of its row:

        z'_{ab} = z_{ab} + [x_b, y_a],      x_b, y_a in R^(D/2).

    g + g vectors of D/2 numbers stand for the g g vectors of D of `patch_embed`. Tokens in front of the patches, the
    class token and registers, lie in no row and no column and get nothing; the class token is learned itself.

Backward
    x_b was added to every patch of column b, y_a to every patch of row a, in every image:

        dx_b = sum_B sum_a (dz_{ab})_{first half},      dy_a = sum_B sum_b (dz_{ab})_{second half}.
"""

from typing import NamedTuple

from minivit.base.backend import accelerated


class Position2dCache(NamedTuple):
    """What `position2d_backward` reads."""

    grid_size: int  # g


@accelerated
def position2d_forward(z, X, Y):
    """Add the embedding of column and row to the patches, the last g g tokens.

    Math    z'_{ab} = z_{ab} + [x_b, y_a]
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

    Math    dX = sum over images and rows;  dY = sum over images and columns
    Shapes  dz (B, N, D)  ->  dz (B, N, D), itself, dX, dY (1, g, D/2)
    """
    g, D = cache.grid_size, dz.shape[-1]
    # z' = z + [X, Y], X broadcast over images and rows, Y over images and columns
    dgrid = dz[:, -g * g :].sum(axis=0).reshape(1, g, g, D)
    dX = dgrid[..., : D // 2].sum(axis=1)  # (1, g, D/2)
    dY = dgrid[..., D // 2 :].sum(axis=2)
    return dz, dX, dY
