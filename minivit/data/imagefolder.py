r"""Images in folders, too many for the memory, as ImageNet's are: each is read when a batch needs it.

    root/train/CLASS/*.JPEG               the classes are the names of the folders, sorted
    root/val/CLASS/*.JPEG                 or root/test/CLASS
    root/val/*.JPEG with root/val.txt     the validation images in one folder, and a list of their classes
    root/CLASS/*.JPEG                     to be split, see ``test_share`` of `load_imagefolder`

A line of val.txt (or val.csv, LOC_val_solution.csv) is ``NAME CLASS``, separated by blanks, a comma, a semicolon or a
tab, as in Kaggle's file; the class is the name of a folder in train, or its number in their sorted order, from 0, as in
Caffe's val.txt: one of the two in all lines, see `minivit.data.listing`. If every line is the name of a class alone,
the lines are in the order of the images' names. Without a folder train, a model can be tested but not trained; the
classes are then the folders of val.

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

import numpy as np

from minivit.base.errors import InputError
from minivit.base.words import note
from minivit.data.cut import cut_as
from minivit.data.dataset import Dataset
from minivit.data.folder import find_images, names_of, pillow_modules, read_upright
from minivit.data.listing import labels_of_list
from minivit.data.size import check_size
from minivit.data.walk import composed, images_below, is_hidden

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
    for each of up to 8 cores, decode the files; their number changes no pixel. Any thread may read. ``transparent`` is
    a list that several of these share, to tell but once that transparent parts are put on white.
    """

    dtype, ndim = np.dtype(np.uint8), 4
    __iter__ = None  # a loop over single images would read all files again each time: take batches

    def __init__(
        self, root, names, sizes, image_size, *, flip=False, threads=0, transparent=None, preprocessing=None
    ):  # fmt: skip
        check_size(image_size)
        self.root, self.names, self.sizes = str(root), names, sizes
        self.image_size, self.flip, self.threads = image_size, flip, threads or min(8, os.cpu_count() or 1)
        self.preprocessing = preprocessing  # how they are cut, if not as the head of this file says
        self._modules = pillow_modules()
        self._rows = np.arange(len(names))
        self._transparent = [] if transparent is None else transparent  # those that were read; told of the first

    def __len__(self):
        return len(self.names)

    @property
    def shape(self):
        """(n, H, W, 3)."""
        return len(self), self.image_size, self.image_size, 3

    @property
    def identity(self):
        """Bytes that tell these images from others without reading them: names and lengths of the files."""
        names = (composed(name).replace(os.sep, "/") for name in self.names)  # the same on every system
        return "\n".join(f"{name} {size}" for name, size in zip(names, self.sizes, strict=True)).encode()

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
        images, found = np.empty((len(rows), self.image_size, self.image_size, 3), np.uint8), []

        def fill(i):
            path = os.path.join(self.root, self.names[rows[i]])

            def cut(image):
                if draws is None:
                    return self._centre(image)
                part = image.crop(inception_box(*image.size, draws[i], smallest))
                return part.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)

            image = read_upright(path, cut, Image, ImageOps, found)
            images[i] = image[:, ::-1] if self.flip else image

        with ThreadPoolExecutor(self.threads, thread_name_prefix="minivit-images") as pool:
            list(pool.map(fill, range(len(rows))))
        if found and not self._transparent:
            self._transparent.append(min(found))
            note(f"transparent parts of images are put on white, first in {self._transparent[0]}")
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
        others["transparent"] = self._transparent
        return LazyImages(self.root, names, sizes, self.image_size, **others)

    def mirror(self):
        """The same images, left and right exchanged."""
        return self._like(self.names, self.sizes, not self.flip)

    def take(self, rows):
        """Some of the images, by their numbers or a slice."""
        rows = self._rows[rows]
        return self._like([self.names[i] for i in rows], [self.sizes[i] for i in rows], self.flip)


def load_imagefolder(data_dir, image_size=224, *, test_share=None, split_seed=0, preprocessing=None):
    """A folder of images as a `Dataset` whose images are `LazyImages`; only names and lengths of files are read.

    Test images are those of ``val``, or where there is no such folder of ``test``; or with ``test_share`` that share of
    the images of each class, see `minivit.data.folder.find_images`. Hidden files and other endings than images' are
    left out, and told.
    Raises  InputError: folders, images or classes are missing, or a list has no reading.
    """
    found = find_images(
        data_dir, ("val", "test"), test_share=test_share, split_seed=split_seed, listed=_listed
    )  # fmt: skip
    others = {"transparent": [], "preprocessing": preprocessing}  # those told of are of both
    train, test = (
        LazyImages(found.root, [name for name, _ in files], [size for _, size in files], image_size, **others)
        for files in (found.train, found.test)
    )
    return Dataset(
        "imagefolder", train, found.train_labels, test, found.test_labels, found.classes, found.source,
        names_of(found.test),
    )  # fmt: skip


def _listed(root, folder, class_names, left_out):
    """(images, labels) of a folder that holds its images itself, by its list; None where it has class folders."""
    lists = [root / f"{folder.name}.txt", root / f"{folder.name}.csv", root / "LOC_val_solution.csv"]
    lists = [path for path in lists if path.is_file()]
    if any(path.is_dir() and not is_hidden(path.name) for path in folder.iterdir()):
        if lists:
            raise InputError(f"{folder} has class folders, so that {lists[0]} has no effect: move one of them away")
        return None
    if not (files := images_below(root, folder, left_out)):
        return None
    if len(lists) > 1:
        raise InputError(f"{lists[0]} and {lists[1]} both list the images of {folder}: move one of them away")
    path = lists[0] if lists else root / f"{folder.name}.txt"
    return files, labels_of_list(path, [name for name, _ in files], class_names)
