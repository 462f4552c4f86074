"""Dropout and stochastic depth in a model: where the official code and its successors put them.

The layers are `minivit.layers.dropout` and `minivit.layers.drop_path`; both need a Generator, and without one, as in
evaluation, a model is composed without them. Dropout follows the embedding, the output projection of the MSA, and both
linear maps of the MLP. Stochastic depth drops a whole branch just before it is added, at a rate that rises linearly
from 0 in the first block to the setting in the last.
"""

from dataclasses import dataclass
from functools import partial

from minivit.base.pairs import Pair, as_part, chain, chain_parts
from minivit.base.settings import check_range, setting
from minivit.layers.drop_path import drop_path_backward, drop_path_forward
from minivit.layers.dropout import dropout_backward, dropout_forward
from minivit.options.option import Option


@dataclass(frozen=True)
class DropoutSettings:
    """Fields of the configuration."""

    dropout: float = setting(0.0, "dropout rate after the embedding, the MSA projection and both MLP layers")


@dataclass(frozen=True)
class DropPathSettings:
    """Fields of the configuration."""

    drop_path: float = setting(0.0, "stochastic depth: drop rate of the last block, rising linearly from 0")


def check_dropout(config):
    """Raises InputError unless the rate lies in [0, 1)."""
    check_range(config, 0.0, 1.0, "dropout", open_high=True)


def check_drop_path(config):
    """Raises InputError unless the rate lies in [0, 1)."""
    check_range(config, 0.0, 1.0, "drop_path", open_high=True)


def drop_path_rate(config, block):
    """The drop rate of a block: from 0 in the first to the setting in the last."""
    return config.drop_path * (block / (config.depth - 1) if config.depth > 1 else 1.0)


def _dropout(config, place):
    """Dropout as a Pair, or None where nothing is dropped."""
    if place.rng is None or config.dropout == 0.0:
        return None
    forward = partial(dropout_forward, rate=config.dropout, rng=place.rng)
    return Pair(forward, dropout_backward, about={"dropout": config.dropout})


def after(pair, config, place):
    """Dropout after an activation or a branch."""
    drop = _dropout(config, place)
    return pair if drop is None else chain(pair, drop, "dropout")


def after_embedding(embedding, config, place):
    """Dropout of the tokens."""
    drop = _dropout(config, place)
    return embedding if drop is None else chain_parts(embedding, as_part(drop), second_name="dropout")


def after_branch(pair, config, place):
    """Stochastic depth of a branch."""
    rate = drop_path_rate(config, place.block)
    if place.rng is None or rate == 0.0:
        return pair
    forward = partial(drop_path_forward, rate=rate, rng=place.rng)
    return chain(pair, Pair(forward, drop_path_backward, about={"drop_path": (rate, place.rng)}), "drop_path")


DROPOUT = Option(DropoutSettings, check_dropout, activation=after, branch=after, embedding=after_embedding)
DROP_PATH = Option(DropPathSettings, check_drop_path, branch=after_branch)
