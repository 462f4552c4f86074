r"""Softmax cross-entropy, from logits, as one pair; and the mean squared error, for regression.

Forward
    For logits x (B, K), p = softmax(x) and targets t (B, K), usually probabilities, with row sums w_i = sum_k t_ik,

        loss = -1/n sum_i sum_k t_ik log p_ik = 1/n sum_i (w_i logsumexp(x_i) - sum_k t_ik x_ik),

    with n = B unless told otherwise. A class index is the target that is 1 at that class. Label smoothing
    mixes every target with the uniform one: t <- (1 - s) t + s/K (Szegedy et al. 2016). The logarithm of a
    softmax is never taken: the second form is exact for logits of any size once the row's maximum is
    subtracted.

Backward
    logsumexp(x_i) = log sum_j exp(x_ij) grows with x_ik at the rate exp(x_ik) / sum_j exp(x_ij) = p_ik, and the second
    term is linear, so

        dx_ik = dloss * (w_i * p_ik - t_ik) / n,    for probabilities, w_i = 1, simply dloss * (p_ik - t_ik) / n.

    That p - t comes out so simply is the reason for making softmax and cross-entropy one function; taken apart, 1/p
    would have to cancel against p.

Squared error
    loss = 1/(n m) sum_ij (y_ij - t_ij)^2 grows with y_ij at the rate 2 (y_ij - t_ij) / (n m).

Example: two classes with equal scores, the first is right
    >>> import numpy as np
    >>> loss, cache = softmax_cross_entropy_forward(np.array([[0.0, 0.0]]), np.array([0]))
    >>> round(float(loss), 6)                             # log 2
    0.693147
    >>> softmax_cross_entropy_backward(1.0, cache).tolist()
    [[-0.5, 0.5]]
"""

from typing import Any, NamedTuple

import numpy as np

from minivit.base.backend import accelerated, array_module


class CrossEntropyCache(NamedTuple):
    """What `softmax_cross_entropy_backward` reads."""

    probabilities: Any  # (B, K)
    targets: Any  # (B, K)
    weights: Any  # (B, 1)  row sums of the targets, 1 for probabilities
    denominator: float


def one_hot(labels, num_classes, dtype=np.float32):
    """Class indices (B,) as target probabilities (B, K): 1 at the class, 0 elsewhere."""
    return (labels[:, None] == array_module(labels).arange(num_classes)).astype(dtype)


def soft_targets(labels, num_classes, label_smoothing, dtype, xp=np):
    """Target probabilities (B, K) from class indices (B,) or soft targets (B, K), smoothed.

    Raises  ValueError: a shape that does not fit, or (on the host) a label outside [0, K).
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
    if labels.ndim == 1:
        if labels.dtype.kind not in "iu":
            raise ValueError(f"class labels must be integers, got {labels.dtype}")
        if xp is np and len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
            raise ValueError(
                f"labels must lie in [0, {num_classes}), found {labels.min()} to {labels.max()}"
            )  # on a GPU the check would stall the stream, and the data loaders have made it already
        targets = one_hot(labels, num_classes, dtype)
    elif labels.ndim == 2 and labels.shape[1] == num_classes:
        targets = labels.astype(dtype)
    else:
        raise ValueError(f"labels of shape {labels.shape} are neither (B,) nor (B, {num_classes})")
    if label_smoothing:
        targets *= 1.0 - label_smoothing
        targets += label_smoothing / num_classes
    return targets


@accelerated
def softmax_cross_entropy_forward(logits, labels, *, label_smoothing=0.0, denominator=None):
    """Mean cross-entropy of softmax(logits) against the labels.

    Math    loss = 1/n sum_i (w_i logsumexp(x_i) - sum_k t_ik x_ik), in nats; n = ``denominator`` or B
    Shapes  logits (B, K), labels (B,) integers or (B, K) probabilities  ->  loss ()
    Cache   softmax(logits), the targets and their row sums, n
    Raises  ValueError: labels of the wrong shape, kind or range.
    A batch cut into micro-batches passes the whole batch's size as denominator, so that the parts' losses and
    gradients add up.
    """
    xp = array_module(logits, labels)
    B, K = logits.shape
    if len(labels) != B:
        raise ValueError(f"{B} rows of logits but {len(labels)} labels")
    targets = soft_targets(labels, K, label_smoothing, logits.dtype, xp)  # (B, K)
    denominator = float(B if denominator is None else denominator)
    shifted = logits - logits.real.max(axis=1, keepdims=True)  # real shift: exact under the complex step
    exponentials = xp.exp(shifted)  # (B, K)
    total = exponentials.sum(axis=1, keepdims=True)  # (B, 1)
    probabilities = exponentials / total  # (B, K)
    weights = targets.sum(axis=1, keepdims=True)  # (B, 1)
    # the shift drops out: w (log total + max) - sum t (shifted + max) has no max left
    loss = ((weights * xp.log(total)).sum() - (targets * shifted).sum()) / denominator
    return loss, CrossEntropyCache(probabilities, targets, weights, denominator)


@accelerated
def softmax_cross_entropy_backward(dloss, cache):
    """Backward of `softmax_cross_entropy_forward`.

    Math    dlogits = dloss (w p - t) / n
    Shapes  dloss () -> dlogits (B, K)
    """
    probabilities, targets, weights, denominator = cache
    # loss = sum_i (w_i logsumexp(x_i) - sum_k t_ik x_ik) / n
    return (weights * probabilities - targets) * (dloss / denominator)  # (B, K)


class SquaredErrorCache(NamedTuple):
    """What `squared_error_backward` reads."""

    difference: Any  # (n, m)
    denominator: float  # of the sum of squares


@accelerated
def squared_error_forward(y, targets, *, denominator=None):
    """Mean squared error over all entries.

    Math    loss = 1/(n m) sum_ij (y_ij - t_ij)^2; n = ``denominator`` or the number of rows
    Shapes  y, targets (n, m)  ->  loss ()
    Cache   y - targets, n m
    Raises  ValueError: two different shapes.
    """
    if y.shape != targets.shape or y.ndim != 2:
        raise ValueError(f"predictions {y.shape} and targets {targets.shape}: two arrays (n, m) are needed")
    n, m = y.shape
    denominator = float(m * (n if denominator is None else denominator))
    difference = y - targets
    return (difference * difference).sum() / denominator, SquaredErrorCache(difference, denominator)


@accelerated
def squared_error_backward(dloss, cache):
    """Backward of `squared_error_forward`.

    Math    dy = dloss 2 (y - t) / (n m)
    Shapes  dloss () -> dy (n, m)
    """
    # loss = sum_ij (y_ij - t_ij)^2 / (n m)
    return cache.difference * (2.0 * dloss / cache.denominator)
