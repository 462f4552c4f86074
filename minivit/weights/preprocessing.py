"""How a model's images are made from files: size, filter, crop, and the numbers that its pixels become.

The order is that of all programs: resize, cut, rescale, normalise. `minivit.data.cut` does the first two. The last two
are linear, u = (rescale x - mean) / std of a pixel x in 0..255, and become part of the patch embedding when weights are
read; what is left then is ours, ``HALF``.

    resize    none       images are of the right size already
              squash     to ``size``, whatever the shape of the image
              short      the shorter side to the least of ``size``, the other in proportion, its fraction cut off
              cover      in proportion, so that ``size`` is just covered; sides rounded
              inside     in proportion, so that the image just lies in ``size``; sides rounded
    crop      the part at the centre, with ``fill`` around an image that is smaller; None where nothing is cut
    program   whose arithmetic is followed: "pillow" (timm) or "torchvision" (transformers). Both are of whole numbers;
              weights have 22 binary places or 15 in all, and halves of an odd rest at the crop are rounded or cut off.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from minivit.base.errors import InputError

RESIZES = ("none", "squash", "short", "cover", "inside")
FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # Pillow's numbers
PROGRAMS = ("pillow", "torchvision")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std of its pixels, red, green, blue, in 0..1
HALF = ((0.5,), (0.5,))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
PIXELS = {"half": HALF, "imagenet": IMAGENET, "clip": CLIP}


class Preprocessing(NamedTuple):
    """How an image file becomes what a model takes; see the head of this file."""

    program: str = "pillow"
    resize: str = "none"
    size: tuple = ()  # height, width
    resample: str = "bicubic"
    crop: tuple | None = None  # height, width
    fill: tuple = (0, 0, 0)  # red, green, blue
    rescale: float = 1 / 255
    mean: tuple = HALF[0]  # one number, or one for each channel
    std: tuple = HALF[1]

    @property
    def output(self):
        """Height and width of its images, or None where they are those of the files."""
        fixed = self.size if self.resize == "squash" else None
        return self.crop or fixed

    @property
    def is_ours(self):
        """Are pixels the numbers of minivit, x / 127.5 - 1?"""
        return self.rescale == 1 / 255 and set(self.mean) == set(self.std) == {0.5}

    @property
    def in_words(self):
        """The pixels' numbers, for a message."""
        mean, std = (np.asarray(each) if len(set(each)) > 1 else each[0] for each in (self.mean, self.std))
        scaled = "" if self.rescale == 1 / 255 else f", of pixels times {self.rescale:.6g}"
        return f"mean {mean}, std {std}{scaled}"

    def folded(self):
        """The same, with pixels as ours: what is left once the patch embedding takes them so."""
        return self._replace(rescale=1 / 255, mean=HALF[0], std=HALF[1])


def own(image_size, *, share=1.0):
    """What minivit itself does with the images of a folder, as another program says it.

    ``share`` is that of the short side which is seen: 1, or 0.875 of an imagefolder.
    """
    side = round(image_size / share)
    return Preprocessing("pillow", "short", (side, side), "bicubic", (image_size, image_size))


def pixels_of(text, channels=None):
    """Mean and std of ``--pixels``: a name of `PIXELS`, MEAN,STD, or all means and then all stds, in 0..1.

    Raises  InputError: it is none of these, or of another number of channels.
    """
    if text in PIXELS:
        return PIXELS[text]
    try:
        numbers = [float(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    half, odd = divmod(len(numbers), 2)
    if not half or odd or not np.isfinite(numbers).all() or min(numbers[half:]) <= 0:
        raise InputError(
            f"--pixels {text}: say {', '.join(PIXELS)}, or MEAN,STD in 0..1 with STD above 0, such as 0.5,0.5, or all "
            "means and then all stds"
        )
    if channels and half not in (1, channels):
        raise InputError(f"--pixels {text} has {half} means, the model {channels} channels")
    return tuple(numbers[:half]), tuple(numbers[half:])


def of_meta(content, where):
    """The `Preprocessing` in a checkpoint's meta, None where there is none.

    Raises  InputError: it is damaged.
    """
    if content is None:
        return None
    try:
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}
        found = Preprocessing(**values)
        sizes = [*found.size, *(found.crop or ())]
        right = (
            found.program in PROGRAMS and found.resize in RESIZES and found.resample in FILTERS.values()
            and len(found.size) == (0 if found.resize == "none" else 2) and len(found.crop or (1, 1)) == 2
            and all(type(side) is int and 0 < side < 2**14 for side in sizes)
            and len(found.fill) == 3 and all(type(value) is int and 0 <= value <= 255 for value in found.fill)
        )  # fmt: skip
    except (TypeError, AttributeError):
        right = False
    if not right:
        raise InputError(f"{where}: what it says of its images' preprocessing is damaged")
    return found
