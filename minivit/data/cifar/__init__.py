"""CIFAR-10 and CIFAR-100: from disk in any of their official forms, or downloaded.

A data set is looked for in this order: the binary folder, the Python folder, the binary archive, the Python archive;
``data_dir`` may also be one of those itself. Archives are read as they lie, without unpacking them to disk: .tar.gz as
the official ones, .tar, .zip and others, see `files.read_archive`. Pickles of any protocol are read, see `parse`.

`layouts` has the names and sizes, `files` finds files and reads them, `parse` makes images and labels of their bytes,
`download` gets the archives.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009,
https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from pathlib import Path

import numpy as np

from minivit.base.errors import InputError
from minivit.data.cifar.download import fetch
from minivit.data.cifar.files import find_files, read_archive, read_file
from minivit.data.cifar.layouts import KINDS
from minivit.data.cifar.parse import parse_binary, parse_class_names, parse_python
from minivit.data.dataset import Dataset

__all__ = ["fetch", "load_cifar"]


def load_cifar(name, data_dir):
    """Load ``"cifar10"`` or ``"cifar100"`` (its 100 fine classes) from wherever under ``data_dir`` it lies.

    The number of records comes from the files; labels are checked one by one.

    Shapes  images (n, 32, 32, 3) uint8, labels (n,) int64
    Raises  InputError: the data are missing (it says how to get them), incomplete, damaged, or not what they claim.
    """
    kind = KINDS[name]
    path, layout = find_files(name, Path(data_dir))
    contents = None
    if path.is_file():
        contents = read_archive(path, {file for each in kind.layouts for file in each.files})
        if layout is None:  # an archive of any name: what it holds tells its form
            layout = next((each for each in kind.layouts if each.test in contents), kind.layouts[0])

    def read(file):
        return read_file(path / file) if contents is None else contents.pop(file, None)

    class_names = tuple(kind.class_names.split())
    data = read(layout.class_names)
    if data is not None:
        class_names = parse_class_names(data, kind, layout, path / layout.class_names)
    parse = parse_binary if layout.binary else parse_python
    splits = []
    for files in (layout.train, (layout.test,)):
        parts = []
        for file in files:
            data = read(file)
            if data is None:
                raise InputError(f"{path} has no {file}; move it away and fetch {name} again")
            pixels, labels = parse(data, kind, path / file)
            if len(labels) and labels.max() >= len(class_names):
                raise InputError(
                    f"{path / file}: record {labels.argmax()} has label {labels.max()}, but {name} has only"
                    f" {len(class_names)} classes; move {path} away and fetch {name} again"
                )
            parts.append((pixels, labels))
        splits += _join(parts)
    source = f"{path}, {'binary' if layout.binary else 'Python'} version"
    return Dataset(name, *splits, class_names, source)


def _join(parts):
    """The planes of several files as images, and their labels."""
    labels = np.concatenate([labels for _, labels in parts])
    images = np.empty((len(labels), 32, 32, 3), np.uint8)
    end = 0
    for pixels, _ in parts:
        start, end = end, end + len(pixels)
        planes = pixels.reshape(-1, 3, 32, 32)  # (n, 3072) -> (n, 3, 32, 32)
        for channel in range(3):  # nine times as fast as one transposed copy
            images[start:end, :, :, channel] = planes[:, channel]
    return images, labels
