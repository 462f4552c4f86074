"""The loop learns, and says what it did."""

import time
from dataclasses import replace

import numpy as np
import pytest
from conftest import close_calls
from small_runs import HARD, MODEL, STEPS, resumed, stop_at, timeless, trainer, whole

from minivit.model import ViT
from minivit.optim import learning_rate
from minivit.training import task
from minivit.training.config import TrainConfig
from minivit.training.engines.cpu import Engine
from minivit.training.folder import BEST, LAST, METRICS, read_metrics
from minivit.training.task import Classification, Evaluation
from minivit.weights import checkpoint

pytestmark = pytest.mark.usefixtures("no_figures")


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
    undecided, count, evaluate = [], task.correct_count, Classification.evaluate

    def counted(logits, labels):
        undecided.append(close_calls(logits))
        return count(logits, labels)

    def tested(*arguments):
        evaluation = evaluate(*arguments)
        undecided.append(close_calls(evaluation.outputs))
        return evaluation

    monkeypatch.setattr(task, "correct_count", counted)
    monkeypatch.setattr(Classification, "evaluate", tested)
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


def test_metrics_say_what_was_done():
    records = timeless(whole() / METRICS)
    steps = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in steps] == list(range(1, STEPS + 1))
    assert [r["epoch"] for r in steps] == [1] * 4 + [2] * 4 + [3] * 4
    for r in steps:
        expected = learning_rate(r["step"] - 1, STEPS, lr=0.01, schedule="cosine", warmup_steps=4, final_lr=0.0)
        assert r["lr"] == expected
    tests = [r for r in records if r["kind"] == "test"]
    assert [(r["step"], r["epoch"]) for r in tests] == [(4, 1), (8, 2), (12, 3)]
    for r in tests:  # the epoch's mean is that of its steps, each weighted by its images: 16, 16, 16, 12
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
    stop_at(run, 7)
    run.run()
    resumed(tmp_path).run()
    assert numbers == list(range(24))


def test_the_timer_of_the_last_checkpoint_is_not_reset_by_the_best_one(tmp_path, monkeypatch):
    """With an epoch shorter than checkpoint_seconds and a best one after another, last.npz must still be written."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    run = trainer(tmp_path, replace(HARD, epochs=10, checkpoint_seconds=30.0), draw=None)
    steps = iter(range(1000))
    accuracy = iter(np.linspace(0.1, 0.9, 20))
    monkeypatch.setattr(Classification, "evaluate", lambda *arguments: Evaluation(1.0, next(accuracy), None))
    saved = []
    real = run.save
    run.save = lambda name=LAST: (saved.append((name, run.state.step)), real(name))
    real_step = run.optimizer.step
    run.optimizer.step = lambda *a: (clock.__setitem__(0, 5.0 * next(steps)), real_step(*a))  # an epoch takes 20 s
    run.run()
    assert sum(name == BEST for name, _ in saved) == 10
    assert [step for name, step in saved if name == LAST] == [0, 7, 13, 19, 25, 31, 37, 40]


def test_the_test_images_are_looked_at_once_an_epoch(tmp_path, monkeypatch):
    """The last epoch's evaluation is the summary's; a finished run that is taken up is tested again."""
    tests, real = [], Classification.evaluate
    monkeypatch.setattr(Classification, "evaluate", lambda *arguments: tests.append(1) or real(*arguments))
    summary = trainer(tmp_path).run()
    assert len(tests) == HARD.epochs
    assert resumed(tmp_path).run() == summary
    assert len(tests) == HARD.epochs + 1
