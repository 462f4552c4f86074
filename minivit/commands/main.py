"""``minivit COMMAND ...``: every command line under one name."""

import difflib
import importlib
import sys

from minivit import __version__
from minivit.base.errors import InputError
from minivit.commands import COMMANDS, NAMES
from minivit.commands.cli import run

USAGE = """usage: minivit COMMAND ...

  minivit help COMMAND   the options of a command, with examples
  minivit --version      the version
"""


def overview():
    """The list of the commands, by what people want to do."""
    groups = (
        [f"\n{title}:", *(f"  {name:<10} {purpose}" for name, purpose in group.items())]
        for title, group in COMMANDS.items()
    )
    return USAGE + "\n".join(line for group in groups for line in group)


def start(words):
    """Do what the words of a command line say; returns the exit status.

    Raises  InputError: there is no such command.
    """
    name, *rest = words or ["help"]
    if name in ("help", "-h", "--help"):
        if not rest:
            print(overview())
            return 0
        name, rest = rest[0], ["--help"]
    if name == "--version":
        print(f"minivit {__version__}")
        return 0
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else "minivit alone lists the commands"
        raise InputError(f"there is no command {name!r}; {hint}")
    return importlib.import_module(f"minivit.commands.{name}").main(rest)


def main(words=None):
    """Entry point of ``minivit``; ends the process."""
    run(lambda: start(sys.argv[1:] if words is None else words))
