"""Arrays that count what is done with them, whatever layer does it.

A `CountedArray` is an ordinary array, its operations give ordinary numbers to the last bit, and each tells how much
work it was to the `Counter` that is active in its thread. A multiply-add is 2 operations:

    a product of matrices (..., n, d) @ (..., d, m)      2 n d m, times the leading axes: counted apart
    a product with a vector                              as many, among the other operations: it is a weighted sum
    a reduction, a sum or a maximum                      1 per entry that goes in
    all else: +, *, exp, tanh, comparisons, ...          1 per entry that comes out

Moving numbers is no operation: indexing, reshape, concatenate. Products count where they are written ``a @ b`` or
``matmul``, not in ``dot`` and ``einsum``. Without an active counter arrays turn back into ordinary ones, operation by
operation.
"""

from __future__ import annotations

import threading
from time import perf_counter

import numpy as np

_of_thread = threading.local()


class Counter:
    """Operations that were counted so far, and the seconds that counting them took."""

    def __init__(self):
        self.products, self.others, self.seconds = 0, 0, 0.0
        self.sums = False  # while true, products stand for sums: 1 per entry that goes in

    def add(self, ufunc, method, inputs, result):
        """Count one operation on plain arrays."""
        if method not in ("__call__", "outer"):  # reduce, accumulate, at, ...
            self.others += np.size(inputs[0])
        elif ufunc is not np.matmul:
            self.others += np.size(result)
        elif self.sums:
            self.others += max(inputs[0].size, inputs[1].size)
        else:
            work = 2 * np.size(result) * inputs[0].shape[-1]
            if min(inputs[0].ndim, inputs[1].ndim) > 1:
                self.products += work
            else:
                self.others += work


def activate(counter):
    """Let a counter, or None, be the one of this thread; returns the one before."""
    before = getattr(_of_thread, "counter", None)
    _of_thread.counter = counter
    return before


class CountedArray(np.ndarray):
    """An array whose operations are counted; see the module's docstring."""

    def __array_ufunc__(self, ufunc, method, *inputs, **settings):
        entered = perf_counter()
        counter = getattr(_of_thread, "counter", None)
        inputs = [uncounted(each) for each in inputs]
        out = settings.get("out")
        settings = {key: uncounted(value) for key, value in settings.items()}
        started = perf_counter()
        if ufunc is np.matmul:  # some BLAS sound false alarms; what it gives is looked at
            with np.errstate(all="ignore"):
                result = getattr(ufunc, method)(*inputs, **settings)
        else:
            result = getattr(ufunc, method)(*inputs, **settings)
        ended = perf_counter()
        if counter is not None:
            counter.add(ufunc, method, inputs, result[0] if type(result) is tuple else result)
        if out is not None:
            results = [given if given is not None else each for given, each in zip(out, _tuple(result), strict=True)]
            result = tuple(results) if type(result) is tuple else results[0]
        elif counter is not None:
            result = counted(result)
        if counter is not None:
            counter.seconds += perf_counter() - ended + started - entered
        return result

    def __array_function__(self, function, types, arguments, settings):
        result = super().__array_function__(function, types, arguments, settings)
        return counted(result) if getattr(_of_thread, "counter", None) is not None else result


def _tuple(value):
    return value if type(value) is tuple else (value,)


def counted(value):
    """An array as a `CountedArray`, a view; of a list or a tuple of them each; other values as they are."""
    if type(value) is np.ndarray:
        return value.view(CountedArray)
    if type(value) in (tuple, list):
        return type(value)(map(counted, value))
    return value


def uncounted(value):
    """The inverse of `counted`, for the arrays in a cache and in a mapping as well."""
    if isinstance(value, CountedArray):
        return value.view(np.ndarray)
    if isinstance(value, tuple):
        parts = [uncounted(part) for part in value]
        if all(a is b for a, b in zip(parts, value, strict=True)):
            return value
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if type(value) is dict:
        return {key: uncounted(part) for key, part in value.items()}
    return value
