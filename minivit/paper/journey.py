"""How one picture becomes a class: patches, tokens, attention block by block, probabilities; still, and moving.

What is shown is the model at work on that picture, nothing is invented for the show:

    tokens    each row is a token, each column one of its D numbers (of very wide tokens, evenly chosen ones): the
              embedded patches, then the output of each block, red for positive and blue for negative, in units of all
              its numbers' standard deviation
    light     the attention rollout (`minivit.paper.analyses`) after each block: on the left of one patch's token, on the
              right of what is classified, the class token or the mean of the patches; dark is the least of the picture.
              A token's share in itself, by far the largest, is shown no brighter than the next.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

from minivit.base.backend import array_module, to_host
from minivit.base.errors import InputError
from minivit.evaluation.inference import attention_map
from minivit.figures.paper_plots import spotlight
from minivit.figures.plots import BAD, GOOD, INK, TRAIN, _figure, _save, _show, _style, any_text, label, picture
from minivit.layers.patch_embed import patchify
from minivit.layers.softmax import softmax_forward
from minivit.paper.analyses import attention_rollout, square_maps
from minivit.weights.checkpoint import write_atomically

WIDTH, HEIGHT, FPS = 800, 450, 12.5
SOFT, LINE = "#64748b", "#cbd5e1"
COLORS = 128  # of the moving picture


class Journey(NamedTuple):
    """One picture and what the model makes of it."""

    image: Any  # (H, W, C) uint8
    config: Any  # `ViTConfig`
    tokens: Any  # (1 + L, N, D): the embedded tokens, then the output of each block
    gaze: Any  # (1 + L, g, g): the rollout of one patch's token; at first it is itself
    maps: Any  # (1 + L, g, g): the rollout of what is classified
    patch: tuple[int, int]  # row and column of that patch
    probabilities: Any  # (K,)
    names: tuple[str, ...]
    truth: int | None


def journey_of(model, image, class_names, *, truth=None):
    """Follow one picture through a model.

    Shapes  image (H, W, C) uint8
    The patch whose token is followed is the one that counts most for the class.
    Raises  InputError: the model's attention is not of all tokens.
    """
    c, xp = model.config, array_module(model.flat)
    seen = model.intermediates(xp.asarray(image[None]))
    rollouts = attention_rollout([to_host(a) for a in square_maps(seen.attention, c)])
    rollouts = [np.eye(c.num_tokens)] + [r[0].astype(np.float64) for r in rollouts]
    maps = np.array([attention_map(r[None], c.pooling, c.registers) for r in rollouts])
    first = c.num_tokens - c.grid_size**2
    patch = int(maps[-1].argmax())
    gaze = np.array([r[first + patch, first:].reshape(c.grid_size, c.grid_size) for r in rollouts])
    tokens = np.array([to_host(z)[0] for z in seen.features], np.float64)
    probabilities = softmax_forward(np.asarray(to_host(seen.logits), np.float64))[0][0]
    return Journey(image, c, tokens, gaze, maps, divmod(patch, c.grid_size), probabilities, tuple(class_names), truth)


def _numbers(z, columns=128):
    """Tokens as colours, a pixel for a number: (N, D) -> (N, at most ``columns``, 3) uint8."""
    chosen = np.linspace(0, z.shape[1] - 1, min(columns, z.shape[1])).round().astype(int)
    z = z[:, chosen] / max(float(z.std()), 1e-30)
    level = np.rint(4 * np.clip(z / 2, -1, 1)) / 4  # nine shades: a moving picture of few colours is a small file
    return np.rint(255 * colormaps["RdBu_r"](0.5 + 0.45 * level)[..., :3]).astype(np.uint8)


def _top(journey, count=5):
    """Rows of the chart of probabilities: (name, probability, colour)."""
    order = np.argsort(-journey.probabilities, kind="stable")[:count]
    first = BAD if journey.truth is not None and journey.truth != order[0] else GOOD
    return [(label(journey.names[k], 14), float(journey.probabilities[k]), TRAIN if i else first)
            for i, k in enumerate(order)]  # fmt: skip


def _shown(image):
    """A picture as (H, W, 3) uint8; of one channel as light on dark, as `spotlight` has it."""
    return spotlight(image, np.zeros((1, 1)), low=1.0) if picture(image).ndim == 2 else picture(image)


def reader(config):
    """What is classified, in words."""
    return "the class token" if config.pooling == "cls" else "the mean of all tokens"


# ---- still -----------------------------------------------------------------------------------------------------------


def save_still(path, journey):
    """The journey in one figure: picture, patches, tokens, the light of each block, probabilities."""
    c, g, P = journey.config, journey.config.grid_size, journey.config.image_size // journey.config.grid_size
    L = c.depth
    chosen = sorted(set(np.linspace(1, L, min(L, 6)).round().astype(int)))
    half = -(-len(chosen) // 2)
    figure = _figure(13.0, 3.5)
    # the fourth is wide enough for its heading, however few the blocks
    parts = figure.subfigures(1, 5, width_ratios=[1, 1.08, 1.15, max(0.56 * half + 0.1, 1.35), 1.15])
    original, cut, tokens, bars = (part.subplots() for part in (*parts[:3], parts[4]))
    shown = _shown(journey.image)
    _show(original, shown)
    original.set_title(f"1  a picture of {c.image_size} × {c.image_size}", fontsize=10, loc="left")
    gap = max(1, P // 4)
    sheet = np.full((g * (P + gap) - gap, g * (P + gap) - gap, 3), 255, np.uint8)
    for r, col in np.ndindex(g, g):
        sheet[r * (P + gap) :, col * (P + gap) :][:P, :P] = shown[r * P : (r + 1) * P, col * P : (col + 1) * P]
    _show(cut, sheet)
    cut.spines[:].set_visible(False)
    cut.set_title(f"2  {g * g} patches of {P} × {P}", fontsize=10, loc="left")
    N, D = journey.tokens[-1].shape
    tokens.imshow(_numbers(journey.tokens[-1]), aspect="auto", interpolation="nearest")
    tokens.set_xticks([])
    tokens.set_yticks([])
    tokens.set_title(f"3  {N} tokens of {D} numbers", fontsize=10, loc="left")
    tokens.set_xlabel(f"after block {L}", fontsize=9)
    grid = parts[3].subplots(2, half, squeeze=False)
    for axes in grid.flat[len(chosen) :]:
        axes.set_axis_off()
    for axes, block in zip(grid.flat, chosen, strict=False):
        _show(axes, spotlight(journey.image, journey.maps[block]))
        axes.set_title(f"block {block}", fontsize=8, pad=3)
    parts[3].suptitle(f"4  what {reader(c)} is made of", fontsize=10, x=0.02, ha="left")
    rows = _top(journey)
    bars.barh(range(len(rows)), [100 * p for _, p, _ in rows], color=[color for *_, color in rows], height=0.7)
    for row, (_, p, _) in enumerate(rows):
        bars.text(100 * p + 2, row, f"{p:.0%}", va="center", fontsize=9)
    bars.set_yticks(range(len(rows)), [name for name, *_ in rows])
    bars.invert_yaxis()
    bars.set_xlim(0, 122)
    bars.set_xticks([0, 50, 100])
    _style(bars, "probability, %", "", "")
    bars.set_title("5  a class", fontsize=10, loc="left")
    bars.grid(axis="y", visible=False)
    _save(figure, path)


# ---- moving ----------------------------------------------------------------------------------------------------------

SIDE = 208  # pixels of a picture on the canvas
LEFT, TOP, MIDDLE, RIGHT = 24, 96, 292, 568  # where the pictures and the tokens stand
TOKENS = (256, 320)  # pixels of all tokens' numbers: width, height


def _paste(canvas, image, x, y, width, height):
    """Draw a picture onto the canvas, pixels enlarged or left out, clipped at its edges."""
    x0, x1, y0, y1 = round(x), round(x + width), round(y), round(y + height)
    if x1 <= x0 or y1 <= y0:
        return
    rows = (np.arange(y1 - y0) * len(image)) // (y1 - y0)
    columns = (np.arange(x1 - x0) * image.shape[1]) // (x1 - x0)
    big = image[rows][:, columns]
    top, left = max(y0, 0), max(x0, 0)
    part = big[top - y0 : max(len(canvas) - y0, 0), left - x0 : max(canvas.shape[1] - x0, 0)]
    canvas[top : top + part.shape[0], left : left + part.shape[1]] = part


def _frame(canvas, x, y, width, height, color, thick=2):
    """Draw a rectangle's outline."""
    x, y, width, height = (round(v) for v in (x, y, width, height))
    canvas[y - thick : y + height + thick, x - thick : x] = color
    canvas[y - thick : y + height + thick, x + width : x + width + thick] = color
    canvas[y - thick : y, x - thick : x + width + thick] = color
    canvas[y + height : y + height + thick, x - thick : x + width + thick] = color


