"""Training: resumed = uninterrupted, bit for bit; what diverges, crashes or is altered costs nothing; it learns."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TINY, close_calls, load_script

from minivit import ViTConfig
from minivit.base.errors import InputError
from minivit.data import load
from minivit.data.loader import halve
from minivit.model import ViT
from minivit.optim import OPTIMIZERS, learning_rate
from minivit.training import engine as engine_module
from minivit.training import trainer as train
from minivit.training.engine import Engine
from minivit.training.trainer import (
    BEST,
    FREE_ON_RESUME,
    LAST,
    METRICS,
    SETTINGS,
    SUMMARY,
    TrainConfig,
    Trainer,
    read_metrics,
)
from minivit.weights import checkpoint

ROOT = Path(__file__).resolve().parent.parent.parent
DIGITS = load("digits")
# 60 pictures in batches of 8, two batches a step: 8 batches, 4 steps an epoch, the last of both smaller than the others
FEW = DIGITS._replace(
    train_images=DIGITS.train_images[:60],
    train_labels=DIGITS.train_labels[:60],
    test_images=DIGITS.test_images[:40],
    test_labels=DIGITS.test_labels[:40],
)
MODEL = ViTConfig(
    image_size=8, patch_size=4, channels=1, width=8, depth=2, num_heads=2, mlp_dim=16, dropout=0.1,
    attention_dropout=0.1, drop_path=0.2,
)  # fmt: skip
HARD = TrainConfig(
    epochs=3, batch_size=8, accumulate=2, lr=0.01, ema_decay=0.9, crop_padding=1, flip=True, label_smoothing=0.1,
    micro_batch=3, workers=1, log_every=1, checkpoint_seconds=1000.0, seed=5,
)  # fmt: skip
STEPS = 12


pytestmark = pytest.mark.usefixtures("no_figures")


class Crash(BaseException):
    """Not an Exception, so that nothing handles it on its way: the nearest to a kill that one process can have."""


def trainer(out, config=HARD, *, model=MODEL, data=FEW):
    return Trainer(data, model, config, out, describe={"data": "digits"}, progress=False)


def resumed(out, config=HARD, **keywords):
    again = trainer(out, config, **keywords)
    again.restore()
    return again


def before_step(run, step, action):
    """Call ``action`` when the optimiser is about to make a step (counted from 1)."""
    real = run.optimizer.step

    def counted(*arguments):
        if run.step + 1 == step:
            action()
        real(*arguments)

    run.optimizer.step = counted


def crash():
    raise Crash


def timeless(path):
    """The lines of a metrics.jsonl without the figures that no two runs share."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines]


