r"""A position embedding that is added to the tokens before a block (appendix D.4 of the ViT paper).

Forward
    `patch_embed` adds E_pos once, to what enters the first block. The paper also tried to add one at the beginning of
    each block, its own or the same for all of them; registers, which have no position, are left out:

        z' = z + [e_class; 0; ...; 0; e_1; ...; e_N],      a row of zeros for each register.

Backward
    E_pos is broadcast over the batch, hence its gradient is a sum over it; z' = z + ... passes dz on unchanged. Where
    several blocks share one embedding its gradient is the sum of theirs, which the model adds up.
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

    Math    dE_pos = sum_B dz, without the rows of the registers
    Shapes  dz (B, N, D)  ->  dz (B, N, D), itself, dpos_embed (1, N - registers, D)
    """
    # z' = z + E_pos, the embedding broadcast over the batch
    dpos_embed = dz.sum(axis=0, keepdims=True)  # (1, N, D)
    if cache.registers:
        at, end = cache.at, cache.at + cache.registers
        dpos_embed = array_module(dz).concatenate([dpos_embed[:, :at], dpos_embed[:, end:]], axis=1)
    return dz, dpos_embed
