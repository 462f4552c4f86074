"""The command line ``minivit report``: what its page says, that it needs nothing else, and that no name is HTML."""

import base64
import io
import json
import os
import re
import shlex
from dataclasses import asdict
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import TINY, load_script
from PIL import Image

from minivit import ViT, ViTConfig, figures
from minivit.commands.training import recipe_of_flags
from minivit.data import Dataset, load
from minivit.evaluation import runs
from minivit.evaluation.inference import attention_map, predict_all
from minivit.figures import html, report
from minivit.layers.softmax import softmax_forward
from minivit.model import intermediates
from minivit.training.config import TrainConfig, train_config_of
from minivit.training.folder import LAST, METRICS, SUMMARY
from minivit.training.idle import idle
from minivit.training.recipes import own_settings
from minivit.weights import checkpoint

VOID = {"meta", "img"}
LOADING = {"script", "link", "iframe", "object", "embed", "video", "audio", "base", "form", "source", "picture"}


class Page(HTMLParser):
    """A page taken apart: its text, its tables' rows, its images; tags that are not closed in order are refused."""

    def __init__(self, text):
        super().__init__()
        self.text, self.open, self.tags, self.images, self.rows, self.ids = "", [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "img":
            kind, _, content = attributes["src"].partition(",")
            assert kind == "data:image/png;base64" and attributes["alt"]
            self.images.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB")))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if self.open and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def assert_alone(self):
        """Nothing in it makes a browser load anything."""
        for tag, attributes in self.tags:
            assert tag not in LOADING
            assert not any(name.startswith("on") for name in attributes)
            for name in ("src", "href", "xlink:href", "srcset", "data", "background"):
                value = attributes.get(name, "#")
                if tag == "image":  # in a figure
                    assert value.startswith(("data:image/png;base64,", "#"))
                elif value.startswith("https://"):
                    assert tag == "a"
                else:
                    assert value.startswith(("#", "data:image/png;base64,"))
            assert "url(http" not in attributes.get("style", "")
        assert len(self.ids) == len(set(self.ids))
        targets = [a["href"][1:] for t, a in self.tags if a.get("href", "").startswith("#")]
        assert len(targets) >= 7 and set(targets) <= set(self.ids)


def spaces(text):
    return " ".join(text.replace("\N{NO-BREAK SPACE}", " ").split())


@pytest.fixture(scope="module")
def reported(trained, tmp_path_factory):
    """The page about the small finished run, taken apart."""
    file = tmp_path_factory.mktemp("page") / "page.html"
    before = {p.name: p.read_bytes() for p in trained.iterdir()}
    assert load_script("report").main([str(trained), "--out", str(file), "--mistakes", "5"]) == 0
    assert {p.name: p.read_bytes() for p in trained.iterdir()} == before
    return Page(file.read_text(encoding="utf-8"))


def by_hand(run, weights="auto"):
    """Probabilities, predictions and labels of the run's test images from the model alone."""
    data = load("digits")
    model, _ = checkpoint.load_model(run / LAST, weights=weights)
    p = softmax_forward(predict_all(model, data.test_images, workers=1).astype(np.float64))[0]
    plain = softmax_forward(model.predict(data.test_images).astype(np.float64))[0]
    np.testing.assert_allclose(p, plain, rtol=1e-4)
    return model, p, p.argmax(axis=1), data.test_labels


def test_the_page_needs_nothing_else(reported):
    reported.assert_alone()
    policy = [a["content"] for t, a in reported.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert ("meta", {"charset": "utf-8"}) in reported.tags
    viewport = {"name": "viewport", "content": "width=device-width, initial-scale=1"}
    assert ("meta", viewport) in reported.tags


def test_the_headline(trained, reported):
    text, summary = spaces(reported.text), json.loads((trained / SUMMARY).read_text())
    accuracy = f"{100 * summary['test_accuracy']:.2f} %"
    assert f"test accuracy {accuracy}" in text.replace("accuracy" + accuracy, "accuracy " + accuracy)
    assert "after epoch 3 of 3" in text and f"{summary['parameters']:,}" in text
    assert f"best {100 * summary['best_test_accuracy']:.2f} % after epoch {summary['best_epoch']}" in text
    assert "1,437 training and 360 test images of 8 × 8 × 1, 10 classes" in text
    assert "A finished run. Its last.npz is of step 18 of 18, epoch 3 of 3." in text and "unfinished" not in text
    assert f"{summary['train_seconds']:.3g} s" in text


def test_the_headline_of_a_run_of_steps(call, tmp_path, no_figures):
    """Its last epoch is cut short: four of its two times six steps."""
    assert call("train", *TINY, "--steps", 8, "--out", tmp_path / "run").status == 0
    page = call("report", tmp_path / "run", "--out", tmp_path / "page.html")
    assert page.status == 0, page.err
    text = spaces(Page((tmp_path / "page.html").read_text()).text)
    assert "Its last.npz is of step 8 of 8, epoch 2 of 2." in text


def test_the_figures_about_test_images(trained, reported):
    _, p, guesses, labels = by_hand(trained)
    text = spaces(reported.text)
    right = guesses == labels
    assert f"Of 360 test images {right.sum()} are right, {100 * right.mean():.2f} %" in text
    assert "the moving average of the weights." in text and "weights, device or images were others" not in text
    confidence, error = p.max(axis=1), 0.0
    for m in range(15):
        inside = (confidence > m / 15) & (confidence <= (m + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert f"Expected calibration error: {100 * error:.2f} %." in text
    assert re.search(r"T = \d\.\d{3}: with it the loss is", text) and "fitted to the very test images" in text
    assert "arXiv:1706.04599" in text
    for k in range(10):
        taken, of_it = guesses == k, labels == k
        row = [str(k), str(of_it.sum()), f"{100 * (taken == of_it).mean():.1f} %"]
        row += [f"{100 * of_it[taken].mean():.1f} %" if taken.any() else "\N{EN DASH}"]
        assert [spaces(cell) for cell in next(r for r in reported.rows if r[0] == str(k))] == [
            *row, f"{100 * taken[of_it].mean():.1f} %"]  # fmt: skip


def test_the_most_confident_mistakes(trained, reported):
    model, p, guesses, labels = by_hand(trained)
    wrong = np.flatnonzero(guesses != labels)
    chosen = wrong[np.argsort(-p[wrong].max(axis=1))][:5]
    text = spaces(reported.text)
    assert f"5 of {len(wrong)} wrong images" in text and len(reported.images) == 10
    images = load("digits").test_images
    for i, shown, overlay in zip(chosen, reported.images[::2], reported.images[1::2], strict=True):
        said = f"predicted {guesses[i]} {100 * p[i].max():.1f} %truly {labels[i]} {100 * p[i, labels[i]]:.1f} %"
        assert f"{said}test image {i}" in text
        assert np.abs(shown[..., 0].astype(int) - (255 - images[i, ..., 0])).max() <= 3  # dark ink on white
        # of the four patches the one with most attention is the most yellow
        row = intermediates(model, images[i : i + 1]).attention[-1][0].mean(axis=0)[0, 1:]
        yellow = overlay.astype(int)[..., 0] - overlay[..., 2]
        patches = [yellow[r : r + 4, c : c + 4].mean() for r in (0, 4) for c in (0, 4)]
        assert row[np.argmax(patches)] >= row.max() - 0.02 * np.ptp(row)  # of two that are all but alike, either


def test_the_settings_and_what_differs(reported):
    rows = [[spaces(cell) for cell in row] for row in reported.rows]
    assert ["● width", "16", "192", "token width D"] in rows
    assert ["● ema_decay", "0.99", "0.0"] in [row[:3] for row in rows]
    assert ["epochs", "3"] not in [row[:2] for row in rows] and ["● epochs", "3", "20"] in [row[:3] for row in rows]
    named = {row[0].removeprefix("● ") for row in rows}
    assert named >= {"pooling", "momentum", "mixup", "data", "data_dir", "image_size", "numpy", "python", "minivit"}
    assert ["pooling", "cls"] in [row[:2] for row in rows] and "● pooling" not in [row[0] for row in rows]


def test_the_page_is_the_same_again_and_lies_in_the_folder(run_copy, call):
    pages = []
    for _ in range(2):
        ended = call("report", run_copy)
        assert ended.status == 0 and ended.err == "" and str(run_copy / "report.html") in ended.out
        pages.append((run_copy / "report.html").read_bytes())
    assert pages[0] == pages[1]


@pytest.fixture
def undrawn(monkeypatch):
    """Curves and diagrams are empty: drawing them takes most of the time that a page takes."""
    for name in ("save_curve", "save_confusion", "save_calibration"):
        monkeypatch.setattr(report, name, lambda path, *arguments, **keywords: "<svg ></svg>")


def test_an_unfinished_run_with_damaged_lines(run_copy, call):
    (run_copy / SUMMARY).unlink()
    lines = (run_copy / METRICS).read_text().splitlines()
    tests = [line for line in lines if '"test"' in line]
    old = {"kind": "train", "step": 1, "epoch": 1, "lr": 0.1, "loss": 2.0}  # no norm, no rate
    bad = [
        old | {"loss": float("nan")}, old | {"step": 10**400}, old | {"epoch": 0}, {"kind": "test"}, [], 3,
        json.loads(tests[0]) | {"epoch": 0}, json.loads(tests[0]) | {"accuracy": float("inf")},
    ]  # fmt: skip
    (run_copy / METRICS).write_text("\n".join([*map(json.dumps, bad), "{", "\0", json.dumps(old), tests[0], '{"ki']))
    assert [r["kind"] for r in runs.records_of(run_copy)] == ["train", "test"]
    assert call("report", run_copy, "--mistakes", 0).status == 0
    page = Page((run_copy / "report.html").read_text())
    assert "unfinished: there is no whole summary.json" in spaces(page.text)
    assert "after epoch 1 of 3" in spaces(page.text)


def test_a_run_of_which_there_is_no_more_than_a_checkpoint(run_copy, call, undrawn):
    for content in (b"{", b"[1]", b"[" * 10**5, b"\xff"):
        (run_copy / SUMMARY).write_bytes(content)
        assert runs.summary_of(run_copy) == {}
    (run_copy / SUMMARY).write_text(
        '{"test_accuracy": "x", "images_per_second": NaN, "train_seconds": -1, "device": 3}'
    )
    (run_copy / METRICS).unlink()
    assert call("report", run_copy, "--mistakes", 0).status == 0
    text = spaces(Page((run_copy / "report.html").read_text()).text)
    assert "not tested yet" in text and "nothing to draw" in text and "over the whole run" not in text


def test_the_weights_are_chosen(trained, tmp_path, call, undrawn):
    for weights, said in (("params", "the weights themselves"), ("ema", "the moving average of the weights")):
        assert call("report", trained, "--weights", weights, "--mistakes", 0, "--out", tmp_path / "r.html").status == 0
        text = spaces(Page((tmp_path / "r.html").read_text()).text)
        _, _, guesses, labels = by_hand(trained, weights)
        assert f"{(guesses == labels).sum()} are right" in text and said in text
        same = np.mean(guesses == labels) == json.loads((trained / SUMMARY).read_text())["test_accuracy"]
        assert ("weights, device or images were others" in text) == (not same)


HOSTILE = ("<script>alert(1)</script>", "a&b \"c\" 'd'", 'x id="y" #000000 $\\frac{', "猫 \udcff \x07")


def a_run(folder, *, channels=3, pooling="mean", right=False, **settings):
    """A `report.Run` of a folder's images with hostile names, without any training."""
    rng = np.random.default_rng(0)
    config = ViTConfig(image_size=8, patch_size=2, channels=channels, num_classes=4, width=8, depth=2, num_heads=2,
                       pooling=pooling)  # fmt: skip
    model = ViT(config)
    images, labels = rng.integers(0, 256, (6, 8, 8, channels), dtype=np.uint8), np.arange(6) % 4
    data = Dataset("folder", images, labels, images, labels, HOSTILE, "</style><img src=x onerror=alert(2)>")
    logits = rng.standard_normal((6, 4)).astype(np.float32)
    if right:
        logits = np.eye(4, dtype=np.float32)[labels]
    described, versions = {"data": "folder", "data_dir": "<i>"}, {"<u>": "<b>"}
    record = checkpoint.Record(folder, config, data=described, versions=versions)
    return runs.Run(
        folder, model, record, TrainConfig(**settings), data, False, logits, [], {"device": "<b>", "cores": "<b>"}, {}
    )


@pytest.mark.parametrize(("channels", "pooling"), [(1, "cls"), (3, "mean"), (5, "cls")])
def test_no_name_is_html(tmp_path, channels, pooling):
    text = report.page(a_run(tmp_path / "<b>", channels=channels, pooling=pooling))
    page = Page(text.encode("utf-8", errors="backslashreplace").decode())
    page.assert_alone()
    assert not {"b", "u", "i"} & {tag for tag, _ in page.tags} and HOSTILE[0] in page.text and HOSTILE[2] in page.text
    assert len(page.images) > 4 and all(image.shape == (8, 8, 3) for image in page.images)
    assert "not the images of its training run" in page.text


def test_the_attention_is_that_of_the_last_block(tmp_path):
    run = a_run(tmp_path)
    page = Page(report.page(run, mistakes=1).replace("\udcff", ""))
    i = int(re.search(r"test image (\d)", page.text)[1])
    image = run.dataset.test_images[i]
    seen = [attention_map(a[0], "mean") for a in intermediates(run.model, image[None]).attention]
    first, last = (np.asarray(Image.open(io.BytesIO(figures.image_png(image, a))))[..., :3] for a in seen)
    assert (first != last).any() and len(page.images) == 2
    np.testing.assert_array_equal(page.images[1], last)
    assert ["mlp_dim", "32"] in [row[:2] for row in page.rows]  # 4 x 8: what it is by itself


def test_a_folder_of_images(tmp_path, call):
    names = ("<b>&", os.fsdecode(b"caf\xe9"))  # a folder's name may be any bytes
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in names:
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(3):
                image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
                image.save(tmp_path / "data" / split / name / f"{i}.png")
    flags = ["--data", "folder", "--data-dir", tmp_path / "data", "--image-size", 8, "--pooling", "mean"]
    assert call("train", *TINY, *flags, "--test-flip", "--epochs", 1, "--out", tmp_path / "run").status == 0
    (tmp_path / "data").rename(tmp_path / "moved")
    assert call("report", tmp_path / "run").status == 2
    assert call("report", tmp_path / "run", "--data-dir", tmp_path / "moved").status == 0
    page = Page((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    page.assert_alone()
    loss = json.loads((tmp_path / "run" / SUMMARY).read_text())["test_loss"]
    assert f"mean cross-entropy {loss:.4f}." in page.text and "mirror image's logits" in page.text
    assert {row[0] for row in page.rows} >= {"<b>&", "caf\\udce9"} and "mean pooling" in page.text
    assert f"--data-dir {tmp_path / 'moved'}" in page.text and "--image-size 8" in page.text


def test_where_everything_is_right(tmp_path):
    text = spaces(Page(report.page(a_run(tmp_path, right=True, test_flip=True)).replace("\udcff", "")).text)
    assert "There is none: every test image is right." in text and "and none is best" in text
    assert "mirror image" in text


COMMANDS = {
    "nothing": "",
    "tiny": " ".join(TINY[:2]),
    "flags": "--lr 0.003 --flip --no-graph --epochs 7 --width 96 --mlp-dim 256 --seed 3",
    "the file's flags off": "--dropout 0 --rotate 0 --ema-decay 0 --label-smoothing 0",
    "defaults": "--width 192 --depth 6 --num-heads 3 --mlp-dim 0 --epochs 20 --batch-size 128 --lr 1e-3",
    "preset": "--preset Nano/2",
}


@pytest.mark.parametrize("flags", COMMANDS.values(), ids=COMMANDS.keys())
def test_the_command_asks_for_the_same(flags):
    train = load_script("train")
    fitted = {"image_size": 8, "channels": 1, "num_classes": 10}

    def asked(words):
        _, model, settings, _ = recipe_of_flags(train.parse(words), "digits")
        return ViTConfig(**fitted | model), TrainConfig(**settings)

    run = asked(shlex.split(flags))
    own = own_settings("digits")
    assert own["train"] and own_settings("no such data") == {}
    first, *parts = runs.command(*run, {"data": "digits", "data_dir": "data"}, own)
    assert first == ["minivit", "train"] and all(part[0].startswith("--") for part in parts)
    again = asked([word for part in parts for word in part])
    asked_for, made = ({**asdict(model), **asdict(config)} for model, config in (again, run))
    without_effect = idle(made)  # flags of these would be refused
    assert {key for key in made if asked_for[key] != made[key]} <= without_effect.keys()


def test_the_command_names_the_data(tmp_path):
    run = a_run(tmp_path)
    words = runs.command(run.model.config, run.train, {"data": "folder", "data_dir": "my images"}, {})
    assert words[1:4] == [["--data", "folder"], ["--data-dir", "my images"], ["--image-size", "8"]]
    preset = {"model": {"preset": "Micro/4"}, "data": {"data_dir": "there"}}
    words = runs.command(ViTConfig(), TrainConfig(), {"data": "cifar10", "data_dir": "there"}, preset)
    assert words[1:3] == [["--data", "cifar10"], ["--patch-size", "4"]] and ["--width", "192"] in words


def test_the_command_of_a_run_that_began_with_another():
    """What comes from the start is left out; what may differ from it is named, also where it is the default."""
    start = {"checkpoint": "a b.npz", "keep_head": True, "pos_resize": "bicubic", "patch_resize": "pi", "crc": 1}
    data = {"data": "cifar10", "data_dir": "data", "image_size": 48, "classes": "5-9", "train_share": 0.5}
    config, train = ViTConfig(image_size=48, width=96, num_classes=5), TrainConfig(steps=7, epochs=2)
    own = {"model": {"drop_path": 0.0}, "train": {"steps": 100}}
    words = runs.command(config, train, data, own, start)
    assert words[1:7] == [
        ["--data", "cifar10"], ["--image-size", "48"], ["--classes", "5-9"],
        ["--train-share", "0.5"], ["--from", "a b.npz"], ["--keep-head"]
    ]  # fmt: skip
    assert words[7] == ["--pos-resize", "bicubic"] and ["--dropout", "0.0"] in words and ["--patch-size", "4"] in words
    assert not {"--width", "--num-classes", "--drop-path", "--patch-resize"} & {part[0] for part in words}
    assert ["--steps", "7"] in words
    recipe = recipe_of_flags(load_script("train").parse([word for part in words[1:] for word in part]), "cifar10")
    assert recipe.start == {"checkpoint": "a b.npz", "keep_head": True, "pos_resize": "bicubic"}
    assert (
        recipe.data["classes"] == "5-9"
        and recipe.data["train_share"] == 0.5
        and recipe.model["image_size"] == 48
        and recipe.train["steps"] == 7
    )


def test_the_command_of_the_page(trained, reported):
    _, record = checkpoint.read(trained / LAST)
    parts = runs.command(record.config, train_config_of(record), record.data, own_settings("digits"))
    assert " \\\n  ".join(" ".join(part) for part in parts) in reported.text and ["--width", "16"] in parts


def test_words():
    assert html.duration(1.234) == "1.23\N{NO-BREAK SPACE}s" and html.duration(90) == "1.5\N{NO-BREAK SPACE}min"
    assert spaces(html.duration(3600 * 2 + 59.7 * 60)) == "3 h 0 min" and html.percent(None) == "\N{EN DASH}"
    assert html.tag("p", "<", html.tag("b", "&"), title='"') == '<p title="&quot;">&lt;<b>&amp;</b></p>'
