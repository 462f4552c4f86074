"""Optimisers by hand-computed steps and scalar loops; schedules, clipping and averaging by their formulas."""

import math

import numpy as np
import pytest
from strict_cupy import installed

from minivit import InputError, ViT, ViTConfig
from minivit.base import params as parameters
from minivit.base.backend import plain, to_host
from minivit.base.params import ParameterSpec
from minivit.optim.optimizers import (
    EMA,
    OPTIMIZERS,
    PIECE,
    SGD,
    Adam,
    AdamW,
    Lion,
    Muon,
    _pieces,
    clip_by_global_norm,
    learning_rate,
    make_optimizer,
    orthogonalise,
)
from minivit.training.engine import Engine

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


def test_an_unknown_optimizer_or_schedule_is_refused():
    with pytest.raises(InputError, match="adamw"):
        make_optimizer("lbfgs", np.zeros(1), np.zeros(1))
    with pytest.raises(InputError, match="cosine"):
        learning_rate(0, 1, lr=1.0, schedule="step")


def test_lion_against_scalars():
    rng = np.random.default_rng(0)
    start, gradients = rng.standard_normal(3), rng.standard_normal((12, 3))
    theta = start.copy()
    lion = Lion(theta, MASK, betas=(0.8, 0.95), weight_decay=0.2)
    for g in gradients:
        lion.step(theta, g, 0.05)
    for i in range(3):
        expected, m = start[i], 0.0
        for g in gradients[:, i]:
            u = math.copysign(1.0, 0.8 * m + 0.2 * g)
            expected -= 0.05 * (u + 0.2 * MASK[i] * expected)
            m = 0.95 * m + 0.05 * g
        assert theta[i] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", [(8, 8), (5, 30), (30, 5), (2, 3, 6, 4)])
def test_orthogonalised_matrices_keep_their_singular_vectors(shape):
    matrices = np.random.default_rng(0).standard_normal(shape)
    found = orthogonalise(matrices)
    assert found.shape == shape
    U, S, Vt = np.linalg.svd(matrices, full_matrices=False)
    x = S / np.sqrt((S**2).sum(axis=-1, keepdims=True))
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    np.testing.assert_allclose(found, (U * x[..., None, :]) @ Vt, atol=1e-10)
    assert np.all((x > 0.6) & (x < 1.25)) or S.min() < 0.02 * S.max()
    np.testing.assert_allclose(orthogonalise(1e-6 * matrices), found, atol=1e-5)  # whatever the length
    if shape[-2] != shape[-1]:  # the same products, those of the short side
        np.testing.assert_array_equal(orthogonalise(matrices.swapaxes(-1, -2)), found.swapaxes(-1, -2))


def test_the_tiny_number_of_the_orthogonalisation_is_1e_12():
    assert not orthogonalise(np.zeros((3, 4))).any()
    x = 1.0 / 2.0  # of a matrix of length 1e-12
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    np.testing.assert_allclose(orthogonalise(np.array([[1e-12, 0.0, 0.0]])), [[x, 0.0, 0.0]], rtol=1e-12)


SMALL = ViTConfig(image_size=8, patch_size=4, width=12, depth=2, num_heads=3, mlp_dim=20)


def test_muon_moves_matrices_by_muon_and_the_rest_by_adamw():
    model = ViT(SMALL, dtype=np.float64)
    mask, rng = parameters.decay_mask(model.table, np.float64), np.random.default_rng(0)
    settings = {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.3}
    start, theta, other = model.flat.copy(), model.flat.copy(), model.flat.copy()
    muon, adamw = Muon(theta, mask, table=model.table, momentum=0.7, **settings), AdamW(other, mask, **settings)
    gradients = rng.standard_normal((3, len(theta)))
    for g in gradients:
        muon.step(theta, g, 0.02)
        adamw.step(other, g, 0.02)
    tables = [parameters.views(flat, model.table) for flat in (theta, other, start)]
    named = [parameters.views(g, model.table) for g in gradients]
    orthogonal = 0
    for name, found in tables[0].items():
        if not (name.startswith("blocks.") and found.ndim == 2):
            np.testing.assert_array_equal(found, tables[1][name])
            continue
        parts = 3 if "qkv" in name else 1
        expected, m = np.split(tables[2][name], parts, axis=1), [0.0] * parts
        for views in named:
            for i, g in enumerate(np.split(views[name], parts, axis=1)):
                m[i] = 0.7 * m[i] + g
                o = orthogonalise(g + 0.7 * m[i])
                expected[i] = expected[i] - 0.02 * (0.2 * math.sqrt(max(g.shape)) * o + 0.3 * expected[i])
        np.testing.assert_allclose(found, np.concatenate(expected, axis=1), rtol=1e-10, atol=1e-14)
        orthogonal += 1
    assert orthogonal == 4 * SMALL.depth and muon.steps == 3


