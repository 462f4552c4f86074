"""Compile the CUDA kernels for several generations of GPUs, without one: registers, and nothing spilled from them."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor

from minivit.commands.cli import Parser, run
from minivit.kernels import cuda
from minivit.kernels.nvrtc import ARCHITECTURES, compile_kernels, usual_sizes

EXAMPLES = """
examples:
  pip install "minivit[kernels]" && python tools/check_kernels.py
  python tools/check_kernels.py --architecture sm_90

The exit status is 0, 1 if a kernel needs more registers than there are, 2 if one does not compile.
"""


def main(argv=None):
    """Entry point; returns the exit status."""
    parser = Parser(description=__doc__, epilog=EXAMPLES, prog="check_kernels.py")
    parser.add_argument("--architecture", choices=ARCHITECTURES, help="one alone [all]")
    arguments = parser.parse_args(argv)
    source, spilled = cuda.SOURCE.read_text(), 0
    chosen = [arguments.architecture] if arguments.architecture else ARCHITECTURES
    jobs = [(architecture, sizes) for architecture in chosen for sizes in usual_sizes(architecture)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = pool.map(lambda job: compile_kernels(source, *job), jobs)
        for (architecture, sizes), kernels in zip(jobs, compiled, strict=True):
            spilled += sum(kernel.spilled > 0 for kernel in kernels)
            constants = " ".join(f"{name}={value}" for name, value in sizes)
            most = max(kernels, key=lambda kernel: kernel.registers)
            spills = "".join(f"; {k.kernel} SPILLS {k.spilled} bytes" for k in kernels if k.spilled)
            print(f"{architecture} {constants:37}{len(kernels):3} kernels, at most {most.registers} registers{spills}")
    print("nothing is spilled" if not spilled else f"{spilled} kernels spill")
    return int(spilled > 0)


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
