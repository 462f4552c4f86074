"""Every figure. Figures are made without a display and without pyplot's global state."""

from __future__ import annotations

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from minivit.checkpoint import write_atomically
from minivit.layers.softmax import softmax_forward

TRAIN, TEST, GOOD, BAD = "#7a869a", "#c2410c", "#15803d", "#b91c1c"


def _figure(width, height):
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure, path):
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def _style(axes, xlabel, ylabel, title):
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def picture(image):
    """A (H, W, C) uint8 picture as matplotlib shows it: one channel as (H, W), more than three as the first three."""
    return image[..., 0] if image.shape[-1] < 3 else image[..., :3]


def save_curves(path, records, *, title=""):
    """Loss, accuracy and learning rate of a run, from the records of its metrics.jsonl."""
    train = [r for r in records if r["kind"] == "train"]
    test = [r for r in records if r["kind"] == "test"]
    per_epoch = max((r["step"] / r["epoch"] for r in test), default=1.0)
    figure = _figure(11, 3.6)
    loss, accuracy, lr = figure.subplots(1, 3)
    epochs = [r["step"] / per_epoch for r in train]
    loss.plot(epochs, [r["loss"] for r in train], color=TRAIN, lw=0.7, alpha=0.5, label="a training batch")
    loss.plot([r["epoch"] for r in test], [r["train_loss"] for r in test], color=TRAIN, lw=2, label="training, epoch mean")
    loss.plot([r["epoch"] for r in test], [r["loss"] for r in test], color=TEST, lw=2, label="test")
    _style(loss, "epoch", "cross-entropy, nats", f"{title}: loss" if title else "loss")
    loss.set_ylim(bottom=0)
    loss.legend(frameon=False, fontsize=8)
    accuracy.plot([r["epoch"] for r in test], [100 * r["train_accuracy"] for r in test], color=TRAIN, lw=2, label="training")
    accuracy.plot([r["epoch"] for r in test], [100 * r["accuracy"] for r in test], color=TEST, lw=2, label="test")
    if test:
        last = test[-1]
        _style(accuracy, "epoch", "accuracy, %", f"accuracy: {last['accuracy']:.2%} on the test pictures at the end")
    accuracy.legend(frameon=False, fontsize=8, loc="lower right")
    lr.plot(epochs, [r["lr"] for r in train], color=TRAIN, lw=2)
    _style(lr, "epoch", "learning rate", "learning rate")
    lr.set_ylim(bottom=0)
    _save(figure, path)


def save_predictions(path, images, labels, logits, class_names, *, rows=4, columns=8):
    """A grid of the first test pictures: predicted class and its probability, and the true class where they differ."""
    probabilities, _ = softmax_forward(np.asarray(logits))
    count = min(rows * columns, len(images))
    figure = _figure(1.45 * columns, 1.75 * rows)
    for i, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.set_axis_off()
        if i >= count:
            continue
        axes.imshow(picture(images[i]), cmap="gray_r", interpolation="nearest")
        guess, truth = int(probabilities[i].argmax()), int(labels[i])
        text = f"{class_names[guess]} {probabilities[i, guess]:.0%}"
        if guess != truth:
            text += f"\ntruly {class_names[truth]}"
        axes.set_title(text, fontsize=8, color=GOOD if guess == truth else BAD)
    right = int((probabilities[:count].argmax(axis=1) == labels[:count]).sum())
    figure.suptitle(f"The first {count} test pictures: {right} right, {count - right} wrong", fontsize=11)
    _save(figure, path)


def save_confusion(path, confusion, class_names, *, title=""):
    """The confusion matrix: rows are true classes, columns predicted ones, entries the share of the row.

    Shapes  confusion (K, K) counts
    """
    K = len(class_names)
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    size = min(4.0 + 0.45 * K, 16.0)
    figure = _figure(size, size)
    axes = figure.subplots()
    shown = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    if K <= 30:  # with more, names and numbers would be too small to read
        axes.set_xticks(range(K), class_names, rotation=60, ha="right")
        axes.set_yticks(range(K), class_names)
        for row in range(K):
            for column in range(K):
                if confusion[row, column]:
                    color = "white" if share[row, column] > 0.5 else "black"
                    axes.text(column, row, int(confusion[row, column]), ha="center", va="center", fontsize=8, color=color)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title, loc="left", fontsize=11)
    figure.colorbar(shown, ax=axes, fraction=0.046, pad=0.02, label="share of the true class")
    _save(figure, path)


def save_attention(path, image, attention, probabilities, class_names, *, title="", top=5):
    """A picture, the same picture under its attention map, and the most probable classes.

    Shapes  image (H, W, C) uint8; attention (grid, grid), non-negative; probabilities (K,)
    """
    H, W = image.shape[:2]
    figure = _figure(10, 3.4)
    original, overlay, bars = figure.subplots(1, 3, width_ratios=[1, 1, 1.3])
    for axes, name in ((original, title), (overlay, "attention, mean of the last block's heads")):
        axes.imshow(picture(image), cmap="gray_r" if image.shape[-1] < 3 else None, interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(name, fontsize=10)
    extent = (-0.5, W - 0.5, H - 0.5, -0.5)
    shown = overlay.imshow(attention / attention.sum(), cmap="inferno", alpha=0.6, extent=extent, interpolation="nearest")
    figure.colorbar(shown, ax=overlay, fraction=0.046, pad=0.02, label="share of attention")
    order = np.argsort(probabilities)[::-1][:top]
    bars.barh(range(len(order)), 100 * probabilities[order], color=TEST)
    bars.set_yticks(range(len(order)), [class_names[k] for k in order])
    bars.invert_yaxis()
    bars.set_xlim(0, 100)
    _style(bars, "probability, %", "", "prediction")
    _save(figure, path)
