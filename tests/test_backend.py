"""backend: arrays decide, mixtures are refused, and importing minivit stays light."""

import subprocess
import sys

import numpy as np
import pytest

from minivit import backend


def test_numpy_arrays_belong_to_numpy():
    assert backend.array_module(np.zeros(2), np.float32(1.0)) is np


def test_mixtures_and_foreign_things_are_refused(monkeypatch):
    class Foreign:
        pass

    Foreign.__module__ = "cupy._core.core"
    with pytest.raises(TypeError, match="mixed"):
        backend.array_module(np.zeros(2), Foreign())
    with pytest.raises(TypeError, match="list"):
        backend.array_module([1.0])


def test_host_arrays_are_not_copied():
    x = np.zeros(3)
    assert backend.to_host(x) is x


def test_matmul_of_tokens():
    rng = np.random.default_rng(0)
    x, W = rng.standard_normal((2, 3, 4)), rng.standard_normal((4, 5))
    np.testing.assert_allclose(backend.matmul(x, W), x @ W, rtol=1e-13)


def test_erf_without_scipy_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    with pytest.raises(ImportError, match=r"pip install .minivit\[interop\]"):
        backend.erf(np.zeros(1))


def test_importing_minivit_imports_no_heavy_library():
    code = (
        "import sys, minivit, minivit.train, minivit.data, minivit.gradcheck, minivit.checkpoint\n"
        "print([m for m in ('cupy', 'matplotlib', 'torch', 'scipy', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
