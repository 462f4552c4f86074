"""Every figure. Figures are made without a display and without pyplot's global state."""

from __future__ import annotations

import warnings

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from minivit.checkpoint import write_atomically
from minivit.layers.softmax import softmax_forward

TRAIN, TEST, GOOD, BAD = "#7a869a", "#c2410c", "#15803d", "#b91c1c"


def _figure(width, height):
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure, path):
    with warnings.catch_warnings():
        # a script that the font lacks shows as boxes, and names too long for the figure are cut: no reason to fail
        warnings.filterwarnings("ignore", message=r"Glyph .* missing|constrained_layout not applied|Tight layout")
        write_atomically(path, lambda file: figure.savefig(file, format="png"))


def label(text, length=24):
    """A name from outside as matplotlib shows it: one line, cut to a length, and "$" is no mathematics."""
    text = " ".join(str(text).split())
    text = text if len(text) <= length else text[: length - 1] + "…"
    return text.replace("$", r"\$")


def _style(axes, xlabel, ylabel, title):
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if xlabel == "epoch":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def picture(image):
    """A (H, W, C) uint8 picture as matplotlib shows it: one channel as (H, W), more than three as the first three."""
    return image[..., 0] if image.shape[-1] < 3 else image[..., :3]


def _show(axes, image):
    axes.imshow(picture(image), cmap="gray_r", vmin=0, vmax=255, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_color("#cccccc")


def save_curves(path, records, *, title=""):
    """Loss, accuracy and learning rate of a run, from the records of its metrics.jsonl."""
    train = [r for r in records if r["kind"] == "train"]
    test = [r for r in records if r["kind"] == "test"]
    per_epoch = max((r["step"] / r["epoch"] for r in test), default=1.0)
    figure = _figure(11, 3.6)
    loss, accuracy, lr = figure.subplots(1, 3)
    epochs = [r["step"] / per_epoch for r in train]
    loss.plot(epochs, [r["loss"] for r in train], color=TRAIN, lw=0.7, alpha=0.5, label="a training batch")
    line = {"lw": 2, "marker": "o" if len(test) < 2 else None}  # a single point would have no line
    loss.plot(
        [r["epoch"] for r in test], [r["train_loss"] for r in test], color=TRAIN, label="training, epoch mean", **line
    )
    loss.plot([r["epoch"] for r in test], [r["loss"] for r in test], color=TEST, label="test", **line)
    _style(loss, "epoch", "cross-entropy, nats", f"{title}: loss" if title else "loss")
    loss.set_ylim(bottom=0)
    loss.legend(frameon=False, fontsize=8)
    if test:
        accuracy.plot(
            [r["epoch"] for r in test], [100 * r["train_accuracy"] for r in test], color=TRAIN, label="training", **line
        )
        accuracy.plot([r["epoch"] for r in test], [100 * r["accuracy"] for r in test], color=TEST, label="test", **line)
        last = test[-1]
        _style(accuracy, "epoch", "accuracy, %", f"accuracy: {last['accuracy']:.2%} at the end")
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
        if i >= count:
            axes.set_axis_off()
            continue
        _show(axes, images[i])
        guess, truth = int(probabilities[i].argmax()), int(labels[i])
        text = f"{label(class_names[guess], 16)} {probabilities[i, guess]:.0%}"
        if guess != truth:
            text += f"\ntruly {label(class_names[truth], 16)}"
        axes.set_title(text, fontsize=8, color=GOOD if guess == truth else BAD)
    right = int((probabilities[:count].argmax(axis=1) == labels[:count]).sum())
    figure.suptitle(f"The first {count} test pictures: {right} right, {count - right} wrong", fontsize=11)
    _save(figure, path)


def save_v_curves(path, panels, *, title=""):
    """Error of numerical derivatives against their step: the V-curves of one function.

    ``panels``: {argument: {(method, dtype name): (`gradcheck.Curve`, `gradcheck.Knee`)}}, a panel for each argument
    """
    colors = {"forward": "#64748b", "central": "#1d4ed8", "five-point": "#15803d", "complex": TEST}
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = _figure(4.6 * columns + 1.5, 4.0 * rows + 0.6)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes, (argument, curves) in zip(grid.flat, panels.items(), strict=False):
        for (method, dtype), (curve, found) in curves.items():
            narrow = dtype == "float32"
            color = colors[method]
            axes.loglog(curve.steps, curve.errors, color=color, lw=1.0 if narrow else 1.8, ls=":" if narrow else "-",
                        zorder=1 if method == "complex" else 2,
                        label=f"{method}, {dtype}")  # fmt: skip
            if found.slope == found.slope and method != "complex":  # a slope was measured: there is a knee
                axes.plot(found.step, found.error, "o", color=color, ms=7, mec="white", zorder=3)
        _style(axes, "step h", "relative error", f"derivative with respect to {argument}")
        axes.set_xlim(1e-14, 10**-0.5)
        axes.set_ylim(3e-18, 1e3)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    first = grid[0, 0]
    first.text(2e-13, 2e-14, "complex step: nothing is subtracted", fontsize=8, color=colors["complex"])
    first.text(2e-13, 2e1, "rounding: error ~ eps / h", fontsize=8, color="#334155")
    first.text(0.28, 2e1, "truncation: error ~ h^order", fontsize=8, color="#334155", ha="right")
    handles, labels = first.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def save_curvature(path, records, *, edge, slice_=None, title=""):
    """Sharpness beside the loss along a run, with the edge of stability, and the loss surface at its end.

    ``records``: dicts with epoch, loss, lr, eigenvalues, edge and, for adaptive optimisers, preconditioned;
    ``edge``: what the edge belongs to, in words; ``slice_``: (offsets, losses) of `curvature.loss_slice`, or None
    """
    figure = _figure(13.5 if slice_ else 9.0, 4.0)
    panels = figure.subplots(1, 3 if slice_ else 2)
    epochs = [r["epoch"] for r in records]
    loss, sharp = panels[:2]
    loss.plot(epochs, [r["loss"] for r in records], color=TEST, lw=2, marker="o", ms=3)
    _style(loss, "epoch", "cross-entropy, nats", f"{title}: loss on the pictures measured")
    loss.set_ylim(bottom=0)
    count = min(len(r["eigenvalues"]) for r in records)
    for k in range(count):
        label = "largest eigenvalues of H" if k == 0 else None
        sharp.semilogy(epochs, [r["eigenvalues"][k] for r in records], color=TRAIN, lw=2.2 - 0.5 * k, label=label)
    adaptive = [r for r in records if r.get("preconditioned")]
    if adaptive:
        sharp.semilogy([r["epoch"] for r in adaptive], [r["preconditioned"] for r in adaptive], color="#1d4ed8", lw=2,
                       label="largest, as the optimiser sees it")  # fmt: skip
    finite = [r for r in records if r["edge"]]
    sharp.semilogy([r["epoch"] for r in finite], [r["edge"] for r in finite], color=BAD, ls="--", label=edge)
    _style(sharp, "epoch", "curvature", "sharpness and the edge of stability")
    highest = max(max(*r["eigenvalues"], r.get("preconditioned", 0.0)) for r in records)
    sharp.set_ylim(top=30 * highest)  # the edge goes to infinity as the learning rate goes to 0
    sharp.legend(frameon=False, fontsize=8)
    if slice_:
        offsets, losses = slice_
        surface = panels[2]
        filled = surface.contourf(offsets, offsets, np.log10(losses), levels=24, cmap="viridis")
        surface.plot(0, 0, "o", color="white", ms=6, mec="black")
        figure.colorbar(filled, ax=surface, label="log10 of the loss")
        _style(surface, "along the sharpest direction", "along the second", "loss surface at the end")
        surface.grid(False)
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
        names = [label(name) for name in class_names]
        upright = max(map(len, names)) <= 3
        axes.set_xticks(range(K), names, rotation=0 if upright else 60, ha="center" if upright else "right")
        axes.set_yticks(range(K), names)
        for row in range(K):
            for column in range(K):
                if confusion[row, column]:
                    color = "white" if share[row, column] > 0.5 else "black"
                    axes.text(
                        column, row, int(confusion[row, column]), ha="center", va="center", fontsize=8, color=color
                    )
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title, loc="left", fontsize=11)
    figure.colorbar(shown, ax=axes, fraction=0.046, pad=0.02, label="share of the true class")
    _save(figure, path)


