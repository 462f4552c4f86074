"""What does not fit together is refused before anything is written; what a run chooses is written down."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from small_runs import HARD, MODEL, resumed, stop_at, trainer

from minivit.base.errors import InputError
from minivit.model import ViTConfig
from minivit.model.costs import expected_flops
from minivit.training import plan
from minivit.training.config import train_config_of
from minivit.training.engines import cpu
from minivit.training.engines.cut import available_cores, check_workers, cut, default_micro_batch
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


def test_two_threads_where_the_work_is_enough_for_two():
    """From 2e9 FLOPs of a batch's products on."""
    config = ViTConfig()
    each = sum(expected_flops(config, 1))
    batch = -(-2_000_000_000 // each)
    assert [cut(config, size)[0] for size in (1, batch - 1, batch, 100 * batch)] == [1, 1, 2, 2]


@pytest.mark.parametrize(("changes", "images"), [
    ({"image_size": 32, "patch_size": 4}, 16),  # 65 tokens: 1024 / 65, rounded
    ({"image_size": 32, "patch_size": 4, "pooling": "mean"}, 16),
    ({"image_size": 224, "patch_size": 16}, 5),
    ({"image_size": 512, "patch_size": 4}, 1),
    ({"image_size": 224, "patch_size": 1, "stem": "2,2,2,2", "pooling": "mean"}, 5),  # as patches of 16 pixels, 196
    ({"image_size": 240, "patch_size": 15, "stem": "root", "pooling": "mean"}, 5),  # 16 tokens, taken for 225
])  # fmt: skip
def test_images_of_a_micro_batch(changes, images):
    config = ViTConfig(**changes)
    assert cut(config, 64)[1] == default_micro_batch(config) == images


@pytest.mark.parametrize(("workers", "said"), [(-1, "got -1"), (1025, "at most 1024, got 1025")])
def test_threads_beyond_reason_are_refused(workers, said):
    with pytest.raises(InputError, match=said):
        check_workers(workers)


def test_no_number_of_threads_is_one_per_core():
    assert (check_workers(0), check_workers(3), check_workers(1024)) == (available_cores(), 3, 1024)


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
