"""Classifiers on frozen features: against independent formulas, and in what must change nothing."""

import numpy as np
import pytest

from minivit.base.errors import InputError
from minivit.evaluation import transfer
from minivit.evaluation.transfer import (
    accuracy,
    choose,
    few_shot,
    few_shot_rows,
    held_out,
    least_squares,
    logistic,
    logistic_loss,
    minimise,
    nearest_neighbours,
    probe,
)
from minivit.laboratory.gradcheck import check

K = 3


def features(n, d, seed=0, spread=2.0):
    """Three overlapping clouds, stretched and shifted: (n, d) and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % K)
    x = rng.standard_normal((n, d)) + spread * np.random.default_rng(99).standard_normal((K, d))[labels]
    return x * np.linspace(0.5, 3.0, d) + 4.0, labels


@pytest.mark.parametrize("n, d", [(5, 12), (12, 12), (13, 12), (14, 12), (40, 7)])  # n = d + 1 on both sides
@pytest.mark.parametrize("l2", [1e-3, 1024.0])
def test_least_squares_is_lstsq_of_the_ridge_problem(n, d, l2):
    """min |X W - Y|^2 + l2 |W|^2 is plain least squares with sqrt(l2) I appended to X and zeros to Y."""
    x, labels = features(n, d)
    X = np.hstack([(x - x.mean(axis=0)) / (x.std(axis=0) + 1e-5), np.full((n, 1), 100.0)])
    Y = np.where(np.eye(K)[labels] == 1, 1.0, -1.0)
    stacked = np.vstack([X, np.sqrt(l2) * np.eye(d + 1)]), np.vstack([Y, np.zeros((d + 1, K))])
    W = np.linalg.lstsq(*stacked, rcond=None)[0]
    fitted = least_squares(x, labels, K, l2=l2)
    np.testing.assert_allclose(fitted.W, W[:d], rtol=1e-7, atol=1e-11)
    np.testing.assert_allclose(fitted.b, 100 * W[d], rtol=1e-9, atol=1e-11)
    new, _ = features(6, d, seed=1)
    white = np.hstack([(new - x.mean(axis=0)) / (x.std(axis=0) + 1e-5), np.full((6, 1), 100.0)])
    np.testing.assert_allclose(fitted.scores(new), white @ W, rtol=1e-6, atol=1e-9)


def test_the_penalty_is_that_of_the_official_evaluation():
    x, labels = features(30, 5)
    assert transfer.L2 == 1024.0 and transfer.SHOTS == (1, 5, 10, 25)
    np.testing.assert_array_equal(least_squares(x, labels, K).W, least_squares(x, labels, K, l2=1024.0).W)


def test_units_and_offsets_of_features_change_no_score():
    x, labels = features(30, 5)
    factor, offset = np.array([0.1, 2.0, 30.0, 1.0, 5.0]), np.arange(5.0)
    before = least_squares(x, labels, K).scores(x)
    after = least_squares(x * factor + offset, labels, K).scores(x * factor + offset)
    np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-3)  # but for the 1e-5 beside the deviation


def test_a_rotation_of_whitened_features_changes_no_score():
    """The penalty is a sphere: only the whitening, which goes feature by feature, sees the axes."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(32) % K)
    x = np.linalg.qr(np.hstack([np.ones((32, 1)), rng.standard_normal((32, 4))]))[0][:, 1:] * np.sqrt(32)
    np.testing.assert_allclose(np.cov(x.T, bias=True), np.eye(4), atol=1e-12)  # white already, in every rotation
    Q = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    for fit in (least_squares, lambda *arguments: logistic(*arguments, l2=0.1, tolerance=1e-10)):
        before, after = fit(x, labels, K).scores(x), fit(x @ Q, labels, K).scores(x @ Q)
        np.testing.assert_allclose(after, before, rtol=1e-6, atol=1e-8)


def test_examples_are_drawn_class_by_class_from_one_generator():
    """As the official evaluator draws them: numpy's default_rng(seed), one permutation per class, in their order."""
    labels = np.array([1, 0, 2, 1, 0, 1, 2, 0, 1, 0])
    rng = np.random.default_rng(7)
    orders = [rng.permutation(np.where(labels == k)[0]) for k in range(3)]
    for shots in (1, 2, 3):
        expected = np.concatenate([order[:shots] for order in orders], axis=0)
        np.testing.assert_array_equal(few_shot_rows(labels, 3, shots, seed=7), expected)
    assert len(few_shot_rows(labels, 3, 3, seed=7)) == 8  # class 2 has two examples alone
    assert set(few_shot_rows(labels, 3, 1, seed=7)) < set(few_shot_rows(labels, 3, 2, seed=7))
    assert any(
        few_shot_rows(labels, 3, 1, seed=s).tolist() != few_shot_rows(labels, 3, 1).tolist() for s in range(1, 5)
    )


def test_few_shot_is_its_parts():
    (x, labels), (new, truth) = features(60, 8), features(30, 8, seed=1)
    found = few_shot(x, labels, new, truth, K, shots=(1, 4), seed=3)
    rows = few_shot_rows(labels, K, 4, seed=3)
    assert found[4] == accuracy(least_squares(x[rows], labels[rows], K).scores(new), truth) > 0.6
    assert list(found) == [1, 4]


def test_the_gradient_of_the_probe():
    x, labels = features(7, 4)
    rng = np.random.default_rng(0)

    def forward(theta):
        value, gradient = logistic_loss(theta, x, labels, K, 0.3)
        return np.array(value), gradient

    def backward(dy, gradient):
        return dy * gradient

    theta = 0.1 * rng.standard_normal(4 * K + K)
    assert all(result.passed for result in check(forward, backward, [theta], method="central", elementwise=True))


