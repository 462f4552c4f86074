"""Optimisers by hand-computed steps and scalar loops; schedules, clipping and averaging by their formulas."""

import math

import numpy as np
import pytest

from minivit import InputError
from minivit.optim import (
    EMA,
    PIECE,
    SGD,
    Adam,
    AdamW,
    _pieces,
    clip_by_global_norm,
    learning_rate,
    make_optimizer,
)

MASK = np.array([1.0, 1.0, 0.0])


def test_sgd_by_hand():
    theta = np.array([1.0, 2.0, 3.0])
    sgd = SGD(theta, MASK, momentum=0.5, weight_decay=0.1)
    sgd.step(theta, np.array([1.0, 0.0, 1.0]), 0.1)
    np.testing.assert_allclose(theta, [1 - 0.1 * 1.1, 2 - 0.1 * 0.2, 3 - 0.1])  # the third is not decayed
    sgd.step(theta, np.zeros(3), 0.1)
    m = [0.55 + 0.1 * 0.89, 0.1 + 0.1 * 1.98, 0.5]
    np.testing.assert_allclose(theta, [0.89 - 0.1 * m[0], 1.98 - 0.1 * m[1], 2.9 - 0.1 * m[2]])


def scalar_adam(theta, gradients, lr, b1, b2, eps, decay, decoupled):
    m = v = 0.0
    for t, g in enumerate(gradients, start=1):
        if decoupled:
            theta -= lr * decay * theta
        else:
            g = g + decay * theta
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        theta -= lr * (m / (1 - b1**t)) / (math.sqrt(v / (1 - b2**t)) + eps)
    return theta


@pytest.mark.parametrize(("kind", "decoupled"), [(Adam, False), (AdamW, True)])
def test_adam_against_scalars(kind, decoupled):
    rng = np.random.default_rng(0)
    start, gradients = rng.standard_normal(3), rng.standard_normal((12, 3))
    theta = start.copy()
    optimizer = kind(theta, MASK, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.2)
    for g in gradients:
        kept = g.copy()
        optimizer.step(theta, g, 0.05)
        np.testing.assert_array_equal(g, kept)  # the gradient is not written to
    expected = [
        scalar_adam(start[i], gradients[:, i], 0.05, 0.8, 0.95, 1e-3, 0.2 * MASK[i], decoupled) for i in range(3)
    ]
    np.testing.assert_allclose(theta, expected, rtol=1e-12)


def test_the_first_adam_step_has_length_lr_whatever_the_gradient():
    theta = np.zeros(2)
    Adam(theta, np.zeros(2), eps=0.0).step(theta, np.array([1e-6, -1e6]), 0.01)
    np.testing.assert_allclose(theta, [-0.01, 0.01])


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_long_vectors_are_covered_to_the_last_entry(name):
    n = 2 * PIECE + 3
    rng = np.random.default_rng(0)
    theta, g, mask = rng.standard_normal(n), rng.standard_normal(n), np.ones(n)
    parts = [theta[s].copy() for s in (slice(0, 5), slice(n - 5, n))]
    make_optimizer(name, theta, mask, weight_decay=0.1).step(theta, g, 0.1)
    for part, s in zip(parts, (slice(0, 5), slice(n - 5, n)), strict=True):
        make_optimizer(name, part, np.ones(5), weight_decay=0.1).step(part, g[s], 0.1)
        np.testing.assert_array_equal(part, theta[s])
    assert theta.dtype == np.float64


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_float32_stays_float32(name):
    theta = np.ones(3, np.float32)
    optimizer = make_optimizer(name, theta, MASK.astype(np.float32), weight_decay=0.1)
    optimizer.step(theta, np.ones(3, np.float32), 0.1)
    assert theta.dtype == np.float32 and all(s.dtype == np.float32 for s in optimizer.state.values())


def test_an_unknown_optimizer_or_schedule_is_refused():
    with pytest.raises(InputError, match="adamw"):
        make_optimizer("lbfgs", np.zeros(1), np.zeros(1))
    with pytest.raises(InputError, match="cosine"):
        learning_rate(0, 1, lr=1.0, schedule="step")


def test_warm_up_then_cosine():
    rates = [learning_rate(t, 110, lr=1.0, warmup_steps=10, final_lr=0.1) for t in range(110)]
    np.testing.assert_allclose(rates[:11], np.arange(1, 12) / 11)
    assert rates[10] == 1.0
    assert math.isclose(rates[60], 0.55)  # half way: the mean of both ends
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert 0.1 < rates[-1] < 0.101


