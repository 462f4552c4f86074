"""Runs, predictions and commands on images that stay files until a batch needs them."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
from conftest import TINY
from image_folders import CLASSES, make_images, refused
from strict_cupy import installed, ndarray

from minivit import ViTConfig
from minivit.base.backend import plain, to_host
from minivit.data import LazyImages, load, take
from minivit.data.loader import batches
from minivit.evaluation.inference import predict_all
from minivit.figures.runs import draw_masked
from minivit.masked import MaskedConfig, MaskedViT
from minivit.masked.pretrain import MaskedPrediction, chance_of, masked_loss, measure, plan_of_test
from minivit.model import ViT
from minivit.training.budget import seconds_of_training
from minivit.training.config import TrainConfig
from minivit.training.engines.cpu import Engine
from minivit.training.engines.gpu import CudaEngine
from minivit.training.folder import LAST, RECONSTRUCTIONS, last_checkpoint
from minivit.training.recipes import read_recipe, trainer_of
from minivit.training.trainer import Trainer
from minivit.weights.checkpoint import load as load_checkpoint

MODEL = ViTConfig(image_size=8, patch_size=4, width=8, depth=1, num_heads=2, num_classes=3)
TRAIN = TrainConfig(
    epochs=3, batch_size=5, crop_area=0.3, flip=True, test_flip=True, workers=2, checkpoint_seconds=0.0,
    log_every=1, mixup=0.5,
)  # fmt: skip


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The images of `make_images`. Read them; those of `root` are for writing."""
    return make_images(tmp_path_factory.mktemp("imagenet"))


@pytest.fixture
def root(tmp_path, shared):
    return shutil.copytree(shared, tmp_path / "imagenet")


def test_a_resumed_run_is_the_uninterrupted_one(shared, tmp_path, no_figures):
    """Stopped in the middle of an epoch, with crops and mixing: the same bits at the end."""
    data = load("imagefolder", shared, image_size=8)
    assert Trainer(data, MODEL, TRAIN, tmp_path / "whole", progress=False).run()
    broken = Trainer(data, MODEL, TRAIN, tmp_path / "broken", progress=False)
    save = broken.save
    broken.save = lambda *names: (save(*names), broken.state.step == 4 and broken.stop("half way"))
    assert broken.run() is None and broken.state.step == 5 and broken.state.batch == 2
    data = load("imagefolder", shared, image_size=8)
    again = Trainer(
        data, MODEL, TRAIN, tmp_path / "broken", resume=last_checkpoint(tmp_path / "broken"), progress=False
    )  # fmt: skip
    assert again.run()
    (one, meta), (other, same) = (load_checkpoint(tmp_path / name / LAST) for name in ("whole", "broken"))
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])
    assert meta["progress"]["running"] == same["progress"]["running"] and meta["data"] == same["data"]


def test_predictions_are_those_of_the_same_images_in_memory(shared):
    model = ViT(MODEL)
    model.flat += 0.3 * np.random.default_rng(0).standard_normal(model.flat.shape).astype(np.float32)
    lazy = load("imagefolder", shared, image_size=8).test_images
    for settings in ({}, {"flip": True}, {"features": True}):
        lazily, held = (predict_all(model, images, workers=2, micro_batch=2, **settings) for images in (lazy, lazy[:]))
        np.testing.assert_array_equal(lazily, held)


def test_images_that_are_files_are_read_on_the_host(shared):
    """Their batches arrive on the device, cut and augmented as on the host; predictions take them in parts."""
    lazy = take(load("imagefolder", shared, image_size=8).train_images, slice(5))
    labels, order = np.arange(5), np.array([4, 0, 3, 1, 2])
    settings = {"seed": 0, "epoch": 1, "prefetch": 0, "crop_area": 0.3, "flip": True, "crop_padding": 1}
    with installed() as cupy, plain():
        found = list(batches(lazy, cupy.asarray(labels), order, 2, **settings))
        model = ViT(MODEL, flat=cupy.asarray(ViT(MODEL).flat))
        features = CudaEngine(model, micro_batch=2).predict(lazy, features=True)
    for (_, images, truth), (_, ours, own) in zip(found, batches(lazy, labels, order, 2, **settings), strict=True):
        assert type(images) is type(truth) is ndarray
        np.testing.assert_array_equal(to_host(images), ours)
        np.testing.assert_array_equal(to_host(truth), own)
    assert type(features) is ndarray and features.shape == (5, 8)
    np.testing.assert_allclose(to_host(features), ViT(MODEL).features(lazy[:]), rtol=1e-4, atol=1e-5)


