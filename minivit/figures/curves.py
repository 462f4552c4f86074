"""Curves of a run: loss, accuracy, learning rate and more against epochs; the ramp of learning rates."""

from __future__ import annotations

import numpy as np
from matplotlib.ticker import LogFormatter

from minivit.figures.canvas import GOOD, INK, TEST, TRAIN, new_figure, own_style, save, style


def steps_per_epoch(records):
    """Steps per epoch of a run, from the records of its metrics.jsonl; 1 if it has not been tested yet."""
    return max((r["step"] / r["epoch"] for r in records if r["kind"] == "test"), default=1.0)


def _of_kind(records, kind, *names):
    """The records of a kind that hold numbers of these names: those of an older version may lack some."""
    return [r for r in records if r["kind"] == kind and all(type(r.get(name)) in (int, float) for name in names)]


def _line(points, width=2.0):
    return {"lw": width, "marker": "o" if len(points) < 2 else None}  # a single point would have no line


def training_label(config):
    """What the training loss of a run with a `TrainConfig` is of: "training (augmented, smoothed targets)", ..."""
    moved = ("policy", "crop_area", "crop_padding", "flip", "rotate", "zoom", "shear", "shift", "erasing")
    words = ["augmented"] if any(getattr(config, name) not in (0, "none") for name in moved) else []
    words += ["mixed"] if config.mixup or config.cutmix else []
    words += ["smoothed targets"] if config.label_smoothing else []
    return f"training ({', '.join(words)})" if words else "training"


def _draw_loss(axes, records, per_epoch, title, training="training"):
    train, test = _of_kind(records, "train"), _of_kind(records, "test")
    epochs = [r["step"] / per_epoch for r in train]
    axes.plot(epochs, [r["loss"] for r in train], color=TRAIN, lw=0.7, alpha=0.5, label="a training batch")
    axes.plot(
        [r["epoch"] for r in test],
        [r["train_loss"] for r in test],
        color=TRAIN,
        label=training,
        **_line(test),
    )
    axes.plot([r["epoch"] for r in test], [r["loss"] for r in test], color=TEST, label="test", **_line(test))
    style(axes, "epoch", "cross-entropy, nats", f"{title}: loss" if title else "loss")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)


def _draw_accuracy(axes, records, per_epoch, title):
    test = _of_kind(records, "test")
    if not test:
        return
    epochs = [r["epoch"] for r in test]
    axes.plot(epochs, [100 * r["train_accuracy"] for r in test], color=TRAIN, label="training", **_line(test))
    axes.plot(epochs, [100 * r["accuracy"] for r in test], color=TEST, label="test", **_line(test))
    style(axes, "epoch", "accuracy, %", f"accuracy: {test[-1]['accuracy']:.2%} at the end")
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def _draw_lr(axes, records, per_epoch, title):
    train = _of_kind(records, "train")
    axes.plot([r["step"] / per_epoch for r in train], [r["lr"] for r in train], color=TRAIN, **_line(train))
    style(axes, "epoch", "learning rate", "learning rate")
    axes.set_ylim(bottom=0)


def _draw_gradient_norm(axes, records, per_epoch, title):
    train = [r for r in _of_kind(records, "train", "grad_norm") if r["grad_norm"] > 0]
    axes.semilogy([r["step"] / per_epoch for r in train], [r["grad_norm"] for r in train], color=TRAIN,
                  **_line(train, 1.0))  # fmt: skip
    axes.yaxis.set_major_formatter(LogFormatter())  # 0.5, not 5 × 10^-1
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.0, 0.5)))
    style(axes, "epoch", "global norm of the gradient", "gradient norm, before clipping")


def _draw_throughput(axes, records, per_epoch, title):
    train = _of_kind(records, "train", "images_per_second")
    rates = [r["images_per_second"] for r in train]
    axes.plot([r["step"] / per_epoch for r in train], rates, color=TRAIN, **_line(train, 1.0))
    median = f", median {np.median(rates):,.0f}" if rates else ""
    style(axes, "epoch", "images per second", f"training throughput{median}")
    axes.set_ylim(bottom=0)


def epoch_times(records):
    """(epochs, seconds per epoch) between one evaluation of a run and the next, the evaluation included."""
    epochs, seconds = [0], [0.0]
    for r in _of_kind(records, "test", "seconds"):
        if r["epoch"] > epochs[-1] and r["seconds"] >= seconds[-1]:
            epochs.append(r["epoch"])
            seconds.append(r["seconds"])
    return epochs[1:], [float(s / e) for s, e in zip(np.diff(seconds), np.diff(epochs), strict=True)]


