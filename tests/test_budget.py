"""Budgets: times in words, and the epochs that fit into them."""

from dataclasses import replace

import pytest

from minivit import ViTConfig, budget
from minivit.data import load
from minivit.errors import InputError
from minivit.train import TrainConfig

DIGITS = load("digits")
MODEL = ViTConfig(image_size=8, patch_size=4, channels=1, width=8, depth=1, num_heads=2, mlp_dim=16)


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

    def pace(dataset, model, config, steps, trainer_of):
        asked.append(steps)
        return 0.5 + 0.01 * steps

    monkeypatch.setattr(budget, "seconds_of_training", pace)
    config = TrainConfig(batch_size=60, accumulate=2)
    n = len(DIGITS.train_images)
    steps, tests = -(-n // 120), len(DIGITS.test_images)
    epochs, each = budget.epochs_within(10.0, DIGITS, MODEL, config)
    assert each == pytest.approx(0.01 * (steps + tests / 120 / 3))
    assert epochs == int(9.7 / each) and asked[0] == 1 and asked[-1] == n // 120
    asked.clear()
    time_of = budget.time_of_epochs(DIGITS, MODEL, replace(config, batch_size=2), probe=0.5)
    assert time_of(6) == pytest.approx(6 * 0.01 * (-(-n // 4) + tests / 4 / 3))
    assert asked == [1, 2, 3]  # a shorter look than the usual one, of 38 steps
    _, rare = budget.epochs_within(10.0, DIGITS, MODEL, replace(config, evaluate_every=4))
    assert rare == pytest.approx(0.01 * (steps + tests / 120 / 3 / 4))
    _, twice = budget.epochs_within(10.0, DIGITS, MODEL, replace(config, test_flip=True))
    assert twice == pytest.approx(0.01 * (steps + 2 * tests / 120 / 3))
    half = replace(config, half_size=0.5)
    monkeypatch.setattr(budget, "seconds_of_training", lambda *a: 0.5 + (0.002 if a[2].half_size else 0.01) * a[3])
    few, each = budget.epochs_within(10.0, DIGITS, MODEL, half)
    halved = round(few / 2)
    whole = steps * (0.002 * halved + 0.01 * (few - halved)) + few * 0.01 * tests / 120 / 3
    assert each == pytest.approx(whole / few) and whole < 9.7 < whole + 0.01 * steps + 0.01 * tests / 120
    with pytest.raises(InputError, match="an epoch takes about 0 s here, the budget is 0 s"):
        budget.epochs_within(0.05, DIGITS, MODEL, config)


def test_a_probe_makes_the_steps_that_it_times_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(budget.tempfile, "tempdir", str(tmp_path))
    seen = []
    kept = budget.Trainer

    class Watched(kept):
        def run(self):
            super().run()
            seen.append(self.step)

    monkeypatch.setattr(budget, "Trainer", Watched)
    config = TrainConfig(batch_size=100, epochs=9, workers=1)
    assert budget.seconds_of_training(DIGITS, MODEL, config, 4) > 0.0
    assert seen == [4] and not list(tmp_path.iterdir()) and capsys.readouterr() == ("", "")


def test_a_budget_sets_the_epochs(tmp_path, call, no_figures, monkeypatch):
    monkeypatch.setattr(budget, "seconds_of_training", lambda *a: 0.5 + 0.01 * a[3])
    flags = ["--config", "tests/tiny.toml", "--quiet", "--out", tmp_path / "o"]
    ended = call("train", *flags, "--budget", "0.5s")
    assert ended.status == 0, ended.err
    assert "s on this machine: 7 fit into 0.5s" in ended.out and "epoch   7/7" in ended.out
    for more, said in (
        (["--budget", "5m", "--epochs", 3], "leave --epochs out"), (["--budget", "soon"], "a budget is a time"),
        (["--budget", "1m", "--resume"], "--budget is for a new run"),
    ):  # fmt: skip
        flags[-1] = tmp_path / "p"
        ended = call("train", *flags, *more)
        assert ended.status == 2 and said in ended.err and not (tmp_path / "p").exists()
