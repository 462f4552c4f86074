"""What the commands share: one-line errors, command-line flags made from settings."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import os
import re
import sys
from pathlib import Path

from minivit.base.backend import kernels_wanted
from minivit.base.errors import InputError
from minivit.base.settings import field_names
from minivit.commands import NAMES

COMMAND_LINE = re.compile(rf"\bminivit ({'|'.join(NAMES)})\b")


def started_by_script():
    """Was this process started as ``python scripts/COMMAND.py``, and not as ``minivit COMMAND``?"""
    program = Path(sys.argv[0])
    return program.suffix == ".py" and program.stem in NAMES


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are one line, ``error: what``, and exit status 2.

    ``command`` is one of `NAMES`. Help is written for ``minivit COMMAND``; it says ``python scripts/COMMAND.py`` to
    those who started it so.
    """

    def __init__(self, *, command=None, **keywords):
        if command:
            keywords["prog"] = f"{command}.py" if started_by_script() else f"minivit {command}"
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **keywords)

    def format_help(self):
        """The help, with its command lines as the reader writes them."""
        text = super().format_help()
        return COMMAND_LINE.sub(r"python scripts/\1.py", text) if started_by_script() else text

    def error(self, message):
        """Print the message as one line and end with status 2."""
        sys.exit(_complain(f"{message} (--help lists the options)"))


def run(main):
    """Run a command's ``main()`` and end the process: what the user can mend is one line on stderr, and status 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # class and file names may be in any script
    try:
        kernels_wanted()  # refuses a bad MINIVIT_KERNELS before any work is done
        status = main()
    except (InputError, ImportError) as error:  # an import that fails this late is that of an optional library
        status = _complain(error)
    except MemoryError:
        status = _complain(
            "not enough memory; use a smaller --batch-size, --micro-batch (on a GPU: --gpu-micro-batch) or model"
        )
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left: nothing more to say
        status = 1
    except OSError as error:
        status = _complain(describe_os_error(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


def _complain(error):
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    return 2


def describe_os_error(error):
    """One line for an OSError: what, which file, and what to do."""
    where = f"{error.filename}: " if error.filename else ""
    advice = {
        errno.ENOSPC: "; free some space and try again (a training run goes on with --resume)",
        errno.EACCES: "; check the permissions or choose another place",
        errno.EROFS: "; choose a place that can be written",
        errno.EEXIST: "; choose another place",
        errno.ENOTDIR: "; choose another place",
        errno.EISDIR: "; choose another name",
        errno.ENOENT: "; check the name",
    }.get(error.errno, "")
    return f"{where}{error.strerror or error}{advice}"


def output_file(text):
    """An argument's type: the name of a file to write, in a folder that exists."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file to write")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent} to write {path.name} to")
    return text


FIGURES = (".png", ".pdf", ".svg")


def figure_file(text):
    """An argument's type: the name of a figure to draw, in a format that matplotlib writes."""
    if Path(text).suffix.lower() not in FIGURES:
        raise argparse.ArgumentTypeError(f"{text} must end in {', '.join(FIGURES[:-1])} or {FIGURES[-1]}")
    return output_file(text)


def add_settings(parser, cls, *, skip=()):
    """One flag per field of a settings class; a flag that is not given leaves no trace in the namespace."""
    for f in dataclasses.fields(cls):
        if f.name in skip:
            continue
        flag, kind = "--" + f.name.replace("_", "-"), type(f.default)
        text = f.metadata["help"].replace("%", "%%") + f" [{f.default}]"
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            metavar = {int: "N", float: "X", str: "NAME"}[kind]
            parser.add_argument(flag, type=kind, metavar=metavar, default=argparse.SUPPRESS, help=text)


def given(namespace, cls):
    """The settings of a class that were given on the command line, as a dict."""
    return {name: getattr(namespace, name) for name in field_names(cls) if hasattr(namespace, name)}