def assert_same_run(out, other):
    for name in (LAST, BEST):
        (arrays, meta), (others, other_meta) = checkpoint.load(out / name), checkpoint.load(other / name)
        assert arrays.keys() == others.keys()
        for key in arrays:
            np.testing.assert_array_equal(arrays[key], others[key], err_msg=f"{name}: {key}")
        for each in (meta, other_meta):
            del each["progress"]["seconds"]
            each["settings"] = {k: v for k, v in each["settings"].items() if k not in FREE_ON_RESUME}
        assert meta == other_meta
    assert timeless(out / METRICS) == timeless(other / METRICS)
    summaries = [json.loads((folder / SUMMARY).read_text()) for folder in (out, other)]
    for key in ("test_accuracy", "test_loss", "best_test_accuracy", "best_epoch", "steps"):
        assert summaries[0][key] == summaries[1][key]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an uninterrupted run with given settings, each run once."""
    done = {}

    def folder(config=HARD):
        if config not in done:
            done[config] = tmp_path_factory.mktemp("whole")
            assert trainer(done[config], config).run()["steps"] == STEPS
        return done[config]

    return folder


# ---- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 3, 4, 7, 12])
def test_a_stopped_run_goes_on_exactly(tmp_path, whole, step):
    run = trainer(tmp_path)
    before_step(run, step, lambda: run.stop("test"))
    assert run.run() is None
    progress = checkpoint.load(tmp_path / LAST)[1]["progress"]
    assert progress["step"] == step and progress["batch"] == 2 * (step - progress["epoch"] * 4)
    assert not (tmp_path / SUMMARY).exists()
    assert resumed(tmp_path).run()["steps"] == STEPS
    assert_same_run(tmp_path, whole())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("workers", [1, 2])
def test_every_optimiser_and_worker_count_resumes_exactly(tmp_path, whole, optimizer, workers):
    config = replace(HARD, optimizer=optimizer, workers=workers)
    run = trainer(tmp_path, config)
    before_step(run, 6, lambda: run.stop("test"))
    assert run.run() is None
    run = resumed(tmp_path, config)
    before_step(run, 9, lambda: run.stop("test"))  # and once more
    assert run.run() is None
    resumed(tmp_path, config).run()
    assert_same_run(tmp_path, whole(config))


OPTIONS = {
    "sam": {"sam": 0.05, "accumulate": 1}, "layer_decay": {"layer_decay": 0.7}, "init": {"init": "mimetic"},
    "whiten": {"whiten": True}, "test_flip": {"test_flip": True},
    "schedule": {"schedule": "trapezoid", "cooldown": 0.5}, "cooldown": {"schedule": "trapezoid", "cooldown": 0.9},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_reaches_the_training_and_resumes_exactly(tmp_path, name):
    config = replace(HARD, **OPTIONS[name])
    whole = trainer(tmp_path / "whole", config).run()
    other = replace(HARD, schedule="trapezoid", cooldown=0.5) if name == "cooldown" else HARD
    base = trainer(tmp_path / "base", replace(other, accumulate=config.accumulate)).run()
    assert whole["test_loss"] != base["test_loss"]
    run = trainer(tmp_path / "cut", config)
    before_step(run, 5, lambda: run.stop("test"))
    assert run.run() is None
    resumed(tmp_path / "cut", config).run()
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


HALVED = replace(MODEL, image_size=8, patch_size=2, pos_embed="sincos2d")


def test_the_first_epochs_on_pictures_of_half_the_size(tmp_path):
    """They are those of a training on smaller pictures; it resumes exactly in either part."""
    config = replace(HARD, half_size=0.6, crop_padding=0, flip=False, optimizer="muon")
    run = trainer(tmp_path / "whole", config, model=HALVED)
    assert run.small_epochs == 2
    assert run.run()["steps"] == STEPS
    halves = FEW._replace(
        train_images=halve(FEW.train_images), test_images=halve(FEW.test_images)
    )  # the first two epochs, on small pictures from the beginning
    other = trainer(tmp_path / "small", replace(config, half_size=0.0, micro_batch=4 * config.micro_batch),
                    model=replace(HALVED, image_size=4), data=halves)  # fmt: skip
    other.model._position[...] = ViT(HALVED).at_half_size()._position
    other.run()
    losses = [[line["loss"] for line in timeless(out / METRICS) if line["kind"] == "train"]
              for out in (tmp_path / "whole", tmp_path / "small")]  # fmt: skip
    assert losses[0][:8] == losses[1][:8] and losses[0][8:] != losses[1][8:]
    for step in (3, 10):
        run = trainer(tmp_path / f"cut{step}", config, model=HALVED)
        before_step(run, step, lambda run=run: run.stop("test"))
        assert run.run() is None
        resumed(tmp_path / f"cut{step}", config, model=HALVED).run()
        assert_same_run(tmp_path / f"cut{step}", tmp_path / "whole")


def test_pictures_that_cannot_be_halved_are_refused(tmp_path):
    with pytest.raises(InputError, match="need fixed positions"):
        trainer(tmp_path, replace(HARD, half_size=0.5))
    assert not list(tmp_path.iterdir())


def test_sam_takes_the_gradient_uphill(tmp_path):
    config = replace(HARD, sam=0.3, accumulate=1, optimizer="sgd", momentum=0.0, weight_decay=0.0, clip_norm=0.0,
                     epochs=1, warmup_epochs=0.0, schedule="constant", lr=0.1)  # fmt: skip
    config = replace(config, ema_decay=0.0, crop_padding=0, flip=False, batch_size=len(FEW.train_images))
    run = trainer(tmp_path, config)
    run.model.params["head.weight"][...] = np.random.default_rng(0).standard_normal((8, 10))
    start = run.model.flat.copy()
    run.run()
    settings = {"workers": 1, "micro_batch": 3, "label_smoothing": config.label_smoothing, "seed": config.seed}
    with Engine(ViT(MODEL, flat=start.copy()), **settings) as engine:
        order = train.epoch_order(len(FEW.train_images), seed=config.seed, epoch=0)
        batch = FEW.train_images[order], FEW.train_labels[order]
        engine.gradient(*batch)
        engine.model.flat += 0.3 * engine.grad / np.linalg.norm(engine.grad)
        here = engine.grad.copy()
        engine.gradient(*batch)
    moved = (start - run.model.flat) / 0.1
    np.testing.assert_allclose(moved, engine.grad, atol=2e-5)
    assert np.abs(moved - here).max() > 1e-3


def test_sam_goes_as_far_uphill_as_asked_for_and_comes_back():
    """A gradient of norm 5e-12: up by 0.6 g / (5e-12 + 1e-12)."""
    model, seen = SimpleNamespace(flat=np.array([1.0, -2.0])), []

    class Slope:
        grad = np.array([3e-12, -4e-12])

        def gradient(self, *batch, **settings):
            seen.append((model.flat.copy(), batch, settings))

    trainer = SimpleNamespace(model=model, config=SimpleNamespace(sam=0.6))
    Trainer._gradient_uphill(trainer, Slope(), "images", "labels", 7, 12)
    ((there, batch, settings),) = seen
    np.testing.assert_allclose(there, [1.3, -2.4], rtol=1e-12)
    assert batch == ("images", "labels") and settings == {"step": 7, "denominator": 12}
    np.testing.assert_array_equal(model.flat, [1.0, -2.0])


MIXED = replace(HARD, policy="trivial", erasing=0.5, mixup=0.4, cutmix=1.0, mix_probability=0.8)


@pytest.mark.parametrize("step", [2, 6])
def test_mixed_batches_resume_exactly(tmp_path, whole, step):
    run = trainer(tmp_path, MIXED)
    before_step(run, step, lambda: run.stop("test"))
    assert run.run() is None
    resumed(tmp_path, MIXED).run()
    assert_same_run(tmp_path, whole(MIXED))


@pytest.mark.parametrize(
    "change",
    [
        {"policy": "none"}, {"policy": "auto"}, {"erasing": 0.0}, {"mixup": 0.0}, {"mix_probability": 0.1},
        {"crop_mode": "reflect"},
    ],
)  # fmt: skip
def test_each_augmentation_reaches_the_training(whole, change):
    figures = [[line["loss"] for line in timeless(whole(c) / METRICS)] for c in (MIXED, replace(MIXED, **change))]
    assert figures[0] != figures[1]


def test_training_on_targets_counts_the_likelier_class(whole):
    """With nothing mixed in, targets are the labels once more: the same figures as without."""
    same = replace(HARD, mixup=1.0, mix_probability=0.0)
    assert timeless(whole(same) / METRICS) == timeless(whole() / METRICS)


@pytest.mark.parametrize("every", [0.0, 1000.0], ids=["a checkpoint per step", "only the first checkpoint"])
@pytest.mark.parametrize("step", [1, 2, 5, 8, 9, 12])
def test_a_crash_costs_the_steps_since_the_checkpoint_and_nothing_else(tmp_path, whole, step, every):
    config = replace(HARD, checkpoint_seconds=every)
    run = trainer(tmp_path, config)
    before_step(run, step, crash)
    with pytest.raises(Crash):
        run.run()
    assert checkpoint.load(tmp_path / LAST)[1]["progress"]["step"] == (0 if every else step - 1)
    resumed(tmp_path, config).run()
    assert_same_run(tmp_path, whole())


def test_a_crash_between_an_epochs_last_step_and_its_evaluation(tmp_path, whole, monkeypatch):
    run = trainer(tmp_path, replace(HARD, checkpoint_seconds=0.0))
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", lambda *arguments, **settings: crash())
        with pytest.raises(Crash):
            run.run()
    progress = checkpoint.load(tmp_path / LAST)[1]["progress"]
    assert (progress["step"], progress["epoch"], progress["batch"]) == (4, 0, 8)
    assert progress["running"]["seen"] == 60
    resumed(tmp_path).run()
    assert_same_run(tmp_path, whole())


@pytest.mark.parametrize("name", [BEST, LAST])
def test_a_crash_around_the_best_checkpoint(tmp_path, whole, name, monkeypatch):
    """Killed after best.npz is written and before last.npz is, or before best.npz is: both end as they should."""
    run = trainer(tmp_path, replace(HARD, checkpoint_seconds=0.0))
    real = run.save

    def save(name=LAST):
        if name == BEST and broken == LAST:
            raise Crash
        real(name)
        if name == BEST:
            raise Crash

    broken = name
    run.save = save
    with pytest.raises(Crash):
        run.run()
    assert (tmp_path / BEST).exists() == (name == BEST)
    resumed(tmp_path).run()
    assert_same_run(tmp_path, whole())


def test_a_stop_during_the_evaluation(tmp_path, whole, monkeypatch):
    run = trainer(tmp_path)
    real = train.evaluate

    def evaluate(*arguments, **settings):
        run.stop("test")
        return real(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", evaluate)
        assert run.run() is None
    progress = checkpoint.load(tmp_path / LAST)[1]["progress"]
    assert (progress["step"], progress["epoch"], progress["batch"]) == (4, 1, 0)
    assert [r["kind"] for r in timeless(tmp_path / METRICS)] == ["train"] * 4 + ["test"]
    resumed(tmp_path).run()
    assert_same_run(tmp_path, whole())


def test_an_evaluation_that_is_skipped(tmp_path):
    config = replace(HARD, evaluate_every=2)
    trainer(tmp_path / "a", config).run()
    records = [r["epoch"] for r in timeless(tmp_path / "a" / METRICS) if r["kind"] == "test"]
    assert records == [2, 3]
    run = trainer(tmp_path / "b", config)
    before_step(run, 4, lambda: run.stop("test"))
    run.run()
    resumed(tmp_path / "b", config).run()
    assert_same_run(tmp_path / "b", tmp_path / "a")


def test_metrics_with_a_half_written_line_and_foreign_ones(tmp_path, whole):
    run = trainer(tmp_path)
    before_step(run, 7, lambda: run.stop("test"))
    run.run()
    lines = (tmp_path / METRICS).read_bytes().splitlines(keepends=True)
    foreign = [b"\n", b"7\n", b'{"kind": "train"}\n', b'{"kind": "test", "step": "x", "epoch": 1}\n', b"\xff\xfe\0\0\n"]
    later = b'{"kind": "train", "step": 8, "epoch": 2, "lr": 1, "loss": 1}\n'  # of a step that will be made again
    (tmp_path / METRICS).write_bytes(b"".join([*lines[:2], *foreign, *lines[2:], later, lines[-1][:20]]))
    resumed(tmp_path).run()
    assert_same_run(tmp_path, whole())


def test_metrics_that_were_lost_are_no_reason_to_fail(tmp_path):
    run = trainer(tmp_path)
    before_step(run, 7, lambda: run.stop("test"))
    run.run()
    (tmp_path / METRICS).unlink()
    assert resumed(tmp_path).run()["steps"] == STEPS


def test_the_timer_of_the_last_checkpoint_is_not_reset_by_the_best_one(tmp_path, monkeypatch):
    """With an epoch shorter than checkpoint_seconds and a best one after another, last.npz must still be written."""
    clock = [0.0]
    monkeypatch.setattr(train.time, "monotonic", lambda: clock[0])
    run = trainer(tmp_path, replace(HARD, epochs=10, checkpoint_seconds=30.0))
    steps = iter(range(1000))
    real_evaluate, accuracy = train.evaluate, iter(np.linspace(0.1, 0.9, 20))
    monkeypatch.setattr(train, "evaluate", lambda *a, **k: (1.0, next(accuracy), real_evaluate(*a, **k)[2]))
    saved = []
    real = run.save
    run.save = lambda name=LAST: (saved.append((name, run.step)), real(name))
    real_step = run.optimizer.step
    run.optimizer.step = lambda *a: (clock.__setitem__(0, 5.0 * next(steps)), real_step(*a))  # an epoch takes 20 s
    run.run()
    assert sum(name == BEST for name, _ in saved) == 10
    assert [step for name, step in saved if name == LAST] == [0, 7, 13, 19, 25, 31, 37, 40]


def test_seconds_add_up(tmp_path, monkeypatch):
    """A step takes 5 s, and nothing else takes any."""
    clock = [100.0]
    monkeypatch.setattr(train.time, "monotonic", lambda: clock[0])

    def timed(run):
        step = run.optimizer.step
        run.optimizer.step = lambda *arguments: (clock.__setitem__(0, clock[0] + 5.0), step(*arguments))
        return run

    run = timed(trainer(tmp_path))
    before_step(run, 7, lambda: run.stop("test"))
    run.run()
    assert checkpoint.load(tmp_path / LAST)[1]["progress"]["seconds"] == 7 * 5.0
    clock[0] += 1000.0  # nobody trains meanwhile
    assert timed(resumed(tmp_path)).run()["train_seconds"] == STEPS * 5.0


def test_a_finished_run_is_left_as_it_is(tmp_path, whole):
    trainer(tmp_path).run()
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    again = resumed(tmp_path)
    assert again.finished
    summary = again.run()
    assert summary == json.loads(before[SUMMARY])
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert_same_run(tmp_path, whole())


def test_all_cores_become_a_number(tmp_path, monkeypatch):
    """workers = 0 is resolved when the run starts: a machine with more cores goes on with the same order of sums."""
    monkeypatch.setattr(train, "available_cores", lambda: 2)
    run = trainer(tmp_path, replace(HARD, workers=0))
    before_step(run, 5, lambda: run.stop("test"))
    run.run()
    monkeypatch.setattr(train, "available_cores", lambda: 7)
    _, meta = checkpoint.load(tmp_path / LAST)
    assert meta["settings"]["workers"] == 2
    assert resumed(tmp_path, train.config_from(meta, "x")).config.workers == 2


# ---- refusing --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The arrays and meta of a run stopped in the middle of its second epoch."""
    out = tmp_path_factory.mktemp("stopped")
    run = trainer(out)
    before_step(run, 6, lambda: run.stop("test"))
    run.run()
    return checkpoint.load(out / LAST)


