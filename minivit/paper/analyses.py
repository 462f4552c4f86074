r"""What a trained model has learned to see, measured as the ViT paper does (section 4.5, appendix D.5, D.7, D.8).

    filters              principal components of the patch embedding's filters                   Fig. 7, left
    position_similarity  cosine similarity of the position embeddings of two patches             Fig. 7, centre; Fig. 10
    attention_distance   how far, in pixels, a head looks                                        Fig. 7, right; Fig. 11
    attention_rollout    which patches an output token is made of                                Fig. 6, Fig. 14
    cost                 images per second and memory, by size of model and image            Fig. 12

The first four are plain functions of arrays; those that take a model run it over images, a few at a time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from minivit.base.backend import array_module, to_host
from minivit.base.errors import InputError
from minivit.evaluation.inference import attention_map
from minivit.model import intermediates, positions

MAPS = 2**26  # numbers in the attention maps that are held at a time


# ---- the patch embedding ---------------------------------------------------------------------------------------------


class Filters(NamedTuple):
    """Principal components of the filters of a patch embedding, the largest first."""

    images: Any  # (n, P, P, C), of unit norm
    shares: Any  # (n,) of the filters' variance, summing to at most 1


def filters(W, patch_size, count=28):
    """Principal components of the D filters of a patch embedding, each an image of one patch.

    Math    W = [w_1 ... w_D], w_d in R^(P^2 C);  [w_d - mean_d w_d] = U S V^T;  component k is column k of U and has
            the share S_k^2 / sum_j S_j^2 of the variance
    Shapes  W (P*P*C, D)  ->  images (n, P, P, C), shares (n,), n = min(count, P*P*C, D - 1)
    The sign of a component means nothing: it is chosen so that the entry of largest magnitude is positive.
    Raises  InputError: W is not a matrix of patches of that size (a hybrid's patches are of features, not of pixels).
    """
    W = np.asarray(to_host(W), np.float64)
    size, D = W.shape
    C = size // patch_size**2
    if C * patch_size**2 != size or not 1 <= C <= 4:
        raise InputError(
            f"filters of {size} numbers are no images of {patch_size}x{patch_size} pixels in colour; behind a stem, "
            "patches are of features"
        )
    U, S, _ = np.linalg.svd(W - W.mean(axis=1, keepdims=True), full_matrices=False)
    n = min(count, size, D - 1)
    components = U.T[:n]  # (n, P*P*C)
    largest = np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1)  # (n, 1)
    images = (components * np.sign(largest)).reshape(n, patch_size, patch_size, C)
    return Filters(images, S[:n] ** 2 / max((S * S).sum(), 1e-300))


# ---- positions -------------------------------------------------------------------------------------------------------


def position_embedding(model):
    """What the model adds to each patch to tell its position, E_pos of Eq. 1, whatever kind of positions it has.

    Shapes  ->  (grid * grid, D), without the class token's row
    Raises  InputError: nothing is added there.
    """
    c = model.config
    if c.pos_embed in ("relative", "none"):
        raise InputError(
            "this model adds no positions to its patches; take one with pos_embed learned, learned2d or sincos2d"
        )
    return to_host(positions(model)[0, -(c.grid_size**2) :])


def position_similarity(position):
    """Cosine similarity of the position embeddings of every two patches.

    Math    s[r, c, r', c'] = <p_rc, p_r'c'> / (|p_rc| |p_r'c'|), 0 where a vector is zero
    Shapes  position (g*g, D), row by row  ->  (g, g, g, g)
    """
    p = np.asarray(position, np.float64)
    g = round(len(p) ** 0.5)
    p = p / np.maximum(np.linalg.norm(p, axis=1, keepdims=True), 1e-300)
    return (p @ p.T).reshape(g, g, g, g)


# ---- attention -------------------------------------------------------------------------------------------------------


def patch_distances(grid, pixels):
    """Distances between the centres of any two patches.

    Math    d = pixels * sqrt((r - r')^2 + (c - c')^2)
    Shapes  ->  (grid*grid, grid*grid), in pixels if ``pixels`` is the side of a patch
    """
    place = np.indices((grid, grid)).reshape(2, -1)  # (2, g*g): row, column
    return pixels * np.sqrt(((place[:, :, None] - place[:, None, :]) ** 2).sum(axis=0))


def attention_distance(attention, pixels, prefix_tokens=0):
    """Mean attention distance: how far from itself a patch looks, in pixels; the size of a head's receptive field.

    Math    (1 / g^2) sum_q sum_k a_qk d_qk, over the patches q and k, with a_qk = A_qk / sum_k' A_qk'
    Shapes  attention (..., N, N), N = prefix_tokens + g*g  ->  (...)
    Class token and registers are nowhere in the image: their rows are left out, and what a patch spends on them is
    shared out among the patches in proportion.
    """
    xp = array_module(attention)
    a = attention[..., prefix_tokens:, prefix_tokens:]  # (..., g*g, g*g)
    a = a / xp.maximum(a.sum(axis=-1, keepdims=True), 1e-30)
    d = xp.asarray(patch_distances(round(a.shape[-1] ** 0.5), pixels), dtype=a.dtype)
    return (a * d).sum(axis=-1).mean(axis=-1)


def attention_rollout(attention):
    """Attention rollout: of which input tokens each token is made, after each block.

    Math    A_l = mean over the heads;  M_l = rows of (A_l + I), each divided by its sum;  R_l = M_l M_(l-1) ... M_1
    Shapes  L arrays (..., h, N, N)  ->  L arrays (..., N, N), whose rows sum to 1
    The identity stands for the way around each attention. Every token is in the products, registers too.
    Source  Abnar & Zuidema 2020, arXiv:2005.00928; section D.8 of the ViT paper.
    """
    rollouts = []
    for maps in attention:
        mixed = maps.mean(axis=-3)  # (..., N, N)
        mixed = mixed + array_module(mixed).eye(mixed.shape[-1], dtype=mixed.dtype)
        mixed = mixed / mixed.sum(axis=-1, keepdims=True)
        rollouts.append(mixed @ rollouts[-1] if rollouts else mixed)
    return tuple(rollouts)


class Answer(NamedTuple):
    """A model's answer to some images, and where it comes from."""

    logits: Any  # (B, K)
    maps: Any  # (L, B, grid, grid): what the head reads of the rollout after each block


def rollout_maps(model, images):
    """Logits of images, and the rollout of what is classified: the class token's row, or the mean of the patches'.

    Shapes  images (B, H, W, C)  ->  `Answer`; registers are left out of the maps, which sum to less than 1 therefore
    """
    c, logits, maps = model.config, [], []
    for part in _intermediates(model, images):
        logits.append(to_host(part.logits))
        rollouts = [to_host(r) for r in attention_rollout(square_maps(part.attention, c))]
        each = [[attention_map(r[None], c.pooling, c.registers) for r in rollout] for rollout in rollouts]
        maps.append(np.array(each))  # (L, b, grid, grid)
    return Answer(np.concatenate(logits), np.concatenate(maps, axis=1))


def head_distances(model, images):
    """The mean attention distance of every head, over images.

    Shapes  images (B, H, W, C)  ->  (L, h), pixels
    """
    c = model.config
    prefix, pixels = c.num_tokens - c.grid_size**2, c.image_size / c.grid_size
    total = 0.0
    for part in _intermediates(model, images):
        sums = [attention_distance(a, pixels, prefix).sum(axis=0) for a in square_maps(part.attention, c)]
        total = total + np.array([to_host(each) for each in sums])
    return total / len(images)


def _intermediates(model, images):
    """`ViT.intermediates` of a few images at a time, on the model's device."""
    c = model.config
    few = max(1, MAPS // (c.depth * c.num_heads * c.num_tokens**2))
    xp = array_module(model.flat)
    for i in tqdm(range(0, len(images), few), "pictures", delay=1, disable=None):
        yield intermediates(model, xp.asarray(images[i : i + few]))


def square_maps(attention, config):
    """The blocks' attention maps themselves, if they are of all tokens, (B, h, N, N).

    Raises  InputError: they are not.
    """
    if any(maps.shape[-2:] != (config.num_tokens, config.num_tokens) for maps in attention):
        raise InputError("in this model not every token attends to every other; its attention is no N x N map")
    return attention


# ---- cost ------------------------------------------------------------------------------------------------------------


def cost(models, sizes, speed, *, batch=8, rounds=3, progress=True):
    """Time of a prediction and of a training step, and the memory of each, by model and size of image.

    ``models``: {name: `ViTConfig`}; ``sizes``: pixels, of which those that a model's patch divides are measured
    ``speed(config, task, batch, turns)`` measures a point: a dict with images_per_second, median, q1 and q3 (seconds),
    peak_memory (bytes); `minivit.benchmark.speed.speed` does so in a process of its own
    Returns  a list for JSON: {"model", "size", "tokens", "task", "batch"} and what ``speed`` gave, task "infer" or
             "step"
    """
    points = [(name, c, size) for name, c in models.items() for size in sizes if size % c.patch_size == 0]
    costs = []
    for name, c, size in tqdm(points, "models", disable=None if progress else True):
        config = replace(c, image_size=size)
        for task, turns in (("infer", rounds), ("step", 1)):
            point = {"model": name, "size": size, "tokens": config.num_tokens, "task": task, "batch": batch}
            costs.append(point | speed(config, task, batch, turns))
    return costs