def test_minimise_finds_the_minimum_of_a_quadratic():
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.standard_normal((9, 9)))[0]
    A, c = Q * np.logspace(-2, 3, 9) @ Q.T, rng.standard_normal(9)
    found = minimise(lambda x: (x @ A @ x / 2 - c @ x, A @ x - c), np.zeros(9), tolerance=1e-10)
    np.testing.assert_allclose(found, np.linalg.solve(A, c), rtol=1e-7)


@pytest.mark.parametrize("l2", [1e-4, 1e-1])
def test_at_the_optimum_the_gradient_is_zero(l2):
    """dJ/dW = X^T (p - t) / n + l2 W and dJ/db = 1^T (p - t) / n, written out; and nothing near it is lower."""
    x, labels = features(50, 6, spread=0.5)
    fitted = logistic(x, labels, K, l2=l2, tolerance=1e-9)
    X = (x - x.mean(axis=0)) / (x.std(axis=0) + 1e-5)

    def objective(W, b):
        logits = X @ W + b
        return np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(50), labels]) + l2 / 2 * (W**2).sum()

    p = np.exp(fitted.scores(x))
    p /= p.sum(axis=1, keepdims=True)
    excess = (p - np.eye(K)[labels]) / 50
    assert np.abs(X.T @ excess + l2 * fitted.W).max() < 1e-8
    assert np.abs(excess.sum(axis=0)).max() < 1e-8
    rng, least = np.random.default_rng(0), objective(fitted.W, fitted.b)
    for _ in range(5):
        assert objective(fitted.W + 0.01 * rng.standard_normal((6, K)), fitted.b) > least


def test_duplicates_and_order_change_no_probe():
    x, labels = features(40, 5)
    once = logistic(x, labels, K, l2=0.01, tolerance=1e-10)
    order = np.random.default_rng(0).permutation(80) % 40
    twice = logistic(x[order], labels[order], K, l2=0.01, tolerance=1e-10)
    np.testing.assert_allclose(twice.W, once.W, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(twice.scores(x), once.scores(x), rtol=1e-6, atol=1e-7)


def test_the_penalty_is_chosen_on_what_is_held_out():
    x, labels = features(120, 40, spread=0.35)
    rows = held_out(120, seed=1)
    assert len(rows) == len(set(rows)) == 12
    chosen = choose(logistic, x, labels, K, rows, penalties=(1e-5, 1e-1, 10.0))
    rest = np.array([i for i in range(120) if i not in rows])
    expected = {
        l2: accuracy(logistic(x[rest], labels[rest], K, l2=l2).scores(x[rows]), labels[rows]) for l2 in (1e-5, 1e-1, 10)
    }
    assert chosen.accuracies == expected and len(set(expected.values())) > 1
    assert chosen.l2 == max(l2 for l2 in expected if expected[l2] == max(expected.values()))
    np.testing.assert_array_equal(chosen.classifier.W, logistic(x, labels, K, l2=chosen.l2).W)
    again, other = probe(x, labels, K, seed=1), probe(x, labels, K, seed=1)
    np.testing.assert_array_equal(again.classifier.W, other.classifier.W)
    assert again.accuracies == other.accuracies != probe(x, labels, K, seed=2).accuracies
    with pytest.raises(InputError, match="every training image is held out"):
        choose(logistic, x, labels, K, np.arange(120))


@pytest.mark.parametrize("k", [1, 4, 23])
@pytest.mark.parametrize("temperature", [0.07, 1e-3])
def test_neighbours_by_brute_force(k, temperature):
    (x, labels), (new, _) = features(23, 6), features(11, 6, seed=1)
    votes = nearest_neighbours(x, labels, new, K, k=k, temperature=temperature, chunk=4)
    for i, row in enumerate(new):
        cosines = [float(row @ other / np.sqrt((row @ row) * (other @ other))) for other in x]
        nearest = sorted(range(23), key=lambda j: -cosines[j])[:k]
        expected = np.zeros(K)
        for j in nearest:
            expected[labels[j]] += np.exp((cosines[j] - cosines[nearest[0]]) / temperature)
        np.testing.assert_allclose(votes[i], expected / expected.sum(), rtol=1e-9, atol=1e-300)


def test_what_changes_no_neighbour():
    (x, labels), (new, _) = features(30, 6), features(12, 6, seed=1)
    votes = nearest_neighbours(x, labels, new, K, k=5)
    Q = np.linalg.qr(np.random.default_rng(0).standard_normal((6, 6)))[0]
    np.testing.assert_allclose(nearest_neighbours(x @ Q, labels, new @ Q, K, k=5), votes, rtol=1e-9)
    lengths = np.random.default_rng(1).uniform(0.1, 10.0, (30, 1))
    np.testing.assert_allclose(nearest_neighbours(x * lengths, labels, new * 3, K, k=5), votes, rtol=1e-9)
    twice = nearest_neighbours(np.vstack([x, x]), np.tile(labels, 2), new, K, k=10)
    np.testing.assert_allclose(twice, votes, rtol=1e-9)
    itself = nearest_neighbours(x, labels, x, K, k=1)
    np.testing.assert_array_equal(itself.argmax(axis=1), labels)
    assert np.isfinite(nearest_neighbours(np.zeros((3, 2)), np.arange(3), np.zeros((2, 2)), K, k=2)).all()


def test_impossible_neighbours_are_refused():
    x, labels = features(9, 4)
    for k in (0, 10):
        with pytest.raises(InputError, match="k must be at least 1 and at most 9"):
            nearest_neighbours(x, labels, x, K, k=k)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="temperature must be above 0"):
            nearest_neighbours(x, labels, x, K, k=2, temperature=temperature)
