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

from minivit.base.errors import InputError
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
from minivit.data.classes import parse_classes, with_classes
from minivit.data.dataset import Dataset, chosen, is_lazy, mirrored, validated, with_train_share
from minivit.data.digits import load_digits
from minivit.data.folder import load_folder, read_image
from minivit.data.imagefolder import LazyPictures, load_imagefolder
from minivit.data.loader import batches, epoch_order, is_epoch_order
from minivit.data.mixing import cutmix, mix, mixup
from minivit.data.operations import POLICIES, auto_augment, operate, rand_augment, trivial_augment
from minivit.data.scaling import scaled

DATASETS = ("digits", "cifar10", "cifar100", "folder", "imagefolder")
FOLDERS = ("folder", "imagefolder")  # whose pictures have no size of their own

__all__ = [
    "CROP_MODES",
    "DATASETS",
    "Dataset",
    "FOLDERS",
    "LazyPictures",
    "POLICIES",
    "augment",
    "auto_augment",
    "batches",
    "chosen",
    "cutmix",
    "epoch_order",
    "fetch",
    "is_epoch_order",
    "is_lazy",
    "load",
    "mirrored",
    "mix",
    "mixup",
    "operate",
    "parse_classes",
    "rand_augment",
    "random_affine",
    "random_crop",
    "random_cutout",
    "random_erasing",
    "random_flip",
    "read_image",
    "scaled",
    "trivial_augment",
    "with_classes",
    "with_train_share",
]


def load(name, data_dir="data", *, image_size=None, classes=None, train_share=None):
    """Load one of the ``DATASETS`` into memory; of "imagefolder" the names alone.

    ``data_dir`` is where the data lie; the digits ship with the package and ignore it. ``image_size`` is the height and
    width that pictures are brought to: those of folders as they are read (default 32, of an imagefolder 224), others,
    which have one size each, by `scaled`. ``classes`` are those that are kept, such as "0-4" or "cat,dog" (see
    `parse_classes`); ``train_share`` is the share of the training pictures that is kept (see `with_train_share`).

    Returns  Dataset
    Raises   InputError: unknown name; data that are missing or damaged; an impossible size; unknown classes.
    """
    if name == "folder":
        dataset = load_folder(data_dir, 32 if image_size is None else image_size)
    elif name == "imagefolder":
        dataset = load_imagefolder(data_dir, 224 if image_size is None else image_size)
    elif name == "digits":
        dataset = load_digits()
    elif name in ("cifar10", "cifar100"):
        dataset = load_cifar(name, data_dir)
    else:
        raise InputError(f"unknown data set {name!r}; choose one of {', '.join(DATASETS)}")
    validated(dataset)
    if classes is not None:
        dataset = validated(with_classes(dataset, classes))
    if train_share is not None:
        dataset = with_train_share(dataset, train_share)
    size = dataset.train_images.shape[1]
    if image_size in (None, size):
        return dataset
    return dataset._replace(
        train_images=scaled(dataset.train_images, image_size), test_images=scaled(dataset.test_images, image_size),
        source=f"{dataset.source}; scaled from {size}x{size}",
    )  # fmt: skip
