"""backend: arrays decide, mixtures are refused, and importing minivit stays light."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import numpy as np
import pytest

from minivit.base import backend
from minivit.base.errors import InputError


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
    np.testing.assert_allclose(backend.matmul_rows(x, W), x @ W, rtol=1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
def test_sums_and_means_of_rows(dtype):
    x = np.random.default_rng(0).standard_normal((2, 3, 8))[..., ::2].astype(dtype)
    tolerance = 1e-6 if dtype == np.float32 else 1e-14
    for found, expected in (
        (backend.row_sum(x), x.sum(axis=-1, keepdims=True)),
        (backend.row_mean(x), x.mean(axis=-1, keepdims=True)),
    ):
        assert found.dtype == dtype and found.shape == (2, 3, 1)
        np.testing.assert_allclose(found, expected, atol=tolerance)
    assert backend.row_sum(np.arange(4.0)) == [6.0]


def test_erf_without_scipy_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    with pytest.raises(ImportError, match=r"pip install .minivit\[interop\]"):
        backend.erf(np.zeros(1))


def test_importing_minivit_imports_no_heavy_library():
    code = (
        "import sys, minivit, minivit.data, minivit.laboratory.gradcheck, minivit.training.trainer\n"
        "import minivit.weights.checkpoint\n"
        "print([m for m in ('cupy', 'matplotlib', 'torch', 'scipy', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class TwinCache:
    """Made by `twin_forward`, so its backward is the twin's."""


@pytest.fixture
def doubled(monkeypatch):
    """A layer whose twin returns a marked result for float32, and declines anything else."""
    twins = type(sys)("minivit.kernels.test_twins")
    monkeypatch.setitem(sys.modules, twins.__name__, twins)
    monkeypatch.setattr(backend, "TWINS", {"numpy": twins.__name__})
    monkeypatch.setattr(TwinCache, "__module__", twins.__name__)

    def double_forward(x):
        return ("twin", TwinCache()) if x.dtype == np.float32 else NotImplemented

    def double_backward(dy, cache):
        return "twin"

    for function in (double_forward, double_backward):
        function.__module__ = twins.__name__
        setattr(twins, function.__name__, function)

    @backend.accelerated
    def double_forward(x):
        return "plain", ()

    @backend.accelerated
    def double_backward(dy, cache):
        return "plain"

    return double_forward, double_backward


def test_a_twin_stands_in_where_it_applies_and_the_backward_goes_the_way_of_the_forward(doubled):
    forward, backward = doubled
    y, cache = forward(np.ones(2, np.float32))
    assert y == "twin" and backward(y, cache) == "twin"
    y, cache = forward(np.ones(2))
    assert y == "plain" and backward(y, cache) == "plain"


def test_arguments_may_be_given_by_name(doubled):
    forward, backward = doubled
    y, cache = forward(x=np.ones(2, np.float32))
    assert y == "twin" and backward(y, cache=cache) == backward(cache=cache, dy=y) == "twin"
    assert forward(x=np.ones(2))[0] == "plain"
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        forward()


def test_plain_switches_twins_off_in_every_thread(doubled):
    forward, backward = doubled
    x = np.ones(2, np.float32)
    _, cache = forward(x)
    with backend.plain(), backend.plain(), ThreadPoolExecutor(1) as pool:
        assert pool.submit(forward, x).result()[0] == "plain"
        assert backward(x, cache) == "twin"  # its cache is the twin's own
    assert forward(x)[0] == "twin"
    assert forward.__wrapped__(x)[0] == "plain"


def test_the_environment_switches_twins_off():
    code = "from minivit.base.backend import kernels_wanted as k; print(k())"
    for value, expected in (("plain", "False"), ("auto", "True")):
        environment = {**os.environ, "MINIVIT_KERNELS": value}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected
    environment = {**os.environ, "MINIVIT_KERNELS": "fast"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "MINIVIT_KERNELS must be auto or plain, got 'fast'" in done.stderr


class NoGpu(ModuleType):
    """Stands for CuPy on a machine of so many GPUs, or of no driver."""

    def __init__(self, count):
        super().__init__("cupy")
        self.cuda = self.runtime = self
        self.count, self.CUDARuntimeError = count, RuntimeError

    def getDeviceCount(self):
        if self.count is None:
            raise RuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
        return self.count


def test_devices(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # not installed
    assert backend.find_device("cpu") == backend.find_device("auto") == "cpu"
    with pytest.raises(InputError, match=r'device cuda needs CuPy: pip install "minivit\[gpu\]"'):
        backend.find_device("cuda")
    monkeypatch.setitem(sys.modules, "cupy", NoGpu(None))
    assert backend.find_device("auto") == "cpu"
    with pytest.raises(InputError, match="device cuda:1: CUDA says cudaErrorNoDevice: no CUDA-capable device"):
        backend.find_device("cuda:1")
    monkeypatch.setitem(sys.modules, "cupy", NoGpu(2))
    assert [backend.find_device(name) for name in ("auto", "cuda", "cuda:1")] == ["cuda:0", "cuda:0", "cuda:1"]
    with pytest.raises(InputError, match="device cuda:2: there are 2 GPUs, counted from cuda:0"):
        backend.find_device("cuda:2")
    for name in ("gpu", "cuda:", "cuda:x", "cuda:-1", ""):
        with pytest.raises(InputError, match="device must be cpu, cuda"):
            backend.find_device(name)
