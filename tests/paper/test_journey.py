"""The journey of one image: what is shown is what the model does, and the files are whole."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageSequence

from minivit.base.errors import InputError
from minivit.figures.attention import spotlight
from minivit.layers.patch_embed import patchify
from minivit.layers.softmax import softmax_forward
from minivit.model import ViT, ViTConfig, intermediates
from minivit.paper import film, journey

CONFIG = ViTConfig(image_size=6, patch_size=2, channels=3, num_classes=5, width=8, depth=2, num_heads=2, mlp_dim=12)
NAMES = ("cat", "a $x_1$ ^ b$", "猫" * 30, "dog", "x")
VARIANTS = [
    {}, {"pooling": "mean"}, {"registers": 2}, {"channels": 1, "pooling": "seq"}, {"patch_size": 6}, {"depth": 7},
]  # fmt: skip


def journey_of(truth=None, **changes):
    model = ViT(replace(CONFIG, **changes))
    model.flat += 0.3 * np.random.default_rng(0).standard_normal(model.flat.size, dtype=np.float32)
    image = np.random.default_rng(1).integers(0, 256, (6, 6, model.config.channels), dtype=np.uint8)
    return model, image, journey.journey_of(model, image, NAMES, truth=truth)


@pytest.mark.parametrize("changes", VARIANTS)
def test_what_is_shown_is_what_the_model_does(changes):
    model, image, found = journey_of(**changes)
    g, L = model.config.grid_size, model.config.depth
    seen = intermediates(model, image[None])
    np.testing.assert_allclose(found.probabilities, softmax_forward(seen.logits)[0][0], rtol=1e-5)
    np.testing.assert_array_equal(found.tokens, np.array(seen.features)[:, 0])
    assert found.maps.shape == found.gaze.shape == (L + 1, g, g)
    assert found.patch == np.unravel_index(found.maps[L].argmax(), (g, g))
    expected = np.zeros((g, g))
    expected[found.patch] = 1  # before the blocks a token is made of itself
    np.testing.assert_array_equal(found.gaze[0], expected)
    first = model.config.num_tokens - g * g
    start = np.zeros((g, g)) if model.config.pooling == "cls" else np.full((g, g), 1 / g**2)
    np.testing.assert_allclose(found.maps[0], start)
    mean = seen.attention[0][0].mean(axis=0)
    row = mean[first + found.patch[0] * g + found.patch[1], first:].reshape(g, g)
    np.testing.assert_allclose(found.gaze[1], (row + expected) / 2, rtol=1e-4)


@pytest.mark.parametrize("changes", VARIANTS[:5])
def test_frames(changes):
    _, image, found = journey_of(**changes)
    g, c = found.config.grid_size, found.config
    frames = list(film.frames_of(found))
    assert all(canvas.shape == (450, 800, 3) and canvas.dtype == np.uint8 for canvas, _ in frames)
    at = slice(film.TOP, film.TOP + film.SIDE), slice(film.LEFT, film.LEFT + film.SIDE)
    shown = frames[0][0][at]
    middles = np.round((np.arange(6) + 0.5) * film.SIDE / 6).astype(int)
    if c.channels == 3:
        np.testing.assert_array_equal(shown[middles][:, middles], image)  # the image, before anything happens to it
    said = [{words for _, _, words, _ in texts} for _, texts in frames]
    assert [f"block {b} of {c.depth}" in set().union(*said) for b in range(1, c.depth + 2)] == [True] * c.depth + [
        False
    ]
    assert f"is cut into {g * g} patches" in said[20]
    assert journey.label(NAMES[int(found.probabilities.argmax())], 14) in said[-1]
    assert f"{found.probabilities.max():.0%}" in said[-1]
    # when all have arrived, the patches stand beside their tokens, from top to bottom
    canvas = next(canvas for (canvas, _), words in zip(frames, said, strict=True) if f"block 1 of {c.depth}" in words)
    row = film.TOKENS[1] / c.num_tokens
    if c.channels == 3 and g > 1:
        size = min(row, 14.0)
        for i, patch in enumerate(patchify(image[None], c.patch_size)[0].reshape(g * g, c.patch_size, c.patch_size, 3)):
            y = film.TOP + (c.num_tokens - g * g + i + 0.5) * row
            x = film.MIDDLE - 6 - size
            np.testing.assert_array_equal(canvas[round(y - size / 4), round(x + size / 4)], patch[0, 0])


def test_light_falls_where_the_map_is_large():
    image = np.full((4, 4, 3), 200, np.uint8)
    shown = spotlight(image, np.array([[0.1, 0.2], [0.3, 0.1]]))
    assert (shown[2:, :2] == 200).all() and (shown[:2, :2] == 24).all() and (shown[:2, 2:] == 112).all()
    assert (spotlight(image, np.ones((2, 2))) == 24).all()  # none stands out


def test_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(film, "frames_of", lambda found, real=film.frames_of: list(real(found))[::9])
    figures, real = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), real(self, *a, **k))[1])
    _, _, found = journey_of(truth=3)
    film.save_film(tmp_path / "j.gif", found)
    figures.clear()
    journey.save_still(tmp_path / "j.png", found)
    with Image.open(tmp_path / "j.gif") as moving:
        assert moving.size == (800, 450) and moving.info["loop"] == 0 and moving.n_frames > 5
        durations = [frame.info["duration"] for frame in ImageSequence.Iterator(moving)]
        assert sum(durations) == 80 * len(film.frames_of(found))
        assert all(
            frame.convert("RGB").getpixel((790, 440)) == (255, 255, 255) for frame in ImageSequence.Iterator(moving)
        )
    texts = {text.get_text() for text in figures[0].findobj(lambda artist: hasattr(artist, "get_text"))}
    assert {
        "1  an image of 6 × 6",
        "2  9 patches of 2 × 2",
        "3  10 tokens of 8 numbers",
        "block 1",
        "block 2",
    } <= texts
    assert "4  what the class token is made of" in texts and f"{found.probabilities.max():.0%}" in texts
    assert sorted(p.name for p in tmp_path.iterdir()) == ["j.gif", "j.png"]
    with pytest.raises(InputError, match="must end in .gif"):
        film.save_film(tmp_path / "j.png", found)


@pytest.mark.parametrize(
    ("changes", "end"), [*((changes, "png") for changes in VARIANTS[2:]), ({}, "pdf"), ({}, "svg")]
)
def test_the_still_figure_of_any_model(tmp_path, changes, end):
    path = tmp_path / f"j.{end}"
    journey.save_still(path, journey_of(**changes)[2])
    assert path.read_bytes()[:5] == {"png": b"\x89PNG\r", "pdf": b"%PDF-", "svg": b"<?xml"}[end]


@pytest.mark.parametrize("changes", [{}, {"pooling": "mean"}, {"depth": 4, "pooling": "mean"}])
def test_headings_do_not_touch(monkeypatch, changes):
    figures = []
    monkeypatch.setattr(journey, "save", lambda figure, path: figures.append(figure))
    monkeypatch.setitem(globals(), "NAMES", tuple("01234"))  # long ones would push the last panel away
    journey.save_still("j.png", journey_of(**changes)[2])
    canvas = FigureCanvasAgg(figures[0])
    canvas.draw()
    headings = figures[0].findobj(lambda each: hasattr(each, "get_text") and each.get_text()[1:3] == "  ")
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in sorted(headings, key=lambda h: h.get_text())]
    assert len(boxes) == 5 and all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:], strict=False))


def test_the_script(call, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(film, "save_film", lambda path, found, progress: path.write_bytes(b"GIF"))
    ended = call("visualize", "journey", trained / "last.npz", "--image", 7, "--out", tmp_path / "new")
    assert ended.status == 0, ended.err
    assert "test image 7 of " in ended.out and sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "journey.gif", "journey.png"
    ]  # fmt: skip
    for wrong in (["--image", 360], ["--picture", -1], ["--data-dir", tmp_path, "--weights", "no"]):
        ended = call("visualize", "journey", trained / "last.npz", *wrong, "--out", tmp_path / "bad")
        assert ended.status == 2 and ended.err.startswith("error: ") and ended.err.count("\n") == 1
        assert not (tmp_path / "bad").exists()
    ended = call("visualize", "journey", tmp_path / "none.npz")
    assert ended.status == 2 and ended.err.startswith("error: there is no checkpoint")
