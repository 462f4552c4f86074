"""Classification: what is tested, and how."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import close_calls
from small_runs import FEW, HARD, MODEL, trainer

from minivit.model import ViT
from minivit.training.engines.cpu import Engine
from minivit.training.folder import LAST
from minivit.training.task import Classification
from minivit.weights import checkpoint

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.mark.parametrize("decay", [0.9, 0.0])
def test_the_moving_average_is_what_is_tested(tmp_path, decay):
    config = replace(HARD, ema_decay=decay)
    summary = trainer(tmp_path, config).run()
    with Engine(ViT(MODEL), workers=1, micro_batch=3) as engine:
        losses = {
            weights: Classification(FEW, MODEL, config).evaluate(
                engine, checkpoint.load_model(tmp_path / LAST, weights=weights)[0], FEW
            )[0]
            for weights in ("params", "auto")
        }
    assert summary["test_loss"] == losses["auto"]
    assert (losses["params"] == losses["auto"]) == (decay == 0.0)


def test_evaluation_by_hand():
    model = ViT(MODEL, seed=3)
    model.params["head.weight"][...] = np.random.default_rng(0).standard_normal((8, 10))
    with Engine(model, workers=2, micro_batch=7) as engine:
        loss, accuracy, logits = Classification(FEW, MODEL, HARD).evaluate(engine, model, FEW)
    expected = model.predict(FEW.test_images).astype(np.float64)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    log_p = expected - np.log(np.exp(expected).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(loss, -log_p[np.arange(40), FEW.test_labels].mean(), rtol=1e-5)
    assert not close_calls(expected) and accuracy == np.mean(expected.argmax(axis=1) == FEW.test_labels)


def test_evaluation_with_mirror_images():
    model = ViT(MODEL, seed=3)
    model.params["head.weight"][...] = np.random.default_rng(0).standard_normal((8, 10))
    with Engine(model, workers=2, micro_batch=7) as engine:
        _, _, logits = Classification(FEW, MODEL, replace(HARD, test_flip=True)).evaluate(engine, model, FEW)
    own, mirrored = model.predict(FEW.test_images), model.predict(FEW.test_images[:, :, ::-1])
    np.testing.assert_allclose(logits, (own + mirrored) / 2, rtol=1e-4, atol=1e-5)
    assert np.abs(own - mirrored).max() > 0.01
