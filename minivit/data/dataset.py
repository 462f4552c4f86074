"""The form of every data set, and the checks that each has passed."""

from typing import NamedTuple

import numpy as np

from minivit.base.errors import InputError


class Dataset(NamedTuple):
    """Images and labels of one data set, split for training and testing.

    Shapes  images (n, H, W, C) uint8 in 0..255, labels (n,) int64 in [0, K), K = ``len(class_names)``
    """

    name: str
    train_images: np.ndarray  # (n, H, W, C) uint8
    train_labels: np.ndarray  # (n,) int64
    test_images: np.ndarray  # (m, H, W, C) uint8
    test_labels: np.ndarray  # (m,) int64
    class_names: tuple[str, ...]  # K names
    source: str  # one line: where the data came from
    test_names: tuple[str, ...] = ()  # m names of files, where the test images were files


def is_lazy(images):
    """Whether images are files that are read when a batch needs them (`minivit.data.imagefolder`), not an array."""
    return hasattr(images, "read")


def take(images, rows):
    """Some of the images, by their numbers or a slice; those that are files stay files."""
    return images.take(rows) if is_lazy(images) else images[rows]


def check_dataset(dataset):
    """The data set itself, once its parts are known to fit together.

    Raises  InputError: a split is empty, or its shapes, dtypes or labels are not those that `Dataset` promises.
    """
    splits = {
        "training": (dataset.train_images, dataset.train_labels),
        "test": (dataset.test_images, dataset.test_labels),
    }
    classes = len(dataset.class_names)
    for split, (images, labels) in splits.items():
        where = f"{dataset.name} ({dataset.source}): the {split} split"
        if split == "training" and is_lazy(images) and not len(labels):
            continue  # these data are for tests alone
        if not len(labels):
            raise InputError(f"{where} is empty; give it at least one image")
        if images.dtype != np.uint8 or images.ndim != 4 or labels.dtype != np.int64:
            raise InputError(
                f"{where} holds {images.dtype} {images.shape} images and {labels.dtype} labels;"
                " expected uint8 (n, H, W, C) and int64"
            )
        if labels.shape != images.shape[:1] or images.shape[1:] != dataset.train_images.shape[1:]:
            raise InputError(
                f"{where} holds {labels.shape} labels for {images.shape} images; expected one label"
                f" for each image of shape {dataset.train_images.shape[1:]}"
            )
        if labels.min() < 0 or labels.max() >= classes:
            raise InputError(f"{where} has labels from {labels.min()} to {labels.max()}; expected 0 to {classes - 1}")
    return dataset


def with_train_share(dataset, share):
    """A share of the training images, drawn at random, always the same ones: a smaller share is part of a larger one.

    Raises  InputError: the share is not above 0 and at most 1, or leaves no image.
    """
    count = round(share * len(dataset.train_labels)) if 0 < share <= 1 else 0
    if not count:
        raise InputError(
            f"train_share {share} of the {len(dataset.train_labels):,} training images of {dataset.name} keeps none: "
            "give more, up to 1"
        )
    rows = np.sort(np.random.default_rng(0).permutation(len(dataset.train_labels))[:count])
    return dataset._replace(
        train_images=take(dataset.train_images, rows), train_labels=dataset.train_labels[rows],
        source=f"{dataset.source}; {count:,} of {len(dataset.train_labels):,} training images",
    )  # fmt: skip
