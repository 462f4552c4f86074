"""The paper's analyses, on hand-made cases whose answers are known."""

import math
from dataclasses import replace

import numpy as np
import pytest
from strict_cupy import clear, doubles, installed

from minivit.base.errors import InputError
from minivit.benchmark.speed import speed
from minivit.layers.patch_embed import patchify
from minivit.model import ViT, ViTConfig, intermediates, positions
from minivit.options.positions import sincos2d
from minivit.paper import analyses as analysis

CONFIG = ViTConfig(image_size=6, patch_size=2, channels=3, num_classes=5, width=8, depth=3, num_heads=2, mlp_dim=12)


def model_of(**changes):
    """A small model in float64, every parameter of which is random."""
    model = ViT(replace(CONFIG, **changes), dtype=np.float64)
    model.flat += 0.3 * np.random.default_rng(0).standard_normal(model.flat.size)
    return model


def random_images(count):
    return np.random.default_rng(1).integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)


def maps(*shape, seed=0):
    """Random attention maps: rows that sum to 1."""
    a = np.random.default_rng(seed).random(shape) ** 3
    return a / a.sum(axis=-1, keepdims=True)


# ---- filters ---------------------------------------------------------------------------------------------------------


def test_filters_made_of_two_images_have_them_as_components():
    rng = np.random.default_rng(0)
    first, second = np.linalg.qr(rng.standard_normal((12, 2)))[0].T
    a, b = rng.standard_normal((2, 40))
    a, b = a - a.mean(), b - b.mean()
    b -= a * (a @ b) / (a @ a)
    W = rng.standard_normal((12, 1)) + 5 * np.outer(first, a / np.linalg.norm(a)) + np.outer(second, b)
    b_norm = np.linalg.norm(b)
    found = analysis.filters(W, 2, count=3)
    order = sorted([(25.0, first), (b_norm**2, second)], key=lambda pair: -pair[0])
    for k, (variance, expected) in enumerate(order):
        expected = expected * np.sign(expected[np.abs(expected).argmax()])  # the convention of the sign
        np.testing.assert_allclose(found.images[k], expected.reshape(2, 2, 3), atol=1e-12)
        np.testing.assert_allclose(found.shares[k], variance / (25 + b_norm**2), rtol=1e-12)
    assert found.shares[2] < 1e-25


def test_filters_do_not_depend_on_sign_order_or_a_common_part():
    W = np.random.default_rng(0).standard_normal((12, 7)).astype(np.float32)
    found = analysis.filters(W, 2)
    assert found.images.shape == (6, 2, 2, 3) and found.shares.sum() == pytest.approx(1.0)
    assert (np.diff(found.shares) <= 0).all()
    changed = W[:, ::-1].astype(np.float64)
    for other in (-changed, changed + np.random.default_rng(1).standard_normal((12, 1))):
        np.testing.assert_allclose(analysis.filters(other, 2).images, found.images, atol=1e-6)
    flat = found.images.reshape(6, 12)
    np.testing.assert_allclose(flat @ flat.T, np.eye(6), atol=1e-12)
    assert (np.take_along_axis(flat, np.abs(flat).argmax(axis=1)[:, None], axis=1) > 0).all()


@pytest.mark.parametrize("patch", [3, 1, 5])
def test_filters_of_features_are_refused(patch):
    with pytest.raises(InputError, match="no images"):
        analysis.filters(np.ones((12, 7)), patch)


# ---- positions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("registers", [0, 2])
def test_positions_of_each_kind(pooling, registers):
    model = model_of(pooling=pooling, registers=registers)
    np.testing.assert_allclose(
        analysis.position_embedding(model), model.params["pos_embed"][0, int(pooling == "cls") :], atol=1e-14
    )
    model = model_of(pooling=pooling, registers=registers, pos_embed="sincos2d")
    np.testing.assert_allclose(analysis.position_embedding(model), sincos2d(3, 8)[0], atol=1e-14)
    for pos_at in ("input", "every"):  # of the first block, then
        model = model_of(pooling=pooling, registers=registers, pos_embed="learned2d", pos_at=pos_at)
        X, Y = (model.params[f"{'blocks.0.' * (pos_at == 'every')}pos_embed_{axis}"][0] for axis in "xy")
        expected = [[*X[column], *Y[row]] for row in range(3) for column in range(3)]
        np.testing.assert_array_equal(analysis.position_embedding(model), expected)
    for changes in ({"pos_embed": "none"}, {"pos_embed": "relative", "pos_at": "every"}):
        with pytest.raises(InputError, match="no positions"):
            analysis.position_embedding(model_of(pooling=pooling, **changes))


