"""Hessian-vector products: symmetric, the derivative of the gradient, the Hessian itself; Lanczos against eigh."""

import numpy as np
import pytest

from minivit import ViT, ViTConfig
from minivit.curvature import hessian_vector_product, lanczos, loss_gradient
from minivit.gradcheck_cases import MODELS


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
    found = lanczos(product, flat.size, count=3, steps=60, rtol=1e-8)
    np.testing.assert_allclose(found.eigenvalues, expected, rtol=1e-7)
    assert (abs(found.eigenvalues - expected) <= found.residuals + 1e-12).all()
    assert found.products <= 60


def test_lanczos_on_a_known_matrix():
    values = np.array([9.0, 5.0, -7.0, 1.0, 1.0])
    rotation, _ = np.linalg.qr(np.random.default_rng(3).standard_normal((5, 5)))
    A = rotation @ np.diag(values) @ rotation.T
    found = lanczos(lambda v: A @ v, 5, count=2)
    np.testing.assert_allclose(found.eigenvalues, [9.0, 5.0], rtol=1e-10)
    assert found.products <= 5
    with pytest.raises(ValueError, match="at least 1"):
        lanczos(lambda v: A @ v, 5, count=0)
