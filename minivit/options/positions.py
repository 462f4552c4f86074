r"""Where a token is: other position embeddings than the paper's learned table (its appendix D.4), and none.

    ``pos_embed``
    learned      a vector for each token, as in Eq. 1
    learned2d    a half vector for each row and one for each column (`minivit.options.position2d`)
    sincos2d     a fixed table of sines and cosines (below)
    relative     offsets, in the attention (`minivit.options.relative_attention`)
    none         nothing is added

    ``pos_at``
    input        added once, to what enters the first block (Eq. 1)
    every        added to the input of every block, to each its own (`minivit.options.position`)
    shared       added to the input of every block, to all the same; its gradient is the sum of theirs

In every case Eq. 1 adds a table: where nothing is added, it is zero and nothing learns it.

Sines and cosines
    The token in row r and column c gets, for D/4 frequencies w_i from 1 down to 1/10000,

        e_rc = [sin(c * w), cos(c * w), sin(r * w), cos(r * w)]

    Nothing of it is learned, so that it has no backward. Why sines and cosines: by
    cos(a - b) = cos(a) * cos(b) + sin(a) * sin(b) the product of two tokens' embeddings

        e_rc @ e_r'c'^T = sum_i cos((c - c') * w_i) + sum_i cos((r - r') * w_i)

    depends on how far apart they are, and not on where they are.

Example: a grid of 2 x 2 tokens, D = 4, so that there is one frequency, 1
    >>> table = sincos2d(2, 4)[0]
    >>> table.round(4).tolist()
    [[0.0, 1.0, 0.0, 1.0], [0.8415, 0.5403, 0.0, 1.0], [0.0, 1.0, 0.8415, 0.5403], [0.8415, 0.5403, 0.8415, 0.5403]]
    >>> (table @ table[0]).round(4).tolist()              # 2, 1 + cos(1) for both neighbours, 2 * cos(1)
    [2.0, 1.5403, 1.5403, 1.0806]
"""

from dataclasses import dataclass
from functools import partial

import numpy as np

from minivit.base.backend import array_module
from minivit.base.errors import InputError
from minivit.base.pairs import Pair, as_part, chain_parts
from minivit.base.params import ParameterSpec, normal
from minivit.base.settings import check_choice, setting
from minivit.options.option import Option
from minivit.options.position import position_backward, position_forward
from minivit.options.position2d import position2d_backward, position2d_forward

PLACES = ("input", "every", "shared")
AXES = ("pos_embed_x", "pos_embed_y")


