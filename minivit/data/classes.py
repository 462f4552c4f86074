"""Some of the classes of a data set, as a data set."""

import difflib
import re

import numpy as np

from minivit.base.errors import InputError
from minivit.data.dataset import take


def parse_classes(text, class_names):
    """The numbers of the classes that a text lists, in its order: names, numbers or ranges of numbers, with commas.

    What is both the name of one class and the number of another is taken for the name.

    Raises  InputError: an unknown class, one that is named twice, or none.
    """
    classes = []
    for part in (part.strip() for part in text.split(",")):
        if part in class_names:
            classes.append(class_names.index(part))
            continue
        numbers = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)
        first, last = (int(numbers[1]), int(numbers[2] or numbers[1])) if numbers else (0, -1)
        if not first <= last < len(class_names):
            near = difflib.get_close_matches(part, class_names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has 0-{len(class_names) - 1}, {_few(class_names)}"
            raise InputError(f"classes {text!r}: the data have no class {part!r}; {hint}")
        classes += range(first, last + 1)
    if twice := [class_names[k] for k in dict.fromkeys(classes) if classes.count(k) > 1]:
        raise InputError(f"classes {text!r}: {twice[0]} is named twice")
    return classes


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
