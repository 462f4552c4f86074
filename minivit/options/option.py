"""What an option of the model is: settings, parameters, and a wrap around a pair of the plain Vision Transformer.

An option lives in a file of its own. That file holds its derivation, its forward and backward, and an `Option`, which
`minivit.model.compose` lists: the model, its table of parameters, its flags and its checks read the list, and no other
file learns of the option.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Place(NamedTuple):
    """Where a pair stands that an option may wrap."""

    block: int = 0  # number of the block, from 0
    branch: int = 0  # of the block: 1 the attention, 2 the MLP
    rng: Any = None  # what training draws from; None where nothing is dropped
    reads: int | None = None  # how many tokens of the block's result are read, from the first on; None for all


def no_check(config):
    """Nothing can be wrong."""


def no_rows(config):
    """No parameters."""
    return {}


class Option(NamedTuple):
    """One option. A wrap takes what stands there, the configuration and the `Place`, and returns what shall stand.

    ``rows`` maps a place of the parameter table to `ParameterSpec` rows: "tokens", "positions" and "stem" before the
    patch embedding; "block", "attention", "branch1", "mlp" (in place of the MLP's) and "branch2" in every block, where
    names are without "blocks.i."; "pooling" and "features" before the head.
    """

    settings: type  # a dataclass of the fields that it adds to the configuration
    check: Callable = no_check  # (config); raises InputError
    rows: Callable = no_rows  # (config) -> {place: rows}
    attend: Callable | None = None  # wraps the attention of the heads, a Pair
    activation: Callable | None = None  # ... the GELU of the MLP, a Pair
    mlp: Callable | None = None  # ... the MLP, a Pair
    branch: Callable | None = None  # ... each branch of a block, a Pair
    block: Callable | None = None  # ... a block, a Part
    embedding: Callable | None = None  # ... images to tokens, a Part
    head: Callable | None = None  # ... tokens to logits, a Part
    constants: Callable | None = None  # (config) -> {name: array}: what parts take by name and nothing learns
    positions: dict = {}  # noqa: RUF012  values of ``pos_embed`` that it adds, and where each can be
