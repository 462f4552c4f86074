"""The exception for input of the user that cannot be used, and what becomes of a figure that cannot be drawn."""

import errno
import sys
from contextlib import contextmanager

LONGEST = 1200  # characters of a message
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)


class InputError(ValueError):
    """The user's input cannot be used. Its text is one line: what is wrong, where, and what to do."""

    def __str__(self):
        # File names, what damaged files hold and the messages of other libraries may have line breaks, control
        # characters, and any length.
        line = " ".join(super().__str__().splitlines())
        line = "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in line)
        return line if len(line) <= LONGEST else f"{line[: LONGEST - 300]} ... {line[-290:]}"


@contextmanager
def drawing():
    """While active, a figure that cannot be drawn is one line of warning: the results are written before.

    Raises  OSError: the disk is full, the folder cannot be written, ...: that can be mended.
    """
    try:
        yield
    except Exception as error:  # matplotlib, its fonts and its settings raise nearly anything
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        print(f"warning: a figure could not be drawn ({reason}); everything else is written", file=sys.stderr)
