"""Every figure. Figures are made without a display and without pyplot's global state.

``path`` is where the figure goes, a PNG unless it ends in .pdf or .svg. Some figures can become a part of a page
instead: with ``path=None`` they are returned as an SVG element (see `_svg`).
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, FancyBboxPatch
from matplotlib.ticker import LogFormatter, MaxNLocator

from minivit.laboratory.gradcheck import METHODS
from minivit.layers.softmax import softmax_forward
from minivit.weights.checkpoint import write_atomically

TRAIN, TEST, GOOD, BAD = "#7a869a", "#c2410c", "#15803d", "#b91c1c"
INK = "#111827"  # on what is light in every figure, where black may become the colour of a dark page's text
OVERLAY = {"cmap": "viridis", "alpha": 0.7}  # attention over a picture


def _figure(width, height):
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


@contextmanager
def any_text():
    """While active, a script that the font lacks shows as boxes, and names too long are cut: no reason to warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing|constrained_layout not applied|Tight layout")
        yield


def _save(figure, path):
    with any_text():
        if path is None:
            return _svg(figure)
        kind = {".pdf": "pdf", ".svg": "svg"}.get(Path(path).suffix.lower(), "png")
        meta = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)  # the same figure is the same bytes
        with matplotlib.rc_context({"svg.hashsalt": "minivit"}):
            write_atomically(path, lambda file: figure.savefig(file, format=kind, metadata=meta))


def _svg(figure):
    """A figure as an ``<svg>`` element for an HTML page.

    Text stays text, in the page's language and fonts. There is no background, and what is black takes the colour of the
    text around it, so that the figure can be read on a light and on a dark page. No two elements of a page may have the
    same id: the ids begin with a hash of the figure. The same figure is the same text, without a date.
    """
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "minivit", "savefig.transparent": True}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]  # without the XML declaration
    text = re.sub(r"<!--.*?-->\n?|<metadata>.*?</metadata>\n?", "", text, flags=re.DOTALL)
    prefix = "f" + hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:8] + "-"

    def fit(tag):
        tag = tag[0].replace("#000000", "currentColor")
        return re.sub(r'( id="|xlink:href="#|url\(#)', lambda match: match[0] + prefix, tag)

    return re.sub(r"<[^>]*>", fit, text).strip()  # the text between the tags may say anything


def label(text, length=24):
    """A name from outside as matplotlib shows it: one line of valid text, cut to a length; "$" is no mathematics."""
    text = " ".join(str(text).encode(errors="backslashreplace").decode().split())  # a folder's name may be any bytes
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


def steps_per_epoch(records):
    """Steps per epoch of a run, from the records of its metrics.jsonl; 1 if it has not been tested yet."""
    return max((r["step"] / r["epoch"] for r in records if r["kind"] == "test"), default=1.0)


def _of_kind(records, kind, *names):
    """The records of a kind that hold numbers of these names: those of an older version may lack some."""
    return [r for r in records if r["kind"] == kind and all(type(r.get(name)) in (int, float) for name in names)]


def _line(points, width=2.0):
    return {"lw": width, "marker": "o" if len(points) < 2 else None}  # a single point would have no line


def _draw_loss(axes, records, per_epoch, title):
    train, test = _of_kind(records, "train"), _of_kind(records, "test")
    epochs = [r["step"] / per_epoch for r in train]
    axes.plot(epochs, [r["loss"] for r in train], color=TRAIN, lw=0.7, alpha=0.5, label="a training batch")
    axes.plot(
        [r["epoch"] for r in test],
        [r["train_loss"] for r in test],
        color=TRAIN,
        label="training (augmented, smoothed targets)",
        **_line(test),
    )
    axes.plot([r["epoch"] for r in test], [r["loss"] for r in test], color=TEST, label="test", **_line(test))
    _style(axes, "epoch", "cross-entropy, nats", f"{title}: loss" if title else "loss")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)


def _draw_accuracy(axes, records, per_epoch, title):
    test = _of_kind(records, "test")
    if not test:
        return
    epochs = [r["epoch"] for r in test]
    axes.plot(epochs, [100 * r["train_accuracy"] for r in test], color=TRAIN, label="training", **_line(test))
    axes.plot(epochs, [100 * r["accuracy"] for r in test], color=TEST, label="test", **_line(test))
    _style(axes, "epoch", "accuracy, %", f"accuracy: {test[-1]['accuracy']:.2%} at the end")
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def _draw_lr(axes, records, per_epoch, title):
    train = _of_kind(records, "train")
    axes.plot([r["step"] / per_epoch for r in train], [r["lr"] for r in train], color=TRAIN, **_line(train))
    _style(axes, "epoch", "learning rate", "learning rate")
    axes.set_ylim(bottom=0)


def _draw_gradient_norm(axes, records, per_epoch, title):
    train = [r for r in _of_kind(records, "train", "grad_norm") if r["grad_norm"] > 0]
    axes.semilogy([r["step"] / per_epoch for r in train], [r["grad_norm"] for r in train], color=TRAIN,
                  **_line(train, 1.0))  # fmt: skip
    axes.yaxis.set_major_formatter(LogFormatter())  # 0.5, not 5 × 10^-1
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.0, 0.5)))
    _style(axes, "epoch", "global norm of the gradient", "gradient norm, before clipping")


def _draw_throughput(axes, records, per_epoch, title):
    train = _of_kind(records, "train", "images_per_second")
    rates = [r["images_per_second"] for r in train]
    axes.plot([r["step"] / per_epoch for r in train], rates, color=TRAIN, **_line(train, 1.0))
    median = f", median {np.median(rates):,.0f}" if rates else ""
    _style(axes, "epoch", "pictures per second", f"training throughput{median}")
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
    _style(axes, "epoch", "seconds per epoch", f"time of an epoch with its tests{median}")
    axes.set_ylim(bottom=0)


