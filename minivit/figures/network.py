"""The network of a trace as boxes, its first block opened, with the tensors on the arrows."""

from __future__ import annotations

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch

from minivit.figures.canvas import OURS, SOFT, TEST, label, own_style, save

FORWARD, BACKWARD = OURS, TEST
BOX, PANEL, EDGE = "#334155", "#f1f5f9", "#cbd5e1"  # colours of outlines and of the panel of the block
WIDE, HIGH = 1.75, 1.25  # of a box
# The two rows of a block: its height on the page, what comes in, what goes out, and the boxes: name, tensor, layers.
ROWS = (
    (4.6, "z_0", "z'_1", [
        ("norm1", "u", ["norm1"]), ("qkv", "q, k, v", ["msa.qkv"]), ("attention", "heads", ["msa.attention"]),
        ("proj", "msa", ["msa.proj"]),
    ]),
    (1.95, "z'_1", "z_1", [
        ("norm2", "v", ["norm2"]), ("fc1", "hidden", ["mlp.fc1"]),
        ("gelu", "gelu", ["mlp.activation", "mlp.activation.dropout"]),
        ("fc2", "mlp", ["mlp.fc2"]),
    ]),
)  # fmt: skip


@own_style
def save_trace(path, trace, *, title=""):
    """The network of a `minivit.laboratory.trace.Trace` as boxes, its first block opened, tensors on the arrows.

    Forward tensors, with their shapes, run to the right in one colour; gradients, with their norms, run back in the
    other. Each box tells its equation, the bytes that its cache keeps and its share of the time: of the whole step in
    the upper row, of its block in the lower rows.
    """
    figure = Figure(figsize=(16, 8.8), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 16), ylim=(0.6, 9.4))
    axes.set_axis_off()
    drawing = _Drawing(axes, trace)
    drawing.network()
    for row in ROWS:
        drawing.block_row(*row)
    drawing.head(title)
    save(figure, path)


def _sizes(shape):
    return "×".join(map(str, shape)) or "one number"


def _bytes(count):
    return f"{count / 2**20:.3g} MiB" if count >= 2**17 else f"{count / 2**10:.3g} KiB"


