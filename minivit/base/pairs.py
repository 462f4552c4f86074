"""How layers are put together: a forward and its backward as one value, one pair after another, parameters by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Pair(NamedTuple):
    """A forward and its backward, chosen once, when a model is made.

    ``names`` are the names of its parameters in the model, in the order of the forward's arguments.

    ``about`` says what the pair computes, for twins that compute many layers at once: {"attention": "plain"} is the
    attention of the paper, {"gelu": "tanh"} its GELU. A twin takes a pair only if it knows every entry and finds all
    that it needs; so a pair that says nothing is never replaced.
    """

    forward: Callable  # (x, *parameters, **settings) -> y, cache;  (q, k, v, *parameters) of an attention
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
    name: str  # what traces call the second pair


def chain(first, second, name):
    """Two pairs as one: y = second(first(x)). Settings go to the first; ``name`` is what traces call the second.

    Math    u = first(x), y = second(u);  du = second's backward of dy, dx = first's backward of du
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
    """What the backward of `chain_parts` reads: the caches of both parts."""

    first: Any
    second: Any
    first_name: str  # what each is called; "" for the one that goes by the name of both
    second_name: str


class Part(NamedTuple):
    """A part of a model, which takes its parameters by name: the embedding, a block, the head."""

    forward: Callable  # (x, params) -> y, cache
    backward: Callable  # (dy, cache, grads) -> dx; the gradients of the parameters are added into ``grads``
    names: tuple[str, ...]


def as_part(pair):
    """A pair as a `Part`: parameters are read from a mapping, gradients are added into one.

    What ``grads`` does not hold, such as a position that is fixed, gets no gradient.
    """

    def forward(x, params):
        return pair.forward(x, *[params[name] for name in pair.names])

    def backward(dy, cache, grads):
        dx, *dparameters = gradients(pair.backward(dy, cache))
        add_gradients(grads, pair.names, dparameters)
        return dx

    return Part(forward, backward, pair.names)


def add_gradients(grads, names, dparameters):
    """Add each gradient into the entry of its name, where ``grads`` has one."""
    for name, gradient in zip(names, dparameters, strict=True):
        if name in grads:
            grads[name] += gradient


def chain_parts(first, second, *, first_name="", second_name=""):
    """Two parts as one: y = second(first(x)).

    An option that adds a part gives it a name, for traces; the other one goes by the name that it had.
    """

    def forward(x, params):
        u, first_cache = first.forward(x, params)
        y, second_cache = second.forward(u, params)
        return y, FollowCache(first_cache, second_cache, first_name, second_name)

    def backward(dy, cache, grads):
        # y = second(u)
        du = second.backward(dy, cache.second, grads)
        # u = first(x)
        return first.backward(du, cache.first, grads)

    return Part(forward, backward, first.names + second.names)
