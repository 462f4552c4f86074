"""Figures: whole PNG files from any names and any sizes, without a warning; what they show is what was given."""

import io
import os
import re
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import ROOT
from matplotlib.figure import Figure
from PIL import Image

from minivit import figures
from minivit.evaluation.metrics import Calibration
from minivit.figures import canvas, curves
from minivit.laboratory.checks import v_curves
from minivit.training.config import TrainConfig
from minivit.training.lr_finder import Ramp, rising_rates

NAMES = ["a $x_1$ ^ b$", "$\\frac{", "猫", "a" * 300, "two\nlines", "", "_x", "\\ \udcff"]


def records(tests, steps_per_epoch=5):
    train = [
        {"kind": "train", "step": s, "epoch": -(-s // steps_per_epoch), "loss": 1 / s, "lr": 0.1 / s}
        for s in range(1, steps_per_epoch * max(tests, 1) + 1)
    ]
    numbers = {"loss": 0.5, "accuracy": 0.75, "train_loss": 0.25, "train_accuracy": 0.875}
    return train + [{"kind": "test", "step": steps_per_epoch * e, "epoch": e, **numbers} for e in range(1, tests + 1)]


def whole(path, minimum=300):
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG" and min(image.size) >= minimum
        return np.asarray(image.convert("RGB"))


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, to look into."""
    saved, real = [], Figure.savefig

    def savefig(self, *arguments, **keywords):
        saved.append(self)
        return real(self, *arguments, **keywords)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved


@pytest.mark.parametrize("tests", [0, 1, 4])
def test_curves(tmp_path, drawn, tests):
    figures.save_curves(tmp_path / "c.png", records(tests), title="digits")
    whole(tmp_path / "c.png")
    loss, accuracy, lr = drawn[0].axes
    np.testing.assert_allclose(loss.lines[0].get_ydata(), 1 / np.arange(1, 5 * max(tests, 1) + 1))
    assert loss.lines[2].get_ydata().tolist() == [0.5] * tests
    if tests:  # the steps' axis is that of the epochs
        assert loss.lines[0].get_xdata()[-1] == tests == loss.lines[2].get_xdata()[-1]
        assert accuracy.lines[1].get_ydata().tolist() == [75.0] * tests
        assert "75.00%" in accuracy.get_title("left")
    assert lr.lines[0].get_ydata()[0] == 0.1


@pytest.mark.parametrize(("settings", "label"), [
    ({}, "training"),
    ({"flip": True}, "training (augmented)"),
    ({"label_smoothing": 0.1}, "training (smoothed targets)"),
    ({"policy": "rand", "cutmix": 1.0, "label_smoothing": 0.1}, "training (augmented, mixed, smoothed targets)"),
])  # fmt: skip
def test_the_legend_says_what_the_training_loss_is_of(tmp_path, drawn, settings, label):
    training = figures.training_label(TrainConfig(**settings))
    figures.save_curves(tmp_path / "c.png", records(2), training=training)
    assert [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()] == [
        "a training batch", label, "test"
    ]  # fmt: skip


def test_curves_of_nothing(tmp_path):
    figures.save_curves(tmp_path / "c.png", [])
    whole(tmp_path / "c.png")


def test_predictions(tmp_path, drawn):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)
    logits = np.eye(8, dtype=np.float32)[[0, 1, 2, 3, 4]] * 9
    figures.save_predictions(tmp_path / "p.png", images, np.array([0, 1, 2, 3, 5]), logits, NAMES)
    whole(tmp_path / "p.png", 240)
    texts = [axes.get_title() for axes in drawn[0].axes]
    assert texts[2] == "猫 100%" and "truly _" not in texts[2] and "\ntruly " in texts[4]
    assert drawn[0].get_suptitle() == "5 of the test images: 4 right, 1 wrong"
    shown = drawn[0].axes[1].images[0]
    np.testing.assert_array_equal(shown.get_array(), images[1, ..., 0])
    assert shown.get_clim() == (0, 255)  # a dark image stays dark


@pytest.mark.parametrize("K", [1, 2, 8, 10, 31, 100])
def test_confusion(tmp_path, drawn, K):
    counts = np.random.default_rng(0).integers(0, 9, (K, K))
    counts[0] = 0  # a class without images
    figures.save_confusion(tmp_path / "c.png", counts, (NAMES * 13)[:K], title="t")
    whole(tmp_path / "c.png")
    axes = drawn[0].axes[0]
    shown = np.asarray(axes.images[0].get_array())
    np.testing.assert_allclose(shown.sum(axis=1), (counts.sum(axis=1) > 0).astype(float), rtol=1e-12)
    if K <= 30:
        texts = {(t.get_position()[1], t.get_position()[0]): t.get_text() for t in axes.texts}
        assert texts == {(r, c): str(counts[r, c]) for r in range(K) for c in range(K) if counts[r, c]}


@pytest.mark.parametrize(("size", "channels", "grid"), [(8, 1, 2), (8, 2, 4), (32, 3, 8), (12, 5, 1)])
def test_attention(tmp_path, drawn, size, channels, grid):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (size, size, channels), dtype=np.uint8)
    attention = rng.random((grid, grid))
    probabilities = np.array([0.05, 0.1, 0.02, 0.5, 0.01, 0.02, 0.3, 0.0])
    figures.save_attention(tmp_path / "a.png", image, attention, probabilities, NAMES, title="x $y")
    whole(tmp_path / "a.png")
    original, overlay, bars, _ = drawn[0].axes
    np.testing.assert_allclose(overlay.images[1].get_array(), 100 * attention / attention.sum())
    assert overlay.images[1].get_extent() == [-0.5, size - 0.5, size - 0.5, -0.5]
    assert [t.get_text() for t in bars.texts] == ["50.0%", "30.0%", "10.0%", "5.0%", "2.0%"]
    assert [t.get_text() for t in bars.get_yticklabels()][:2] == [canvas.label(NAMES[3]), "_x"]
    assert original.get_title("left") == r"x \$y"


def test_attention_of_few_classes_or_none_at_all(tmp_path):
    image = np.zeros((4, 4, 3), np.uint8)
    figures.save_attention(tmp_path / "a.png", image, np.zeros((2, 2)), np.array([1.0]), ["only"])
    whole(tmp_path / "a.png")


def test_a_wrong_prediction_is_red(tmp_path, drawn):
    image, p = np.zeros((4, 4, 1), np.uint8), np.array([0.2, 0.8])
    for truth in (1, 0, None):
        figures.save_attention(tmp_path / "a.png", image, np.ones((2, 2)), p, "ab", truth=truth)
    colors = [figure.axes[2].patches[0].get_facecolor()[:3] for figure in drawn]
    assert colors[0] == colors[2] != colors[1]


def test_eigenvalues_that_have_not_converged_are_hollow(tmp_path, drawn):
    def facts(*eigenvalues, converged):
        return {"eigenvalues": eigenvalues, "residuals": [3.0] * len(eigenvalues), "converged": converged}

    adam = facts(90.0, converged=[False])
    runs = [
        {"epoch": e, "loss": 1.0, "lr": 0.1, "edge": 200.0, "preconditioned": adam, **facts(9.0, 5.0, converged=c)}
        for e, c in ((1, [True, True]), (2, [True, False]))
    ]
    surface = np.linspace(-1, 1, 3), np.ones((3, 3)) + np.eye(3)
    figures.save_curvature(tmp_path / "c.png", runs, edge="edge", slice_=surface, title="digits: 2 epochs of adam")
    whole(tmp_path / "c.png")
    _, sharp, around, _ = drawn[0].axes
    points = [bar for bar in sharp.containers if bar[0].get_markerfacecolor() == "white"]
    ends = [[end.tolist() for end in bar[2][0].get_segments()[0]] for bar in points]
    assert ends == [[[2, 5], [2, 8]], [[1, 90], [1, 93]], [[2, 90], [2, 93]]]
    assert "not converged: + residual" in [text.get_text() for text in sharp.get_legend().get_texts()]
    assert drawn[0].get_suptitle() == "digits: 2 epochs of adam"
    assert around.get_title("left") == "loss surface at the end, epoch 2"


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_curvature_measured_once_can_be_seen(tmp_path, drawn, epochs):
    found = {"eigenvalues": [9.0], "residuals": [0.0], "converged": [True]}
    runs = [{"epoch": 1 + e, "loss": 1.0, "lr": 0.1, "edge": 200.0, **found} for e in range(epochs)]
    figures.save_curvature(tmp_path / "c.png", runs, edge="edge")
    _, sharp = drawn[0].axes
    assert {line.get_marker() for line in sharp.lines} == {"o" if epochs == 1 else "None"}


@pytest.mark.parametrize(
    ("name", "begin"), [("c.png", b"\x89PNG"), ("c.pdf", b"%PDF"), ("c.SVG", b"<?xml"), ("c", b"\x89PNG")]
)
def test_the_kind_of_file_follows_its_name(tmp_path, name, begin):
    files = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        figures.save_confusion(tmp_path / folder / name, np.eye(2), "ab")
        files.append((tmp_path / folder / name).read_bytes())
    assert files[0].startswith(begin) and files[0] == files[1]  # no date, no random ids


def test_the_map_is_called_what_it_is(tmp_path, drawn):
    image, p = np.zeros((4, 4, 1), np.uint8), np.array([0.2, 0.8])
    figures.save_attention(tmp_path / "a.png", image, np.ones((2, 2)), p, "ab", what="rollout")
    figures.save_attention(tmp_path / "a.png", image, np.ones((2, 2)), p, "ab")
    said = [figure.axes[1].get_title("left") for figure in drawn]
    assert said == ["rollout", "attention of the last block, mean of its heads"]


def test_labels():
    assert canvas.label("a  b\nc\t") == "a b c"
    assert canvas.label("x" * 50) == "x" * 23 + "…" and canvas.label("x" * 24) == "x" * 24
    assert canvas.label("a$b") == r"a\$b" and canvas.label(7) == "7"
    assert canvas.label("\udcff") == r"\udcff"  # of a folder's name that is no UTF-8


def test_images():
    image = np.arange(4 * 4 * 5).reshape(4, 4, 5)
    assert canvas.pixels_of(image).shape == (4, 4, 3) and canvas.pixels_of(image[..., :2]).shape == (4, 4)


def test_a_failure_leaves_the_old_figure(tmp_path, monkeypatch):
    (tmp_path / "c.png").write_bytes(b"old")

    def savefig(self, file, **keywords):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", savefig)
    with pytest.raises(KeyboardInterrupt):
        figures.save_curves(tmp_path / "c.png", records(2))
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("c.png", b"old")]


def test_figures_need_no_display_and_no_global_state(tmp_path):
    code = (
        "import sys, minivit.figures as p, numpy as np; p.save_confusion(sys.argv[1], np.eye(2), 'ab');"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    environment = {k: v for k, v in os.environ.items() if k != "DISPLAY"} | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-W", "error", "-c", code, tmp_path / "c.png"], env=environment, check=True)
    whole(tmp_path / "c.png")


def test_v_curves_show_the_slopes_and_knees_of_theory(tmp_path, drawn):
    panels = v_curves("layernorm", 0)
    figures.save_v_curves(tmp_path / "v.png", panels)
    x, w, b = drawn[0].axes
    diamonds, discs = ([line for line in x.lines if line.get_marker() == marker] for marker in "Do")
    knees = [knee for (method, _), (_, knee) in panels["x"].items() if method != "complex"]
    assert len(knees) == 6  # three methods, float64 and float32
    assert sorted(line.get_xdata()[0] for line in diamonds) == sorted(knee.predicted_step for knee in knees)
    assert sorted(line.get_xdata()[0] for line in discs) == sorted(knee.step for knee in knees)

    def slopes(axes):
        straight = [np.log(line.get_xydata()) for line in axes.lines if line.get_linestyle() == "--"]
        return {round(d[1] / d[0]) for d in (np.diff(ends, axis=0)[0] for ends in straight) if d[0]}

    assert slopes(x) == {-1, 1, 2, 4} and slopes(w) == slopes(b) == {-1}
    assert {t.get_text() for t in x.texts} >= {f"slope {n}" for n in ("\N{MINUS SIGN}1", 1, 2, 4)}
    assert not [line for line in w.lines if line.get_marker() in "Do"]  # linear: no truncation, no knee


@pytest.mark.parametrize("steepest", [20, None])
def test_lr_curve(tmp_path, drawn, steepest):
    rates = rising_rates(1e-4, 1.0, 41)
    losses = 2.3 - 0.5 * np.exp(-((np.arange(41) - 25.0) ** 2) / 50)
    losses[38:] = 5, 50, 5000
    found = Ramp(rates, losses, losses.clip(0, 60), "", 25, steepest)
    figures.save_lr_curve(tmp_path / "x.png", found, chosen=1e-2, title=NAMES[0].replace("$", ""))
    whole(tmp_path / "x.png")
    (axes,) = drawn[0].axes
    assert axes.get_xscale() == "log"
    raw, smoothed, least, *marks = axes.lines
    np.testing.assert_array_equal(raw.get_ydata(), losses)
    np.testing.assert_array_equal(smoothed.get_xdata(), rates)
    assert (least.get_xdata(), least.get_ydata()) == (rates[25], losses[25])
    expected = [rates[20], rates[25] / 10] if steepest else []
    assert [line.get_xdata()[0] for line in marks] == [*expected, 1e-2]
    bottom, top = axes.get_ylim()
    assert bottom < losses.min() and losses[0] < top and (top < 3.2) == (steepest is not None)


@pytest.mark.parametrize("channels", [1, 3])
def test_contact_sheet(tmp_path, drawn, channels):
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5, channels), dtype=np.uint8)
    figures.save_contact_sheet(tmp_path / "s.png", {"first": images, NAMES[0]: images[:2] // 2}, title=NAMES[1])
    whole(tmp_path / "s.png", 100)
    axes = drawn[0].axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["first", canvas.label(NAMES[0], 40)]
    shown = np.asarray(axes.images[0].get_array()).reshape(9, 17, channels)
    for row, factor, count in ((0, 1, 3), (5, 2, 2)):
        for i in range(count):
            np.testing.assert_array_equal(shown[row : row + 4, 6 * i : 6 * i + 5], images[i] // factor)
    left = min(t.get_window_extent().x0 for t in axes.get_yticklabels())
    assert left >= 0  # no name is cut off


def test_a_figure_for_a_page():
    counts = np.array([[3, 1], [0, 2]])
    names = ['x id="y" #000000', "<b>&"]
    svg, again = (figures.save_confusion(None, counts, names) for _ in range(2))
    assert svg == again and svg.startswith("<svg ") and svg.endswith("</svg>")
    root = ElementTree.fromstring(svg)
    texts = {"".join(e.itertext()) for e in root.iter() if e.tag.endswith("}text")}
    assert texts >= {*names, "3", "1", "2"} and not {e.tag for e in root.iter() if e.tag.endswith("metadata")}
    assert "#000000" not in re.sub(">[^<]*<", "><", svg) and "stroke: currentColor" in svg
    assert not [e for e in root.iter() if "fill: #ffffff" in e.get("style", "") and e.tag.endswith("}path")]  # no paper
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    prefix = ids[0].partition("-")[0]
    assert len(ids) > 20 and all(i.startswith(prefix + "-") for i in ids)
    used = re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', svg)
    assert used and set(used) <= set(ids)
    other = figures.save_confusion(None, counts + 1, names)
    assert not set(ids) & set(re.findall(r' id="([^"]+)', other))
    dark, light = (re.search(f'style="([^"]*)"[^>]*>{n}<', svg)[1] for n in (2, 1))
    assert "#ffffff" in dark and canvas.INK in light  # on its own square, whatever the page's colour


def test_curves_for_a_page(monkeypatch):
    drawn = []
    monkeypatch.setattr(curves, "save", lambda figure, path: drawn.append(figure))
    found = records(3)
    for r in found:
        epoch = {"seconds": float(r["epoch"] ** 2)} if r["kind"] == "test" else {}
        r |= epoch or {"grad_norm": 2.0 * r["step"], "images_per_second": 100.0 * r["step"]}
    old = {"kind": "train", "step": 1, "epoch": 1, "loss": 1.0, "lr": 0.1}  # of a version that logged no more
    for name in curves.CURVES:
        figures.save_curve(None, name, [old, *found])
    loss, accuracy, lr, norm, rate, time = (figure.axes[0] for figure in drawn)
    assert loss.lines[0].get_xydata()[-1].tolist() == [3.0, 1 / 15] and len(loss.lines[0].get_xdata()) == 16
    assert accuracy.lines[0].get_ydata().tolist() == [87.5] * 3 and lr.lines[0].get_ydata()[-1] == 0.1 / 15
    assert norm.lines[0].get_ydata().tolist() == [2.0 * s for s in range(1, 16)] and norm.get_yscale() == "log"
    assert rate.lines[0].get_ydata().tolist() == [100.0 * s for s in range(1, 16)]
    assert "median 800" in rate.get_title("left")
    assert time.lines[0].get_xydata().tolist() == [[1, 1], [2, 3], [3, 5]] and "median 3 s" in time.get_title("left")
    figures.save_curve(None, "lr", records(0), per_epoch=50)  # not tested yet
    assert drawn[-1].axes[0].lines[0].get_xdata().tolist() == [s / 50 for s in range(1, 6)]


def test_epoch_times():
    tests = [{"kind": "test", "epoch": e, "seconds": s} for e, s in ((5, 10.0), (10, 25.0), (10, 26.0), (15, 20.0))]
    assert curves.epoch_times([*tests, {"kind": "test", "epoch": 20}]) == ([5, 10], [2.0, 3.0])
    assert curves.epoch_times([]) == ([], [])


def test_a_reliability_diagram(tmp_path, drawn):
    nan = np.nan
    found = Calibration(np.array([0, 1, 3]), np.array([nan, 0.5, 1.0]), np.array([nan, 0.6, 0.7]), 0.25)
    figures.save_calibration(tmp_path / "c.png", found, title="t")
    whole(tmp_path / "c.png")
    reliability, share = drawn[0].axes
    bars = [(p.get_x(), p.get_y(), p.get_height()) for p in reliability.patches]
    np.testing.assert_allclose(bars, [(1 / 3, 0, 50), (2 / 3, 0, 100), (1 / 3, 50, 10), (2 / 3, 100, -30)], rtol=1e-12)
    assert [p.get_height() for p in share.patches] == [0.0, 25.0, 75.0]


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_an_image_pixel_by_pixel(channels):
    image = np.random.default_rng(0).integers(0, 256, (4, 4, channels), dtype=np.uint8)
    attention = np.array([[0.0, 1.0], [2.0, 4.0]])
    plain, under = (np.asarray(Image.open(io.BytesIO(figures.image_png(image, a)))) for a in (None, attention))
    shown = image[..., :3] if channels > 2 else 255 - np.repeat(image, 3, axis=2)
    assert plain.shape == (4, 4, 4) and np.abs(plain[..., :3].astype(int) - shown).max() <= 2
    colors = {0.0: (68, 1, 84), 1.0: (253, 231, 37)}  # the ends of viridis
    for (row, column), color in {(0, 1): colors[0.0], (3, 2): colors[1.0]}.items():
        expected = 0.7 * np.array(color) + 0.3 * shown[row, column]
        np.testing.assert_allclose(under[row, column, :3], expected, atol=2)


def test_settings_that_have_not_been_run_are_left_out_of_a_sweeps_figure(tmp_path, drawn):
    def row(name, *accuracies):
        runs = {str(seed): {"accuracy": a} for seed, a in enumerate(accuracies)}
        return {"name": name, "runs": runs, "mean": np.mean(accuracies) if runs else None, "gain": None}

    first, waits, third = row("first", 0.5, 0.6), row("waits"), row("third", 0.7)
    figures.save_sweep(tmp_path / "s.png", {"title": "", "rows": [first, waits, third]})
    figures.save_sweep(tmp_path / "s.png", {"title": "", "rows": [waits, first, third]})
    figures.save_sweep(tmp_path / "s.png", {"title": "", "rows": [waits]})
    whole(tmp_path / "s.png", 100)
    one, other, none = (figure.axes[0] for figure in drawn)
    for axes in (one, other):
        assert [text.get_text() for text in axes.get_yticklabels()] == ["first", "third"]
        assert [line.get_ydata()[0] for line in axes.lines if line.get_marker() == "o"] == [0, 1]
    # the first row of the table, not of the figure, is what others are compared with
    for axes, color in ((one, canvas.THEIRS), (other, canvas.OURS)):
        assert axes.lines[0].get_color() == color and axes.lines[2].get_color() == canvas.OURS
    assert [len([line for line in axes.lines if line.get_linestyle() == ":"]) for axes in (one, other)] == [1, 0]
    assert not none.get_yticklabels() and one.get_ylim() == (1.6, -0.6)


DRAWN = """
from minivit import figures
records = [{{"kind": "train", "step": s, "epoch": 1, "loss": 1.0 / (s + 1)}} for s in range(5)]
figures.save_curve("{path}", "loss", records)
"""


@pytest.mark.parametrize("surroundings", [
    {"MPLBACKEND": "module://no_such_backend"}, {"MPLBACKEND": "nonsense"}, {"MATPLOTLIBRC": "text.usetex: True"},
    {"MATPLOTLIBRC": "axes.facecolor: black\nfont.size: 40\nfigure.dpi: 7\nsavefig.dpi: 7", "MPLBACKEND": "agg"},
])  # fmt: skip
def test_a_users_settings_of_matplotlib_change_no_figure(tmp_path, surroundings):
    """What a notebook or a matplotlibrc says is of other figures."""
    surroundings = dict(surroundings)
    if text := surroundings.get("MATPLOTLIBRC"):
        (tmp_path / "matplotlibrc").write_text(text)
        surroundings["MATPLOTLIBRC"] = str(tmp_path)
    there, here = tmp_path / "there.png", tmp_path / "here.png"
    code = DRAWN.format(path=there)
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | surroundings, cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    exec(DRAWN.format(path=here))
    assert there.read_bytes() == here.read_bytes()