CURVES = {"loss": _draw_loss, "accuracy": _draw_accuracy, "lr": _draw_lr, "gradient norm": _draw_gradient_norm,
          "throughput": _draw_throughput, "epoch time": _draw_epoch_time}  # fmt: skip


def save_curves(path, records, *, title=""):
    """Loss, accuracy and learning rate of a run, from the records of its metrics.jsonl."""
    figure = _figure(11, 3.6)
    for axes, name in zip(figure.subplots(1, 3), ("loss", "accuracy", "lr"), strict=True):
        CURVES[name](axes, records, steps_per_epoch(records), title)
    _save(figure, path)


def save_lr_curve(path, found, *, chosen=None, title=""):
    """Raw and smoothed loss of a ramp of learning rates (a `minivit.training.lr_finder.Found`), with the rates it suggests.

    ``chosen``: the learning rate that the run would have had, drawn too if it lies among the others
    """
    figure = _figure(7.5, 4.2)
    axes = figure.subplots()
    axes.semilogx(found.rates, found.losses, color=TRAIN, lw=0.8, alpha=0.6, label="a training batch")
    axes.semilogx(found.rates, found.smoothed, color=TEST, lw=2, label="smoothed")
    least = found.rates[found.least], found.smoothed[found.least]
    axes.plot(*least, "o", ms=7, color=TEST, mec="white", zorder=4, label=f"least: {least[0]:.2g}")
    for (name, rate), color in zip(found.suggestions.items(), (GOOD, "#1d4ed8"), strict=False):
        axes.axvline(rate, color=color, lw=1.5, ls="--", label=f"{name}: {rate:.2g}")
    if chosen and found.rates[0] <= chosen <= found.rates[-1]:
        axes.axvline(chosen, color="black", lw=1, ls=":", label=f"this run's lr: {chosen:.2g}")
    # what falls is to be seen: where the loss leaps at the end, the curve leaves the figure
    start, low, high = found.smoothed[0], found.losses.min(), found.smoothed.max()
    high = min(high, start + 1.5 * (start - low)) if found.suggestions else high
    room = max(high - low, 1e-3)
    axes.set_ylim(low - 0.05 * room, high + 0.05 * room)
    _style(axes, "learning rate", "cross-entropy, nats", title)
    axes.legend(frameon=False, fontsize=8, loc="best")
    _save(figure, path)


def save_masked_curves(path, records, *, chance, regression=False, title=""):
    """Loss, accuracy and learning rate of pre-training, with what a guess without looking reaches.

    ``chance``: its "loss" and "accuracy"; ``regression``: the loss is a squared error, the accuracy explained variance
    """
    figure = _figure(11, 3.6)
    left, middle, right = figure.subplots(1, 3)
    test = _of_kind(records, "test")
    epochs = [r["epoch"] for r in test]
    units = ("squared error", "variance explained, %") if regression else ("cross-entropy, nats", "right guesses, %")
    for axes, name, unit, factor in ((left, "loss", units[0], 1), (middle, "accuracy", units[1], 100)):
        for key, color, who in ((f"train_{name}", TRAIN, "training"), (name, TEST, "test")):
            axes.plot(epochs, [factor * r[key] for r in test], color=color, label=who, **_line(test))
        axes.axhline(factor * chance[name], color=INK, lw=1, ls=":", label="without looking")
        _style(axes, "epoch", unit, f"{title}: loss" if name == "loss" else "at the masked patches")
        axes.legend(frameon=False, fontsize=8)
    left.set_ylim(bottom=0)
    _draw_lr(right, records, steps_per_epoch(records), title)
    _save(figure, path)


def save_curve(path, name, records, *, per_epoch=None):
    """One of the ``CURVES`` of a run alone, from the records of its metrics.jsonl; with ``path=None`` an SVG element.

    ``per_epoch``: steps per epoch, where the records need not tell
    """
    figure = _figure(5.0, 3.3)
    axes = figure.subplots()
    CURVES[name](axes, records, per_epoch or steps_per_epoch(records), "")
    axes.set_xlim(left=0)
    return _save(figure, path)


