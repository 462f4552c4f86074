"""Softmax cross-entropy: worked example, stability, smoothing, and that its gradient is that of the same mean."""

import math

import numpy as np
import pytest

from minivit import softmax_cross_entropy_backward as backward
from minivit import softmax_cross_entropy_forward as forward
from minivit.laboratory import gradcheck
from minivit.layers.loss import soft_targets, squared_error_forward


def test_worked_example():
    loss, cache = forward(np.log([[1.0, 3.0], [4.0, 4.0]]), np.array([1, 0]))
    assert math.isclose(loss, (math.log(4 / 3) + math.log(2)) / 2)
    np.testing.assert_allclose(backward(1.0, cache), [[1 / 8, -1 / 8], [-1 / 4, 1 / 4]])  # (p - t) / 2


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_logits_of_ten_thousand(dtype):
    logits = np.array([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], dtype)
    loss, cache = forward(logits, np.array([1, 2]))
    assert loss.dtype == dtype
    assert math.isclose(loss, (2e4 + math.log(2)) / 2, rel_tol=1e-6)
    np.testing.assert_allclose(backward(1.0, cache), [[0.5, -0.5, 0], [0, 0.25, -0.25]], atol=1e-7)


def test_equal_logits_cost_ln_k():
    for K in (2, 10, 1000):
        assert math.isclose(forward(np.zeros((3, K)), np.zeros(3, int))[0], math.log(K))


def test_a_class_index_is_its_one_hot_target_and_smoothing_mixes_in_the_uniform_one():
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((5, 4)), rng.integers(0, 4, 5)
    onehot = np.eye(4)[labels]
    for given, soft, smoothing in ((labels, onehot, 0.0), (labels, 0.8 * onehot + 0.05, 0.2)):
        loss, cache = forward(logits, given, label_smoothing=smoothing)
        soft_loss, soft_cache = forward(logits, soft)
        assert math.isclose(loss, soft_loss, rel_tol=1e-14)
        np.testing.assert_allclose(backward(1.0, cache), backward(1.0, soft_cache), atol=1e-16)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert math.isclose(loss, -(soft * log_p).sum() / 5, rel_tol=1e-13)


def test_parts_of_a_batch_add_up_to_it():
    rng = np.random.default_rng(1)
    logits, labels = rng.standard_normal((7, 4)), rng.integers(0, 4, 7)
    loss, cache = forward(logits, labels)
    parts = [forward(logits[s], labels[s], denominator=7) for s in (slice(0, 3), slice(3, 7))]
    assert math.isclose(loss, sum(p[0] for p in parts), rel_tol=1e-14)
    np.testing.assert_allclose(backward(1.0, cache), np.concatenate([backward(1.0, p[1]) for p in parts]), rtol=1e-14)


def test_rows_of_the_gradient_sum_to_zero_and_dloss_scales_it():
    rng = np.random.default_rng(2)
    _, cache = forward(rng.standard_normal((5, 4)), rng.integers(0, 4, 5))
    dlogits = backward(1.0, cache)
    np.testing.assert_allclose(dlogits.sum(axis=1), 0.0, atol=1e-15)  # some ten roundings of 1e-16
    np.testing.assert_allclose(backward(3.0, cache), 3.0 * dlogits, rtol=1e-14)


def test_targets_that_are_no_probabilities_have_the_right_gradient_too():
    targets = np.array([[2.0, 0.0, 1.0], [0.0, 0.5, -0.25]])
    results = gradcheck.check(
        lambda x: forward(x, targets), backward, [np.random.default_rng(0).standard_normal((2, 3))], method="complex"
    )
    assert results[0].passed


@pytest.mark.parametrize(
    ("labels", "settings", "message"),
    [
        (np.array([0, 4]), {}, "found 0 to 4"),
        (np.array([-1, 0]), {}, "found -1 to 0"),
        (np.array([0.0, 1.0]), {}, "integers"),
        (np.array([0]), {}, "2 rows of logits but 1 labels"),
        (np.zeros((2, 3)), {}, "neither"),
        (np.array([0, 1]), {"label_smoothing": 1.0}, r"\[0, 1\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, settings, message):
    with pytest.raises(ValueError, match=message):
        forward(np.zeros((2, 4)), labels, **settings)


def test_rows_of_very_different_size():
    logits = np.array([[1e4, 1e4 - 1.0], [-1e4, -1e4 - 1.0]])
    assert math.isclose(forward(logits, np.array([0, 0]))[0], math.log(1 + math.exp(-1)))


def test_no_rows_at_all_and_labels_of_every_wrong_rank():
    assert soft_targets(np.zeros(0, int), 4, 0.0, np.float64).shape == (0, 4)
    for shape in ((), (2, 4, 1)):
        with pytest.raises(ValueError, match="neither"):
            soft_targets(np.zeros(shape), 4, 0.0, np.float64)
    with pytest.raises(ValueError, match="got -0.5"):
        soft_targets(np.zeros(2, int), 4, -0.5, np.float64)


def test_lists_are_refused():
    for logits, labels in (([[1.0, 2.0]], np.array([0])), (np.array([[1.0, 2.0]]), [0])):
        with pytest.raises(TypeError, match="expected a NumPy or CuPy array, got list"):
            forward(logits, labels)


def test_targets_whose_rows_do_not_sum_to_one_count_with_their_weight():
    rng = np.random.default_rng(3)
    logits, targets = rng.standard_normal((5, 4)), rng.random((5, 4))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    loss, cache = forward(logits, targets)
    assert math.isclose(loss, -(targets * np.log(p)).sum() / 5, rel_tol=1e-13)
    expected = (targets.sum(axis=1, keepdims=True) * p - targets) / 5
    np.testing.assert_allclose(backward(1.0, cache), expected, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize(("y", "targets"), [((2, 3), (3, 2)), ((2, 3), (2,)), ((6,), (6,)), ((1, 2, 3), (1, 2, 3))])
def test_the_squared_error_is_of_two_arrays_of_rows(y, targets):
    with pytest.raises(ValueError, match=r"two arrays \(n, m\) are needed"):
        squared_error_forward(np.zeros(y), np.zeros(targets))


def test_the_squared_error_is_a_mean_unless_told_otherwise():
    y, targets = np.array([[1.0, 2.0, 4.0], [0.0, 0.0, 1.0]]), np.zeros((2, 3))
    loss, cache = squared_error_forward(y, targets)
    assert loss == 22.0 / 6.0 and cache.denominator == 6.0 and type(cache.denominator) is float
    assert squared_error_forward(y, targets, denominator=4)[0] == 22.0 / 12.0
