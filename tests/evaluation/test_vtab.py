"""The benchmark's protocol and its command line, on small stand-ins for the tasks."""

import json

import numpy as np
import pytest
from PIL import Image

from minivit import ViT, ViTConfig
from minivit.base.errors import InputError
from minivit.evaluation import transfer
from minivit.evaluation.vtab import (
    ARRAYS,
    FINE_TUNING,
    GROUPS,
    TASKS,
    find_tasks,
    fine_tune,
    fit_features,
    load_task,
    summary_of,
)
from minivit.training.folder import LAST
from minivit.weights import checkpoint

MODEL = ViTConfig(image_size=8, patch_size=4, width=8, depth=1, num_heads=2, num_classes=3, pre_logits=6)


def stand_in(n=50, m=20, K=3, size=(8, 8), channels=3, seed=0):
    """Noise whose brightness tells the class: train_images, train_labels, test_images, test_labels."""
    rng = np.random.default_rng(seed)
    arrays = []
    for count in (n, m):
        labels = rng.permutation(np.arange(count) % K)
        level = 30 + 60 * labels[:, None, None, None]
        arrays += [(level + rng.integers(0, 80, (count, *size, channels))).astype(np.uint8), labels]
    return dict(zip(ARRAYS, arrays, strict=True))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "vtab").mkdir()
    np.savez(tmp_path / "vtab" / "svhn.npz", **stand_in(seed=1))
    np.savez(tmp_path / "vtab" / "dmlab.npz", **stand_in(K=2, seed=2))
    in_folders(tmp_path / "vtab" / "pets", stand_in(K=2, seed=3))
    return tmp_path / "vtab"


def in_folders(root, arrays):
    """A task's images as files; each file's name tells its row."""
    for split in ("train", "test"):
        for i, (image, k) in enumerate(zip(arrays[f"{split}_images"], arrays[f"{split}_labels"], strict=True)):
            path = root / split / f"breed{k}" / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)


def refused(message, *arguments, **settings):
    with pytest.raises(InputError, match=message) as caught:
        load_task(*arguments, **settings)
    assert "\n" not in str(caught.value)


def test_nineteen_tasks_in_three_groups():
    assert [len(names) for names in GROUPS.values()] == [7, 4, 8] and len(set(TASKS)) == 19
    assert GROUPS["specialized"] == ("camelyon", "eurosat", "resisc45", "retinopathy")
    assert {"svhn", "pets", "caltech101"} < set(GROUPS["natural"]) and "kitti-dist" in GROUPS["structured"]


def test_tasks_are_found(folder, tmp_path):
    assert find_tasks(folder) == ["pets", "svhn", "dmlab"]
    for empty in (tmp_path / "nowhere", folder / "pets"):
        with pytest.raises(InputError, match="there is no folder|has none of the tasks"):
            find_tasks(empty)


def test_exactly_as_many_examples_stay_in_their_order(folder):
    given, data = stand_in(seed=1), load_task(folder, "svhn", MODEL, examples=50)
    for array, key in zip(data[1:5], ARRAYS, strict=True):
        np.testing.assert_array_equal(array, given[key])
    assert data.name == "svhn" and len(data.class_names) == 3


def test_of_more_examples_some_are_drawn(folder):
    given = stand_in(seed=1)
    drawn = [load_task(folder, "svhn", MODEL, examples=40, seed=seed) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0].train_images, drawn[1].train_images)
    assert not np.array_equal(drawn[0].train_labels, drawn[2].train_labels)
    pairs = {image.tobytes(): label for image, label in zip(given["train_images"], given["train_labels"], strict=True)}
    found = [pairs[image.tobytes()] for image in drawn[0].train_images]
    assert found == drawn[0].train_labels.tolist() and len({i.tobytes() for i in drawn[0].train_images}) == 40
    np.testing.assert_array_equal(drawn[0].test_images, given["test_images"])  # all of them count
    refused("svhn .* has 50 training examples, the protocol takes 1000", folder, "svhn", MODEL)


def test_folders_and_other_sizes(folder):
    assert load_task(folder, "pets", MODEL, examples=50).train_images.shape == (50, 8, 8, 3)
    arrays = stand_in(size=(12, 20), channels=1)
    np.savez(folder / "dspr-loc.npz", **arrays)
    data = load_task(folder, "dspr-loc", MODEL, examples=50)
    assert data.train_images.shape == (50, 8, 8, 3) and data.test_images.shape == (20, 8, 8, 3)
    expected = Image.fromarray(arrays["test_images"][7, :, :, 0]).resize((8, 8), Image.Resampling.BILINEAR)
    for channel in range(3):
        np.testing.assert_array_equal(data.test_images[7, :, :, channel], expected)


