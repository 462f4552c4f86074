"""Some of the classes of a data set, as a data set."""

import difflib
import re

import numpy as np

from minivit.base.errors import InputError
from minivit.base.words import note
from minivit.data.dataset import take
from minivit.data.walk import composed


def parse_classes(text, class_names):
    """The numbers of the classes that a text lists, in its order, with commas: all names, or all numbers and ranges.

    Where all are both, they are taken for names, and if the numbers are others that is told in a note.

    Raises  InputError: an unknown class, one that is named twice, or none; names and numbers together; a number that
    is the name of another class.
    """
    parts, names = [composed(part.strip()) for part in text.split(",")], [composed(name) for name in class_names]
    by_name = {part: names.index(part) for part in parts if part in names}
    by_number = {part: numbers for part in parts if (numbers := _numbers(part, len(names)))}
    for part in parts:
        if part not in by_name and part not in by_number:
            near = difflib.get_close_matches(part, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has 0-{len(names) - 1}, {_few(names)}"
            raise InputError(f"classes {text!r}: the data have no class {part!r}; {hint}")
    if all(part in by_name for part in parts):
        classes = [by_name[part] for part in parts]
        if all(by_number.get(part) != [by_name[part]] for part in parts) and len(by_number) == len(by_name):
            note(f"the classes {text} are taken for names, not for numbers from 0")
    elif all(part in by_number for part in parts):
        classes = [k for part in parts for k in by_number[part]]
        for end in (end for part in parts for end in (part, *part.split("-"))):
            if end in names and [names.index(end)] != _numbers(end, len(names)):
                raise InputError(
                    f"classes {text!r}: {end} is the name of a class, and counted from 0 the number of another; name "
                    "the classes one by one"
                )
    else:
        name, number = (next(part for part in parts if part not in known) for known in (by_number, by_name))
        raise InputError(f"classes {text!r} mixes names ({name}) and numbers ({number}); list all of them one way")
    if twice := [names[k] for k in dict.fromkeys(classes) if classes.count(k) > 1]:
        raise InputError(f"classes {text!r}: {twice[0]} is named twice")
    return classes


def _numbers(part, count):
    """The numbers that "3" or "0-4" means, a list; empty where it means none below ``count``."""
    ends = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)
    first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (0, -1)
    return list(range(first, last + 1)) if last < count else []


def _few(names):
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def with_classes(dataset, text):
    """The images of some classes, with new labels in the order in which the text names them; see `parse_classes`.

    Raises  InputError: see `parse_classes`.
    """
    classes = parse_classes(text, dataset.class_names)
    number = np.full(len(dataset.class_names), -1)
    number[classes] = np.arange(len(classes))
    train, test = number[dataset.train_labels], number[dataset.test_labels]
    return dataset._replace(
        train_images=take(dataset.train_images, np.flatnonzero(train >= 0)), train_labels=train[train >= 0],
        test_images=take(dataset.test_images, np.flatnonzero(test >= 0)), test_labels=test[test >= 0],
        class_names=tuple(dataset.class_names[k] for k in classes),
        source=f"{dataset.source}; {len(classes)} of {len(dataset.class_names)} classes",
        test_names=tuple(dataset.test_names[i] for i in np.flatnonzero(test >= 0)) if dataset.test_names else (),
    )  # fmt: skip
