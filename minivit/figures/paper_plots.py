"""The figures of the ViT paper's analyses, drawn from what `minivit.paper.analyses` measures.

``path`` ends in .png, .pdf or .svg. All of them can stand in print: they need no colour to be told apart from text, and
their titles say what was drawn.
"""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from matplotlib.ticker import LogFormatter, LogLocator, MaxNLocator, NullLocator

from minivit.figures.plots import OURS, TEST, THEIRS, _figure, _save, _show, _style, label, picture
from minivit.paper.analyses import patch_distances

LINES = ("#1d4ed8", "#c2410c", "#15803d", "#7e22ce", "#0891b2", "#b45309")
POSITIONS = 16  # most positions along a side of a figure: of a finer grid every second, third, ... is drawn


def save_filters(path, filters, *, title="", columns=7):
    """Principal components of the patch embedding as pictures (`analysis.Filters`), with their shares.

    Grey is 0; each component is scaled by its own largest entry. The share is of the filters' variance.
    """
    n, P, _, C = filters.pictures.shape
    rows = -(-n // columns)
    figure = _figure(1.05 * columns, 1.28 * rows + 0.5)
    for i, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        if i >= n:
            axes.set_axis_off()
            continue
        shown = 0.5 + 0.5 * filters.pictures[i] / max(np.abs(filters.pictures[i]).max(), 1e-300)
        _show(axes, np.rint(255 * shown).astype(np.uint8))
        if C < 3:
            axes.images[0].set_cmap("gray")  # ink and paper mean nothing here: white is positive
        axes.set_title(f"{100 * filters.shares[i]:.3g} %", fontsize=8)
    figure.suptitle(label(title, 100), fontsize=10)
    _save(figure, path)


def save_positions(path, similarity, *, kind="", title=""):
    """Cosine similarity of position embeddings: for each patch a map of its similarity to all patches.

    Shapes  similarity (g, g, g, g), of `analysis.position_similarity`
    ``kind``: that of the positions, in a word
    """
    g = len(similarity)
    every = -(-g // POSITIONS)
    chosen = range((every - 1) // 2, g, every)
    n, gap = len(chosen), max(1, g // 8)
    sheet = np.full((n * (g + gap) - gap, n * (g + gap) - gap), np.nan)
    for i, r in enumerate(chosen):
        for j, c in enumerate(chosen):
            sheet[i * (g + gap) :, j * (g + gap) :][:g, :g] = similarity[r, c]
    figure = _figure(6.2, 5.4)
    axes = figure.subplots()
    shown = axes.imshow(sheet, vmin=similarity.min(), vmax=1, cmap="viridis", interpolation="nearest")
    middles = [i * (g + gap) + (g - 1) / 2 for i in range(n)]
    axes.set_xticks(middles, [c + 1 for c in chosen], fontsize=8)
    axes.set_yticks(middles, [r + 1 for r in chosen], fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("column of the patch")
    axes.set_ylabel("row of the patch")
    axes.set_title(label(title, 90), loc="left", fontsize=9)
    words = f"cosine similarity of {kind} positions" if kind else "cosine similarity"
    figure.colorbar(shown, ax=axes, fraction=0.046, pad=0.02, label=words)
    _save(figure, path)


def save_distances(path, distances, *, image_size, grid, pictures=None, title=""):
    """Mean attention distance: a dot for each head of each block, and a line through the means of the blocks.

    Shapes  distances (L, h), in pixels, of `analysis.head_distances`
    """
    L, h = distances.shape
    figure = _figure(6.0, 4.2)
    axes = figure.subplots()
    blocks = np.arange(1, L + 1)
    for head, each in enumerate(np.sort(distances, axis=1).T):
        axes.plot(blocks, each, "o", color=OURS, ms=5, alpha=0.55, label="a head" if head == 0 else None)
    axes.plot(blocks, distances.mean(axis=1), color=TEST, lw=1.8, marker="_", ms=12, label="mean of the block")
    uniform = patch_distances(grid, image_size / grid).mean()
    axes.axhline(uniform, color=THEIRS, ls="--", lw=1.2, label="attention to all patches alike")
    of = f" over {pictures} pictures" if pictures else ""
    _style(axes, "block", f"mean attention distance{of}, pixels", "")
    axes.set_title(label(title, 90), loc="left", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(0, 1.15 * max(distances.max(), uniform))
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    _save(figure, path)


def spotlight(image, map_, low=0.12):
    """A picture that is dark where a map is small: the least of the map shows ``low`` of the light, the largest all.

    Shapes  image (H, W, C) uint8, map_ (g, g), H and W multiples of g  ->  (H, W, 3) uint8
    """
    shown = picture(image)
    if shown.ndim == 2:
        shown = np.rint(255 * colormaps["gray"](shown)[..., :3])
    light = (map_ - map_.min()) / max(float(map_.max() - map_.min()), 1e-30)
    light = np.kron(low + (1 - low) * light, np.ones((len(shown) // len(map_), shown.shape[1] // len(map_))))
    return np.rint(shown * light[..., None]).astype(np.uint8)


def save_rollouts(path, images, maps, titles, *, title="", columns=6):
    """Pictures beside themselves in the light of their attention rollout.

    Shapes  images (n, H, W, C) uint8, maps (n, g, g); ``titles``: n of (text, is it right?)
    Above each map stands how many times as much its brightest patch counts as its darkest.
    """
    n = len(images)
    rows = -(-n // columns)
    figure = _figure(2.0 * columns, 1.18 * rows + 0.5)
    widths = [1, 1, 0.12] * columns
    grid = figure.subplots(rows, 3 * columns, squeeze=False, width_ratios=widths).reshape(-1, 3)
    for i, (left, right, gap) in enumerate(grid):
        gap.set_axis_off()
        if i >= n:
            left.set_axis_off()
            right.set_axis_off()
            continue
        shown = images[i] if images.shape[-1] >= 3 else 255 - images[i]  # `_show` draws ink on paper, `spotlight` light
        _show(left, shown)
        _show(right, spotlight(images[i], maps[i]))
        text, good = titles[i]
        left.set_title(label(text, 18), fontsize=7, color="#15803d" if good else "#b91c1c", loc="left", pad=2)
        ratio = maps[i].max() / max(maps[i].min(), 1e-30)
        right.set_title(f"×{ratio:.1f}" if ratio < 1e4 else "", fontsize=7, loc="right", pad=2)
    figure.suptitle(label(title, 120), fontsize=10)
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0.01, hspace=0.02)
    _save(figure, path)


def save_cost(path, points, *, title=""):
    """Speed of predictions and of training, and peak memory, against the size of the picture (of `analysis.cost`)."""
    figure = _figure(12.5, 4.0)
    speed, training, memory = figure.subplots(1, 3)
    names = list(dict.fromkeys(point["model"] for point in points))
    sizes = sorted({point["size"] for point in points})
    for color, name in zip(LINES * (1 + len(names) // len(LINES)), names, strict=False):
        for task, axes, style in (("infer", speed, "-"), ("step", training, "-"), ("both", memory, None)):
            for kind in ("infer", "step") if task == "both" else (task,):
                mine = [p for p in points if p["model"] == name and p["task"] == kind and (style or p["peak_memory"])]
                x = [p["size"] for p in mine]
                if style:
                    y = [p["images_per_second"] for p in mine]
                    axes.plot(x, y, "o-", ms=4, lw=1.6, color=color, label=label(name))
                else:
                    y = [p["peak_memory"] / 2**20 for p in mine]
                    look = ("o-", None) if kind == "step" else ("o:", None)
                    axes.plot(x, y, look[0], ms=4, lw=1.4, color=color, label=None)
    for axes in (speed, training, memory):
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(LogFormatter())  # 50, not 5 × 10^1
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2.0, 0.5)))
    batch = points[0]["batch"]
    _style(speed, "side of the picture, pixels", "pictures per second", f"prediction, batches of {batch}")
    _style(training, "side of the picture, pixels", "pictures per second", f"training step, batches of {batch}")
    _style(memory, "side of the picture, pixels", "MiB", "peak memory (dotted: prediction)")
    speed.legend(frameon=False, fontsize=8)
    figure.suptitle(label(title, 120), fontsize=10, x=0.01, ha="left")
    _save(figure, path)


def save_axial(path, points, *, title=""):
    """Accuracy of `paper.make_axial`'s models against the FLOPs of their training and against predictions per second.

    A line joins the models of one kind of attention and number of blocks; beside each stands its patch size.
    """
    figure = _figure(9.5, 4.0)
    compute, speed = figure.subplots(1, 2, sharey=True)
    kinds = dict.fromkeys((p["attention"], p["blocks"]) for p in points)
    for (attention, blocks), color, marker in zip(kinds, LINES, "os^Dvp", strict=False):
        mine = [p for p in points if (p["attention"], p["blocks"]) == (attention, blocks)]
        y = [100 * p["accuracy"] for p in mine]
        for axes, x in (
            (compute, [1e-12 * p["training_flops"] for p in mine]),
            (speed, [p["images_per_second"] for p in mine]),
        ):
            axes.plot(x, y, marker=marker, ms=6, lw=1.4, color=color, label=f"{attention}, {blocks} blocks")
            for p, place in zip(mine, zip(x, y, strict=True), strict=True):
                axes.annotate(
                    f"/{p['patch']}", place, (0, 6), textcoords="offset points", ha="center", fontsize=8, color=color
                )
    for axes in (compute, speed):
        axes.set_xscale("log")
        axes.margins(0.15)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.xaxis.set_minor_locator(NullLocator())
    _style(compute, "training, TFLOP in matrix products", "test accuracy, %", "")
    _style(speed, f"predictions per second, batches of {points[0]['batch']}", "", "")
    shown = compute.get_legend_handles_labels()
    figure.legend(
        *shown, loc="outside right center", frameon=False, fontsize=8, title="/4: patches of 4", title_fontsize=8
    )
    figure.suptitle(label(title, 120), fontsize=10, x=0.01, ha="left")
    _save(figure, path)


def save_compute(path, points, *, title=""):
    """Accuracy against the FLOPs of training (of `paper.make_hybrid`): a line for each kind of model, by its sizes."""
    figure = _figure(6.8, 4.2)
    axes = figure.subplots()
    for kind, color, marker in zip(dict.fromkeys(p["kind"] for p in points), LINES, "os^Dvp", strict=False):
        mine = sorted((p for p in points if p["kind"] == kind), key=lambda p: p["training_flops"])
        x, y = [1e-12 * p["training_flops"] for p in mine], [100 * p["accuracy"] for p in mine]
        axes.plot(x, y, marker=marker, ms=6, lw=1.4, color=color, label=kind)
        for p, place in zip(mine, zip(x, y, strict=True), strict=True):
            axes.annotate(p["width"], place, (0, 6), textcoords="offset points", ha="center", fontsize=8, color=color)
    axes.set_xscale("log")
    axes.margins(0.15)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.xaxis.set_minor_locator(NullLocator())
    _style(axes, "training, TFLOP in matrix products", "test accuracy, %", label(title, 80))
    axes.legend(
        frameon=False, fontsize=8, title="64: width of the tokens", title_fontsize=8, loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
    )  # fmt: skip
    _save(figure, path)
