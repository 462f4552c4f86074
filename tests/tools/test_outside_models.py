"""The sweep over models of other programs: python -m pytest -m torch tests/tools/test_outside_models.py"""

import outside_models
import pytest
from outside_models import FEW, LIMIT, NOTED, TORCHVISION, TRANSFORMERS, Found


@pytest.mark.torch
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_class_of_transformers_is_right_or_refused(name):
    found = outside_models.compare("transformers", name)
    assert not outside_models.is_wrong(found), found
    assert found.difference is not None or "not made" not in found.reason, found


@pytest.mark.torch
@pytest.mark.parametrize(
    ("program", "name"), [("timm", name) for name in FEW] + [("torchvision", name) for name in TORCHVISION]
)
def test_a_few_of_timms_and_torchvisions(program, name):
    found = outside_models.compare(program, name)
    assert not outside_models.is_wrong(found), found


@pytest.mark.torch
@pytest.mark.slow
def test_every_architecture_of_timm_is_right_or_refused():
    found = outside_models.sweep(["timm"])
    assert len(found) > 300 and sum(each.difference is not None for each in found) > 60
    assert not [each for each in found if outside_models.is_wrong(each)]


def test_what_is_wrong():
    assert not outside_models.is_wrong(Found("timm", "x", None, "a reason"))
    assert not outside_models.is_wrong(Found("timm", "x", 0.9 * LIMIT))
    assert outside_models.is_wrong(Found("timm", "x", 1.1 * LIMIT))
    assert not outside_models.is_wrong(Found("timm", "x", 1.1 * LIMIT, "", NOTED))
    assert outside_models.is_wrong(Found("timm", "x", float("nan")))
