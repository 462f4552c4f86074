"""The command line ``minivit train``: what it writes, resumes and refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY

from minivit import ViT
from minivit.training.folder import BEST, LAST, METRICS, PREVIOUS, SETTINGS, SUMMARY, read_metrics
from minivit.weights import checkpoint

EVERYTHING = {LAST, BEST, PREVIOUS, METRICS, SUMMARY, SETTINGS, "curves.png", "predictions.png"}


def test_what_a_run_leaves(trained):
    assert {p.name for p in trained.iterdir()} == EVERYTHING
    summary = json.loads((trained / SUMMARY).read_text())
    assert summary["epochs"] == 3 and summary["steps"] == 18 and summary["test_images"] == 360
    assert 0 < summary["test_accuracy"] <= summary["best_test_accuracy"] <= 1
    assert summary["versions"]["numpy"] == np.__version__ and "UCI" in summary["data"]
    settings = json.loads((trained / SETTINGS).read_text())
    assert settings == summary["settings"]
    assert settings["model"]["width"] == 16 and settings["train"]["label_smoothing"] == 0.1  # of the file
    described = {"data": "digits", "data_dir": "data", "image_size": None, "classes": None, "train_share": None}
    assert settings["data"] == described
    assert "start" not in settings
    tests = [r for r in read_metrics(trained / METRICS) if r["kind"] == "test"]
    assert [r["epoch"] for r in tests] == [1, 2, 3] and tests[-1]["accuracy"] == summary["test_accuracy"]
    for name in ("curves.png", "predictions.png"):
        assert (trained / name).read_bytes().startswith(b"\x89PNG")


def test_what_a_run_says(tmp_path, call, no_figures):
    ended = call("train", *TINY, "--epochs", 1, "--out", tmp_path / "a")
    assert ended.status == 0 and ended.err == ""
    lines = ended.out.splitlines()
    assert lines[0].startswith("digits: E. Alpaydin")
    assert lines[1] == "1,437 training and 360 test images of 8x8x1, 10 classes"
    assert lines[2].startswith("ViT: patch 4, 5 tokens, width 16, 1 blocks, 2 heads,")
    assert lines[3].startswith("epoch   1/1  train loss 2.")
    assert lines[4].startswith("test accuracy ") and lines[4].endswith(f"figures and checkpoints in {tmp_path / 'a'}")


def test_the_same_seed_gives_the_same_bits_and_another_one_others(tmp_path, call, no_figures):
    flats = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert call("train", *TINY, "--epochs", 1, "--seed", seed, "--out", tmp_path / name).status == 0
        flats.append(checkpoint.load_model(tmp_path / name / LAST)[0].flat)
    assert np.array_equal(flats[0], flats[1]) and not np.array_equal(flats[0], flats[2])


def test_runs_are_numbered(tmp_path, monkeypatch, call, no_figures):
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/digits", "runs/digits-2", "runs/digits-3"):
        ended = call("train", *TINY, "--epochs", 1)
        assert ended.status == 0 and f"writing to {Path(folder)}\n" in ended.out
        assert {p.name for p in Path(folder).iterdir()} == EVERYTHING
    shutil.rmtree("runs/digits-2")
    Path("runs/digits-2").mkdir()  # empty: nothing to lose
    assert "writing to runs/digits-2\n" in call("train", *TINY, "--epochs", 1).out
    Path("runs/digits-4").write_text("a file")
    assert "writing to runs/digits-5\n" in call("train", *TINY, "--epochs", 1).out


def test_a_finished_run_says_so_and_draws_its_figures_again(run_copy, call):
    before = {p.name: p.read_bytes() for p in run_copy.iterdir()}
    (run_copy / "curves.png").unlink()
    ended = call("train", "--resume", "--quiet", "--out", run_copy)
    assert ended.status == 0 and ended.err == ""
    assert "this run has made all of its 18 steps: its figures are drawn again" in ended.out
    assert {p.name: p.read_bytes() for p in run_copy.iterdir()} == before


def test_the_whole_command_may_be_given_again(run_copy, call, no_figures):
    assert call("train", *TINY, "--epochs", 3, "--resume", "--out", run_copy).status == 0
    assert (
        call("train", "--resume", "--out", run_copy, "--mlp-dim", 32, "--data", "digits", "--log-every", 3).status == 0
    )


DIFFERING = {
    "train": (["--lr", "0.5"], "other settings: lr 0.002 there, 0.5 asked for"),
    "flag off": (["--flip"], "other settings: flip False there, True asked for"),
    "epochs": (["--epochs", "9"], "other settings: epochs 3 there, 9 asked for"),
    "model": (["--width", "32"], "another model: width 16 there, 32 asked for"),
    "preset": (["--preset", "Nano/4"], "another model: width 16 there, 64 asked for"),
    "data": (["--data", "cifar10"], "was trained on digits, not on cifar10"),
    "impossible": (["--num-heads", "3"], "width 16 is not a multiple of num_heads 3"),
}


@pytest.mark.parametrize(("flags", "said"), DIFFERING.values(), ids=DIFFERING.keys())
def test_resuming_with_other_settings_is_refused(trained, call, flags, said):
    before = {p.name: p.read_bytes() for p in trained.iterdir()}
    ended = call("train", "--resume", "--out", trained, *flags)
    assert ended.status == 2 and said in ended.err and ended.err.count("\n") == 1
    assert {p.name: p.read_bytes() for p in trained.iterdir()} == before


def test_resuming_with_another_settings_file_is_refused(trained, tmp_path, call):
    (tmp_path / "x.toml").write_text("[train]\nlr = 0.5\n")
    ended = call("train", "--resume", "--out", trained, "--config", tmp_path / "x.toml")
    assert ended.status == 2 and "lr 0.002 there, 0.5 asked for" in ended.err
    (tmp_path / "y.toml").write_text('[data]\ndata = "cifar10"\n')
    ended = call("train", "--resume", "--out", trained, "--config", tmp_path / "y.toml")
    assert ended.status == 2 and "was trained on digits, not on cifar10" in ended.err


def test_a_stopped_run_ends_with_130(tmp_path, call, monkeypatch):
    from minivit.training import loop

    real = loop.train_epoch

    def stop(run, *arguments):
        run.stop("test")
        real(run, *arguments)

    monkeypatch.setattr(loop, "train_epoch", stop)
    ended = call("train", *TINY, "--out", tmp_path / "a")
    assert ended.status == 130 and ended.err == ""
    assert ended.out.splitlines()[-1] == f"stopped at step 1 of 120; go on with --resume --out {tmp_path / 'a'}"
    assert "summary.json" not in [p.name for p in (tmp_path / "a").iterdir()]


def test_a_folder_of_images(tmp_path, call):
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 3)):
        for name, low in (("dark $x_1$", 0), ("猫", 120)):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(low, low + 100, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    flags = ["--data", "folder", "--data-dir", tmp_path / "data", "--image-size", 8, *TINY, "--batch-size", 4]
    ended = call("train", *flags, "--epochs", 6, "--lr", 0.01, "--out", tmp_path / "a")
    assert ended.status == 0 and ended.err == "" and "12 training and 6 test images of 8x8x3, 2 classes" in ended.out
    assert json.loads((tmp_path / "a" / SUMMARY).read_text())["test_accuracy"] == 1.0
    # --image-size was given as the model's; the data are found again without it
    assert call("train", "--resume", "--quiet", "--out", tmp_path / "a").status == 0
    (tmp_path / "data").rename(tmp_path / "moved")
    ended = call("train", "--resume", "--quiet", "--out", tmp_path / "a")
    assert ended.status == 2 and f"there is no folder {tmp_path / 'data'}" in ended.err
    assert call("train", "--resume", "--data-dir", tmp_path / "moved", "--out", tmp_path / "a").status == 0
    (tmp_path / "moved").rename(tmp_path / "data")
    ended = call("evaluate", tmp_path / "a" / LAST)
    assert ended.status == 0 and ended.err == "" and "accuracy   100.00%" in ended.out and "猫" in ended.out
    ended = call("predict", tmp_path / "a" / LAST, tmp_path / "data/test/猫/0.png", "--test", 0)
    assert ended.status == 0 and ended.err == "" and "0: 猫 " in ended.out and "truly dark $x_1$: dark" in ended.out
    (tmp_path / "data/train/dark $x_1$/0.png").unlink()
    ended = call("train", "--resume", "--out", tmp_path / "a")
    assert ended.status == 2 and "was trained on other images" in ended.err
    ended = call("evaluate", tmp_path / "a" / LAST)
    assert ended.status == 0 and ended.err.startswith("warning: these are not the images of its training run")
    assert ended.err.count("\n") == 1


def test_a_run_of_all_images_is_not_resumed_with_a_share(run_copy, call):
    ended = call("train", "--resume", "--train-share", "0.5", "--out", run_copy)
    assert ended.status == 2 and "a share of 1 of the training images, not of 0.5" in ended.err


def test_a_run_of_all_classes_is_not_resumed_with_some(run_copy, call):
    ended = call("train", "--resume", "--classes", "0-4", "--out", run_copy)
    assert ended.status == 2 and "was trained on all classes, not 0-4" in ended.err


def test_a_stem_trains_and_comes_back(tmp_path, call, no_figures):
    options = ["--stem", "root", "--stem-width", 8, "--stem-groups", 4, "--patch-size", 1]
    ended = call("train", *TINY, *options, "--epochs", 1, "--out", tmp_path / "a")
    assert ended.status == 0 and "ViT: patch 1, 5 tokens, width 16" in ended.out
    model, _ = checkpoint.load_model(tmp_path / "a" / LAST)
    assert model.config.stem == "root"
    start = ViT(model.config).params
    for name, value in model.params.items():
        assert not np.array_equal(value, start[name]), name
    assert call("evaluate", tmp_path / "a" / LAST, "--out", tmp_path / "e").status == 0
    assert call("predict", tmp_path / "a" / LAST, "--test", 0, "--out", tmp_path / "p").status == 0
    ended = call("train", *TINY, *options, "--patch-size", 3, "--epochs", 1, "--out", tmp_path / "b")
    assert ended.status == 2 and ended.err.startswith("error: image_size 8 is not a multiple of 12: stem 'root'")
    assert not (tmp_path / "b").exists()
