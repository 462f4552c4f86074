"""Hessian-vector products: symmetric, the derivative of the gradient, the Hessian itself; Lanczos against eigh."""

import numpy as np
import pytest

from minivit import ViT, ViTConfig
from minivit.laboratory.cases import MODELS
from minivit.laboratory.curvature import (
    adam_scale,
    hessian_vector_product,
    lanczos,
    loss_gradient,
    loss_slice,
    sharpness,
    stability_edge,
)
from minivit.optim import SGD, Adam


def problem(name, **changes):
    config = ViTConfig(**{**MODELS[name], **changes})
    rng = np.random.default_rng(0)
    flat = ViT(config, dtype=np.float64).flat
    flat += 0.3 * rng.standard_normal(flat.shape)
    images = rng.standard_normal((3, config.image_size, config.image_size, config.channels))
    return config, flat, images, rng.integers(0, config.num_classes, 3), rng


@pytest.mark.parametrize("name", MODELS)
def test_symmetry_to_rounding(name):
    config, flat, images, labels, rng = problem(name)
    u, v = rng.standard_normal((2, flat.size))
    Hu, Hv = (hessian_vector_product(config, flat, images, labels, x, label_smoothing=0.1) for x in (u, v))
    assert abs(u @ Hv - v @ Hu) < 1e-13 * np.linalg.norm(u) * np.linalg.norm(Hv)


@pytest.mark.parametrize("name", MODELS)
def test_differences_of_the_gradient_converge_to_it(name):
    config, flat, images, labels, rng = problem(name)
    v = rng.standard_normal(flat.size)
    v /= np.linalg.norm(v)
    Hv = hessian_vector_product(config, flat, images, labels, v)
    errors = []
    for h in (1e-2, 1e-3, 1e-4):
        ahead, behind = (loss_gradient(config, flat + s * h * v, images, labels)[1] for s in (1, -1))
        errors.append(np.linalg.norm((ahead - behind) / (2 * h) - Hv) / np.linalg.norm(Hv))
    assert errors[2] < 1e-6
    assert 50 < errors[0] / errors[1] < 200 and 50 < errors[1] / errors[2] < 200  # O(h^2)


def test_the_length_of_the_vector_does_not_matter():
    config, flat, images, labels, rng = problem("vit")
    v = rng.standard_normal(flat.size)
    Hv = hessian_vector_product(config, flat, images, labels, v)
    for scale in (1e-8, 1e8):
        np.testing.assert_allclose(
            hessian_vector_product(config, flat, images, labels, scale * v) / scale, Hv, rtol=1e-9, atol=1e-14
        )
    assert not hessian_vector_product(config, flat, images, labels, 0 * v).any()


def test_lanczos_finds_the_eigenvalues_of_the_whole_hessian():
    config, flat, images, labels, _ = problem("vit", depth=1, width=4, num_heads=2, mlp_dim=3, pooling="mean")

    def product(v):
        return hessian_vector_product(config, flat, images, labels, v)

    H = np.array([product(e) for e in np.eye(flat.size)])
    assert np.abs(H - H.T).max() < 1e-14 * np.abs(H).max() + 1e-15
    expected = np.linalg.eigvalsh(H)[::-1][:3]
    made = []
    found = lanczos(lambda v: made.append(v) or product(v), flat.size, count=3, steps=60, rtol=1e-8)
    np.testing.assert_allclose(found.eigenvalues, expected, rtol=1e-7)
    assert (abs(found.eigenvalues - expected) <= found.residuals + 1e-12).all()
    assert found.products == len(made) and found.converged.all()
    # it stops as soon as it knows enough, and not before
    assert lanczos(product, flat.size, count=3, steps=60, rtol=1e-2).products < found.products < 60
    hasty = lanczos(product, flat.size, count=3, steps=4, rtol=1e-8)
    assert hasty.products == 4 and not hasty.converged.any() and (hasty.residuals > 1e-8 * hasty.eigenvalues[0]).all()
    for value, vector in zip(found.eigenvalues, found.eigenvectors, strict=True):
        np.testing.assert_allclose(H @ vector, value * vector, atol=1e-6 * abs(value))
        assert np.isclose(np.linalg.norm(vector), 1.0)


