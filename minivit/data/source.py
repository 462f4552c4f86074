"""Where a data set comes from: what settings files and checkpoints say of it, and whether it is the same one."""

from __future__ import annotations

import zlib

import numpy as np

from minivit.base.errors import InputError
from minivit.base.files import local
from minivit.data import FOLDERS, load
from minivit.data.dataset import is_lazy
from minivit.data.walk import folder_named
from minivit.weights.checkpoint import class_order, few_classes

# Settings of the data, with their defaults.
DATA_KEYS = {
    "data": "digits", "data_dir": "data", "image_size": None, "classes": None, "train_share": None, "test_share": None,
    "split_seed": 0,
}  # fmt: skip
_KINDS = {
    "data": (str, None, "a text"),
    "data_dir": (str, None, "a text"),
    "image_size": (int, lambda value: value >= 1, "a whole number above 0"),
    "classes": (str, None, "a text"),
    "train_share": (float, lambda value: 0.0 < value <= 1.0, "a number above 0 and at most 1"),
    "test_share": (float, lambda value: 0.0 < value < 1.0, "a number between 0 and 1"),
    "split_seed": (int, lambda value: value >= 0, "a whole number from 0 on"),
}  # type, what it must be beside, both in words


def check_data(data, where):
    """Raises InputError if a setting of the data, of a dict that comes from a file, has another type than it must."""
    for key, (kind, holds, words) in _KINDS.items():
        value = data.get(key)
        if value is not None and (type(value) is not kind or (holds and not holds(value))):
            raise InputError(f"{where}: {key} must be {words}, got {value!r}")


def refuse_idle_data(name, given):
    """Raises InputError if a setting of the data that was ``given``, of a dict, has no effect with these data."""
    if name == "digits" and given.get("data_dir") is not None:
        raise InputError(
            f"data_dir {given['data_dir']} (--data-dir) has no effect: the data are the digits, which come with "
            "minivit; name others with --data, such as --data folder for your own images"
        )
    if name not in FOLDERS and given.get("test_share") is not None:
        raise InputError(
            f"test_share {given['test_share']} (--test-share) has no effect: {name} has test images of its own; it "
            f"splits --data {' or '.join(FOLDERS)}"
        )
    if given.get("split_seed") is not None and given.get("test_share") is None:
        raise InputError("split_seed (--split-seed) has no effect without test_share (--test-share)")


def dataset_of(record, *, name=None, data_dir=None):
    """The data set that a checkpoint's `Record` describes, or the one that is named instead.

    Folders are read at the size of the model where the record says no other, and cut as its program does. Classes are
    matched by name: labels are the model's numbers, whatever the order in the data.
    Raises  InputError: it does not say, or the data are missing, damaged or of other classes than the checkpoint's.
    """
    data = record.data
    check_data(data, record.path)
    name = name or data.get("data")
    if name is None:
        raise InputError(f"{record.path} does not say which data set it was trained on; name one with --data")
    refuse_idle_data(name, {"data_dir": data_dir})
    keys = list(DATA_KEYS)[2:] if name == data.get("data") else ()
    same = {key: data.get(key, DATA_KEYS[key]) for key in keys}
    if same.get("test_share") and data_dir and (folder_named(data_dir, "test") or folder_named(data_dir, "val")):
        del same["test_share"], same["split_seed"]  # another place, which is split
    if name in FOLDERS:
        same["image_size"] = same.get("image_size") or record.config.image_size
        same["preprocessing"] = record.preprocessing
    try:
        dataset = load(name, data_dir or local(data.get("data_dir", "data")), **same)
    except InputError as error:
        raise InputError(f"{error}; if the data lie elsewhere now, name the place with --data-dir") from None
    if (order := class_order(dataset.class_names, record.class_names or [])) is None:
        raise InputError(
            f"{record.path} was trained for other classes than those of {dataset.name} ({dataset.source}): "
            f"{few_classes(record)}"
        )
    return in_order(dataset, order)


def in_order(dataset, order):
    """A data set with its classes in another order: number ``order[k]`` becomes number k."""
    if order == list(range(len(order))):
        return dataset
    number = np.argsort(order)
    return dataset._replace(
        train_labels=number[dataset.train_labels], test_labels=number[dataset.test_labels],
        class_names=tuple(dataset.class_names[k] for k in order),
    )  # fmt: skip


def check_fit(dataset, config, where="the model", *, classes=True):
    """Raises InputError unless a data set's images, and its ``classes`` if these are to, are those of a `ViTConfig`."""
    c, shape, count = config, dataset.train_images.shape[1:], len(dataset.class_names)
    if shape != (c.image_size, c.image_size, c.channels) or (classes and count != c.num_classes):
        raise InputError(
            f"{where} takes {c.image_size}x{c.image_size}x{c.channels} images of {c.num_classes} classes; "
            f"{dataset.name} has {'x'.join(map(str, shape))} images of {count}"
        )


def fingerprint(dataset):
    """A number that tells whether two data sets hold the same training images, labels and test images.

    Of images that are files it sees names and lengths.
    """
    crc = 0
    for array in (dataset.train_images, dataset.train_labels, dataset.test_images, dataset.test_labels):
        crc = zlib.crc32(array.identity if is_lazy(array) else np.ascontiguousarray(array), crc)
    return crc
