r"""A list of the classes of images that lie in one folder: val.txt, read as a whole.

A line is NAME CLASS, separated by a comma, a semicolon, a tab or blanks, the same in all lines; quotes are those of the
csv module, and there may be a heading and further columns. Or a line is a class alone, in the order of the images'
names.

Which column holds the names is decided once, from the names of the images; which the classes, and whether these are
names of folders or their numbers from 0, from all lines together. Where two readings are possible and differ, or none
is, the list is refused. In Kaggle's LOC_val_solution.csv a class is followed by the corners of a box.
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter

import numpy as np

from minivit.base.errors import InputError
from minivit.base.words import counted, note
from minivit.data.walk import composed, is_image

BOXES = re.compile(r"\S+( -?\d+){4}( \S+( -?\d+){4})* ?")  # Kaggle's: class, left, top, right, bottom; again
WIDTH = 16  # columns that are looked at
NUMBER = re.compile(r"\d{1,9}")
ADVICE = "list the images' classes one NAME CLASS a line, or NAME,CLASS"


def labels_of_list(path, names, class_names):
    """The labels (n,) of images that lie in one folder, by their ``names``, sorted, from the list at ``path``.

    Raises  InputError: there is no such list, it has no reading or two, an image is not in it or has two classes.
    """
    lines = _lines(path)
    rows, heading = _rows(lines, names, class_names)
    if all(len(row) == 1 for row in rows):
        return _of_bare_classes(path, rows, names, class_names)
    name_column, class_column = _columns(path, rows, names, class_names)
    short = next((row for row in rows if len(row) <= max(name_column, class_column)), None)
    if short:
        raise InputError(f"{path}: the class of {short[0]} is '', which is no folder of train nor its number")
    listed = [(row[name_column].strip(), row[class_column].strip()) for row in rows]
    if all(BOXES.fullmatch(label) for _, label in listed) or heading == ["ImageId", "PredictionString"]:
        listed = [(name, label.split(" ")[0]) for name, label in listed]
    number_of = _numbers_of_classes(path, listed, class_names)
    return _of_names(path, [(name, number_of[label], label) for name, label in listed], names, class_names)


def _lines(path):
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(
            f"there is no {path}; the images of {path.with_suffix('')} lie in no class folders: {ADVICE}"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text file in UTF-8: {error}") from None
    lines = [composed(line).strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise InputError(f"{path} is empty; {ADVICE}")
    return lines


def _readings(lines):
    """The rows that each separator makes of the lines, where all lines have it; the whole lines come last."""
    for mark in "\t,; ":
        if all((mark if mark != " " else '"') in line for line in lines):
            try:
                yield list(csv.reader(lines, delimiter=mark, skipinitialspace=True, strict=True))
            except csv.Error:  # quotes that are none of this separator's
                continue
    yield [line.split(None, 1) for line in lines]
    yield [line.rsplit(None, 1) for line in lines]
    yield [line.split() for line in lines]
    yield [[line.strip('"')] for line in lines]


def _rows(lines, names, class_names):
    """The rows of the reading that knows the most names and classes, the first of such, without its heading."""
    files, classes = _spellings(names), {*class_names, *map(str, range(len(class_names)))}

    def known(rows):
        """(rows whose name and class are known, both of them together); of a single column all rows or none."""
        columns = [[row[k].strip() for row in rows if k < len(row)] for k in range(min(max(map(len, rows)), WIDTH))]
        right = max(sum(_class_word(text) in classes for text in column) for column in columns)
        if len(columns) == 1:
            return (right, right) if right == len(rows) else (0, 0)
        named = max(sum(_basename(text) in files for text in column) for column in columns)
        return min(named, right), named + right

    best, most = None, (-1, -1)
    for rows in _readings(lines):
        if (count := known(rows)) > most:
            best, most = rows, count
        if most[0] >= max(len(rows) - 1, 1):  # all but perhaps a heading
            break
    first = [field.strip() for field in best[0]]
    told = any(_basename(each) in files or is_image(each) or _class_word(each) in classes for each in first)
    return (best, None) if told or len(best) == 1 or not most[0] else (best[1:], first)


def _class_word(text):
    """The class in a field: all of it, or what stands before the corners of boxes."""
    return text.split(" ")[0] if BOXES.fullmatch(text) else text


def _basename(text):
    return text.strip().replace("\\", "/").rpartition("/")[2]


def _stem(name):
    return os.path.splitext(name)[0]


def _spellings(names):
    """What a list may call the images: their names in full, and without the ending."""
    names = [composed(os.path.basename(name)) for name in names]
    return {*names, *map(_stem, names), *(f"{_stem(name)}{end}" for name in names for end in (".JPEG", ".jpg", ".png"))}


def _columns(path, rows, names, class_names):
    """The numbers of the columns of names and of classes: those that know the most; by name before by number.

    Raises  InputError: no name is that of an image.
    """
    files, width = _spellings(names), min(max(map(len, rows)), WIDTH)
    by_name, by_number = set(class_names), {str(k) for k in range(len(class_names))}

    def count(k, known, word=str):
        return sum(k < len(row) and word(row[k].strip()) in known for row in rows)

    name_column = max(range(width), key=lambda k: (count(k, files, _basename), -k))
    if not count(name_column, files, _basename):
        raise InputError(f"{path} names none of the images, of which one is {os.path.basename(names[0])}; {ADVICE}")
    others = [k for k in range(width) if k != name_column]
    return name_column, max(others, key=lambda k: (count(k, by_name, _class_word), count(k, by_number), -k))


def _of_bare_classes(path, rows, names, class_names):
    by_name = {name: k for k, name in enumerate(class_names)}
    if len(rows) != len(names):
        raise InputError(f"{path} lists {len(rows)} classes for {len(names)} images; list one for each, or {ADVICE}")
    if unknown := [row[0] for row in rows if row[0] not in by_name]:
        raise InputError(
            f"{path}: {unknown[0]!r} is no folder of train; a line without an image's name must be a class's "
            "(the numbers of ImageNet's development kit count them in another order)"
        )
    return np.array([by_name[row[0]] for row in rows], np.int64)


def _numbers_of_classes(path, listed, class_names):
    """{class as it is written: its number}, by one reading of all: names of folders, or numbers from 0.

    Raises  InputError: no reading knows all, or two do and differ.
    """
    words = dict.fromkeys(label for _, label in listed)
    by_name, count = {name: k for k, name in enumerate(class_names)}, len(class_names)
    values = {int(name): k for k, name in enumerate(class_names) if NUMBER.fullmatch(name)}
    numbers = {word: int(word) for word in words if NUMBER.fullmatch(word)}
    readings = {}
    if all(word in by_name for word in words):
        readings["names"] = {word: by_name[word] for word in words}
    elif len(values) == count and all(numbers.get(word) in values for word in words):  # "01" and the folder "1"
        readings["names"] = {word: values[numbers[word]] for word in words}
    if all(numbers.get(word, count) < count for word in words):
        readings["numbers"] = numbers
    if len(readings) == 2 and readings["names"] != readings["numbers"]:
        word = next(word for word in words if readings["names"][word] != readings["numbers"][word])
        raise InputError(
            f"{path}: the class {word} may be the folder of that name or, counted from 0, the folder "
            f"{class_names[numbers[word]]}; give the folders names that are no numbers"
        )
    if not readings:
        known = {*by_name, *(word for word, number in numbers.items() if number < count)}
        name, label = next(((name, label) for name, label in listed if label not in known), listed[0])
        if label in known:
            raise InputError(f"{path} mixes names and numbers of classes; write all of them one way")
        hint = "; its numbers must count from 0" if numbers.get(label) == count and "0" not in words else ""
        raise InputError(f"{path}: the class of {name} is {label!r}, which is no folder of train nor its number{hint}")
    if "names" not in readings:
        none = "" if "0" in words else ", though no image has it"
        note(f"the classes in {path} are read as numbers from 0: 0 is {class_names[0]}{none}")
    return readings.get("names") or readings["numbers"]


def _of_names(path, listed, names, class_names):
    """The labels of images from [(name in the list, label, its word)]: full names first, then those without ending."""
    files = [composed(os.path.basename(name)) for name in names]
    by_full = {name: i for i, name in enumerate(files)}
    by_stem = {}
    for i, name in enumerate(files):
        by_stem.setdefault(_stem(name), []).append(i)
    labels, words, missing = [None] * len(files), {}, []

    def give(i, label, word):
        if labels[i] not in (None, label):
            raise InputError(f"{path} gives {files[i]} two classes, {words[i]} and {word}; leave one of them out")
        labels[i], words[i] = label, word

    for name, label, word in listed:
        own = _basename(name)
        if own in by_full:
            give(by_full[own], label, word)
        elif len(by_stem.get(own, ())) > 1:
            raise InputError(f"{path}: {name} may be {' or '.join(files[i] for i in by_stem[own])}; list full names")
        elif own in by_stem:
            give(by_stem[own][0], label, word)
        else:
            missing.append((name, label, word))
    full, gone = set(words), Counter()
    for name, label, word in missing:  # the same image with another ending: .JPEG in the list, .png in the folder
        rest = [i for i in by_stem.get(_stem(_basename(name)), ()) if i not in full] if is_image(name) else []
        if len(rest) == 1:
            give(rest[0], label, word)
        else:
            gone[name] += 1
    if None in labels:
        unlisted = [file for file, label in zip(files, labels, strict=True) if label is None]
        alike = {name.casefold(): name for name in gone}.get(unlisted[0].casefold())
        hint = f" (but {alike})" if alike else ""
        others = f" and {counted(len(unlisted) - 1, 'other image')}" if len(unlisted) > 1 else ""
        raise InputError(f"{path} does not list {unlisted[0]}{others}{hint}; add its class")
    if gone:
        few = ", ".join(list(gone)[:3])
        note(f"{path} lists {counted(len(gone), 'image')} that {path.with_suffix('')} does not have: {few}")
    return np.array(labels, np.int64)
