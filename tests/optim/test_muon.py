"""Muon: its orthogonalisation against the singular value decomposition, its steps matrix by matrix."""

import math

import numpy as np
import pytest
from strict_cupy import installed

from minivit import ViT, ViTConfig
from minivit.base import params as parameters
from minivit.base.backend import plain, to_host
from minivit.base.params import ParameterSpec
from minivit.optim.adam import AdamW
from minivit.optim.muon import Muon, orthogonalise
from minivit.training.engines.cpu import Engine


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
