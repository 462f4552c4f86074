"""Some of the classes of a data set, as a data set."""

import difflib
import re

import numpy as np

from minivit.errors import InputError


def parse_classes(text, class_names):
    """The numbers of the classes that a text names, in its order: names or numbers, ranges of these, with commas.

    A class's name counts before its number.

    Raises  InputError: an unknown class, one that is named twice, or none.
    """
    chosen = []
    for part in (part.strip() for part in text.split(",")):
        if part in class_names:
            chosen.append(class_names.index(part))
            continue
        numbers = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)
        first, last = (int(numbers[1]), int(numbers[2] or numbers[1])) if numbers else (0, -1)
        if not first <= last < len(class_names):
            near = difflib.get_close_matches(part, class_names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has 0-{len(class_names) - 1}, {_few(class_names)}"
            raise InputError(f"classes {text!r}: the data have no class {part!r}; {hint}")
        chosen += range(first, last + 1)
    if twice := [class_names[k] for k in dict.fromkeys(chosen) if chosen.count(k) > 1]:
        raise InputError(f"classes {text!r}: {twice[0]} is named twice")
    return chosen


def _few(names):
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def with_classes(dataset, text):
    """The pictures of some classes, numbered anew in the order in which the text names them; see `parse_classes`.

    Raises  InputError: see `parse_classes`.
    """
    chosen = parse_classes(text, dataset.class_names)
    number = np.full(len(dataset.class_names), -1)
    number[chosen] = np.arange(len(chosen))
    parts = []
    for images, labels in (
        (dataset.train_images, dataset.train_labels),
        (dataset.test_images, dataset.test_labels),
    ):
        new = number[labels]
        parts += [images[new >= 0], new[new >= 0]]
    names = tuple(dataset.class_names[k] for k in chosen)
    return dataset._replace(
        train_images=parts[0], train_labels=parts[1], test_images=parts[2], test_labels=parts[3], class_names=names,
        source=f"{dataset.source}; {len(chosen)} of {len(dataset.class_names)} classes",
    )  # fmt: skip
