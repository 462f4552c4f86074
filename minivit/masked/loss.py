"""The loss of guesses of patches."""

from typing import Any, NamedTuple

import numpy as np

from minivit.base.backend import array_module
from minivit.layers.loss import (
    softmax_cross_entropy_backward,
    softmax_cross_entropy_forward,
    squared_error_backward,
    squared_error_forward,
)


class PatchLossCache(NamedTuple):
    """What `patch_loss_gradient` reads."""

    loss: Any  # the cache of softmax cross-entropy or of the squared error
    shape: tuple  # of the predictions


def patch_loss(prediction, targets, num_classes=0, *, denominator=None):
    """Mean loss over the predicted patches of all images, and how many guesses are right.

    Math    softmax cross-entropy of ``num_classes`` classes, or for 0 of them the squared error; the mean over images
            (or the sum over ``denominator``), patches, and the guesses or numbers of each
    Shapes  prediction (B, n, outputs), targets as `patch_targets` gives them for n patches  ->  loss (), right ()
    Returns  (loss, right, cache); right is 0 for regression
    """
    xp = array_module(prediction)
    B, n, _ = prediction.shape
    denominator = B if denominator is None else denominator
    if not num_classes:
        y = prediction.reshape(B * n, -1)
        loss, cache = squared_error_forward(y, targets.reshape(B * n, -1), denominator=denominator * n)
        return loss, xp.zeros((), np.int64), PatchLossCache(cache, prediction.shape)
    logits, labels = prediction.reshape(-1, num_classes), targets.reshape(-1)
    per_image = labels.size // B
    loss, cache = softmax_cross_entropy_forward(logits, labels, denominator=denominator * per_image)
    return loss, (logits.argmax(axis=1) == labels).sum(), PatchLossCache(cache, prediction.shape)


def patch_loss_gradient(dloss, cache):
    """Backward of `patch_loss`.

    Math    that of softmax cross-entropy, or of the squared error
    Shapes  dloss ()  ->  dprediction (B, n, outputs)
    """
    # loss = softmax_cross_entropy(prediction.reshape(-1, num_classes)), or squared_error(prediction.reshape(B * n, -1))
    squared = hasattr(cache.loss, "difference")
    dy = (squared_error_backward if squared else softmax_cross_entropy_backward)(dloss, cache.loss)
    return dy.reshape(cache.shape)
