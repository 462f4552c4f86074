"""Images as a model takes them."""

import numpy as np

from minivit.base.backend import array_module
from minivit.base.errors import InputError
from minivit.layers.patch_embed import scale_pixels


def checked_images(images, dtype):
    """Images as the patch embedding takes them: uint8 as it is, floats, which are taken as scaled, of a dtype.

    Shapes  images (B, H, W, C)  ->  (B, H, W, C), uint8 or of the given dtype
    Raises  InputError: images of another integer type; (on the host) a float image that is not finite.
    """
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind in "iub":
        raise InputError(f"images are {images.dtype}; give them as uint8 (0..255), or as floats scaled to -1..1")
    if array_module(images) is np and not np.isfinite(images).all():
        bad = int(np.argmin(np.isfinite(images).reshape(len(images), -1).all(axis=1)))
        raise InputError(f"image {bad} of the batch has a pixel that is NaN or infinite")
    return images.astype(dtype, copy=False)


def check_images(images, model):
    """`checked_images` of the shape and the dtype of a model.

    Raises  InputError: another shape, or what `checked_images` refuses.
    """
    c = model.config
    if images.ndim != 4 or images.shape[1:] != (c.image_size, c.image_size, c.channels):
        expected = f"(B, {c.image_size}, {c.image_size}, {c.channels})"
        raise InputError(f"this model takes images of shape {expected}, got {tuple(images.shape)}")
    return checked_images(images, model.flat.dtype)


def pixels(images, dtype):
    """Images as numbers: uint8 is scaled to (x - 127.5) / 127.5; floats are taken as scaled already.

    Shapes  images (B, H, W, C)  ->  (B, H, W, C) of the given dtype
    Raises  as `checked_images`.
    """
    return scale_pixels(checked_images(images, dtype), dtype)