def altered(key, value, section="progress"):
    def change(arrays, meta):
        if value is None:
            del meta[section][key]
        else:
            meta[section][key] = value

    return change


def array(key, value):
    def change(arrays, meta):
        if value is None:
            del arrays[key]
        else:
            arrays[key] = value(arrays[key])

    return change


def whole_section(section, value):
    return lambda arrays, meta: meta.__setitem__(section, value)


ALTERED = {
    "no progress": whole_section("progress", None),
    "progress a list": whole_section("progress", [1]),
    "no step": altered("step", None),
    "step of another": altered("step", 7),
    "step a float": altered("step", 6.0),
    "step a text": altered("step", "6"),
    "negative": altered("epoch", -1),
    "epoch beyond the end": altered("epoch", 9),
    "odd batch": altered("batch", 3),
    "batch beyond the end": altered("batch", 400),
    "optimiser steps": altered("optimizer_steps", 5),
    "average's steps": altered("ema_steps", 0),
    "running a number": altered("running", 3),
    "running incomplete": altered("running", {"loss": 1.0}),
    "running NaN": altered("running", {"loss": math.nan, "correct": 1, "seen": 2}),
    "best a text": altered("best", {"accuracy": "high", "epoch": 1}),
    "seconds a text": altered("seconds", "many"),
    "order missing": array("order", None),
    "order no permutation": array("order", lambda a: a * 0),
    "order of floats": array("order", lambda a: a.astype(float)),
    "order of texts": array("order", lambda a: a.astype(str)),
    "order too short": array("order", lambda a: a[:-1]),
    "optimiser missing": array("optimizer/m", None),
    "optimiser short": array("optimizer/m", lambda a: a[:-1]),
    "optimiser NaN": array("optimizer/v", lambda a: a * np.nan),
    "optimiser of texts": array("optimizer/v", lambda a: a.astype("U4")),
    "average NaN": array("ema/head.weight", lambda a: a * np.nan),
    "parameter missing": array("params/head.weight", None),
    "parameter NaN": array("params/norm.bias", lambda a: a + np.inf),
    "settings missing": whole_section("settings", None),
    "settings a list": whole_section("settings", []),
    "settings unknown": altered("speed", 3, "settings"),
    "settings of another type": altered("lr", "fast", "settings"),
    "other settings": altered("lr", 0.5, "settings"),
    "other model": altered("width", 16, "config"),
    "data missing": whole_section("data", None),
    "other pictures": altered("fingerprint", 3, "data"),
}


