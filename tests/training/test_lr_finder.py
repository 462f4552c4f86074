"""The learning-rate finder: its formulas on made-up curves, its losses against those of a run at the same rates."""

import os
from dataclasses import replace

import numpy as np
import pytest
import strict_cupy
from emulator import Emulator

from minivit import ViTConfig
from minivit.base.errors import InputError
from minivit.data import load
from minivit.kernels import cuda
from minivit.training import lr_finder
from minivit.training.config import TrainConfig
from minivit.training.engines.cpu import Engine
from minivit.training.folder import METRICS, read_metrics
from minivit.training.lr_finder import Ramp, Smoothing, find, rising_rates, steepest_descent
from minivit.training.task import StepResult
from minivit.training.trainer import Trainer

DIGITS = load("digits")
FEW = DIGITS._replace(train_images=DIGITS.train_images[:60], train_labels=DIGITS.train_labels[:60])
MODEL = ViTConfig(image_size=8, patch_size=4, channels=1, width=16, depth=1, num_heads=2, mlp_dim=16, dropout=0.1)
CONFIG = TrainConfig(batch_size=16, micro_batch=8, workers=1, crop_padding=1, label_smoothing=0.1, seed=3)
OPTIMIZERS = ("adamw", "adam", "sgd", "lion", "muon")


def test_rates_rise_by_equal_factors():
    rates = rising_rates(1e-6, 1.0, 200)
    assert rates.shape == (200,) and rates[0] == 1e-6 and rates[-1] == 1.0
    np.testing.assert_allclose(rates[1:] / rates[:-1], 1e6 ** (1 / 199), rtol=1e-12)
    np.testing.assert_allclose(rising_rates(0.5, 8.0, 17)[::4], [0.5, 1, 2, 4, 8], rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((1.0, 1.0, 20), "lr_min must be below lr_max, got 1 and 1"),
        ((1.0, 0.1, 20), "lr_min must be below lr_max, got 1 and 0.1"),
        ((0.0, 1.0, 20), "must be finite numbers above 0, got 0 and 1"),
        ((-1.0, 1.0, 20), "must be finite numbers above 0"),
        ((1.0, np.inf, 20), "must be finite numbers above 0"),
        ((np.nan, 1.0, 20), "must be finite numbers above 0"),
        ((0.1, 1.0, 9), "steps must be at least 10, got 9"),
    ],
)
def test_impossible_rates(arguments, said):
    with pytest.raises(InputError, match=said):
        rising_rates(*arguments)


@pytest.mark.parametrize("b", [0.0, 0.5, 0.9])
def test_smoothing_is_a_mean_with_weights_that_fall_with_age(b):
    losses = np.random.default_rng(0).uniform(1, 3, 30)
    smooth = Smoothing(b)
    for i, found in enumerate([smooth(loss) for loss in losses]):
        weights = (1 - b) * b ** np.arange(i, -1.0, -1.0)
        np.testing.assert_allclose(found, weights @ losses[: i + 1] / weights.sum(), rtol=1e-12)


def test_steepest_descent_of_curves_that_are_known():
    rates = rising_rates(1e-4, 1.0, 101)
    x = np.log(rates)
    middle = 60
    fall = -np.tanh(2 * (x - x[middle]))
    for reach in (1, 5, 20):
        assert steepest_descent(rates, fall, reach) == middle
    # in ln(rate), not in the rate: there the slope of this curve is least at its beginning
    assert np.argmin(np.diff(fall) / np.diff(rates)) < middle
    assert steepest_descent(rates, -fall, 5) is None and steepest_descent(rates, np.ones(101), 5) is None
    # what comes after the least does not count, however steep
    cliff = np.where(np.arange(101) > 90, 10 * fall[90] + 100, fall)
    cliff[96:] = 50
    assert steepest_descent(rates, cliff, 5) == middle
    early = np.abs(np.arange(101) - 9.0)
    assert steepest_descent(rates, early, 5) is None and steepest_descent(rates, early, 4) in (4, 5)


def test_suggestions_are_of_their_steps():
    rates = rising_rates(1e-4, 1.0, 101)
    found = Ramp(rates, rates, rates, "", 50, 30)
    assert found.suggestions == {"steepest descent": rates[30], "a tenth of the least": rates[50] / 10}
    assert found._replace(steepest=None).suggestions == {}


CHANGES = {
    **{name: {"optimizer": name} for name in OPTIMIZERS},
    "accumulate": {"accumulate": 2},
    "mixed": {"mixup": 0.4, "cutmix": 1.0, "erasing": 0.5},
    "workers": {"workers": 2},
    "layers": {"layer_decay": 0.7, "init": "mimetic", "whiten": True},
    "smallest last batch": {"batch_size": 7, "micro_batch": 3},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES.keys())
