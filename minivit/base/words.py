"""Numbers in words, and notes, for messages."""

import sys


def counted(count, noun, plural=None):
    """How many of something, in words: 1 epoch, 1,200 epochs."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def note(text):
    """Tell the user, on stderr and in one line, what was decided or left out."""
    print(f"note: {' '.join(text.split())}", file=sys.stderr)