@pytest.mark.parametrize("change", ALTERED.values(), ids=ALTERED.keys())
def test_an_altered_checkpoint_is_refused_and_changes_nothing(tmp_path, stopped, change):
    arrays, meta = dict(stopped[0]), json.loads(json.dumps(stopped[1]))
    change(arrays, meta)
    checkpoint.save(tmp_path / LAST, arrays, meta)
    run = trainer(tmp_path)
    flat, average = run.model.flat.copy(), run.ema.flat.copy()
    with pytest.raises(InputError) as raised:
        run.restore()
    assert str(tmp_path / LAST) in str(raised.value)
    np.testing.assert_array_equal(run.model.flat, flat)
    np.testing.assert_array_equal(run.ema.flat, average)
    assert run.step == run.optimizer.steps == run.ema.steps == 0


def test_settings_that_change_no_number_may_change(tmp_path, stopped):
    checkpoint.save(tmp_path / LAST, *stopped)
    run = resumed(tmp_path, replace(HARD, log_every=5, check_finite=True, checkpoint_seconds=1.0))
    assert run.step == 6
    for name, value in asdict(replace(HARD, lr=0.02, seed=6, workers=2)).items():
        if value != getattr(HARD, name):
            with pytest.raises(InputError, match=f"other settings: {name} "):
                resumed(tmp_path, replace(HARD, **{name: value}))


