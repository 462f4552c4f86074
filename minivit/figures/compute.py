"""What models cost: speed and memory by their size, accuracy against compute."""

from __future__ import annotations

from matplotlib.ticker import LogFormatter, LogLocator, NullLocator

from minivit.figures.canvas import LINES, label, new_figure, own_style, save, style

MARKERS = "os^Dvp"


@own_style
def save_cost(path, points, *, title=""):
    """Speed of predictions and of training, and peak memory, against the size of the image (of `analyses.cost`)."""
    figure = new_figure(12.5, 4.0)
    speed, training, memory = figure.subplots(1, 3)
    names = list(dict.fromkeys(point["model"] for point in points))
    sizes = sorted({point["size"] for point in points})
    for color, name in zip(LINES * (1 + len(names) // len(LINES)), names, strict=False):
        for task, axes, line in (("infer", speed, "o:"), ("step", training, "o-")):
            own = [p for p in points if p["model"] == name and p["task"] == task]
            rates = [p["images_per_second"] for p in own]
            axes.plot([p["size"] for p in own], rates, "o-", ms=4, lw=1.6, color=color, label=label(name))
            sized = [p for p in own if p["peak_memory"]]
            peaks = [p["peak_memory"] / 2**20 for p in sized]
            memory.plot([p["size"] for p in sized], peaks, line, ms=4, lw=1.4, color=color)
    for axes in (speed, training, memory):
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(LogFormatter())  # 50, not 5 × 10^1
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2.0, 0.5)))
    batch = points[0]["batch"]
    style(speed, "side of the image, pixels", "images per second", f"prediction, batches of {batch}")
    style(training, "side of the image, pixels", "images per second", f"training step, batches of {batch}")
    style(memory, "side of the image, pixels", "MiB", "peak memory (dotted: prediction)")
    speed.legend(frameon=False, fontsize=8)
    figure.suptitle(label(title, 120), fontsize=10, x=0.01, ha="left")
    save(figure, path)


def _draw_models(axes, x, accuracies, names, **look):
    """A line through models of one kind, each with its name above it."""
    y = [100 * accuracy for accuracy in accuracies]
    (line,) = axes.plot(x, y, ms=6, lw=1.4, **look)
    for name, place in zip(names, zip(x, y, strict=True), strict=True):
        axes.annotate(name, place, (0, 6), textcoords="offset points", ha="center", fontsize=8, color=line.get_color())


def _log_scale(axes):
    """Numbers of many sizes along the x axis, written out: 1, 2, 5, 10."""
    axes.set_xscale("log")
    axes.margins(0.15)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.xaxis.set_minor_locator(NullLocator())


@own_style
def save_axial(path, points, *, title=""):
    """Accuracy of full and axial attention against the FLOPs of training and against predictions per second.

    A line joins the models of one kind of attention and number of blocks; beside each stands its patch size.
    ``points``: dicts with attention, blocks, patch, accuracy, training_flops, images_per_second and batch
    """
    figure = new_figure(9.5, 4.0)
    compute, speed = figure.subplots(1, 2, sharey=True)
    kinds = dict.fromkeys((p["attention"], p["blocks"]) for p in points)
    for (attention, blocks), color, marker in zip(kinds, LINES, MARKERS, strict=False):
        own = [p for p in points if (p["attention"], p["blocks"]) == (attention, blocks)]
        accuracies, names = [p["accuracy"] for p in own], [f"/{p['patch']}" for p in own]
        look = {"marker": marker, "color": color, "label": f"{attention}, {blocks} blocks"}
        _draw_models(compute, [1e-12 * p["training_flops"] for p in own], accuracies, names, **look)
        _draw_models(speed, [p["images_per_second"] for p in own], accuracies, names, **look)
    _log_scale(compute)
    _log_scale(speed)
    style(compute, "training, TFLOP in matrix products", "test accuracy, %", "")
    style(speed, f"predictions per second, batches of {points[0]['batch']}", "", "")
    lines = compute.get_legend_handles_labels()
    figure.legend(
        *lines, loc="outside right center", frameon=False, fontsize=8, title="/4: patches of 4", title_fontsize=8
    )
    figure.suptitle(label(title, 120), fontsize=10, x=0.01, ha="left")
    save(figure, path)


@own_style
def save_compute(path, points, *, title=""):
    """Accuracy against the FLOPs of training: a line for each kind of model, by its sizes.

    ``points``: dicts with kind, width, accuracy and training_flops
    """
    figure = new_figure(6.8, 4.2)
    axes = figure.subplots()
    for kind, color, marker in zip(dict.fromkeys(p["kind"] for p in points), LINES, MARKERS, strict=False):
        own = sorted((p for p in points if p["kind"] == kind), key=lambda p: p["training_flops"])
        flops, accuracies = [1e-12 * p["training_flops"] for p in own], [p["accuracy"] for p in own]
        _draw_models(axes, flops, accuracies, [p["width"] for p in own], marker=marker, color=color, label=kind)
    _log_scale(axes)
    style(axes, "training, TFLOP in matrix products", "test accuracy, %", label(title, 80))
    axes.legend(
        frameon=False, fontsize=8, title="64: width of the tokens", title_fontsize=8, loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
    )  # fmt: skip
    save(figure, path)
