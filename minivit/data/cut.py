"""Image files as another program cuts them: its filter, its rounding, its crop; see `minivit.weights.preprocessing`.

Pillow's resizing is Pillow's own. torchvision's, of bytes, is this: the output i of n lies at c = (i + 1/2) r with
r = o / n, takes the inputs j from floor(c - s + 1/2) up to floor(c + s + 1/2), s being the filter's support times
max(1, r), with weights k((j + 1/2 - c) / max(1, r)) that are divided by their sum; weights are rounded to p binary
places, p so that the largest has 15 bits; sums are of whole numbers, rounded up at a half, and cut off at 0 and 255.
Rows first, then columns.
"""

from __future__ import annotations

from functools import lru_cache, partial

import numpy as np

from minivit.base.errors import InputError

CHUNK, BLOCK = 2**22, 16  # numbers of a product's left side; outputs that are made at a time


def _bilinear(t):
    return np.maximum(0.0, 1.0 - np.abs(t))


def _bicubic(t, a=-0.5):
    t = np.abs(t)
    near, far = ((a + 2.0) * t - (a + 3.0)) * t * t + 1.0, (((t - 5.0) * t + 8.0) * t - 4.0) * a
    return np.where(t < 1.0, near, np.where(t < 2.0, far, 0.0))


def _lanczos(t):
    return np.where(np.abs(t) < 3.0, np.sinc(t) * np.sinc(t / 3.0), 0.0)


KERNELS = {"bilinear": (_bilinear, 1.0), "bicubic": (_bicubic, 2.0), "lanczos": (_lanczos, 3.0)}  # and supports


@lru_cache(maxsize=64)
def byte_weights(n, o, resample):
    """torchvision's matrix that resizes o bytes to n, and its binary places.

    Shapes  ->  (n, o) float64 of whole numbers, p
    """
    kernel, support = KERNELS[resample]
    r = o / n
    stretch = max(1.0, r)
    centre = (np.arange(n) + 0.5) * r
    first = np.maximum((centre - support * stretch + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + support * stretch + 0.5).astype(np.int64), o)
    j = np.arange(o)
    M = kernel((j + 0.5 - centre[:, None]) / stretch)
    M[(j < first[:, None]) | (j >= last[:, None])] = 0.0
    M /= M.sum(axis=1, keepdims=True)
    places = next(p for p in range(23) if p == 22 or int(0.5 + M.max() * 2 ** (p + 1)) >= 2**15)
    M *= 2**places
    return np.trunc(M + np.copysign(0.5, M)), places


def resize_bytes(image, height, width, resample):
    """An image as torchvision resizes it.

    Shapes  image (H, W, C) uint8  ->  (height, width, C) uint8
    """
    if resample == "nearest":
        rows, columns = (
            np.minimum(((np.arange(n) + 0.5) * np.float32(o / n)).astype(np.int64), o - 1)
            for n, o in ((height, image.shape[0]), (width, image.shape[1]))
        )
        return image[rows][:, columns]
    for axis, n in ((1, width), (0, height)):
        if image.shape[axis] != n:
            image = np.moveaxis(_resize_last(np.moveaxis(image, axis, -1), n, resample), -1, axis)
    return np.ascontiguousarray(image)


def _resize_last(image, n, resample):
    M, places = byte_weights(n, image.shape[-1], resample)
    rows = image.reshape(-1, image.shape[-1])
    out = np.empty((len(rows), n), np.uint8)
    step = max(1, CHUNK // rows.shape[1])
    for k in range(0, n, BLOCK):  # so many outputs read few of the inputs, which are neighbours
        used = np.flatnonzero(M[k : k + BLOCK].any(axis=0))
        part = slice(used[0], used[-1] + 1)
        for i in range(0, len(rows), step):
            y = rows[i : i + step, part].astype(np.float64) @ M[k : k + BLOCK, part].T
            y = np.floor((y + 2 ** (places - 1)) * 2.0**-places)
            out[i : i + step, k : k + BLOCK] = np.clip(y, 0, 255)
    return out.reshape(*image.shape[:-1], n)


def resized_size(p, height, width):
    """Height and width of an image once it is resized as a `Preprocessing` says."""
    if p.resize == "none":
        return height, width
    if p.resize == "squash":
        return p.size
    if p.resize == "short":
        side, short, long = min(p.size), min(height, width), max(height, width)
        return (int(side * height / width), side) if width == short else (side, int(side * long / short))
    ratios = height / p.size[0], width / p.size[1]
    ratio = min(ratios) if p.resize == "cover" else max(ratios)
    return max(1, round(height / ratio)), max(1, round(width / ratio))


def centre(image, size, fill, program):
    """The part of an image at its centre, filled up where the image is smaller.

    Shapes  image (H, W, 3), size (h, w)  ->  (h, w, 3)
    """
    around = []
    for side, wanted in zip(image.shape, size, strict=False):
        lack = max(0, wanted - side)
        around.append((lack // 2, (lack + 1) // 2))
    if any(map(any, around)):
        padded = np.empty((*(side + sum(a) for side, a in zip(image.shape, around, strict=False)), 3), np.uint8)
        padded[...] = fill
        (top, _), (left, _) = around
        padded[top : top + image.shape[0], left : left + image.shape[1]] = image
        image = padded
    half = round if program == "pillow" else int
    top, left = (half((side - wanted) / 2) for side, wanted in zip(image.shape, size, strict=False))
    return image[top : top + size[0], left : left + size[1]]


def cut_as(preprocessing):
    """How images are cut as a `Preprocessing` says: (image_size, Image, ImageOps) -> (RGB image -> array).

    The array is (image_size, image_size, 3) uint8.
    Raises  InputError (when an image is cut): it does not come to the model's size.
    """
    return partial(_cut, preprocessing)


def _cut(p, image_size, Image, _):
    def cut(image):
        height, width = resized_size(p, image.height, image.width)
        if height * width > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"it would be resized to {width} x {height} pixels")
        if (height, width) != (image.height, image.width):
            if p.program == "pillow":
                image = image.resize((width, height), Image.Resampling[p.resample.upper()])
            else:
                image = resize_bytes(np.asarray(image), height, width, p.resample)
        image = np.asarray(image)
        if p.crop:
            image = centre(image, p.crop, p.fill, p.program)
        if image.shape[:2] != (image_size, image_size):
            raise InputError(
                f"it has {image.shape[0]} x {image.shape[1]} pixels and its model's program resizes none; the model "
                f"takes {image_size} x {image_size}"
            )
        return image

    return cut