def test_a_new_run_overwrites_nothing(tmp_path):
    for name in (LAST, BEST, METRICS, SUMMARY, SETTINGS, "curves.png", "predictions.png"):
        out = tmp_path / name.replace(".", "-")
        out.mkdir()
        (out / name).write_text("mine")
        with pytest.raises(InputError, match="already holds a run"):
            trainer(out).run()
        assert [(p.name, p.read_text()) for p in out.iterdir()] == [(name, "mine")]


def test_two_processes_cannot_train_into_one_folder(tmp_path):
    run = trainer(tmp_path, replace(HARD, checkpoint_seconds=0.0))
    refused = []

    def intrude():
        for other in (trainer(tmp_path), resumed(tmp_path)):
            with pytest.raises(InputError, match="another process is training into") as raised:
                other.run()
            refused.append(raised.value)

    before_step(run, 4, intrude)
    assert run.run()["steps"] == STEPS and len(refused) == 2
    assert resumed(tmp_path).run()["steps"] == STEPS  # the lock is gone


SIZES = {
    "other size": (replace(MODEL, image_size=16), HARD, "the pictures are 8x8x1, the model takes 16x16x1"),
    "other channels": (replace(MODEL, channels=3), HARD, "the pictures are 8x8x1, the model takes 8x8x3"),
    "fewer classes": (replace(MODEL, num_classes=9), HARD, "the data have 10 classes, the model has 9"),
    "more classes": (replace(MODEL, num_classes=11), HARD, "the data have 10 classes, the model has 11"),
    "crops": (MODEL, replace(HARD, crop_padding=8), "crop_padding 8 moves whole pictures out of sight"),
    "wide": (replace(MODEL, width=1 << 30, mlp_dim=1), HARD, "GB of memory"),
    "deep": (replace(MODEL, depth=10**15), HARD, "GB of memory"),
    "wide MLP": (replace(MODEL, mlp_dim=10**15), HARD, "GB of memory"),
    "pre-logits": (replace(MODEL, pre_logits=10**15), HARD, "GB of memory"),
}


@pytest.mark.parametrize(("model", "config", "said"), SIZES.values(), ids=SIZES.keys())
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, model, config, said):
    with pytest.raises(InputError, match=said):
        trainer(tmp_path / "out", config, model=model)
    assert not (tmp_path / "out").exists()


# ---- diverging -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"lr": 1e30, "optimizer": "sgd", "clip_norm": 0.0},
        {"lr": 1e38, "optimizer": "adamw", "weight_decay": 1.0},
        {"lr": 1e12, "optimizer": "sgd", "checkpoint_seconds": 1000.0},
        {"lr": 3e38, "optimizer": "adam", "ema_decay": 0.0, "epochs": 1, "batch_size": 64},  # at its last step
    ],
    ids=["sgd", "adamw", "sgd with clipping", "the last step"],
)
def test_a_diverging_run_ends_in_one_line_and_can_be_resumed(tmp_path, changes):
    config = replace(HARD, checkpoint_seconds=0.0, warmup_epochs=0.0)
    config = replace(config, **changes)
    with pytest.raises(InputError, match=r"the run diverged; .*last\.npz holds it from before; start again with"):
        trainer(tmp_path, config).run()
    arrays, _ = checkpoint.load(tmp_path / LAST)
    assert all(np.isfinite(a).all() for a in arrays.values())
    assert resumed(tmp_path, config).step < STEPS
    assert not list(tmp_path.glob(".*"))
    for line in (tmp_path / METRICS).read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_an_infinite_gradient_of_a_finite_loss_is_noticed_before_the_step(tmp_path):
    run = trainer(tmp_path, replace(HARD, checkpoint_seconds=0.0))
    real = Engine.gradient

    def gradient(self, *arguments, **keywords):
        result = real(self, *arguments, **keywords)
        if run.step == 2:
            self.grad[3] = np.inf
        return result

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match="gradient's norm inf at step 2"):
        patch.setattr(Engine, "gradient", gradient)
        run.run()
    assert checkpoint.load(tmp_path / LAST)[1]["progress"]["step"] == 2


