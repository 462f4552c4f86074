"""Budgets: times in words, and the epochs that fit into them."""

import json
import signal
from dataclasses import replace

import pytest

from minivit import ViTConfig
from minivit.base.errors import InputError
from minivit.data import load
from minivit.training import budget
from minivit.training.config import TrainConfig

DIGITS = load("digits")
MODEL = ViTConfig(image_size=8, patch_size=4, channels=1, width=8, depth=1, num_heads=2, mlp_dim=16)


def epochs_within(*arguments):
    """The epochs that fit, and the seconds of each."""
    config, each = budget.within(*arguments)
    assert config.steps == 0
    return config.epochs, each


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("10m", 600), (" 1.5 h ", 5400), (".5m", 30), ("2.h", 7200)]
)
def test_times(text, seconds):
    assert budget.seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "m", "-3m", "1d", "1h30m", "nan", "inf", "1e3", "0.0h"])
def test_no_times(text):
    with pytest.raises(InputError, match="such as 90s, 10m or 2.5h"):
        budget.seconds_of(text)


def test_the_epochs_of_a_known_pace(monkeypatch):
    """0.01 s for a step after 0.5 s of a run's own; predictions take a third of it."""
    asked = []

    def pace(dataset, model, config, steps):
        asked.append(steps)
        return 0.5 + 0.01 * steps

    monkeypatch.setattr(budget, "seconds_of_training", pace)
    config = TrainConfig(batch_size=60, accumulate=2)
    n = len(DIGITS.train_images)
    steps, tests = -(-n // 120), len(DIGITS.test_images)
    epochs, each = epochs_within(10.0, DIGITS, MODEL, config)
    assert each == pytest.approx(0.01 * (steps + tests / 120 / 3))
    assert epochs == int(9.7 / each) and asked == [1, 2, 38]
    assert 38 > n / 120  # more steps than an epoch has
    asked.clear()
    time_of = budget.time_of_epochs(DIGITS, MODEL, replace(config, batch_size=2), probe=2.0)
    assert time_of(6) == pytest.approx(6 * 0.01 * (-(-n // 4) + tests / 4 / 3))
    assert asked == [1, 2, 8, 32]  # a shorter look at first, which tells nothing
    _, rare = epochs_within(10.0, DIGITS, MODEL, replace(config, evaluate_every=4))
    assert rare == pytest.approx(0.01 * (steps + tests / 120 / 3 / 4))
    _, twice = epochs_within(10.0, DIGITS, MODEL, replace(config, test_flip=True))
    assert twice == pytest.approx(0.01 * (steps + 2 * tests / 120 / 3))
    assert epochs_within(10.0, DIGITS, MODEL, replace(config, steps=5)) == (epochs, each)  # in place of those asked for
    half = replace(config, half_size=0.5)
    monkeypatch.setattr(budget, "seconds_of_training", lambda *a: 0.5 + (0.002 if a[2].half_size else 0.01) * a[3])
    few, each = epochs_within(10.0, DIGITS, MODEL, half)
    halved = round(few / 2)
    whole = steps * (0.002 * halved + 0.01 * (few - halved)) + few * 0.01 * tests / 120 / 3
    assert each == pytest.approx(whole / few) and whole < 9.7 < whole + 0.01 * steps + 0.01 * tests / 120


@pytest.mark.parametrize(("half_size", "step"), [(0.0, 0.01), (0.4, 0.01), (0.6, 0.002)])
def test_the_steps_of_an_epoch_that_does_not_fit(monkeypatch, half_size, step):
    """Most of two epochs' half is one epoch's whole; then comes one evaluation, of a third of the steps' pace."""
    monkeypatch.setattr(budget, "seconds_of_training", lambda *a: 0.5 + (0.002 if a[2].half_size else 0.01) * a[3])
    config = TrainConfig(batch_size=60, accumulate=2, epochs=9, half_size=half_size, evaluate_every=3)
    test = len(DIGITS.test_images) / 120 * 0.01 / 3
    assert -(-len(DIGITS.train_images) // 120) == 12
    for steps in 1, 7, 11:
        asked = (steps * step + test) / (1.0 - budget.RESERVE)
        found, each = budget.within(asked + 1e-6, DIGITS, MODEL, config)
        assert found == replace(config, epochs=1, steps=steps) and each == pytest.approx(12 * step + test)
    found, _ = budget.within((12 * step + test) / (1.0 - budget.RESERVE) + 1e-6, DIGITS, MODEL, config)
    assert found == replace(config, epochs=1, steps=0)
    with pytest.raises(InputError, match=r"the test after it take about 0.0\d+ s here, the budget is 0.01 s;"):
        budget.within(0.01, DIGITS, MODEL, config)


@pytest.mark.parametrize("long", [18.0, 20.0, 24.0])
def test_a_longer_run_that_was_not_slower_is_noise(monkeypatch, long):
    """Then a step is its share of all that the run took: a budget holds too few epochs rather than millions."""
    monkeypatch.setattr(budget, "seconds_of_training", lambda *a: long if a[3] > 2 else 20.0)
    assert budget.seconds_of_step(DIGITS, MODEL, TrainConfig()) == long / 3
    epochs, each = epochs_within(36000.0, DIGITS, MODEL, TrainConfig(batch_size=500))
    assert each > long and epochs == int(0.97 * 36000 / each)  # of three steps


def test_a_longer_run_is_made_until_it_is_clearly_longer(monkeypatch):
    """Of four and of 16 steps at first: noise, of the seconds that a run takes beside its steps."""
    noise = {1: 0.3, 2: 0.12, 4: -0.1, 16: 0.1}
    monkeypatch.setattr(budget, "seconds_of_training", lambda *a: 0.4 + 0.005 * a[3] + noise.get(a[3], 0.0))
    step = budget.seconds_of_step(DIGITS, MODEL, TrainConfig(), probe=1.0)
    assert step == pytest.approx(0.005, rel=0.5) and step == pytest.approx((0.32 - 0.13) / 62)


def test_the_most_epochs_that_fit_are_found_at_once(monkeypatch):
    """Also where they are millions, and whole epochs are halved ones."""
    pace = lambda *a: 1e-3 + (2e-6 if a[2].half_size else 1e-5) * a[3]  # noqa: E731
    monkeypatch.setattr(budget, "seconds_of_training", pace)
    calls, real = [], budget.time_of_epochs

    def counted(*arguments, **keywords):
        time_of = real(*arguments, **keywords)
        return lambda epochs: calls.append(epochs) or time_of(epochs)

    monkeypatch.setattr(budget, "time_of_epochs", counted)
    config = TrainConfig(batch_size=500, half_size=0.69, evaluate_every=5)
    epochs, _ = epochs_within(3600.0, DIGITS, MODEL, config)
    time_of = real(DIGITS, MODEL, config)
    assert epochs > 10**6 and len(calls) < 100
    assert time_of(epochs) <= 0.97 * 3600 < time_of(epochs + 1)


@pytest.mark.parametrize("count", [250, 200, 70])
def test_few_images_are_taken_for_several_epochs(monkeypatch, count):
    """Batches of 100, the smaller last one of 250 images left out; of 70 they are smaller; one test, of an image."""
    few = DIGITS._replace(train_images=DIGITS.train_images[:count], train_labels=DIGITS.train_labels[:count])
    seen, tests = [], []

    class Watched(budget.Trainer):
        def run(self):
            super().run()
            seen.append((self.state.step, self.state.epoch, len(self.dataset.train_images)))

        def evaluate(self, engine):
            tests.append(self.state.step)
            return super().evaluate(engine)

    monkeypatch.setattr(budget, "Trainer", Watched)
    config = TrainConfig(batch_size=100, epochs=9, workers=1, half_size=0.0)
    assert budget.seconds_of_training(few, MODEL, config, 5) > 0.0
    assert seen == [(5, 5, 70) if count == 70 else (5, 3, 200)] and tests == [5]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_steps_are_measured_ends_it_all(tmp_path, call, no_figures, monkeypatch, number):
    """The runs that are timed handle it themselves: each would be followed by the next, and by the training."""
    runs, real = [], budget.Trainer.learning_rate

    def interrupted(self, step):
        runs.append(self.out)
        if len(runs) == 2:
            signal.raise_signal(number)
        return real(self, step)

    monkeypatch.setattr(budget.Trainer, "learning_rate", interrupted)
    ended = call("train", "--config", "tests/tiny.toml", "--quiet", "--out", tmp_path / "o", "--budget", "1m")
    assert ended.status == 130 and ended.err == "interrupted\n" and "fit into" not in ended.out
    assert not (tmp_path / "o").exists() and not any(out.exists() for out in runs)
    assert len(runs) == 2  # the step under way was the last


def test_a_probe_makes_the_steps_that_it_times_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(budget.tempfile, "tempdir", str(tmp_path))
    seen = []
    kept = budget.Trainer

    class Watched(kept):
        def run(self):
            super().run()
            seen.append(self.state.step)

    monkeypatch.setattr(budget, "Trainer", Watched)
    config = TrainConfig(batch_size=100, epochs=9, workers=1)
    assert budget.seconds_of_training(DIGITS, MODEL, config, 4) > 0.0
    assert seen == [4] and not list(tmp_path.iterdir()) and capsys.readouterr() == ("", "")


def test_a_budget_sets_the_epochs(tmp_path, call, no_figures, monkeypatch):
    monkeypatch.setattr(budget, "seconds_of_training", lambda *a, **k: 0.5 + 0.01 * a[3])
    flags = ["--config", "tests/tiny.toml", "--quiet", "--out", tmp_path / "o"]
    ended = call("train", *flags, "--budget", "0.5s")
    assert ended.status == 0, ended.err
    assert "s on this machine: 7 fit into 0.5s" in ended.out and "epoch   7/7" in ended.out
    flags[-1] = tmp_path / "short"
    ended = call("train", *flags, "--budget", "0.05s")
    assert ended.status == 0, ended.err
    assert "s on this machine: 4 steps of it fit into 0.05s" in ended.out and "epoch   1/1" in ended.out
    assert json.loads((tmp_path / "short" / "summary.json").read_text())["steps"] == 4
    for more, said in (
        (["--budget", "5m", "--epochs", 3], "leave --epochs out"), (["--budget", "soon"], "a budget is a time"),
        (["--budget", "1m", "--resume"], "--budget is for a new run"),
    ):  # fmt: skip
        flags[-1] = tmp_path / "p"
        ended = call("train", *flags, *more)
        assert ended.status == 2 and said in ended.err and not (tmp_path / "p").exists()
