"""What every layer promises: right gradients, untouched inputs, the dtype it was given, any batch, strided arrays."""

import doctest
import importlib
import re
from pathlib import Path

import numpy as np
import pytest

import minivit
from minivit import layers, masked, optim, options
from minivit.laboratory import gradcheck
from minivit.laboratory.cases import LAYERS

CASES = sorted(LAYERS)


def build(name, seed=0):
    return LAYERS[name](np.random.default_rng(seed))


def arrays_in(thing):
    """All arrays of a cache, however deep."""
    if isinstance(thing, np.ndarray):
        return [thing]
    return [a for part in thing for a in arrays_in(part)] if isinstance(thing, tuple) else []


def call_backward(backward, dy, cache):
    gradients = backward(dy, cache)
    return list(gradients) if isinstance(gradients, tuple) else [gradients]


@pytest.mark.parametrize("method", ["central", "complex"])
@pytest.mark.parametrize("name", CASES)
def test_every_gradient_element_by_element(name, method):
    forward, backward, args, names = build(name)
    for result in gradcheck.check(forward, backward, args, names=names, method=method, elementwise=True):
        assert result.passed, result


@pytest.mark.parametrize("name", CASES)
def test_inputs_and_upstream_gradient_are_not_written_to(name):
    forward, backward, args, _ = build(name)
    for a in args:
        if a is not None:
            a.flags.writeable = False
    y, cache = forward(*args)
    dy = np.random.default_rng(1).standard_normal(np.shape(y))
    before = [a.copy() for a in arrays_in(cache)]
    dy.flags.writeable = False
    first = call_backward(backward, dy, cache)
    assert all(np.array_equal(a, b) for a, b in zip(before, arrays_in(cache), strict=True)), "the cache was written to"
    again = call_backward(backward, dy, cache)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True) if a is not None)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
@pytest.mark.parametrize("name", CASES)
def test_dtype_is_kept(name, dtype):
    forward, backward, args, _ = build(name)
    args = [a if a is None else a.astype(dtype) for a in args]
    y, cache = forward(*args)
    assert y.dtype == dtype
    for gradient in call_backward(backward, np.ones(np.shape(y), dtype), cache):
        assert gradient is None or gradient.dtype == dtype


@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("loss")])
def test_float32_agrees_with_float64(name):
    forward, backward, args, _ = build(name)
    narrow = [a if a is None else a.astype(np.float32) for a in args]
    wide = [a if a is None else a.astype(np.float64) for a in narrow]
    (y32, cache32), (y64, cache64) = forward(*narrow), forward(*wide)
    dy = np.random.default_rng(2).standard_normal(y64.shape).astype(np.float32)
    narrow = [y32, *call_backward(backward, dy, cache32)]
    wide = [y64, *call_backward(backward, dy.astype(np.float64), cache64)]
    largest = max(np.abs(b).max() for b in wide if b is not None)
    for a, b in zip(narrow, wide, strict=True):
        if a is not None:
            scale = max(np.abs(b).max() + 1e-3, 1e-2 * largest)  # a gradient may be zero but for rounding
            assert np.abs(a - b).max() < 3e-5 * scale


@pytest.mark.parametrize("name", CASES)
def test_strided_inputs_give_the_same_numbers(name):
    forward, backward, args, _ = build(name)
    spread = []
    for a in args:
        if a is not None:  # every second entry of a larger array, with the axes in Fortran order
            large = np.empty((*a.shape[:-1], 2 * a.shape[-1]), order="F")
            large[..., ::2] = a
            a = large[..., ::2]
            assert a.shape[-1] < 2 or not a.flags.c_contiguous
        spread.append(a)
    y, cache = forward(*args)
    y_spread, cache_spread = forward(*spread)
    np.testing.assert_allclose(y_spread, y, rtol=1e-12, atol=1e-13)
    dy = np.random.default_rng(3).standard_normal((*np.shape(y), 2))[..., 0]
    expected = call_backward(backward, dy.copy(), cache)
    for a, b in zip(call_backward(backward, dy, cache_spread), expected, strict=True):
        if b is not None:
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


def test_every_layer_file_has_a_case():
    files = {p.stem for p in Path(layers.__file__).parent.glob("*.py")} - {"__init__"}
    assert files <= {name.partition("-")[0] for name in CASES}


FOLDERS = [Path(package.__file__).parent for package in (layers, options, masked, optim)]
SOURCES = sorted(path for folder in FOLDERS for path in folder.rglob("*.py"))
EXAMPLES = [path for path in SOURCES if ">>>" in path.read_text("utf-8")]


def test_every_file_with_a_derivation_has_a_worked_example():
    backward = re.compile(r"^def [a-z]\w*_backward\(", re.MULTILINE)
    derived = [path for path in SOURCES if backward.search(path.read_text("utf-8"))]
    assert len(derived) > 30 and not set(derived) - set(EXAMPLES)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_worked_examples_are_right(path):
    name = ".".join(path.relative_to(Path(minivit.__file__).parent).with_suffix("").parts)
    result = doctest.testmod(importlib.import_module(f"minivit.{name}"))
    assert result.attempted >= 3 and not result.failed
