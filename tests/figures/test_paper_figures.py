"""The paper's figures: what they show is what was measured; whole files of each kind."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from minivit import figures
from minivit.figures import canvas
from minivit.figures.attention import spotlight
from minivit.paper.analyses import Filters, patch_distances

NAMES = ["a $x_1$ ^ b$", "$\\frac{", "猫", "a" * 300, "two\nlines", ""]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, to look into."""
    saved, real = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (saved.append(self), real(self, *a, **k))[1])
    return saved


def whole(path):
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG" and min(image.size) >= 150


@pytest.mark.parametrize(("n", "channels"), [(9, 3), (3, 1), (7, 4)])
def test_filters(tmp_path, drawn, n, channels):
    images = np.random.default_rng(0).standard_normal((n, 2, 2, channels))
    figures.save_filters(tmp_path / "f.png", Filters(images, np.linspace(0.5, 0.01, n)), title=NAMES[0])
    whole(tmp_path / "f.png")
    shown = [axes.images[0].get_array() for axes in drawn[0].axes if axes.images]
    assert len(shown) == n and drawn[0].axes[0].get_title() == "50 %"
    expected = np.rint(255 * (0.5 + 0.5 * images[0] / np.abs(images[0]).max()))
    expected = expected[..., 0] if channels == 1 else expected[..., :3]
    np.testing.assert_array_equal(shown[0], expected)  # zero is grey


@pytest.mark.parametrize(("g", "chosen"), [(1, [0]), (3, [0, 1, 2]), (20, list(range(0, 20, 2)))])
def test_positions(tmp_path, drawn, g, chosen):
    similarity = np.random.default_rng(0).uniform(-1, 1, (g, g, g, g))
    figures.save_positions(tmp_path / "p.png", similarity, kind="learned", title=NAMES[1])
    whole(tmp_path / "p.png")
    axes, bar = drawn[0].axes
    assert bar.get_ylabel() == "cosine similarity of learned positions"
    sheet, step = axes.images[0].get_array(), g + max(1, g // 8)
    for i, r in enumerate(chosen):
        for j, c in enumerate(chosen):
            np.testing.assert_array_equal(sheet[i * step :, j * step :][:g, :g], similarity[r, c])
    assert [t.get_text() for t in axes.get_yticklabels()] == [str(r + 1) for r in chosen]


def test_distances(tmp_path, drawn):
    distances = np.array([[3.0, 1.0, 2.0], [5.0, 4.0, 9.0]])
    figures.save_distances(tmp_path / "d.png", distances, uniform=patch_distances(4, 2).mean(), images=128)
    whole(tmp_path / "d.png")
    (axes,) = drawn[0].axes
    *heads, mean, uniform = axes.lines
    assert np.sort([line.get_ydata() for line in heads], axis=0).T.tolist() == [[1, 2, 3], [4, 5, 9]]
    assert mean.get_ydata().tolist() == [2, 6] and mean.get_xdata().tolist() == [1, 2]
    assert uniform.get_ydata()[0] == pytest.approx(patch_distances(4, 2).mean())
    assert "128 images" in axes.get_ylabel() and axes.get_ylim()[1] > 9


@pytest.mark.parametrize("channels", [1, 3])
def test_rollouts(tmp_path, drawn, channels):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 8, 8, channels), dtype=np.uint8)
    maps = rng.uniform(0.1, 1, (4, 2, 2))
    maps[1] = [[1, 1], [1, 4]]
    titles = [(name, i != 2) for i, name in enumerate(NAMES[:4])]
    figures.save_rollouts(tmp_path / "r.png", images, maps, titles, title="t", columns=3)
    whole(tmp_path / "r.png")
    panels = drawn[0].axes
    assert panels[4].get_title("right") == "×4.0"
    np.testing.assert_array_equal(panels[4].images[0].get_array(), spotlight(images[1], maps[1]))
    assert panels[3].get_title("left") == canvas.label(NAMES[1], 18)
    colors = [panels[3 * i].title.axes._left_title.get_color() for i in range(4)]
    assert colors[0] == colors[1] == colors[3] != colors[2]
    assert not panels[12].axison  # no fifth image


@pytest.mark.parametrize("end", ["png", "pdf", "svg"])
def test_cost(tmp_path, drawn, end):
    def point(model, size, task, rate, memory):
        return {"model": model, "size": size, "tokens": 5, "task": task, "batch": 8, "images_per_second": rate,
                "peak_memory": memory}  # fmt: skip

    points = [point("Ti", 32, "infer", 100, 2**20), point("Ti", 32, "step", 40, 3 * 2**20),
              point("Ti", 64, "infer", 20, None), point(NAMES[0], 64, "infer", 10, 2**21)]  # fmt: skip
    path = tmp_path / f"c.{end}"
    figures.save_cost(path, points, title="t")
    assert path.read_bytes()[:4] == {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xm"}[end]
    speed, training, memory = drawn[0].axes
    assert [line.get_xydata().tolist() for line in speed.lines] == [[[32, 100], [64, 20]], [[64, 10]]]
    assert training.lines[0].get_xydata().tolist() == [[32, 40]]
    assert sorted(line.get_xydata().tolist() for line in memory.lines if len(line.get_xdata())) == [
        [[32, 1]], [[32, 3]], [[64, 2]],
    ]  # fmt: skip


def test_compute(tmp_path, drawn):
    made = (("ViT", 8, 0.5, 4), ("ViT", 4, 0.25, 1), (NAMES[0], 8, 0.75, 5))
    points = [{"kind": k, "width": w, "accuracy": p, "training_flops": n * 1e12} for k, w, p, n in made]
    figures.save_compute(tmp_path / "c.png", points, title=NAMES[1])
    whole(tmp_path / "c.png")
    (axes,) = drawn[0].axes
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[1, 25], [4, 50]], [[5, 75]]]
    assert [text.get_text() for text in axes.texts] == ["4", "8", "8"]


def test_axial(tmp_path, drawn):
    def point(attention, blocks, patch, accuracy, flops, rate):
        return {"attention": attention, "blocks": blocks, "patch": patch, "accuracy": accuracy,
                "training_flops": flops * 1e12, "images_per_second": rate, "batch": 8}  # fmt: skip

    points = [point("full", 4, 8, 0.25, 1, 900), point("full", 4, 4, 0.5, 5, 200), point("axial", 8, 4, 0.75, 9, 100)]
    figures.save_axial(tmp_path / "a.png", points, title=NAMES[1])
    whole(tmp_path / "a.png")
    compute, speed = drawn[0].axes
    assert [line.get_xydata().tolist() for line in compute.lines] == [[[1, 25], [5, 50]], [[9, 75]]]
    assert [line.get_xydata().tolist() for line in speed.lines] == [[[900, 25], [200, 50]], [[100, 75]]]
    assert [text.get_text() for text in drawn[0].legends[0].texts] == ["full, 4 blocks", "axial, 8 blocks"]
    assert [text.get_text() for text in speed.texts] == ["/8", "/4", "/4"]
