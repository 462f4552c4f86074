"""A machine for `minivit.kernels.cuda` that runs kernels.cu and cuBLAS calls on the CPU, with NumPy arrays.

It compiles the kernels' own source as C++ (with the ``zig`` compiler that pip installs, or the system's) and checks
what CuPy does not: the number of arguments, their types, that arrays are contiguous and of the kernel's type, and that
vectors are read and written at multiples of their size.
"""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from strict_cupy import STREAM

from minivit.benchmark.bandwidth import SIGNATURE
from minivit.kernels import cuda
from minivit.kernels.cublas import Cublas

HERE = Path(__file__).parent
SHARED = re.compile(r"__shared__ (\w+) (\w+)((?:\[[^\]]+\])+);")
DTYPES = {"float": np.float32, "int": np.int32, "unsigned char": np.uint8, "size_t": np.uint64}
SCALARS = {
    "float": (np.float32, ctypes.c_float),
    "int": (np.int32, ctypes.c_int),
    "size_t": (np.uint64, ctypes.c_size_t),
}
# What of kernels.cu is compiled together: the rest is left out, so that a change there compiles nothing anew.
SECTION = re.compile(r"^#if(?:def | defined\()(WIDTH|ROWS|TOKENS|TENSOR)\b.*?^#endif  // \1[^\n]*\n", re.S | re.M)


def compiler(language):
    """The command of a C or C++ compiler."""
    names = {"c": ("cc", "gcc", "clang"), "c++": ("c++", "g++", "clang++")}[language]
    for name in names:
        if shutil.which(name):
            return [name]
    return [sys.executable, "-m", "ziglang", {"c": "cc", "c++": "c++"}[language]]


def build(source, suffix):
    """Compile a source text to a shared library, once."""
    key = hashlib.sha256((source + (HERE / "cuda.h").read_text()).encode()).hexdigest()[:20]
    folder = Path(tempfile.gettempdir()) / f"minivit-emulator-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    library = folder / f"{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            code, made = Path(work) / f"code.{suffix}", Path(work) / "made.so"
            code.write_text(source)
            language = {"c": "c", "cpp": "c++"}[suffix]
            flags = ["-std=c++17"] if suffix == "cpp" else []
            command = [
                *compiler(language),
                *flags,
                "-O1",
                "-fPIC",
                "-shared",
                "-w",
                f"-I{HERE}",
                str(code),
                "-o",
                str(made),
                "-lm",
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
            os.replace(made, library)
    return ctypes.CDLL(str(library))


class CountedCublas(Cublas):
    """Counts its products, and checks that they are of the machine's own arrays."""

    def matmul(self, a, b, out, **settings):
        self.launches["matmul"] += 1
        STREAM.do(lambda: Cublas.matmul(self, a, b, out, **settings))

    def matmul_of_addresses(self, *arguments, **settings):
        self.launches["matmul_of_addresses"] += 1
        STREAM.do(lambda: Cublas.matmul_of_addresses(self, *arguments, **settings))


class Emulator:
    """Stands for a GPU: see `minivit.kernels.cuda.Machine`. ``launches`` counts kernels and products by name."""

    processors, has_tf32 = 2, True
    shared_memory = 227 << 10  # of an H100

    def __init__(self, source=None):
        self.precision, self.source = "float32", source or cuda.SOURCE.read_text()
        self.launches, self._modules = Counter(), {}
        library = build((HERE / "cublas.c").read_text(), "c")._name
        self._blas = CountedCublas(library, self.address, workspace=np.empty(64, np.uint8))
        self._blas.launches = self.launches

    @staticmethod
    def address(array):
        """Where an array begins."""
        return array.ctypes.data

    def _module(self, sizes):
        if sizes not in self._modules:
            section = next(name for name in ("WIDTH", "ROWS", "TENSOR", "TOKENS") if name in dict(sizes))
            source = SECTION.sub(lambda found: found[0] if found[1] == section else "", self.source)
            code = SHARED.sub(r"static \1 \2\3; emulator::fresh(\2, sizeof \2);", source)
            code = code.replace("extern __shared__ float shared[];", "float* shared = emulator::dynamic_shared();")
            defines = "".join(f"#define {name} {value}\n" for name, value in sizes)
            parts, signatures = [f'{defines}#include "cuda.h"\n{code}\n'], {}
            for name, arguments in SIGNATURE.findall(source):
                types = [self._type(argument) for argument in arguments.split(",")]
                signatures[name] = types
                values = ", ".join(f"*({t}*)a[{i}]" for i, t in enumerate(types))
                parts.append(
                    f'extern "C" int launch_{name}(const unsigned* g, const unsigned* b, size_t s, void** a)'
                    f"{{ return emulator::run(g, b, s, a, [](void** a) {{ {name}({values}); }}); }}\n"
                )
            self._modules[sizes] = build("".join(parts), "cpp"), signatures
        return self._modules[sizes]

    @staticmethod
    def _type(argument):
        text = argument.replace("__restrict__", "").strip()
        return re.match(r"(.*?)\s*\w+$", text, re.S)[1].strip()

    def launch(self, name, grid, block, arguments, *, sizes=(("ROWS", 1),), shared=0):
        """Run a kernel; what CuPy leaves unchecked is checked."""
        library, signatures = self._module(sizes)
        types = signatures[name]
        assert len(arguments) == len(types), f"{name} takes {len(types)} arguments, {len(arguments)} were given"
        assert shared <= self.shared_memory and np.prod(block) <= 1024, (
            f"{name}: this GPU has no {shared} bytes of shared memory, or no blocks of {block}"
        )
        assert all(1 <= n for n in grid) and all(n < 65536 for n in grid[1:]), f"{name}: grid {grid}"
        kept, pointers = [], (ctypes.c_void_p * len(types))()
        for i, (value, kind) in enumerate(zip(map(cuda._argument, arguments), types, strict=True)):
            where = f"{name}, argument {i} ({kind})"
            if kind.endswith("*"):
                if value is None:
                    kept.append(ctypes.c_void_p(0))
                else:
                    expected = ({"real": np.uint16 if "BF16" in dict(sizes) else np.float32} | DTYPES)[
                        kind.removeprefix("const ").removesuffix("*").strip()
                    ]
                    assert isinstance(value, np.ndarray) and value.flags.c_contiguous, f"{where} is not contiguous"
                    assert value.dtype == expected, f"{where} is {value.dtype}"
                    kept.append(ctypes.c_void_p(value.ctypes.data))
            else:
                expected, convert = SCALARS[kind]
                assert isinstance(value, expected), f"{where} is given as {type(value).__name__}"
                kept.append(convert(value.item()))
            pointers[i] = ctypes.addressof(kept[-1])
        self.launches[name] += 1
        g, b = ((ctypes.c_uint * 3)(*(*extent, 1, 1)[:3]) for extent in (grid, block))
        function = getattr(library, f"launch_{name}")

        def run():
            assert not function(g, b, ctypes.c_size_t(shared), pointers), f"{name}: a misaligned address"

        STREAM.do(run, kept, arguments)  # a graph that is recorded (see strict_cupy) keeps the arguments

    def blas(self):
        """The library that stands for cuBLAS."""
        return self._blas