def test_images_of_folders_are_scaled_as_those_of_arrays(folder):
    """Nothing is cut off: what a label speaks of may be at the edge."""
    arrays = stand_in(size=(12, 20))
    arrays["test_images"][:, :, :3] = 255
    in_folders(folder / "kitti-dist", arrays)
    np.savez(folder / "dspr-loc.npz", **arrays)
    files, whole = (load_task(folder, name, MODEL, examples=50) for name in ("kitti-dist", "dspr-loc"))
    order = np.argsort(whole.test_labels, kind="stable")  # class by class, then by name
    np.testing.assert_array_equal(files.test_labels, whole.test_labels[order])
    np.testing.assert_array_equal(files.test_images, whole.test_images[order])
    assert (files.test_images[:, :, 0] > 200).all()
    found, given = ({image.tobytes() for image in data.train_images} for data in (files, whole))
    assert found == given


def test_examples_of_folders_are_in_random_order(folder):
    """The last fifth, on which penalties are chosen, has every class, and so have the others."""
    arrays = stand_in(n=100, m=60, K=6)
    in_folders(folder / "caltech101", arrays)
    data, again, other = (load_task(folder, "caltech101", MODEL, examples=100, seed=seed) for seed in (0, 0, 1))
    assert set(data.train_labels[80:]) == set(data.train_labels[:80]) == set(range(6))
    np.testing.assert_array_equal(data.train_images, again.train_images)
    assert not np.array_equal(data.train_labels, other.train_labels)
    pairs = zip(arrays["train_images"], arrays["train_labels"], strict=True)
    pairs = {image.tobytes(): label for image, label in pairs}
    assert [pairs[image.tobytes()] for image in data.train_images] == data.train_labels.tolist() and len(pairs) == 100
    rng = np.random.default_rng(0)
    train, test = (  # what tells the classes is small beside what all features share: large penalties never see it
        np.eye(6)[labels] + 0.1 * rng.standard_normal((len(labels), 6)) + 10 * rng.standard_normal((len(labels), 1))
        for labels in (data.train_labels, data.test_labels)
    )
    for method, largest in (("probe", max(transfer.PENALTIES)), ("fewshot", 2.0**20)):
        score, l2 = fit_features(method, train, test, data)
        assert l2 < largest / 10 and score > 0.9


@pytest.mark.parametrize("change, message", [
    ({"train_labels": None}, "lacks an array: it must hold train_images, train_labels, test_images, test_labels"),
    ({"test_labels": np.zeros(20)}, "test_labels must be whole numbers"),
    ({"train_labels": np.zeros((50, 1), int)}, "train_labels must be whole numbers"),
    ({"train_images": np.zeros((50, 8, 8, 3))}, "holds float64"),
    ({"test_images": np.zeros((7, 8, 8, 3), np.uint8)}, r"holds \(20,\) labels for \(7, 8, 8, 3\)"),
    ({"train_labels": np.full(50, -1)}, "has labels from -1"),
    ({"train_labels": np.zeros(0, int), "train_images": np.zeros((0, 8, 8, 3), np.uint8)}, "is empty"),
])  # fmt: skip
def test_arrays_that_do_not_fit(folder, change, message):
    arrays = {key: value for key, value in (stand_in() | change).items() if value is not None}
    np.savez(folder / "svhn.npz", **arrays)
    refused(message, folder, "svhn", MODEL, examples=50)


def test_what_cannot_be_read(folder):
    refused("there is no task eurosat in .*: neither eurosat.npz nor a folder", folder, "eurosat", MODEL)
    content = (folder / "svhn.npz").read_bytes()
    for damaged in (b"", b"hello", content[:-100], content[:3000] + b"x" + content[3001:]):
        (folder / "svhn.npz").write_bytes(damaged)
        refused("svhn.npz is truncated, altered or not a file of arrays", folder, "svhn", MODEL)
    np.savez(folder / "svhn.npz", **stand_in(channels=2))
    refused("has images of 2 channels, the model takes 3", folder, "svhn", MODEL, examples=50)


def test_penalties_are_chosen_on_the_last_fifth(folder):
    data = load_task(folder, "svhn", MODEL, examples=50)
    rng = np.random.default_rng(0)
    train, test = (
        labels[:, None] * np.ones(4) + 1.2 * rng.standard_normal((len(labels), 4))
        for labels in (data.train_labels, data.test_labels)
    )
    for method, fit in (("probe", transfer.logistic), ("fewshot", transfer.least_squares)):
        score, l2 = fit_features(method, train, test, data)
        penalties = transfer.PENALTIES if method == "probe" else [4.0**k for k in range(11)]
        held_out = {}
        for penalty in penalties:
            fitted = fit(train[:40], data.train_labels[:40], 3, l2=penalty)
            held_out[penalty] = np.mean(fitted.scores(train[40:]).argmax(axis=1) == data.train_labels[40:])
        assert l2 == max(p for p in penalties if held_out[p] == max(held_out.values()))
        all_of_them = fit(train, data.train_labels, 3, l2=l2)
        assert score == np.mean(all_of_them.scores(test).argmax(axis=1) == data.test_labels) > 0.4


def test_fine_tuning_starts_where_the_model_is(folder, tmp_path, no_figures):
    model = ViT(MODEL)
    model.flat += 0.3 * np.random.default_rng(0).standard_normal(model.flat.shape).astype(np.float32)
    data = load_task(folder, "dmlab", MODEL, examples=50)
    fine_tune(model, data, tmp_path / "run", steps=1, lr=0.0, progress=False)
    begun, _ = checkpoint.load_model(tmp_path / "run" / "last.npz")
    assert begun.config.num_classes == 2 and begun.config.pre_logits == 0
    for name, value in begun.params.items():
        np.testing.assert_array_equal(value, 0.0 if name.startswith("head.") else model.params[name])


