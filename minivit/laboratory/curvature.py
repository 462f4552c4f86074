r"""Second derivatives without a second backward: exact Hessian-vector products, and the largest curvatures.

The gradient g(theta) is computed by the hand-written backward, a chain of analytic operations. Evaluated at the
complex point theta + i h v it is

    g(theta + i h v) = g(theta) + i h H v - h^2 (...),      H = dg/dtheta, the Hessian of the loss,

so with h = 1e-30 its imaginary part over h is H v to rounding error: no difference is formed, no step has to be
chosen. The same code that trains gives second derivatives; that it does is itself a check of every backward line.

H is symmetric because second derivatives commute, although nothing in a backward pass says so: u^T H v = v^T H u is
a test that knows no tolerance but rounding.

The largest eigenvalues of H are found by Lanczos' method (1950), which needs products H v alone: in the orthonormal
basis of v, H v, H^2 v, ... H is a tridiagonal matrix whose outer eigenvalues converge to those of H.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from minivit.base.backend import to_device, to_host
from minivit.laboratory import gradcheck
from minivit.layers.loss import softmax_cross_entropy_backward, softmax_cross_entropy_forward
from minivit.model import ViT


def loss_gradient(config, flat, images, labels, *, label_smoothing=0.0, device="cpu"):
    """Mean cross-entropy of a batch and its gradient at a parameter vector, real or complex.

    Shapes  flat (n,), images (B, H, W, C), labels (B,) or (B, K)  ->  loss (), gradient (n,)
    All of them are on the host, here and in the functions below; ``device``, which must be in use, does the work.
    """
    model = ViT(config, flat=to_device(flat, device))
    logits, cache = model.forward(to_device(images, device))
    loss, loss_cache = softmax_cross_entropy_forward(
        logits, to_device(labels, device), label_smoothing=label_smoothing
    )  # fmt: skip
    gradient, grads = model.gradient_buffer()
    model.backward(softmax_cross_entropy_backward(1.0, loss_cache), cache, grads)
    return to_host(loss), to_host(gradient)


def hessian_vector_product(config, flat, images, labels, vector, **settings):
    """H v for the Hessian H of the mean cross-entropy of a batch, exact to float64 rounding.

    Math    H v = Im g(theta + i h v) / h,  h = 1e-30
    Shapes  flat (n,), vector (n,)  ->  (n,) float64
    ``settings``: the keywords of `loss_gradient`.
    The work is that of one gradient in complex arithmetic, some three to four times a real one.
    """

    def forward(flat):  # the gradient is all that the backward needs
        return loss_gradient(config, flat, images, labels, **settings)

    (product,) = gradcheck.hessian_vector_product(
        forward, lambda dloss, gradient: gradient, [flat], [vector], verify=False
    )
    return product


class Spectrum(NamedTuple):
    """What `lanczos` found."""

    eigenvalues: Any  # (k,) the largest ones, descending
    eigenvectors: Any  # (k, size), of length 1
    residuals: Any  # (k,) |H x - lambda x| of each: some eigenvalue is as near as that
    converged: Any  # (k,) bool: the residual is below the tolerance asked for
    products: int  # how many products H v were made


def lanczos(product, size, *, count=1, steps=40, seed=0, rtol=1e-3):
    """The largest eigenvalues of a symmetric matrix of which only products with vectors are known.

    Math    with q_1 random, H q_j = b_{j-1} q_{j-1} + a_j q_j + b_j q_{j+1}; the eigenvalues of the tridiagonal matrix
            (a, b) are those of H in the space spanned so far; |b_k s_k| bounds the error of one with last component s_k
    Shapes  product: (size,) -> (size,)  ->  Spectrum
    An eigenvalue that occurs several times is found once; there may be fewer than ``count`` distinct ones.
    Every new vector is made orthogonal to all earlier ones again; without that, rounding brings found eigenvalues back.
    Stops when each of the ``count`` residuals is below ``rtol`` times the largest eigenvalue, or after ``steps``.
    Raises  ValueError: count or steps are not positive, or a product is not finite.
    """
    if count < 1 or steps < 1:
        raise ValueError(f"count and steps must be at least 1, got {count} and {steps}")
    q = np.random.default_rng(seed).standard_normal(size)
    basis, alphas, betas = [q / np.linalg.norm(q)], [], []
    for made in range(1, min(steps, size) + 1):
        w = product(basis[-1])
        if not np.isfinite(w).all():
            raise ValueError("a product with the matrix is not finite")
        alphas.append(float(basis[-1] @ w))
        Q = np.array(basis)  # (made, size)
        for _ in range(2):  # twice is enough (Parlett 1980)
            w = w - Q.T @ (Q @ w)
        beta = float(np.linalg.norm(w))
        T = np.diag(alphas) + np.diag(betas, 1) + np.diag(betas, -1)
        values, vectors = np.linalg.eigh(T)
        residuals = abs(beta * vectors[-1])
        largest = np.argsort(values)[::-1][:count]
        converged = residuals[largest] <= rtol * abs(values).max()
        if (made >= count and converged.all()) or beta <= 1e-14 * abs(
            values
        ).max():  # the space that these vectors span is exhausted
            break
        betas.append(beta)
        basis.append(w / beta)
    return Spectrum(values[largest], vectors[:, largest].T @ Q, residuals[largest], converged, made)


def sharpness(config, flat, images, labels, *, scale=None, count=1, steps=40, seed=0, **settings):
    """The largest eigenvalues of the loss's Hessian, or of the Hessian as an adaptive optimiser sees it.

    Math    of H; with ``scale`` = p (n,), of P^(-1/2) H P^(-1/2), P = diag(p): an optimiser that divides each
            gradient by p_i does gradient descent in the coordinates sqrt(p_i) theta_i, whose Hessian this is
    Shapes  flat (n,)  ->  `Spectrum`
    ``settings``: the keywords of `loss_gradient`.
    """
    root = 1.0 if scale is None else 1.0 / np.sqrt(scale)
    flat = flat.astype(np.float64)

    def product(v):
        return root * hessian_vector_product(config, flat, images, labels, root * v, **settings)

    return lanczos(product, flat.size, count=count, steps=steps, seed=seed)


def stability_edge(optimizer, lr):
    """The curvature beyond which an optimiser's steps overshoot more than they gain, on a quadratic.

    Math    heavy-ball momentum m <- mu m + g:                2 (1 + mu) / lr   (gradient descent, mu = 0: 2 / lr)
            Adam's m <- b m + (1 - b) g, preconditioned:      2 (1 + b) / ((1 - b) lr)
    Source  Cohen et al. 2021, arXiv:2103.00065; 2022, arXiv:2207.14484.
    """
    if hasattr(optimizer, "betas"):
        beta = optimizer.betas[0]
        return 2.0 * (1.0 + beta) / ((1.0 - beta) * lr)
    return 2.0 * (1.0 + optimizer.momentum) / lr


def adam_scale(optimizer):
    """What Adam divides a gradient by: sqrt(v / (1 - b2^t)) + eps, (n,) float64; None for other optimisers."""
    if not hasattr(optimizer, "betas") or not optimizer.steps:
        return None
    v = to_host(optimizer.state["v"]).astype(np.float64)
    return np.sqrt(v / (1.0 - optimizer.betas[1] ** optimizer.steps)) + optimizer.eps


def loss_slice(config, flat, images, labels, directions, radius, *, points=25, label_smoothing=0.0, device="cpu"):
    """The loss on a square around a parameter vector, in the plane of two directions.

    Shapes  flat (n,), directions (2, n), radius: half the side, in lengths of the directions
            ->  offsets (points,), losses (points, points): row i, column j at flat + o_i d_2 + o_j d_1
    """
    flat, images, labels = flat.astype(np.float64), to_device(images, device), to_device(labels, device)
    offsets = np.linspace(-radius, radius, points)
    losses = np.empty((points, points))
    for i, j in np.ndindex(points, points):
        here = flat + offsets[j] * directions[0] + offsets[i] * directions[1]
        logits = ViT(config, flat=to_device(here, device)).predict(images)
        loss, _ = softmax_cross_entropy_forward(logits, labels, label_smoothing=label_smoothing)
        losses[i, j] = to_host(loss)
    return offsets, losses