def test_it_is_a_run_at_rising_rates(tmp_path, monkeypatch, changes):
    config = replace(CONFIG, **changes)
    found = find(FEW, MODEL, config, low=1e-4, high=0.02, steps=11, progress=False)
    assert found.ended == "the highest rate was reached" and len(found.losses) == 11

    monkeypatch.setattr(Trainer, "learning_rate", lambda self, step: float(rising_rates(1e-4, 0.02, 11)[step % 11]))
    run = Trainer(FEW, MODEL, replace(config, epochs=6, log_every=1), tmp_path, progress=False)
    assert run.run()["steps"] >= 11
    records = [r for r in read_metrics(tmp_path / METRICS) if r["kind"] == "train"][:11]
    assert [r["loss"] for r in records] == found.losses.tolist()
    assert [r["lr"] for r in records] == found.rates.tolist()
    smooth = Smoothing()
    assert found.smoothed.tolist() == [smooth(loss) for loss in found.losses]
    assert found.least == np.argmin(found.smoothed)


def test_the_same_seed_gives_the_same_bits_and_another_one_others():
    ramp = {"low": 1e-4, "high": 0.1, "steps": 12, "progress": False}
    first, again, other = (find(FEW, MODEL, replace(CONFIG, seed=seed), **ramp) for seed in (3, 3, 4))
    assert first.losses.tolist() == again.losses.tolist() != other.losses.tolist()


def test_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = replace(CONFIG, ema_decay=0.9, checkpoint_seconds=0.0, evaluate_every=1)
    find(FEW, MODEL, config, low=1e-4, high=0.1, steps=12, progress=False)
    assert not list(tmp_path.iterdir()) and not os.path.isfile(os.devnull)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_loss_falls_and_then_rates_are_too_high(optimizer):
    model = replace(MODEL, width=32, mlp_dim=32, dropout=0.0)
    config = replace(CONFIG, optimizer=optimizer, batch_size=32, crop_padding=0)
    found = find(DIGITS, model, config, low=1e-4, high=1000.0, steps=200, progress=False)
    assert found.smoothed[0] == found.losses[0] == pytest.approx(np.log(10), rel=1e-6)  # the head starts at zero
    lowest, last = found.smoothed.min(), found.smoothed[-1]
    assert lowest < 0.85 * found.smoothed[0]
    assert found.ended == "a number was not finite" or last > 4 * lowest
    assert found.ended != "the highest rate was reached" and len(found.rates) == len(found.losses) < 200
    assert (found.smoothed[:-1] <= 4 * np.minimum.accumulate(found.smoothed[:-1])).all()  # not a step too late
    steepest, tenth = found.suggestions.values()
    assert found.rates[0] < steepest < found.rates[found.least] == pytest.approx(10 * tenth)


def test_numbers_that_are_not_finite_end_it():
    config = replace(CONFIG, optimizer="sgd", clip_norm=0.0, momentum=0.0)
    found = find(FEW, MODEL, config, low=1e-3, high=1e38, steps=10, progress=False)
    assert found.ended in ("a number was not finite", "the smoothed loss was 4 times its least")
    assert np.isfinite(found.losses).all() and len(found.losses) < 10


def test_a_loss_that_is_not_finite_at_once(monkeypatch):
    monkeypatch.setattr(Engine, "gradient", lambda self, *arguments, **keywords: StepResult(np.float64(np.nan), 0))
    with pytest.raises(InputError, match="the very first batch is not finite"):
        find(FEW, MODEL, CONFIG, low=1e-3, high=1.0, steps=10, progress=False)


def test_a_rate_that_never_helps_suggests_nothing():
    found = find(FEW, MODEL, CONFIG, low=1e-30, high=1e-29, steps=20, progress=False)
    assert len(found.losses) == 20
    assert found.steepest is None or found.smoothed.min() > 0.99 * found.smoothed[0]


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="the model takes 16x16x1 images"):
        find(FEW, replace(MODEL, image_size=16), CONFIG, steps=10)
    with pytest.raises(InputError, match="steps must be at least"):
        find(FEW, MODEL, CONFIG, steps=9)


def test_on_a_device():
    ramp = {"low": 1e-4, "high": 0.02, "steps": 10, "progress": False}
    config = replace(CONFIG, graph=False, crop_padding=0)
    model = replace(MODEL, dropout=0.0)
    expected = find(FEW, model, config, **ramp)
    with strict_cupy.installed(), cuda.using(Emulator()):
        found = find(FEW, model, replace(config, device="cuda"), **ramp)
        assert strict_cupy.launches.total() > 0
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-4)


def test_the_constants_are_those_of_the_text():
    assert f"S_i > {lr_finder.TOO_HIGH:g} min" in lr_finder.__doc__
