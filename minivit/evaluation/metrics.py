r"""What a classifier's predictions are worth: figures by class, the confusion matrix, calibration, temperature.

Calibration (Guo, Pleiss, Sun and Weinberger 2017, "On Calibration of Modern Neural Networks", arXiv:1706.04599)
    The confidence of a prediction is the probability of the predicted class, c_i = max_k p_ik. A model is calibrated
    if, of all predictions made with confidence c, the share c is right. With the predictions sorted by confidence into
    M bins of equal width, B_m = {i : (m-1)/M < c_i <= m/M}, the expected calibration error is the mean distance from
    that, Eq. 3 there:

        ECE = sum_m |B_m| / n |acc(B_m) - conf(B_m)|,

    where acc(B_m) is the share of right predictions in a bin and conf(B_m) their mean confidence.

Temperature (the same paper, section 4.2)
    Dividing all logits by T > 0 changes no prediction, and every confidence. With b = 1 / T the mean negative
    log-likelihood and its derivative are

        NLL(b) = 1/n sum_i (logsumexp_k(b z_ik) - b z_iy),    NLL'(b) = 1/n sum_i (sum_k p_ik(b) z_ik - z_iy).

    logsumexp is convex, hence so is NLL(b): NLL' rises, and the b where it is 0 is found by bisection. There is none
    if NLL'(0) >= 0, when no b > 0 beats equal probabilities (T is infinite), or if every prediction is right, when
    NLL falls for ever as b grows (T is 0).

ReaL (Beyer, Henaff, Kolesnikov, Zhai and van den Oord 2020, "Are we done with ImageNet?", arXiv:2006.07159)
    ImageNet's validation images were labelled again, each with all the classes that are to be seen. A prediction is
    right if it is one of them; images of which people found no class are left out.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minivit.base.errors import InputError
from minivit.base.files import parse_json
from minivit.layers.loss import softmax_cross_entropy_forward
from minivit.layers.softmax import softmax_forward

BINS = 15  # as in the paper


def measure(logits, labels, class_names):
    """The figures of a set of predictions.

    Math    precision_k = right_k / predicted_k;  recall_k = right_k / count_k
            accuracy_k = 1 - (count_k + predicted_k - 2 right_k) / n, of class k against all the others
    Shapes  logits (n, K), labels (n,)  ->  dict ready for JSON, confusion matrix (K, K): rows are the true classes
    A precision or recall that would be 0/0 is None.
    """
    K, n = len(class_names), len(labels)
    guesses = logits.argmax(axis=1)
    confusion = np.bincount(labels * K + guesses, minlength=K * K).reshape(K, K)  # rows: true classes
    right, count, guessed = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    loss, _ = softmax_cross_entropy_forward(logits.astype(np.float64), labels)
    figures = {"images": n, "accuracy": float(right.sum() / n)}
    if K > 5:
        top = np.argpartition(logits, -5, axis=1)[:, -5:]
        figures["top5_accuracy"] = float((top == labels[:, None]).any(axis=1).mean())
    figures["loss"] = float(loss)
    figures["classes"] = [
        {
            "name": class_names[k],
            "count": int(count[k]),
            "accuracy": float((n - count[k] - guessed[k] + 2 * right[k]) / n),
            "precision": float(right[k] / guessed[k]) if guessed[k] else None,  # None: the class was never predicted,
            "recall": float(right[k] / count[k]) if count[k] else None,  # or has no images
        }
        for k in range(K)
    ]
    figures["confusion"] = confusion.tolist()
    return figures, confusion


def read_real(path, names, num_classes):
    """The reassessed labels of ImageNet validation images, from the official ``real.json``.

    The file is a list with a list of classes for each image, ILSVRC2012_val_00000001.JPEG first.

    Shapes  names (n,), of files, in any order  ->  n lists of classes; those of unknown images are empty there
    Raises  InputError: no such file, it is another one, a name is none of an ImageNet validation image, or no image
    has a label.
    """
    try:
        content = parse_json(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"there is no file {path}; real.json is at github.com/google-research/reassessed-imagenet"
        ) from None
    except ValueError as error:
        raise InputError(f"{path} is not a JSON file: {error}") from None
    if not isinstance(content, list) or not all(
        isinstance(classes, list) and all(type(k) is int and 0 <= k < num_classes for k in classes)
        for classes in content
    ):
        raise InputError(f"{path} must hold a list with a list of classes, 0 to {num_classes - 1}, for each image")
    if not names:
        raise InputError(f"{path} is about the files of ImageNet's validation images: use --data folder or imagefolder")
    answers = []
    for name in names:
        match = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.\w+", name)
        if not match or not 1 <= int(match[1]) <= len(content):
            raise InputError(
                f"{name} is none of the {len(content):,} images of {path}, ILSVRC2012_val_00000001.JPEG, ..."
            )
        answers.append(content[int(match[1]) - 1])
    if not any(answers):
        raise InputError(f"{path} has no label of any of the {len(names)} test images: there is nothing to count")
    return answers


def real_accuracy(guesses, real):
    """The share of predictions that are among an image's reassessed labels, of images that have any.

    Math    mean of [guess_i in real_i] over the i with real_i not empty
    Shapes  guesses (n,) classes, real n lists of classes, not all empty  ->  accuracy, and how many were counted
    """
    right = [guess in classes for guess, classes in zip(guesses.tolist(), real, strict=True) if classes]
    return sum(right) / len(right), len(right)


class Calibration(NamedTuple):
    """Predictions in bins of equal width by their confidence."""

    count: Any  # (M,)  predictions in each bin, |B_m|
    accuracy: Any  # (M,)  acc(B_m), NaN in an empty bin
    confidence: Any  # (M,)  conf(B_m), NaN in an empty bin
    error: float  # the expected calibration error


def calibration(probabilities, labels, *, bins=BINS):
    """The reliability of predictions by their confidence, and the expected calibration error.

    Math    B_m = {i : (m-1)/M < max_k p_ik <= m/M};  ECE = sum_m |B_m| / n |acc(B_m) - conf(B_m)|
    Shapes  probabilities (n, K), labels (n,)  ->  Calibration of M = ``bins`` bins
    Raises  ValueError: no prediction, fewer than one bin, or shapes that do not fit.
    Source  Guo et al. 2017, arXiv:1706.04599, Eq. 3
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not len(labels):
        raise ValueError(f"probabilities {probabilities.shape} and labels {labels.shape}: (n, K) and (n,) are needed")
    confidence = probabilities.max(axis=1).astype(np.float64)  # (n,)
    right = probabilities.argmax(axis=1) == labels  # (n,)
    inner = np.arange(1, bins) / bins
    index = np.searchsorted(inner, confidence, side="left")  # a confidence on an edge belongs to the bin below
    count = np.bincount(index, minlength=bins)
    sums = [np.bincount(index, weights=values, minlength=bins) for values in (right, confidence)]
    means = [np.where(count, total / np.maximum(count, 1), np.nan) for total in sums]
    error = np.abs(sums[0] - sums[1]).sum() / len(labels)  # |B_m| cancels
    return Calibration(count, *means, float(error))


