"""The machine that is measured: its processor, its BLAS, and the cores that programs may use."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np

from minivit import __version__
from minivit.base.errors import InputError
from minivit.benchmark.contenders.ours import blas
from minivit.training.engines.cut import available_cores


@contextlib.contextmanager
def only_cores(count):
    """Keep this process, and those that it starts meanwhile, to ``count`` cores; 0 for all of them.

    Raises  InputError: there are not so many, or the system cannot do it.
    """
    if not count or count == available_cores():
        yield
        return
    if not 0 < count < available_cores():
        raise InputError(f"--threads must be 1 to {available_cores()}, the cores that there are; got {count}")
    if not hasattr(os, "sched_setaffinity"):
        raise InputError("this system cannot keep a program to some of its cores: leave --threads out")
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def processor():
    """The processor's name, as well as the system knows it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            return subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
    return platform.processor() or platform.machine()


def machine():
    """What the times depend on: processor, cores, BLAS, versions and settings from the environment."""
    names = ("OPENBLAS", "OMP", "GOMP", "KMP", "MKL", "BLIS", "VECLIB", "XLA", "JAX", "TORCH", "MINIVIT", "MALLOC")
    return {
        "processor": processor(), "cores": available_cores(), "blas": blas(), "system": platform.platform(),
        "python": platform.python_version(), "numpy": np.__version__, "minivit": __version__,
        "environment": {key: value for key, value in sorted(os.environ.items())
                        if key.split("_")[0] in names and key != "KMP_DUPLICATE_LIB_OK"},  # threadpoolctl sets that
    }  # fmt: skip
