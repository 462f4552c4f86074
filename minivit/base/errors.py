"""The exception for input of the user that cannot be used, and what becomes of a figure that cannot be drawn."""

import sys
from contextlib import contextmanager


class InputError(ValueError):
    """The user's input cannot be used. Its text is one line: what is wrong, where, and what to do."""

    def __str__(self):
        # File names and the messages of other libraries may hold line breaks.
        return " ".join(super().__str__().splitlines())


@contextmanager
def drawing():
    """While active, a figure that cannot be drawn is one line of warning: the results are written before."""
    try:
        yield
    except Exception as error:  # matplotlib, its fonts and its settings raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"warning: a figure could not be drawn ({reason}); everything else is written", file=sys.stderr)