def save_attention(path, image, attention, probabilities, class_names, *, title="", truth=None, top=5):
    """A picture, the same picture under its attention map, and the most probable classes.

    Shapes  image (H, W, C) uint8; attention (grid, grid), non-negative; probabilities (K,)
    The first bar is green, or red if the true class is given and is another one.
    """
    H, W = image.shape[:2]
    share = attention / max(float(attention.sum()), 1e-30)
    figure = _figure(10, 3.3)
    original, overlay, bars = figure.subplots(1, 3, width_ratios=[1, 1.2, 1.2])
    _show(original, image)
    original.set_title(label(title, 40), fontsize=11, loc="left")
    _show(overlay, image)
    extent = (-0.5, W - 0.5, H - 0.5, -0.5)
    shown = overlay.imshow(100 * share, cmap="viridis", vmin=0, alpha=0.7, extent=extent, interpolation="nearest")
    overlay.set_title("attention of the last block, mean of its heads", fontsize=9, loc="left")
    figure.colorbar(shown, ax=overlay, fraction=0.046, pad=0.02, format="%.3g%%")
    order = np.argsort(probabilities)[::-1][:top]
    first = BAD if truth is not None and truth != order[0] else GOOD
    bars.barh(range(len(order)), 100 * probabilities[order], color=[first, *[TRAIN] * (len(order) - 1)], height=0.7)
    for row, k in enumerate(order):
        bars.text(100 * probabilities[k] + 1.5, row, f"{probabilities[k]:.1%}", va="center", fontsize=9)
    bars.set_yticks(range(len(order)), [label(class_names[k]) for k in order])
    bars.invert_yaxis()
    bars.set_xlim(0, 118)
    bars.set_xticks(range(0, 101, 25))
    _style(bars, "probability, %", "", f"prediction: {label(class_names[order[0]])}")
    _save(figure, path)