def test_a_test_loss_that_is_not_finite_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda *arguments, **settings: (math.nan, 0.1, None))
    with pytest.raises(InputError, match="the test loss is nan at step 4"):
        trainer(tmp_path).run()
    assert not (tmp_path / BEST).exists() and resumed(tmp_path).step == 0
    assert all(r["kind"] == "train" for r in timeless(tmp_path / METRICS))


# ---- learning --------------------------------------------------------------------------------------------------------


def test_the_loss_falls(tmp_path):
    config = TrainConfig(epochs=25, batch_size=16, lr=0.01, workers=1, log_every=1, warmup_epochs=2.0)
    summary = trainer(tmp_path, config, model=replace(MODEL, dropout=0.0, attention_dropout=0.0, drop_path=0.0)).run()
    tests = [r for r in read_metrics(tmp_path / METRICS) if r["kind"] == "test"]
    assert tests[0]["train_loss"] > 2.1 and tests[-1]["train_loss"] < 1.0
    assert tests[-1]["train_accuracy"] > 0.8
    assert tests[-1]["loss"] == summary["test_loss"] and tests[-1]["accuracy"] == summary["test_accuracy"]
    assert summary["best_test_accuracy"] == max(r["accuracy"] for r in tests)
    first = next(r for r in tests if r["accuracy"] == summary["best_test_accuracy"])
    assert summary["best_epoch"] == first["epoch"]
    assert checkpoint.load(tmp_path / BEST)[1]["progress"]["epoch"] == first["epoch"]


def test_accumulated_batches_are_one_large_batch(tmp_path, monkeypatch):
    plain = replace(MODEL, dropout=0.0, attention_dropout=0.0, drop_path=0.0)
    config = replace(HARD, batch_size=16, accumulate=1, crop_padding=0, flip=False, optimizer="sgd")
    undecided, count, evaluate = [], engine_module.correct_count, train.evaluate

    def counted(logits, labels):
        undecided.append(close_calls(logits))
        return count(logits, labels)

    def tested(*arguments, **settings):
        found = evaluate(*arguments, **settings)
        undecided.append(close_calls(found[2]))
        return found

    monkeypatch.setattr(engine_module, "correct_count", counted)
    monkeypatch.setattr(train, "evaluate", tested)
    for name, changes in (("large", {}), ("small", {"batch_size": 4, "accumulate": 4})):
        run = trainer(tmp_path / name, replace(config, **changes), model=plain)
        # a head of zeros makes no difference between classes, and its first steps hardly any
        run.model.params["head.weight"][...] = np.random.default_rng(0).standard_normal((8, 10))
        run.run()
    assert len(undecided) > 2 * STEPS and not any(undecided)
    large, small = (checkpoint.load_model(tmp_path / name / LAST)[0].flat for name in ("large", "small"))
    np.testing.assert_allclose(small, large, rtol=1e-4, atol=1e-6)
    assert not np.array_equal(small, ViT(plain, seed=5).flat)
    for a, b in zip(
        read_metrics(tmp_path / "large" / METRICS), read_metrics(tmp_path / "small" / METRICS), strict=True
    ):
        assert a["step"] == b["step"] and a["lr"] == b["lr"] if a["kind"] == "train" else a["epoch"] == b["epoch"]
        assert a["accuracy"] == b["accuracy"]
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)


def test_metrics_say_what_was_done(whole):
    records = timeless(whole() / METRICS)
    steps = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in steps] == list(range(1, STEPS + 1))
    assert [r["epoch"] for r in steps] == [1] * 4 + [2] * 4 + [3] * 4
    for r in steps:
        expected = learning_rate(r["step"] - 1, STEPS, lr=0.01, schedule="cosine", warmup_steps=4, final_lr=0.0)
        assert r["lr"] == expected
    tests = [r for r in records if r["kind"] == "test"]
    assert [(r["step"], r["epoch"]) for r in tests] == [(4, 1), (8, 2), (12, 3)]
    for r in tests:  # the epoch's mean is that of its steps, each weighted by its pictures: 16, 16, 16, 12
        mine = [s for s in steps if s["epoch"] == r["epoch"]]
        weights = np.array([16, 16, 16, 12]) / 60
        np.testing.assert_allclose(r["train_loss"], weights @ [s["loss"] for s in mine], rtol=1e-12)
        np.testing.assert_allclose(r["train_accuracy"], weights @ [s["accuracy"] for s in mine], rtol=1e-12)


