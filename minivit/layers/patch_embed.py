r"""Patch embedding, class token and position embedding (Eq. 1 of the ViT paper).

Forward
    An image of H x W pixels and C channels is cut into n = H * W / P^2 square patches, read row by row. Each patch,
    flattened in the order (row, column, channel), is mapped to the model's width by one matrix; a learned token is put
    in front; and a vector that tells the position is added:

        z_0 = [x_class; x_1 @ E; x_2 @ E; ...; x_n @ E] + E_pos,      E in R^(P^2 C x D)                    (Eq. 1)

    where x_i is patch i as a row (x_p^i in the paper). The official code writes the same map as a convolution with
    kernel and stride P. In the code E is ``W``, with a bias ``b``. Pixels come as bytes 0..255, which are scaled to
    -1..1, or as numbers that are scaled already.

Backward
    E_pos and the class token serve every image of the batch, so their gradients are sums over the images. The class
    token is row 0 of each image, the patches are the other rows. Cutting into patches moves every pixel to exactly one
    place, so its backward moves each gradient back.

Example: 2 x 4 pixels are two patches of 2 x 2
    >>> import numpy as np
    >>> patches = patchify(np.arange(8.0).reshape(1, 2, 4, 1), 2)
    >>> patches.tolist()
    [[[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]]]
    >>> unpatchify(patches, (1, 2, 4, 1), 2).ravel().tolist()
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
"""

from typing import NamedTuple

import numpy as np

from minivit.base.backend import accelerated, array_module
from minivit.layers.linear import LinearCache, linear_backward, linear_forward

EMBED_NAMES = ("patch_embed.proj.weight", "patch_embed.proj.bias", "cls_token", "pos_embed")


class PatchEmbedCache(NamedTuple):
    """What `patch_embed_backward` reads."""

    proj: LinearCache  # the patches (B, n, P*P*C) and E
    image_shape: tuple  # (B, H, W, C)
    patch_size: int
    prefix: int  # tokens in front of the patches: 1, the class token


def patchify(images, patch_size):
    """Cut images into flattened patches.

    Shapes  images (B, H, W, C)  ->  patches (B, H/P * W/P, P*P*C)
    Patches are read row by row, the entries of each in the order (row, column, channel).
    """
    B, H, W, C = images.shape
    P = patch_size
    patches = images.reshape(B, H // P, P, W // P, P, C).transpose(0, 1, 3, 2, 4, 5)  # (B, H/P, W/P, P, P, C)
    return patches.reshape(B, (H // P) * (W // P), P * P * C)


def unpatchify(patches, image_shape, patch_size):
    """Put flattened patches back together: the inverse of `patchify`, and its backward.

    Shapes  patches (B, n, P*P*C)  ->  images (B, H, W, C) = image_shape
    """
    B, H, W, C = image_shape
    P = patch_size  # the same exchange of axes 2 and 3 undoes that of `patchify`
    images = patches.reshape(B, H // P, W // P, P, P, C).transpose(0, 1, 3, 2, 4, 5)  # (B, H/P, P, W/P, P, C)
    return images.reshape(image_shape)


def scale_pixels(x, dtype):
    """Bytes 0..255 as numbers in -1..1; numbers stay as they are.

    Math    (x - 127.5) / 127.5
    Shapes  x (...)  ->  (...), dtype
    """
    return (x.astype(dtype) - 127.5) / 127.5 if x.dtype == np.uint8 else x


@accelerated
def patch_embed_forward(images, W, b, cls_token, pos_embed, *, patch_size):
    """Images to tokens.

    Math    z_0 = [x_class; patches @ W + b] + E_pos                                                      (Eq. 1)
    Shapes  images (B, height, width, C), bytes or in -1..1, W (P*P*C, D), b (D,), cls_token (1, 1, D),
            pos_embed (1, N, D)  ->  z (B, N, D), N = 1 + n
    Cache   the patches, W, and the shapes
    A model that has no class token has a cls_token of shape (1, 0, D).
    """
    xp = array_module(images)
    patches = scale_pixels(patchify(images, patch_size), W.dtype)  # (B, n, P*P*C)
    tokens, proj_cache = linear_forward(patches, W, b)  # (B, n, D)
    first = xp.broadcast_to(cls_token, (len(tokens), *cls_token.shape[1:]))  # (B, 1, D)
    z = xp.concatenate([first, tokens], axis=1) + pos_embed  # (B, N, D)
    return z, PatchEmbedCache(proj_cache, images.shape, patch_size, cls_token.shape[1])


@accelerated
def patch_embed_backward(dz, cache):
    """Backward of `patch_embed_forward`.

    Math    dE_pos = sum_B dz;  dx_class = sum_B dz[:, 0];  dW, db from the rows of the patches
    Shapes  dz (B, N, D)  ->  dimages (B, H, W, C), dW (P*P*C, D), db (D,), dcls_token (1, 1, D), dpos_embed (1, N, D)
    dimages is the gradient with respect to the scaled pixels, also where bytes came in.
    """
    # z = concatenate([first, tokens]) + pos_embed
    dpos_embed = dz.sum(axis=0, keepdims=True)  # (1, N, D)
    dfirst, dtokens = dz[:, : cache.prefix], dz[:, cache.prefix :]  # (B, 1, D), (B, n, D)
    # first = broadcast(cls_token)
    dcls_token = dfirst.sum(axis=0, keepdims=True)  # (1, 1, D)
    # tokens = patches @ W + b
    dpatches, dW, db = linear_backward(dtokens, cache.proj)  # (B, n, P*P*C)
    # patches = scale_pixels(patchify(images)), and the gradient is that of the scaled pixels
    dimages = unpatchify(dpatches, cache.image_shape, cache.patch_size)  # (B, H, W, C)
    return dimages, dW, db, dcls_token, dpos_embed
