r"""Axial attention: rows and columns of the grid of patches as sequences of their own (appendix D.6 of the ViT paper;
Ho et al. 2019, arXiv:1912.12180).

Forward
    Attention of N = g * g patches makes N^2 scores. If a patch attends only to those in its own row, and in the next
    block to those in its own column, two blocks let each see all, for 2 * N * g scores. No new layer is needed: a block
    takes a batch of sequences and does not ask what they stand for. With the patches in rows a and columns b,

        a block of rows       takes (B, a, b, D) as B * g sequences of g tokens: a reshape
        a block of columns    takes (B, b, a, D), the transpose, as B * g sequences of g tokens

    and its result goes back the same way:

        s  = to_axis(z)           (B * g, g, D)
        t  = block(s)             (B * g, g, D)
        z' = from_axis(t)         (B, g * g, D)

    The MLP and LayerNorm work token by token and do not notice; stochastic depth drops a branch for a row or column at
    a time, where it would for an image.

    The paper's axial layer is two of these blocks: attention along rows and an MLP, attention along columns and an MLP.

Backward, the same lines from the last to the first; dz' is given
    to_axis moves every number to one place. As a matrix it is s = P @ z, with a single 1 in each row and each column of
    P: a permutation, for which P^T @ P = 1. The backward of a product with P is the product with P^T (see
    `minivit.layers.linear`), hence its inverse, which moves every number back. from_axis is P^T, with the backward P:

        z' = from_axis(t)     =>   dt = to_axis(dz')
        t  = block(s)         =>   ds is the block's own backward
        s  = to_axis(z)       =>   dz = from_axis(ds)

Example: a grid of 2 x 2 patches, one number each
    >>> import numpy as np
    >>> z = np.array([[[1.0], [2.0], [3.0], [4.0]]])      # the rows are [1, 2] and [3, 4]
    >>> to_axis(z, 2, columns=False)[..., 0].tolist()
    [[1.0, 2.0], [3.0, 4.0]]
    >>> columns = to_axis(z, 2, columns=True)
    >>> columns[..., 0].tolist()
    [[1.0, 3.0], [2.0, 4.0]]
    >>> from_axis(columns, 2, columns=True)[..., 0].tolist()
    [[1.0, 2.0, 3.0, 4.0]]
"""

from dataclasses import dataclass

from minivit.base.backend import array_module
from minivit.base.errors import InputError
from minivit.base.pairs import Part
from minivit.base.settings import check_choice, setting
from minivit.options.option import Option

ATTENTIONS = ("full", "axial")


def to_axis(z, grid_size, *, columns):
    """The tokens of each row of the grid, or of each column, as a sequence.

    Shapes  z (B, g * g, D)  ->  (B * g, g, D), contiguous; the sequences of an image follow each other
    """
    g, D = grid_size, z.shape[-1]
    grid = z.reshape(-1, g, g, D)  # (B, rows, columns, D)
    if columns:
        grid = grid.swapaxes(1, 2)  # (B, columns, rows, D)
    return array_module(z).ascontiguousarray(grid).reshape(-1, g, D)


def from_axis(sequences, grid_size, *, columns):
    """The sequences of `to_axis` as tokens again: its inverse, and its backward.

    Shapes  sequences (B * g, g, D)  ->  (B, g * g, D)
    """
    g, D = grid_size, sequences.shape[-1]
    grid = sequences.reshape(-1, g, g, D)
    if columns:
        grid = grid.swapaxes(1, 2)  # (B, rows, columns, D)
    return grid.reshape(-1, g * g, D)


def axial_map(maps, grid_size, *, columns):
    """The attention maps of all sequences as one map per image; nothing is attended to outside one's row or column.

    Shapes  maps (B * g, h, g, g)  ->  (B, h, g * g, g * g), zero between tokens of different sequences
    """
    g, h = grid_size, maps.shape[1]
    maps = maps.reshape(-1, g, h, g, g)
    full = array_module(maps).zeros((len(maps), h, g, g, g, g), maps.dtype)  # row and column of the query, of the key
    for s in range(g):
        if columns:
            full[:, :, :, s, :, s] = maps[:, s]
        else:
            full[:, :, s, :, s, :] = maps[:, s]
    return full.reshape(len(maps), h, g * g, g * g)


@dataclass(frozen=True)
class Settings:
    """Fields of the configuration."""

    attention: str = setting(
        "full", 'who attends to whom: "full", or "axial" (rows of the grid in one block, columns in the next)'
    )


def check(config):
    """Raises InputError where there are tokens that lie in no row."""
    check_choice(config, "attention", ATTENTIONS)
    if config.attention == "axial" and (config.class_tokens or config.registers):
        raise InputError(
            'attention "axial" is between patches alone: set pooling to "mean", "avg" or "seq", and registers to 0'
        )


def is_column_block(block):
    """Even blocks attend along rows, odd ones along columns."""
    return block % 2 == 1


def block(inner, config, place):
    """The block, along rows or columns."""
    if config.attention != "axial":
        return inner
    g, columns = config.grid_size, is_column_block(place.block)

    def forward(z, params):
        y, cache = inner.forward(to_axis(z, g, columns=columns), params)
        return from_axis(y, g, columns=columns), cache

    def backward(dz, cache, grads):
        # z' = from_axis(t), t = inner(s), s = to_axis(z)
        dy = inner.backward(to_axis(dz, g, columns=columns), cache, grads)
        return from_axis(dy, g, columns=columns)

    return Part(forward, backward, inner.names)


OPTION = Option(Settings, check, block=block)
