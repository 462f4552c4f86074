"""Folders of small images, as ImageNet's are, for tests."""

import numpy as np
import pytest
from PIL import Image

from minivit.base.errors import InputError
from minivit.data import load

CLASSES = ("n01440764", "n01443537", "n02102040")
SIZES = ((40, 28), (25, 25), (20, 50), (33, 31))  # width, height


def noise(seed, size):
    """Smooth noise, so that every part of it looks different: (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def save(path, seed=0, size=(25, 25)):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise(seed, size).save(path, "PNG")
    return path


def make_images(folder):
    """Four training and two validation images of each of three classes."""
    number = 0
    for k, name in enumerate(CLASSES):
        for i, size in enumerate(SIZES):
            save(folder / "train" / name / f"{name}_{i}.JPEG", 10 * k + i, size)
        for i in range(2):
            number += 1
            save(folder / "val" / name / f"ILSVRC2012_val_{number:08d}.JPEG", 100 + 10 * k + i, SIZES[i])
    return folder


def refused(pattern, root):
    with pytest.raises(InputError, match=pattern) as caught:
        load("imagefolder", root)
    assert "\n" not in str(caught.value)
