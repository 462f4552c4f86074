"""Pictures at another size: bilinear, smoothed where they shrink, the same bits on every machine."""

import os

import numpy as np

from minivit.base.errors import InputError
from minivit.weights.resize import interpolation

LARGEST = 4096  # pixels
ONE = 2.0**16  # what weights are whole multiples of 1 / ONE of
CHUNK = 2**22  # bytes of a chunk's result


def check_size(image_size):
    """Raises InputError if the pictures cannot be made that large."""
    if not 1 <= image_size <= LARGEST:
        raise InputError(f"image size {image_size} is out of range; choose 1 to {LARGEST}")


def scaled(images, image_size):
    """Pictures made ``image_size`` high and wide; the same array if they are that already.

    Math    each channel becomes M x M^T, M the matrix of `minivit.weights.resize` "bilinear-antialias" with entries rounded to
            16 bits behind the point, and is then rounded, up at a half. All sums are of whole numbers below 2^53 and so
            exact: a run that goes on elsewhere finds the same pictures.
    Shapes  images (n, H, H, C) uint8  ->  (n, image_size, image_size, C) uint8
    Raises  InputError: the size is out of range, the pictures are not square or would not fit into memory.
    """
    n, H, W, C = images.shape
    check_size(image_size)
    if H != W:
        raise InputError(f"pictures of {H}x{W} are not square and cannot be scaled to {image_size}x{image_size}")
    if H == image_size:
        return images
    _check_memory(n * image_size**2 * C, image_size)
    M = np.rint(interpolation(image_size, H, "bilinear-antialias") * ONE)
    out = np.empty((n, image_size, image_size, C), np.uint8)
    step = max(1, CHUNK // (image_size**2 * C))
    for i in range(0, n, step):
        x = images[i : i + step].transpose(0, 3, 1, 2).astype(np.float64, order="C")  # (b, C, H, H)
        x = x.reshape(-1, H) @ M.T  # (b C H, size)
        x = M @ x.reshape(-1, H, image_size)  # (b C, size, size)
        x *= ONE**-2
        x += 0.5
        pixels = x.astype(np.uint8).reshape(-1, C, image_size, image_size)  # above 0: cut off is rounded down
        out[i : i + step] = pixels.transpose(0, 2, 3, 1)
    return out


def _check_memory(size, image_size):
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if size > memory:
            raise InputError(
                f"the pictures take {1e-9 * size:,.1f} GB at {image_size}x{image_size}, this machine has "
                f"{1e-9 * memory:,.1f}; choose a smaller image size"
            )