def test_muon_decays_what_the_mask_says():
    """Without a gradient nothing else moves a matrix."""
    model = ViT(SMALL, dtype=np.float64)
    mask, name = parameters.decay_mask(model.table, np.float64), "blocks.0.mlp.fc1.weight"
    parameters.views(mask, model.table)[name][...] = 0.0
    before, muon = model.flat.copy(), Muon(model.flat, mask, table=model.table, weight_decay=0.5)
    muon.step(model.flat, np.zeros_like(model.flat), 0.1)
    np.testing.assert_allclose(model.flat, before * (1.0 - 0.05 * mask), rtol=1e-12)
    assert parameters.views(before, model.table)[name].all()
    np.testing.assert_array_equal(model.params[name], parameters.views(before, model.table)[name])


MATRICES = tuple(  # nothing before the blocks or behind them
    ParameterSpec(f"blocks.{i}.{name}", shape, None, True)
    for i in range(3)
    for name, shape in [("qkv.weight", (2, 12)), ("bias", (5,)), ("fc.weight", (4, 3))]
)


def test_muon_takes_one_block_at_a_time_on_the_cpu_and_all_together_on_a_gpu():
    count, rng = parameters.count(MATRICES), np.random.default_rng(0)
    flat, mask = rng.standard_normal((2, count))
    gradients, flats = rng.standard_normal((2, count)), []
    with installed() as cupy, plain():
        for asarray, rows in ((np.array, [(0, 1), (1, 2), (2, 3)]), (cupy.asarray, [(0, 3)])):
            theta = asarray(flat.copy())
            muon = Muon(theta, asarray(mask), table=MATRICES, weight_decay=0.1)
            assert [(m.rows.start, m.rows.stop, m.columns, m.shape, m.count) for m in muon.matrices] == [
                (*row, columns, shape, parts)
                for columns, shape, parts in ((slice(0, 24), (2, 12), 3), (slice(29, 41), (4, 3), 1))
                for row in rows
            ]
            assert muon.depth == 3 and {(m.blocks.start, m.blocks.stop) for m in muon.matrices} == {(0, count)}
            assert [(s.start, s.stop) for s in muon.others] == [(24, 29), (65, 70), (106, 111)]
            for g in gradients:
                muon.step(theta, asarray(g), 0.1)
            flats.append(to_host(theta))
    np.testing.assert_allclose(*flats, rtol=1e-12)


def test_muon_gives_the_same_bits_in_threads():
    flats = []
    for threads in (False, True):
        model = ViT(SMALL)
        muon = Muon(model.flat, parameters.decay_mask(model.table), table=model.table)
        with Engine(model, workers=3) as engine:
            if threads:
                muon.each = engine.each
            muon.step(model.flat, np.random.default_rng(1).standard_normal(model.flat.size).astype(np.float32), 0.1)
        flats.append(model.flat)
    np.testing.assert_array_equal(*flats)


def test_an_engine_calls_a_function_with_each_item_once():
    seen = []
    with Engine(ViT(SMALL), workers=3) as engine:
        engine.each(seen.append, iter(range(10)))
        assert sorted(seen) == list(range(10))
        with pytest.raises(ZeroDivisionError):
            engine.each(lambda item: item / 0, [1])


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


def test_trapezoid_and_one_cycle():
    rates = [learning_rate(t, 100, lr=2.0, schedule="trapezoid", warmup_steps=9, final_lr=0.5, cooldown=0.4)
             for t in range(100)]  # fmt: skip
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) * 0.2)
    assert set(rates[9:61]) == {2.0}
    np.testing.assert_allclose(rates[60:], 2.0 - 1.5 * np.arange(40) / 40)
    assert learning_rate(99, 100, lr=1.0, schedule="trapezoid", cooldown=0.0) == 1.0
    assert learning_rate(90, 100, lr=1.0, schedule="trapezoid") == 0.5  # half of the last fifth
    rates = [learning_rate(t, 200, lr=2.0, schedule="onecycle", final_lr=0.02, warmup_steps=50) for t in range(200)]
    assert rates[0] == pytest.approx(0.08) and rates[60] == max(rates) == 2.0
    assert rates[30] == pytest.approx(1.04) and rates[130] == pytest.approx(1.01)
    assert 0.02 < rates[-1] < 0.022


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
    assert _pieces(np.zeros(2 * PIECE)) == [slice(0, PIECE), slice(PIECE, 2 * PIECE)]

    class Elsewhere:
        def __init__(self, size):
            self.size = size

    Elsewhere.__module__ = "cupy"
    for size in (1, 3 * PIECE):
        assert _pieces(Elsewhere(size)) == [slice(0, size)]
    assert _pieces(Elsewhere(0)) == []


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
    with pytest.raises(InputError, match="one of cosine, linear, constant, trapezoid, onecycle; got 'step'"):
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