def sincos2d(grid_size, width, *, prefix_tokens=0, temperature=10000.0):
    """The fixed two-dimensional sine-cosine position embedding.

    Math    for the token in row r and column c, and D/4 frequencies w_i = temperature^(-i / (D/4 - 1)):
            [sin(c * w), cos(c * w), sin(r * w), cos(r * w)]; prefix tokens (the class token) get zeros
    Shapes  ->  (1, prefix_tokens + grid_size^2, width), float64
    Source  Beyer, Zhai & Kolesnikov 2022, arXiv:2205.01580.
    Raises  ValueError: width is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"a 2-D sine-cosine embedding needs a width that is a multiple of 4, got {width}")
    w = temperature ** -np.linspace(0.0, 1.0, width // 4)  # (D/4,)
    row, column = np.indices((grid_size, grid_size)).reshape(2, -1, 1) * w  # (N, D/4) each
    grid = np.concatenate([np.sin(column), np.cos(column), np.sin(row), np.cos(row)], axis=1)  # (N, D)
    return np.concatenate([np.zeros((prefix_tokens, width)), grid])[None]


@dataclass(frozen=True)
class Settings:
    """Fields of the configuration."""

    pos_embed: str = setting(
        "learned",
        'positions: "learned", "learned2d" (of rows and columns), "sincos2d", "relative" (in the attention) or "none"',
    )
    pos_at: str = setting(
        "input",
        'where positions are added: "input", "every" (each block its own) or "shared" (each block the same)',
    )


def check(config):
    """Raises InputError where positions do not fit the width or cannot be where they are wanted."""
    check_choice(config, "pos_at", PLACES)
    if config.pos_embed == "sincos2d" and config.width % 4:
        raise InputError(f'pos_embed "sincos2d" needs a width that is a multiple of 4, got {config.width}')
    if config.pos_embed == "learned2d" and config.width % 2:
        raise InputError(f'pos_embed "learned2d" halves the width, which must be even, got {config.width}')


def names(config):
    """The names of the parameters that are added to tokens, without a place: none, one or two."""
    return {"learned": ("pos_embed",), "learned2d": AXES}.get(config.pos_embed, ())


def rows(config):
    """One table, or that of rows and that of columns, in the model or in every block."""
    shapes = {"learned": (1, config.num_tokens - config.registers, config.width)}
    shape = shapes.get(config.pos_embed, (1, config.grid_size, config.width // 2))
    specs = [ParameterSpec(name, shape, normal(0.02), False) for name in names(config)]
    return {"block" if config.pos_at == "every" else "positions": specs}


def constants(config):
    """What nothing learns: the empty class token of a model without one, and the table of Eq. 1 if it is fixed."""
    c, fixed = config, {}
    if not c.class_tokens:
        fixed["cls_token"] = np.zeros((1, 0, c.width))
    if c.pos_embed == "sincos2d":
        fixed["pos_embed"] = sincos2d(c.grid_size, c.width, prefix_tokens=c.class_tokens)
    elif c.pos_embed != "learned" or c.pos_at == "every":
        fixed["pos_embed"] = np.zeros((1, c.num_tokens - c.registers, c.width))
    return fixed


def pooled_to_half(config, table):
    """The fixed positions of images of half the height and width: the mean over the four patches that one stands for.

    Shapes  table (1, N, D)  ->  (1, N', D)
    Raises  InputError: positions are learned, or the patches of a side cannot be halved.
    """
    c = config
    if c.pos_embed not in ("sincos2d", "none"):
        raise InputError('images of half the size need fixed positions: pos_embed "sincos2d" or "none"')
    if c.grid_size % 2:
        raise InputError(f"images of half the size need an even number of patches on a side, not {c.grid_size}")
    g, prefix = c.grid_size, table[:, : c.class_tokens]
    grid = table[:, -g * g :].reshape(g // 2, 2, g // 2, 2, c.width).mean(axis=(1, 3))
    return array_module(table).concatenate([prefix, grid.reshape(1, -1, c.width)], axis=1)


def _axes(prefix):
    return as_part(Pair(position2d_forward, position2d_backward, tuple(prefix + name for name in AXES)))


def embedding(embed, config, place):
    """What Eq. 1 does not add by itself: rows and columns, or the table that the first block has for its own."""
    own = "blocks.0." if config.pos_at == "every" else ""
    if config.pos_embed == "learned2d":
        return chain_parts(embed, _axes(own), second_name="position2d")
    if config.pos_embed == "learned" and own:
        table = _table(f"{own}pos_embed", config, registers=0)  # registers come later
        return chain_parts(embed, table, second_name="position")
    return embed


def _table(name, config, *, registers):
    forward = partial(position_forward, at=config.class_tokens, registers=registers)
    return as_part(Pair(forward, position_backward, (name,)))


def block(inner, config, place):
    """Positions added to the input of a block; the first has those of the embedding."""
    c = config
    if c.pos_at == "input" or place.block == 0:
        return inner
    shared = "/" if c.pos_at == "shared" else ""
    if c.pos_embed == "learned2d":
        return chain_parts(_axes(shared), inner, first_name="position2d")
    if c.pos_embed in ("learned", "sincos2d"):
        return chain_parts(_table(f"{shared}pos_embed", c, registers=c.registers), inner, first_name="position")
    return inner


OPTION = Option(
    Settings, check, rows, block=block, embedding=embedding, constants=constants,
    positions={
        "learned": PLACES, "learned2d": PLACES, "sincos2d": ("input", "shared"), "none": ("input",),
    },
)  # fmt: skip
