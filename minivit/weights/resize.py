r"""Resizing of what a model learned for one size of image or patch, and is to use at another.

Every kind is linear and separable: a vector of o numbers becomes M x, M (n, o), a grid G becomes M G M^T; positions of
rows and of columns are two such vectors, for each of their numbers. Rows of M add up to 1. With the scale r = o / n,
output i lies at

    align-corners      c_i = i (o - 1) / (n - 1): the corner tokens stay where they are
    all others         c_i = (i + 1/2) r - 1/2: numbers stand for the middles of pixels, which share the whole width

    M_ij = k(j - c_i);  linear: k(t) = max(0, 1 - |t|);  cubic (Keys 1981):
                        k(t) = (a + 2)|t|^3 - (a + 3)|t|^2 + 1 for |t| <= 1,  a (|t|^3 - 5|t|^2 + 8|t| - 4) up to 2

Beyond the edge the last number is repeated. With antialias, k(t / max(1, r)) takes all of a larger neighbourhood where
n < o, and what would lie beyond the edge is left out and the row divided by its sum; a is -1/2 there, otherwise -3/4.

Who takes which for positions: the official code (scipy.ndimage.zoom, order=1) align-corners; timm's reader of official
files bilinear, timm otherwise bicubic-antialias; Hugging Face bicubic.

Patch embeddings (Beyer et al. 2022, "FlexiViT", arXiv:2212.08013)
    A patch x of p x p pixels, resized to B x (B: the Kronecker product of M and M), is to give the token that x gave:
    <B x, w*> = <x, w> for every x, hence B^T w* = w. Weights that are resized plainly, B w, do not do it. The
    pseudo-inverse does,

        w* = (B^T)^+ w,    for a grid of weights  W* = (M^T)^+ W M^+,

    exactly where patches grow, M^T then having full row rank; otherwise as the solution of least squares.
"""

from __future__ import annotations

import math

import numpy as np

from minivit.base.errors import InputError

KINDS = ("align-corners", "bilinear", "bilinear-antialias", "bicubic", "bicubic-antialias")
PATCH_KINDS = ("pi", "bilinear")
PATCHES = "bilinear-antialias"  # B, as in FlexiViT's code; where patches grow it is bilinear


def _linear(t):
    return np.maximum(0.0, 1.0 - np.abs(t))


def _cubic(t, a):
    t = np.abs(t)
    near = ((a + 2.0) * t - (a + 3.0)) * t * t + 1.0
    far = a * (((t - 5.0) * t + 8.0) * t - 4.0)
    return np.where(t <= 1.0, near, np.where(t < 2.0, far, 0.0))


def interpolation(n, o, kind):
    """The matrix M that resizes o numbers to n; the identity where n = o.

    Shapes  ->  (n, o) float64
    Raises  InputError: unknown kind.
    """
    if kind not in KINDS:
        raise InputError(f"a way of resizing must be one of {', '.join(KINDS)}; got {kind!r}")
    if kind == "align-corners":
        centre = np.arange(n) * (o - 1) / max(n - 1, 1)
        return _linear(np.arange(o) - centre[:, None])
    centre, antialias = (np.arange(n) + 0.5) * (o / n) - 0.5, kind.endswith("-antialias")

    def weights(t):
        return _linear(t) if kind.startswith("bilinear") else _cubic(t, -0.5 if antialias else -0.75)

    if antialias:
        M = weights((np.arange(o) - centre[:, None]) / max(1.0, o / n))
        return M / M.sum(axis=1, keepdims=True)
    beyond = 2  # numbers on each side that a cubic reads past the edge
    wide = weights(np.arange(-beyond, o + beyond) - centre[:, None])  # (n, o + 4)
    M = wide[:, beyond:-beyond].copy()
    M[:, 0] += wide[:, :beyond].sum(axis=1)
    M[:, -1] += wide[:, -beyond:].sum(axis=1)
    return M


def resize_positions(position, grid_size, *, prefix_tokens, kind="align-corners"):
    """A position embedding for another number of patches; those of the prefix tokens stay as they are.

    Math    M grid M^T, for each of the D numbers
    Shapes  position (1, prefix + g^2, D)  ->  (1, prefix + grid_size^2, D) of the same dtype
    ``prefix_tokens`` says how many tokens come before the patches: 196 tokens are a grid of 14 x 14 and none, 197 the
    same grid after a class token.
    Raises  InputError: the rest is no square grid; unknown kind.
    """
    count, D = position.shape[1] - prefix_tokens, position.shape[2]
    g = math.isqrt(max(count, 0))
    if g * g != count or not g:
        raise InputError(
            f"a position embedding of {position.shape[1]} tokens, {prefix_tokens} of them before the patches, leaves "
            f"{count}, which is no square grid"
        )
    M = interpolation(grid_size, g, kind)
    if grid_size == g:
        return position.copy()
    grid = position[0, prefix_tokens:].reshape(g, g, D).astype(np.float64)
    grid = np.einsum("ia,jb,abd->ijd", M, M, grid, optimize=True)  # (grid_size, grid_size, D)
    grid = grid.reshape(1, -1, D).astype(position.dtype)
    return np.concatenate([position[:, :prefix_tokens], grid], axis=1)


def resize_table(table, size, kind="align-corners"):
    """One of the two tables of a position embedding of rows and columns, for another number of them.

    Math    M x: the tables' grid [x_b, y_a] becomes what `resize_positions` makes of it, since rows of M add up to 1
    Shapes  table (1, g, D/2)  ->  (1, size, D/2) of the same dtype
    Raises  InputError: unknown kind.
    """
    M = interpolation(size, table.shape[1], kind)
    return (M @ table.astype(np.float64)).astype(table.dtype)


def resize_patch_embedding(W, patch_size, *, channels, kind="pi", interpolated=PATCHES):
    """The matrix of a patch embedding for patches of another size.

    Math    "pi": (M^T)^+ W M^+, so that resized patches give the same tokens; "bilinear": M W M^T
    Shapes  W (P*P*C, D)  ->  (patch_size^2 * C, D) of the same dtype
    ``interpolated`` is the kind of M.
    Raises  InputError: unknown kind.
    """
    if kind not in PATCH_KINDS:
        raise InputError(f"patch_resize must be one of {', '.join(PATCH_KINDS)}; got {kind!r}")
    P = math.isqrt(W.shape[0] // channels)
    if P == patch_size:
        return W.copy()
    M = interpolation(patch_size, P, interpolated)
    R = np.linalg.pinv(M.T) if kind == "pi" else M  # (patch_size, P)
    grid = W.reshape(P, P, channels, -1).astype(np.float64)
    grid = np.einsum("ia,jb,abcd->ijcd", R, R, grid, optimize=True)
    return grid.reshape(-1, W.shape[1]).astype(W.dtype)
