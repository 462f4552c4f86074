"""What a model looks at: an image under its attention map, in the light of its rollout; how far the heads look."""

from __future__ import annotations

import io

import numpy as np
from matplotlib import colormaps
from matplotlib.image import imsave
from matplotlib.ticker import MaxNLocator

from minivit.figures.canvas import (
    BAD,
    GOOD,
    OURS,
    TEST,
    THEIRS,
    TRAIN,
    label,
    new_figure,
    own_style,
    pixels_of,
    save,
    show,
    style,
)

OVERLAY = {"cmap": "viridis", "alpha": 0.7}  # attention over an image


@own_style
def image_png(image, attention=None):
    """The bytes of a PNG file that shows an image, a pixel for a pixel, under its attention map if one is given.

    Shapes  image (H, W, C) uint8; attention (grid, grid), non-negative, H and W multiples of grid
    """
    pixels = pixels_of(image)
    if pixels.ndim == 2:
        pixels = colormaps["gray_r"](pixels)[..., :3]  # as `show` has it
    else:
        pixels = pixels / 255.0
    if attention is not None:
        H, W = image.shape[:2]
        grid = len(attention)
        map_ = np.repeat(np.repeat(attention, H // grid, axis=0), W // grid, axis=1)  # (H, W)
        colors = colormaps[OVERLAY["cmap"]](map_ / max(float(attention.max()), 1e-30))[..., :3]
        pixels = OVERLAY["alpha"] * colors + (1.0 - OVERLAY["alpha"]) * pixels
    file = io.BytesIO()
    imsave(file, np.ascontiguousarray(pixels), format="png", metadata={"Software": None})
    return file.getvalue()


@own_style
def save_attention(
    path, image, attention, probabilities, class_names, *, title="", truth=None, top=5,
    what="attention of the last block, mean of its heads",
):  # fmt: skip
    """An image, the same image under its attention map, and the most probable classes.

    Shapes  image (H, W, C) uint8; attention (grid, grid), non-negative; probabilities (K,)
    ``what``: what the map is, in words
    The first bar is green, or red if the true class is given and is another one.
    """
    H, W = image.shape[:2]
    share = attention / max(float(attention.sum()), 1e-30)
    figure = new_figure(10, 3.3)
    original, overlay, bars = figure.subplots(1, 3, width_ratios=[1, 1.2, 1.2])
    show(original, image)
    original.set_title(label(title, 40), fontsize=11, loc="left")
    show(overlay, image)
    extent = (-0.5, W - 0.5, H - 0.5, -0.5)
    pixels = overlay.imshow(100 * share, vmin=0, extent=extent, interpolation="nearest", **OVERLAY)
    overlay.set_title(what, fontsize=9, loc="left")
    figure.colorbar(pixels, ax=overlay, fraction=0.046, pad=0.02, format="%.3g%%")
    order = np.argsort(probabilities)[::-1][:top]
    first = BAD if truth is not None and truth != order[0] else GOOD
    bars.barh(range(len(order)), 100 * probabilities[order], color=[first, *[TRAIN] * (len(order) - 1)], height=0.7)
    for row, k in enumerate(order):
        bars.text(100 * probabilities[k] + 1.5, row, f"{probabilities[k]:.1%}", va="center", fontsize=9)
    bars.set_yticks(range(len(order)), [label(class_names[k]) for k in order])
    bars.invert_yaxis()
    bars.set_xlim(0, 118)
    bars.set_xticks(range(0, 101, 25))
    style(bars, "probability, %", "", f"prediction: {label(class_names[order[0]])}")
    save(figure, path)


def spotlight(image, map_, low=0.12):
    """An image that is dark where a map is small: the least of the map shows ``low`` of the light, the largest all.

    Shapes  image (H, W, C) uint8, map_ (g, g), H and W multiples of g  ->  (H, W, 3) uint8
    """
    pixels = pixels_of(image)
    if pixels.ndim == 2:
        pixels = np.rint(255 * colormaps["gray"](pixels)[..., :3])
    light = (map_ - map_.min()) / max(float(map_.max() - map_.min()), 1e-30)
    light = np.kron(low + (1 - low) * light, np.ones((len(pixels) // len(map_), pixels.shape[1] // len(map_))))
    return np.rint(pixels * light[..., None]).astype(np.uint8)


@own_style
def save_rollouts(path, images, maps, titles, *, title="", columns=6):
    """Images beside themselves in the light of their attention rollout.

    Shapes  images (n, H, W, C) uint8, maps (n, g, g); ``titles``: n of (text, is it right?)
    Above each map stands how many times as much its brightest patch counts as its darkest.
    """
    n = len(images)
    rows = -(-n // columns)
    figure = new_figure(2.0 * columns, 1.18 * rows + 0.5)
    widths = [1, 1, 0.12] * columns
    grid = figure.subplots(rows, 3 * columns, squeeze=False, width_ratios=widths).reshape(-1, 3)
    for i, (left, right, gap) in enumerate(grid):
        gap.set_axis_off()
        if i >= n:
            left.set_axis_off()
            right.set_axis_off()
            continue
        pixels = images[i] if images.shape[-1] >= 3 else 255 - images[i]  # `show` draws ink on paper, `spotlight` light
        show(left, pixels)
        show(right, spotlight(images[i], maps[i]))
        text, good = titles[i]
        left.set_title(label(text, 18), fontsize=7, color=GOOD if good else BAD, loc="left", pad=2)
        ratio = maps[i].max() / max(maps[i].min(), 1e-30)
        right.set_title(f"×{ratio:.1f}" if ratio < 1e4 else "", fontsize=7, loc="right", pad=2)
    figure.suptitle(label(title, 120), fontsize=10)
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0.01, hspace=0.02)
    save(figure, path)


@own_style
def save_distances(path, distances, *, uniform, images=None, title=""):
    """Mean attention distance: a dot for each head of each block, and a line through the means of the blocks.

    Shapes  distances (L, h), in pixels, of `minivit.paper.analyses.head_distances`
    ``uniform``: the distance of attention that is the same for all patches; ``images``: over how many it was measured
    """
    L, h = distances.shape
    figure = new_figure(6.0, 4.2)
    axes = figure.subplots()
    blocks = np.arange(1, L + 1)
    for head, each in enumerate(np.sort(distances, axis=1).T):
        axes.plot(blocks, each, "o", color=OURS, ms=5, alpha=0.55, label="a head" if head == 0 else None)
    axes.plot(blocks, distances.mean(axis=1), color=TEST, lw=1.8, marker="_", ms=12, label="mean of the block")
    axes.axhline(uniform, color=THEIRS, ls="--", lw=1.2, label="attention to all patches alike")
    of = f" over {images} images" if images else ""
    style(axes, "block", f"mean attention distance{of}, pixels", "")
    axes.set_title(label(title, 90), loc="left", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(0, 1.15 * max(distances.max(), uniform))
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    save(figure, path)
