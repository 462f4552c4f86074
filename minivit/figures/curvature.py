"""Sharpness along a run, the edge of stability, and the loss surface at its end."""

from __future__ import annotations

import numpy as np

from minivit.figures.canvas import BAD, TEST, TRAIN, new_figure, own_style, save, style


@own_style
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

    figure = new_figure(13.5 if slice_ else 9.0, 4.0)
    panels = figure.subplots(1, 3 if slice_ else 2)
    epochs = [r["epoch"] for r in records]
    loss, sharp = panels[:2]
    loss.plot(epochs, [r["loss"] for r in records], color=TEST, lw=2, marker="o", ms=3)
    style(loss, "epoch", "cross-entropy, nats", "loss on the images measured")
    loss.set_ylim(bottom=0)
    count = min(len(r["eigenvalues"]) for r in records)
    missed = []  # (epoch, eigenvalue, residual, colour)

    def draw(points, k, color, width, label):
        """The k-th eigenvalue of (epoch, figures) pairs."""
        sharp.semilogy([e for e, _ in points], [m["eigenvalues"][k] for _, m in points], color=color, lw=width,
                       label=label, **alone(points))  # fmt: skip
        missed.extend((e, m["eigenvalues"][k], m["residuals"][k], color) for e, m in points if not m["converged"][k])

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
    style(sharp, "epoch", "curvature", "sharpness and the edge of stability")
    highest = max(m["eigenvalues"][0] for r in records for m in (r, r.get("preconditioned") or r))
    sharp.set_ylim(top=30 * highest)  # the edge goes to infinity as the learning rate goes to 0
    sharp.legend(frameon=False, fontsize=8)
    if slice_:
        offsets, losses = slice_
        surface = panels[2]
        filled = surface.contourf(offsets, offsets, np.log10(losses), levels=24, cmap="viridis")
        surface.plot(0, 0, "o", color="white", ms=6, mec="black")
        figure.colorbar(filled, ax=surface, label="log10 of the loss")
        style(
            surface, "along the sharpest direction", "along the second", f"loss surface at the end, epoch {epochs[-1]}"
        )
        surface.grid(False)
    figure.suptitle(title, fontsize=11)
    save(figure, path)