STEM = {"stem": "root", "stem_width": 4, "stem_groups": 2, "image_size": 12, "patch_size": 1}


def test_positions_behind_a_stem():
    """A stem makes of zeros what its biases say: positions cannot be read off its map."""
    model = model_of(**STEM)
    np.testing.assert_array_equal(analysis.position_embedding(model), model.params["pos_embed"][0, 1:])
    model = model_of(**STEM, pos_embed="sincos2d")
    np.testing.assert_array_equal(analysis.position_embedding(model), sincos2d(3, 8)[0])
    model = model_of(**STEM, pos_embed="learned2d")
    np.testing.assert_array_equal(analysis.position_embedding(model)[5, :4], model.params["pos_embed_x"][0, 2])
    with pytest.raises(InputError, match="no positions"):
        analysis.position_embedding(model_of(**STEM, pos_embed="none"))


def test_the_table_of_positions_is_what_the_model_adds():
    for changes in ({}, {"pos_embed": "learned2d"}, {"pos_embed": "sincos2d", "pooling": "mean"}, STEM):
        model = model_of(**{"registers": 1, **changes})
        size = model.config.image_size
        images = np.random.default_rng(2).standard_normal((2, size, size, 3))
        bare = ViT(replace(model.config, pos_embed="none"), dtype=np.float64)
        for name, value in bare.params.items():
            value[...] = model.params[name]
        added = intermediates(model, images).features[0] - intermediates(bare, images).features[0]
        c = int(model.config.pooling == "cls")
        assert not added[:, c].any() and positions(model).shape == (1, c + 9, 8)  # registers have no positions
        np.testing.assert_allclose(np.delete(added, c, axis=1), [positions(model)[0]] * 2, atol=1e-12)


