"""How near does each CUDA kernel of a training step come to the card's own rate of copying?

The kernels do a few operations for each number that they read or write (attention, with its products, does more): they
can be no quicker than memory. So each is timed alone, on the arrays of a step that was really made, against its floor:

    a copy of as many bytes in all, half of them read and half written, by the card's own copy command

Kernels shorter than the host takes to launch them could not be timed one launch at a time: a graph holds many, and so
does one of copies. Both meet the same caches, since both come back to the same arrays.
"""

from __future__ import annotations

import re
import time
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from minivit.benchmark.contenders import LR, Job, turn
from minivit.benchmark.contenders.ours import OursOnGpu
from minivit.benchmark.contest import check_config, check_model
from minivit.benchmark.layers import Times, part_of_step, report_of_parts
from minivit.benchmark.turns import quartiles
from minivit.kernels import cuda
from minivit.training.step import Batch
from minivit.training.step_gpu import CudaStep

SIGNATURE = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\([\w, ]+\)\s)?(\w+)\(([^)]*)\)', re.S)
IN_PLACE = {  # pointers that a kernel reads before it writes there
    "adam": ("theta", "m", "v"), "add_bias": ("x",), "add_partials": ("out0", "out1", "out2"), "embed": ("z",),
}  # fmt: skip
GRAPH_SECONDS, GRAPH_CALLS = 0.01, 20  # of one graph, at least
STEP_SECONDS = 0.2  # of a turn of whole steps


class Parameter(NamedTuple):
    """One parameter of a kernel, as kernels.cu declares it."""

    name: str
    type: str  # without const and __restrict__, such as "float*"
    read: bool  # an array that the kernel reads
    written: bool  # an array that it writes


def signatures(source):
    """The parameters of every kernel of a source text: {name: [list of `Parameter`, ...]}, a list for each form."""
    kernels = {}
    for name, text in SIGNATURE.findall(source):
        parameters = []
        for declared in text.split(","):
            words = declared.replace("__restrict__", "").replace("*", "* ").split()
            array, constant = "*" in declared, words[0] == "const"
            own = words[-1]
            parameters.append(Parameter(
                own, " ".join(words[constant:-1]), array and (constant or own in IN_PLACE.get(name, ())),
                array and not constant,
            ))  # fmt: skip
        kernels.setdefault(name, []).append(parameters)
    return kernels


class Launch(NamedTuple):
    """One kind of launch in a step: kernel, constants and shapes."""

    name: str
    times: int  # in a step
    bytes: int  # that it reads and writes
    run: Any  # launches it once more


class Recorder:
    """A `Machine` that keeps, of every kind of launch, the arguments of the first."""

    def __init__(self, machine):
        self._machine = machine
        self._signatures = signatures(cuda.SOURCE.read_text())
        self._kinds = {}  # (name, constants, grid, shapes) -> [times, arguments and keywords of `launch`]

    def __getattr__(self, name):
        return getattr(self._machine, name)

    def launch(self, name, grid, block, arguments, **settings):
        """Run a kernel, and remember it."""
        shapes = tuple(getattr(value, "shape", None) for value in arguments)
        key = name, settings.get("sizes"), grid, shapes
        self._kinds.setdefault(key, [0, (name, grid, block, arguments), settings])[0] += 1
        self._machine.launch(name, grid, block, arguments, **settings)

    def launches(self):
        """What was launched: a list of `Launch`."""
        launches = []
        for times, call, settings in self._kinds.values():
            name, _, _, arguments = call
            parameters = next(p for p in self._signatures[name] if len(p) == len(arguments))
            moved = sum(
                value.nbytes * (p.read + p.written)
                for p, value in zip(parameters, arguments, strict=True)
                if value is not None and (p.read or p.written)
            )
            launches.append(Launch(name, times, moved, lambda c=call, s=settings: self._machine.launch(*c, **s)))
        return launches


def recorded_launches(contender):
    """The launches of one step of an `OursOnGpu`."""
    recorder = Recorder(cuda.machine())
    step = CudaStep(contender.engine, contender.whole_step.optimizer, graph=False)
    with cuda.using(recorder):
        step([Batch(0, contender.images, contender.labels)], len(contender.images), LR)
    return recorder.launches()


class Repeated:
    """Seconds of one call of ``function``, which launches something: from a graph of so many that time can be told."""

    def __init__(self, function):
        import cupy

        self.stream = cupy.cuda.get_current_stream()
        function()  # compiled and loaded
        self._record(function, GRAPH_CALLS)
        self()
        self._record(function, max(GRAPH_CALLS, min(2000, round(GRAPH_SECONDS / max(self(), 1e-7)))))

    def _record(self, function, count):
        self.count = count
        self.stream.begin_capture()
        try:
            for _ in range(count):
                function()
        finally:
            self.graph = self.stream.end_capture()
        self.graph.upload(self.stream)

    def __call__(self):
        self.stream.synchronize()
        started = time.perf_counter()
        self.graph.launch(self.stream)
        self.stream.synchronize()
        return (time.perf_counter() - started) / self.count


def copy_of(size):
    """A call that copies on the device, reading and writing ``size`` bytes in all."""
    import cupy

    half = max(1, size // 2)
    source, target = cupy.zeros(half, np.uint8), cupy.empty(half, np.uint8)
    stream = cupy.cuda.get_current_stream()
    return lambda: target.data.copy_from_device_async(source.data, half, stream)


def kernels_report(config, *, batch=128, engine=None, pairs=20, seed=0, precision="tf32", device="cuda", progress=True):
    """Each kernel of a training step alone, against a copy of as many bytes: a dict for JSON.

    Seconds are those of one launch; ``bytes`` counts each array once for reading it and once for writing it.
    ``copy_rate`` is the card's rate, in bytes read and written per second, at 256 MiB.
    """
    check_model(config)
    check_config(config)
    contender = OursOnGpu(Job("step", config, batch, seed, engine or {}, device, precision))
    launches = sorted(recorded_launches(contender), key=lambda each: -each.times * each.bytes)
    turn(contender.step, 3, contender)  # recorded as a graph by now
    once = turn(contender.step, 2, contender).seconds
    repeats = max(1, min(1000, round(STEP_SECONDS / max(once, 1e-6))))
    largest = Repeated(copy_of(256 << 20))
    timers = [(Repeated(each.run), Repeated(copy_of(each.bytes))) for each in launches]
    steps, rates, times = [], [], [Times([], []) for _ in launches]
    for _ in tqdm(range(pairs), desc="rounds", leave=False, disable=None if progress else True):
        steps.append(turn(contender.step, repeats, contender).seconds)
        rates.append((256 << 20) / largest())
        for (seconds, floor), (kernel, copy) in zip(times, timers, strict=True):
            seconds.append(kernel())
            floor.append(copy())
    rows = []
    for each, own in zip(launches, times, strict=True):
        row = {"layer": each.name, "direction": direction_of(each.name), "bytes": each.bytes, "inside_another": False}
        row |= part_of_step(own, each.times, steps)
        rows.append(row | {"bytes_per_second": each.bytes / row["seconds"]["median"]})
    report = report_of_parts(rows, steps)
    return {"batch": batch, "copy_rate": quartiles(rates), "settings": contender.settings} | report


def direction_of(name):
    """The pass that a kernel belongs to, by its name: "forward", "backward" or "update" (or any of them)."""
    if name in ("adam", "sum_squares", "norm_of_partials", "round_copy"):
        return "update"
    backward = name.endswith("_backward") or name.startswith(("column_sum", "add_partials"))
    return "backward" if backward else "forward"