def save_predictions(path, images, labels, logits, class_names, *, rows=4, columns=8):
    """A grid of test pictures, evenly spaced over the set: predicted class, its probability, the true one if wrong."""
    count = min(rows * columns, len(images))
    rows = -(-count // columns)
    chosen = np.linspace(0, len(images) - 1, count).round().astype(int)  # a folder's pictures are sorted by class
    images, labels = images[chosen], labels[chosen]
    probabilities, _ = softmax_forward(np.asarray(logits)[chosen])
    figure = _figure(1.45 * columns, 1.75 * rows + 0.3)
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
    right = int((probabilities.argmax(axis=1) == labels).sum())
    figure.suptitle(f"{count} of the test pictures: {right} right, {count - right} wrong", fontsize=11)
    _save(figure, path)


def save_contact_sheet(path, rows, *, title=""):
    """Rows of pictures, each row under a name: ``rows`` maps names to pictures (n, H, W, C) of one shape."""
    H, W, C = next(iter(rows.values())).shape[1:]
    gap = max(1, H // 16)
    columns = max(len(pictures) for pictures in rows.values())
    sheet = np.full((len(rows) * (H + gap) - gap, columns * (W + gap) - gap, C), 255 if C > 1 else 24, np.uint8)
    for r, pictures in enumerate(rows.values()):
        for c, image in enumerate(pictures):
            sheet[r * (H + gap) :, c * (W + gap) :][:H, :W] = image
    figure = _figure(3.0 + 0.7 * columns, 0.5 + 0.7 * len(rows) * H / W)
    axes = figure.subplots()
    _show(axes, sheet)
    axes.set_yticks([r * (H + gap) + H / 2 for r in range(len(rows))], [label(name, 40) for name in rows], fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="left", fontsize=11)
    _save(figure, path)


def save_v_curves(path, panels, *, title=""):
    """Error of numerical derivatives against their step: the V-curves of one function.

    Dashed straight lines are theory: rounding eps noise / h of slope -1, and truncation h^order of slope 1, 2 and 4; a
    diamond where they cross is the predicted knee, a disc the measured one, smaller for float32.
    ``panels``: {argument: {(method, dtype name): (`gradcheck.Curve`, `gradcheck.Knee`)}}, a panel for each argument
    """
    colors = {"forward": "#7e22ce", "central": "#1d4ed8", "five-point": "#15803d", "complex": TEST}
    ink, theory = "#475569", {"ls": (0, (5, 3)), "lw": 0.8, "alpha": 0.7, "zorder": 2}
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = _figure(4.7 * columns + 0.6, 4.3 * rows + 1.1)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    left, right = 1e-14, 10**-0.5
    slopes = []  # (axes, slope, a point of the line, colour), to be written when the layout is known
    for axes, (argument, curves) in zip(grid.flat, panels.items(), strict=False):
        rounding = {}  # {dtype: how far its line is drawn}
        for (method, dtype), (curve, found) in curves.items():
            narrow, color = dtype == "float32", colors[method]
            order, size = METHODS[method].order, 4.5 if narrow else 7
            axes.loglog(curve.steps, curve.errors, color=color, lw=0.8 if narrow else 1.6, alpha=0.5 if narrow else 1,
                        zorder=1 if method == "complex" else 3)  # fmt: skip
            if method == "complex":
                continue
            noise = float(np.finfo(dtype).eps) * curve.noise
            end = right if curve.linear else found.predicted_step
            start = rounding.get(dtype, left)  # one line for all methods, as far as the last knee
            axes.plot([start, end], [noise / start, noise / end], color=ink, **theory)
            rounding[dtype] = end
            if method == "forward" and not narrow:
                slopes.append((axes, -1, (1e-11, noise / 1e-11), ink))
            if curve.linear:  # no truncation, hence no knee
                continue
            if not narrow:
                axes.plot([end, right], [end**order, right**order], color=color, **theory)
                h = 6.0 * end if order < 4 else 2.0 * end  # a little right of the knee
                slopes.append((axes, order, (h, h**order), color))
            axes.plot(found.predicted_step, found.predicted_error, "D", ms=size, mfc="white", mec=color, zorder=4)
            axes.plot(found.step, found.error, "o", ms=size, color=color, mec="white", zorder=5)
        _style(axes, "step h", "relative error", f"derivative with respect to {argument}")
        axes.set_xlim(left, right)
        axes.set_ylim(3e-18, 1e3)
        axes.label_outer()
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    first = grid[0, 0]
    first.text(2e-14, 3e-14, "complex step: nothing is subtracted", fontsize=8, color=colors["complex"])
    first.text(2e-14, 3, "float32: x + h = x", fontsize=8, color=ink)
    lines = {name if name != "complex" else "complex step": {"color": color} for name, color in colors.items()}
    lines |= {"float64": {"color": ink, "lw": 1.6}, "float32": {"color": ink, "lw": 0.8, "alpha": 0.6}}
    lines |= {"theory": {"color": ink, **theory}}
    lines |= {"knee, predicted": {"marker": "D", "ls": "", "mfc": "white", "mec": ink}}
    lines |= {"knee, measured": {"marker": "o", "ls": "", "color": ink}}
    handles = [Line2D([], [], label=name, **look) for name, look in lines.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3 * columns, 9), frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=12)
    figure.get_layout_engine().set(wspace=0.05)
    figure.draw_without_rendering()
    for axes, slope, (x, y), color in slopes:
        (x0, y0), (x1, y1) = axes.transData.transform([(x, y), (10 * x, y * 10.0**slope)])
        angle = np.arctan2(y1 - y0, x1 - x0)
        above = -5 * np.sin(angle), 5 * np.cos(angle)
        words, look = f"slope {slope}".replace("-", "\N{MINUS SIGN}"), {"fontsize": 7.5, "color": color}
        text = axes.annotate(words, (x, y), above, textcoords="offset points", rotation=np.degrees(angle),
                             rotation_mode="anchor", **look)  # fmt: skip
        text.set_in_layout(False)
    _save(figure, path)


def save_curvature(path, records, *, edge, slice_=None, title=""):
    """Sharpness beside the loss along a run, with the edge of stability, and a loss surface.

    ``records``: dicts with epoch, loss, lr, edge, lists eigenvalues, residuals and converged, and for adaptive
    optimisers a dict preconditioned of such lists; ``edge``: what the edge belongs to, in words;
    ``slice_``: (offsets, losses) of `curvature.loss_slice` at the end of the run, or None
    An eigenvalue that has not converged is a hollow point, with a bar from it to it plus its residual.
    A line of one point is a disc.
    """

    def alone(points):
        return {"marker": "o", "ms": 4} if len(points) == 1 else {}

    figure = _figure(13.5 if slice_ else 9.0, 4.0)
    panels = figure.subplots(1, 3 if slice_ else 2)
    epochs = [r["epoch"] for r in records]
    loss, sharp = panels[:2]
    loss.plot(epochs, [r["loss"] for r in records], color=TEST, lw=2, marker="o", ms=3)
    _style(loss, "epoch", "cross-entropy, nats", "loss on the pictures measured")
    loss.set_ylim(bottom=0)
    count = min(len(r["eigenvalues"]) for r in records)
    missed = []  # (epoch, eigenvalue, residual, colour)

    def draw(measured, k, color, width, label):
        """The k-th eigenvalue of (epoch, figures) pairs."""
        sharp.semilogy([e for e, _ in measured], [m["eigenvalues"][k] for _, m in measured], color=color, lw=width,
                       label=label, **alone(measured))  # fmt: skip
        missed.extend((e, m["eigenvalues"][k], m["residuals"][k], color) for e, m in measured if not m["converged"][k])

    for k in range(count):
        label = "largest eigenvalues of H" if k == 0 else None
        draw([(r["epoch"], r) for r in records], k, TRAIN, 2.2 - 0.5 * k, label)
    adaptive = [(r["epoch"], r["preconditioned"]) for r in records if r.get("preconditioned")]
    if adaptive:
        draw(adaptive, 0, "#1d4ed8", 2, "largest, as the optimiser sees it")
    for i, (epoch, value, residual, color) in enumerate(missed):
        label = None if i else "not converged: + residual"
        sharp.errorbar(epoch, value, [[0.0], [residual]], fmt="o", ms=4, color=color, mfc="white", lw=1, label=label)
    finite = [r for r in records if r["edge"]]
    sharp.semilogy(
        [r["epoch"] for r in finite], [r["edge"] for r in finite], color=BAD, ls="--", label=edge, **alone(finite)
    )
    _style(sharp, "epoch", "curvature", "sharpness and the edge of stability")
    highest = max(m["eigenvalues"][0] for r in records for m in (r, r.get("preconditioned") or r))
    sharp.set_ylim(top=30 * highest)  # the edge goes to infinity as the learning rate goes to 0
    sharp.legend(frameon=False, fontsize=8)
    if slice_:
        offsets, losses = slice_
        surface = panels[2]
        filled = surface.contourf(offsets, offsets, np.log10(losses), levels=24, cmap="viridis")
        surface.plot(0, 0, "o", color="white", ms=6, mec="black")
        figure.colorbar(filled, ax=surface, label="log10 of the loss")
        _style(
            surface, "along the sharpest direction", "along the second", f"loss surface at the end, epoch {epochs[-1]}"
        )
        surface.grid(False)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def save_confusion(path, confusion, class_names, *, title=""):
    """The confusion matrix: rows are true classes, columns predicted ones, entries the share of the row.

    Shapes  confusion (K, K) counts
    With ``path=None`` an SVG element.
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
                    color = "white" if share[row, column] > 0.5 else INK
                    axes.text(
                        column, row, int(confusion[row, column]), ha="center", va="center", fontsize=8, color=color
                    )
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title, loc="left", fontsize=11)
    figure.colorbar(shown, ax=axes, fraction=0.046, pad=0.02, label="share of the true class")
    return _save(figure, path)


def save_calibration(path, found, *, title=""):
    """A reliability diagram: accuracy against confidence in bins of equal width, over the share of predictions in each.

    ``found``: a `minivit.evaluation.metrics.Calibration`; the distance of each bar from its mean confidence is drawn in red.
    With ``path=None`` an SVG element.
    """
    M = len(found.count)
    left, used = np.arange(M) / M, found.count > 0
    figure = _figure(5.0, 4.4)
    reliability, share = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    bar = {"align": "edge", "width": 1 / M}
    reliability.bar(left[used], 100 * found.accuracy[used], color=OURS, alpha=0.45, label="accuracy", **bar)
    gap = 100 * (found.confidence - found.accuracy)[used]
    reliability.bar(left[used], gap, bottom=100 * found.accuracy[used], color="none", edgecolor=BAD, hatch="////",
                    lw=0.8, label="distance from the confidence", **bar)  # fmt: skip
    reliability.plot([0, 1], [0, 100], color=THEIRS, ls="--", lw=1.2, label="calibrated")
    _style(reliability, "", "accuracy, %", label(title, 60))
    reliability.set(xlim=(0, 1), ylim=(0, 100))
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    share.bar(left, 100 * found.count / found.count.sum(), color=TRAIN, **bar)
    _style(share, "confidence: probability of the predicted class", "pictures, %", "")
    return _save(figure, path)


def picture_png(image, attention=None):
    """The bytes of a PNG file that shows a picture, a pixel for a pixel, under its attention map if one is given.

    Shapes  image (H, W, C) uint8; attention (grid, grid), non-negative, H and W multiples of grid
    """
    shown = picture(image)
    if shown.ndim == 2:
        shown = colormaps["gray_r"](shown)[..., :3]  # as `_show` has it
    else:
        shown = shown / 255.0
    if attention is not None:
        H, W = image.shape[:2]
        grid = len(attention)
        map_ = np.repeat(np.repeat(attention, H // grid, axis=0), W // grid, axis=1)  # (H, W)
        colors = colormaps[OVERLAY["cmap"]](map_ / max(float(attention.max()), 1e-30))[..., :3]
        shown = OVERLAY["alpha"] * colors + (1.0 - OVERLAY["alpha"]) * shown
    file = io.BytesIO()
    imsave(file, np.ascontiguousarray(shown), format="png", metadata={"Software": None})
    return file.getvalue()


def save_attention(
    path, image, attention, probabilities, class_names, *, title="", truth=None, top=5,
    what="attention of the last block, mean of its heads",
):  # fmt: skip
    """A picture, the same picture under its attention map, and the most probable classes.

    Shapes  image (H, W, C) uint8; attention (grid, grid), non-negative; probabilities (K,)
    ``what``: what the map is, in words
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
    shown = overlay.imshow(100 * share, vmin=0, extent=extent, interpolation="nearest", **OVERLAY)
    overlay.set_title(what, fontsize=9, loc="left")
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


FORWARD_COLOR = "#1d4ed8"


def save_trace(file, trace, *, title=""):
    """The network of a `minivit.laboratory.trace.Trace` as boxes, its first block opened, with the tensors on the arrows.

    Forward tensors, with their shapes, run to the right in one colour; gradients, with their norms, run back in the
    other. Each box tells its equation, the bytes that its cache keeps and its share of the time: of the whole step in
    the upper row, of its block in the lower rows.
    """
    records = {(r.path, r.direction): r for r in reversed(trace.records)}  # the first of each path
    figure = Figure(figsize=(16, 8.8), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 16), ylim=(0.6, 9.4))
    axes.set_axis_off()
    step = sum(r.seconds for r in trace.records if r.depth == 0)
    first_block = sum(r.seconds for r in trace.records if r.path == "blocks.0")
    wide, high = 1.75, 1.25

    def shape_of(path):
        return records[path, "forward"].shape

    def sizes(shape):
        return "×".join(map(str, shape)) or "one number"

    def size_of(count):
        return f"{count / 2**20:.3g} MiB" if count >= 2**17 else f"{count / 2**10:.3g} KiB"

    def box(x, y, name, paths, whole):
        """A box centred at (x, y) for the records of some paths."""
        inside = [r for p in paths for d in ("forward", "backward") if (r := records.get((p, d)))]
        cached, seconds = sum(r.cached for r in inside), sum(r.seconds for r in inside)
        axes.add_patch(
            FancyBboxPatch((x - wide / 2, y - high / 2), wide, high, boxstyle="round,pad=0,rounding_size=0.12",
                           facecolor="white", edgecolor="#334155", lw=1.2, zorder=3)
        )  # fmt: skip
        equation = f"Eq. {inside[0].equation}" if inside[0].equation else "cross-entropy"
        axes.text(x, y + 0.4, name, ha="center", va="center", fontsize=11, weight="bold", zorder=4)
        axes.text(x, y + 0.13, equation, ha="center", va="center", fontsize=8.5, color="#475569", zorder=4)
        axes.text(x, y - 0.15, f"cached {size_of(cached)}", ha="center", va="center", fontsize=9, zorder=4)
        axes.text(x, y - 0.41, f"time {seconds / whole:.1%}", ha="center", va="center", fontsize=9, zorder=4)

    def arrows(left, right, y, name, shape, gradient):
        """The arrow forward from ``left`` to ``right``, and the one back under it unless ``gradient`` is None."""
        middle = (left + right) / 2
        style = {"arrowstyle": "-|>", "lw": 1.6, "shrinkA": 2, "shrinkB": 2, "mutation_scale": 13}
        axes.annotate("", (right, y + 0.14), (left, y + 0.14), arrowprops={**style, "color": FORWARD_COLOR})
        text = f"{name}\n{sizes(shape)}"
        axes.text(middle, y + 0.22, text, ha="center", va="bottom", fontsize=8.5, color=FORWARD_COLOR)
        if gradient is not None:
            axes.annotate("", (left, y - 0.14), (right, y - 0.14), arrowprops={**style, "color": TEST})
            axes.text(middle, y - 0.22, gradient, ha="center", va="top", fontsize=8.5, color=TEST)

    def norm_of(path, name, *, incoming=False):
        """The text under an arrow: the gradient that the backward of ``path`` gives, or the one that it gets."""
        r = records.get((path, "backward"))
        if r is None:
            return None
        parts = [r.norms[key] for key in ("dq", "dk", "dv") if key in r.norms] or [next(iter(r.norms.values()))]
        value = r.incoming if incoming else np.linalg.norm(parts)
        return f"d{name}\nnorm {value:.2g}"

    # the whole network
    c, L, y = trace.config, trace.config.depth, 7.75
    embed = ["patch_embed", "stem", "position2d", "registers", "dropout"]
    xs = [3.3, 6.6, 9.9, 13.2]
    blocks = [f"blocks.{i}{part}" for part in ("", ".position", ".position2d") for i in range(L)]
    for x, name, paths in zip(
        xs, ("embedding", f"{L} blocks" if L > 1 else "1 block", "head", "loss"), (embed, blocks, ["head"], ["loss"]),
        strict=True,
    ):  # fmt: skip
        box(x, y, name, paths, step)
    half = wide / 2
    pictures = (trace.batch, c.image_size, c.image_size, c.channels)
    backward = ("loss", "backward") in records
    arrows(xs[0] - 3.3 + half, xs[0] - half, y, "images", pictures, "no gradient\nneeded" if backward else None)
    arrows(xs[0] + half, xs[1] - half, y, "z_0", shape_of("dropout"), norm_of("blocks.0", "z_0"))
    arrows(xs[1] + half, xs[2] - half, y, f"z_{L}", shape_of(f"blocks.{L - 1}"), norm_of("head", f"z_{L}"))
    arrows(xs[2] + half, xs[3] - half, y, "logits", shape_of("head"), norm_of("loss", "logits"))
    loss = f"loss {float(trace.loss):.4g}"
    arrows(xs[3] + half, 15.7, y, loss, (), norm_of("loss", "loss", incoming=True))

    # one block: two branches, each added to what goes around it
    axes.add_patch(
        FancyBboxPatch((0.25, 0.8), 15.5, 5.65, boxstyle="round,pad=0,rounding_size=0.2", facecolor="#f1f5f9",
                       edgecolor="#cbd5e1", zorder=0)
    )  # fmt: skip
    for x in (xs[1] - half, xs[1] + half):
        axes.plot([x, 0.45 if x < xs[1] else 15.55], [y - high / 2, 6.45], color="#cbd5e1", lw=1, zorder=0)
    axes.text(0.5, 6.15, f"block 0, one of {L}: shares of time are of this block", va="center", fontsize=10)
    rows = (
        (4.6, "z_0", "z'_1", [
            ("norm1", "u", ["norm1"]), ("qkv", "q, k, v", ["msa.qkv"]), ("attention", "heads", ["msa.attention"]),
            ("proj", "msa", ["msa.proj", "dropout1", "ls1", "path1"]),
        ]),
        (1.95, "z'_1", "z_1", [
            ("norm2", "v", ["norm2"]), ("fc1", "hidden", ["mlp.fc1"]), ("gelu", "gelu", ["mlp.gelu", "mlp.dropout"]),
            ("fc2", "mlp", ["mlp.fc2", "dropout2", "ls2", "path2"]),
        ]),
    )  # fmt: skip
    xs, plus, tokens = [2.75, 5.95, 9.15, 12.35], 14.55, shape_of("blocks.0")
    for y, source, target, steps in rows:
        for x, (name, _, parts) in zip(xs, steps, strict=True):
            box(x, y, name, [f"blocks.0.{part}" for part in parts], first_block)
        if y > 3:
            attn = f"attn {sizes(shape_of('blocks.0.msa.attention.softmax'))}"
            axes.text(xs[2], y + high / 2 + 0.06, attn, ha="center", va="bottom", fontsize=8.5, color=FORWARD_COLOR)
        paths = [f"blocks.0.{parts[0]}" for _, _, parts in steps]
        path = f"blocks.0.path{1 if y > 3 else 2}"
        around = norm_of("blocks.0", source) if y > 3 else norm_of("blocks.0.path1", source, incoming=True)
        arrows(0.4, xs[0] - half, y, source, tokens, around)
        for left, right, name, p, after in zip(xs, xs[1:], [s[1] for s in steps], paths, paths[1:], strict=False):
            arrows(left + half, right - half, y, name, shape_of(p), norm_of(after, name.replace(", ", ", d")))
        arrows(xs[-1] + half, plus - 0.2, y, steps[-1][1], tokens, norm_of(path, steps[-1][1], incoming=True))
        axes.add_patch(Circle((plus, y), 0.2, facecolor="white", edgecolor="#334155", lw=1.2, zorder=3))
        axes.text(plus, y, "+", ha="center", va="center", fontsize=13, zorder=4)
        arrows(plus + 0.2, 15.65, y, target, tokens, norm_of(path, target, incoming=True))
        # what goes around
        top, start = y + 1.15, 0.62
        axes.plot([start, start, plus, plus], [y + 0.14, top, top, y + 0.2], color=FORWARD_COLOR, lw=1.6, zorder=1)
        axes.text((start + plus) / 2, top + 0.05, "unchanged, forward and back", ha="center", va="bottom", fontsize=8.5,
                  color="#475569")  # fmt: skip
    axes.text(0.3, 9.05, label(title, 60), fontsize=13, weight="bold", va="center")
    t = trace.totals
    figures = (
        f"{trace.batch} pictures, {trace.dtype}, {t.parameters:,} parameters, {size_of(t.cached)} cached; "
        f"forward {1e-9 * t.forward_flops:.3g} GFLOP in {1e3 * t.forward_seconds:,.1f} ms"
    )
    if backward:
        figures += f", backward {1e-9 * t.backward_flops:.3g} GFLOP in {1e3 * t.backward_seconds:,.1f} ms"
    axes.text(0.3, 8.7, figures, fontsize=10, va="center", color="#475569")
    axes.text(15.7, 9.05, "tensor, shape →", fontsize=10, va="center", ha="right", color=FORWARD_COLOR)
    if backward:
        axes.text(15.7, 8.7, "← gradient, norm", fontsize=10, va="center", ha="right", color=TEST)
    _save(figure, file)