def best_temperature(logits, labels):
    """The temperature T by which logits are to be divided for the smallest mean cross-entropy on these labels.

    Math    argmin_T NLL(z / T): the root b = 1 / T of 1/n sum_i (sum_k softmax(b z_i)_k z_ik - z_iy)
    Shapes  logits (n, K), labels (n,)  ->  T, to a relative 1e-12; 0.0 if every prediction is right, infinite if equal
            probabilities are better than any T
    Raises  ValueError: no prediction, or logits that are not finite.
    Source  Guo et al. 2017, arXiv:1706.04599, section 4.2
    """
    if not len(labels) or not np.isfinite(logits).all():
        raise ValueError("a temperature is fitted to at least one row of finite logits")
    z = logits.astype(np.float64)
    z -= z.max(axis=1, keepdims=True)  # changes no probability
    own = z[np.arange(len(labels)), labels]  # (n,)

    def slope(b):
        p, _ = softmax_forward(b * z)
        return float(((p * z).sum(axis=1) - own).mean())

    if slope(0.0) >= 0.0:
        return math.inf
    if not own.any():  # each label has the largest logit
        return 0.0
    low, high = 0.0, 1.0
    while slope(high) < 0.0:
        low, high = high, 2.0 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2.0
        low, high = (middle, high) if slope(middle) < 0.0 else (low, middle)
    return 2.0 / (low + high)
