"""Sheets of images in rows: what augmentation makes of them, what a masked model guesses."""

from __future__ import annotations

import numpy as np

from minivit.figures.canvas import label, new_figure, own_style, save, show


@own_style
def save_contact_sheet(path, rows, *, title=""):
    """Rows of images, each row under a name: ``rows`` maps names to images (n, H, W, C) of one shape."""
    H, W, C = next(iter(rows.values())).shape[1:]
    gap = max(1, H // 16)
    columns = max(map(len, rows.values()))
    sheet = np.full((len(rows) * (H + gap) - gap, columns * (W + gap) - gap, C), 255 if C > 1 else 24, np.uint8)
    for r, images in enumerate(rows.values()):
        for c, image in enumerate(images):
            sheet[r * (H + gap) :, c * (W + gap) :][:H, :W] = image
    figure = new_figure(3.0 + 0.7 * columns, 0.5 + 0.7 * len(rows) * H / W)
    axes = figure.subplots()
    show(axes, sheet)
    axes.set_yticks([r * (H + gap) + H / 2 for r in range(len(rows))], [label(name, 40) for name in rows], fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="left", fontsize=11)
    save(figure, path)
