"""Who is timed against whom: the same step, of the same model on the same batch, by us, PyTorch, JAX and BLAS alone.

Each contender is a class in a module of its own, which alone imports its library, and runs in a process of its own:
``python -m minivit.benchmark.contenders`` reads who it is and its `Job` from its standard input and then obeys one
request after the other, so that `minivit.benchmark.turns` can let the contenders step in turn. No contender meets
another one's threads or memory allocator that way, and the peak memory of its process is its own.

A contender is made from a job and has

    check()      loss and gradient at the parameters of the start, or the logits: what must agree with ours
    step()       what is timed: forward + backward + AdamW of one batch, returning the loss; or one prediction
    settings     what it was told to do, for the record

and on a GPU also

    event()      the device's clock, read when the work that was given to it so far is done
    between()    the seconds from one event to another, waiting for the second
    synchronize()    waits for the device
    device_memory()  the most of its memory that was taken
"""

from __future__ import annotations

import importlib
import os
import pickle
import statistics
import sys
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from minivit.base import params
from minivit.model import ViTConfig, parameter_table

# name -> module, class, keyword settings, and the environment that its process needs
CONTENDERS = {
    "minivit": ("minivit.benchmark.contenders.ours", "ours", {}, {}),
    "plain": ("minivit.benchmark.contenders.ours", "ours", {}, {"MINIVIT_KERNELS": "plain"}),
    "minivit-fed": ("minivit.benchmark.contenders.ours", "Fed", {}, {}),
    "pipeline": ("minivit.benchmark.contenders.ours", "Pipeline", {}, {}),
    "floor-threads": ("minivit.benchmark.contenders.ours", "Floor", {"blas_threads": True}, {}),
    "floor-workers": ("minivit.benchmark.contenders.ours", "Floor", {"blas_threads": False}, {}),
    "torch": ("minivit.benchmark.contenders.with_torch", "Torch", {}, {}),
    "torch-compile": ("minivit.benchmark.contenders.with_torch", "Torch", {"compiled": True}, {}),
    "jax": ("minivit.benchmark.contenders.with_jax", "Jax", {}, {"JAX_PLATFORMS": "cpu"}),
}

# AdamW, for everyone. The learning rate is small: the batch is always the same, and should not be learned by heart.
LR, WEIGHT_DECAY, BETAS, EPS = 1e-4, 0.05, (0.9, 0.999), 1e-8


class Job(NamedTuple):
    """What a contender is to do."""

    task: str  # "step" or "infer"
    config: ViTConfig
    batch: int
    seed: int
    engine: dict  # keyword settings of our Engine: workers, micro_batch
    device: str = "cpu"  # or "cuda"
    precision: str = "float32"  # on a GPU also "tf32" or "bf16"
    loading: dict = {"crop_padding": 4, "flip": True}  # keyword settings of `minivit.data.batches`


class Problem(NamedTuple):
    """What everyone starts from."""

    flat: Any  # (n,) float32, the parameters
    images: Any  # (B, H, W, C) uint8
    labels: Any  # (B,) int64


def problem(job):
    """Parameters, images and labels of a job, from its seed.

    Math    theta = official initialisation + N(0, 0.02^2)
    The noise is on every parameter, so that none sits at a value that hides a mistake: a head of zeros would let no
    gradient through to the blocks.
    """
    c, rng = job.config, np.random.default_rng([job.seed, 7])
    flat = params.initialise(parameter_table(c), seed=job.seed)
    flat += np.float32(0.02) * rng.standard_normal(flat.size, dtype=np.float32)
    images = rng.integers(0, 256, (job.batch, c.image_size, c.image_size, c.channels), dtype=np.uint8)
    return Problem(flat, images, rng.integers(0, c.num_classes, job.batch))


def peak_memory():
    """Largest resident size of this process so far in bytes, or None where the system does not tell."""
    try:  # Linux: ru_maxrss would count the parent too, whose memory a process shares until it becomes a program
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Turn(NamedTuple):
    """What some steps took, each."""

    seconds: float
    result: Any  # of the last step
    host: Any = None  # on a GPU: the host's seconds until all was launched


def turn(step, repeats, gpu=None):
    """``repeats`` calls of ``step``: a `Turn` with the median of their seconds.

    A GPU goes on while the host prepares the next step, in training as here: its contender ``gpu`` tells the time by
    events before and after all steps, and the seconds, its own and the host's, are those of a step on average.
    """
    if gpu:
        gpu.synchronize()
        before, started = gpu.event(), perf_counter()
        for _ in range(repeats):
            result = step()
        host, after = perf_counter() - started, gpu.event()
        seconds = gpu.between(before, after)
        return Turn(seconds / repeats, None if result is None else float(result), host / repeats)
    seconds = []
    for _ in range(repeats):
        started = perf_counter()
        result = step()
        seconds.append(perf_counter() - started)
    return Turn(statistics.median(seconds), result)


def serve():
    """The life of a contender's process: a job, then requests until the pipe is closed; each is answered."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is not an answer

    def answer(kind, value):
        pickle.dump((kind, value), answers, protocol=5)
        answers.flush()

    try:
        (module, name, settings), job = pickle.load(requests)
        module = importlib.import_module(module)
        start = peak_memory()
        contender = getattr(module, name)(job, **settings)
        answer("done", {"start_memory": start, "settings": contender.settings})
        while True:
            request, *arguments = pickle.load(requests)
            if request == "turn":
                answer("done", turn(contender.step, *arguments, gpu=contender if hasattr(contender, "event") else None))
            elif request == "check":
                answer("done", contender.check())
            else:  # "memory"
                answer("done", contender.device_memory() if hasattr(contender, "device_memory") else peak_memory())
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        pass  # the benchmark is over
    except Exception as error:
        answer("failed", f"{type(error).__name__}: {error}")