def _draw_epoch_time(axes, records, per_epoch, title):
    epochs, seconds = epoch_times(records)
    axes.plot(epochs, seconds, color=TRAIN, **_line(epochs))
    median = f", median {np.median(seconds):,.3g} s" if seconds else ""
    style(axes, "epoch", "seconds per epoch", f"time of an epoch with its tests{median}")
    axes.set_ylim(bottom=0)


CURVES = {"loss": _draw_loss, "accuracy": _draw_accuracy, "lr": _draw_lr, "gradient norm": _draw_gradient_norm,
          "throughput": _draw_throughput, "epoch time": _draw_epoch_time}  # fmt: skip


@own_style
def save_curves(path, records, *, title="", training="training"):
    """Loss, accuracy and learning rate of a run, from the records of its metrics.jsonl.

    ``training`` names the curve of the training loss, see `training_label`.
    """
    figure = new_figure(11, 3.6)
    for axes, name in zip(figure.subplots(1, 3), ("loss", "accuracy", "lr"), strict=True):
        named = {"training": training} if name == "loss" else {}
        CURVES[name](axes, records, steps_per_epoch(records), title, **named)
    save(figure, path)


@own_style
def save_curve(path, name, records, *, per_epoch=None, training="training"):
    """One of the ``CURVES`` of a run alone, from the records of its metrics.jsonl; with ``path=None`` an SVG element.

    ``per_epoch``: steps per epoch, where the records need not tell; ``training``: see `save_curves`
    """
    figure = new_figure(5.0, 3.3)
    axes = figure.subplots()
    named = {"training": training} if name == "loss" else {}
    CURVES[name](axes, records, per_epoch or steps_per_epoch(records), "", **named)
    axes.set_xlim(left=0)
    return save(figure, path)


@own_style
def save_masked_curves(path, records, *, chance, regression=False, title=""):
    """Loss, accuracy and learning rate of pre-training, with what a guess without looking reaches.

    ``chance``: its "loss" and "accuracy"; ``regression``: the loss is a squared error, the accuracy explained variance
    """
    figure = new_figure(11, 3.6)
    left, middle, right = figure.subplots(1, 3)
    test = _of_kind(records, "test")
    epochs = [r["epoch"] for r in test]
    units = ("squared error", "variance explained, %") if regression else ("cross-entropy, nats", "right guesses, %")
    for axes, name, unit, factor in ((left, "loss", units[0], 1), (middle, "accuracy", units[1], 100)):
        for key, color, who in ((f"train_{name}", TRAIN, "training"), (name, TEST, "test")):
            axes.plot(epochs, [factor * r[key] for r in test], color=color, label=who, **_line(test))
        axes.axhline(factor * chance[name], color=INK, lw=1, ls=":", label="without looking")
        style(axes, "epoch", unit, f"{title}: loss" if name == "loss" else "at the masked patches")
        axes.legend(frameon=False, fontsize=8)
    left.set_ylim(bottom=0)
    _draw_lr(right, records, steps_per_epoch(records), title)
    save(figure, path)


@own_style
def save_lr_curve(path, ramp, *, chosen=None, title=""):
    """Raw and smoothed loss of a ramp of learning rates (`minivit.training.lr_finder`), with the rates it suggests.

    ``chosen``: the learning rate that the run would have had, drawn too if it lies among the others
    """
    figure = new_figure(7.5, 4.2)
    axes = figure.subplots()
    axes.semilogx(ramp.rates, ramp.losses, color=TRAIN, lw=0.8, alpha=0.6, label="a training batch")
    axes.semilogx(ramp.rates, ramp.smoothed, color=TEST, lw=2, label="smoothed")
    least = ramp.rates[ramp.least], ramp.smoothed[ramp.least]
    axes.plot(*least, "o", ms=7, color=TEST, mec="white", zorder=4, label=f"least: {least[0]:.2g}")
    for (name, rate), color in zip(ramp.suggestions.items(), (GOOD, "#1d4ed8"), strict=False):
        axes.axvline(rate, color=color, lw=1.5, ls="--", label=f"{name}: {rate:.2g}")
    if chosen and ramp.rates[0] <= chosen <= ramp.rates[-1]:
        axes.axvline(chosen, color="black", lw=1, ls=":", label=f"this run's lr: {chosen:.2g}")
    # what falls is to be seen: where the loss leaps at the end, the curve leaves the figure
    start, low, high = ramp.smoothed[0], ramp.losses.min(), ramp.smoothed.max()
    high = min(high, start + 1.5 * (start - low)) if ramp.suggestions else high
    room = max(high - low, 1e-3)
    axes.set_ylim(low - 0.05 * room, high + 0.05 * room)
    style(axes, "learning rate", "cross-entropy, nats", title)
    axes.legend(frameon=False, fontsize=8, loc="best")
    save(figure, path)
