"""Relative attention: one head alone, a table of zeros, the view of offsets."""

import numpy as np
import pytest

from minivit.layers.attention import attention_backward, attention_forward
from minivit.options.relative_attention import (
    by_key,
    relative_attention_backward,
    relative_attention_forward,
)


def arrays(Q=5, N=5, Dh=4):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape) for shape in ((Q, Dh), (N, Dh), (N, Dh), (1, 2 * N - 1, Dh))]


@pytest.mark.parametrize("Q", [1, 3, 5])
def test_one_head_alone_is_a_batch_of_one(Q):
    q, k, v, r = arrays(Q)
    batch = [x[None, None] for x in (q, k, v)]
    y, cache = relative_attention_forward(q, k, v, r)
    expected, expected_cache = relative_attention_forward(*batch, r)
    np.testing.assert_allclose(y, expected[0, 0], rtol=1e-14)
    dy = np.random.default_rng(1).standard_normal(y.shape)
    *gradients, dr = relative_attention_backward(dy, cache)
    *wanted, wanted_dr = relative_attention_backward(dy[None, None], expected_cache)
    for a, b in zip([*gradients, dr], [*(g[0, 0] for g in wanted), wanted_dr], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def test_a_table_of_zeros_is_ordinary_attention():
    q, k, v, r = arrays()
    y, cache = relative_attention_forward(q, k, v, 0 * r)
    expected, expected_cache = attention_forward(q, k, v)
    np.testing.assert_allclose(y, expected, rtol=1e-14)
    *gradients, dr = relative_attention_backward(np.ones_like(y), cache)
    for a, b in zip(gradients, attention_backward(np.ones_like(y), expected_cache), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15)
    assert dr.any(), "the table still learns"


def test_the_view_is_that_of_the_derivation():
    P = np.arange(15).reshape(3, 5)
    np.testing.assert_array_equal(by_key(P, 3), [[2, 3, 4], [6, 7, 8], [10, 11, 12]])
    np.testing.assert_array_equal(by_key(P[:1, 2:], 3), [[2, 3, 4]])  # one query: its N offsets alone
    assert np.shares_memory(by_key(P, 3), P)
