"""The image operations against torchvision's, and what the policies draw.

The values are written by tools/make_reference.py, which needs torchvision; these tests need only the file.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from minivit.data import operations as ops
from minivit.data.augment import augment
from minivit.data.operations import CODE, OPERATIONS, auto_augment, operate, rand_augment, trivial_augment

with np.load(Path(__file__).parent.parent / "data" / "torchvision_operations.npz") as file:
    REFERENCE = dict(file)


@pytest.fixture
def images():
    return np.random.default_rng(1).integers(0, 256, (53, 9, 7, 3), dtype=np.uint8)


@pytest.fixture
def calls(monkeypatch):
    """The (operations, magnitudes) of each call of `operate`, which returns the images as they are."""
    made = []
    monkeypatch.setattr(ops, "operate", lambda images, *drawn: made.append(drawn) or images)
    return made


@pytest.mark.parametrize("kind", ["color", "grey"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_those_of_torchvision(name, kind):
    before = REFERENCE[f"{kind}/before"]
    magnitudes, after = REFERENCE[f"magnitude/{name}"], REFERENCE[f"{kind}/after/{name}"]
    for magnitude, expected in zip(magnitudes, after, strict=True):
        code = np.full(len(before), CODE[name])
        result = operate(before, code, np.full(len(before), magnitude))
        assert result.dtype == np.uint8
        difference = np.abs(result.astype(int) - expected)
        assert difference.max() <= (1 if name in ("shear_x", "shear_y", "rotate") else 0), magnitude
        assert (difference > 0).mean() < 0.1


@pytest.mark.parametrize("kind", ["color", "grey"])
def test_a_batch_of_all_operations_is_each_on_its_own(kind):
    before = REFERENCE[f"{kind}/before"]
    tasks = [
        (i, name, m) for name in OPERATIONS for m in REFERENCE[f"magnitude/{name}"].tolist() for i in range(len(before))
    ]
    tasks = [tasks[i] for i in np.random.default_rng(0).permutation(len(tasks))]
    numbers, names, magnitudes = (np.array(column) for column in zip(*tasks, strict=True))
    batch = before[numbers]
    kept, codes = batch.copy(), np.array([CODE[name] for name in names])
    result = operate(batch, codes, magnitudes)
    np.testing.assert_array_equal(batch, kept)
    for i in range(len(tasks)):
        alone = operate(batch[i : i + 1], codes[i : i + 1], magnitudes[i : i + 1])
        np.testing.assert_array_equal(result[i : i + 1], alone, err_msg=names[i])


def test_geometry_of_nothing_is_the_image_itself(images):
    for name in ops.GEOMETRY:
        np.testing.assert_array_equal(
            operate(images, np.full(len(images), CODE[name]), np.zeros(len(images))), images, err_msg=name
        )


def test_trivial_augment_draws_evenly_from_the_wide_space(calls):
    trivial_augment(np.zeros((60_000, 40, 20, 1), np.uint8), np.random.default_rng(0))
    ((operations, magnitudes),) = calls
    counts = np.bincount(operations, minlength=len(OPERATIONS))
    assert counts[CODE["invert"]] == 0
    np.testing.assert_allclose(np.delete(counts, CODE["invert"]), 60_000 / 14, rtol=0.06)
    steps = np.arange(31) / 30
    largest = {"shear": 0.99, "translate_x": 20, "translate_y": 32, "rotate": 135}
    for name in OPERATIONS:
        drawn = magnitudes[operations == CODE[name]]
        if name in ops.GEOMETRY + ops.BLENDS:
            top = largest.get(name, largest.get(name.partition("_")[0], 0.99))
            np.testing.assert_allclose(np.unique(drawn), np.unique(np.append(-top * steps, top * steps)), atol=1e-12)
            assert abs((drawn > 0).mean() - 15 / 31) < 0.04
        elif name == "posterize":
            assert set(drawn) == {2, 3, 4, 5, 6, 7, 8} and abs((drawn == 8).mean() - 3 / 31) < 0.02
        elif name == "solarize":
            np.testing.assert_allclose(np.unique(drawn), 255 * steps)


def test_rand_augment_makes_count_operations_of_one_strength(calls):
    rand_augment(np.zeros((5000, 32, 64, 1), np.uint8), np.random.default_rng(0), count=3, magnitude=10)
    assert len(calls) == 3 and not np.array_equal(calls[0][0], calls[1][0])
    expected = {"shear_x": 0.1, "translate_x": 50 / 331 * 64, "translate_y": 50 / 331 * 32, "rotate": 10, "color": 0.3}
    expected |= {"posterize": 7, "solarize": 170, "equalize": 0}
    for operations, magnitudes in calls:
        for name, value in expected.items():
            np.testing.assert_allclose(np.abs(magnitudes[operations == CODE[name]]), value)
        assert set(operations) == set(range(15)) - {CODE["invert"]}


def test_auto_augment_is_the_policy_of_torchvision(calls):
    names = {name.replace("_", ""): name for name in OPERATIONS}
    policy = [
        [(names[name.lower()], probability, strength or 0) for name, probability, strength in pair]
        for pair in json.loads(str(REFERENCE["cifar10"]))
    ]
    for i, pair in enumerate(policy):
        for j, (name, probability, strength) in enumerate(pair):
            assert OPERATIONS[ops._AUTO["operation"][i, j]] == name
            assert ops._AUTO["probability"][i, j] == probability
            assert ops._AUTO["magnitude"][i, j] == strength
    n = 50_000
    auto_augment(np.zeros((n, 32, 32, 1), np.uint8), np.random.default_rng(0))
    assert len(calls) == 2
    for j, (operations, magnitudes) in enumerate(calls):
        for name in OPERATIONS[1:]:
            expected = sum(pair[j][1] for pair in policy if pair[j][0] == name) / 25
            assert (operations == CODE[name]).mean() == pytest.approx(expected, abs=0.006), name
        turned = np.abs(magnitudes[operations == CODE["rotate"]])
        np.testing.assert_allclose(turned, 30 * 2 / 9)
    second = calls[1][1][calls[1][0] == CODE["translate_x"]]
    np.testing.assert_allclose(np.unique(np.abs(second)), 150 / 331 * 32 * np.array([8, 9]) / 9)


@pytest.mark.parametrize("policy", ["trivial", "rand", "auto"])
@pytest.mark.parametrize("shape", [(0, 8, 8, 1), (1, 8, 8, 1), (40, 2, 5, 3), (3, 1, 1, 1)])
def test_policies_take_images_of_any_size(policy, shape):
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    before = images.copy()
    result = augment(images, np.random.default_rng(2), policy=policy)
    assert result.shape == shape and result.dtype == np.uint8
    np.testing.assert_array_equal(images, before)
    np.testing.assert_array_equal(result, augment(images[::-1][::-1], np.random.default_rng(2), policy=policy))


def test_augment_names_the_policies(images):
    for name, function in {"trivial": trivial_augment, "auto": auto_augment}.items():
        result = augment(images, np.random.default_rng(3), policy=name, flip=True)
        rng = np.random.default_rng(3)
        np.testing.assert_array_equal(result, augment(function(images, rng), rng, flip=True))
    result = augment(images, np.random.default_rng(3), policy="rand", rand_count=1, rand_magnitude=30)
    np.testing.assert_array_equal(result, rand_augment(images, np.random.default_rng(3), count=1, magnitude=30))
    with pytest.raises(ValueError, match="unknown policy 'best'"):
        augment(images, np.random.default_rng(3), policy="best")
