"""The journey of one image as a film: patches fly to their tokens, tokens look at each other, a class is told."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minivit.base.errors import InputError
from minivit.base.files import write_atomically
from minivit.figures.attention import spotlight
from minivit.figures.canvas import INK, OURS, Figure, FigureCanvasAgg, any_text, own_style
from minivit.layers.patch_embed import patchify
from minivit.paper.journey import as_colors, reader, token_colors, top_classes

WIDTH, HEIGHT, FPS = 800, 450, 12.5
COLORS = 128  # of the whole film
SIDE = 208  # pixels of an image on the canvas
LEFT, TOP, MIDDLE, RIGHT = 24, 96, 292, 568  # where the images and the tokens stand
TOKENS = (256, 320)  # pixels of all tokens' numbers: width, height
SOFT = "#64748b"
FLIGHT = 0.35  # share of the third scene that one patch flies


def _paste(canvas, image, x, y, width, height):
    """Draw an image onto the canvas, pixels enlarged or left out, clipped at its edges."""
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
    """The film's frames, one after the other: (canvas (HEIGHT, WIDTH, 3) uint8, texts).

    ``texts``: a list of (x, y, words, settings of matplotlib's text)
    """
    film = _Film(journey)
    for scene in (film.image, film.patches, film.tokens, film.blocks, film.classes):
        yield from scene()


def _rgb(color):
    return np.array([[[int(color[k : k + 2], 16) for k in (1, 3, 5)]]], np.uint8)


def _coarse(colors):
    """Colours between two frames in steps of 15: few colours make a small file."""
    return (np.rint(colors / 15) * 15).clip(0, 255).astype(np.uint8)


class _Film:
    """What all scenes draw with: the journey, the patches and their places, the tokens in colours."""

    def __init__(self, journey):
        self.journey, self.config = journey, journey.config
        c, g = self.config, self.config.grid_size
        self.L, self.N, self.first = c.depth, c.num_tokens, c.num_tokens - g * g
        self.pixels, P = as_colors(journey.image), c.image_size // g
        self.patch_pixels = patchify(self.pixels[None], P).reshape(g * g, P, P, 3)
        self.cell, row = SIDE / g, TOKENS[1] / self.N
        self.small = min(row, 14.0)  # a patch beside its token
        self.index = np.arange(g * g)
        # places (g*g, 2), x and y, of the patches: in the image, apart, beside their tokens
        self.home = np.stack([LEFT + self.index % g * self.cell, TOP + self.index // g * self.cell], axis=1)
        self.apart = np.array([LEFT, TOP]) - 8 + (self.home - [LEFT, TOP]) * (0.92 + 26 / SIDE)
        y = TOP + (self.first + self.index + 0.5) * row - self.small / 2
        self.beside = np.stack([np.full(g * g, MIDDLE - 6 - self.small), y], axis=1)
        self.colors = [token_colors(z) for z in journey.tokens]
        self.reader = reader(c)

    # ---- parts of a frame

    def blank(self):
        return np.full((HEIGHT, WIDTH, 3), 255, np.uint8)

    def heading(self, stage, title, below):
        return [
            (LEFT, 30, f"{stage}", {"fontsize": 17, "weight": "bold", "color": OURS}),
            (LEFT + 24, 30, title, {"fontsize": 15, "weight": "bold", "color": INK}),
            (LEFT + 24, 55, below, {"fontsize": 10.5, "color": SOFT}),
        ]

    def captions(self, block):
        """What stands under the two lights."""
        return [
            (LEFT, TOP + SIDE + 18, "the framed patch's token is made of", {"fontsize": 9.5, "color": SOFT}),
            (RIGHT, TOP + SIDE + 18, f"{self.reader} is made of", {"fontsize": 9.5, "color": SOFT}),
            (LEFT, TOP + SIDE + 52, f"block {block} of {self.L}" if block else "before the blocks",
             {"fontsize": 12, "weight": "bold", "color": OURS}),
        ]  # fmt: skip

    def draw_patches(self, canvas, places, size):
        for i in self.index:
            _paste(canvas, self.patch_pixels[i], *places[i], size, size)

    def draw_tokens(self, canvas, colors, arrived=None):
        """The tokens' numbers; ``arrived`` (N,) bools says which are there yet, None all."""
        big = colors if arrived is None else np.where(arrived[:, None, None], colors, 255).astype(np.uint8)
        _paste(canvas, big, MIDDLE, TOP, *TOKENS)

    def draw_lights(self, canvas, gaze, map_, after_blocks):
        """The image twice, in the light of one patch's token and of what is classified."""
        r, col = self.journey.patch
        g = self.config.grid_size
        if after_blocks and g > 1:  # what a token began as would outshine where it looked
            gaze = gaze.copy()
            gaze[r, col] = np.delete(gaze, r * g + col).max()
        _paste(canvas, spotlight(self.journey.image, gaze), LEFT, TOP, SIDE, SIDE)
        _frame(canvas, LEFT + col * self.cell, TOP + r * self.cell, self.cell, self.cell, (194, 65, 12))
        _paste(canvas, spotlight(self.journey.image, map_), RIGHT, TOP, SIDE, SIDE)

    def draw_progress(self, canvas, blocks):
        """A bar for each block, filled as far as it is passed; ``blocks`` is how many are."""
        wide = min(30.0, (SIDE - 4 * (self.L - 1)) / self.L)
        for block in range(self.L):
            x, y = LEFT + block * (wide + 4), TOP + SIDE + 66
            _paste(canvas, _rgb("#e2e8f0"), x, y, wide, 14)
            _paste(canvas, _rgb(OURS), x, y, wide * float(np.clip(blocks - block, 0, 1)), 14)

    def draw_bars(self, canvas, share):
        """The probabilities, grown to a ``share`` of their length; returns their texts."""
        texts, top = [], TOP + SIDE + 62
        for i, (name, p, color) in enumerate(top_classes(self.journey)):
            y = top + 16 * i
            _paste(canvas, _rgb(color), RIGHT + 84, y - 10, 84 * p * share, 11)
            if share > 0:
                look = {"fontsize": 9.5, "color": INK, "weight": "bold" if i == 0 else "normal"}
                texts.append((RIGHT, y, name, look))
                texts.append((RIGHT + 88 + 84 * p * share, y, f"{p * share:.0%}", look))
        return texts

    # ---- scenes

    def image(self):
        c = self.config
        texts = self.heading(1, "An image", f"{c.image_size} × {c.image_size} pixels")
        canvas = self.blank()
        _paste(canvas, self.pixels, LEFT, TOP, SIDE, SIDE)
        for _ in range(14):
            yield canvas, texts

    def patches(self):
        g = self.config.grid_size
        P = self.config.image_size // g
        texts = self.heading(2, f"is cut into {g * g} patches", f"of {P} × {P} pixels")
        for t in [*np.linspace(0.1, 1, 9), *[1] * 8]:
            canvas, places = self.blank(), self.home + _smooth(t) * (self.apart - self.home)
            self.draw_patches(canvas, places, self.cell * (1 - 0.08 * _smooth(t)))
            yield canvas, texts

    def tokens(self):
        text = f"{self.journey.tokens.shape[2]} numbers each: a matrix times the patch"
        text += ", plus what tells its place" if self.config.pos_embed != "none" else ""
        texts, last = self.heading(3, "each becomes a token", text), max(len(self.index) - 1, 1)
        for t in np.linspace(0, 1, 26):
            canvas, arrived = self.blank(), np.zeros(self.N, bool)
            arrived[: self.first] = t > 0.5 * FLIGHT
            for i in self.index:
                way = _smooth((t - (1 - FLIGHT) * i / last) / FLIGHT)
                arrived[self.first + i] = way >= 1
                size = self.cell * 0.92 + way * (self.small - self.cell * 0.92)
                place = self.apart[i] + way * (self.beside[i] - self.apart[i])
                _paste(canvas, self.patch_pixels[i], *place, size, size)
            self.draw_tokens(canvas, self.colors[0], arrived)
            yield canvas, texts
        for _ in range(8):
            yield canvas, texts

    def blocks(self):
        below = "attention gathers, block by block, what each token is made of"
        texts, journey = self.heading(4, "the tokens look at each other", below), self.journey
        for block in range(self.L + 1):
            crossing = [1.0] if block == 0 else np.linspace(0.25, 1, 4)
            for t in [*crossing, *[1.0] * 5]:
                before, t = max(block - 1, 0), float(_smooth(t))
                canvas = self.blank()
                between = self.colors[before] + t * (self.colors[block] - self.colors[before].astype(float))
                self.draw_tokens(canvas, _coarse(between) if t < 1 else self.colors[block])
                self.draw_patches(canvas, self.beside, self.small)
                gaze, map_ = (m[before] + t * (m[block] - m[before]) for m in (journey.gaze, journey.maps))
                self.draw_lights(canvas, gaze, map_, block > 0)
                self.draw_progress(canvas, before + t if block else 0)
                yield canvas, texts + self.captions(block)

    def classes(self):
        cls = self.config.class_tokens
        below = "its numbers make one for each class" if cls else f"{self.reader} makes a number for each class"
        texts, L = self.heading(5, f"{self.reader} tells the class", below), self.L
        for t in [*np.linspace(0, 1, 12), *[1.0] * 30]:
            canvas = self.blank()
            self.draw_tokens(canvas, self.pooled_colors(float(_smooth(2 * t))))
            self.draw_patches(canvas, self.beside, self.small)
            self.draw_lights(canvas, self.journey.gaze[L], self.journey.maps[L], True)
            self.draw_progress(canvas, L)
            bars = self.draw_bars(canvas, float(_smooth(2 * t - 1)))
            yield canvas, texts + self.captions(L) + bars

    def pooled_colors(self, t):
        """The tokens on the way to what the head reads: all but the class token pale, or all become their mean."""
        colors = self.colors[self.L]
        if self.config.class_tokens:
            pale = (255 - (1 - 0.75 * t) * (255.0 - colors)).astype(np.uint8)
            pale[0] = colors[0]
            return pale
        mean = self.journey.tokens[self.L][self.first :].mean(axis=0)
        mean = token_colors(np.repeat(mean[None], self.N, axis=0))
        return _coarse(np.rint(colors + t * (mean - colors.astype(float)))) if t < 1 else mean


@own_style
def save_film(path, journey, *, progress=False):
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
    screen = axes.imshow(np.zeros((HEIGHT, WIDTH, 3), np.uint8), extent=(0, WIDTH, HEIGHT, 0), interpolation="nearest")
    artists = []
    writer = Writer(fps=FPS)
    with any_text(), writer.saving(figure, str(path), 100):
        for canvas, texts in tqdm(frames_of(journey), "frames", delay=1, disable=None if progress else True):
            for text in artists:
                text.remove()
            screen.set_data(canvas)
            artists = [axes.text(x, y, words, **look) for x, y, words, look in texts]
            writer.grab_frame()