def test_similarity_of_known_vectors():
    p = np.array([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [0.0, 0.0]])
    s = analysis.position_similarity(p)
    expected = [[1, 0, -1, 0], [0, 1, 0, 0], [-1, 0, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(s.reshape(4, 4), expected, atol=1e-15)
    assert s[0, 0, 1, 0] == -1  # row 0, column 0 against row 1, column 0: the third vector


def test_similarity_of_sines_depends_on_the_distance_alone():
    s = analysis.position_similarity(sincos2d(4, 16)[0])
    w = 10000.0 ** -np.linspace(0, 1, 4)
    for r, c, r2, c2 in np.ndindex(4, 4, 4, 4):
        expected = (np.cos((r - r2) * w) + np.cos((c - c2) * w)).sum() / 8
        assert s[r, c, r2, c2] == pytest.approx(expected, abs=1e-12)


# ---- attention distance ----------------------------------------------------------------------------------------------


def test_distances_between_patches():
    d = analysis.patch_distances(3, 4.0)
    assert d[0, 8] == pytest.approx(4 * math.sqrt(8)) and d[1, 3] == pytest.approx(4 * math.sqrt(2))
    assert d[0, 2] == 8 and d[0, 6] == 8 and (d == d.T).all() and not d.diagonal().any()


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_uniform_attention_of_four_patches(prefix):
    N = prefix + 4  # each patch has one patch at 0, two at P, one at sqrt(2) P
    found = analysis.attention_distance(np.full((2, 5, N, N), 1 / N), 7.0, prefix)
    np.testing.assert_allclose(found, np.full((2, 5), 7 * (2 + math.sqrt(2)) / 4), rtol=1e-12)


@pytest.mark.parametrize("grid", [1, 3, 4])
def test_uniform_attention_in_a_row_of_the_grid(grid):
    a = np.kron(np.eye(grid), np.full((grid, grid), 1 / grid))  # within rows: mean |i - j| = (g^2 - 1) / 3g
    assert analysis.attention_distance(a, 2.0) == pytest.approx(2 * (grid**2 - 1) / (3 * grid))


def test_attention_to_itself_and_to_the_neighbour():
    assert analysis.attention_distance(np.eye(9), 4.0) == 0
    right = np.eye(9)[:, [1, 2, 0, 4, 5, 3, 7, 8, 6]].T  # each to its right neighbour, the last to the first: 1, 1, 2
    assert analysis.attention_distance(right, 3.0) == pytest.approx(3 * 4 / 3)


def test_attention_to_the_class_token_counts_for_nothing():
    a = np.zeros((5, 5))
    a[1:, 0], a[1:, 1:], a[0, 4] = 0.75, 0.25 * np.eye(4)[::-1], 1.0  # a quarter goes to the opposite corner
    assert analysis.attention_distance(a, 1.0, 1) == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize(("pooling", "registers"), [("cls", 2), ("mean", 0)])
def test_distances_of_a_model(pooling, registers, monkeypatch):
    model, images = model_of(pooling=pooling, registers=registers), random_images(5)
    whole = analysis.head_distances(model, images)
    assert whole.shape == (3, 2) and (whole > 0).all() and (whole < 2 * math.sqrt(8)).all()
    monkeypatch.setattr(analysis, "MAPS", 2 * 3 * 2 * model.config.num_tokens**2)  # two images at a time
    np.testing.assert_allclose(analysis.head_distances(model, images), whole, rtol=1e-12)
    attention = intermediates(model, images).attention[1]
    prefix = registers + (pooling == "cls")
    one = [analysis.attention_distance(attention[i, 1], 2.0, prefix) for i in range(5)]
    assert whole[1, 1] == pytest.approx(np.mean(one))


# ---- rollout ---------------------------------------------------------------------------------------------------------


def test_rollout_of_attention_to_itself_is_the_identity():
    eye = np.broadcast_to(np.eye(5), (2, 3, 5, 5))
    for rollout in analysis.attention_rollout([eye] * 4):
        np.testing.assert_array_equal(rollout, np.broadcast_to(np.eye(5), (2, 5, 5)))


def test_rollout_of_uniform_attention_in_closed_form():
    N, J = 6, np.full((6, 6), 1 / 6)  # ((I + J) / 2)^l = J + 2^-l (I - J), since J^2 = J
    for l, rollout in enumerate(analysis.attention_rollout([J[None]] * 5), start=1):  # noqa: E741
        np.testing.assert_allclose(rollout, J + 0.5**l * (np.eye(N) - J), atol=1e-15)


def test_rollout_of_two_blocks_by_hand():
    first, second = np.array([[[0.0, 1.0], [0.5, 0.5]]]), np.array([[[1.0, 0.0], [1.0, 0.0]]])
    one, two = analysis.attention_rollout([first, second])
    np.testing.assert_allclose(one, [[0.5, 0.5], [0.25, 0.75]])
    np.testing.assert_allclose(two, [[0.5, 0.5], [0.375, 0.625]])  # the later block from the left


def test_rollout_means_heads_and_divides_rows_by_their_own_sums():
    heads = np.array([[[0.9, 0.3], [0.0, 0.2]], [[0.1, 0.1], [0.2, 0.0]]])  # rows that sum to 1.4 / 2 and 0.4 / 2
    (found,) = analysis.attention_rollout([heads])
    np.testing.assert_allclose(found, [[1.5 / 1.7, 0.2 / 1.7], [0.1 / 1.2, 1.1 / 1.2]])


def test_rows_of_a_rollout_sum_to_one_and_permuted_tokens_permute_it():
    attention = [maps(2, 3, 7, 7, seed=seed) for seed in range(4)]
    order = np.random.default_rng(9).permutation(7)
    found = analysis.attention_rollout(attention)
    permuted = analysis.attention_rollout([a[..., order, :][..., order] for a in attention])
    for a, b in zip(found, permuted, strict=True):
        np.testing.assert_allclose(a.sum(axis=-1), 1.0, rtol=1e-12)
        np.testing.assert_allclose(b, a[..., order, :][..., order], rtol=1e-12)


@pytest.mark.parametrize(("pooling", "registers"), [("cls", 0), ("cls", 2), ("mean", 0), ("seq", 1)])
def test_rollout_of_a_model(pooling, registers, monkeypatch):
    model, images = model_of(pooling=pooling, registers=registers), random_images(5)
    logits, found = analysis.rollout_maps(model, images)
    np.testing.assert_allclose(logits, model.predict(images), rtol=1e-10)
    assert found.shape == (3, 5, 3, 3)
    rollout = np.eye(model.config.num_tokens)
    first = registers + (pooling == "cls")
    for block, attention in enumerate(intermediates(model, images[3:4]).attention):
        mixed = (attention[0].mean(axis=0) + np.eye(len(rollout))) / 2  # rows of a softmax sum to 1
        rollout = mixed @ rollout  # registers stay in the products
        rows = rollout[:1] if pooling == "cls" else rollout[first:]
        np.testing.assert_allclose(found[block, 3].ravel(), rows[:, first:].mean(axis=0), rtol=1e-10)
    monkeypatch.setattr(analysis, "MAPS", 1)  # an image at a time
    np.testing.assert_allclose(analysis.rollout_maps(model, images).maps, found, rtol=1e-12)


def test_maps_that_are_not_of_all_tokens_are_refused(monkeypatch):
    model = model_of()
    seen = intermediates(model, random_images(1))
    other = seen._replace(attention=[maps(3, 2, 3, 3)] * 3)
    monkeypatch.setattr(analysis, "intermediates", lambda model, images: other)
    for look in (analysis.rollout_maps, analysis.head_distances):
        with pytest.raises(InputError, match="not every token"):
            look(model, random_images(1))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_model_on_a_gpu(pooling):
    model, images = model_of(pooling=pooling, registers=1), random_images(3)
    model = ViT(model.config, flat=model.flat.astype(np.float32))
    expected = analysis.rollout_maps(model, images), analysis.head_distances(model, images)
    with installed() as cupy:
        there = ViT(model.config, flat=cupy.asarray(model.flat))
        clear()
        seen, distances = analysis.rollout_maps(there, images), analysis.head_distances(there, images)
        assert not doubles  # all is float32 there
        positions = analysis.position_embedding(there)
    for found, wanted in ((seen.logits, expected[0].logits), (seen.maps, expected[0].maps), (distances, expected[1])):
        assert type(found) is np.ndarray
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_allclose(positions, analysis.position_embedding(model), rtol=1e-4, atol=1e-6)


# ---- cost ------------------------------------------------------------------------------------------------------------


def test_cost_of_two_sizes():
    models = {"tiny": CONFIG, "odd": replace(CONFIG, patch_size=3)}
    points = analysis.cost(models, [6, 8], speed, batch=2, progress=False)
    assert [(p["model"], p["size"], p["task"]) for p in points] == [
        ("tiny", 6, "infer"), ("tiny", 6, "step"), ("tiny", 8, "infer"), ("tiny", 8, "step"), ("odd", 6, "infer"),
        ("odd", 6, "step"),
    ]  # fmt: skip
    assert [p["tokens"] for p in points[::2]] == [10, 17, 5]
    for p in points:
        assert p["images_per_second"] == pytest.approx(2 / p["median"]) and p["q1"] <= p["median"] <= p["q3"]
        assert p["peak_memory"] > 2**20


def test_a_patch_of_filters_is_cut_as_patches_are():
    """A component, seen as an image, answers most to a patch that looks like it."""
    W = np.random.default_rng(0).standard_normal((12, 9))
    first = analysis.filters(W, 2).images[0]
    answer = patchify(first[None], 2)[0, 0] @ (W - W.mean(axis=1, keepdims=True))
    others = [patchify(p[None], 2)[0, 0] @ (W - W.mean(axis=1, keepdims=True)) for p in analysis.filters(W, 2).images]
    assert np.linalg.norm(answer) == pytest.approx(max(np.linalg.norm(a) for a in others))
