"""What the calls of layers and their tensors are called: read from caches, signatures and docstrings, not from a table.

A call is called by the field of its caller's cache under which its own cache is kept: the linear map whose cache is
``MSACache.qkv`` is ``qkv``. Tensors are called as a function's docstring and signature call them:

    Math    y = softmax(q @ k^T / sqrt(Dh)) @ v                        (Eq. 6-7)      the equation
    Shapes  q (..., Q, Dh), k, v (..., N, Dh)  ->  y (..., Q, Dh)                     a forward gives y
    Shapes  dy (..., Q, Dh)  ->  dq (..., Q, Dh), dk, dv (..., N, Dh)                 a backward gives dq, dk, dv
"""

from __future__ import annotations

import functools
import inspect
import re

from minivit.base.pairs import ChainCache, FollowCache

VALUES = (int, float, str, bool, type(None))  # of these, and of empty tuples, equal ones may be the same object
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def is_unique(cache):
    """Is it an object of its own, so that it can be told from others?"""
    return not isinstance(cache, VALUES) and not (isinstance(cache, tuple) and not cache)


def parts_of(cache):
    """Yield (name, part) for what a cache holds; a name is "" where the part goes by the name of the whole."""
    if isinstance(cache, ChainCache):
        yield "", cache.first
        yield cache.name, cache.second
    elif isinstance(cache, FollowCache):
        yield cache.first_name, cache.first
        yield cache.second_name, cache.second
    elif isinstance(cache, tuple):
        yield from zip(getattr(cache, "_fields", range(len(cache))), cache, strict=True)


def joined(*parts):
    """A path of its parts, without the empty ones."""
    return ".".join(str(part) for part in parts if part != "")


def places(cache, path=""):
    """Where each part of a cache is kept: {id of the part: path}, that of the first place where it is."""
    where = {id(cache): path}
    for name, part in parts_of(cache):
        if is_unique(part):
            for key, place in places(part, joined(path, name)).items():
                where.setdefault(key, place)
    return where


@functools.cache
def section(function, title):
    """The text of a section of a function's docstring, such as Shapes, as one line; "" where it has none."""
    lines, inside = [], False
    for line in (inspect.getdoc(function) or "").splitlines():
        if line.startswith(f"{title} "):
            inside, line = True, line.removeprefix(title)
        inside = inside and line.startswith(" ")
        if inside:
            lines.append(line.strip())
    return " ".join(lines)


@functools.cache
def equation(function):
    """The paper's equation in a function's Math section, such as "5-8", or ""."""
    match = re.search(r"Eq\. (\d+(?:-\d+)?)\)", section(function, "Math"))
    return match[1] if match else ""


@functools.cache
def argument_names(function):
    """The names of the arguments that are given by their place."""
    return tuple(p.name for p in inspect.signature(function).parameters.values() if p.kind in POSITIONAL)


@functools.cache
def result_names(function):
    """The names right of the arrow in a function's Shapes section; "" for a result without a name."""
    text = section(function, "Shapes").partition("->")[2]
    while (shorter := re.sub(r"\([^()]*\)", "", text)) != text:  # the shapes, which may hold brackets themselves
        text = shorter
    words = [each.split() for each in text.partition(";")[0].split(",")]
    return tuple(each[0] if len(each) == 1 or each[1:2] == ["or"] else "" for each in words)  # "dx or None"


def output_name(forward):
    """What a forward calls its result."""
    return next(iter(result_names(forward)), "") or "y"


def gradient_names(backward, forward, count):
    """What a backward calls its ``count`` results: by its Shapes section, else by the forward's arguments.

    ``forward`` is None where it is not known.
    """
    names = [name for name in result_names(backward) if name.lstrip("*").startswith("d")]
    if not names or (len(names) != count and not names[-1].startswith("*")):
        arguments = argument_names(forward) if forward else ("x",)
        names = [f"d{name}" for name in arguments[:count]] + ["*dparameter"]
    if names[-1].startswith("*"):  # those of the parameters of what it wraps
        rest = names.pop().lstrip("*")
        names = names[:count] + [f"{rest}{i + 1}" for i in range(count - len(names))]
    return names[:count]
