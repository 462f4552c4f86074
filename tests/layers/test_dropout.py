"""dropout and drop path: what is dropped, what it is scaled by, and when nothing happens."""

import numpy as np
import pytest

from minivit.layers.drop_path import drop_path_backward, drop_path_forward
from minivit.layers.dropout import dropout_backward, dropout_forward


def test_kept_entries_are_scaled_and_the_share_is_right():
    x = np.ones((200, 500))
    y, cache = dropout_forward(x, rate=0.25, rng=np.random.default_rng(0))
    assert set(np.unique(y)) == {0.0, 1 / 0.75}
    assert abs((y == 0).mean() - 0.25) < 0.005  # 3.6 standard deviations of 100,000 draws
    np.testing.assert_array_equal(dropout_backward(x, cache), y)  # the same mask, the same scale
    assert cache.mask.dtype == bool


def test_a_given_mask_is_used():
    mask = np.array([[True, False, True]])
    y, cache = dropout_forward(np.array([[1.0, 2.0, 3.0]]), rate=0.5, mask=mask)
    np.testing.assert_array_equal(y, [[2.0, 0.0, 6.0]])
    np.testing.assert_array_equal(dropout_backward(np.ones((1, 3)), cache), [[2.0, 0.0, 2.0]])


@pytest.mark.parametrize("forward", [dropout_forward, drop_path_forward])
def test_nothing_happens_without_a_generator_or_at_rate_zero(forward):
    x = np.random.default_rng(0).standard_normal((3, 4, 5))
    for settings in ({"rate": 0.5}, {"rate": 0.0, "rng": np.random.default_rng(1)}):
        y, cache = forward(x, **settings)
        assert y is x and cache.mask is None
    assert dropout_backward(x, cache) is x


def test_drop_path_drops_whole_images():
    x = np.random.default_rng(0).standard_normal((400, 3, 2))
    y, cache = drop_path_forward(x, rate=0.5, rng=np.random.default_rng(1))
    dropped = (y == 0).all(axis=(1, 2))
    assert 160 < dropped.sum() < 240
    np.testing.assert_allclose(y[~dropped], 2.0 * x[~dropped])
    assert cache.mask.shape == (400, 1, 1)
    np.testing.assert_array_equal(drop_path_backward(x, cache), y)


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_impossible_rates_are_refused(rate):
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        dropout_forward(np.ones(3), rate=rate, rng=np.random.default_rng(0))
