"""Frozen parameters never change, bit for bit; runs of a number of steps are the beginning of longer ones."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import strict_cupy
from conftest import TINY
from emulator import Emulator
from small_runs import stop_at

from minivit import ViTConfig
from minivit.base import params as parameters
from minivit.base.backend import to_host
from minivit.base.errors import InputError
from minivit.base.params import freeze, frozen_names
from minivit.data import load
from minivit.kernels import cuda
from minivit.model import ViT, parameter_table
from minivit.optim import OPTIMIZERS
from minivit.training import budget
from minivit.training.config import TrainConfig
from minivit.training.engines.cpu import Engine
from minivit.training.folder import LAST, METRICS, SUMMARY, last_checkpoint, read_metrics
from minivit.training.step import Batch
from minivit.training.trainer import Trainer
from minivit.weights import checkpoint
from minivit.weights.start import Start

pytestmark = pytest.mark.usefixtures("no_figures")

DIGITS = load("digits")
# 60 images in batches of 8, two batches a step: 8 batches, 4 steps an epoch, the last of both smaller than the others
FEW = DIGITS._replace(
    train_images=DIGITS.train_images[:60], train_labels=DIGITS.train_labels[:60],
    test_images=DIGITS.test_images[:20], test_labels=DIGITS.test_labels[:20],
)  # fmt: skip
MODEL = ViTConfig(
    image_size=8, patch_size=4, channels=1, width=8, depth=3, num_heads=2, mlp_dim=16, dropout=0.1, drop_path=0.1
)
TABLE = parameter_table(MODEL)
CONFIG = TrainConfig(
    epochs=1, batch_size=8, accumulate=2, lr=0.03, ema_decay=0.9, label_smoothing=0.1, weight_decay=0.3, micro_batch=3,
    workers=1, log_every=1, checkpoint_seconds=1e6, seed=5,
)  # fmt: skip
PATTERNS = "patch_embed*,blocks.[0-1].*,!*.norm1.*,pos_embed"


def start(table=TABLE):
    """Random parameters: with a head of zeros the first gradients of all others would be zero."""
    flat = np.random.default_rng(0).standard_normal(parameters.count(table)).astype(np.float32)
    return Start(flat, {"crc": 0})


def trainer(out, config, **keywords):
    return Trainer(FEW, MODEL, config, out, describe={"data": "digits"}, start=start(), progress=False, **keywords)


# ---- which ones ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ("cls_token", ["cls_token"]),
        (" head.bias , cls_token", ["cls_token", "head.bias"]),
        ("blocks.[0-1].norm?.weight", [f"blocks.{i}.norm{j}.weight" for i in (0, 1) for j in (1, 2)]),
        ("norm*", ["norm.weight", "norm.bias"]),
        ("*,!blocks.*,!head*,!n*", ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]),
        ("norm.*,!norm.bias", ["norm.weight"]),
        ("!norm.bias,norm.*", ["norm.weight", "norm.bias"]),  # the last that fits decides
    ],
)
def test_patterns(patterns, names):
    assert frozen_names(TABLE, patterns) == names


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        ("block.*", r"freeze 'block.\*': no parameter is called 'block.\*'; names are such as cls_token, pos_embed"),
        ("head.*,!heads.*", r"no parameter is called '!heads.\*'"), ("head.*,", "no parameter is called ''"),
        ("HEAD.*", "no parameter is called"), ("*", r"leaves nothing to train; except the head with '\*,!head.\*'"),
    ],
)  # fmt: skip
def test_patterns_that_mean_nothing(patterns, said):
    with pytest.raises(InputError, match=said):
        frozen_names(TABLE, patterns)


def test_the_table_and_the_mask():
    table, trained = freeze(TABLE, ["head.weight", "cls_token"])
    named = parameters.views(trained, TABLE)
    assert all(view.all() == (name not in ("head.weight", "cls_token")) for name, view in named.items())
    assert trained.sum() == trained.size - 8 - 80
    decays = {spec.name: spec.decay for spec in table}
    assert not decays["head.weight"] and decays["blocks.0.mlp.fc1.weight"] and not decays["norm.bias"]


# ---- bit for bit -----------------------------------------------------------------------------------------------------


def assert_frozen(before, after, names):
    before, after = (parameters.views(flat, TABLE) for flat in (before, after))
    for name in before:
        same = before[name].tobytes() == after[name].tobytes()
        assert same == (name in names), name


SETTINGS = {name: {"optimizer": name} for name in OPTIMIZERS} | {
    "one batch": {"accumulate": 1}, "layer decay": {"layer_decay": 0.5},
    "sgd without momentum": {"optimizer": "sgd", "momentum": 0.0}, "no clipping": {"clip_norm": 0.0},
    "half size": {"half_size": 0.5, "epochs": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_frozen_parameters_stay_bit_for_bit(tmp_path, name):
    config = replace(CONFIG, freeze=PATTERNS, **SETTINGS[name])
    model, first = MODEL, start()
    if config.half_size:  # which needs fixed positions
        config, model = replace(config, freeze=PATTERNS.removesuffix(",pos_embed")), replace(MODEL, pos_embed="none")
        first = start(parameter_table(model))
    run = Trainer(FEW, model, config, tmp_path, start=first, progress=False)
    assert run.plan.frozen and run.run()["steps"] == run.plan.total_steps
    before, after, average = (parameters.views(f, run.model.table) for f in (first.flat, run.model.flat, run.ema.flat))
    for key in before:
        assert (before[key].tobytes() == after[key].tobytes()) == (key in run.plan.frozen), key
        assert (before[key].tobytes() == average[key].tobytes()) == (key in run.plan.frozen), key


def test_the_frozen_do_not_count_in_the_clipped_norm(tmp_path):
    """A step of plain gradient descent is as long as the clipped gradient: all of it goes to those that are trained."""
    config = replace(CONFIG, optimizer="sgd", momentum=0.0, weight_decay=0.0, lr=1.0, clip_norm=0.25, steps=1)
    config = replace(config, warmup_epochs=0.0, freeze="blocks.*")
    run = trainer(tmp_path, config)
    run.run()
    moved = run.model.flat.astype(np.float64) - start().flat
    np.testing.assert_allclose(np.linalg.norm(moved), 0.25, rtol=1e-5)
    norm = read_metrics(tmp_path / METRICS)[0]["grad_norm"]
    assert norm > 0.25
    images, labels = FEW.train_images[:16], FEW.train_labels[:16]
    model = ViT(MODEL, flat=start().flat)
    _, trained = freeze(TABLE, run.plan.frozen)
    grads = []
    for mask in (None, trained):
        with Engine(model, workers=2, micro_batch=3, trained=mask) as engine:
            engine.gradient(images, labels)
            grads.append(engine.grad.copy())
    np.testing.assert_array_equal(grads[1], grads[0] * trained)
    assert np.linalg.norm(grads[1]) < np.linalg.norm(grads[0])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_on_a_gpu(optimizer):
    """The kernels of a whole step, on the emulator."""
    config = replace(CONFIG, freeze=PATTERNS, optimizer=optimizer, device="cuda", accumulate=1, steps=2, graph=False)
    with strict_cupy.installed(), cuda.using(Emulator()):
        run = Trainer(FEW, MODEL, config, os.devnull, start=start(), progress=False)
        with run.engine() as engine:
            images, labels = run.data.train_images[:8], run.data.train_labels[:8]
            step = run.step_of(engine)
            for number in range(2):
                step([Batch(number, images, labels)], 8, 0.03)
        assert_frozen(start().flat, to_host(run.model.flat), run.plan.frozen)
        assert_frozen(start().flat, to_host(run.ema.flat), run.plan.frozen)


def test_it_is_told(tmp_path, call):
    ended = call("train", *TINY, "--freeze", "*,!head.*", "--steps", 2, "--out", tmp_path / "a")
    assert ended.status == 0 and ended.err == ""
    total, frozen = 16 * 16 + 16 + 16 + 5 * 16 + 2 * 16 * 3 + 4 * 16 * 16 + 4 * 16 + 2 * 16 * 32 + 32 + 16, 170
    assert f"{total:,} of the parameters stay as they are" in ended.out and frozen == 17 * 10
    assert ended.out.splitlines()[-1].startswith("test accuracy ") and " after 2 steps in " in ended.out


# ---- steps -----------------------------------------------------------------------------------------------------------

STEADY = replace(CONFIG, schedule="constant", warmup_epochs=0.0)


def arrays_of(out, prefix):
    return {k: v for k, v in checkpoint.load(out / LAST)[0].items() if k.startswith(prefix)}


def assert_same(first, second):
    assert first.keys() == second.keys() and first
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def stopping(run, after):
    """Make a run stop after so many steps."""
    stop_at(run, after)
    return run


@pytest.mark.parametrize("steps", [1, 3, 4, 5, 6, 8, 10])
def test_so_many_steps_are_the_beginning_of_a_longer_run(tmp_path, steps):
    short = trainer(tmp_path / "short", replace(STEADY, steps=steps))
    summary = short.run()
    assert stopping(trainer(tmp_path / "long", replace(STEADY, epochs=4)), steps).run() is None
    for prefix in ("params/", "ema/", "optimizer/"):
        assert_same(arrays_of(tmp_path / "short", prefix), arrays_of(tmp_path / "long", prefix))
    assert summary["steps"] == steps and summary["epochs"] == -(-steps // 4) == short.config.epochs
    records = read_metrics(tmp_path / "short" / METRICS)
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, steps + 1))
    assert records[-1]["kind"] == "test" and records[-1]["step"] == steps
    assert short.plan.images_in_all == 60 * (steps // 4) + 16 * (steps % 4)


def test_as_many_steps_as_epochs_hold_are_those_epochs(tmp_path):
    trainer(tmp_path / "steps", replace(CONFIG, steps=8)).run()
    trainer(tmp_path / "epochs", replace(CONFIG, epochs=2)).run()
    assert_same(arrays_of(tmp_path / "steps", ""), arrays_of(tmp_path / "epochs", ""))


@pytest.mark.parametrize("stop", [1, 4, 5, 6, 7])
def test_a_run_of_steps_resumes_exactly(tmp_path, stop):
    config = replace(CONFIG, steps=7, half_size=0.0)
    trainer(tmp_path / "whole", config).run()
    assert stopping(trainer(tmp_path / "broken", config), stop).run() is None
    again = trainer(tmp_path / "broken", config, resume=last_checkpoint(tmp_path / "broken"))
    assert again.state.step == stop and again.run()["steps"] == 7
    assert_same(arrays_of(tmp_path / "whole", ""), arrays_of(tmp_path / "broken", ""))
    finished = trainer(tmp_path / "broken", config, resume=last_checkpoint(tmp_path / "broken"))
    assert finished.finished and finished.run()["steps"] == 7


def test_the_schedule_ends_with_the_steps(tmp_path):
    run = trainer(tmp_path, replace(CONFIG, steps=10, schedule="linear", warmup_steps=2, warmup_epochs=3.0, lr=0.8))
    rates = [run.learning_rate(step) for step in range(11)]
    np.testing.assert_allclose(rates, [0.8 / 3, 1.6 / 3, *(0.8 - 0.1 * np.arange(9))], atol=1e-12)
    halved = trainer(tmp_path, replace(CONFIG, steps=10, warmup_steps=500))
    assert np.argmax([halved.learning_rate(step) for step in range(10)]) == 5  # at most half of the run


def test_a_checkpoint_that_counts_more_steps_than_the_run_has(tmp_path):
    config = replace(CONFIG, steps=6)
    trainer(tmp_path, config).run()
    arrays, meta = checkpoint.load(tmp_path / LAST)
    for changes in ({"step": 8}, {"step": 7}, {"epoch": 1}):
        checkpoint.save(tmp_path / LAST, arrays, meta | {"progress": meta["progress"] | changes})
        with pytest.raises(InputError, match="contradict each other|another number of steps"):
            trainer(tmp_path, config, resume=last_checkpoint(tmp_path))


def test_the_whole_command_may_be_given_again(tmp_path, call):
    flags = [*TINY, "--steps", 8, "--out", tmp_path / "a"]
    ended = call("train", *flags)
    assert ended.status == 0 and "after 8 steps" in ended.out
    summary = json.loads((tmp_path / "a" / SUMMARY).read_text())
    assert summary["steps"] == 8 and summary["epochs"] == 2 and summary["settings"]["train"]["steps"] == 8
    assert call("train", *flags, "--resume").status == 0
    ended = call("train", *flags[:-4], "--steps", 9, "--resume", "--out", tmp_path / "a")
    assert ended.status == 2 and "steps 8 there, 9 asked for" in ended.err


def test_a_budget_measures_its_own_steps(monkeypatch):
    counts = []

    class Watched(Trainer):
        def run(self):
            super().run()
            counts.append(self.state.step)

    monkeypatch.setattr(budget, "Trainer", Watched)
    assert budget.seconds_of_training(FEW, MODEL, replace(CONFIG, steps=100_000), 2) > 0.0
    assert counts == [2]
