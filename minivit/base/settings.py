"""Settings as frozen dataclasses whose fields carry a default, a type and a help text; checked on construction.

One description serves the constructor, the TOML files and the command line (see `minivit.commands.cli`).
"""

from __future__ import annotations

import dataclasses
import difflib
import math

from minivit.base.errors import InputError

_KINDS = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false"}


def setting(default, text):
    """A dataclass field with a help text; its type is that of its default."""
    return dataclasses.field(default=default, metadata={"help": text})


def check_types(settings):
    """Make each field the type of its default (whole numbers may stand for floats).

    Raises  InputError: a value of another type, or a number that is not finite.
    """
    for f in dataclasses.fields(settings):
        value, kind = getattr(settings, f.name), type(f.default)
        if kind is float and type(value) is int:
            object.__setattr__(settings, f.name, float(value))
        elif type(value) is not kind or (kind is float and not math.isfinite(value)):
            raise InputError(f"{f.name} must be {_KINDS[kind]}, got {value!r}")


def check_range(settings, low, high, *names, open_high=False):
    """Raises InputError unless low <= value <= high (< high if ``open_high``; None: no bound) for each field."""
    for name in names:
        value = getattr(settings, name)
        if value < low or (high is not None and (value > high or (open_high and value == high))):
            upper = "" if high is None else f" and {'below' if open_high else 'at most'} {high}"
            raise InputError(f"{name} must be at least {low}{upper}, got {value}")


def check_choice(settings, name, choices):
    """Raises InputError unless the named field is one of the choices."""
    if getattr(settings, name) not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}; got {getattr(settings, name)!r}")


def refuse_unknown(given, known, where):
    """Raises InputError if a name in ``given`` is not in ``known``; the message suggests the nearest one."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), list(known), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise InputError(f"unknown setting {name!r} in {where}{hint}")


def settings_of(cls, stored, where):
    """The settings class that a dict from a file describes.

    Raises  InputError: it holds unknown or impossible settings; the message names ``where``.
    """
    refuse_unknown(stored, field_names(cls), where)
    try:
        return cls(**stored)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def field_names(cls):
    """The names of a settings class's fields."""
    return [f.name for f in dataclasses.fields(cls)]


def defaults_of(cls):
    """What the fields of a settings class are if nothing is asked for, as a dict."""
    return {f.name: f.default for f in dataclasses.fields(cls)}
