"""The hunt for a planted mistake: which ones are hidden at which level, and what a guess of the hunter names."""

from __future__ import annotations

import difflib
import inspect

from minivit.base.errors import InputError
from minivit.laboratory.mistakes import MISTAKES, body_of, source_of, tokens

LEVELS = {
    1: "a gradient of a layer of the paper is wrong; you see what the checks say",
    2: "another gradient is wrong: of an option, a twin, or where layers are put together; you see which cases fail",
    3: "no gradient check sees it: a forward, the targets, an optimiser, the schedule or the engine; you see nothing",
}
FEWEST = 3  # words and signs of a line that must be typed to name it
WITH_BACKWARD = ("minivit.base.pairs", "minivit.options.axial", "minivit.options.stem.option")
INVERSES = ("unpatchify", "from_axis")  # functions that are the backward of another one


def level_of(mistake):
    """The level at which a mistake is hidden: 1, 2 or 3; see `LEVELS`."""
    last = mistake.function.rpartition(".")[2]
    makes_backward = mistake.module in WITH_BACKWARD and last != "add_gradients"  # sums over micro-batches are not seen
    if not ("backward" in last or last in INVERSES or makes_backward):
        return 3
    return 1 if mistake.module.startswith("minivit.layers.") else 2


def hidden_at(level=None):
    """The mistakes of a level, or of all, that can be planted: in functions that have not been edited too much.

    Raises  InputError: there are none.
    """
    chosen = [m for m in MISTAKES if level in (None, level_of(m)) and is_plantable(m)]
    if not chosen:
        raise InputError("no mistake of that level can be planted any more: the functions have been edited")
    return chosen


def is_plantable(mistake):
    """Whether its function still holds what it replaces."""
    try:
        source_of(mistake)
    except InputError:
        return False
    return True


def names_file(mistake, guess):
    """Whether a guess is the mistake's file: layers/attention.py, attention.py, attention, minivit.layers.attention."""
    path = guess.removesuffix(".py").replace("/", ".").strip(".")
    return bool(path) and f".{mistake.module}".endswith(f".{path}")


def names_function(mistake, guess):
    """Whether a guess is the mistake's function, or its name in the zoo."""
    return guess in (mistake.function.lower(), mistake.function.rpartition(".")[2].lower(), mistake.name)


def changed_lines(mistake):
    """{number in the file: text} of the lines that the mistake changes; not while it is planted."""
    right, wrong = (text.splitlines() for text in source_of(mistake))
    first = inspect.getsourcelines(body_of(mistake))[1]
    return {
        first + i: right[i]
        for tag, i1, i2, _, _ in difflib.SequenceMatcher(None, right, wrong, autojunk=False).get_opcodes()
        if tag != "equal"
        for i in range(i1, max(i2, i1 + 1))
    }


def names_line(changed, guess):
    """Whether a guess is the number of one of the `changed_lines`, or `FEWEST` or more words and signs of it."""
    if guess.isdecimal():
        return int(guess) in changed
    typed = [text.lower() for text, _, _ in tokens(guess)]
    lines = [[text.lower() for text, _, _ in tokens(line)] for line in changed.values()]
    return any(
        typed == line[k : k + len(typed)] and (len(typed) >= FEWEST or typed == line)
        for line in lines
        for k in range(len(line))
    )
