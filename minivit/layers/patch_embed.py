r"""Patch embedding, class token and position embedding (Eq. 1 of the ViT paper).

Forward
    An image of H x W pixels and C channels is cut into N = H W / P^2 square patches, read row by row. Each
    patch, flattened in the order (row, column, channel), is mapped to the model's width by one matrix; a
    learned token may be put in front; and a vector that tells the position is added:

        z_0 = [x_class; x_p^1 E; x_p^2 E; ...; x_p^N E] + E_pos,      E in R^(P^2 C x D)                 (Eq. 1)

    The official code writes the same map as a convolution with kernel and stride P. Pictures come as bytes or as
    numbers in -1..1; bytes are scaled once they are cut.

Backward
    The class token and E_pos are broadcast over the batch, so their gradients are sums over it; the class
    token is row 0 of each picture, the patches are the rest. Cutting into patches moves every pixel to
    exactly one place, so its backward moves each gradient back.
"""

from typing import NamedTuple

import numpy as np

from minivit.base.backend import accelerated, array_module
from minivit.layers.linear import LinearCache, linear_backward, linear_forward, linear_jvp


class PatchEmbedCache(NamedTuple):
    """What `patch_embed_backward` reads: the patches and E, and which of the two additions were made."""

    linear: LinearCache  # patches (B, N, P*P*C) and W
    image_shape: tuple
    patch_size: int
    has_class_token: bool
    has_position: bool


def patchify(images, patch_size):
    """Cut images into flattened patches.

    Shapes  images (B, H, W, C)  ->  patches (B, H/P * W/P, P*P*C)
    Patches are read row by row, the entries of each in the order (row, column, channel).
    """
    B, H, W, C = images.shape
    P = patch_size
    patches = images.reshape(B, H // P, P, W // P, P, C).transpose(0, 1, 3, 2, 4, 5)  # (B, H/P, W/P, P, P, C)
    return patches.reshape(B, (H // P) * (W // P), P * P * C)


def scale_pixels(x, dtype):
    """Bytes 0..255 as numbers in -1..1.

    Math    (x - 127.5) / 127.5
    Shapes  x (...), uint8  ->  (...), dtype
    """
    x = x.astype(dtype)
    x -= 127.5
    x /= 127.5
    return x


def unpatchify(patches, image_shape, patch_size):
    """Put flattened patches back together: the inverse of `patchify`, and its backward.

    Shapes  patches (B, N, P*P*C)  ->  images (B, H, W, C) = image_shape
    """
    B, H, W, C = image_shape
    P = patch_size
    images = patches.reshape(B, H // P, W // P, P, P, C).transpose(0, 1, 3, 2, 4, 5)  # (B, H/P, P, W/P, P, C)
    return images.reshape(image_shape)


@accelerated
def patch_embed_forward(images, W, b, cls_token=None, pos_embed=None, *, patch_size):
    """Images to tokens.

    Math    z_0 = [x_class; patches W + b] + E_pos                                                        (Eq. 1)
    Shapes  images (B, H, W, C), uint8 or scaled to -1..1, W (P*P*C, D), b (D,), cls_token (1, 1, D) or None,
            pos_embed (1, N, D) or None  ->  z (B, N, D), where N counts the class token if there is one
    Cache   the patches, W, and the settings
    """
    xp = array_module(images)
    patches = patchify(images, patch_size)  # (B, H/P * W/P, P*P*C)
    if patches.dtype == xp.uint8:
        patches = scale_pixels(patches, W.dtype)
    z, linear_cache = linear_forward(patches, W, b)  # (B, H/P * W/P, D)
    if cls_token is not None:
        first = xp.broadcast_to(cls_token, (len(z), 1, z.shape[-1]))
        z = xp.concatenate([first, z], axis=1)  # (B, N, D), N = 1 + H/P * W/P
    if pos_embed is not None:
        z += pos_embed
    return z, PatchEmbedCache(linear_cache, images.shape, patch_size, cls_token is not None, pos_embed is not None)


@accelerated
def patch_embed_backward(dz, cache, *, need_dimages=True):
    """Backward of `patch_embed_forward`.

    Math    dE_pos = sum_B dz;  dx_class = sum_B dz[:, 0];  dW, db from the rows of the patches
    Shapes  dz (B, N, D)  ->  dimages (B, H, W, C), dW (P*P*C, D), db (D,), dcls_token (1, 1, D), dpos_embed (1, N, D)
    None stands for the gradient of what was not given, and for dimages with ``need_dimages=False``
    (training). dimages is by the scaled pixels, also where bytes were given.
    """
    dcls_token = dpos_embed = None
    # z += pos_embed, broadcast over the batch
    if cache.has_position:
        dpos_embed = dz.sum(axis=0, keepdims=True)  # (1, N, D)
    # z = concatenate([cls_token, z]), the class token broadcast over the batch
    if cache.has_class_token:
        dcls_token = dz[:, :1].sum(axis=0, keepdims=True)  # (1, 1, D)
        dz = dz[:, 1:]  # (B, H/P * W/P, D)
    # z = patches W + b
    dpatches, dW, db = linear_backward(dz, cache.linear, need_dx=need_dimages)
    # patches = patchify(images)
    dimages = unpatchify(dpatches, cache.image_shape, cache.patch_size) if need_dimages else None
    return dimages, dW, db, dcls_token, dpos_embed


def patch_embed_jvp(imagesdot, Wdot, bdot, cls_tokendot, pos_embeddot, cache):
    """Forward-mode derivative of `patch_embed_forward`.

    Math    zdot = [x_classdot; patchesdot W + patches Wdot + bdot] + E_posdot
    Shapes  tangents like the forward's arguments, None for what was not given  ->  zdot (B, N, D)
    """
    xp = array_module(imagesdot)
    zdot = linear_jvp(patchify(imagesdot, cache.patch_size), Wdot, bdot, cache.linear)
    if cache.has_class_token:
        first = xp.broadcast_to(cls_tokendot, (len(zdot), 1, zdot.shape[-1]))
        zdot = xp.concatenate([first, zdot], axis=1)
    if cache.has_position:
        zdot += pos_embeddot
    return zdot


def sincos2d(grid_size, width, *, prefix_tokens=0, temperature=10000.0):
    """The fixed two-dimensional sine-cosine position embedding.

    Math    for the token in row r and column c, and D/4 frequencies w_i = temperature^(-i / (D/4 - 1)):
            [sin(c w), cos(c w), sin(r w), cos(r w)]; prefix tokens (the class token) get zeros
    Shapes  ->  (1, prefix_tokens + grid_size^2, width), float64
    Source  Beyer, Zhai & Kolesnikov 2022, arXiv:2205.01580.
    Raises  ValueError: width is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"a 2-D sine-cosine embedding needs a width that is a multiple of 4, got {width}")
    w = temperature ** -np.linspace(0.0, 1.0, width // 4)  # (D/4,)
    row, column = np.indices((grid_size, grid_size)).reshape(2, -1, 1) * w  # (N, D/4) each
    grid = np.concatenate([np.sin(column), np.cos(column), np.sin(row), np.cos(row)], axis=1)  # (N, D)
    return np.concatenate([np.zeros((prefix_tokens, width)), grid])[None]
