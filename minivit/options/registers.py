r"""Registers: learned tokens that stand for no part of the picture (Darcet et al. 2023, arXiv:2309.16588).

Forward
    Trained transformers use tokens of dull patches as scratch paper, which spoils their features. R tokens of their
    own, the same for every picture and with no position, are put behind the class token (or, without one, in front):

        z_0 = [x_class; r_1; ...; r_R; x_p^1; ...; x_p^N],      each patch and x_class with its position already.

    They ask and answer in every block like the others; the head reads none of them.

Backward
    Each row of the result is a row of z or a register, so that gradients move back to where the rows came from. The
    registers were broadcast over the batch, hence their gradient is a sum over it:

        dz = [dz_0 without the rows of the registers],      dr = sum_B (dz_0 in these rows).
"""

from typing import NamedTuple

from minivit.base.backend import array_module


class RegistersCache(NamedTuple):
    """What `registers_backward` reads: nothing but where the registers are."""

    at: int  # rows before them
    count: int  # R


def registers_forward(z, reg_token, *, at):
    """Insert the registers after the first ``at`` tokens.

    Math    z' = [z_1; ...; z_at; r_1; ...; r_R; z_{at+1}; ...; z_N]
    Shapes  z (B, N, D), reg_token (1, R, D)  ->  z' (B, N + R, D)
    Cache   at, R
    Source  arXiv:2309.16588
    """
    xp = array_module(z)
    registers = xp.broadcast_to(reg_token, (len(z), *reg_token.shape[1:]))  # (B, R, D)
    z = xp.concatenate([z[:, :at], registers, z[:, at:]], axis=1)  # (B, N + R, D)
    return z, RegistersCache(at, reg_token.shape[1])


def registers_backward(dz, cache):
    """Backward of `registers_forward`.

    Math    dreg_token = sum_B dz[:, at : at + R];  dz the other rows
    Shapes  dz (B, N + R, D)  ->  dz (B, N, D), dreg_token (1, R, D)
    """
    at, end = cache.at, cache.at + cache.count
    # z = concatenate([z[:, :at], registers, z[:, at:]]), the registers broadcast over the batch
    dreg_token = dz[:, at:end].sum(axis=0, keepdims=True)  # (1, R, D)
    dz = array_module(dz).concatenate([dz[:, :at], dz[:, end:]], axis=1)  # (B, N, D)
    return dz, dreg_token


def registers_jvp(zdot, reg_tokendot, cache):
    """Forward-mode derivative of `registers_forward`: linear in both, so the same map of the tangents.

    Math    zdot' = [zdot_1; ...; rdot_1; ...; rdot_R; ...; zdot_N]
    Shapes  zdot (B, N, D), reg_tokendot (1, R, D)  ->  zdot' (B, N + R, D)
    """
    return registers_forward(zdot, reg_tokendot, at=cache.at)[0]
