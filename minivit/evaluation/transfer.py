r"""What features are worth: simple classifiers on top of a frozen model, each fitted exactly, without a training run.

All of them take features x (n, d), a row for each image, and labels (n,); all else is float64.

Few-shot least squares (section 4.1 of the ViT paper; as its authors evaluate it)
    From each class take a few examples. Their features are whitened, x <- (x - mean) / (std + 1e-5), and get a constant
    feature of 100, so large that its weight, the bias, is hardly penalised. With targets Y that are +1 at the class and
    -1 elsewhere,

        W = argmin ||X W - Y||^2 + l2 ||W||^2 = (X^T X + l2 I)^-1 X^T Y = X^T (X X^T + l2 I)^-1 Y,     l2 = 2^10.

    The two are equal because (X^T X + l2 I) X^T = X^T (X X^T + l2 I). The first has a matrix of d + 1 rows, the second
    one of n: the smaller is taken, as Q diag(e) Q^T with orthogonal Q, and its inverse is Q diag(1 / (e + l2)) Q^T.

Linear probe
    Multinomial logistic regression on all training images, with the project's own linear layer and loss:

        J(W, b) = 1/n sum_i crossentropy(x_i W + b, label_i) + l2/2 ||W||^2.

    J is convex, so that its minimum is where the gradient is zero, however it is reached; L-BFGS gets there. Of several
    penalties the one is taken that does best on a tenth of the training images, which are held out; then all are
    fitted.

Weighted nearest neighbours (Wu et al. 2018, arXiv:1805.01978; as DINO, arXiv:2104.14294, evaluates it)
    Features are scaled to length 1. The k training images of the largest cosine s_j with a test image vote for
    their own classes, each with the weight exp(s_j / T), k = 20 and T = 0.07.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from minivit.base.errors import InputError
from minivit.layers.linear import linear_backward, linear_forward
from minivit.layers.loss import one_hot, softmax_cross_entropy_backward, softmax_cross_entropy_forward

SHOTS, L2 = (1, 5, 10, 25), 2.0**10  # of the official evaluation
BIAS = 100.0
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # that a probe chooses from
NEIGHBOURS, TEMPERATURE = 20, 0.07
TINY = 1e-12  # no feature vector is scaled up beyond 1 / TINY


class Linear(NamedTuple):
    """A linear classifier of whitened features."""

    mean: Any  # (d,)
    scale: Any  # (d,)
    W: Any  # (d, K)
    b: Any  # (K,)

    def scores(self, x):
        """Class scores of features.

        Math    (x - mean) / scale W + b
        Shapes  x (n, d)  ->  (n, K) float64
        """
        return (x - self.mean) / self.scale @ self.W + self.b


def accuracy(scores, labels):
    """The share of rows whose largest score is at the label."""
    return float((scores.argmax(axis=1) == labels).mean())


def few_shot_rows(labels, num_classes, shots, *, seed=0):
    """Rows of the first ``shots`` examples of each class, in an order drawn from the seed; class after class.

    The examples of a few shots are among those of more. A class that has fewer examples gives all that it has.
    """
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(np.flatnonzero(labels == k)) for k in range(num_classes)]
    return np.concatenate([order[:shots] for order in orders])


def whitening(x):
    """Mean and standard deviation of each feature, the latter with 1e-5 added."""
    x = np.asarray(x, np.float64)
    return x.mean(axis=0), x.std(axis=0) + 1e-5


def least_squares(x, labels, num_classes, *, l2=L2):
    """The regularised least-squares classifier of whitened features, in closed form.

    Math    W = (X^T X + l2 I)^-1 X^T Y = X^T (X X^T + l2 I)^-1 Y;  X whitened, with a constant feature of 100; Y +-1
    Shapes  x (n, d), labels (n,)  ->  Linear
    Source  Dosovitskiy et al. 2020, section 4.1; its code is big_vision's evaluators/fewshot_lsr.py
    """
    mean, scale = whitening(x)
    n, d = x.shape
    X = np.full((n, d + 1), BIAS)
    X[:, :d] = (x - mean) / scale
    Y = 2.0 * one_hot(labels, num_classes, np.float64) - 1.0  # (n, K)
    if n >= d + 1:
        e, Q = np.linalg.eigh(X.T @ X)  # (d + 1,), (d + 1, d + 1)
        W = Q / (e + l2) @ (Q.T @ (X.T @ Y))
    else:
        e, Q = np.linalg.eigh(X @ X.T)  # (n,), (n, n)
        W = X.T @ (Q / (e + l2) @ (Q.T @ Y))
    return Linear(mean, scale, W[:d], BIAS * W[d])  # W (d + 1, K)


def few_shot(train, train_labels, test, test_labels, num_classes, *, shots=SHOTS, seed=0, l2=L2):
    """Test accuracies of least squares from a few examples of each class: a dict of shots to accuracy.

    Shapes  train (n, d), train_labels (n,), test (m, d), test_labels (m,)
    """
    accuracies = {}
    for count in shots:
        rows = few_shot_rows(train_labels, num_classes, count, seed=seed)
        classifier = least_squares(train[rows], train_labels[rows], num_classes, l2=l2)
        accuracies[count] = accuracy(classifier.scores(test), test_labels)
    return accuracies


def logistic_loss(theta, x, labels, num_classes, l2):
    """The objective of `logistic` and its gradient, of W and b in one vector.

    Math    J = 1/n sum_i crossentropy(x_i W + b, label_i) + l2/2 ||W||^2
    Shapes  theta (d K + K,), x (n, d), labels (n,)  ->  J, dJ (d K + K,)
    """
    d = x.shape[1]
    W, b = theta[: d * num_classes].reshape(d, num_classes), theta[d * num_classes :]
    logits, cache = linear_forward(x, W, b)
    loss, loss_cache = softmax_cross_entropy_forward(logits, labels)
    _, dW, db = linear_backward(softmax_cross_entropy_backward(1.0, loss_cache), cache)
    return float(loss + l2 / 2 * (W * W).sum()), np.concatenate([(dW + l2 * W).ravel(), db])


def minimise(function, theta, *, tolerance=1e-6, steps=1000, memory=10):
    """L-BFGS: the minimum of a smooth convex function, from its values and gradients.

    Math    theta <- theta - t H g, where H is what the last few steps s and the gradient's changes y say of the inverse
            Hessian, H y = s, and t is 1, or halved until the function falls by 1e-4 of what its slope promises
    Shapes  ``function(theta) -> value, gradient``; theta (n,)  ->  (n,)
    Ends where no entry of the gradient exceeds ``tolerance``, after ``steps``, or where rounding allows no step.
    Source  Nocedal and Wright, "Numerical Optimization", algorithms 7.4 and 7.5; Hager and Zhang 2005 for the rounding.
    """
    value, g = function(theta)
    pairs = []  # (s, y, 1 / y.s), the latest last
    for _ in range(steps):
        if np.abs(g).max() <= tolerance:
            break
        q, alphas = g.copy(), []
        for s, y, rho in reversed(pairs):
            alphas.append(rho * (s @ q))
            q -= alphas[-1] * y
        if pairs:
            s, y, rho = pairs[-1]
            q /= rho * (y @ y)  # H of no pairs: the scale of the latest one
        else:
            q /= max(1.0, np.linalg.norm(g))
        for (s, y, rho), alpha in zip(pairs, reversed(alphas), strict=True):
            q += (alpha - rho * (y @ q)) * s
        slope, t = -(g @ q), 1.0
        while True:
            new_value, new_g = function(theta - t * q)
            falls = new_value <= value + 1e-4 * t * slope
            # near the minimum the fall is lost in the value's rounding, and the slope tells: it has become flatter
            if falls or (new_value <= value + 1e-12 * abs(value) and abs(new_g @ q) <= -0.9 * slope):
                break
            t /= 2.0
            if t < 1e-10:
                return theta
        s, y = -t * q, new_g - g
        if (curvature := y @ s) > 1e-15 * (y @ y):
            pairs = [*pairs, (s, y, 1.0 / curvature)][-memory:]
        theta, value, g = theta + s, new_value, new_g
    return theta


def logistic(x, labels, num_classes, *, l2, tolerance=1e-6):
    """Multinomial logistic regression of whitened features.

    Math    argmin_{W, b} 1/n sum_i crossentropy(x_i W + b, label_i) + l2/2 ||W||^2
    Shapes  x (n, d), labels (n,)  ->  Linear
    """
    mean, scale = whitening(x)
    white = (x - mean) / scale
    d = x.shape[1]
    theta = np.zeros(d * num_classes + num_classes)
    theta = minimise(lambda theta: logistic_loss(theta, white, labels, num_classes, l2), theta, tolerance=tolerance)
    return Linear(mean, scale, theta[: d * num_classes].reshape(d, num_classes), theta[d * num_classes :])


def held_out(n, *, seed=0, share=0.1):
    """Rows to choose settings by, a random ``share`` of n, at least one."""
    return np.random.default_rng(seed).permutation(n)[: max(1, round(share * n))]


class Selection(NamedTuple):
    """A classifier whose penalty was chosen on images that were held out."""

    classifier: Linear  # of all the images
    l2: float
    accuracies: dict  # of each penalty, on the images held out


def choose(fit, x, labels, num_classes, rows, *, penalties=PENALTIES):
    """Fit with each penalty to all but some rows, take the penalty of the best accuracy on these, and fit to all.

    ``fit`` is `logistic` or `least_squares`. Of penalties that do equally well the largest is taken.
    Shapes  x (n, d), labels (n,), rows (m,)  ->  Selection
    """
    rest = np.setdiff1d(np.arange(len(labels)), rows)
    if not len(rest):
        raise InputError("every training image is held out, none is left to learn from; give more of them")
    accuracies = {}
    for l2 in sorted(penalties, reverse=True):
        classifier = fit(x[rest], labels[rest], num_classes, l2=l2)
        accuracies[l2] = accuracy(classifier.scores(x[rows]), labels[rows])
    best = max(accuracies, key=accuracies.get)  # the first of the best
    return Selection(fit(x, labels, num_classes, l2=best), best, accuracies)


def probe(x, labels, num_classes, *, seed=0, penalties=PENALTIES):
    """The linear probe: logistic regression, its penalty chosen on a random tenth of the images.

    Shapes  x (n, d), labels (n,)  ->  Selection
    """
    return choose(logistic, x, labels, num_classes, held_out(len(labels), seed=seed), penalties=penalties)


def unit_length(x):
    """Rows scaled to length 1; a row of zeros stays one."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), TINY)


