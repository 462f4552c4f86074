"""Data sets: ``load(name, data_dir)`` gives arrays, ``batches`` in ``loader`` gives augmented batches.

====================  ===================================================  ============
name                  images                                               where from
====================  ===================================================  ============
digits                1,797 handwritten digits, 8 x 8 x 1                  shipped
cifar10, cifar100     60,000 photographs, 32 x 32 x 3                      ``data_dir``
folder                your own, ``data_dir/{train,test}/CLASS/*.png``, or  ``data_dir``
                      ``data_dir/CLASS/*.png`` to be split
imagefolder           the same or ImageNet, read as they are needed        ``data_dir``
====================  ===================================================  ============
"""

from minivit.base.errors import InputError
from minivit.data.augment import (
    CROP_MODES,
    augment,
    random_affine,
    random_crop,
    random_erasing,
)
from minivit.data.cifar import fetch, load_cifar
from minivit.data.classes import parse_classes, with_classes
from minivit.data.dataset import Dataset, check_dataset, is_lazy, take, with_train_share
from minivit.data.digits import load_digits
from minivit.data.flip import mirror, random_flip, with_mirror_images
from minivit.data.folder import load_folder, read_image
from minivit.data.imagefolder import LazyImages, load_imagefolder
from minivit.data.loader import batches, epoch_order, is_epoch_order
from minivit.data.mixing import cutmix, mix, mixup
from minivit.data.operations import POLICIES, auto_augment, operate, rand_augment, trivial_augment
from minivit.data.size import resize_images

DATASETS = ("digits", "cifar10", "cifar100", "folder", "imagefolder")
FOLDERS = ("folder", "imagefolder")  # whose images have no size of their own

__all__ = [
    "CROP_MODES",
    "DATASETS",
    "Dataset",
    "FOLDERS",
    "LazyImages",
    "POLICIES",
    "augment",
    "auto_augment",
    "batches",
    "check_dataset",
    "cutmix",
    "epoch_order",
    "fetch",
    "is_epoch_order",
    "is_lazy",
    "load",
    "mirror",
    "mix",
    "mixup",
    "operate",
    "parse_classes",
    "rand_augment",
    "random_affine",
    "random_crop",
    "random_erasing",
    "random_flip",
    "read_image",
    "resize_images",
    "take",
    "trivial_augment",
    "with_classes",
    "with_mirror_images",
    "with_train_share",
]


def load(
    name, data_dir="data", *, image_size=None, classes=None, train_share=None, test_share=None, split_seed=0,
    preprocessing=None,
):  # fmt: skip
    """Load one of the ``DATASETS`` into memory; of "imagefolder" the names alone.

    ``data_dir`` is where the data lie; the digits ship with the package and ignore it. ``image_size`` is the height and
    width of the images: folders are read at this size (default 32, of an imagefolder 224), the images of other data,
    which have one size each, are resized by `resize_images`. ``classes`` are those to keep, such as "0-4" or "cat,dog"
    (see `parse_classes`); ``train_share`` is the share of the training images to keep (see `with_train_share`).
    ``test_share`` splits the images of folders that are not split, by ``split_seed`` (see `folder.find_images`).
    ``preprocessing`` is how a model of another program has its images cut from the files of a folder.

    Returns  Dataset
    Raises   InputError: unknown name; data that are missing or damaged; an impossible size or share; unknown classes.
    """
    if test_share is not None and name in DATASETS and name not in FOLDERS:
        raise InputError(f"test_share {test_share:g} (--test-share) has no effect: {name} has test images of its own")
    split = {"test_share": test_share, "split_seed": split_seed}
    if name == "folder":
        dataset = load_folder(data_dir, 32 if image_size is None else image_size, preprocessing=preprocessing, **split)
    elif name == "imagefolder":
        dataset = load_imagefolder(
            data_dir, 224 if image_size is None else image_size, preprocessing=preprocessing, **split
        )
    elif name == "digits":
        dataset = load_digits()
    elif name in ("cifar10", "cifar100"):
        dataset = load_cifar(name, data_dir)
    else:
        raise InputError(f"unknown data set {name!r}; choose one of {', '.join(DATASETS)}")
    check_dataset(dataset)
    if classes is not None:
        dataset = check_dataset(with_classes(dataset, classes))
    if train_share is not None:
        dataset = with_train_share(dataset, train_share)
    size = dataset.train_images.shape[1]
    if image_size in (None, size):
        return dataset
    return dataset._replace(
        train_images=resize_images(dataset.train_images, image_size),
        test_images=resize_images(dataset.test_images, image_size),
        source=f"{dataset.source}; resized from {size}x{size}",
    )  # fmt: skip
