"""What the patch embedding and the position embedding have learned."""

from __future__ import annotations

import numpy as np

from minivit.figures.canvas import label, new_figure, own_style, save, show

POSITIONS = 16  # most positions along a side of a figure: of a finer grid every second, third, ... is drawn


@own_style
def save_filters(path, filters, *, title="", columns=7):
    """Principal components of the patch embedding as images (`minivit.paper.analyses.Filters`), with their shares.

    Grey is 0; each component is scaled by its own largest entry. The share is of the filters' variance.
    """
    n, P, _, C = filters.images.shape
    rows = -(-n // columns)
    figure = new_figure(1.05 * columns, 1.28 * rows + 0.5)
    for i, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        if i >= n:
            axes.set_axis_off()
            continue
        image = 0.5 + 0.5 * filters.images[i] / max(np.abs(filters.images[i]).max(), 1e-300)
        show(axes, np.rint(255 * image).astype(np.uint8))
        if C < 3:
            axes.images[0].set_cmap("gray")  # ink and paper mean nothing here: white is positive
        axes.set_title(f"{100 * filters.shares[i]:.3g} %", fontsize=8)
    figure.suptitle(label(title, 100), fontsize=10)
    save(figure, path)


@own_style
def save_positions(path, similarity, *, kind="", title=""):
    """Cosine similarity of position embeddings: for each patch a map of its similarity to all patches.

    Shapes  similarity (g, g, g, g), of `minivit.paper.analyses.position_similarity`
    ``kind``: that of the positions, in a word
    """
    g = len(similarity)
    every = -(-g // POSITIONS)
    places = range((every - 1) // 2, g, every)
    n, gap = len(places), max(1, g // 8)
    sheet = np.full((n * (g + gap) - gap, n * (g + gap) - gap), np.nan)
    for i, r in enumerate(places):
        for j, c in enumerate(places):
            sheet[i * (g + gap) :, j * (g + gap) :][:g, :g] = similarity[r, c]
    figure = new_figure(6.2, 5.4)
    axes = figure.subplots()
    image = axes.imshow(sheet, vmin=similarity.min(), vmax=1, cmap="viridis", interpolation="nearest")
    middles = [i * (g + gap) + (g - 1) / 2 for i in range(n)]
    axes.set_xticks(middles, [c + 1 for c in places], fontsize=8)
    axes.set_yticks(middles, [r + 1 for r in places], fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("column of the patch")
    axes.set_ylabel("row of the patch")
    axes.set_title(label(title, 90), loc="left", fontsize=9)
    words = f"cosine similarity of {kind} positions" if kind else "cosine similarity"
    figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02, label=words)
    save(figure, path)
