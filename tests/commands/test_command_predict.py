"""The command line ``minivit predict``: images from files, arrays and the test set; what it says and draws."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, assert_same_guesses, load_script
from PIL import Image

from minivit.data import load
from minivit.layers.softmax import softmax_forward
from minivit.model import intermediates
from minivit.training.folder import LAST
from minivit.weights import checkpoint

DATA = load("digits")


def probabilities(run, image):
    """Of the image alone, in the form that the script writes: all classes, the likeliest first."""
    p = softmax_forward(checkpoint.load_model(run / LAST)[0].predict(image[None]))[0][0]
    return [{"name": str(k), "probability": float(p[k])} for k in np.argsort(-p, kind="stable")]


def predictions(call, run, out, *arguments):
    """Call the script; returns the predictions of its JSON file."""
    ended = call("predict", run / LAST, *arguments, "--out", out, "--json", out / "p.json")
    assert ended.status == 0 and ended.err == "", ended.err
    facts = json.loads((out / "p.json").read_text())["predictions"]
    for each in facts:
        assert Path(each["figure"]).read_bytes().startswith(b"\x89PNG") and f"{each['image']}" in ended.out
    return facts


def test_images_of_the_test_set(trained, tmp_path, call):
    facts = predictions(call, trained, tmp_path, "--test", 0, 359)
    assert [each["image"] for each in facts] == ["test-0", "test-359"]
    for each, index in zip(facts, (0, 359), strict=True):
        assert_same_guesses(each["top"], probabilities(trained, DATA.test_images[index])[:5])
        assert each["truth"] == str(DATA.test_labels[index])
    assert {p.name for p in tmp_path.iterdir()} == {"prediction-test-0.png", "prediction-test-359.png", "p.json"}


def test_an_image_file_is_the_array_it_shows(trained, tmp_path, call):
    image = DATA.test_images[5]
    Image.fromarray(image[..., 0]).save(tmp_path / "gray.png")
    Image.fromarray(np.repeat(image, 3, axis=2)).save(tmp_path / "rgb.PNG")
    np.save(tmp_path / "flat.npy", image[..., 0])
    np.save(tmp_path / "deep.npy", image)
    np.save(tmp_path / "float.npy", (image.astype(np.float64) - 127.5) / 127.5)
    names = ["gray.png", "rgb.PNG", "flat.npy", "deep.npy", "float.npy"]
    facts = predictions(call, trained, tmp_path, *(tmp_path / name for name in names), "--test", 5)
    for each in facts[:-1]:
        assert_same_guesses(each["top"], facts[-1]["top"])


def test_dark_ink_is_inverted(trained, tmp_path, call):
    image = DATA.test_images[5]
    np.save(tmp_path / "a.npy", 255 - image)
    np.save(tmp_path / "b.npy", -(image.astype(np.float32) - 127.5) / 127.5)
    facts = predictions(call, trained, tmp_path, tmp_path / "a.npy", tmp_path / "b.npy", "--test", 5, "--invert")
    for each in facts[:2]:
        assert_same_guesses(each["top"], facts[2]["top"])


def test_one_channel_is_the_luminance(tmp_path):
    predict = load_script("predict")
    Image.fromarray(np.broadcast_to(np.uint8([255, 0, 0]), (9, 9, 3)).copy()).save(tmp_path / "red.png")
    assert (predict.file_image(tmp_path / "red.png", 4, 1) == round(0.299 * 255)).all()
    Image.fromarray(np.full((9, 9, 3), 255, np.uint8)).save(tmp_path / "white.png")
    assert (predict.file_image(tmp_path / "white.png", 4, 1) == 255).all()
    assert predict.file_image(tmp_path / "red.png", 4, 3).tolist() == [[[255, 0, 0]] * 4] * 4


def test_images_of_one_name_do_not_overwrite_each_other(trained, tmp_path, call):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "x y.npy", DATA.test_images[3])
    facts = predictions(call, trained, tmp_path, tmp_path / "a/x y.npy", tmp_path / "b/x y.npy")
    assert [each["figure"].rpartition("/")[2] for each in facts] == [
        "prediction-x_y.png",
        "prediction-x_y-2.png",
    ]


@pytest.mark.parametrize("options", [[], ["--registers", 2], ["--registers", 2, "--pooling", "seq", "--qk-norm"]])
def test_a_model_without_a_class_token_or_with_registers(tmp_path, call, no_figures, options):
    flags = [*TINY, "--pooling", "mean", "--epochs", 1, "--out", tmp_path / "run", "--layer-scale", 0.1, *options]
    assert call("train", *flags).status == 0
    assert len(predictions(call, tmp_path / "run", tmp_path, "--test", 0)) == 1


@pytest.mark.parametrize(
    "options",
    [
        ["--pos-embed", "learned2d", "--pos-at", "every", "--registers", 1, "--layer-decay", 0.8],
        ["--pos-at", "shared", "--init", "mimetic", "--whiten"],
        ["--pos-embed", "relative", "--pos-at", "every", "--optimizer", "muon"],
        ["--pos-embed", "relative", "--pos-at", "shared", "--recompute", "--check-finite"],
        ["--attention", "axial", "--pooling", "seq", "--drop-path", 0.1, "--init", "mimetic"],
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_a_model_with_other_positions_or_axial_attention(tmp_path, call, no_figures, options):
    """It trains, and shows what it looks at."""
    flags = [*TINY, "--depth", 2, "--patch-size", 2, *options]
    ended = call("train", *flags, "--epochs", 1, "--out", tmp_path / "run")
    assert ended.status == 0, ended.err
    assert len(predictions(call, tmp_path / "run", tmp_path, "--test", 0)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pos-embed", "relative"], 'with pos_embed "relative", pos_at must be "every" or "shared", got "input"'),
        (["--pos-at", "blocks"], "pos_at must be one of input, every, shared; got 'blocks'"),
        (["--attention", "axial"], 'attention "axial" is between patches alone: set pooling to "mean", "avg" or "seq"'),
        (["--pos-embed", "learned2d", "--half-size", 1], "of half the size need fixed positions"),
    ],
    ids=lambda options: " ".join(map(str, options)) if isinstance(options, list) else "",
)
def test_positions_that_cannot_be_are_one_line(tmp_path, call, options, message):
    ended = call("train", *TINY, "--epochs", 1, "--out", tmp_path / "run", *options)
    assert ended.status == 2 and ended.err.startswith("error: ") and message in ended.err
    assert ended.err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_figures_go_beside_the_checkpoint(run_copy, call):
    ended = call("predict", run_copy / LAST, "--test", 1)
    assert ended.status == 0 and (run_copy / "prediction-test-1.png").exists()
    assert f"1 figure in {run_copy}" in ended.out


def test_the_weights_are_chosen(trained, tmp_path, call):
    facts = [predictions(call, trained, tmp_path, "--test", 0, "--weights", w)[0]["top"] for w in ("params", "ema")]
    assert facts[0] != facts[1]


def test_attention_of_the_last_block_or_of_all(trained, tmp_path, call, monkeypatch):
    from minivit import figures

    drawn = []
    monkeypatch.setattr(
        figures,
        "save_attention",
        lambda path, image, map_, *_, what, **__: (path.write_bytes(b""), drawn.append((map_, what))),
    )
    for more in ([], ["--attention", "last"], ["--attention", "rollout"]):
        ended = call("predict", trained / LAST, "--test", 5, "--out", tmp_path, *more)
        assert ended.status == 0, ended.err
    model = checkpoint.load_model(trained / LAST)[0]
    (attention,) = intermediates(model, DATA.test_images[5:6]).attention  # one block, with a class token
    row = attention[0].mean(axis=0)[0, 1:].reshape(2, 2)
    for (map_, what), scale, said in zip(drawn, (1, 1, 0.5), ("last", "last", "rollout"), strict=True):
        np.testing.assert_allclose(map_, scale * row, rtol=1e-5)  # (A + I) / 2: the patches have half of the rollout
        assert said in what
    ended = call("predict", trained / LAST, "--test", 5, "--attention", "first")
    assert ended.status == 2 and ended.err.count("\n") == 1
