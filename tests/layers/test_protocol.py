"""What every layer promises: right gradients, untouched inputs, the dtype it was given, any batch, strided arrays."""

import doctest
import importlib
from pathlib import Path

import numpy as np
import pytest

from minivit import layers
from minivit.base.backend import plain
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


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("-twin")])
@pytest.mark.parametrize(("dtype", "limit"), [(np.float32, 3e-6), (np.float64, 1e-14)])
def test_a_twin_gives_the_numbers_of_the_book(name, dtype, limit):
    """Forward and every gradient, to rounding."""
    book, twin = build(name.removesuffix("-twin")), build(name)
    args = [a.astype(dtype) for a in book[2]]
    (y, cache), (expected, book_cache) = twin[0](*args), book[0](*args)
    caches = [getattr(c[0] if type(c) is tuple and len(c) == 3 else c, "__module__", "") for c in (cache, book_cache)]
    assert "minivit.kernels" not in caches[1]
    dy = np.random.default_rng(1).standard_normal(np.shape(y)).astype(dtype)
    found = [y, *call_backward(twin[1], dy, cache)]
    wanted = [expected, *call_backward(book[1], dy, book_cache)]
    largest = max(np.abs(b).max() for b in wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == dtype and np.abs(a - b).max() <= limit * max(np.abs(b).max(), 0.1 * largest) * 10


@pytest.mark.parametrize("name", ["linear", "layernorm", "gelu", "softmax", "attention", "msa", "block"])
def test_twins_stand_in_for_arrays_of_the_processor(name):
    """Unless they are switched off: what `test_a_twin_gives_the_numbers_of_the_book` compares is two things."""
    forward, _, args, _ = build(f"{name}-twin")
    cache = forward(*args)[1]
    cache = cache[1] if name == "block" else cache  # the step and the shapes stand around it
    assert type(cache).__module__ == "minivit.kernels.cpu"
    with plain():
        cache = forward(*args)[1]
    cache = cache[1] if name == "block" else cache
    assert type(cache).__module__ == f"minivit.layers.{name}"


def modules_with_examples():
    return sorted(path for path in Path(layers.__file__).parent.glob("*.py") if ">>>" in path.read_text("utf-8"))


@pytest.mark.parametrize("path", modules_with_examples(), ids=lambda path: path.stem)
def test_the_worked_examples_are_right(path):
    result = doctest.testmod(importlib.import_module(f"minivit.layers.{path.stem}"))
    assert result.attempted >= 3 and not result.failed
