"""Learning rates by their formulas, and at their edges."""

import math

import numpy as np
import pytest

from minivit.base.errors import InputError
from minivit.optim.schedules import learning_rate


def test_trapezoid():
    rates = [learning_rate(t, 100, lr=2.0, schedule="trapezoid", warmup_steps=9, final_lr=0.5, cooldown=0.4)
             for t in range(100)]  # fmt: skip
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) * 0.2)
    assert set(rates[9:61]) == {2.0}
    np.testing.assert_allclose(rates[60:], 2.0 - 1.5 * np.arange(40) / 40)
    assert learning_rate(99, 100, lr=1.0, schedule="trapezoid", cooldown=0.0) == 1.0
    assert learning_rate(90, 100, lr=1.0, schedule="trapezoid") == 0.5  # half of the last fifth


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


def test_the_schedule_at_its_edges():
    assert math.isclose(learning_rate(1, 10, lr=0.6, warmup_steps=3), 0.3)
    assert learning_rate(5, 5, lr=1.0, warmup_steps=5) == 1.0  # nothing is left after the warm-up
    rates = [learning_rate(t, 4, lr=1.0, schedule="linear", final_lr=0.2, warmup_steps=3) for t in (3, 4)]
    np.testing.assert_allclose(rates, [1.0, 0.2])


def test_an_unknown_schedule_is_refused_and_one_of_old_explained():
    with pytest.raises(InputError) as error:
        learning_rate(0, 1, lr=1.0, schedule="step")
    assert str(error.value) == "schedule must be one of cosine, linear, constant, trapezoid; got 'step'"
    with pytest.raises(InputError) as error:
        learning_rate(0, 1, lr=1.0, schedule="onecycle")
    assert str(error.value) == "schedule onecycle was removed; choose one of cosine, linear, constant, trapezoid"
