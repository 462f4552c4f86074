"""The command line ``minivit transfer``: its table and files against the functions, and what it refuses."""

import json

import numpy as np
import pytest
from PIL import Image

from minivit import ViT
from minivit.data import load
from minivit.evaluation import transfer
from minivit.evaluation.inference import predict_all
from minivit.training.folder import LAST
from minivit.weights import checkpoint

DATA = load("digits")


def features(model):
    """Of all images, in the script's cuts: a penalty is chosen by counts of guesses, which a rounding may decide."""
    found = [predict_all(model, images, workers=1, features=True) for images in (DATA.train_images, DATA.test_images)]
    np.testing.assert_allclose(found[1], model.features(DATA.test_images), rtol=1e-4, atol=1e-5)
    return found


def test_few_shot(trained, tmp_path, call):
    ended = call("transfer", trained / LAST, "--out", tmp_path, "--shots", 5, 2, 5, "--seeds", 4, 1, "--untrained",
                 "--pixels", "--workers", 1)  # fmt: skip
    assert ended.status == 0 and ended.err == "", ended.err
    results = json.loads((tmp_path / "transfer-fewshot-digits.json").read_text())
    assert (tmp_path / "transfer-fewshot-digits.png").read_bytes().startswith(b"\x89PNG")
    model, _ = checkpoint.load_model(trained / LAST)
    pixels = [images.reshape(len(images), 64) / 127.5 - 1 for images in (DATA.train_images, DATA.test_images)]
    kinds = {"trained": features(model), "untrained": features(ViT(model.config, seed=0)), "pixels": pixels}
    assert [row["features"] for row in results["rows"]] == list(kinds)
    for row, (train, test) in zip(results["rows"], kinds.values(), strict=True):
        assert row["dimensions"] == train.shape[1]
        assert [each["shots"] for each in row["accuracies"]] == [2, 5]
        for each in row["accuracies"]:
            found = []
            for one, seed in zip(each["runs"], (1, 4), strict=True):
                rows = transfer.few_shot_rows(DATA.train_labels, 10, each["shots"], seed=seed)
                fitted = transfer.least_squares(train[rows], DATA.train_labels[rows], 10)
                found.append(np.mean(fitted.scores(test).argmax(axis=1) == DATA.test_labels))
                assert one["seed"] == seed and one["accuracy"] == pytest.approx(found[-1], abs=1 / 360)
            assert each["mean"] == pytest.approx(np.mean(found), abs=1 / 360)
            assert each["spread"] == pytest.approx(np.std(found, ddof=1), abs=2 / 360)
            assert f"{each['mean']:.2%} ± {100 * each['spread']:.2f}" in ended.out
    trained_row, untrained_row, _ = (row["accuracies"][-1]["mean"] for row in results["rows"])
    assert trained_row > untrained_row > 0.1 and results["l2"] == 1024


def test_probe(trained, tmp_path, call):
    assert call("transfer", trained / LAST, "--out", tmp_path, "--method", "probe", "--seeds", 0).status == 0
    (row,) = json.loads((tmp_path / "transfer-probe-digits.json").read_text())["rows"]
    (one,) = row["accuracies"][0]["runs"]
    model, _ = checkpoint.load_model(trained / LAST)
    train, test = features(model)
    chosen = transfer.probe(train, DATA.train_labels, 10)
    expected = transfer.accuracy(chosen.classifier.scores(test), DATA.test_labels)
    assert one["l2"] == chosen.l2 and one["accuracy"] == pytest.approx(expected, abs=1 / 360)
    own = np.mean(model.predict(DATA.test_images).argmax(axis=1) == DATA.test_labels)
    assert one["accuracy"] > own  # three epochs left the head far from its best
    assert not (tmp_path / "transfer-probe-digits.png").exists()


def test_neighbours(trained, tmp_path, call):
    ended = call("transfer", trained / LAST, "--out", tmp_path, "--method", "knn", "--k", 3, "--temperature", 0.2)
    assert ended.status == 0, ended.err
    results = json.loads((tmp_path / "transfer-knn-digits.json").read_text())
    train, test = features(checkpoint.load_model(trained / LAST)[0])
    votes = transfer.nearest_neighbours(train, DATA.train_labels, test, 10, k=3, temperature=0.2)
    expected = transfer.accuracy(votes, DATA.test_labels)
    assert results["k"] == 3 and results["rows"][0]["accuracies"][0]["mean"] == pytest.approx(expected, abs=1 / 360)


def test_classes_that_the_model_was_not_trained_for(trained, tmp_path, call):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name, grey in (("dark", 20), ("light", 200)):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(3):
                noise = rng.integers(grey, grey + 40, (9, 9, 3), dtype=np.uint8)
                Image.fromarray(noise).save(tmp_path / "data" / split / name / f"{i}.png")
    flags = ["--data", "folder", "--data-dir", tmp_path / "data", "--out", tmp_path]
    ended = call("transfer", trained / LAST, *flags)
    assert ended.status == 2 and "8x8x3 images of 2" in ended.err  # the digits have one channel
    run = [*flags[:4], "--config", "tests/tiny.toml", "--quiet", "--epochs", 1, "--out", tmp_path / "run"]
    assert call("train", *run, "--image-size", 8).status == 0
    (tmp_path / "data" / "train" / "dark").rename(tmp_path / "data" / "train" / "night")  # other names, other classes
    (tmp_path / "data" / "test" / "dark").rename(tmp_path / "data" / "test" / "night")
    ended = call("transfer", tmp_path / "run" / LAST, *flags, "--shots", 1, 50)
    assert ended.status == 0 and "a class has 3 training images" in ended.err
    assert json.loads((tmp_path / "transfer-fewshot-folder.json").read_text())["classes"] == 2


@pytest.mark.parametrize("flags, message", [
    (["--shots", "0"], "--shots must be at least 1"),
    (["--seeds", "-1"], "--seeds at least 0"),
    (["--method", "knn", "--k", "5000"], "k must be at least 1 and at most 1437"),
    (["--method", "knn", "--temperature", "0"], "temperature must be above 0"),
    (["--method", "guess"], "invalid choice: 'guess'"),
    (["--data", "cifar10", "--data-dir", "nowhere"], "nowhere"),
])  # fmt: skip
def test_what_is_refused(trained, tmp_path, call, flags, message):
    ended = call("transfer", trained / LAST, "--out", tmp_path / "new", *flags)
    assert ended.status == 2 and ended.err.startswith("error: ") and message in ended.err
    assert ended.err.count("\n") == 1 and not (tmp_path / "new").exists()