OURS, THEIRS, FLOOR = "#1d4ed8", "#94a3b8", "#cbd5e1"
BENCHMARK_COLORS = {"minivit": OURS, "minivit-fed": OURS, "plain": "#7dabf8", "torch": "#c2410c",
                    "torch-compile": "#ea8a4f", "jax": "#15803d"}  # fmt: skip


def _strip(axes, contenders, xlabel, title, *, note=None, names=None):
    """A row for each contender: a bar to its median, a dot for each round, the median in figures."""
    largest = max(max(c["seconds"]) for c in contenders.values())
    scale, unit = (1e3, "ms") if largest < 10 else (1.0, "s")
    for row, (name, c) in enumerate(contenders.items()):
        color = BENCHMARK_COLORS.get(name, FLOOR)
        axes.barh(row, scale * c["median"], color=color, alpha=0.35 if name in BENCHMARK_COLORS else 0.8, height=0.62)
        spread = np.linspace(-0.2, 0.2, len(c["seconds"]))  # round after round from top to bottom
        axes.plot([scale * s for s in c["seconds"]], row + spread, ".", color=color if color != FLOOR else THEIRS, ms=4)
        text = f"{scale * c['median']:,.4g} {unit}" + (f"  {note(name, c)}" if note else "")
        axes.text(scale * max(c["seconds"]) + 0.02 * scale * largest, row, text, va="center", fontsize=9)
    axes.set_yticks(range(len(contenders)), names or list(contenders))
    axes.invert_yaxis()
    axes.set_xlim(0, scale * largest * (1.6 if note else 1.2))
    _style(axes, f"{xlabel}, {unit}", "", title)
    axes.grid(axis="y", visible=False)


