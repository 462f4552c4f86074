"""Small data sets in CIFAR's forms, for tests."""

import io
import struct
import tarfile

import numpy as np
import pytest

from minivit.base.errors import InputError
from minivit.data import load

COUNTS = {"cifar10": (3, 1, 2, 3, 2, 4), "cifar100": (7, 5)}  # records of each file, the test file last
BINARY = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}
PYTHON = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
NAMES = {
    ("cifar10", "binary"): [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"],
    ("cifar10", "python"): [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"],
    ("cifar100", "binary"): ["train.bin", "test.bin"],
    ("cifar100", "python"): ["train", "test"],
}


def image_files(name):
    """Return [(images, labels)] for each file of a small data set."""
    rng = np.random.default_rng(4)
    classes = 10 if name == "cifar10" else 100
    return [(rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), rng.integers(0, classes, n)) for n in COUNTS[name]]


def binary_file(images, labels, name):
    records = []
    for image, label in zip(images, labels, strict=True):
        coarse = [] if name == "cifar10" else [int(label) // 5]
        planes = b"".join(image[:, :, channel].tobytes() for channel in range(3))
        records.append(bytes([*coarse, int(label)]) + planes)
    return b"".join(records)


def python_file(images, labels, name):
    """Return what cPickle of Python 2 wrote: byte strings, and NumPy's module names of then."""
    text = lambda value: b"T" + struct.pack("<i", len(value)) + value  # noqa: E731
    number = lambda value: b"J" + struct.pack("<i", value)  # noqa: E731
    planes = images.transpose(0, 3, 1, 2).tobytes()
    dtype = (
        b"cnumpy\ndtype\nq\x05(" + text(b"u1") + b"K\x00K\x01tR(K\x03" + text(b"|") + b"NNN"
        b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x02(cnumpy\nndarray\nq\x03(K\x00t" + text(b"b") + b"tR"
        b"(K\x01(" + number(len(images)) + number(3072) + b"t" + dtype + b"\x89" + text(planes) + b"tb"
    )
    key = b"labels" if name == "cifar10" else b"fine_labels"
    items = text(b"data") + array + text(key) + b"](" + b"".join(map(number, map(int, labels))) + b"e"
    return b"\x80\x02}q\x01(" + text(b"batch_label") + text(b"a batch") + items + b"u."


def contents(name, form):
    make = binary_file if form == "binary" else python_file
    return {
        file: make(images, labels, name)
        for file, (images, labels) in zip(NAMES[name, form], image_files(name), strict=True)
    }


def write_folder(folder, files):
    folder.mkdir(parents=True)
    for file, data in files.items():
        (folder / file).write_bytes(data)
    return folder


def write_archive(path, files, prefix="some/where/", mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        for file, data in files.items():
            member = tarfile.TarInfo(prefix + file)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def assert_is(dataset, name):
    expected = image_files(name)
    splits = (
        (expected[:-1], dataset.train_images, dataset.train_labels),
        (
            expected[-1:],
            dataset.test_images,
            dataset.test_labels,
        ),
    )
    for parts, images, labels in splits:
        np.testing.assert_array_equal(images, np.concatenate([part for part, _ in parts]))
        np.testing.assert_array_equal(labels, np.concatenate([part for _, part in parts]))
        assert images.dtype == np.uint8 and labels.dtype == np.int64
        assert images.flags.c_contiguous
    assert dataset.name == name


def refused(pattern, name, data_dir):
    with pytest.raises(InputError, match=pattern) as caught:
        load(name, data_dir)
    assert "\n" not in str(caught.value)
    return str(caught.value)
