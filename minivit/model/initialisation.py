r"""Initial parameters beyond the official ones: ``init`` and ``whiten`` of `minivit.training.config.TrainConfig`.

Mimetic (Trockman & Kolter 2023, arXiv:2305.09828)
    In trained transformers, W_q W_k^T of each head looks like a multiple of the identity and W_v W_proj like a negative
    one, with noise. The weights start so: with Z of entries N(0, 1/D), fresh for each product,

        W_q W_k^T ~ 0.7 Z + 0.7 I     (the best approximation of rank Dh, for each head)
        W_v W_proj = 0.4 Z - 0.4 I

    The singular value decomposition U S V^T of the right side gives the factors U S^(1/2) and V S^(1/2).

Whitening (as Jordan 2024, arXiv:2404.00498, does for convolutions)
    With the covariance E L E^T of the training patches x and their mean mu, the patch embedding starts as

        z = (x - mu) E (L + eps)^(-1/2) Q,      Q of random orthogonal rows,

    so that no direction of the patches, of whose variance nearly all is brightness, drowns the others. The patches are
    taken a part at a time. With m the mean of a of them and S = sum (x - m)^T (x - m), and with m' and S' those of n
    others, all together have (Chan, Golub & LeVeque 1983)

        the mean m + n / (a + n) (m' - m),  and S + S' + a n / (a + n) (m' - m)^T (m' - m).
"""

from __future__ import annotations

import zlib

import numpy as np

from minivit.layers.patch_embed import patchify
from minivit.model.images import pixels
from minivit.model.inside import feature_map

INITS = ("official", "mimetic")
QUERY_KEY, VALUE_PROJECTION = (0.7, 0.7), (0.4, -0.4)  # of the noise and of the identity
WHITENING_IMAGES = 2048
WHITENING_PART = 1 << 23  # numbers of as many images as are taken at a time: 64 MB
WHITENING_EPS = 1e-2  # of the mean eigenvalue: directions of less variance than that are not blown up further


def _generator(seed, name):
    """A stream of its own for each parameter and initialisation."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def mimetic(model, *, seed=0):
    """Write the mimetic initialisation of every block's attention into a model on the host."""
    c = model.config
    D, h = c.width, c.num_heads
    Dh = D // h

    def factors(rng, noise, identity, rank):
        target = noise * rng.standard_normal((D, D)) / np.sqrt(D) + identity * np.eye(D)
        U, S, Vt = np.linalg.svd(target)
        root = np.sqrt(S[:rank])
        return U[:, :rank] * root, Vt[:rank].T * root

    for i in range(c.depth):
        qkv, proj = (model.params[f"blocks.{i}.attn.{name}.weight"] for name in ("qkv", "proj"))
        rng = _generator(seed, f"mimetic.{i}")
        for head in range(h):
            columns = slice(head * Dh, (head + 1) * Dh)
            qkv[:, :D][:, columns], qkv[:, D : 2 * D][:, columns] = factors(rng, *QUERY_KEY, Dh)
        values, projection = factors(rng, *VALUE_PROJECTION, D)
        qkv[:, 2 * D :], proj[...] = values, projection.T


def moments(parts):
    """Mean and covariance of the rows of arrays (n, d), one after the other: see the head of this file.

    Shapes  ->  (d,), (d, d)
    """
    count, mean, squares = 0, 0.0, 0.0
    for x in parts:
        n, own = len(x), x.mean(axis=0)
        x = x - own
        apart = own - mean
        squares = squares + (x.T @ x + count * n / (count + n) * np.outer(apart, apart))
        mean = mean + n / (count + n) * apart
        count += n
    return mean, squares / count


def whitening_rows(labels, classes):
    """The numbers of the images that whitening looks at: the first 2,048 of them.

    Where images come class by class, as those of folders do, as many evenly spaced ones.
    """
    n = min(len(labels), WHITENING_IMAGES)
    by_class = 0 < np.count_nonzero(np.diff(labels)) < classes
    return np.arange(n) * len(labels) // n if by_class else np.arange(n)


def whiten(model, images, labels, *, seed=0):
    """Write the whitening patch embedding of the images (n, H, W, C) into a model on the host.

    Some of them count, see `whitening_rows`; behind a stem, the patches are those of its maps. Where the width is below
    the P P C numbers of a patch, the directions of the largest variance are kept.
    """
    c = model.config
    W, b = model.params["patch_embed.proj.weight"], model.params["patch_embed.proj.bias"]
    rows = whitening_rows(labels, c.num_classes)
    some = 64 if c.stem else max(1, WHITENING_PART // (c.image_size**2 * c.channels))  # a stem's cache is large

    def patches(part):
        x = feature_map(model, part).astype(np.float64) if c.stem else pixels(part, np.float64)
        x = patchify(x, c.patch_size)
        return x.reshape(-1, x.shape[-1])  # (patches, P P C)

    mean, covariance = moments(patches(images[rows[i : i + some]]) for i in range(0, len(rows), some))
    L, E = np.linalg.eigh(covariance)
    kept = min(len(L), c.width)
    L, E = L[-kept:], E[:, -kept:]
    rng = _generator(seed, "whitening")
    Q = np.linalg.qr(rng.standard_normal((c.width, kept)))[0].T * np.sqrt(c.width / kept)  # (kept, D), z of variance 1
    whitening = E / np.sqrt(L + WHITENING_EPS * L.mean()) @ Q
    W[...] = whitening
    b[...] = -mean @ whitening
