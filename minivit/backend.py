"""Which array library an array belongs to, and the few operations that NumPy and CuPy spell differently.

Every layer starts with ``xp = array_module(x)`` and then uses ``xp.exp``, ``xp.matmul``, ...: the arrays
decide where the work is done, there is no global switch, and importing minivit never imports CuPy.
"""

from __future__ import annotations

import sys

import numpy as np


def array_module(*arrays):
    """The library, ``numpy`` or ``cupy``, that all of ``arrays`` belong to.

    Raises
        TypeError: one of them is not an array, or NumPy and CuPy arrays are mixed.
    """
    modules = set()
    for array in arrays:
        root = type(array).__module__.partition(".")[0]
        if root not in ("numpy", "cupy"):
            raise TypeError(f"expected a NumPy or CuPy array, got {type(array).__name__}")
        modules.add(root)
    if len(modules) != 1:
        raise TypeError("NumPy and CuPy arrays are mixed in one call; move them to one device first")
    return sys.modules[modules.pop()]


def to_host(array):
    """The array as a NumPy array: itself if it is one already, a copy if it lives on a GPU."""
    return array.get() if hasattr(array, "get") else np.asarray(array)


def matmul(x, W):
    """``x @ W`` for x (..., n) and a matrix W (n, m), as one two-dimensional product.

    A batched product with a broadcast matrix would be cut into many small ones; one large product is what
    BLAS is good at.
    """
    return (x.reshape(-1, x.shape[-1]) @ W).reshape(*x.shape[:-1], W.shape[-1])


def erf(x):
    """The error function, elementwise, from SciPy (or from CuPy for CuPy arrays).

    Raises
        ImportError: SciPy is not installed.
    """
    try:
        if array_module(x) is np:
            from scipy.special import erf as function
        else:
            from cupyx.scipy.special import erf as function
    except ImportError:
        raise ImportError('gelu="erf" needs SciPy: pip install "minivit[interop]"') from None
    return function(x)
