r"""Images in folders, too many for the memory, as ImageNet's are: each is read when a batch needs it.

    root/train/CLASS/*.JPEG               the classes are the names of the folders, sorted
    root/val/CLASS/*.JPEG                 or root/test/CLASS
    root/val/*.JPEG with root/val.txt     the validation images in one folder, and a list of their classes

A line of val.txt is ``NAME CLASS``, separated by blanks or a comma, as in Kaggle's LOC_val_solution.csv; the class is
the name of a folder in train, or its number in their sorted order, from 0, as in Caffe's val.txt. If every line is the
name of a class alone, the lines are in the order of the images' names. Without a folder train, a model can be tested
but not trained; the classes are then the folders of val.

For testing, an image's short side is scaled to image_size / 0.875, and the centre is cut out: 256 and 224.

For training, the Inception crop (Szegedy et al. 2015, arXiv:1409.4842, section 6): a random part of the image, scaled
to image_size x image_size whatever its shape. From numbers a, r, v, u, uniform in [0, 1), and with A as the image's
area and a_min the least share of it,

    area = (a_min + (1 - a_min) a) A       width / height = (3/4) (16/9)^r,    between 3/4 and 4/3

and v and u choose the place. A part that does not fit into the image is drawn again, up to ten times; after that, the
largest part of an allowed shape at the centre is taken. All random numbers of a batch are drawn beforehand, so that the
crops do not depend on which thread reads which image when.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from minivit.base.errors import InputError
from minivit.data.cut import cut_as
from minivit.data.dataset import Dataset
from minivit.data.folder import (
    SUFFIXES,
    class_folders,
    pillow_modules,
    read_upright,
    refuse_unknown_classes,
)
from minivit.data.size import check_size

TEST_ZOOM = 0.875  # share of the short side that a test image shows
ATTEMPTS = 10
LOW, HIGH = 3 / 4, 4 / 3  # width / height of a training crop


def inception_box(width, height, draws, smallest):
    """The part of an image that is cut out for training, as (left, top, right, bottom) in whole pixels.

    Math    see the head of this file; ``smallest`` is a_min
    Shapes  draws (10, 4) in [0, 1): a, r, v, u of each attempt
    """
    for a, r, v, u in draws:
        area = (smallest + (1.0 - smallest) * a) * width * height
        ratio = LOW * (HIGH / LOW) ** r
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 1 <= w <= width and 1 <= h <= height:
            left, top = int(u * (width - w + 1)), int(v * (height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, max(1, round(height * HIGH))), min(height, max(1, round(width / LOW)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


class LazyImages:
    """Stands in for an array (n, H, W, 3) of uint8: ``images[rows]`` reads some of the files, cut out at the centre.

    ``names`` are paths from the folder ``root``, ``sizes`` the lengths of the files. Several threads, by default one
    for each of up to 8 cores, decode the files; their number changes no pixel. Any thread may read.
    """

    dtype, ndim = np.dtype(np.uint8), 4
    __iter__ = None  # a loop over single images would read all files again each time: take batches

    def __init__(self, root, names, sizes, image_size, *, flip=False, threads=0, preprocessing=None):
        check_size(image_size)
        self.root, self.names, self.sizes = str(root), names, sizes
        self.image_size, self.flip, self.threads = image_size, flip, threads or min(8, os.cpu_count() or 1)
        self.preprocessing = preprocessing  # how they are cut, if not as the head of this file says
        self._modules = pillow_modules()
        self._rows = np.arange(len(names))

    def __len__(self):
        return len(self.names)

    @property
    def shape(self):
        """(n, H, W, 3)."""
        return len(self), self.image_size, self.image_size, 3

    @property
    def identity(self):
        """Bytes that tell these images from others without reading them: names and lengths of the files."""
        return "\n".join(f"{name} {size}" for name, size in zip(self.names, self.sizes, strict=True)).encode()

    def __array__(self, *arguments, **keywords):
        raise TypeError("these images are files, read as they are needed: take some of them, images[rows]")

    def __getitem__(self, rows):
        numbers = self._rows[rows]  # rows is a number, a slice or an array: as NumPy understands it
        return self.read(numbers) if numbers.ndim else self.read(numbers[None])[0]

    def read(self, rows, *, draws=None, smallest=1.0):
        """Some of the images: their centres, or with ``draws`` the parts that `inception_box` chooses.

        Shapes  rows (B,), draws (B, 10, 4) in [0, 1)  ->  (B, H, W, 3) uint8
        Raises  InputError: an image that cannot be read; the message names its file.
        """
        Image, ImageOps = self._modules
        images = np.empty((len(rows), self.image_size, self.image_size, 3), np.uint8)

        def fill(i):
            path = os.path.join(self.root, self.names[rows[i]])

            def cut(image):
                if draws is None:
                    return self._centre(image)
                part = image.crop(inception_box(*image.size, draws[i], smallest))
                return part.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)

            image = read_upright(path, cut, Image, ImageOps)
            images[i] = image[:, ::-1] if self.flip else image

        with ThreadPoolExecutor(self.threads, thread_name_prefix="minivit-images") as pool:
            list(pool.map(fill, range(len(rows))))
        return images

    def _centre(self, image):
        if self.preprocessing:
            return cut_as(self.preprocessing)(self.image_size, *self._modules)(image)
        size, (width, height) = self.image_size, image.size
        scale = round(size / TEST_ZOOM) / min(width, height)
        width, height = max(size, round(width * scale)), max(size, round(height * scale))
        image = image.resize((width, height), self._modules[0].Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        return image.crop((left, top, left + size, top + size))

    def _like(self, names, sizes, flip):
        others = {"flip": flip, "threads": self.threads, "preprocessing": self.preprocessing}
        return LazyImages(self.root, names, sizes, self.image_size, **others)

    def mirror(self):
        """The same images, left and right exchanged."""
        return self._like(self.names, self.sizes, not self.flip)

    def take(self, rows):
        """Some of the images, by their numbers or a slice."""
        rows = self._rows[rows]
        return self._like([self.names[i] for i in rows], [self.sizes[i] for i in rows], self.flip)


def load_imagefolder(data_dir, image_size=224, *, preprocessing=None):
    """A folder of images as a `Dataset` whose images are `LazyImages`; only names and lengths of files are read.

    Test images are those of ``val``, or where there is no such folder of ``test``. Hidden files and other endings
    than images' are left out.
    Raises  InputError: folders, images or classes are missing.
    """
    root = Path(data_dir)
    split = "val" if (root / "val").is_dir() else "test"
    class_names = class_folders(root / ("train" if (root / "train").is_dir() else split))
    train, labels = _in_class_folders(root, "train", class_names)
    for name, count in zip(class_names, np.bincount(labels, minlength=len(class_names)), strict=True):
        if not count and len(train):
            raise InputError(f"{root / 'train' / name} has no images ({', '.join(SUFFIXES)}); add some")
    flat = list(_files(root, split)) if (root / split).is_dir() else []
    if flat:
        test, test_labels = flat, _read_labels(root / f"{split}.txt", [name for name, _ in flat], class_names)
    else:
        refuse_unknown_classes(root / split, class_names, root / "train")
        test, test_labels = _in_class_folders(root, split, class_names)
    train_images, test_images = (
        LazyImages(
            root, [name for name, _ in files], [size for _, size in files], image_size, preprocessing=preprocessing
        )  # fmt: skip
        for files in (train, test)
    )
    names = tuple(os.path.basename(name) for name, _ in test)
    return Dataset(
        "imagefolder", train_images, labels, test_images, test_labels, tuple(class_names), str(root), names
    )  # fmt: skip


def _files(root, folder):
    """(path from the root, length) of each image in a folder, sorted by name."""
    with os.scandir(root / folder) as entries:
        return sorted(
            (os.path.join(folder, entry.name), entry.stat().st_size)
            for entry in entries
            if entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".") and entry.is_file()
        )


def _in_class_folders(root, split, class_names):
    """The images of a split's class folders, class by class, and their labels (n,)."""
    folders = [os.path.join(split, name) for name in class_names]
    lists = [_files(root, folder) if (root / folder).is_dir() else [] for folder in folders]
    labels = np.repeat(np.arange(len(lists)), [len(files) for files in lists])
    return [file for files in lists for file in files], labels