def test_lanczos_on_a_known_matrix():
    values = np.array([9.0, 5.0, -7.0, 1.0, 1.0])
    rotation, _ = np.linalg.qr(np.random.default_rng(3).standard_normal((5, 5)))
    A = rotation @ np.diag(values) @ rotation.T
    found = lanczos(lambda v: A @ v, 5, count=2)
    np.testing.assert_allclose(found.eigenvalues, [9.0, 5.0], rtol=1e-10)
    assert found.products == 4  # as many as there are distinct eigenvalues
    with pytest.raises(ValueError, match="at least 1"):
        lanczos(lambda v: A @ v, 5, count=0)
    with pytest.raises(ValueError, match="not finite"):
        lanczos(lambda v: np.nan * v, 5)
    np.testing.assert_allclose(lanczos(lambda v: v, 5, count=2).eigenvalues, [1.0])  # each distinct one once


def test_sharpness_with_a_scale_is_that_of_the_scaled_hessian():
    config, flat, images, labels, rng = problem("vit", depth=1, width=4, num_heads=2, mlp_dim=3, pooling="mean")
    scale = rng.uniform(0.5, 2.0, flat.size)
    H = np.array([hessian_vector_product(config, flat, images, labels, e) for e in np.eye(flat.size)])
    for p, matrix in ((None, H), (scale, H / np.sqrt(scale) / np.sqrt(scale)[:, None])):
        found = sharpness(config, flat, images, labels, scale=p, count=2, steps=60)
        np.testing.assert_allclose(found.eigenvalues, np.linalg.eigvalsh(matrix)[::-1][:2], rtol=1e-3)


def diverges(optimizer, curvature, lr, start=1.0):
    """Does an optimiser run away on curvature x^2 / 2?"""
    x = np.array([start])
    for _ in range(2000):
        optimizer.step(x, curvature * x, lr)
    return abs(x[0]) > start


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_the_edge_is_where_sgd_runs_away(momentum):
    edge = stability_edge(SGD(np.ones(1), np.ones(1), momentum=momentum), 0.1)
    assert edge == pytest.approx(2 * (1 + momentum) / 0.1)
    for factor, expected in ((0.98, False), (1.02, True)):
        with np.errstate(over="ignore", invalid="ignore"):
            assert diverges(SGD(np.ones(1), np.ones(1), momentum=momentum), factor * edge, 0.1) == expected


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9])
def test_the_edge_is_where_adam_runs_away(beta1):
    """Gradients far below eps leave the divisor at eps, so that the curvature Adam sees stands still."""
    for factor, expected in ((0.98, False), (1.02, True)):
        adam = Adam(np.ones(1), np.zeros(1), betas=(beta1, 0.999), eps=1e3)
        edge = stability_edge(adam, 0.1)
        assert diverges(adam, factor * edge * adam.eps, 0.1, start=1e-40) == expected
        # the curvature over this is what has an edge; what has run away is out of the range of eps
        assert expected or adam_scale(adam)[0] == pytest.approx(adam.eps, rel=1e-6)


def test_the_edge_and_the_scale_of_adam():
    adam = Adam(np.zeros(2), np.zeros(2), betas=(0.9, 0.99), eps=1e-3)
    assert adam_scale(adam) is None and adam_scale(SGD(np.zeros(2), np.zeros(2))) is None
    assert stability_edge(adam, 0.1) == pytest.approx(380.0)
    adam.step(np.zeros(2), np.array([3.0, -4.0]), 0.1)
    np.testing.assert_allclose(adam_scale(adam), [3.001, 4.001])  # after one step v / (1 - b2) is g^2


def test_the_slice_passes_through_the_loss_and_curves_as_the_hessian_says():
    config, flat, images, labels, rng = problem("vit")
    directions = np.linalg.qr(rng.standard_normal((flat.size, 2)))[0].T
    offsets, losses = loss_slice(config, flat, images, labels, directions, 1e-3, points=5)
    loss, gradient = loss_gradient(config, flat, images, labels)
    assert losses[2, 2] == pytest.approx(float(loss), rel=1e-12)
    o = offsets[3]
    for (ahead, behind), d in (
        ((losses[2, 3], losses[2, 1]), directions[0]),
        ((losses[3, 2], losses[1, 2]), directions[1]),
    ):
        assert (ahead - behind) / (2 * o) == pytest.approx(gradient @ d, rel=1e-4)
        Hd = hessian_vector_product(config, flat, images, labels, d)
        assert (ahead + behind - 2 * loss) / o**2 == pytest.approx(d @ Hd, rel=1e-3)
