"""Settings as frozen dataclasses; each field has a default, a type and a help text, and is checked on construction.

One description of a setting serves the constructor, the TOML files and the command line (see `minivit.commands.cli`).
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
    """Check that each field has the type of its default; a whole number in the place of a float is converted.

    Raises  InputError: a value of another type, or a number that is not finite.
    """
    for f in dataclasses.fields(settings):
        value, kind = getattr(settings, f.name), type(f.default)
        if kind is float and type(value) is int:
            object.__setattr__(settings, f.name, float(value))
        elif type(value) is not kind or (kind is float and not math.isfinite(value)):
            raise InputError(f"{f.name} must be {_KINDS[kind]}, got {value!r}")


def check_range(settings, low, high, *names, open_high=False):
    """Raises InputError unless low <= value <= high for each field; < high with ``open_high``, no bound with None."""
    for name in names:
        value = getattr(settings, name)
        if value < low or (high is not None and (value > high or (open_high and value == high))):
            upper = "" if high is None else f" and {'below' if open_high else 'at most'} {high}"
            raise InputError(f"{name} must be at least {low}{upper}, got {value}")


def check_choice(settings, name, choices):
    """Raises InputError unless the named field is one of the choices."""
    if getattr(settings, name) not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}; got {getattr(settings, name)!r}")


def refuse_unknown(names, choices, where):
    """Raises InputError if one of the names is not among the choices; the message suggests the nearest choice."""
    for name in names:
        if name not in choices:
            near = difflib.get_close_matches(str(name), list(choices), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(choices)}"
            raise InputError(f"unknown setting {name!r} in {where}{hint}")


def settings_of(cls, values, where):
    """An instance of a settings class, from a dict that comes from the file ``where``.

    Raises  InputError: unknown or impossible settings; the message names the file.
    """
    refuse_unknown(values, field_names(cls), where)
    try:
        return cls(**values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def field_names(cls):
    """The names of a settings class's fields."""
    return [f.name for f in dataclasses.fields(cls)]


def defaults_of(cls):
    """The defaults of a settings class, {field: value}."""
    return {f.name: f.default for f in dataclasses.fields(cls)}