def _read_labels(path, names, class_names):
    """The labels (n,) of images that lie in one folder, sorted by name, from a list; see the head of this file."""
    try:
        lines = [line.replace(",", " ").split() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except FileNotFoundError:
        raise InputError(
            f"there is no {path}; the images of {path.with_suffix('')} lie in no class folders: list their classes "
            "there, one NAME CLASS a line"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text file: {error}") from None
    lines = [line for line in lines if line and line[0] != "ImageId"]  # Kaggle's heading
    by_name = {name: k for k, name in enumerate(class_names)}
    if all(len(line) == 1 for line in lines):
        if len(lines) != len(names):
            raise InputError(f"{path} lists {len(lines)} classes for {len(names)} images; list one for each")
        if unknown := [line[0] for line in lines if line[0] not in by_name]:
            raise InputError(
                f"{path}: {unknown[0]!r} is no folder of train; a line without an image's name must be a class's "
                "(the numbers of ImageNet's development kit count them in another order)"
            )
        return np.array([by_name[line[0]] for line in lines], np.int64)
    by_number = {str(k): k for k in range(len(class_names))}
    label_of = {}
    for name, *rest in lines:
        label = rest[0] if rest else ""
        if label not in by_name and label not in by_number:
            raise InputError(f"{path}: the class of {name} is {label!r}, which is no folder of train nor its number")
        label_of[Path(name).stem] = by_name.get(label, by_number.get(label))
    labels = [label_of.get(Path(name).stem) for name in names]
    if None in labels:
        raise InputError(f"{path} does not list {os.path.basename(names[labels.index(None)])}; add its class")
    return np.array(labels, np.int64)
