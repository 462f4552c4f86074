"""Runs that stop or crash and go on: the same as uninterrupted, bit for bit."""

import time
from dataclasses import replace

import pytest
from small_runs import (
    FEW,
    HARD,
    MODEL,
    STEPS,
    Crash,
    assert_same_run,
    before_step,
    crash,
    resumed,
    stop_at,
    timeless,
    trainer,
    whole,
)

from minivit.base.errors import InputError
from minivit.data.loader import halve
from minivit.model import ViT
from minivit.optim import OPTIMIZERS
from minivit.training.folder import BEST, LAST, METRICS, SUMMARY
from minivit.training.task import Classification
from minivit.weights import checkpoint

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.mark.parametrize("step", [1, 3, 4, 7, 12])
def test_a_stopped_run_goes_on_exactly(tmp_path, step):
    run = trainer(tmp_path)
    stop_at(run, step)
    assert run.run() is None
    progress = checkpoint.load(tmp_path / LAST)[1]["progress"]
    assert progress["step"] == step and progress["batch"] == 2 * (step - progress["epoch"] * 4)
    assert not (tmp_path / SUMMARY).exists()
    assert resumed(tmp_path).run()["steps"] == STEPS
    assert_same_run(tmp_path, whole())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("workers", [1, 2])
def test_every_optimiser_and_worker_count_resumes_exactly(tmp_path, optimizer, workers):
    config = replace(HARD, optimizer=optimizer, workers=workers)
    run = trainer(tmp_path, config)
    stop_at(run, 6)
    assert run.run() is None
    run = resumed(tmp_path, config)
    stop_at(run, 9)  # and once more
    assert run.run() is None
    resumed(tmp_path, config).run()
    assert_same_run(tmp_path, whole(config))


OPTIONS = {
    "layer_decay": {"layer_decay": 0.7}, "init": {"init": "mimetic"},
    "whiten": {"whiten": True}, "test_flip": {"test_flip": True},
    "schedule": {"schedule": "trapezoid", "cooldown": 0.5}, "cooldown": {"schedule": "trapezoid", "cooldown": 0.9},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_reaches_the_training_and_resumes_exactly(tmp_path, name):
    config = replace(HARD, **OPTIONS[name])
    uncut = trainer(tmp_path / "whole", config).run()
    other = replace(HARD, schedule="trapezoid", cooldown=0.5) if name == "cooldown" else HARD
    base = trainer(tmp_path / "base", other).run()
    assert uncut["test_loss"] != base["test_loss"]
    run = trainer(tmp_path / "cut", config)
    stop_at(run, 5)
    assert run.run() is None
    resumed(tmp_path / "cut", config).run()
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


HALVED = replace(MODEL, image_size=8, patch_size=2, pos_embed="sincos2d")


def test_the_first_epochs_on_images_of_half_the_size(tmp_path):
    """They are those of a training on smaller images; it resumes exactly in either part."""
    config = replace(HARD, half_size=0.6, crop_padding=0, flip=False, optimizer="muon")
    run = trainer(tmp_path / "whole", config, model=HALVED)
    assert run.plan.small_epochs == 2
    assert run.run()["steps"] == STEPS
    halves = FEW._replace(
        train_images=halve(FEW.train_images), test_images=halve(FEW.test_images)
    )  # the first two epochs, on small images from the beginning
    other = trainer(tmp_path / "small", replace(config, half_size=0.0, micro_batch=4 * config.micro_batch),
                    model=replace(HALVED, image_size=4), data=halves)  # fmt: skip
    other.model.inputs["pos_embed"][...] = ViT(HALVED).at_half_size().inputs["pos_embed"]
    other.run()
    losses = [[line["loss"] for line in timeless(out / METRICS) if line["kind"] == "train"]
              for out in (tmp_path / "whole", tmp_path / "small")]  # fmt: skip
    assert losses[0][:8] == losses[1][:8] and losses[0][8:] != losses[1][8:]
    for step in (3, 10):
        run = trainer(tmp_path / f"cut{step}", config, model=HALVED)
        stop_at(run, step)
        assert run.run() is None
        resumed(tmp_path / f"cut{step}", config, model=HALVED).run()
        assert_same_run(tmp_path / f"cut{step}", tmp_path / "whole")


MIXED = replace(HARD, policy="trivial", erasing=0.5, mixup=0.4, cutmix=1.0, mix_probability=0.8)


@pytest.mark.parametrize("step", [2, 6])
def test_mixed_batches_resume_exactly(tmp_path, step):
    run = trainer(tmp_path, MIXED)
    stop_at(run, step)
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
def test_each_augmentation_reaches_the_training(change):
    figures = [[line["loss"] for line in timeless(whole(c) / METRICS)] for c in (MIXED, replace(MIXED, **change))]
    assert figures[0] != figures[1]


def test_training_on_targets_counts_the_likelier_class():
    """With nothing mixed in, targets are the labels once more: the same figures as without."""
    same = replace(HARD, mixup=1.0, mix_probability=0.0)
    assert timeless(whole(same) / METRICS) == timeless(whole() / METRICS)


@pytest.mark.parametrize("every", [0.0, 1000.0], ids=["a checkpoint per step", "only the first checkpoint"])
@pytest.mark.parametrize("step", [1, 2, 5, 8, 9, 12])
def test_a_crash_costs_the_steps_since_the_checkpoint_and_nothing_else(tmp_path, step, every):
    config = replace(HARD, checkpoint_seconds=every)
    run = trainer(tmp_path, config)
    before_step(run, step, crash)
    with pytest.raises(Crash):
        run.run()
    assert checkpoint.load(tmp_path / LAST)[1]["progress"]["step"] == (0 if every else step - 1)
    resumed(tmp_path, config).run()
    assert_same_run(tmp_path, whole())


def test_a_crash_between_an_epochs_last_step_and_its_evaluation(tmp_path, monkeypatch):
    run = trainer(tmp_path, replace(HARD, checkpoint_seconds=0.0))
    with monkeypatch.context() as patch:
        patch.setattr(Classification, "evaluate", lambda *arguments: crash())
        with pytest.raises(Crash):
            run.run()
    progress = checkpoint.load(tmp_path / LAST)[1]["progress"]
    assert (progress["step"], progress["epoch"], progress["batch"]) == (4, 0, 8)
    assert progress["running"]["seen"] == 60
    resumed(tmp_path).run()
    assert_same_run(tmp_path, whole())


@pytest.mark.parametrize("name", [BEST, LAST])
def test_a_crash_around_the_best_checkpoint(tmp_path, name, monkeypatch):
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


def test_a_stop_during_the_evaluation(tmp_path, monkeypatch):
    run = trainer(tmp_path)
    real = Classification.evaluate

    def evaluate(*arguments):
        run.stop("test")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Classification, "evaluate", evaluate)
        assert run.run() is None
    progress = checkpoint.load(tmp_path / LAST)[1]["progress"]
    assert (progress["step"], progress["epoch"], progress["batch"]) == (4, 1, 0)
    assert [r["kind"] for r in timeless(tmp_path / METRICS)] == ["train"] * 4 + ["test"]
    resumed(tmp_path).run()
    assert_same_run(tmp_path, whole())