def _against_us(name, c):
    """The figure that stands beside a contender's time."""
    if name == "minivit":
        return f"(floor {c['floor_fraction']:.0%} of it)" if "floor_fraction" in c else ""
    return f"(ours is {c['ratio']['median']:.2f}×)" if name in BENCHMARK_COLORS else ""


def save_contest(path, report, *, title=""):
    """Times and peak memory of `minivit.benchmark.contest.contest`; with "latency" in the report, that of one picture too."""
    contests = [report] + ([report["latency"]] if "latency" in report else [])
    rows = len(report["contenders"])
    figure = _figure(4.6 * (1 + len(contests)) + 1, 0.42 * rows + 1.7)
    *timed, memory = figure.subplots(1, 1 + len(contests))
    for axes, each in zip(timed, contests, strict=True):
        what = f"a batch of {each['batch']}" if each["batch"] > 1 else "one picture"
        each_title = f"{what}, {each['images_per_second']:,.0f} pictures/s"
        _strip(axes, each["contenders"], "time (dots: rounds, bar: median)", each_title, note=_against_us)
    known = {name: c for name, c in report["contenders"].items() if c["peak_memory"] and not name.startswith("floor")}
    largest = max((c["peak_memory"] for c in known.values()), default=1) / 2**20
    for row, (name, c) in enumerate(known.items()):
        peak, start = c["peak_memory"] / 2**20, c["start_memory"] / 2**20
        memory.barh(row, peak, color=BENCHMARK_COLORS[name], alpha=0.45, height=0.62)
        memory.barh(row, start, color=BENCHMARK_COLORS[name], height=0.62)
        memory.text(peak + 0.02 * largest, row, f"{peak:,.0f}", va="center", fontsize=9)
    memory.set_yticks(range(len(known)), list(known))
    memory.invert_yaxis()
    memory.set_xlim(0, 1.2 * largest)
    _style(memory, "MiB (dark: the imports alone)", "", "peak memory of the process")
    memory.grid(axis="y", visible=False)
    figure.suptitle(label(title, 100), fontsize=12, x=0.01, ha="left", weight="bold")
    _save(figure, path)


