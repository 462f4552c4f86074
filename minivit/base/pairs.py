"""How layers are put together: a forward and its backward as one value, one pair after another, parameters by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Pair(NamedTuple):
    """A forward and its backward, chosen once, when a model is made.

    ``names`` are those of the parameters that both of them count with, in the order of the forward's arguments;
    ``about`` says what the pair consists of, for kernels that compute many layers at once: one that misses a word that
    it needs, or meets one that it does not know, leaves the work to others. A pair that says nothing is therefore never
    taken for another one.
    """

    forward: Callable  # (x, *parameters, **settings) -> y, cache
    backward: Callable  # (dy, cache) -> dx, *dparameters;  dx alone where there are no parameters
    names: tuple[str, ...] = ()
    about: dict = {}  # noqa: RUF012  nobody writes to it


def gradients(result):
    """What a backward returned as a tuple, also where it was dx alone.

    Shapes  dx, or (dx, *dparameters)  ->  (dx, *dparameters)
    """
    return result if type(result) is tuple else (result,)


class ChainCache(NamedTuple):
    """What the backward of a `chain` reads: the caches of both pairs."""

    first: Any
    second: Any
    name: str  # what the second pair is called


def chain(first, second, name):
    """One pair after another: y = second(first(x)). Settings go to the first.

    Math    dx = J_first^T J_second^T dy
    """
    count = len(first.names)

    def forward(x, *parameters, **settings):
        u, first_cache = first.forward(x, *parameters[:count], **settings)
        y, second_cache = second.forward(u, *parameters[count:])
        return y, ChainCache(first_cache, second_cache, name)

    def backward(dy, cache):
        # y = second(u)
        du, *dsecond = gradients(second.backward(dy, cache.second))
        # u = first(x)
        dx, *dfirst = gradients(first.backward(du, cache.first))
        return (dx, *dfirst, *dsecond) if dfirst or dsecond else dx

    return Pair(forward, backward, first.names + second.names, first.about | (second.about or {name: "unknown"}))


class FollowCache(NamedTuple):
    """What the backward of `follow` reads: the caches of both steps."""

    first: Any
    second: Any
    first_name: str  # what each is called; "" for the one that goes by the name of both
    second_name: str


class Step(NamedTuple):
    """A part of a model that takes its parameters by name: the embedding, a block, the head."""

    forward: Callable  # (x, params) -> y, cache
    backward: Callable  # (dy, cache, grads) -> dx; the gradients of the parameters are added into ``grads``
    names: tuple[str, ...]


def step(pair):
    """A pair as a `Step`: parameters come from a mapping, gradients are added into one.

    What ``grads`` does not hold, such as a position that is fixed, gets no gradient.
    """

    def forward(x, params):
        return pair.forward(x, *[params[name] for name in pair.names])

    def backward(dy, cache, grads):
        dx, *dparameters = gradients(pair.backward(dy, cache))
        add_gradients(grads, pair.names, dparameters)
        return dx

    return Step(forward, backward, pair.names)


def add_gradients(grads, names, dparameters):
    """Add each gradient into the entry of its name, where ``grads`` has one."""
    for name, gradient in zip(names, dparameters, strict=True):
        if name in grads:
            grads[name] += gradient


def follow(first, second, *, first_name="", second_name=""):
    """One step after another: y = second(first(x)); a name is given to the one that is added to the other."""

    def forward(x, params):
        u, first_cache = first.forward(x, params)
        y, second_cache = second.forward(u, params)
        return y, FollowCache(first_cache, second_cache, first_name, second_name)

    def backward(dy, cache, grads):
        # y = second(u)
        du = second.backward(dy, cache.second, grads)
        # u = first(x)
        return first.backward(du, cache.first, grads)

    return Step(forward, backward, first.names + second.names)