def test_every_batch_has_random_numbers_of_its_own(tmp_path, monkeypatch):
    numbers, real = [], Engine.gradient

    def gradient(self, *arguments, step, **keywords):
        numbers.append(step)
        return real(self, *arguments, step=step, **keywords)

    monkeypatch.setattr(Engine, "gradient", gradient)
    run = trainer(tmp_path)
    before_step(run, 7, lambda: run.stop("test"))
    run.run()
    resumed(tmp_path).run()
    assert numbers == list(range(24))


@pytest.mark.parametrize("decay", [0.9, 0.0])
def test_the_moving_average_is_what_is_tested(tmp_path, decay):
    config = replace(HARD, ema_decay=decay)
    summary = trainer(tmp_path, config).run()
    with Engine(ViT(MODEL), workers=1, micro_batch=3) as engine:
        losses = {
            weights: train.evaluate(
                engine, checkpoint.load_model(tmp_path / LAST, weights=weights)[0], FEW.test_images, FEW.test_labels
            )[0]
            for weights in ("params", "auto")
        }
    assert summary["test_loss"] == losses["auto"]
    assert (losses["params"] == losses["auto"]) == (decay == 0.0)


def test_evaluation_by_hand():
    model = ViT(MODEL, seed=3)
    model.params["head.weight"][...] = np.random.default_rng(0).standard_normal((8, 10))
    with Engine(model, workers=2, micro_batch=7) as engine:
        loss, accuracy, logits = train.evaluate(engine, model, FEW.test_images, FEW.test_labels)
    expected = model.predict(FEW.test_images).astype(np.float64)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    log_p = expected - np.log(np.exp(expected).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(loss, -log_p[np.arange(40), FEW.test_labels].mean(), rtol=1e-5)
    assert not close_calls(expected) and accuracy == np.mean(expected.argmax(axis=1) == FEW.test_labels)


def test_evaluation_with_mirror_images():
    model = ViT(MODEL, seed=3)
    model.params["head.weight"][...] = np.random.default_rng(0).standard_normal((8, 10))
    with Engine(model, workers=2, micro_batch=7) as engine:
        _, _, logits = train.evaluate(engine, model, FEW.test_images, FEW.test_labels, flip=True)
    own, mirrored = model.predict(FEW.test_images), model.predict(FEW.test_images[:, :, ::-1])
    np.testing.assert_allclose(logits, (own + mirrored) / 2, rtol=1e-4, atol=1e-5)
    assert np.abs(own - mirrored).max() > 0.01


def test_the_fingerprint_sees_every_part():
    base = train.fingerprint(FEW)
    assert base == train.fingerprint(FEW)
    for field in ("train_images", "train_labels", "test_images", "test_labels"):
        changed = getattr(FEW, field).copy()
        changed.flat[7] ^= 1
        assert train.fingerprint(FEW._replace(**{field: changed})) != base


# ---- signals ---------------------------------------------------------------------------------------------------------

FLAGS = [
    *TINY,
    *"--width 8 --batch-size 32 --accumulate 2 --dropout 0.1".split(),
    *"--epochs 12 --log-every 1 --checkpoint-seconds 0".split(),
]
MIDDLE, LONG = 100, 300  # steps, of 276; seconds


WAITING = f"""
import runpy, sys, time
from minivit.training.trainer import Trainer

learning_rate, deadline = Trainer.learning_rate, time.monotonic() + {LONG}

def waiting(self, step):
    while step == {MIDDLE} and self._stop is None and time.monotonic() < deadline:
        time.sleep(0.005)
    return learning_rate(self, step)

Trainer.learning_rate = waiting
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def launch(out):
    """minivit train in a process of its own that has made 100 steps and waits for a signal in the next."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", WAITING, ROOT / "scripts" / "train.py", *FLAGS, "--out", out],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + LONG
    while sum(r["kind"] == "train" for r in read_metrics(out / METRICS)) < MIDDLE and time.monotonic() < deadline:
        time.sleep(0.005)
    return process


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert load_script("train").main([*FLAGS, "--out", str(out)]) == 0
    return out


def finish(out, capsys):
    assert load_script("train").main(["--resume", "--quiet", "--out", str(out)]) == 0
    return capsys.readouterr().out


def test_ctrl_c_in_another_process(tmp_path, uninterrupted, capsys):
    out = tmp_path / "run"
    process = launch(out)
    process.send_signal(signal.SIGINT)
    said, complaint = process.communicate(timeout=600)
    assert process.returncode == 130 and complaint == ""
    step = checkpoint.load(out / LAST)[1]["progress"]["step"]
    assert step in (MIDDLE, MIDDLE + 1)  # one less if the signal came while step 100 was logged
    assert said.splitlines()[-1] == f"stopped at step {step} of 276; go on with --resume --out {out}"
    assert f"resuming at step {step} of 276" in finish(out, capsys)
    assert_same_run(out, uninterrupted)


def test_kill_9_in_another_process(tmp_path, uninterrupted, capsys):
    out = tmp_path / "run"
    process = launch(out)
    process.kill()
    process.communicate(timeout=600)
    assert process.returncode == -signal.SIGKILL
    step = checkpoint.load(out / LAST)[1]["progress"]["step"]
    assert step in (MIDDLE - 1, MIDDLE)  # killed before its checkpoint of step 100, or after
    assert f"resuming at step {step} of 276" in finish(out, capsys)
    assert_same_run(out, uninterrupted)


