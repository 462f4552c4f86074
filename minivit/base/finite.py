"""Numbers that are not finite: how they are found, and how NumPy's warnings of them are kept away."""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import numpy as np


def is_finite(array):
    """Does it hold floating-point numbers, none of them NaN or infinite?"""
    return array.dtype.kind == "f" and bool(np.isfinite(array).all())


@contextmanager
def quiet_overflow():
    """While active, NumPy does not warn of numbers that overflow: its user tells of figures that are not finite."""
    with warnings.catch_warnings():  # not np.errstate, which other threads would not see
        warnings.filterwarnings("ignore", "(overflow|invalid value|divide by zero) encountered", RuntimeWarning)
        yield