def save_data(path, report, *, title=""):
    """Times of `minivit.benchmark.contest.data_report`."""
    figure = _figure(8, 2.9)
    share, added = report["share_of_step"]["median"], report["added_to_step"]["median"]
    _strip(
        figure.subplots(), report["contenders"], f"time for a batch of {report['batch']} (dots: rounds, bar: median)",
        f"{report['images_per_second']:,.0f} augmented pictures/s: the work is {share:.2%} of a step; fed, it takes "
        f"{1 + added:.3f} times as long",
        names=["a step", "a step, fed", "the pipeline alone"],
    )  # fmt: skip
    figure.suptitle(label(title, 100), fontsize=12, x=0.01, ha="left", weight="bold")
    _save(figure, path)


def save_layers(path, report, *, title=""):
    """Where a step's time goes, layer by layer or kernel by kernel, and how much of it is each one's floor."""
    rows = [row for row in report["layers"] if not row["inside_another"] and row["share_of_step"] >= 0.001]
    step = report["step"]["median"]
    figure = _figure(10, 0.27 * len(rows) + 1.9)
    axes = figure.subplots()
    largest = 100 * max(*(r["share_of_step"] for r in rows), report["rest_of_step"])
    for y, row in enumerate(rows):
        share = 100 * row["share_of_step"]
        color = {"forward": OURS, "backward": TEST}.get(row["direction"], GOOD)
        axes.barh(y, share, color=color, alpha=0.35, height=0.72)
        axes.barh(y, share * min(row["floor_fraction"], 1.0), color=color, height=0.72)
        axes.text(
            share + 0.01 * largest, y,
            f"{share:.1f} %, floor {row['floor_fraction']:.0%}"
            + (f", {1e-9 * row['bytes_per_second']:,.0f} GB/s" if "bytes_per_second" in row else ""),
            va="center", fontsize=8,
        )  # fmt: skip
    rest = 100 * report["rest_of_step"]
    axes.barh(len(rows), max(rest, 0.0), color=THEIRS, alpha=0.5, height=0.72)
    axes.text(max(rest, 0) + 0.01 * largest, len(rows), f"{rest:.1f} %",
              va="center", fontsize=8)  # fmt: skip
    kernels = "copy_rate" in report
    labels = [
        f"{row['times']} x {row['layer']}, {1e-6 * row['bytes']:.3g} MB" if kernels
        else f"{row['layer']} {row['direction']}" for row in rows
    ] + ["matrix products, CuPy's own" if kernels else "additions, sums, waiting"]  # fmt: skip
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlim(0, 1.25 * largest)
    if kernels:
        milliseconds, how = f"{1e3 * step:,.2f}", f"copies at {1e-9 * report['copy_rate']['median']:,.0f} GB/s"
    else:
        at, milliseconds = report["settings"], f"{1e3 * step:,.0f}"
        how = f"{at['workers']} workers, micro-batches of {at['micro_batch']}"
    _style(axes, "share of a step's time, % (dark: the floor; calls below 0.1 % are left out)", "",
           f"a step of {report['batch']} pictures, {milliseconds} ms; all floors together "
           f"{report['floor_fraction']:.0%}; {how}",
    )  # fmt: skip
    axes.grid(axis="y", visible=False)
    figure.suptitle(label(title, 100), fontsize=12, x=0.01, ha="left", weight="bold")
    _save(figure, path)


