"""V-curves: the error of numerical derivatives against their step, with the lines and knees of theory."""

from __future__ import annotations

import numpy as np
from matplotlib.lines import Line2D

from minivit.figures.canvas import GOOD, OURS, SOFT, TEST, new_figure, own_style, save, style
from minivit.laboratory.gradcheck import METHODS

COLORS = {"forward": "#7e22ce", "central": OURS, "five-point": GOOD, "complex": TEST}
THEORY = {"ls": (0, (5, 3)), "lw": 0.8, "alpha": 0.7, "zorder": 2}
LEFT, RIGHT = 1e-14, 10**-0.5  # the steps that are shown


@own_style
def save_v_curves(path, panels, *, title=""):
    """Error of numerical derivatives against their step: the V-curves of one function.

    Dashed straight lines are theory: rounding eps noise / h of slope -1, and truncation h^order of slope 1, 2 and 4; a
    diamond where they cross is the predicted knee, a disc the measured one, smaller for float32.
    ``panels``: {argument: {(method, dtype name): (`gradcheck.Curve`, `gradcheck.Knee`)}}, a panel for each argument
    """
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = new_figure(4.7 * columns + 0.6, 4.3 * rows + 1.1)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    slopes = []  # (axes, slope, a point of the line, colour), to be written when the layout is known
    for axes, (argument, curves) in zip(grid.flat, panels.items(), strict=False):
        slopes += [(axes, *slope) for slope in _draw_panel(axes, curves)]
        style(axes, "step h", "relative error", f"derivative with respect to {argument}")
        axes.set_xlim(LEFT, RIGHT)
        axes.set_ylim(3e-18, 1e3)
        axes.label_outer()
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    first = grid[0, 0]
    first.text(2e-14, 3e-14, "complex step: nothing is subtracted", fontsize=8, color=COLORS["complex"])
    first.text(2e-14, 3, "float32: x + h = x", fontsize=8, color=SOFT)
    figure.legend(
        handles=_handles(), loc="outside lower center", ncols=min(3 * columns, 9), frameon=False, fontsize=8
    )  # fmt: skip
    figure.suptitle(title, fontsize=12)
    figure.get_layout_engine().set(wspace=0.05)
    figure.draw_without_rendering()
    for slope in slopes:
        _write_slope(*slope)
    save(figure, path)


def _draw_panel(axes, curves):
    """The curves of one argument; returns the slopes to be written: a list of (slope, a point of the line, colour)."""
    slopes, rounding = [], {}  # {dtype: how far its line of rounding is drawn}
    for (method, dtype), (curve, knee) in curves.items():
        narrow, color = dtype == "float32", COLORS[method]
        order, size = METHODS[method].order, 4.5 if narrow else 7
        axes.loglog(curve.steps, curve.errors, color=color, lw=0.8 if narrow else 1.6, alpha=0.5 if narrow else 1,
                    zorder=1 if method == "complex" else 3)  # fmt: skip
        if method == "complex":
            continue
        noise = float(np.finfo(dtype).eps) * curve.noise
        end = RIGHT if curve.linear else knee.predicted_step
        start = rounding.get(dtype, LEFT)  # one line for all methods, as far as the last knee
        axes.plot([start, end], [noise / start, noise / end], color=SOFT, **THEORY)
        rounding[dtype] = end
        if method == "forward" and not narrow:
            slopes.append((-1, (1e-11, noise / 1e-11), SOFT))
        if curve.linear:  # no truncation, hence no knee
            continue
        if not narrow:
            axes.plot([end, RIGHT], [end**order, RIGHT**order], color=color, **THEORY)
            h = 6.0 * end if order < 4 else 2.0 * end  # a little right of the knee
            slopes.append((order, (h, h**order), color))
        axes.plot(knee.predicted_step, knee.predicted_error, "D", ms=size, mfc="white", mec=color, zorder=4)
        axes.plot(knee.step, knee.error, "o", ms=size, color=color, mec="white", zorder=5)
    return slopes


def _handles():
    """What the legend shows."""
    lines = {name if name != "complex" else "complex step": {"color": color} for name, color in COLORS.items()}
    lines |= {"float64": {"color": SOFT, "lw": 1.6}, "float32": {"color": SOFT, "lw": 0.8, "alpha": 0.6}}
    lines |= {"theory": {"color": SOFT, **THEORY}}
    lines |= {"knee, predicted": {"marker": "D", "ls": "", "mfc": "white", "mec": SOFT}}
    lines |= {"knee, measured": {"marker": "o", "ls": "", "color": SOFT}}
    return [Line2D([], [], label=name, **look) for name, look in lines.items()]


def _write_slope(axes, slope, point, color):
    """Write the slope of a straight line along it, above one of its points."""
    x, y = point
    (x0, y0), (x1, y1) = axes.transData.transform([(x, y), (10 * x, y * 10.0**slope)])
    angle = np.arctan2(y1 - y0, x1 - x0)
    above = -5 * np.sin(angle), 5 * np.cos(angle)
    words, look = f"slope {slope}".replace("-", "\N{MINUS SIGN}"), {"fontsize": 7.5, "color": color}
    text = axes.annotate(words, (x, y), above, textcoords="offset points", rotation=np.degrees(angle),
                         rotation_mode="anchor", **look)  # fmt: skip
    text.set_in_layout(False)