@pytest.mark.parametrize("steps", [(3,), (4,), (1, 5, 7)])
def test_the_same_object_goes_on(tmp_path, steps):
    """`Trainer.run()` after Ctrl-C, as in a notebook: the next call goes on, bit for bit."""
    run = trainer(tmp_path)
    for step in steps:
        stop_at(run, step)
        assert run.run() is None and run.stopped
    assert run.run()["steps"] == STEPS
    assert_same_run(tmp_path, whole())
    assert run.run()["steps"] == STEPS  # once more: figures and summary again


def test_the_same_object_after_a_crash_says_where_to_go_on(tmp_path, monkeypatch):
    run = trainer(tmp_path, replace(HARD, checkpoint_seconds=0.0))
    with monkeypatch.context() as patch:
        patch.setattr(Classification, "evaluate", lambda *arguments: crash())
        with pytest.raises(Crash):
            run.run()
    with pytest.raises(InputError, match="broke off within a step; take it up again from .*last.npz"):
        run.run()
    resumed(tmp_path).run()
    assert_same_run(tmp_path, whole())


def test_an_evaluation_that_is_skipped(tmp_path):
    config = replace(HARD, evaluate_every=2)
    trainer(tmp_path / "a", config).run()
    records = [r["epoch"] for r in timeless(tmp_path / "a" / METRICS) if r["kind"] == "test"]
    assert records == [2, 3]
    run = trainer(tmp_path / "b", config)
    stop_at(run, 4)
    run.run()
    resumed(tmp_path / "b", config).run()
    assert_same_run(tmp_path / "b", tmp_path / "a")


def test_seconds_add_up(tmp_path, monkeypatch):
    """A step takes 5 s, and nothing else takes any."""
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def timed(run):
        step = run.optimizer.step
        run.optimizer.step = lambda *arguments: (clock.__setitem__(0, clock[0] + 5.0), step(*arguments))
        return run

    run = timed(trainer(tmp_path))
    stop_at(run, 7)
    run.run()
    assert checkpoint.load(tmp_path / LAST)[1]["progress"]["seconds"] == 7 * 5.0
    clock[0] += 1000.0  # nobody trains meanwhile
    assert timed(resumed(tmp_path)).run()["train_seconds"] == STEPS * 5.0