def save_scaling(path, report, *, title=""):
    """Step times of `minivit.benchmark.contest.scaling_report`, a panel for each of batch, depth, tokens and workers."""
    texts = {"batch": "pictures in the batch, B", "depth": "blocks, L", "tokens": "tokens, N", "workers": "workers"}
    figure = _figure(12, 7.2)
    for axes, (panel, found) in zip(figure.subplots(2, 2).flat, report["panels"].items(), strict=True):
        points = found["points"]
        x = np.array([p["x"] for p in points])
        for name in points[0]["contenders"]:
            times = [{key: 1e3 * p["contenders"][name][key] for key in ("median", "q1", "q3")} for p in points]
            median = np.array([t["median"] for t in times])
            spread = np.array([[t["median"] - t["q1"], t["q3"] - t["median"]] for t in times]).T
            axes.errorbar(x, median, spread, fmt="o-", color=BENCHMARK_COLORS.get(name, THEIRS), label=name, ms=4,
                          capsize=2, lw=1.4)  # fmt: skip
        mine = np.array([1e3 * p["contenders"]["minivit"]["median"] for p in points])
        if panel == "workers":
            speedup = [s["median"] for s in found["speedup"]]
            axes.plot(x, mine[0] * x[0] / x, ":", color="#475569", label=f"the time of {x[0]} / workers")
            note = f"{speedup[-1]:.2f} times as quick with {x[-1]} as with {x[0]}"
        elif panel == "tokens":
            flops = np.array([p["flops"] for p in points], float)
            axes.plot(x, flops * np.median(mine / flops), ":", color="#475569", label="in proportion to FLOPs")
            note = f"N² products: {points[0]['attention_share']:.0%} to {points[-1]['attention_share']:.0%}"
            if found["power"]:
                note += f"; slope {found['power'][0]:.2f} to {found['power'][-1]:.2f}"
        else:
            line = {key: 1e3 * found["line"][key] for key in ("start", "each")}
            axes.plot(x, line["start"] + line["each"] * x, ":", color="#475569", label="straight line through ours")
            what = {"batch": "picture", "depth": "block"}[panel]
            note = f"{line['each']:.2f} ms for each {what}, times at most {found['line']['off']:.0%} off the line"
        if panel == "tokens":
            axes.set(xscale="log", yscale="log")
            axes.set_xticks(x, [str(n) for n in x])
            axes.minorticks_off()
        else:
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False, fontsize=8)
        batch = "" if panel == "batch" else f", batch of {points[0]['batch']}"
        _style(axes, texts[panel] + batch, "a step, ms", note)
    figure.suptitle(label(title, 100), fontsize=12, x=0.01, ha="left", weight="bold")
    _save(figure, path)


