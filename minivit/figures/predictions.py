"""Predictions of a test set: a grid of images, the confusion matrix, the reliability diagram."""

from __future__ import annotations

import numpy as np

from minivit.figures.canvas import BAD, GOOD, INK, OURS, THEIRS, TRAIN, label, new_figure, own_style, save, show, style
from minivit.layers.softmax import softmax_forward


@own_style
def save_predictions(path, images, labels, logits, class_names, *, rows=4, columns=8):
    """A grid of test images, evenly spaced over the set: predicted class, its probability, the true one if wrong."""
    count = min(rows * columns, len(images))
    rows = -(-count // columns)
    picks = np.linspace(0, len(images) - 1, count).round().astype(int)  # a folder's images are sorted by class
    images, labels = images[picks], labels[picks]
    probabilities, _ = softmax_forward(np.asarray(logits)[picks])
    figure = new_figure(1.45 * columns, 1.75 * rows + 0.3)
    for i, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        if i >= count:
            axes.set_axis_off()
            continue
        show(axes, images[i])
        guess, truth = int(probabilities[i].argmax()), int(labels[i])
        text = f"{label(class_names[guess], 16)} {probabilities[i, guess]:.0%}"
        if guess != truth:
            text += f"\ntruly {label(class_names[truth], 16)}"
        axes.set_title(text, fontsize=8, color=GOOD if guess == truth else BAD)
    right = int((probabilities.argmax(axis=1) == labels).sum())
    figure.suptitle(f"{count} of the test images: {right} right, {count - right} wrong", fontsize=11)
    save(figure, path)


@own_style
def save_confusion(path, confusion, class_names, *, title=""):
    """The confusion matrix: rows are true classes, columns predicted ones, entries the share of the row.

    Shapes  confusion (K, K) counts
    With ``path=None`` an SVG element.
    """
    K = len(class_names)
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    size = min(4.0 + 0.45 * K, 16.0)
    figure = new_figure(size, size)
    axes = figure.subplots()
    mesh = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    if K <= 30:  # with more, names and numbers would be too small to read
        names = [label(name) for name in class_names]
        upright = max(map(len, names)) <= 3
        axes.set_xticks(range(K), names, rotation=0 if upright else 60, ha="center" if upright else "right")
        axes.set_yticks(range(K), names)
        for row in range(K):
            for column in range(K):
                if confusion[row, column]:
                    color = "white" if share[row, column] > 0.5 else INK
                    axes.text(
                        column, row, int(confusion[row, column]), ha="center", va="center", fontsize=8, color=color
                    )
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title, loc="left", fontsize=11)
    figure.colorbar(mesh, ax=axes, fraction=0.046, pad=0.02, label="share of the true class")
    return save(figure, path)


@own_style
def save_calibration(path, bins, *, title=""):
    """A reliability diagram: accuracy against confidence in bins of equal width, over the share of predictions in each.

    ``bins``: a `minivit.evaluation.metrics.Calibration`; the distance of each bar from its mean confidence is red.
    With ``path=None`` an SVG element.
    """
    M = len(bins.count)
    left, used = np.arange(M) / M, bins.count > 0
    figure = new_figure(5.0, 4.4)
    reliability, share = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    bar = {"align": "edge", "width": 1 / M}
    reliability.bar(left[used], 100 * bins.accuracy[used], color=OURS, alpha=0.45, label="accuracy", **bar)
    gap = 100 * (bins.confidence - bins.accuracy)[used]
    reliability.bar(left[used], gap, bottom=100 * bins.accuracy[used], color="none", edgecolor=BAD, hatch="////",
                    lw=0.8, label="distance from the confidence", **bar)  # fmt: skip
    reliability.plot([0, 1], [0, 100], color=THEIRS, ls="--", lw=1.2, label="calibrated")
    style(reliability, "", "accuracy, %", label(title, 60))
    reliability.set(xlim=(0, 1), ylim=(0, 100))
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    share.bar(left, 100 * bins.count / bins.count.sum(), color=TRAIN, **bar)
    style(share, "confidence: probability of the predicted class", "images, %", "")
    return save(figure, path)
