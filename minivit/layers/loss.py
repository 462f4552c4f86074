r"""Softmax and cross-entropy as one function of the logits; and the mean squared error, for regression.

Forward
    x (B, K) are the logits, p = softmax(x), and t (B, K) the targets, usually probabilities. The loss is

        loss = -(1/n) * sum_i sum_k t_ik * log(p_ik),          n = B unless another number is given

    With logsumexp(x_i) = log(sum_j exp(x_ij)) it is log(p_ik) = x_ik - logsumexp(x_i), and with the row sums
    w_i = sum_k t_ik (1 for probabilities)

        loss = (1/n) * sum_i (w_i * logsumexp(x_i) - sum_k t_ik * x_ik)

    This form takes no logarithm of a number that may have rounded to 0, and once the row's maximum is subtracted, as in
    `minivit.layers.softmax`, it overflows for no logits. A class index is the target that is 1 at that class. Label
    smoothing mixes every target with the uniform one: t <- (1 - s) * t + s / K (Szegedy et al. 2016).

Backward
    dloss is the gradient of the loss itself: 1, or a factor that the loss is multiplied by afterwards. The derivative
    of logsumexp(x_i) by x_ik is exp(x_ik) / sum_j exp(x_ij) = p_ik, and the second term is linear, so

        dx_ik = dloss * (w_i * p_ik - t_ik) / n            and for probabilities dloss * (p_ik - t_ik) / n

    That p - t is so simple is the reason for making softmax and cross-entropy one function. Taken apart, the gradient
    of p_ik would be -t_ik / p_ik, huge for a small p_ik, and softmax's backward would multiply it by p_ik again.

Squared error
    loss = (1 / (n * m)) * sum_ij (y_ij - t_ij)^2, whose derivative by y_ij is 2 * (y_ij - t_ij) / (n * m).

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

    Math    loss = (1/n) * sum_i (w_i * logsumexp(x_i) - sum_k t_ik * x_ik), in nats; n = ``denominator`` or B
    Shapes  logits x (B, K), labels (B,) integers or t (B, K) probabilities  ->  loss (), one number
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
    # the maximum cancels: w * (log(total) + max) - sum(t * (shifted + max)) = w * log(total) - sum(t * shifted)
    loss = ((weights * xp.log(total)).sum() - (targets * shifted).sum()) / denominator
    return loss, CrossEntropyCache(probabilities, targets, weights, denominator)


@accelerated
def softmax_cross_entropy_backward(dloss, cache):
    """Backward of `softmax_cross_entropy_forward`.

    Math    dlogits = dloss * (w * p - t) / n
    Shapes  dloss ()  ->  dlogits (B, K)
    """
    probabilities, targets, weights, denominator = cache
    # loss = sum_i (w_i * logsumexp(x_i) - sum_k t_ik * x_ik) / n
    return (weights * probabilities - targets) * (dloss / denominator)  # (B, K)


class SquaredErrorCache(NamedTuple):
    """What `squared_error_backward` reads."""

    difference: Any  # (n, m)
    denominator: float  # of the sum of squares


@accelerated
def squared_error_forward(y, targets, *, denominator=None):
    """Mean squared error over all entries.

    Math    loss = (1 / (n * m)) * sum_ij (y_ij - t_ij)^2; n = ``denominator`` or the number of rows
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

    Math    dy = dloss * 2 * (y - t) / (n * m)
    Shapes  dloss ()  ->  dy (n, m)
    """
    # loss = sum_ij (y_ij - t_ij)^2 / (n * m)
    return cache.difference * (2.0 * dloss / cache.denominator)
