"""minivit visualize: the curvature of a run, the sheet of augmentations, the ramp of learning rates."""

import json

import numpy as np
import pytest
from conftest import TINY
from PIL import Image

from minivit import figures
from minivit.data import load
from minivit.data.operations import OPERATIONS
from minivit.training import lr_finder
from minivit.training.folder import METRICS, SETTINGS, read_metrics


def test_curvature_of_a_run(call, trained, tmp_path):
    ended = call(
        "visualize", "curvature", trained / "last.npz", "--every", 2, "--images", 16, "--points", 5, "--out", tmp_path
    )
    assert ended.status == 0, ended.err
    assert (tmp_path / "curvature.png").read_bytes()[:4] == b"\x89PNG"
    report = json.loads((tmp_path / "curvature.json").read_text())
    assert [r["epoch"] for r in report["records"]] == [2, 3]
    for record in report["records"]:
        assert record["eigenvalues"][0] >= record["eigenvalues"][1] > 0 and record["converged"] == [True, True]
        assert max(record["residuals"]) < 1e-2 * record["eigenvalues"][0]
        assert record["preconditioned"]["eigenvalues"][0] > 0
        assert record["edge"] == pytest.approx(38 / record["lr"])
    # the training that was made again is that of the checkpoint: its last learning rate, and its end's curvature
    rates = [r["lr"] for r in read_metrics(trained / METRICS) if r["kind"] == "train"]
    assert report["records"][-1]["lr"] == pytest.approx(rates[-1])
    assert report["records"][-1]["eigenvalues"][0] == pytest.approx(report["at_end"]["eigenvalues"][0], rel=1e-2)
    assert report["ends_at_checkpoint"] and "at the end, which is the checkpoint" in ended.out


@pytest.fixture
def undrawn(monkeypatch):
    """No figure of the curvature: drawing it takes most of the time."""
    monkeypatch.setattr(figures, "save_curvature", lambda *arguments, **keywords: None)


def test_another_optimizer(call, trained, tmp_path, undrawn):
    few = ["--images", 8, "--points", 2, "--epochs", 1, "--out", tmp_path, "--json", tmp_path / "x.json"]
    ended = call("visualize", "curvature", trained / "last.npz", "--optimizer", "sgd", "--lr", 0.1, *few)
    assert ended.status == 0, ended.err
    report = json.loads((tmp_path / "x.json").read_text())
    (record,) = report["records"]
    assert "preconditioned" not in record and record["edge"] == pytest.approx(3.8 / record["lr"])
    # every panel is of the training that was asked for: the surface is at its end, not at the checkpoint
    assert not report["ends_at_checkpoint"] and "not at the checkpoint" in ended.out
    assert report["at_end"]["eigenvalues"][0] == pytest.approx(record["eigenvalues"][0], rel=1e-2)


def test_an_eigenvalue_that_is_not_found_is_marked(call, trained, tmp_path, undrawn):
    few = ["--images", 8, "--points", 2, "--epochs", 1, "--steps", 2, "--out", tmp_path]
    more = call("visualize", "curvature", trained / "last.npz", *few, "--count", 3)
    assert more.status == 0 and "of the 3 eigenvalues asked for only 2 were found: --steps 2 products" in more.out
    ended = call("visualize", "curvature", trained / "last.npz", *few)
    assert ended.status == 0 and "asked for" not in ended.out, ended.err
    (record,) = json.loads((tmp_path / "curvature.json").read_text())["records"]
    assert record["converged"] == [False, False] and record["preconditioned"]["converged"] == [False]
    assert record["residuals"][0] > 1e-3 * record["eigenvalues"][0] and ended.out.count(" +- ") == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["--every", 0], ["--images", 0], ["--pictures", 0], ["--count", -1], ["--optimizer", "lbfgs"], ["--lr", -1],
        ["--epochs", "x"],
    ],
)  # fmt: skip
def test_bad_settings(call, trained, tmp_path, arguments):
    ended = call("visualize", "curvature", trained / "last.npz", "--out", tmp_path, *arguments)
    assert ended.status == 2 and ended.err.startswith("error: ") and ended.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_bad_checkpoints(call, tmp_path):
    np.savez(tmp_path / "other.npz", x=np.zeros(2))
    for name in ("missing.npz", "other.npz"):
        ended = call("visualize", "curvature", tmp_path / name)
        assert ended.status == 2 and ended.err.startswith("error: ") and ended.err.count("\n") == 1


