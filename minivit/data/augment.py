"""Random crops, affine maps and erasing for a whole batch of uint8 images at once, and all augmentations in order.

The arrays may live on the host or on a device; the random numbers always come from a NumPy Generator, so that
the same seed gives the same images everywhere. No function changes its input.
"""

import numpy as np

from minivit.base.backend import array_module
from minivit.data.flip import random_flip
from minivit.data.operations import POLICIES, auto_augment, rand_augment, trivial_augment

CROP_MODES = ("zero", "reflect")  # what `random_crop` moves in from beyond the border


def random_crop(images, padding, rng, *, mode="zero"):
    """Shift each image by up to ``padding`` pixels each way; what moves in is black, or the reflected image.

    It is the usual "pad by 4, crop back to 32 x 32 at a random place" of training on CIFAR: one of the
    (2 * padding + 1)^2 windows of the padded image is drawn at random, the same one in both modes.

    Math    mode "reflect": row -i of the padded image is row i, row H - 1 + i is row H - 1 - i, and so for columns
    Shapes  images (B, H, W, C)  ->  (B, H, W, C) of the same dtype
    Raises  ValueError: unknown mode; a reflection as wide as the image or wider.
    Source  He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385, section 4.2.
    """
    if mode not in CROP_MODES:
        raise ValueError(f"unknown mode {mode!r} of crops; choose one of {', '.join(CROP_MODES)}")
    xp = array_module(images)
    B, H, W, C = images.shape
    p = padding
    canvas = (xp.zeros if mode == "zero" else xp.empty)((B, H + 2 * p, W + 2 * p, C), images.dtype)
    canvas[:, p : p + H, p : p + W] = images
    if mode == "reflect":
        if p >= min(H, W):
            raise ValueError(f"images of {H}x{W} cannot be reflected over {p} pixels")
        canvas[:, :p, p : p + W] = images[:, p:0:-1]
        canvas[:, p + H :, p : p + W] = images[:, : H - 1][:, ::-1][:, :p]
        canvas[:, :, :p] = canvas[:, :, p + 1 : 2 * p + 1][:, :, ::-1]
        canvas[:, :, p + W :] = canvas[:, :, W - 1 : p + W - 1][:, :, ::-1]
    # Pixels and channels share one axis, so that the gather below copies whole rows, W * C bytes at a time.
    canvas = canvas.reshape(B, H + 2 * p, (W + 2 * p) * C)
    down, right = xp.asarray(rng.integers(0, 2 * p + 1, size=(2, B)))
    windows = xp.lib.stride_tricks.sliding_window_view(canvas, (H, W * C), axis=(1, 2))  # a view
    return windows[xp.arange(B), down, right * C].reshape(B, H, W, C)


def random_affine(images, rng, *, rotate=0.0, zoom=0.0, shear=0.0, shift=0.0):
    """Turn, scale, slant and move each image a little, each by its own random amounts.

    Math    every output pixel p (relative to the centre) is read, by bilinear interpolation, at the place
            q = diag(1 + z) R(a) (1, 0; s, 1) p + t of the input, where what lies outside is black;
            angle a in +-rotate degrees, scales z of height and width each in +-zoom (below 1), slant s in +-shear
            (columns move by s pixels per row), displacements t each in +-shift pixels, fractions included
    Shapes  images (B, H, W, C) uint8  ->  (B, H, W, C) uint8
    """
    xp = array_module(images)
    B, H, W, C = images.shape
    angle = xp.asarray(np.deg2rad(rng.uniform(-rotate, rotate, (B, 1, 1))))
    scale_y, scale_x = xp.asarray(1.0 + rng.uniform(-zoom, zoom, (2, B, 1, 1)))
    slant = xp.asarray(rng.uniform(-shear, shear, (B, 1, 1)))
    shift_y, shift_x = xp.asarray(rng.uniform(-shift, shift, (2, B, 1, 1)))
    y, x = xp.arange(H)[:, None] - (H - 1) / 2, xp.arange(W) - (W - 1) / 2  # relative to the centre
    x = x + slant * y  # (B, H, W)
    cos, sin = xp.cos(angle), xp.sin(angle)
    source_y = scale_y * (cos * y - sin * x) + shift_y + (H - 1) / 2  # (B, H, W)
    source_x = scale_x * (sin * y + cos * x) + shift_x + (W - 1) / 2
    # A black frame, and no place farther out than it: then each place has four neighbours to read.
    canvas = xp.zeros((B, H + 3, W + 3, C), xp.float32)
    canvas[:, 1 : H + 1, 1 : W + 1] = images
    source_y, source_x = xp.clip(source_y, -1, H) + 1, xp.clip(source_x, -1, W) + 1
    top, left = source_y.astype(np.int64), source_x.astype(np.int64)  # the floor, since none is negative
    down, right = (source_y - top)[..., None], (source_x - left)[..., None]  # (B, H, W, 1) in [0, 1)
    b = xp.arange(B)[:, None, None]
    upper = (1 - right) * canvas[b, top, left] + right * canvas[b, top, left + 1]  # (B, H, W, C)
    lower = (1 - right) * canvas[b, top + 1, left] + right * canvas[b, top + 1, left + 1]
    return xp.rint((1 - down) * upper + down * lower).astype(images.dtype)


