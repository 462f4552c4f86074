"""Steps that diverge end in one line, with the name of the first number that is not finite."""

import json
import math
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from small_runs import FEW, HARD, MODEL, STEPS, assert_same_run, before_step, resumed, stop_at, timeless, trainer, whole

from minivit import softmax_cross_entropy_backward, softmax_cross_entropy_forward
from minivit.base.errors import InputError
from minivit.laboratory.diagnosis import diagnose
from minivit.model import ViT
from minivit.training.engines.cpu import Engine
from minivit.training.folder import BEST, LAST, METRICS
from minivit.training.step import Batch, NotFinite
from minivit.training.stream import begin_epoch, groups
from minivit.training.task import Classification, Evaluation, StepResult
from minivit.weights import checkpoint

pytestmark = pytest.mark.usefixtures("no_figures")


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
    assert resumed(tmp_path, config).state.step < STEPS
    assert not list(tmp_path.glob(".*"))
    for line in (tmp_path / METRICS).read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_an_infinite_gradient_of_a_finite_loss_is_noticed_before_the_step(tmp_path):
    run = trainer(tmp_path, replace(HARD, checkpoint_seconds=0.0))
    real = Engine.gradient

    def gradient(self, *arguments, **keywords):
        result = real(self, *arguments, **keywords)
        if run.state.step == 2:
            self.grad[3] = np.inf
        return result

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match="gradient's norm inf at step 2"):
        patch.setattr(Engine, "gradient", gradient)
        run.run()
    assert checkpoint.load(tmp_path / LAST)[1]["progress"]["step"] == 2


def test_a_test_loss_that_is_not_finite_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(Classification, "evaluate", lambda *arguments: Evaluation(math.nan, 0.1, None))
    with pytest.raises(InputError, match="the test loss is nan at step 4"):
        trainer(tmp_path).run()
    assert not (tmp_path / BEST).exists() and resumed(tmp_path).state.step == 0
    assert all(r["kind"] == "train" for r in timeless(tmp_path / METRICS))


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_decay_falls_on_the_matrices_alone(tmp_path, optimizer):
    run = trainer(tmp_path, replace(HARD, optimizer=optimizer, weight_decay=0.5))
    run.model.flat[...] = 1.0
    run.optimizer.step(run.model.flat, np.zeros_like(run.model.flat), 0.1)
    for name, value in run.model.params.items():
        decayed = name.endswith("weight") and "norm" not in name
        assert ((value < 1.0) if decayed else (value == 1.0)).all(), name


def test_a_diverging_run_names_the_first_tensor_that_is_not_finite(tmp_path):
    run = trainer(tmp_path / "run", replace(HARD, workers=2))

    def spoil():
        run.model.params["blocks.1.mlp.fc1.weight"][...] = 1e38

    before_step(run, 6, spoil)  # between the gradient and the update of step 6: the loss of step 7 overflows
    with pytest.raises(InputError, match=r"blocks\.1\.mlp.*the first tensor .*not finite") as caught:
        run.run()
    assert "\n" not in str(caught.value) and "the run diverged" in str(caught.value)
    assert checkpoint.load(tmp_path / "run" / LAST)[1]["progress"]["step"] < 7


def test_checking_every_tensor_changes_no_number_and_costs_nothing_when_it_is_off(tmp_path):
    parts = []

    def counted(model, function):
        parts.append(1)
        return diagnose(model, function)

    run = trainer(tmp_path, diagnose=counted)
    stop_at(run, 6)
    assert run.run() is None and not parts
    assert resumed(tmp_path, replace(HARD, check_finite=True), diagnose=counted).run()["steps"] == STEPS
    # 60 images in parts of 3 and, of each batch of 8, one of 2: of the 8 batches in each of two epochs, 4 were done
    assert len(parts) == 4 * 3 - 1 + 8 * 3 - 1
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


def test_a_step_that_diverges_updates_nothing(tmp_path):
    run = trainer(tmp_path)
    flat, average = run.model.flat.copy(), run.ema.flat.copy()
    begin_epoch(run)
    with run.engine() as engine, closing(groups(run)) as steps:
        step = run.step_of(engine)
        batches, count, *_ = next(steps)
        engine.loss = lambda model, images, targets, grads, **keywords: StepResult(np.float32(np.nan), 0)
        with pytest.raises(NotFinite, match="the loss is nan, its gradient's norm 0.0"):
            step(batches, count, 0.1)
    np.testing.assert_array_equal(run.model.flat, flat)
    np.testing.assert_array_equal(run.ema.flat, average)
    assert run.optimizer.steps == run.ema.steps == 0 and not any(v.any() for v in run.optimizer.state.values())


def test_a_step_is_gradient_clipping_update_and_average(tmp_path):
    """By hand, over two batches of which the second is smaller."""
    config = replace(HARD, clip_norm=0.01, accumulate=2, optimizer="sgd", momentum=0.0, weight_decay=0.0)
    plain = replace(MODEL, dropout=0.0, attention_dropout=0.0, drop_path=0.0)
    run = trainer(tmp_path, config, model=plain)
    run.model.params["head.weight"][...] = np.random.default_rng(0).standard_normal((8, 10))
    start, average = run.model.flat.copy(), run.ema.flat.copy()
    images, labels = FEW.train_images[:13], FEW.train_labels[:13]
    with run.engine() as engine:
        step = run.step_of(engine)
        batches = [Batch(0, images[:8], labels[:8]), Batch(1, images[8:], labels[8:])]
        loss, correct, norm, count = step(iter(batches), 13, 0.5)
    logits, cache = ViT(plain, flat=start.copy()).forward(images)
    expected, loss_cache = softmax_cross_entropy_forward(logits, labels, label_smoothing=0.1)
    flat, grads = run.model.gradient_buffer()
    run.model.backward(softmax_cross_entropy_backward(1.0, loss_cache), cache, grads)
    np.testing.assert_allclose([loss, norm], [expected, np.linalg.norm(flat)], rtol=1e-4)
    assert correct == (logits.argmax(axis=1) == labels).sum() and count == 13 and norm > 0.01
    np.testing.assert_allclose(run.model.flat, start - 0.5 * 0.01 / norm * flat, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(run.ema.flat, average + (1 - 2 / 11) * (run.model.flat - average), rtol=1e-4, atol=1e-7)