def test_fine_tuning_learns_and_goes_on_where_it_stopped(folder, tmp_path, no_figures):
    model, data = ViT(MODEL, seed=3), load_task(folder, "svhn", MODEL, examples=50)
    settings = {"steps": 40, "batch_size": 20, "lr": 0.1, "progress": False, "checkpoint_seconds": 0.0}
    whole = fine_tune(model, data, tmp_path / "whole", **settings)
    assert whole["steps"] == 40 and whole["epochs"] == 14  # of three steps
    assert whole["test_accuracy"] > 0.8
    train = whole["settings"]["train"]
    assert {key: train[key] for key in FINE_TUNING} == FINE_TUNING | {"lr": 0.1}
    assert train["warmup_steps"] == 8  # a fifth, as 500 of 2,500
    again = fine_tune(model, data, tmp_path / "whole", **settings)
    assert again["test_accuracy"] == whole["test_accuracy"] and again["train_seconds"] == whole["train_seconds"]
    with pytest.raises(InputError, match="began with other parameters: crc .*another --out"):
        fine_tune(ViT(MODEL, seed=4), data, tmp_path / "whole", **settings)
    with pytest.raises(InputError, match="trained with other settings: lr 0.1 there"):
        fine_tune(model, data, tmp_path / "whole", **(settings | {"lr": 0.2}))


def test_means_by_hand():
    summary = summary_of({"svhn": 0.5, "pets": 0.7, "eurosat": 0.9, "dmlab": 0.1})
    assert summary["mean"] == pytest.approx(0.55)
    assert summary["groups"]["natural"] == {"mean": pytest.approx(0.6), "tasks": 2, "of": 7}
    assert summary["groups"]["specialized"]["mean"] == 0.9 and summary["groups"]["structured"]["mean"] == 0.1
    assert list(summary["tasks"]) == ["pets", "svhn", "eurosat", "dmlab"]
    assert len(summary["missing"]) == 15 and "caltech101" in summary["missing"] and "svhn" not in summary["missing"]
    assert summary_of({"svhn": 0.5})["groups"]["structured"] == {"mean": None, "tasks": 0, "of": 8}


@pytest.fixture
def start(tmp_path):
    """A checkpoint of a model that was not trained."""
    model = ViT(MODEL)
    arrays = checkpoint.named_arrays("params", model.flat, model.table)
    checkpoint.save(tmp_path / LAST, arrays, checkpoint.model_meta(MODEL))
    return tmp_path / LAST


@pytest.mark.parametrize("method", ["probe", "fewshot", "finetune"])
def test_the_script(folder, start, tmp_path, call, method, no_figures):
    flags = ["--data-dir", folder, "--examples", 50, "--method", method, "--workers", 1]
    ended = call("vtab", start, *flags, "--steps", 30, "--batch-size", 25, "--lr", 0.1)
    assert ended.status == 0 and ended.err == "", ended.err
    found = json.loads((tmp_path / "vtab" / f"vtab-{method}.json").read_text())
    assert (tmp_path / "vtab" / f"vtab-{method}.png").read_bytes().startswith(b"\x89PNG")
    assert list(found["tasks"]) == ["pets", "svhn", "dmlab"] and len(found["missing"]) == 16
    scores = [each["accuracy"] for each in found["tasks"].values()]
    assert found["mean"] == pytest.approx(np.mean(scores)) and min(scores) > 0.6
    assert "natural" in ended.out and "2 of 7 tasks" in ended.out and "missing: caltech101, cifar100" in ended.out
    if method == "finetune":
        assert found["tasks"]["svhn"]["steps"] == 30 and (tmp_path / "vtab" / "svhn" / LAST).exists()
    else:
        model, _ = checkpoint.load_model(start)
        data = load_task(folder, "svhn", MODEL, examples=50)
        features = (model.features(images) for images in (data.train_images, data.test_images))
        assert found["tasks"]["svhn"]["accuracy"] == pytest.approx(fit_features(method, *features, data)[0], abs=0.06)


@pytest.mark.parametrize("flags, message", [
    (["--tasks", "svhn", "eurosat"], "there is no task eurosat in"),
    (["--tasks", "mnist"], "invalid choice: 'mnist'"),
    (["--examples", "51"], "has 50 training examples, the protocol takes 51"),
    (["--examples", "4"], "--examples must be at least 5"),
    (["--steps", "0"], "--steps at least 1"),
    (["--data-dir", "nowhere"], "there is no folder nowhere"),
])  # fmt: skip
def test_what_the_script_refuses(folder, start, tmp_path, call, flags, message):
    ended = call("vtab", start, "--data-dir", folder, "--examples", 50, *flags)
    assert ended.status == 2 and ended.err.startswith("error: ") and ended.err.count("\n") == 1
    assert message in ended.err and not (tmp_path / "vtab" / "vtab-probe.json").exists()
