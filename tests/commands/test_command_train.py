"""The command line ``minivit train``: what it writes, resumes and refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY

from minivit import ViT
from minivit.commands.training import best_in_words
from minivit.data.source import DATA_KEYS
from minivit.training.folder import BEST, LAST, METRICS, PREVIOUS, SETTINGS, SUMMARY, read_metrics
from minivit.training.plan import fitted
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
    assert settings["data"] == DATA_KEYS
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
    assert lines[3].startswith("that folder will hold last.npz") and "best on the test images" in lines[3]
    assert lines[4].startswith("warning: 6 optimiser steps in all (1,437 images in batches of 256)")
    assert lines[4].endswith("take more, such as --epochs 167, or a smaller --batch-size than 256")
    assert lines[5].startswith("epoch   1/1  train loss 2.")
    assert lines[6].startswith("test accuracy ") and lines[6].endswith(f"figures and checkpoints in {tmp_path / 'a'}")


def test_no_warning_of_enough_steps_or_of_a_start(tmp_path, trained, call, no_figures, monkeypatch):
    monkeypatch.setattr("minivit.training.plan.FEW_STEPS", 6)
    assert "warning:" not in call("train", *TINY, "--epochs", 1, "--out", tmp_path / "a").out
    monkeypatch.undo()
    ended = call("train", *TINY, "--from", trained / LAST, "--epochs", 1, "--out", tmp_path / "b")
    assert ended.status == 0 and "warning:" not in ended.out


def test_the_best_is_told_to_be_chosen_by_the_test_images(trained, tmp_path, call):
    summary = {"best_epoch": 3, "epochs": 3, "best_test_accuracy": 0.9}
    assert best_in_words(summary) == ""
    said = best_in_words(summary | {"best_epoch": 2})
    assert said == " (best on the test images, and chosen by them: 90.00% after epoch 2)"
    assert "on the test images" in json.loads((trained / SUMMARY).read_text())["best_is"]
    for name, told in ((BEST, True), (LAST, False)):
        ended = call("evaluate", trained / name, "--out", tmp_path)
        assert ended.status == 0 and ("best on these test images" in ended.out) == told


IDLE = {
    "digits": (["--data-dir", "nowhere"], "data_dir nowhere (--data-dir) has no effect: the data are the digits"),
    "test share": (["--test-share", "0.2"], "test_share 0.2 (--test-share) has no effect: digits has test images of"),
    "split seed": (["--split-seed", "1"], "split_seed (--split-seed) has no effect without test_share"),
    "rand": (["--rand-count", "3"], "--rand-count has no effect with policy none"),
    "crop mode": (["--crop-mode", "reflect", "--crop-padding", "0"], "--crop-mode has no effect without crop_padding"),
    "momentum": (["--momentum", "0.9"], "--momentum has no effect with optimizer adamw"),
    "beta": (["--optimizer", "sgd", "--beta1", "0.8"], "--beta1 has no effect with optimizer sgd"),
    "eps": (["--optimizer", "lion", "--adam-eps", "1e-7"], "--adam-eps has no effect with optimizer lion"),
    "cooldown": (["--cooldown", "0.2"], "--cooldown has no effect with schedule cosine"),
    "final": (["--schedule", "constant", "--final-lr", "1e-5"], "--final-lr has no effect with schedule constant"),
    "mixing": (["--mix-probability", "0.5"], "--mix-probability has no effect without mixup or cutmix"),
    "stem": (["--stem-width", "32"], "--stem-width has no effect without stem"),
}


@pytest.mark.parametrize(("flags", "said"), IDLE.values(), ids=IDLE)
def test_a_flag_without_effect_is_refused(tmp_path, call, flags, said):
    ended = call("train", *TINY, *flags, "--out", tmp_path / "a")
    assert ended.status == 2 and said in ended.err and ended.err.count("\n") == 1, ended.err
    assert not (tmp_path / "a").exists()


def test_flags_that_others_replace_are_told(tmp_path, call, no_figures):
    flags = ["--epochs", 9, "--steps", 2, "--warmup-epochs", 1, "--warmup-steps", 1, "--precision", "bf16"]
    ended = call("train", *TINY, *flags, "--out", tmp_path / "a")
    assert ended.status == 0 and sorted(ended.err.splitlines()) == [
        "note: --epochs has no effect with steps 2",
        "note: --precision has no effect with device cpu",
        "note: --warmup-epochs has no effect with warmup_steps 1",
    ]


def test_other_commands_refuse_flags_without_effect(trained, tmp_path, call):
    last = trained / LAST
    for words, said in (
        (["evaluate", last, "--data-dir", tmp_path], "the data are the digits"),
        (["predict", last, "--test", 0, "--data-dir", tmp_path], "the data are the digits"),
        (["predict", last, trained / "curves.png", "--data", "digits"], "--data digits has no effect without --test"),
        (["predict", last, "--test", 0, "--invert"], "--invert has no effect on images of --test"),
        (["transfer", last, "--data", "digits", "--data-dir", tmp_path], "the data are the digits"),
        (["transfer", last, "--k", 3], "--k has no effect with --method fewshot"),
        (["transfer", last, "--method", "knn", "--shots", 3], "--shots has no effect with --method knn"),
        (["sweep", "digits", "--table", "--device", "cpu"], "--device cpu has no effect with --table"),
        (["data", "info", "digits", "--data-dir", tmp_path], "the data are the digits"),
        (["data", "info", "cifar10", "--test-share", 0.2], "cifar10 has test images of its own"),
        (["trace", "--data-dir", tmp_path], "the images are random"),
        (["visualize", "augment", "--data-dir", tmp_path], "the data are the digits"),
        (["train", "--resume", "--out", trained, "--data-dir", tmp_path], "the data are the digits"),
        (["pretrain", "--decoder-depth", 1, "--data", "digits", "--patch-size", 2], "--decoder-depth has no effect"),
    ):
        ended = call(*words, *([] if "--out" in words or words[0] in ("data", "trace") else ["--out", tmp_path / "x"]))
        assert ended.status == 2 and said in ended.err and ended.err.count("\n") == 1, (words, ended)


def test_a_folder_that_is_not_split(tmp_path, call, no_figures):
    """The share is in the settings: resuming, evaluating and the next command line take the same images."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 120)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(10):
            pixels = rng.integers(low, low + 100, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    flags = ["--data", "folder", "--data-dir", tmp_path / "data", "--image-size", 8, *TINY, "--batch-size", 4]
    flags += ["--test-share", 0.3, "--split-seed", 5, "--epochs", 2]
    ended = call("train", *flags, "--out", tmp_path / "a")
    assert ended.status == 0 and "14 training and 6 test images" in ended.out, ended.err
    data = json.loads((tmp_path / "a" / SETTINGS).read_text())["data"]
    assert data["test_share"] == 0.3 and data["split_seed"] == 5
    accuracy = json.loads((tmp_path / "a" / SUMMARY).read_text())["test_accuracy"]
    ended = call("evaluate", tmp_path / "a" / LAST, "--json", tmp_path / "e.json")
    assert ended.status == 0 and ended.err == ""
    assert json.loads((tmp_path / "e.json").read_text())["accuracy"] == accuracy
    assert call("train", "--resume", *flags, "--out", tmp_path / "a").status == 0
    ended = call("train", "--resume", "--out", tmp_path / "a", "--split-seed", 6)
    assert ended.status == 2 and "split by split_seed 5, not by 6" in ended.err
    (tmp_path / "data" / "dark" / "10.png").write_bytes((tmp_path / "data" / "dark" / "1.png").read_bytes())
    assert "was trained on other images" in call("train", "--resume", "--out", tmp_path / "a").err


def test_batch_and_epochs_of_a_folder_follow_its_images():
    assert fitted({}, 72) == {"batch_size": 16, "epochs": 200}
    assert fitted({}, 1000) == {"batch_size": 128, "epochs": 125}
    assert fitted({}, 50_000) == {"batch_size": 128, "epochs": 20}
    assert fitted({"batch_size": 36, "accumulate": 2}, 72) == {"batch_size": 36, "accumulate": 2, "epochs": 1000}
    assert fitted({"steps": 7, "lr": 1.0}, 72) == {"steps": 7, "lr": 1.0, "batch_size": 16}
    assert fitted({"epochs": 3}, 1) == {"epochs": 3, "batch_size": 16}


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
