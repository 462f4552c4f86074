r"""A position embedding that is added to the tokens before a block (appendix D.4 of the ViT paper).

Forward
    `minivit.layers.patch_embed` adds E_pos once, to what enters the first block. The paper also tried to add one at the
    beginning of each block, its own or the same for all of them. With e_i for its rows, one for each token, every image
    b of the batch gets the same ones:

        z'_bi = z_bi + e_i          and z'_bi = z_bi for a register i, which has no position

Backward, dz' is given
    A sum hands its gradient to both of its terms. z passes it on unchanged; e_i was added in every image, hence its
    gradient is a sum over them:

        dz_bi = dz'_bi              de_i = sum_b dz'_bi

    Where several blocks share one embedding, its gradient is the sum of theirs, which the model adds up.

Example: two images of a class token, a register and a patch, D = 1
    >>> import numpy as np
    >>> z, E_pos = np.array([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]]), np.array([[[10.0], [20.0]]])
    >>> y, cache = position_forward(z, E_pos, at=1, registers=1)
    >>> y[..., 0].tolist()
    [[11.0, 2.0, 23.0], [14.0, 5.0, 26.0]]
    >>> dz, dE_pos = position_backward(z, cache)
    >>> dE_pos[..., 0].tolist()                           # 1 + 4, 3 + 6
    [[5.0, 9.0]]
"""

from typing import NamedTuple

from minivit.base.backend import accelerated, array_module


class PositionCache(NamedTuple):
    """What `position_backward` reads: where the registers are."""

    at: int  # rows before them
    registers: int


@accelerated
def position_forward(z, pos_embed, *, at, registers):
    """Add the embedding to all tokens but the registers, which follow the first ``at`` of them.

    Math    z' = z + E_pos
    Shapes  z (B, N, D), pos_embed (1, N - registers, D)  ->  z' (B, N, D)
    Cache   at, registers
    Source  arXiv:2010.11929, appendix D.4
    """
    cache = PositionCache(at, registers)
    if not registers:
        return z + pos_embed, cache
    z = z.copy()
    z[:, :at] += pos_embed[:, :at]
    z[:, at + registers :] += pos_embed[:, at:]
    return z, cache


@accelerated
def position_backward(dz, cache):
    """Backward of `position_forward`.

    Math    dz = dz';  dE_pos = sum_b dz'_b, without the rows of the registers
    Shapes  dz (B, N, D)  ->  dz (B, N, D), itself, dpos_embed (1, N - registers, D)
    """
    # z' = z + E_pos, the embedding broadcast over the batch
    dpos_embed = dz.sum(axis=0, keepdims=True)  # (1, N, D)
    if cache.registers:
        at, end = cache.at, cache.at + cache.registers
        dpos_embed = array_module(dz).concatenate([dpos_embed[:, :at], dpos_embed[:, end:]], axis=1)
    return dz, dpos_embed
