"""Data sets: ``load(name, data_dir)`` gives arrays, ``batches`` in ``loader`` gives augmented batches.

====================  ===================================================  ============
name                  pictures                                             where from
====================  ===================================================  ============
digits                1,797 handwritten digits, 8 x 8 x 1                  shipped
cifar10, cifar100     60,000 photographs, 32 x 32 x 3                      ``data_dir``
folder                your own, ``data_dir/{train,test}/CLASS/*.png``      ``data_dir``
imagefolder           the same or ImageNet, read as they are needed        ``data_dir``
====================  ===================================================  ============
"""

from minivit.data.augment import (
    CROP_MODES,
    augment,
    random_affine,
    random_crop,
    random_cutout,
    random_erasing,
    random_flip,
)
from minivit.data.cifar import fetch, load_cifar
from minivit.data.dataset import Dataset, first, is_lazy, mirrored, validated
from minivit.data.digits import load_digits
from minivit.data.folder import load_folder, read_image
from minivit.data.imagefolder import LazyPictures, load_imagefolder
from minivit.data.loader import batches, epoch_order, is_epoch_order
from minivit.data.mixing import cutmix, mix, mixup
from minivit.data.operations import POLICIES, auto_augment, operate, rand_augment, trivial_augment
from minivit.errors import InputError

DATASETS = ("digits", "cifar10", "cifar100", "folder", "imagefolder")
FOLDERS = ("folder", "imagefolder")  # whose pictures have no size of their own

__all__ = [
    "CROP_MODES",
    "DATASETS",
    "FOLDERS",
    "POLICIES",
    "Dataset",
    "LazyPictures",
    "augment",
    "auto_augment",
    "batches",
    "cutmix",
    "epoch_order",
    "fetch",
    "first",
    "is_epoch_order",
    "is_lazy",
    "load",
    "mirrored",
    "mix",
    "mixup",
    "operate",
    "rand_augment",
    "random_affine",
    "random_crop",
    "random_cutout",
    "random_erasing",
    "random_flip",
    "read_image",
    "trivial_augment",
]


def load(name, data_dir="data", *, image_size=None):
    """Load one of the ``DATASETS`` into memory; of "imagefolder" the names alone.

    ``data_dir`` is where the data lie; the digits ship with the package and ignore it. ``image_size`` is the height and
    width that pictures of a folder are brought to (default 32, of an imagefolder 224); the other sets have one size
    each.

    Returns  Dataset
    Raises   InputError: unknown name; data that are missing or damaged; an ``image_size`` that is not the set's own.
    """
    if name == "folder":
        return validated(load_folder(data_dir, 32 if image_size is None else image_size))
    if name == "imagefolder":
        return validated(load_imagefolder(data_dir, 224 if image_size is None else image_size))
    if name == "digits":
        dataset = load_digits()
    elif name in ("cifar10", "cifar100"):
        dataset = load_cifar(name, data_dir)
    else:
        raise InputError(f"unknown data set {name!r}; choose one of {', '.join(DATASETS)}")
    size = dataset.train_images.shape[1]
    if image_size not in (None, size):
        raise InputError(f"{name} pictures are {size}x{size}, not {image_size}x{image_size}; leave the image size out")
    return validated(dataset)
