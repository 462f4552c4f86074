"""The facts hold."""

import pytest

from minivit.laboratory.facts import FACTS, TOLERANCE


@pytest.mark.parametrize("name", FACTS)
def test_fact(name):
    assert FACTS[name]() <= TOLERANCE
    assert FACTS[name].__doc__
