"""What does not fit together is refused before anything is written; what a run chooses is written down."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from small_runs import HARD, MODEL, resumed, stop_at, trainer

from minivit.base.errors import InputError
from minivit.training import plan
from minivit.training.config import train_config_of
from minivit.training.engines import cpu
from minivit.training.engines.cut import cut
from minivit.training.folder import LAST
from minivit.weights import checkpoint

pytestmark = pytest.mark.usefixtures("no_figures")


def test_threads_and_micro_batches_follow_from_the_settings(tmp_path, monkeypatch):
    """Not from the machine, whose cores only share the work: another one gives the same bits."""
    flats = []
    for cores in (1, 7):
        monkeypatch.setattr(cpu, "available_cores", lambda cores=cores: cores)
        run = trainer(tmp_path / str(cores), replace(HARD, workers=0, micro_batch=0))
        assert (run.config.workers, run.config.micro_batch) == cut(MODEL, HARD.batch_size)
        run.run()
        flats.append(run.model.flat)
    np.testing.assert_array_equal(*flats)


def test_a_run_goes_on_with_the_cut_of_its_checkpoint(tmp_path, monkeypatch):
    """Its settings hold the numbers that it chose: a version with another rule goes on with the same order of sums."""
    monkeypatch.setattr(plan, "cut", lambda config, batch_size: (3, 5))
    run = trainer(tmp_path, replace(HARD, workers=0, micro_batch=0))
    stop_at(run, 5)
    run.run()
    monkeypatch.undo()
    config = train_config_of(checkpoint.read(tmp_path / LAST)[1])
    assert (config.workers, config.micro_batch) == (3, 5)
    again = resumed(tmp_path, config)
    assert (again.config.workers, again.config.micro_batch) == (3, 5) and again.state.step == 5


def test_images_that_cannot_be_halved_are_refused(tmp_path):
    with pytest.raises(InputError, match="need fixed positions"):
        trainer(tmp_path, replace(HARD, half_size=0.5))
    assert not list(tmp_path.iterdir())


SIZES = {
    "other size": (
        replace(MODEL, image_size=16),
        HARD,
        "the model takes 16x16x1 images of 10 classes; digits has 8x8x1 images of 10",
    ),
    "other channels": (
        replace(MODEL, channels=3),
        HARD,
        "the model takes 8x8x3 images of 10 classes; digits has 8x8x1 images of 10",
    ),
    "fewer classes": (
        replace(MODEL, num_classes=9),
        HARD,
        "the model takes 8x8x1 images of 9 classes; digits has 8x8x1 images of 10",
    ),
    "more classes": (
        replace(MODEL, num_classes=11),
        HARD,
        "the model takes 8x8x1 images of 11 classes; digits has 8x8x1 images of 10",
    ),
    "crops": (MODEL, replace(HARD, crop_padding=8), "crop_padding 8 moves whole images out of sight"),
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


def test_the_warm_up_takes_half_of_a_short_run_at_most(tmp_path):
    run = trainer(tmp_path, replace(HARD, warmup_epochs=100.0))
    rates = [run.learning_rate(step) for step in range(run.plan.total_steps)]
    assert max(rates) == rates[run.plan.total_steps // 2] == HARD.lr
    assert rates == sorted(rates[:6]) + sorted(rates[6:], reverse=True)
    usual = trainer(tmp_path, replace(HARD, warmup_epochs=1.0))
    assert usual.learning_rate(4) == HARD.lr > usual.learning_rate(3)


def test_a_missing_library_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    with pytest.raises(ImportError, match=r"pip install .minivit\[interop\]"):
        trainer(tmp_path / "run", model=replace(MODEL, gelu="erf"))
    assert not (tmp_path / "run").exists()