def test_a_second_ctrl_c_interrupts_at_once(tmp_path):
    run = trainer(tmp_path)

    def twice():
        signal.raise_signal(signal.SIGINT)
        assert run._stop == signal.SIGINT
        signal.raise_signal(signal.SIGINT)

    before_step(run, 6, twice)
    previous = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert signal.getsignal(signal.SIGINT) is previous
    assert resumed(tmp_path).step == 0  # the first checkpoint, whole


def test_training_in_another_thread_leaves_signals_alone(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(trainer(tmp_path).run()))
    thread.start()
    thread.join()
    assert results[0]["steps"] == STEPS


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_decay_falls_on_the_matrices_alone(tmp_path, optimizer):
    run = trainer(tmp_path, replace(HARD, optimizer=optimizer, weight_decay=0.5))
    run.model.flat[...] = 1.0
    run.optimizer.step(run.model.flat, np.zeros_like(run.model.flat), 0.1)
    for name, value in run.model.params.items():
        decayed = name.endswith("weight") and "norm" not in name
        assert ((value < 1.0) if decayed else (value == 1.0)).all(), name


def test_the_warm_up_takes_half_of_a_short_run_at_most(tmp_path):
    run = trainer(tmp_path, replace(HARD, warmup_epochs=100.0))
    rates = [run.learning_rate(step) for step in range(run.total_steps)]
    assert max(rates) == rates[run.total_steps // 2] == HARD.lr
    assert rates == sorted(rates[:6]) + sorted(rates[6:], reverse=True)
    usual = trainer(tmp_path, replace(HARD, warmup_epochs=1.0))
    assert usual.learning_rate(4) == HARD.lr > usual.learning_rate(3)


def test_a_missing_library_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    with pytest.raises(ImportError, match=r"pip install .minivit\[interop\]"):
        trainer(tmp_path / "run", model=replace(MODEL, gelu="erf"))
    assert not (tmp_path / "run").exists()


def test_a_diverging_run_names_the_first_tensor_that_is_not_finite(tmp_path):
    run = trainer(tmp_path / "run", replace(HARD, workers=2))

    def spoil():
        run.model.params["blocks.1.mlp.fc1.weight"][...] = 1e38

    before_step(run, 6, spoil)  # between the gradient and the update of step 6: the loss of step 7 overflows
    with pytest.raises(InputError, match=r"blocks\.1\.mlp.*the first tensor .*not finite") as caught:
        run.run()
    assert "\n" not in str(caught.value) and "the run diverged" in str(caught.value)
    assert checkpoint.load(tmp_path / "run" / LAST)[1]["progress"]["step"] < 7


def test_checking_every_tensor_changes_no_number_and_costs_nothing_when_it_is_off(tmp_path, whole, monkeypatch):
    recorded, real = [], train.recording

    def recording(*arguments, **keywords):
        recorded.append(1)
        return real(*arguments, **keywords)

    monkeypatch.setattr(train, "recording", recording)
    monkeypatch.setattr(
        Trainer, "_check_update", lambda self, real=Trainer._check_update: recorded.append(2) or real(self)
    )
    run = trainer(tmp_path)
    before_step(run, 6, lambda: run.stop("test"))
    assert run.run() is None and not recorded
    assert resumed(tmp_path, replace(HARD, check_finite=True)).run()["steps"] == STEPS
    # 60 pictures in parts of 3 and, of each batch of 8, one of 2: of the 8 batches in each of two epochs, 4 were done
    assert recorded.count(1) == 4 * 3 - 1 + 8 * 3 - 1 and recorded.count(2) == 6
    assert_same_run(tmp_path, whole())


def test_the_check_finds_what_a_finite_loss_hides(tmp_path):
    """LayerNorm of huge numbers overflows, then gives 0: a network that is dead, with a loss that is finite."""

    def spoiled(name, **changes):
        run = trainer(tmp_path / name, replace(HARD, **changes))
        before_step(run, 2, lambda: run.model.params["pos_embed"].fill(1e30))
        return run

    assert spoiled("off").run()["steps"] == STEPS
    with pytest.raises(
        InputError, match=r"a temporary of blocks\.0\.norm1 \(layernorm_forward\) .* at step 2 .*diverged"
    ):
        spoiled("on", check_finite=True).run()


@pytest.mark.parametrize(
    ("vector", "said"),
    [
        (lambda run: run.optimizer.state["v"], r"optimizer/v/cls_token, made by AdamW\.step"),
        (lambda run: run.model.flat, r"params/cls_token, made by AdamW\.step"),
        (lambda run: run.ema.flat, r"ema/cls_token, made by EMA\.update"),
    ],
    ids=["state", "parameters", "average"],
)
def test_the_check_looks_at_the_update_too(tmp_path, vector, said):
    run = trainer(tmp_path, replace(HARD, check_finite=True))

    def spoil():
        vector(run)[3] = np.inf

    before_step(run, 2, spoil)
    with pytest.raises(InputError, match=f"{said}, is the first tensor of the update that is not finite at step 1 "):
        run.run()