def test_weights_of_other_programs_are_told_from_broken_checkpoints(call, trained, tmp_path):
    """They do not say how they were trained, nor what of pre-training; a checkpoint that was made of them neither."""
    converted = {"official": "o.npz", "timm": "timm", "minivit": "m.npz"}
    for layout, name in converted.items():
        assert call("convert", trained / "last.npz", tmp_path / name, "--to", layout).status == 0
    for name in (*converted.values(), "timm/model.safetensors"):
        for command, said in (
            ("curvature", "does not say how its model was trained; the checkpoints of minivit train do"),
            ("masked", "is not of pre-training; minivit pretrain makes such checkpoints"),
        ):
            ended = call("visualize", command, tmp_path / name, "--out", tmp_path / "new")
            assert ended.status == 2 and ended.err == f"error: {tmp_path / name} {said}\n"
    assert not (tmp_path / "new").exists()


def test_sheet_of_augmentations(call, tmp_path, monkeypatch):
    sheets = []
    monkeypatch.setattr(figures, "save_contact_sheet", lambda path, rows, *, title: sheets.append((path, rows)))
    for seed in (0, 0, 1):
        ended = call("visualize", "augment", "--columns", 9, "--seed", seed, "--out", tmp_path / "new")
        assert ended.status == 0, ended.err
        assert "augment-digits.png" in ended.out
    (path, first), (_, again), (_, other) = sheets
    assert path == tmp_path / "new" / "augment-digits.png"
    assert set(OPERATIONS[1:]) < set(first) and {
        "crop",
        "crop, reflected",
        "flip",
        "affine",
        "erasing",
    } < set(first)
    same = {name for name, row in first.items() if np.array_equal(row, first["as they are"])}
    # digits have no colours, but white and black and too few pixels to spread evenly
    assert same == {"as they are", "color", "autocontrast", "equalize"}
    for name, row in first.items():
        assert row.shape == (9, 8, 8, 1) and row.dtype == np.uint8
        np.testing.assert_array_equal(row, again[name])
    assert not np.array_equal(first["as they are"], other["as they are"])


def test_sheet_of_images_of_another_size(call, tmp_path, monkeypatch):
    """Folders are read at the size; of other data the few images that are drawn are scaled as training scales all."""
    sheets = []
    monkeypatch.setattr(figures, "save_contact_sheet", lambda path, rows, *, title: sheets.append(rows))
    rng = np.random.default_rng(0)
    for name in "ab":
        for split, n in (("train", 3), ("val", 1), ("test", 1)):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(n):
                image = Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
                image.save(tmp_path / split / name / f"{i}.png")
    flags = ["--data-dir", tmp_path, "--image-size", 10, "--columns", 4, "--out", tmp_path / "new"]
    for data in ("digits", "imagefolder", "folder"):
        ended = call("visualize", "augment", "--data", data, *flags[2 if data == "digits" else 0 :])
        assert ended.status == 0, ended.err
        images = load(data, tmp_path, image_size=10).train_images
        rows = np.random.default_rng(0).permutation(len(images))[:4]
        np.testing.assert_array_equal(sheets[-1]["as they are"], images[rows])
        assert {row.shape for row in sheets[-1].values()} == {(4, 10, 10, images.shape[3])}


def test_sheet_is_drawn(call, tmp_path):
    assert call("visualize", "augment", "--out", tmp_path).status == 0
    assert (tmp_path / "augment-digits.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--columns", 1], ["--seed", -1], ["--data", "x"], ["--data", "cifar10", "--data-dir", "x"],
        ["--image-size", 1], ["--image-size", 4097],
    ],
)  # fmt: skip
def test_bad_settings_of_a_sheet(call, tmp_path, arguments):
    ended = call("visualize", "augment", "--out", tmp_path / "new", *arguments)
    assert ended.status == 2 and ended.err.startswith("error: ") and ended.err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_sheet_of_no_training_images(call, tmp_path):
    """A folder with val alone, on which models are tested."""
    for name in "ab":
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / "val" / name / "0.png")
    flags = ["--data-dir", tmp_path, "--image-size", 10, "--out", tmp_path / "new"]
    ended = call("visualize", "augment", "--data", "imagefolder", *flags)
    assert ended.status == 2 and not (tmp_path / "new").exists()
    assert ended.err == f"error: {tmp_path} has no training images; put some in its folder train\n"


