"""The command line ``minivit evaluate``: its figures against scikit-like ones written out, and its files."""

import json

import numpy as np
import pytest
from PIL import Image

from minivit import ViTConfig, figures
from minivit.data import load, source
from minivit.evaluation.inference import predict_all
from minivit.model import ViT
from minivit.training.folder import LAST, SUMMARY
from minivit.weights import checkpoint
from minivit.weights.checkpoint import named_arrays


def by_hand(run, weights="auto", *, flip=False):
    """Logits and labels of the run's test set: in the script's cuts, so that no rounding decides about a guess."""
    data = load("digits")
    model, _ = checkpoint.load_model(run / LAST, weights=weights)
    logits = predict_all(model, data.test_images, workers=1, flip=flip)
    if not flip:
        np.testing.assert_allclose(logits, model.predict(data.test_images), rtol=1e-4, atol=1e-5)
    return logits.astype(np.float64), data.test_labels


def test_the_figures(trained, tmp_path, call):
    ended = call("evaluate", trained / LAST, "--out", tmp_path / "new" / "folder", "--json", tmp_path / "e.json")
    assert ended.status == 0 and ended.err == ""
    facts = json.loads((tmp_path / "e.json").read_text())
    logits, labels = by_hand(trained)
    guesses = logits.argmax(axis=1)
    assert facts["accuracy"] == json.loads((trained / SUMMARY).read_text())["test_accuracy"]
    assert facts["accuracy"] == np.mean(guesses == labels)
    ranks = (logits > logits[np.arange(360), labels][:, None]).sum(axis=1)
    assert facts["top5_accuracy"] == np.mean(ranks < 5)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(facts["loss"], -log_p[np.arange(360), labels].mean(), rtol=1e-5)
    for k, each in enumerate(facts["classes"]):
        assert each["accuracy"] == np.mean((guesses == k) == (labels == k))
        assert each["name"] == str(k) and each["count"] == np.sum(labels == k)
        assert each["recall"] == np.mean(guesses[labels == k] == k)
        assert each["precision"] == (np.mean(labels[guesses == k] == k) if (guesses == k).any() else None)
        assert facts["confusion"][k] == np.bincount(guesses[labels == k], minlength=10).tolist()
    assert facts["images_per_second"] > 0 and facts["weights"] == "ema" and facts["pictures_of_training_run"] is True
    assert (tmp_path / "new/folder/confusion-last.png").read_bytes().startswith(b"\x89PNG")
    for shown in (f"accuracy   {facts['accuracy']:.2%}", f"top 5      {facts['top5_accuracy']:.2%}", "images/s with"):
        assert shown in ended.out
    rows = [line for line in ended.out.splitlines() if line.endswith("%") and line[0].isdigit()]
    assert len(rows) == 10 and rows[3].split()[:2] == ["3", "37"]


def test_a_figure_that_fails_takes_no_result_along(trained, tmp_path, call, monkeypatch):
    def broken(*arguments, **settings):
        raise RuntimeError("no font")

    monkeypatch.setattr(figures, "save_confusion", broken)
    ended = call("evaluate", trained / LAST, "--out", tmp_path, "--json", tmp_path / "e.json")
    assert ended.status == 0 and "accuracy" in json.loads((tmp_path / "e.json").read_text())
    assert ended.err == "warning: a figure could not be drawn (no font); everything else is written\n"
    assert "confusion matrix in" not in ended.out
    monkeypatch.setattr(figures, "save_attention", broken)
    ended = call("predict", trained / LAST, "--test", "0", "1", "--out", tmp_path, "--json", tmp_path / "p.json")
    assert ended.status == 0 and len(json.loads((tmp_path / "p.json").read_text())["predictions"]) == 2
    assert ended.err.count("warning: a figure could not be drawn (no font)") == 2


def test_folders_are_read_at_the_size_of_the_model(tmp_path, call):
    """Also where the model says no size of its own images, as weights of another program, or had those of another."""
    rng = np.random.default_rng(0)
    for k in range(10):
        for split in ("train", "test"):
            (tmp_path / split / str(k)).mkdir(parents=True)
            image = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
            image.save(tmp_path / split / str(k) / "x.png")
    model = ViT(ViTConfig(image_size=12, width=8, depth=1, num_heads=2))
    classes = {"class_names": list("0123456789")}
    checkpoint.save(
        tmp_path / "m.npz",
        named_arrays("params", model.flat, model.table),
        checkpoint.model_meta(model.config) | classes,
    )
    assert call("convert", tmp_path / "m.npz", tmp_path / "timm", "--to", "timm").status == 0
    for data in ("folder", "imagefolder"):
        for name in ("m.npz", "timm"):
            flags = ["--data", data, "--data-dir", tmp_path, "--out", tmp_path / "new"]
            ended = call("evaluate", tmp_path / name, *flags, "--json", tmp_path / "e.json")
            assert ended.status == 0, ended.err
            assert json.loads((tmp_path / "e.json").read_text())["accuracy"] == 0.1
            assert call("predict", tmp_path / name, "--test", 3, *flags).status == 0