def check_neighbours(n, k, temperature):
    """Raises InputError if k is not in 1 .. n, or the temperature is not above 0."""
    if not 1 <= k <= n:
        raise InputError(f"k must be at least 1 and at most {n}, the number of training images; got {k}")
    if not temperature > 0.0:
        raise InputError(f"the temperature must be above 0, got {temperature:g}")


def nearest_neighbours(train, labels, test, num_classes, *, k=NEIGHBOURS, temperature=TEMPERATURE, chunk=256):
    """Votes of the k nearest training images for their classes.

    Math    votes_c = sum of exp(s_j / T) over the k largest cosines s_j whose image is of class c, scaled to sum to 1
    Shapes  train (n, d), labels (n,), test (m, d)  ->  (m, K) float64
    Raises  InputError: see `check_neighbours`.
    """
    check_neighbours(len(train), k, temperature)
    train, test = unit_length(train), unit_length(test)
    votes = np.zeros((len(test), num_classes))
    for i in range(0, len(test), chunk):
        cosines = test[i : i + chunk] @ train.T  # (c, n)
        nearest = np.argpartition(-cosines, k - 1, axis=1)[:, :k]  # (c, k)
        s = np.take_along_axis(cosines, nearest, axis=1).astype(np.float64)
        weights = np.exp((s - s.max(axis=1, keepdims=True)) / temperature)  # the largest is 1: no overflow
        np.add.at(votes, (np.arange(i, i + len(s))[:, None], labels[nearest]), weights)
    return votes / votes.sum(axis=1, keepdims=True)
