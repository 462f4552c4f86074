"""Files: written so that no crash costs what they held before, JSON and TOML."""

from __future__ import annotations

import contextlib
import json
import os
import tomllib
from pathlib import Path, PureWindowsPath

from minivit.base.errors import InputError
from minivit.base.settings import refuse_unknown


@contextlib.contextmanager
def naming(path):
    """Within it, an OSError names the file ``path``, not a temporary one, which means nothing to a user, or none."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def write_atomically(path, write):
    """Call ``write(file)`` on a temporary file beside ``path``, flush it to the disk, then rename it to ``path``.

    Whatever happens on the way, ``path`` holds either what it held before or the whole new content: the content reaches
    the disk before the name, and the name before this returns.
    Raises  OSError: the disk is full, the folder cannot be written, ...; it names ``path``, and the temporary file is
    removed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    with naming(path):
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        if os.name == "posix":  # the rename itself must reach the disk too
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def sync(path):
    """Flush a file that is written elsewhere to the disk; nothing if there is no such file.

    Raises  OSError: the disk says that it failed; it names ``path``.
    """
    with naming(path), contextlib.suppress(FileNotFoundError), open(path, "r+b") as file:
        os.fsync(file.fileno())


def also_as(path, other):
    """Give a file, as it is now, a second name, in the place of what had that name; it takes no room on the disk.

    Nothing happens where there is no such file, or where the file system has no hard links.
    """
    temporary = Path(other).with_name(f".{Path(other).name}.partial")
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
            os.replace(temporary, other)
        finally:
            temporary.unlink(missing_ok=True)  # a file that has the second name already keeps both


def local(path):
    """A path from a file that may come from Windows: its backslashes separate folders, unless there is such a name."""
    if "\\" not in str(path) or os.path.exists(path):
        return path
    return PureWindowsPath(path).as_posix()


def write_json(path, content):
    """Write a JSON file, atomically."""
    write_atomically(path, lambda file: file.write((json.dumps(content, indent=2) + "\n").encode()))


def parse_json(text):
    """What a JSON text or its bytes hold.

    Raises  ValueError: it is not JSON, or lists and objects lie in each other deeper than Python reads.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its lists and objects lie too deep in each other") from None


def read_object(path):
    """The content of a JSON file that holds a dict; {} if it is missing or damaged."""
    try:
        content = parse_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def parse_toml(path, what="settings file"):
    """The content of a TOML file, a dict; ``what`` is what a message calls it.

    Raises  InputError: no such file, or not TOML.
    """
    path = Path(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin a file with a mark
    except FileNotFoundError:
        raise InputError(f"there is no {what} {path}") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder, not a {what}") from None
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, or a number of thousands of digits
        raise InputError(f"{path} is not a TOML file: {error}") from None


def check_tables(content, tables, where):
    """Raises InputError unless a dict is made of known tables with known keys: ``tables`` maps each to its keys."""
    refuse_unknown(content, tables, where)
    for name, values in content.items():
        if not isinstance(values, dict):
            raise InputError(f"{where}: {name} must be a table, written [{name}]")
        refuse_unknown(values, tables[name], f"{where} [{name}]")


def read_toml(path, tables):
    """Read a settings file; ``tables`` maps each table that it may have to the keys of that.

    Returns  {table: {key: value}} with every table present.
    Raises  InputError: no such file, not TOML, an unknown table or key.
    """
    content = parse_toml(path)
    check_tables(content, tables, path)
    return {name: content.get(name, {}) for name in tables}
