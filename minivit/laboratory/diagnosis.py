"""Which number of a computation is the first that is not finite: what `minivit.training.step.Step` asks."""

from __future__ import annotations

from minivit.laboratory.recorder import recording
from minivit.laboratory.trace import first_non_finite


def diagnose(model, function):
    """The first number that is not finite of those that ``function()`` makes with a model, in words; "" if all are."""
    with recording(model=model, figures=False) as recorder:
        function()
    culprit = first_non_finite(recorder)
    return culprit.message if culprit else ""
