"""What every optimiser promises: pieces, dtypes, rates of entries, settings by name, its state."""

import numpy as np
import pytest

from minivit import InputError, ViT, ViTConfig
from minivit.base import params as parameters
from minivit.optim import OPTIMIZERS, SGD, Adam, AdamW, Lion, Muon, make_optimizer
from minivit.optim.optimizer import PIECE, pieces

MASK = np.array([1.0, 1.0, 0.0])
SMALL = ViTConfig(image_size=8, patch_size=4, width=12, depth=2, num_heads=3, mlp_dim=20)


@pytest.mark.parametrize("name", OPTIMIZERS)
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


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_float32_stays_float32(name):
    theta = np.ones(3, np.float32)
    optimizer = make_optimizer(name, theta, MASK.astype(np.float32), weight_decay=0.1)
    optimizer.step(theta, np.ones(3, np.float32), 0.1)
    assert theta.dtype == np.float32 and all(s.dtype == np.float32 for s in optimizer.state.values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_scale_is_a_learning_rate_of_its_own(name):
    """Twice the scale is twice the rate, and 0 leaves an entry alone; matrices are wholly of one scale."""
    model, rng = ViT(SMALL, dtype=np.float64), np.random.default_rng(0)
    mask, g = parameters.decay_mask(model.table, np.float64), rng.standard_normal(model.flat.size)
    scale = np.empty_like(model.flat)
    for i, view in enumerate(parameters.views(scale, model.table).values()):
        view[...] = i % 3
    flats = [model.flat.copy() for _ in range(4)]
    for flat, factor, vector in zip(flats, (0.01, 0.02, 0.01, 0.01), (None, None, scale, np.ones_like(g)), strict=True):
        make_optimizer(name, flat, mask, table=model.table, weight_decay=0.1, scale=vector).step(flat, g, factor)
    np.testing.assert_allclose(flats[2], np.choose(scale.astype(int), [model.flat, flats[0], flats[1]]), rtol=1e-12)
    np.testing.assert_array_equal(flats[3], flats[0])


def test_layer_scale_falls_from_head_to_embedding():
    table = ViT(SMALL).table
    found = {
        name: np.unique(view) for name, view in parameters.views(parameters.layer_scale(table, 0.5), table).items()
    }
    assert all(len(values) == 1 for values in found.values())
    expected = {"cls_token": 1 / 8, "pos_embed": 1 / 8, "patch_embed.proj.weight": 1 / 8, "blocks.0.norm1.bias": 1 / 4,
                "blocks.1.mlp.fc2.weight": 1 / 2, "norm.weight": 1.0, "head.bias": 1.0}  # fmt: skip
    assert {name: found[name][0] for name in expected} == expected


SETTINGS = {"momentum": 0.5, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3, "weight_decay": 0.2}


@pytest.mark.parametrize("settings", [{}, SETTINGS])
@pytest.mark.parametrize(
    ("name", "kind"), [("sgd", SGD), ("adam", Adam), ("adamw", AdamW), ("lion", Lion), ("muon", Muon)]
)
def test_an_optimizer_by_name_has_every_setting_and_the_papers_defaults(name, kind, settings):
    flat, mask = np.ones(3, np.float32), np.array([1.0, 0.0, 1.0])
    expected = {"momentum": 0.9, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0} | settings
    made = [make_optimizer(name, flat, mask, **settings)]
    if not settings and name in ("sgd", "adam", "adamw"):
        made.append(kind(flat, mask))
    for optimizer in made:
        assert type(optimizer) is kind and optimizer.decay_mask is mask and optimizer.steps == 0
        assert optimizer.weight_decay == expected["weight_decay"]
        if kind in (SGD, Muon):
            assert optimizer.momentum == expected["momentum"]
        if kind is not SGD:
            assert optimizer.betas == (expected["beta1"], expected["beta2"])
        if kind not in (SGD, Lion):
            assert optimizer.eps == expected["eps"]
        assert all(s.dtype == np.float32 and s.shape == (3,) and not s.any() for s in optimizer.state.values())


def test_the_defaults_of_lion_and_muon():
    lion, muon = Lion(np.ones(3), MASK), Muon(np.ones(3), MASK, table=())
    assert (lion.betas, lion.weight_decay, lion.steps) == ((0.9, 0.99), 0.0, 0)
    assert (muon.momentum, muon.betas, muon.eps, muon.weight_decay) == (0.95, (0.9, 0.999), 1e-8, 0.0)


def test_the_state_by_its_names_and_the_count_of_steps():
    g = np.array([1.0, -2.0, 4.0])
    for kind in (SGD, Adam, AdamW, Lion):
        theta = np.zeros(3)
        optimizer = kind(theta, MASK)
        optimizer.step(theta, g, 0.1)
        optimizer.step(theta, 0 * g, 0.1)
        assert optimizer.steps == 2
        if kind is SGD:
            np.testing.assert_allclose(optimizer.state["momentum"], 0.9 * g)
        elif kind is Lion:
            np.testing.assert_allclose(optimizer.state["m"], 0.99 * 0.01 * g)
        else:
            np.testing.assert_allclose(optimizer.state["m"], 0.9 * 0.1 * g)
            np.testing.assert_allclose(optimizer.state["v"], 0.999 * 0.001 * g * g)


def test_pieces_are_short_on_the_cpu_and_one_on_another_device():
    assert pieces(np.zeros(2 * PIECE)) == [slice(0, PIECE), slice(PIECE, 2 * PIECE)]

    class Elsewhere:
        def __init__(self, size):
            self.size = size

    Elsewhere.__module__ = "cupy"
    for size in (1, 3 * PIECE):
        assert pieces(Elsewhere(size)) == [slice(0, size)]
    assert pieces(Elsewhere(0)) == []


def test_arrays_of_another_kind_are_refused():
    for name in ("adam", "adamw", "lion", "muon"):
        optimizer = make_optimizer(name, np.ones(3), MASK)
        for flat, grad in ((np.ones(3), [1.0, 2.0, 3.0]), ([1.0, 2.0, 3.0], np.ones(3))):
            with pytest.raises(TypeError, match="expected a NumPy or CuPy array, got list"):
                optimizer.step(flat, grad, 0.1)
        assert optimizer.steps == 0


def test_what_may_be_chosen_is_named():
    with pytest.raises(InputError, match="one of adamw, adam, sgd, lion, muon; got 'lbfgs'"):
        make_optimizer("lbfgs", np.zeros(1), np.zeros(1))
