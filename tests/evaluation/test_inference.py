"""A trained model over many images, and what it looks at."""

import numpy as np
import pytest

from minivit.data import load
from minivit.evaluation.inference import attention_map, predict_all
from minivit.training.folder import LAST
from minivit.weights import checkpoint


def test_workers_change_nothing(trained, tmp_path):
    model, _ = checkpoint.load_model(trained / LAST)
    images = load("digits").test_images[:50]
    one, three = (predict_all(model, images, workers=w, micro_batch=7) for w in (1, 3))
    np.testing.assert_array_equal(one, three)


def test_flipped_images_count_as_much(trained):
    model, _ = checkpoint.load_model(trained / LAST)
    images = load("digits").test_images[:20]
    plain, mirrored, mean = (
        predict_all(model, part, workers=1, micro_batch=20, flip=flip)
        for part, flip in ((images, False), (images[:, :, ::-1], False), (images, True))
    )
    assert np.abs(plain - mirrored).max() > 0.01
    np.testing.assert_array_equal(mean, (plain + mirrored) / 2)


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("pooling", ["cls", "mean", "avg", "seq"])
def test_attention_of_a_known_map(pooling, registers):
    first = registers + (pooling == "cls")
    N = first + 4
    attention = np.random.default_rng(0).random((3, N, N))
    attention /= attention.sum(axis=2, keepdims=True)
    shown = attention_map(attention, pooling, registers)
    for row in range(2):
        for column in range(2):
            key = first + 2 * row + column
            if pooling == "cls":
                expected = sum(attention[h, 0, key] for h in range(3)) / 3
            else:
                expected = sum(attention[h, q, key] for h in range(3) for q in range(first, N)) / (3 * 4)
            np.testing.assert_allclose(shown[row, column], expected, rtol=1e-12)