def test_a_budget_reads_the_files_too(shared, monkeypatch):
    data = load("imagefolder", shared, image_size=8)
    read, seen = LazyImages.read, []

    def counted(self, rows, **settings):
        if settings.get("draws") is not None:
            seen.append(len(rows))
        return read(self, rows, **settings)

    monkeypatch.setattr(LazyImages, "read", counted)
    assert seconds_of_training(data, MODEL, TRAIN, 2) > 0.0
    assert seen == [5, 5]


def test_the_scripts(root, tmp_path, call, no_figures):
    flags = [
        "--data",
        "imagefolder",
        "--data-dir",
        root,
        "--config",
        "tests/tiny.toml",
        "--quiet",
        "--out",
        tmp_path / "run",
    ]
    ended = call("train", *flags, "--epochs", 2, "--image-size", 8, "--crop-padding", 0, "--crop-area", 0.2)
    assert ended.status == 0 and "12 training and 6 test images of 8x8x3, 3 classes" in ended.out, ended.err
    ended = call("evaluate", tmp_path / "run" / LAST, "--json", tmp_path / "e.json")
    assert ended.status == 0 and ended.err == "", ended.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert json.loads((tmp_path / "e.json").read_text())["accuracy"] == summary["test_accuracy"]
    file = root / "val" / CLASSES[0] / "ILSVRC2012_val_00000001.JPEG"
    ended = call("predict", tmp_path / "run" / LAST, file, "--test", 0, "--json", tmp_path / "p.json")
    from_file, from_set = json.loads((tmp_path / "p.json").read_text())["predictions"]
    assert ended.status == 0 and from_file["top"] == from_set["top"]
    assert call("transfer", tmp_path / "run" / LAST, "--shots", 1, "--pixels").status == 0
    ended = call("data", "info", "imagefolder", "--data-dir", root, "--image-size", 8, "--json", tmp_path / "i.json")
    facts = json.loads((tmp_path / "i.json").read_text())
    whole = load("imagefolder", root, image_size=8).train_images[:] / 255
    np.testing.assert_allclose(facts["channel_mean"], whole.mean(axis=(0, 1, 2)), rtol=1e-9)
    assert facts["image_shape"] == [8, 8, 3] and facts["classes"][1] == {"name": CLASSES[1], "train": 4, "test": 2}
    path = root / "train" / CLASSES[2] / f"{CLASSES[2]}_3.JPEG"
    path.write_bytes(b"x" * len(path.read_bytes()))
    ended = call("train", "--resume", "--out", tmp_path / "run")
    assert ended.status == 0  # it had ended; a new one meets the image
    flags[-1] = tmp_path / "new"
    ended = call("train", *flags, "--epochs", 1, "--image-size", 8, "--crop-padding", 0)
    assert ended.status == 2 and ended.err.count("\n") == 1 and f"{path.name} cannot be read" in ended.err