def test_mirror_images_count_as_in_the_run(trained, tmp_path, call, no_figures):
    (logits, labels), (both, _) = by_hand(trained), by_hand(trained, flip=True)
    model, _ = checkpoint.load_model(trained / LAST)
    mirrored = model.predict(load("digits").test_images[:, :, ::-1])
    np.testing.assert_allclose(both, (logits + mirrored) / 2, rtol=1e-4, atol=1e-5)
    facts = {}
    flags = ["--config", "tests/tiny.toml", "--quiet", "--epochs", 1, "--test-flip", "--out", tmp_path / "run"]
    assert call("train", *flags).status == 0
    for name, path, *more in (("own", trained), ("asked", trained, "--flip"), ("run", tmp_path / "run"),
                              ("refused", tmp_path / "run", "--no-flip")):  # fmt: skip
        ended = call("evaluate", path / LAST, "--out", tmp_path, "--json", tmp_path / "e.json", *more)
        assert ended.status == 0, ended.err
        facts[name] = json.loads((tmp_path / "e.json").read_text())
    assert facts["own"]["accuracy"] == np.mean(logits.argmax(axis=1) == labels)
    assert facts["asked"]["accuracy"] == np.mean(both.argmax(axis=1) == labels)
    assert facts["asked"]["loss"] != facts["own"]["loss"]
    summary = json.loads((tmp_path / "run" / SUMMARY).read_text())
    assert facts["run"]["loss"] == summary["test_loss"] != facts["refused"]["loss"]
    assert [f["flip"] for f in facts.values()] == [False, True, True, False]


def test_the_weights_are_chosen(trained, tmp_path, call):
    losses = {}
    for weights in ("params", "ema"):
        file = tmp_path / f"{weights}.json"
        assert call("evaluate", trained / LAST, "--weights", weights, "--out", tmp_path, "--json", file).status == 0
        facts = json.loads(file.read_text())
        logits, labels = by_hand(trained, weights)
        assert facts["weights"] == weights and facts["accuracy"] == np.mean(logits.argmax(axis=1) == labels)
        losses[weights] = facts["loss"]
    assert losses["params"] != losses["ema"]


def test_the_figure_goes_beside_the_checkpoint(run_copy, call):
    ended = call("evaluate", run_copy / LAST)
    assert ended.status == 0 and f"confusion matrix in {run_copy / 'confusion-last.png'}" in ended.out
    assert (run_copy / "confusion-last.png").exists()


def test_images_of_another_size_are_refused(trained, tmp_path, call, monkeypatch):
    data = load("digits")
    larger = data._replace(
        train_images=np.repeat(data.train_images, 2, 1), test_images=np.repeat(data.test_images, 2, 1)
    )
    monkeypatch.setattr(source, "load", lambda *arguments, **keywords: larger)
    ended = call("evaluate", trained / LAST, "--out", tmp_path / "new")
    assert ended.status == 2 and "takes 8x8x1 images of 10 classes; digits has 16x8x1 images of 10" in ended.err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("data", ["folder", "imagefolder"])
def test_reassessed_labels(tmp_path, call, no_figures, data):
    """Validation images lie by class, not by number: their names say which labels are theirs."""
    rng = np.random.default_rng(0)
    for k, name in enumerate(("n01440764", "n01443537")):
        for split in ("train", "test"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(3):
                file = f"ILSVRC2012_val_{2 * i + 2 - k:08d}.PNG"
                Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(
                    tmp_path / "data" / split / name / file
                )
    run = tmp_path / "run"
    flags = ["--data", data, "--data-dir", tmp_path / "data", "--config", "tests/tiny.toml", "--quiet", "--epochs", 1]
    assert call("train", *flags, "--image-size", 8, "--out", run).status == 0
    model, _ = checkpoint.load_model(run / LAST)
    guesses = model.predict(load(data, tmp_path / "data", image_size=8).test_images[:]).argmax(axis=1)
    truth = dict(zip([2, 4, 6, 1, 3, 5], guesses.tolist(), strict=True))  # by the numbers of the files
    real = [[truth[1]], [], [1 - truth[3]], [0, 1], [truth[5]], [1 - truth[6]]]
    (tmp_path / "real.json").write_text(json.dumps(real))
    ended = call("evaluate", run / LAST, "--real", tmp_path / "real.json", "--json", tmp_path / "e.json")
    facts = json.loads((tmp_path / "e.json").read_text())
    assert ended.status == 0 and facts["real_accuracy"] == 0.6 and facts["real_images"] == 5
    assert "ReaL       60.00% of the 5 images" in ended.out


def test_reassessed_labels_are_imagenets(trained, tmp_path, call):
    (tmp_path / "real.json").write_text("[[1]]")
    ended = call("evaluate", trained / LAST, "--real", tmp_path / "real.json", "--out", tmp_path / "new")
    assert ended.status == 2 and "ImageNet's validation images" in ended.err and not (tmp_path / "new").exists()
