"""Mixup and CutMix: each image of a batch is mixed with another one, and so are their labels.

Both draw, for the whole batch, a share lambda from Beta(alpha, alpha) and a permutation that gives each image its
partner. All random numbers come from a NumPy Generator, and the arithmetic is of whole numbers: a seed gives the same
bits everywhere.
"""

import numpy as np

from minivit.base.backend import array_module
from minivit.layers.loss import one_hot


def _mix_targets(targets, partner, share):
    return np.float32(share) * targets + np.float32(1.0 - share) * targets[partner]


def mixup(images, targets, rng, alpha):
    """Blend each image with its partner.

    Math    x <- lambda x + (1 - lambda) x', t <- lambda t + (1 - lambda) t', lambda rounded to a multiple of 1/256
    Shapes  images (B, H, W, C) uint8, targets (B, K) float32  ->  the same
    Source  Zhang et al., "mixup: Beyond Empirical Risk Minimization", arXiv:1710.09412.
    """
    xp = array_module(images)
    weight = round(256 * rng.beta(alpha, alpha))
    partner = xp.asarray(rng.permutation(len(images)))
    first, second = images.astype(np.uint16), images[partner].astype(np.uint16)
    blend = (weight * first + (256 - weight) * second + 128) >> 8  # at most 255 * 256 + 128: it fits 16 bits
    return blend.astype(np.uint8), _mix_targets(targets, partner, weight / 256)


def cutmix(images, targets, rng, alpha):
    """Replace the same rectangle of each image by that of its partner.

    Math    sides sqrt(1 - lambda) of the image's around a uniform centre, cut off at its borders;
            t <- l t + (1 - l) t', l the share of pixels that stay
    Shapes  images (B, H, W, C) uint8, targets (B, K) float32  ->  the same
    Source  Yun et al., "CutMix", arXiv:1905.04899, appendix A.
    """
    xp = array_module(images)
    _, H, W, _ = images.shape
    side = np.sqrt(1.0 - rng.beta(alpha, alpha))
    middle, half = rng.integers(0, (H, W)), np.array([int(H * side), int(W * side)]) // 2
    (top, left), (bottom, right) = np.clip(middle - half, 0, (H, W)), np.clip(middle + half, 0, (H, W))
    partner = xp.asarray(rng.permutation(len(images)))
    result = images.copy()
    result[:, top:bottom, left:right] = images[partner, top:bottom, left:right]
    share = 1.0 - (bottom - top) * (right - left) / (H * W)
    return result, _mix_targets(targets, partner, share)


def mix(images, labels, rng, *, num_classes, mixup_alpha=0.0, cutmix_alpha=0.0, probability=1.0):
    """Mix a batch by mixup or CutMix, or leave it as it is; the labels become target probabilities in any case.

    ``probability`` is the share of batches that are mixed; an alpha of 0 switches that kind off, and with both on each
    takes half of them.

    Shapes  images (B, H, W, C) uint8, labels (B,) integers  ->  images, targets (B, K) float32
    """
    kinds = [(mixup, mixup_alpha), (cutmix, cutmix_alpha)]
    kinds = [(function, alpha) for function, alpha in kinds if alpha]
    targets = one_hot(labels, num_classes)
    which = rng.random() * len(kinds) / probability if probability else len(kinds)
    if which >= len(kinds):
        return images, targets
    function, alpha = kinds[int(which)]
    return function(images, targets, rng, alpha)