def _smooth(t):
    """From 0 to 1 with no jerk at either end."""
    t = np.clip(t, 0.0, 1.0)
    return t * t * (3 - 2 * t)


def frames_of(journey):
    """The moving picture's frames, one after the other: (canvas (HEIGHT, WIDTH, 3) uint8, texts).

    ``texts``: a list of (x, y, words, settings of matplotlib's text)
    """
    c, g = journey.config, journey.config.grid_size
    L, N, first = c.depth, c.num_tokens, c.num_tokens - c.grid_size**2
    shown = _shown(journey.image)
    patches = patchify(shown[None], c.image_size // g).reshape(g * g, c.image_size // g, c.image_size // g, 3)
    cell, row = SIDE / g, TOKENS[1] / N
    small = min(row, 14.0)  # a patch beside its token
    index = np.arange(g * g)
    home = np.stack([LEFT + index % g * cell, TOP + index // g * cell], axis=1)  # (g*g, 2): x, y
    apart = np.array([LEFT, TOP]) - 8 + (home - [LEFT, TOP]) * (0.92 + 26 / SIDE)
    beside = np.stack([np.full(g * g, MIDDLE - 6 - small), TOP + (first + index + 0.5) * row - small / 2], axis=1)
    bars = _top(journey)
    numbers = [_numbers(z) for z in journey.tokens]
    order = reader(c)

    def blank():
        return np.full((HEIGHT, WIDTH, 3), 255, np.uint8)

    def words(stage, title, below):
        return [
            (LEFT, 30, f"{stage}", {"fontsize": 17, "weight": "bold", "color": "#1d4ed8"}),
            (LEFT + 24, 30, title, {"fontsize": 15, "weight": "bold", "color": INK}),
            (LEFT + 24, 55, below, {"fontsize": 10.5, "color": SOFT}),
        ]

    def strip(canvas, arrived=None):
        """The patches that lie beside their tokens, and the rows of those; ``arrived`` (N,) bools, None for all."""
        for i in index:
            if arrived is None or arrived[first + i]:
                _paste(canvas, patches[i], *beside[i], small, small)

    def rows_of(canvas, colors, arrived=None):
        big = colors if arrived is None else np.where(arrived[:, None, None], colors, 255).astype(np.uint8)
        _paste(canvas, big, MIDDLE, TOP, *TOKENS)

    def lights(canvas, gaze, map_, at):
        """The left and the right picture in their lights."""
        r, col = journey.patch
        if at and g > 1:  # what a token began as would outshine where it looked
            gaze = gaze.copy()
            gaze[r, col] = np.delete(gaze, r * g + col).max()
        _paste(canvas, spotlight(journey.image, gaze), LEFT, TOP, SIDE, SIDE)
        _frame(canvas, LEFT + col * cell, TOP + r * cell, cell, cell, (194, 65, 12))
        _paste(canvas, spotlight(journey.image, map_), RIGHT, TOP, SIDE, SIDE)

    def under(block):
        return [
            (LEFT, TOP + SIDE + 18, "the framed patch's token is made of", {"fontsize": 9.5, "color": SOFT}),
            (RIGHT, TOP + SIDE + 18, f"{order} is made of", {"fontsize": 9.5, "color": SOFT}),
            (LEFT, TOP + SIDE + 52, f"block {block} of {L}" if block else "before the blocks",
             {"fontsize": 12, "weight": "bold", "color": "#1d4ed8"}),
        ]  # fmt: skip

    def progress(canvas, done):
        """A bar for each block, filled as far as it is done."""
        wide = min(30.0, (SIDE - 4 * (L - 1)) / L)
        for block in range(L):
            x, y = LEFT + block * (wide + 4), TOP + SIDE + 66
            _paste(canvas, np.array([[[226, 232, 240]]], np.uint8), x, y, wide, 14)
            _paste(canvas, np.array([[[29, 78, 216]]], np.uint8), x, y, wide * float(np.clip(done - block, 0, 1)), 14)

    # 1: the picture
    texts = words(1, "A picture", f"{c.image_size} × {c.image_size} pixels")
    canvas = blank()
    _paste(canvas, shown, LEFT, TOP, SIDE, SIDE)
    for _ in range(14):
        yield canvas, texts
    # 2: patches
    texts = words(2, f"is cut into {g * g} patches", f"of {c.image_size // g} × {c.image_size // g} pixels")
    for t in [*np.linspace(0.1, 1, 9), *[1] * 8]:
        canvas, place = blank(), home + _smooth(t) * (apart - home)
        size = cell * (1 - 0.08 * _smooth(t))
        for i in index:
            _paste(canvas, patches[i], *place[i], size, size)
        yield canvas, texts
    # 3: tokens
    text = f"{journey.tokens.shape[2]} numbers each: a matrix times the patch" + (
        ", plus what tells its place" if c.pos_embed != "none" else ""
    )
    texts = words(3, "each becomes a token", text)
    steps, flight = 26, 0.35
    for t in np.linspace(0, 1, steps):
        canvas, arrived = blank(), np.zeros(N, bool)
        arrived[:first] = t > 0.5 * flight
        for i in index:
            begins = (1 - flight) * i / max(g * g - 1, 1)
            done = _smooth((t - begins) / flight)
            arrived[first + i] = done >= 1
            size = cell * 0.92 + done * (small - cell * 0.92)
            _paste(canvas, patches[i], *(apart[i] + done * (beside[i] - apart[i])), size, size)
        rows_of(canvas, numbers[0], arrived)
        yield canvas, texts
    for _ in range(8):
        yield canvas, texts
    # 4: blocks
    texts = words(4, "the tokens look at each other", "attention gathers, block by block, what each token is made of")
    for block in range(L + 1):
        crossing = [1.0] if block == 0 else np.linspace(0.25, 1, 4)
        for t in [*crossing, *[1.0] * 5]:
            before, t = max(block - 1, 0), float(_smooth(t))
            canvas = blank()
            mixed = numbers[before] + t * (numbers[block].astype(float) - numbers[before])
            rows_of(canvas, (np.rint(mixed / 15) * 15).clip(0, 255).astype(np.uint8) if t < 1 else numbers[block])
            strip(canvas)
            gaze, map_ = (m[before] + t * (m[block] - m[before]) for m in (journey.gaze, journey.maps))
            lights(canvas, gaze, map_, block > 0)
            progress(canvas, before + t if block else 0)
            yield canvas, texts + under(block)
    # 5: the class
    mean = f"{order} makes a number for each class" if c.pooling != "cls" else "its numbers make one for each class"
    texts = words(5, f"{order} tells the class", mean)
    top = TOP + SIDE + 62
    for t in [*np.linspace(0, 1, 12), *[1.0] * 30]:
        canvas = blank()
        squeeze = float(_smooth(2 * t))
        if c.pooling == "cls":
            light = (255 - (1 - 0.75 * squeeze) * (255.0 - numbers[L])).astype(np.uint8)
            light[0] = numbers[L][0]
        else:
            mean_row = _numbers(np.repeat(journey.tokens[L][first:].mean(axis=0)[None], N, axis=0))
            light = np.rint(numbers[L] + squeeze * (mean_row.astype(float) - numbers[L]))
            light = (np.rint(light / 15) * 15).clip(0, 255).astype(np.uint8) if squeeze < 1 else mean_row
        rows_of(canvas, light)
        strip(canvas)
        lights(canvas, journey.gaze[L], journey.maps[L], True)
        progress(canvas, L)
        shown_texts = texts + under(L)
        grown = float(_smooth(2 * t - 1))
        for i, (name, p, color) in enumerate(bars):
            y = top + 16 * i
            value = tuple(int(color[k : k + 2], 16) for k in (1, 3, 5))
            _paste(canvas, np.array([[value]], np.uint8), RIGHT + 84, y - 10, 84 * p * grown, 11)
            if grown > 0:
                weight = "bold" if i == 0 else "normal"
                look = {"fontsize": 9.5, "color": INK, "weight": weight}
                shown_texts.append((RIGHT, y, name, look))
                shown_texts.append((RIGHT + 88 + 84 * p * grown, y, f"{p * grown:.0%}", look))
        yield canvas, shown_texts


def save_moving(path, journey, *, progress=False):
    """The journey as an animated GIF of 800 x 450 pixels that begins again at its end.

    Raises  InputError: the file's name does not end in .gif.
    """
    from matplotlib.animation import PillowWriter

    if Path(path).suffix.lower() != ".gif":
        raise InputError(f"{path} must end in .gif")

    class Writer(PillowWriter):
        """One palette for all frames, so that no colour flickers, and one write at the end."""

        def finish(self):
            from PIL import Image

            frames = [frame.convert("RGB") for frame in self._frames]
            every = frames[:: max(1, len(frames) // 12)] + frames[-1:]
            sample = Image.fromarray(np.concatenate([np.asarray(frame) for frame in every]))
            palette = sample.quantize(COLORS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
            colors = np.array(palette.getpalette()).reshape(-1, 3)
            colors[colors.min(axis=1) >= 248] = 255  # paper stays white
            palette.putpalette(colors.ravel().tolist())
            frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
            file = io.BytesIO()
            frames[0].save(file, format="GIF", save_all=True, append_images=frames[1:],
                           duration=round(1000 / self.fps), loop=0, optimize=False)  # fmt: skip
            write_atomically(path, lambda out: out.write(file.getvalue()))

    figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    shown = axes.imshow(np.zeros((HEIGHT, WIDTH, 3), np.uint8), extent=(0, WIDTH, HEIGHT, 0), interpolation="nearest")
    written = []
    writer = Writer(fps=FPS)
    with any_text(), writer.saving(figure, str(path), 100):
        for canvas, texts in tqdm(frames_of(journey), "frames", delay=1, disable=None if progress else True):
            for text in written:
                text.remove()
            shown.set_data(canvas)
            written = [axes.text(x, y, words, **look) for x, y, words, look in texts]
            writer.grab_frame()
