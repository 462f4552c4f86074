r"""Registers: learned tokens that stand for no part of the image (Darcet et al. 2023, arXiv:2309.16588).

Forward
    Trained transformers store numbers of their own in the tokens of patches that show little, such as plain background,
    which spoils the features of these patches. R tokens, the same for every image and with no position, are given to
    them for it. They are put behind the class token (or, without one, in front):

        z_0 = [x_class; r_1; ...; r_R; x_p^1; ...; x_p^N],      each patch and x_class with its position already

    They have queries, keys and values in every block like the others; the head reads none of them.

Backward, dz_0 is given
    Each row of the result is a row of z or a register, so that its gradient goes back to where the row came from. Every
    image has the same registers, hence their gradient is a sum over the images b:

        dz = [dz_0 without the rows of the registers]           dr_i = sum_b (dz_0 in the row of r_i)

Example: two images of a class token and a patch, D = 1; one register
    >>> import numpy as np
    >>> z, register = np.array([[[1.0], [2.0]], [[3.0], [4.0]]]), np.array([[[9.0]]])
    >>> y, cache = registers_forward(z, register, at=1)
    >>> y[..., 0].tolist()
    [[1.0, 9.0, 2.0], [3.0, 9.0, 4.0]]
    >>> dz, dregister = registers_backward(np.array([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]]), cache)
    >>> dz[..., 0].tolist(), dregister.tolist()           # 2 + 5
    ([[1.0, 3.0], [4.0, 6.0]], [[[7.0]]])
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from minivit.base.backend import accelerated, array_module
from minivit.base.pairs import Pair, as_part, chain_parts
from minivit.base.params import ParameterSpec, normal
from minivit.base.settings import check_range, setting
from minivit.options.option import Option


class RegistersCache(NamedTuple):
    """What `registers_backward` reads: nothing but where the registers are."""

    at: int  # rows before them
    count: int  # R


@accelerated
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


@accelerated
def registers_backward(dz, cache):
    """Backward of `registers_forward`.

    Math    dreg_token = sum_b dz'_b in the rows at, ..., at + R - 1;  dz = dz' in the other rows
    Shapes  dz (B, N + R, D)  ->  dz (B, N, D), dreg_token (1, R, D)
    """
    at, end = cache.at, cache.at + cache.count
    # z' = concatenate([z[:, :at], registers, z[:, at:]]), the registers broadcast over the batch
    dreg_token = dz[:, at:end].sum(axis=0, keepdims=True)  # (1, R, D)
    dz = array_module(dz).concatenate([dz[:, :at], dz[:, end:]], axis=1)  # (B, N, D)
    return dz, dreg_token


@dataclass(frozen=True)
class Settings:
    """Fields of the configuration."""

    registers: int = setting(0, "learned tokens beside the class token that the head does not read; 0 for none")


def check(config):
    """Raises InputError for a negative number."""
    check_range(config, 0, None, "registers")


def rows(config):
    """The tokens, nearly zero at first, as their authors and timm have it."""
    if not config.registers:
        return {}
    return {"tokens": [ParameterSpec("reg_token", (1, config.registers, config.width), normal(1e-6), False)]}


def embedding(embed, config, place):
    """The tokens with registers behind the class token, or in front where there is none."""
    if not config.registers:
        return embed
    forward = partial(registers_forward, at=config.class_tokens)
    return chain_parts(embed, as_part(Pair(forward, registers_backward, ("reg_token",))), second_name="registers")


OPTION = Option(Settings, check, rows, embedding=embedding)