def test_learning_rates(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn = []
    real = figures.save_lr_curve
    monkeypatch.setattr(
        figures,
        "save_lr_curve",
        lambda path, found, **words: drawn.append((found, words)) or real(path, found, **words),
    )
    flags = ["--lr-min", 1e-5, "--lr-max", 2, "--steps", 60, "--optimizer", "muon", "--lr", 0.005]
    ended = call("visualize", "lr", *TINY, *flags, "--out", "there")
    assert ended.status == 0 and ended.err == "", ended.err
    assert {str(path) for path in tmp_path.rglob("*")} == {
        str(tmp_path / p) for p in ("there", "there/lr.png", "there/lr.json")
    }
    assert (tmp_path / "there/lr.png").read_bytes()[:4] == b"\x89PNG"
    report = json.loads((tmp_path / "there/lr.json").read_text())
    ((found, words),) = drawn
    assert words == {"chosen": 0.005, "title": "digits: muon, batches of 256"}
    for name in ("rates", "losses", "smoothed"):
        assert report[name] == getattr(found, name).tolist()
    assert report["ended"] == found.ended and report["suggestions"] == found.suggestions
    assert report["least"] == {"lr": found.rates[found.least], "smoothed": found.smoothed[found.least]}
    np.testing.assert_array_equal(report["rates"], lr_finder.rising_rates(1e-5, 2.0, 60)[: len(found.rates)])
    # the settings are those of a training with the same flags
    train = call("train", *TINY, "--epochs", 1, "--optimizer", "muon", "--lr", 0.005, "--out", "run")
    assert train.status == 0
    settings = json.loads((tmp_path / "run" / SETTINGS).read_text())
    assert report["settings"]["model"] == settings["model"] and report["settings"]["data"] == settings["data"]
    different = {key for key, value in settings["train"].items() if report["settings"]["train"][key] != value}
    assert different == {"epochs", "micro_batch"}  # the run's is the one that 0 stands for
    # what is printed
    lines = ended.out.splitlines()
    steepest, tenth = report["suggestions"].values()
    assert lines[0].startswith(f"{len(found.rates)} steps of muon from a rate of 1e-05 to ")
    assert lines[1] == f"  --lr {steepest:.2g}   where the smoothed loss falls most steeply"
    assert lines[2] == f"  --lr {tenth:.2g}   a tenth of the rate where it is least"
    assert lines[3].startswith("for the peak learning rate, which is 0.005 in these settings; drawn in there/lr.png")


def test_learning_rates_that_do_nothing(call, tmp_path):
    ended = call(
        "visualize", "lr", *TINY, "--crop-padding", 0, "--batch-size", 1437, "--lr-min", 1e-30, "--lr-max", 1e-29,
        "--steps", 10, "--out", tmp_path,
    )  # fmt: skip
    assert ended.status == 0 and "the loss does not fall between these rates: try other --lr-min" in ended.out
    assert json.loads((tmp_path / "lr.json").read_text())["suggestions"] == {}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lr-min", 1, "--lr-max", 1], "lr_min must be below lr_max, got 1 and 1"),
        (["--lr-min", 0], "lr_min and lr_max must be finite numbers above 0, got 0 and 1"),
        (["--lr-max", "inf"], "must be finite numbers above 0"),
        (["--lr-max", "much"], "invalid float value: 'much'"),
        (["--steps", 9], "steps must be at least 10, got 9"),
        (["--batch-size", 0], "batch_size must be at least 1, got 0"),
        (["--crop-padding", 8], "crop_padding 8 moves whole"),
        (["--config", "nothing.toml"], "there is no settings file nothing.toml"),
        (["--data", "cifar10", "--data-dir", "nowhere"], "minivit data fetch cifar10"),
        (["--optimizer", "lbfgs"], "optimizer must be one of"),
        (["--resume"], "unrecognized arguments: --resume"),
    ],
)
def test_bad_settings_of_a_ramp(call, tmp_path, arguments, said):
    ended = call("visualize", "lr", *TINY, "--out", tmp_path / "new", *arguments)
    assert ended.status == 2 and ended.err.startswith("error: ") and ended.err.count("\n") == 1
    assert said in ended.err and not list(tmp_path.glob("new/*"))
