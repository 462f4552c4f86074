"""Compiles kernels.cu to machine code without a GPU, through NVIDIA's run-time compiler called by ctypes.

The compiler is a package of its own: pip install "minivit[kernels]".
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

from minivit.base.errors import InputError
from minivit.kernels.cuda import TENSOR_TILES

ARCHITECTURES = ("sm_75", "sm_80", "sm_90")  # Turing (T4), Ampere (A100), Hopper (H100)


class Compiled(NamedTuple):
    """One kernel, for one architecture and set of constants."""

    kernel: str
    registers: int  # of a thread
    spilled: int  # bytes that did not fit into them


def _library():
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else ():
        for path in sorted(Path(folder).glob("**/libnvrtc.so*")):
            for builtins in path.parent.glob("libnvrtc-builtins.so*"):  # which it looks for by name alone
                ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(str(path))
    raise InputError('NVIDIA\'s compiler is not installed: pip install "minivit[kernels]"')


def compile_kernels(source, architecture, sizes):
    """Compile a source text with its constants: a list of `Compiled`.

    Raises  InputError: the compiler is not installed, or its complaint.
    """
    nvrtc, program = _library(), ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    options = [f"-arch={architecture}", "-std=c++17", "-ftz=true", "--ptxas-options=-v"]
    options += [f"-D{name}={value}" for name, value in sizes]
    encoded = [option.encode() for option in options]
    status = nvrtc.nvrtcCompileProgram(program, len(encoded), (ctypes.c_char_p * len(encoded))(*encoded))
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    text = log.value.decode(errors="replace")
    if status:
        error = next((line for line in text.splitlines() if "error" in line), f"status {status}")
        raise InputError(f"kernels.cu does not compile for {architecture} with {dict(sizes)}: {error}")
    names = re.findall(r"entry function '(\w+)'", text)
    registers = map(int, re.findall(r"Used (\d+) registers", text))
    spills = map(int, re.findall(r"(\d+) bytes spill stores", text))
    return [Compiled(*figures) for figures in zip(names, registers, spills, strict=True)]


def usual_sizes(architecture):
    """The constants with which kernels.cu is compiled: for the paper's models, small ones, and the largest sizes."""
    sizes = [(("ROWS", 1),), *((("WIDTH", D),) for D in (192, 384, 768, 1024))]
    sizes += [(("TOKENS", N), ("HEAD", Dh)) for N, Dh in ((65, 64), (65, 16), (96, 64), (96, 96), (4, 1024))]
    if architecture != "sm_75":  # whose tensor cores do not know TF32
        usual = [(17, 64), (65, 64), (64, 32), (197, 64), (199, 64), (305, 32), (65, 128)]
        largest = [(16 * tiles, Dh) for Dh, tiles in TENSOR_TILES.items()]
        sizes += [(("TENSOR", 1), ("TOKENS", N), ("HEAD", Dh)) for N, Dh in usual + largest]
    return [(*constants, *extra) for constants in sizes for extra in ((), (("BF16", 1),))]