def random_erasing(images, probability, rng):
    """In some of the images, replace the pixels of a random rectangle by noise.

    The noise is uniform in 0 .. 255 for each pixel and channel: of the fillings in the paper this one does best, and
    there is no pattern in it that a network could learn to look for.

    Math    share s of the area uniform in 0.02 .. 1/3, height to width r log-uniform in 0.3 .. 3.3;
            height sqrt(s H W r), width sqrt(s H W / r), rounded, at least 1 and at most the image's; any place
    Shapes  images (B, H, W, C) uint8  ->  (B, H, W, C) uint8
    Source  Zhong et al., "Random Erasing Data Augmentation", arXiv:1708.04896.
    """
    xp = array_module(images)
    B, H, W, C = images.shape
    numbers = np.flatnonzero(rng.random(B) < probability)  # of the images that are changed
    if not len(numbers):
        return images
    n = len(numbers)
    area = H * W * rng.uniform(0.02, 1 / 3, n)
    ratio = np.exp(rng.uniform(np.log(0.3), np.log(3.3), n))
    height = np.clip(np.rint(np.sqrt(area * ratio)), 1, H).astype(int)
    width = np.clip(np.rint(np.sqrt(area / ratio)), 1, W).astype(int)
    top, left = rng.integers(0, H - height + 1), rng.integers(0, W - width + 1)
    noise = rng.integers(0, 256, (n, H, W, C), dtype=np.uint8)
    y, x = np.arange(H), np.arange(W)
    in_rows = (y >= top[:, None]) & (y < (top + height)[:, None])  # (n, H)
    in_columns = (x >= left[:, None]) & (x < (left + width)[:, None])  # (n, W)
    inside = in_rows[:, :, None, None] & in_columns[:, None, :, None]  # (n, H, W, 1)
    rows = xp.asarray(numbers)
    result = images.copy()
    result[rows] = xp.where(xp.asarray(inside), xp.asarray(noise), images[rows])
    return result


def augment(
    images, rng, *, policy="none", rand_count=2, rand_magnitude=9, rotate=0.0, zoom=0.0, shear=0.0, shift=0.0,
    crop_padding=0, crop_mode="zero", flip=False, erasing=0.0,
):  # fmt: skip
    """Policy, affine map, crop, flip, erasing, in this order, each only where its setting is on.

    With none of them, ``images`` itself is returned, and no random number is drawn.

    Shapes  images (B, H, W, C) uint8  ->  (B, H, W, C) uint8
    ``policy`` is one of "none", "trivial", "rand" (of ``rand_count`` operations at ``rand_magnitude``), "auto", see
    `minivit.data.operations`; ``erasing`` is the probability of `random_erasing`. See `random_affine`, `random_crop`,
    `random_flip`; leave ``flip`` off where left and right matter, as with digits.
    Raises  ValueError: unknown policy or crop mode.
    """
    if policy == "trivial":
        images = trivial_augment(images, rng)
    elif policy == "rand":
        images = rand_augment(images, rng, count=rand_count, magnitude=rand_magnitude)
    elif policy == "auto":
        images = auto_augment(images, rng)
    elif policy != "none":
        raise ValueError(f"unknown policy {policy!r}; choose one of {', '.join(POLICIES)}")
    if rotate or zoom or shear or shift:
        images = random_affine(images, rng, rotate=rotate, zoom=zoom, shear=shear, shift=shift)
    if crop_padding:
        images = random_crop(images, crop_padding, rng, mode=crop_mode)
    if flip:
        images = random_flip(images, rng)
    if erasing:
        images = random_erasing(images, erasing, rng)
    return images