def save_sweep(path, table):
    """Accuracies of `minivit.training.sweep.table_of`: a row for each setting, a dot for each seed, a line at the mean.

    Settings that have no finished run are left out.
    """
    base = table["rows"][0]
    first, rows = base["mean"], [row for row in table["rows"] if row["runs"]]
    figure = _figure(8.5, 0.42 * len(rows) + 1.6)
    axes = figure.subplots()
    for y, row in enumerate(rows):
        values = [100 * run["accuracy"] for run in row["runs"].values()]
        color = THEIRS if row is base else OURS
        axes.plot(values, [y] * len(values), "o", color=color, alpha=0.55, ms=6)
        axes.plot([100 * row["mean"]] * 2, [y - 0.3, y + 0.3], color=color, lw=2.4)
        text = f"{100 * row['mean']:.2f}" + (f"  ({100 * row['gain']:+.2f})" if row["gain"] is not None else "")
        axes.annotate(text, (max(values), y), (8, 0), textcoords="offset points", va="center", fontsize=9)
    if first is not None:
        axes.axvline(100 * first, color=THEIRS, ls=":", lw=1.2, zorder=0)
    axes.set_yticks(range(len(rows)), [label(row["name"], 40) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.18)
    _style(axes, "test accuracy after the last epoch, % (dots: seeds, line: mean)", "", label(table["title"], 90))
    axes.grid(axis="y", visible=False)
    _save(figure, path)


def save_few_shot(path, results, *, title=""):
    """Accuracy against examples of each class: a line for each row of ``results``, a band of one deviation over seeds.

    ``results``: as `minivit transfer` writes them, rows with mean and spread for each number of ``shots``
    """
    figure = _figure(6.4, 4.2)
    axes = figure.subplots()
    for row, color in zip(results["rows"], (OURS, BAD, THEIRS), strict=False):
        shots = [each["shots"] for each in row["accuracies"]]
        mean = 100 * np.array([each["mean"] for each in row["accuracies"]])
        spread = 100 * np.array([each["spread"] or 0.0 for each in row["accuracies"]])
        axes.plot(shots, mean, "o-", color=color, lw=1.8, ms=5, label=label(row["features"], 40))
        axes.fill_between(shots, mean - spread, mean + spread, color=color, alpha=0.15, lw=0)
    axes.set_xscale("log")
    axes.set_xticks(shots, [str(count) for count in shots])
    axes.minorticks_off()
    axes.axhline(100 / results["classes"], color=INK, ls=":", lw=1, zorder=0, label="chance")
    axes.set_ylim(bottom=0)
    _style(axes, "training pictures of each class", "test accuracy, %", label(title, 60))
    axes.legend(frameon=False, fontsize=9)
    _save(figure, path)


def save_vtab(path, summary, *, title=""):
    """Accuracies of `minivit.evaluation.vtab.summary_of`: a bar for each task that was done, in its group, a line at each mean."""
    figure = _figure(6.8, 0.28 * len(summary["tasks"]) + 1.9)
    axes = figure.subplots()
    names = list(summary["tasks"])
    y, ticks = 0, []
    for (group, each), color in zip(summary["groups"].items(), (OURS, GOOD, TEST), strict=True):
        members = [names.pop(0) for _ in range(each["tasks"])]
        if not members:
            continue
        rows = [y + i for i in range(len(members))]
        scores = [100 * summary["tasks"][name] for name in members]
        axes.barh(rows, scores, color=color, alpha=0.75, height=0.7)
        for row, score in zip(rows, scores, strict=True):
            ink = "white" if score > 10 else INK  # on its bar, or beside one too short for it
            axes.text(1.5, row, f"{score:.1f}", va="center", fontsize=9, color=ink, weight="bold")
        some = "" if each["tasks"] == each["of"] else f", {each['tasks']} of {each['of']}"
        mean = f"{group}: {100 * each['mean']:.1f}{some}"
        axes.plot([100 * each["mean"]] * 2, [rows[0] - 0.5, rows[-1] + 0.5], color=color, lw=1.6, ls="--", label=mean)
        ticks += zip(rows, members, strict=True)
        y += len(members) + 0.6
    axes.set_yticks([row for row, _ in ticks], [name for _, name in ticks])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    mean = f"mean of {len(ticks)} tasks: {100 * summary['mean']:.1f}"
    _style(axes, f"test accuracy, % ({mean})", "", label(title, 70))
    axes.grid(axis="y", visible=False)
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=3)
    _save(figure, path)
