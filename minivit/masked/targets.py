"""What is hidden of images, what was there, and images painted with guesses."""

import numpy as np

from minivit.base.backend import array_module
from minivit.layers.patch_embed import patchify, unpatchify
from minivit.masked.config import EPS, LEVELS, SIDE, classes, predicted_count
from minivit.model import pixels


def draw_plan(config, masked, count, rng):
    """What happens to the patches of ``count`` images, drawn from a Generator of the host.

    Shapes  ->  plan (count, 2, N) int64. plan[:, 0] is a random order of the patches; the first n are predicted.
            plan[:, 1] holds for each place the patch that it shows, N for the mask (mae: all as they are).
    """
    N, n = config.grid_size**2, predicted_count(config, masked)
    order = np.argsort(rng.random((count, N)), axis=1)
    source = np.tile(np.arange(N), (count, 1))
    if masked.method == "mpp":
        chosen = order[:, :n]
        dice = rng.random((count, n))
        other = (chosen + rng.integers(1, N, (count, n))) % N
        shown = np.where(dice < masked.mask_share + masked.random_share, other, chosen)
        np.put_along_axis(source, chosen, np.where(dice < masked.mask_share, N, shown), axis=1)
    return np.stack([order, source], axis=1)


def colour_classes(colours):
    """Colours as classes: 3 bits per channel, the first channel the highest.

    Math    sum_c floor(v_c / 32) * 8^(C - 1 - c)
    Shapes  colours (..., C) from 0 to 255  ->  (...,) int64
    """
    xp = array_module(colours)
    levels = xp.clip(xp.floor(colours / (256 // LEVELS)), 0, LEVELS - 1).astype(np.int64)
    result = levels[..., 0]
    for channel in range(1, colours.shape[-1]):
        result = LEVELS * result + levels[..., channel]
    return result


def class_colours(labels, channels):
    """The colours in the middle of their classes: what `colour_classes` cannot tell from one another.

    Shapes  labels (...,) integers  ->  (..., C) float64 from 0 to 255
    """
    levels = np.stack([labels // LEVELS ** (channels - 1 - c) % LEVELS for c in range(channels)], axis=-1)
    return (levels + 0.5) * (256 // LEVELS)


def patch_targets(images, config, masked, dtype=np.float32):
    """What is to be predicted of every patch.

    Shapes  images (B, H, W, C) uint8, or floats scaled to -1..1  ->  (B, N) classes, (B, N, 16) classes with target
            "downsized", or (B, N, P * P * C) numbers for regression
    """
    P, C = config.patch_size, config.channels
    x = pixels(images, dtype)
    if not classes(config, masked):
        x = patchify(x, P)
        if masked.target == "normalised":
            x = x - x.mean(axis=-1, keepdims=True)
            x /= _standard_deviation(x)
        return x
    # sums of whole numbers are exact, so that a mean on the edge of two levels belongs to the upper one
    x = images.astype(dtype) if images.dtype == np.uint8 else x * 127.5 + 127.5
    B, N = len(x), config.grid_size**2
    if masked.target == "colour":
        return colour_classes(patchify(x, P).reshape(B, N, P * P, C).mean(axis=2))
    cells = patchify(x, P).reshape(B, N, SIDE, P // SIDE, SIDE, P // SIDE, C)
    return colour_classes(cells.mean(axis=(3, 5))).reshape(B, N, SIDE * SIDE)


def _standard_deviation(centred):
    """Of the last axis, with n - 1, and with `EPS`."""
    xp = array_module(centred)
    return xp.sqrt((centred * centred).sum(axis=-1, keepdims=True) / max(centred.shape[-1] - 1, 1) + EPS)


def shown(images, plan, config, masked):
    """The images as the model sees them: grey where a patch is hidden, another patch where one was exchanged.

    Shapes  images (B, H, W, C) uint8, plan (B, 2, N), on the host  ->  (B, H, W, C) uint8
    """
    patches = patchify(images, config.patch_size)  # (B, N, P * P * C)
    grey = np.full_like(patches[:, :1], 127)
    source = plan[:, 1].copy()
    if masked.method == "mae":
        np.put_along_axis(source, plan[:, 0, : predicted_count(config, masked)], config.grid_size**2, axis=1)
    patches = np.take_along_axis(np.concatenate([patches, grey], axis=1), source[:, :, None], axis=1)
    return unpatchify(patches, images.shape, config.patch_size)


def painted(images, plan, values, config, masked):
    """The images with predictions, or targets, in the place of the n patches.

    Shapes  images (B, H, W, C) uint8, plan (B, 2, N), values (B, n, outputs) predicted or targets of n patches, on the
            host  ->  (B, H, W, C) uint8
    Classes are painted in the colour of their middle. Normalised pixels get the mean and the standard deviation that
    the patch really has, as in the MAE paper's figures: the model does not say them.
    """
    P, C, n = config.patch_size, config.channels, predicted_count(config, masked)
    chosen = plan[:, 0, :n, None]
    patches = patchify(images, P)  # (B, N, P * P * C)
    B = len(images)
    if K := classes(config, masked):
        labels = values if values.dtype.kind == "i" else values.reshape(B, n, -1, K).argmax(axis=-1)
        side = SIDE if masked.target == "downsized" else 1
        colours = class_colours(labels.reshape(B, n, side, side), C)
        colours = colours.repeat(P // side, axis=2).repeat(P // side, axis=3).reshape(B, n, P * P * C)
    else:
        if masked.target == "normalised":
            true = np.take_along_axis(patchify(pixels(images, np.float64), P), chosen, axis=1)
            mean = true.mean(axis=-1, keepdims=True)
            values = values * _standard_deviation(true - mean) + mean
        colours = values * 127.5 + 127.5
    np.put_along_axis(patches, chosen, np.clip(np.rint(colours), 0, 255).astype(np.uint8), axis=1)
    return unpatchify(patches, images.shape, P)
