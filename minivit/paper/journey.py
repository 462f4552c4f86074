"""How one image becomes a class: patches, tokens, attention block by block, probabilities; `minivit.paper.film` moves.

What is shown is the model at work on that image, nothing is invented for the show:

    tokens    each row is a token, each column one of its D numbers (of very wide tokens, evenly chosen ones): the
              embedded patches, then the output of each block, red for positive and blue for negative, in units of all
              its numbers' standard deviation
    light     the attention rollout (`minivit.paper.analyses`) after each block: on the left of one patch's token, on
              the right of what is classified, the class token or the mean of the patches; dark is the least of the
              image. A token's share in itself, by far the largest, is shown no brighter than the next.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from minivit.base.backend import array_module, to_host
from minivit.evaluation.inference import attention_map
from minivit.figures.attention import spotlight
from minivit.figures.canvas import (
    BAD,
    GOOD,
    TRAIN,
    colormaps,
    label,
    new_figure,
    own_style,
    pixels_of,
    save,
    show,
    style,
)
from minivit.layers.softmax import softmax_forward
from minivit.model import intermediates
from minivit.paper.analyses import attention_rollout, square_maps


class Journey(NamedTuple):
    """One image and what the model makes of it."""

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
    """Follow one image through a model.

    Shapes  image (H, W, C) uint8
    The patch whose token is followed is the one that counts most for the class.
    Raises  InputError: the model's attention is not of all tokens.
    """
    c, xp = model.config, array_module(model.flat)
    steps = intermediates(model, xp.asarray(image[None]))
    rollouts = attention_rollout([to_host(a) for a in square_maps(steps.attention, c)])
    rollouts = [np.eye(c.num_tokens)] + [r[0].astype(np.float64) for r in rollouts]
    maps = np.array([attention_map(r[None], c.pooling, c.registers) for r in rollouts])
    first = c.num_tokens - c.grid_size**2
    patch = int(maps[-1].argmax())
    gaze = np.array([r[first + patch, first:].reshape(c.grid_size, c.grid_size) for r in rollouts])
    tokens = np.array([to_host(z)[0] for z in steps.features], np.float64)
    probabilities = softmax_forward(np.asarray(to_host(steps.logits), np.float64))[0][0]
    return Journey(image, c, tokens, gaze, maps, divmod(patch, c.grid_size), probabilities, tuple(class_names), truth)


def token_colors(z, columns=128):
    """Tokens as colours, a pixel for a number: (N, D) -> (N, at most ``columns``, 3) uint8."""
    entries = np.linspace(0, z.shape[1] - 1, min(columns, z.shape[1])).round().astype(int)
    z = z[:, entries] / max(float(z.std()), 1e-30)
    level = np.rint(4 * np.clip(z / 2, -1, 1)) / 4  # nine shades: a film of few colours is a small file
    return np.rint(255 * colormaps["RdBu_r"](0.5 + 0.45 * level)[..., :3]).astype(np.uint8)


def top_classes(journey, count=5):
    """Rows of the chart of probabilities: (name, probability, colour)."""
    order = np.argsort(-journey.probabilities, kind="stable")[:count]
    first = BAD if journey.truth is not None and journey.truth != order[0] else GOOD
    return [(label(journey.names[k], 14), float(journey.probabilities[k]), TRAIN if i else first)
            for i, k in enumerate(order)]  # fmt: skip


def as_colors(image):
    """An image as (H, W, 3) uint8; of one channel as light on dark, as `spotlight` has it."""
    return spotlight(image, np.zeros((1, 1)), low=1.0) if pixels_of(image).ndim == 2 else pixels_of(image)


def reader(config):
    """What is classified, in words."""
    return "the class token" if config.class_tokens else "the mean of all tokens"


# ---- still -----------------------------------------------------------------------------------------------------------


@own_style
def save_still(path, journey):
    """The journey in one figure: image, patches, tokens, the light of each block, probabilities."""
    c, g, P = journey.config, journey.config.grid_size, journey.config.image_size // journey.config.grid_size
    L = c.depth
    blocks = sorted(set(np.linspace(1, L, min(L, 6)).round().astype(int)))
    half = -(-len(blocks) // 2)
    figure = new_figure(13.0, 3.5)
    # the fourth is wide enough for its heading, however few the blocks
    parts = figure.subfigures(1, 5, width_ratios=[1, 1.08, 1.15, max(0.56 * half + 0.1, 1.35), 1.15])
    original, cut, tokens, bars = (part.subplots() for part in (*parts[:3], parts[4]))
    pixels = as_colors(journey.image)
    show(original, pixels)
    original.set_title(f"1  an image of {c.image_size} × {c.image_size}", fontsize=10, loc="left")
    gap = max(1, P // 4)
    sheet = np.full((g * (P + gap) - gap, g * (P + gap) - gap, 3), 255, np.uint8)
    for r, col in np.ndindex(g, g):
        sheet[r * (P + gap) :, col * (P + gap) :][:P, :P] = pixels[r * P : (r + 1) * P, col * P : (col + 1) * P]
    show(cut, sheet)
    cut.spines[:].set_visible(False)
    cut.set_title(f"2  {g * g} patches of {P} × {P}", fontsize=10, loc="left")
    N, D = journey.tokens[-1].shape
    tokens.imshow(token_colors(journey.tokens[-1]), aspect="auto", interpolation="nearest")
    tokens.set_xticks([])
    tokens.set_yticks([])
    tokens.set_title(f"3  {N} tokens of {D} numbers", fontsize=10, loc="left")
    tokens.set_xlabel(f"after block {L}", fontsize=9)
    grid = parts[3].subplots(2, half, squeeze=False)
    for axes in grid.flat[len(blocks) :]:
        axes.set_axis_off()
    for axes, block in zip(grid.flat, blocks, strict=False):
        show(axes, spotlight(journey.image, journey.maps[block]))
        axes.set_title(f"block {block}", fontsize=8, pad=3)
    parts[3].suptitle(f"4  what {reader(c)} is made of", fontsize=10, x=0.02, ha="left")
    rows = top_classes(journey)
    bars.barh(range(len(rows)), [100 * p for _, p, _ in rows], color=[color for *_, color in rows], height=0.7)
    for row, (_, p, _) in enumerate(rows):
        bars.text(100 * p + 2, row, f"{p:.0%}", va="center", fontsize=9)
    bars.set_yticks(range(len(rows)), [name for name, *_ in rows])
    bars.invert_yaxis()
    bars.set_xlim(0, 122)
    bars.set_xticks([0, 50, 100])
    style(bars, "probability, %", "", "")
    bars.set_title("5  a class", fontsize=10, loc="left")
    bars.grid(axis="y", visible=False)
    save(figure, path)
