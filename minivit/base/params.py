"""Parameters: a table of names, shapes, initialisers and decay flags; one flat buffer; named views into it.

An optimiser sees one vector, a layer sees named arrays, and both are the same memory. The table alone (no
buffer) answers "how many parameters?", so the largest models can be counted without being allocated.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np

from minivit.base.errors import InputError


class ParameterSpec(NamedTuple):
    """One row of the table."""

    name: str
    shape: tuple[int, ...]
    init: Callable  # init(rng, shape) -> float64 array
    decay: bool  # does weight decay apply?

    @property
    def size(self):
        return math.prod(self.shape)


def zeros(rng, shape):
    """All 0."""
    return np.zeros(shape)


def ones(rng, shape):
    """All 1."""
    return np.ones(shape)


def constant(value):
    """All the same."""
    return lambda rng, shape: np.full(shape, value)


def normal(std):
    """N(0, std^2)."""
    return lambda rng, shape: std * rng.standard_normal(shape)


def xavier_uniform(fan_in, fan_out):
    """U(-a, a), a = sqrt(6 / (fan_in + fan_out)) (Glorot & Bengio 2010)."""
    limit = math.sqrt(6.0 / (fan_in + fan_out))
    return lambda rng, shape: rng.uniform(-limit, limit, shape)


def lecun_normal(fan_in):
    """A normal cut at two standard deviations, of variance 1 / fan_in after the cut (Flax's default)."""
    std = math.sqrt(1.0 / fan_in) / 0.87962566103423978  # the cut shrinks a unit normal to this standard deviation

    def init(rng, shape):
        z = rng.standard_normal(shape)
        while (outside := np.abs(z) > 2.0).any():
            z[outside] = rng.standard_normal(np.count_nonzero(outside))
        return std * z

    return init


def layernorm(name, size):
    """The rows of a LayerNorm: weight and bias."""
    return [ParameterSpec(f"{name}.weight", (size,), ones, False), ParameterSpec(f"{name}.bias", (size,), zeros, False)]


def dense(name, n_in, n_out, init, bias_init=zeros):
    """The rows of a linear map: weight and bias; the weight decays."""
    return [
        ParameterSpec(f"{name}.weight", (n_in, n_out), init, True),
        ParameterSpec(f"{name}.bias", (n_out,), bias_init, False),
    ]


class Named(dict):
    """Arrays by name; `renamed` gives some of them by other names, and makes that mapping once."""

    def renamed(self, key, names):
        """{short: self[full]} for each ``short: full`` of the names; the same mapping whenever the key is the same."""
        parts = self.__dict__
        if key not in parts:
            parts[key] = {short: self[full] for short, full in names.items() if full in self}
        return parts[key]


def count(table):
    """Number of parameters of a table."""
    return sum(spec.size for spec in table)


def views(flat, table):
    """Named views into a flat buffer, in the order of the table.

    Shapes  flat (n,)  ->  {name: array of the table's shape}
    Raises  ValueError: the buffer's length is not the table's count.
    """
    if flat.shape != (count(table),):
        raise ValueError(f"the flat buffer has shape {flat.shape}, the parameter table needs ({count(table)},)")
    named, start = Named(), 0
    for spec in table:
        named[spec.name] = flat[start : start + spec.size].reshape(spec.shape)
        start += spec.size
    return named


def initialise(table, *, seed=0, dtype=np.float32):
    """A new flat buffer with every parameter initialised.

    Each parameter draws from its own stream, seeded by the seed and its name, so that adding a layer changes
    no other one.
    """
    flat = np.empty(count(table), dtype)
    for spec, view in zip(table, views(flat, table).values(), strict=True):
        view[...] = spec.init(np.random.default_rng([seed, zlib.crc32(spec.name.encode())]), spec.shape)
    return flat


def decay_mask(table, dtype=np.float32):
    """A flat buffer of ones where weight decay applies and zeros elsewhere."""
    mask = np.empty(count(table), dtype)
    for spec, view in zip(table, views(mask, table).values(), strict=True):
        view[...] = spec.decay
    return mask


def frozen_names(table, patterns):
    """The names of the parameters that a list of patterns means, in the order of the table.

    ``patterns`` are separated by commas, with ``*``, ``?`` and ``[0-3]`` as in file names. One that begins with ``!``
    takes names away that those before it took: "*,!head.*" is everything but the head.

    Raises  InputError: a pattern fits no name, or no parameter would be left to train.
    """
    taken = {}
    for pattern in (pattern.strip() for pattern in patterns.split(",")):
        fits = [spec.name for spec in table if fnmatchcase(spec.name, pattern.removeprefix("!"))]
        if not fits:
            known = ", ".join(spec.name for spec in table[:4])
            raise InputError(f"freeze {patterns!r}: no parameter is called {pattern!r}; names are such as {known}")
        taken |= dict.fromkeys(fits, not pattern.startswith("!"))
    names = [spec.name for spec in table if taken.get(spec.name)]
    if len(names) == len(table):
        raise InputError(f"freeze {patterns!r} leaves nothing to train; except the head with '*,!head.*'")
    return names


def freeze(table, names):
    """The table with no weight decay for the named parameters, and a flat buffer: 0 for their entries, 1 for others."""
    trained = np.empty(count(table), np.float32)
    for spec, view in zip(table, views(trained, table).values(), strict=True):
        view[...] = spec.name not in names
    return tuple(spec._replace(decay=spec.decay and spec.name not in names) for spec in table), trained


def layer_scale(table, decay, dtype=np.float32):
    """A flat buffer of learning-rate factors that fall from the head to the embedding (Clark et al. 2020, 2003.10555).

    Math    decay^(L + 1 - l), with l = 0 for what comes before the blocks, i + 1 for block i, L + 1 for what follows
    """
    depth = 1 + max((int(spec.name.split(".")[1]) for spec in table if spec.name.startswith("blocks.")), default=-1)
    before, scale = True, np.empty(count(table), dtype)
    for spec, view in zip(table, views(scale, table).values(), strict=True):
        in_block = spec.name.startswith("blocks.")
        before = before and not in_block
        layer = int(spec.name.split(".")[1]) + 1 if in_block else 0 if before else depth + 1
        view[...] = decay ** (depth + 1 - layer)
    return scale
