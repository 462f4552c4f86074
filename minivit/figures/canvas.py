"""What all figures share: the canvas, the colours, the axes, text from outside, and the file.

Figures are made without a display and without pyplot's global state. ``path`` is where a figure goes, a PNG unless it
ends in .pdf or .svg. Some figures can become a part of a page instead: with ``path=None`` they are returned as an SVG
element (see `as_svg`).
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import re
import warnings
from contextlib import contextmanager
from pathlib import Path

from minivit.base.files import write_atomically

_BACKEND = os.environ.pop("MPLBACKEND", None)  # of a notebook, say: one that is not here would end the import
try:
    import matplotlib
    from matplotlib import colormaps  # noqa: F401  for others
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
finally:
    if _BACKEND is not None:
        os.environ["MPLBACKEND"] = _BACKEND

TRAIN, TEST, GOOD, BAD = "#7a869a", "#c2410c", "#15803d", "#b91c1c"
OURS, THEIRS, FLOOR = "#1d4ed8", "#94a3b8", "#cbd5e1"
LINES = ("#1d4ed8", "#c2410c", "#15803d", "#7e22ce", "#0891b2", "#b45309")  # of many alike
SOFT = "#475569"  # text that matters less
INK = "#111827"  # on what is light in every figure, where black may become the colour of a dark page's text


def new_figure(width, height):
    """An empty figure of so many inches."""
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def own_style(function):
    """Let a function that draws use matplotlib's own settings, whatever the user's matplotlibrc says."""

    @functools.wraps(function)
    def draws(*arguments, **settings):
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            return function(*arguments, **settings)

    return draws


@contextmanager
def any_text():
    """While active, a script that the font lacks shows as boxes, and names too long are cut: no reason to warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing|constrained_layout not applied|Tight layout")
        yield


def save(figure, path):
    """Write a figure to a file, atomically; with ``path=None`` an SVG element is returned instead.

    Raises  OSError: see `write_atomically`.
    """
    with any_text():
        if path is None:
            return as_svg(figure)
        kind = {".pdf": "pdf", ".svg": "svg"}.get(Path(path).suffix.lower(), "png")
        meta = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)  # the same figure is the same bytes
        with matplotlib.rc_context({"svg.hashsalt": "minivit"}):
            write_atomically(path, lambda file: figure.savefig(file, format=kind, metadata=meta))


def as_svg(figure):
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


def style(axes, xlabel, ylabel, title):
    """Labels, title and grid as all axes have them."""
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if xlabel == "epoch":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def pixels_of(image):
    """An image (H, W, C) as matplotlib shows it: one channel as (H, W), more than three as the first three."""
    return image[..., 0] if image.shape[-1] < 3 else image[..., :3]


def show(axes, image):
    """Draw an image (H, W, C) uint8 on axes without ticks; one channel as dark ink on white paper."""
    axes.imshow(pixels_of(image), cmap="gray_r", vmin=0, vmax=255, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_color("#cccccc")