def test_validation_images_alone_are_there_to_be_tested_on(root, tmp_path, call, no_figures):
    flags = ["--data", "imagefolder", "--data-dir", root, "--config", "tests/tiny.toml", "--quiet", "--epochs", 1]
    flags += ["--image-size", 8, "--crop-padding", 0]
    assert call("train", *flags, "--out", tmp_path / "run").status == 0
    both = load("imagefolder", root, image_size=8)
    for path in sorted((root / "train").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    refused("train has no class folders", root)
    (root / "train").rmdir()
    alone = load("imagefolder", root, image_size=8)
    assert len(alone.train_images) == 0 and alone.class_names == CLASSES
    np.testing.assert_array_equal(alone.test_images[:], both.test_images[:])
    ended = call("evaluate", tmp_path / "run" / LAST, "--json", tmp_path / "e.json")
    assert ended.status == 0 and "not the images of its training run" in ended.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert json.loads((tmp_path / "e.json").read_text())["accuracy"] == summary["test_accuracy"]
    for script, *more in (("train", *flags), ("transfer", tmp_path / "run" / LAST), ("data", "info", *flags[1:4])):
        ended = call(script, *more, *([] if script == "data" else ["--out", tmp_path / "new"]))
        assert ended.status == 2 and "no training images" in ended.err and ended.err.count("\n") == 1, ended.err
    assert not (tmp_path / "new").exists()


def test_crops_are_refused_where_images_have_their_size(tmp_path, call):
    for words in (("train",), ("pretrain", *TINY, "--label-smoothing", 0), ("visualize", "lr")):
        ended = call(*words, "--crop-area", 0.08, "--data", "digits", "--out", tmp_path / words[0])
        assert ended.status == 2 and ended.err.startswith("error: crop_area cuts parts out of images as their files")
        assert "imagefolder alone; those of digits are in memory" in ended.err and ended.err.count("\n") == 1
        assert not list(tmp_path.glob("*/*"))
    assert not (tmp_path / "run").exists()
    assert call("train", "--crop-area", 1.5, "--out", tmp_path / "run").status == 2


@pytest.mark.parametrize("masked", [MaskedConfig(), MaskedConfig(method="mae", decoder_width=8, decoder_heads=2)])
def test_pre_training_reads_them_as_they_are_needed(tmp_path, shared, monkeypatch, masked):
    monkeypatch.setattr("minivit.masked.pretrain.CHUNK", 4)  # of 6 test images
    lazy = load("imagefolder", shared, image_size=8)
    held = lazy._replace(train_images=lazy.train_images[:], test_images=lazy.test_images[:])
    model = ViTConfig(image_size=8, patch_size=2, num_classes=3, width=8, depth=1, num_heads=1, mlp_dim=8)
    config = TrainConfig(steps=2, batch_size=4, workers=1)
    task = partial(MaskedPrediction, masked=masked)
    settings = {"task": task, "draw": draw_masked, "describe": {"data": "imagefolder"}, "progress": False}
    runs = [
        Trainer(data, model, config, tmp_path / name, **settings) for name, data in (("lazy", lazy), ("held", held))
    ]
    assert runs[0].task.chance == runs[1].task.chance and runs[0].task.chance[1] > 0
    monkeypatch.setattr("minivit.masked.pretrain.CHUNK", 500)
    plan = plan_of_test(model, masked, 6)
    np.testing.assert_allclose(chance_of(held.test_images, model, masked, plan), runs[0].task.chance)
    a, b = (run.run() for run in runs)
    assert a["test_loss"] == b["test_loss"] and (tmp_path / "lazy" / RECONSTRUCTIONS).exists()
    with Engine(runs[0].model, masked_loss, workers=1) as engine:
        here = measure(engine, runs[0].model, held.test_images, plan)
    with installed() as cupy, plain():
        there = MaskedViT(model, masked, flat=cupy.asarray(runs[0].model.flat))
        result = measure(CudaEngine(there, masked_loss), there, lazy.test_images, cupy.asarray(plan))
        assert isinstance(result.loss, ndarray)
    np.testing.assert_allclose(float(to_host(result.loss)), float(here.loss), rtol=1e-5)


@pytest.mark.parametrize("name", ["imagefolder", "folder"])
def test_a_run_that_begins_with_a_model_takes_its_size(tmp_path, root, name):
    (root / "val").rename(root / "test")
    for path in root.rglob("*.JPEG"):
        path.rename(path.with_suffix(".png"))
    flags = {"data": name, "data_dir": str(root)}
    sizes = {"image_size": 16, "patch_size": 8, "width": 8, "depth": 1, "num_heads": 1}
    train = {"steps": 1, "batch_size": 4, "workers": 1, "warmup_epochs": 0.0}
    trainer_of(read_recipe(None, data=flags, model=sizes, train=train), tmp_path / "a", progress=False).run()
    start = {"checkpoint": str(tmp_path / "a" / LAST)}
    run = trainer_of(read_recipe(None, data=flags, train=train, start=start), tmp_path / "b", progress=False)
    assert run.model.config.image_size == 16 and run.describe["image_size"] == 16
    larger = read_recipe(None, data=flags, model={"image_size": 24}, train=train, start=start)
    assert trainer_of(larger, tmp_path / "c", progress=False).model.config.image_size == 24