def test_linear_and_constant():
    assert [learning_rate(t, 4, lr=1.0, schedule="linear") for t in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert [learning_rate(t, 4, lr=0.3, schedule="constant") for t in range(4)] == [0.3] * 4


def test_clipping_keeps_the_direction():
    g = np.array([3.0, 4.0])
    assert clip_by_global_norm(g, 1.0) == 5.0
    np.testing.assert_allclose(g, [0.6, 0.8], rtol=1e-10)
    assert math.isclose(clip_by_global_norm(g, 2.0), 1.0, rel_tol=1e-10)
    np.testing.assert_allclose(g, [0.6, 0.8], rtol=1e-10)  # short enough: left alone
    clip_by_global_norm(g, 0.0)
    np.testing.assert_allclose(g, [0.6, 0.8], rtol=1e-10)  # no clipping
    zero = np.zeros(3, np.float32)
    assert clip_by_global_norm(zero, 1.0) == 0.0
    assert not zero.any() and zero.dtype == np.float32


def test_the_moving_average_by_its_formula():
    theta = np.array([1.0])
    ema = EMA(theta, 0.5)
    expected = 1.0
    for t in range(1, 12):
        theta += 1.0
        ema.update(theta)
        d = min(0.5, (1 + t) / (10 + t))
        expected = d * expected + (1 - d) * theta[0]
        assert math.isclose(ema.flat[0], expected, rel_tol=1e-13)
    assert theta[0] == 12.0


SETTINGS = {"momentum": 0.5, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3, "weight_decay": 0.2}


@pytest.mark.parametrize("settings", [{}, SETTINGS])
@pytest.mark.parametrize(("name", "kind"), [("sgd", SGD), ("adam", Adam), ("adamw", AdamW)])
def test_an_optimizer_by_name_has_every_setting_and_the_papers_defaults(name, kind, settings):
    flat, mask = np.ones(3, np.float32), np.array([1.0, 0.0, 1.0])
    expected = {"momentum": 0.9, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0} | settings
    made = [make_optimizer(name, flat, mask, **settings)]
    if not settings:
        made.append(kind(flat, mask))
    for optimizer in made:
        assert type(optimizer) is kind and optimizer.decay_mask is mask and optimizer.steps == 0
        assert optimizer.weight_decay == expected["weight_decay"]
        if kind is SGD:
            assert optimizer.momentum == expected["momentum"]
        else:
            assert (optimizer.betas, optimizer.eps) == ((expected["beta1"], expected["beta2"]), expected["eps"])
        assert all(s.dtype == np.float32 and s.shape == (3,) and not s.any() for s in optimizer.state.values())


def test_the_state_by_its_names_and_the_count_of_steps():
    g = np.array([1.0, -2.0, 4.0])
    for kind in (SGD, Adam, AdamW):
        theta = np.zeros(3)
        optimizer = kind(theta, MASK)
        optimizer.step(theta, g, 0.1)
        optimizer.step(theta, 0 * g, 0.1)
        assert optimizer.steps == 2
        if kind is SGD:
            np.testing.assert_allclose(optimizer.state["momentum"], 0.9 * g)
        else:
            np.testing.assert_allclose(optimizer.state["m"], 0.9 * 0.1 * g)
            np.testing.assert_allclose(optimizer.state["v"], 0.999 * 0.001 * g * g)


def test_pieces_are_short_on_the_cpu_and_one_on_another_device():
    assert _pieces(np.zeros(2 * PIECE)) == [slice(0, PIECE), slice(PIECE, 2 * PIECE)]

    class Elsewhere:
        def __init__(self, size):
            self.size = size

    Elsewhere.__module__ = "cupy"
    for size in (1, 3 * PIECE):
        assert _pieces(Elsewhere(size)) == [slice(0, size)]
    assert _pieces(Elsewhere(0)) == []


def test_arrays_of_another_kind_are_refused():
    optimizer = Adam(np.ones(3), MASK)
    for flat, grad in ((np.ones(3), [1.0, 2.0, 3.0]), ([1.0, 2.0, 3.0], np.ones(3))):
        with pytest.raises(TypeError, match="expected a NumPy or CuPy array, got list"):
            optimizer.step(flat, grad, 0.1)


def test_what_may_be_chosen_is_named():
    with pytest.raises(InputError, match="one of adamw, adam, sgd; got 'lbfgs'"):
        make_optimizer("lbfgs", np.zeros(1), np.zeros(1))
    with pytest.raises(InputError, match="one of cosine, linear, constant; got 'step'"):
        learning_rate(0, 1, lr=1.0, schedule="step")


def test_the_schedule_at_its_edges():
    assert math.isclose(learning_rate(1, 10, lr=0.6, warmup_steps=3), 0.3)
    assert learning_rate(5, 5, lr=1.0, warmup_steps=5) == 1.0  # nothing is left after the warm-up
    rates = [learning_rate(t, 4, lr=1.0, schedule="linear", final_lr=0.2, warmup_steps=3) for t in (3, 4)]
    np.testing.assert_allclose(rates, [1.0, 0.2])


def test_clipping_leaves_the_tiniest_gradient_alone():
    g = np.array([3e-14, -4e-14])
    clip_by_global_norm(g, 1.0)
    np.testing.assert_array_equal(g, [3e-14, -4e-14])


def test_the_tiny_number_of_the_clipping_is_1e_12():
    g = np.array([3e-12, -4e-12])  # of norm 5e-12, to at most 3e-12: by 3 / (5 + 1)
    clip_by_global_norm(g, 3e-12)
    np.testing.assert_allclose(g, [1.5e-12, -2e-12], rtol=1e-12)
