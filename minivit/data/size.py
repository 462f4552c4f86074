"""Images at another size: bilinear, smoothed where they shrink, the same bits on every machine."""

import os

import numpy as np

from minivit.base.errors import InputError
from minivit.weights.resize import interpolation

LARGEST = 4096  # pixels
ONE = 2.0**16  # weights are whole multiples of 1 / ONE
CHUNK = 2**22  # bytes of a chunk's result


def check_size(image_size):
    """Raises InputError unless images can have this height and width."""
    if not 1 <= image_size <= LARGEST:
        raise InputError(f"image size {image_size} is out of range; choose 1 to {LARGEST}")


def resize_images(images, image_size):
    """Images at a height and width of ``image_size``; the same array if that is their size already.

    Math    each channel x becomes M @ x @ M^T and is then rounded, up at a half. M is the "bilinear-antialias" matrix
            of `minivit.weights.resize` with entries rounded to 16 binary places. All sums are of whole numbers below
            2^53 and therefore exact: a run that goes on elsewhere has the same images.
    Shapes  images (n, H, H, C) uint8  ->  (n, image_size, image_size, C) uint8
    Raises  InputError: the size is out of range, the images are not square or would not fit into memory.
    """
    n, H, W, C = images.shape
    check_size(image_size)
    if H != W:
        raise InputError(f"images of {H}x{W} are not square and cannot be resized to {image_size}x{image_size}")
    if H == image_size:
        return images
    _check_memory(n * image_size**2 * C, image_size)
    M = np.rint(interpolation(image_size, H, "bilinear-antialias") * ONE)
    out = np.empty((n, image_size, image_size, C), np.uint8)
    step = max(1, CHUNK // (image_size**2 * C))
    for i in range(0, n, step):
        x = images[i : i + step].transpose(0, 3, 1, 2).astype(np.float64, order="C")  # (b, C, H, H)
        wide = x.reshape(-1, H) @ M.T  # x @ M^T, (b C H, size)
        y = M @ wide.reshape(-1, H, image_size)  # (b C, size, size)
        y *= ONE**-2
        y += 0.5
        pixels = y.astype(np.uint8)  # a conversion cuts off the fraction: it rounds down, since no number is negative
        out[i : i + step] = pixels.reshape(-1, C, image_size, image_size).transpose(0, 2, 3, 1)
    return out


def _check_memory(size, image_size):
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if size > memory:
            raise InputError(
                f"the images take {1e-9 * size:,.1f} GB at {image_size}x{image_size}, this machine has "
                f"{1e-9 * memory:,.1f}; choose a smaller image size"
            )