class _Drawing:
    """The axes and the trace that is drawn on them."""

    def __init__(self, axes, trace):
        self.axes, self.trace = axes, trace
        self.records = {(r.path, r.direction): r for r in reversed(trace.records)}  # the first of each path
        self.backward = ("loss", "backward") in self.records

    def shape_of(self, path):
        return self.records[path, "forward"].shape

    def norm_of(self, path, name, *, incoming=False):
        """The text under an arrow: the gradient that the backward of ``path`` gives, or the one that it gets."""
        r = self.records.get((path, "backward"))
        if r is None:
            return None
        parts = [r.norms[key] for key in ("dq", "dk", "dv") if key in r.norms] or [next(iter(r.norms.values()))]
        value = r.incoming if incoming else np.linalg.norm(parts)
        return f"d{name}\nnorm {value:.2g}"

    def after(self, branch):
        """The records of what follows a branch of the first block before it is added, such as dropout."""
        return [r for r in self.trace.records if r.depth == 1 and r.path.startswith(f"blocks.0.{branch}.")]

    def end_of(self, branch):
        """The path of the last call of a branch of the first block, whose result is added."""
        return [f"blocks.0.{branch}", *(r.path for r in self.after(branch) if r.direction == "forward")][-1]

    def text(self, x, y, words, size, color="black", ha="center", va="center", **look):
        self.axes.text(x, y, words, fontsize=size, color=color, ha=ha, va=va, **look)

    def of_block(self, parts):
        """The records of some parts of the first block."""
        return [r for p in parts for d in ("forward", "backward") if (r := self.records.get((f"blocks.0.{p}", d)))]

    def box(self, x, y, name, inside, whole):
        """A box centred at (x, y) for some records, which took a share of ``whole`` seconds."""
        cached, seconds = sum(r.cached for r in inside), sum(r.seconds for r in inside)
        self.axes.add_patch(
            FancyBboxPatch((x - WIDE / 2, y - HIGH / 2), WIDE, HIGH, boxstyle="round,pad=0,rounding_size=0.12",
                           facecolor="white", edgecolor=BOX, lw=1.2, zorder=3)
        )  # fmt: skip
        equations = [f"Eq. {r.equation}" for r in inside if r.equation]
        equation = equations[0] if equations else "cross-entropy" if name == "loss" else ""
        self.text(x, y + 0.4, name, 11, weight="bold", zorder=4)
        self.text(x, y + 0.13, equation, 8.5, SOFT, zorder=4)
        self.text(x, y - 0.15, f"cached {_bytes(cached)}", 9, zorder=4)
        self.text(x, y - 0.41, f"time {seconds / whole:.1%}", 9, zorder=4)

    def arrows(self, left, right, y, name, shape, gradient):
        """The arrow forward from ``left`` to ``right``, and the one back under it unless ``gradient`` is None."""
        middle = (left + right) / 2
        look = {"arrowstyle": "-|>", "lw": 1.6, "shrinkA": 2, "shrinkB": 2, "mutation_scale": 13}
        self.axes.annotate("", (right, y + 0.14), (left, y + 0.14), arrowprops={**look, "color": FORWARD})
        self.text(middle, y + 0.22, f"{name}\n{_sizes(shape)}", 8.5, FORWARD, va="bottom")
        if gradient is not None:
            self.axes.annotate("", (left, y - 0.14), (right, y - 0.14), arrowprops={**look, "color": BACKWARD})
            self.text(middle, y - 0.22, gradient, 8.5, BACKWARD, va="top")

    def network(self):
        """The upper row, the whole network, and the panel on which its first block is opened."""
        c, L, y, half = self.trace.config, self.trace.config.depth, 7.75, WIDE / 2
        xs = [3.3, 6.6, 9.9, 13.2]
        outer = [r for r in self.trace.records if r.depth == 0]
        step = sum(r.seconds for r in outer)
        parts = ("embedding", f"{L} blocks" if L > 1 else "1 block", "head", "loss")
        for x, part, name in zip(xs, ("embedding", "blocks", "head", "loss"), parts, strict=True):
            self.box(x, y, name, [r for r in outer if r.path.partition(".")[0] == part], step)
        embedded = [r.shape for r in outer if r.path.startswith("embedding") and r.direction == "forward"][-1]
        images = (self.trace.batch, c.image_size, c.image_size, c.channels)
        unneeded = "no gradient\nneeded" if self.backward else None
        self.arrows(xs[0] - 3.3 + half, xs[0] - half, y, "images", images, unneeded)
        for left, right, name, shape, after in (
            (xs[0], xs[1], "z_0", embedded, "blocks.0"),
            (xs[1], xs[2], f"z_{L}", self.shape_of(f"blocks.{L - 1}"), "head"),
            (xs[2], xs[3], "logits", self.trace.logits.shape, "loss"),
        ):
            self.arrows(left + half, right - half, y, name, shape, self.norm_of(after, name))
        loss = f"loss {float(self.trace.loss):.4g}"
        self.arrows(xs[3] + half, 15.7, y, loss, (), self.norm_of("loss", "loss", incoming=True))
        self.axes.add_patch(
            FancyBboxPatch((0.25, 0.8), 15.5, 5.65, boxstyle="round,pad=0,rounding_size=0.2", facecolor=PANEL,
                           edgecolor=EDGE, zorder=0)
        )  # fmt: skip
        for x in (xs[1] - half, xs[1] + half):
            self.axes.plot([x, 0.45 if x < xs[1] else 15.55], [y - HIGH / 2, 6.45], color=EDGE, lw=1, zorder=0)
        self.text(0.5, 6.15, f"block 0, one of {L}: shares of time are of this block", 10, ha="left")

    def block_row(self, y, source, target, steps):
        """One of the two branches of the first block, which is added to what goes around it; see ``ROWS``."""
        if steps[0][0] == "norm2" and not all(self.of_block(parts[:1]) for _, _, parts in steps):
            steps = [steps[0], ("mlp", "mlp", ["mlp"])]  # an option's MLP of other parts, which may not form a line
        kind = self.trace.config.mlp  # of the activation
        steps = [(kind, kind, parts) if name == "gelu" else (name, tensor, parts) for name, tensor, parts in steps]
        xs, plus, half, tokens = [2.75, 5.95, 9.15, 12.35], 14.55, WIDE / 2, self.shape_of("blocks.0")
        xs = xs[: len(steps) - 1] + xs[-1:]
        branch = "msa" if steps[0][0] == "norm1" else "mlp"
        whole = sum(r.seconds for r in self.trace.records if r.path == "blocks.0")
        for x, (name, _, parts) in zip(xs, steps, strict=True):
            self.box(x, y, name, self.of_block(parts) + (self.after(branch) if x == xs[-1] else []), whole)
        if branch == "msa":
            maps = [r.shape for r in self.trace.records if r.path.startswith("blocks.0.msa.") and "softmax" in r.path]
            if maps:  # long sequences keep none
                self.text(xs[2], y + HIGH / 2 + 0.06, f"attn {_sizes(maps[0])}", 8.5, FORWARD, va="bottom")
            around = self.norm_of("blocks.0", source)
        else:
            around = self.norm_of(self.end_of("msa"), source, incoming=True)
        paths = [f"blocks.0.{parts[0]}" for _, _, parts in steps]
        self.arrows(0.4, xs[0] - half, y, source, tokens, around)
        for left, right, name, p, after in zip(xs, xs[1:], [s[1] for s in steps], paths, paths[1:], strict=False):
            gradient = self.norm_of(after, name.replace(", ", ", d"))
            self.arrows(left + half, right - half, y, name, self.shape_of(p), gradient)
        name, end = steps[-1][1], self.end_of(branch)
        self.arrows(xs[-1] + half, plus - 0.2, y, name, tokens, self.norm_of(end, name, incoming=True))
        self.axes.add_patch(Circle((plus, y), 0.2, facecolor="white", edgecolor=BOX, lw=1.2, zorder=3))
        self.text(plus, y, "+", 13, zorder=4)
        self.arrows(plus + 0.2, 15.65, y, target, tokens, self.norm_of(end, target, incoming=True))
        top, start = y + 1.15, 0.62  # what goes around
        self.axes.plot([start, start, plus, plus], [y + 0.14, top, top, y + 0.2], color=FORWARD, lw=1.6, zorder=1)
        self.text((start + plus) / 2, top + 0.05, "unchanged, forward and back", 8.5, SOFT, va="bottom")

    def head(self, title):
        """The title, the totals and what the colours mean."""
        self.text(0.3, 9.05, label(title, 60), 13, ha="left", weight="bold")
        t = self.trace.totals
        totals = (
            f"{self.trace.batch} images, {self.trace.dtype}, {t.parameters:,} parameters, {_bytes(t.cached)} cached; "
            f"forward {1e-9 * t.forward_flops:.3g} GFLOP in {1e3 * t.forward_seconds:,.1f} ms"
        )
        if self.backward:
            totals += f", backward {1e-9 * t.backward_flops:.3g} GFLOP in {1e3 * t.backward_seconds:,.1f} ms"
        self.text(0.3, 8.7, totals, 10, SOFT, ha="left")
        self.text(15.7, 9.05, "tensor, shape →", 10, FORWARD, ha="right")
        if self.backward:
            self.text(15.7, 8.7, "← gradient, norm", 10, BACKWARD, ha="right")
