"""Where a run stands: all that its checkpoint holds, as plain data, and the checks that a stored state passes.

Random numbers need no state of their own: shuffling, augmentation and dropout draw from generators seeded by (seed,
purpose, epoch or step, batch or micro-batch), so the counters *are* the generators' states.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minivit.base.backend import to_device
from minivit.base.errors import InputError
from minivit.base.finite import is_finite
from minivit.data.loader import is_epoch_order
from minivit.weights.checkpoint import fill, named_arrays

COUNTS = ("step", "epoch", "batch", "optimizer_steps", "ema_steps")


@dataclass
class State:
    """Where a run stands between two steps. The vectors are those that the run works on."""

    params: Any  # (n,)
    ema: Any  # (n,) their moving average, or None
    optimizer: dict  # the optimiser's vectors by name, each (n,)
    step: int = 0  # optimiser steps that are done
    epoch: int = 0  # epochs that are done and tested
    batch: int = 0  # batches of the epoch under way that are done
    order: Any = None  # (images,) of the epoch under way
    running: dict = field(default_factory=lambda: {"loss": 0.0, "correct": 0, "seen": 0})  # sums over that epoch
    best: dict = field(default_factory=lambda: {"accuracy": -1.0, "epoch": 0})  # the best test so far
    seconds: float = 0.0  # of training, in all the processes that took part

    def begin_epoch(self, order):
        """Take up an epoch in this order of the images."""
        self.batch, self.order = 0, order
        self.running = {"loss": 0.0, "correct": 0, "seen": 0}

    def add(self, figures):
        """Add the figures of a step, once they are read, to the epoch's."""
        self.running["loss"] += figures.loss * figures.count
        self.running["correct"] += figures.correct
        self.running["seen"] += figures.count

    def vectors(self):
        """Every vector of numbers."""
        return [self.params, *([] if self.ema is None else [self.ema]), *self.optimizer.values()]

    def take(self, other, device):
        """Take over another state, whose vectors are on the host: into the vectors of this one, on their device."""
        for mine, vector in zip(self.vectors(), other.vectors(), strict=True):
            mine[...] = to_device(vector, device)
        for name in ("step", "epoch", "batch", "order", "running", "best", "seconds"):
            setattr(self, name, getattr(other, name))

    def to_arrays(self, table):
        """The arrays of a checkpoint; ``table`` is that of the parameters."""
        arrays = named_arrays("params", self.params, table)
        if self.ema is not None:
            arrays |= named_arrays("ema", self.ema, table)
        arrays |= {f"optimizer/{key}": vector for key, vector in self.optimizer.items()}
        return arrays if self.order is None else arrays | {"order": self.order}

    def progress(self):
        """The rest of a checkpoint, for its meta."""
        return {
            "step": self.step, "epoch": self.epoch, "batch": self.batch, "running": self.running, "best": self.best,
            "seconds": self.seconds, "optimizer_steps": self.step, "ema_steps": 0 if self.ema is None else self.step,
        }  # fmt: skip


def state_from(arrays, record, table, optimizer, plan):
    """The `State` in a checkpoint's arrays and `Record`, on the host; ``optimizer`` are the names of its vectors.

    Raises  InputError: something is missing, damaged, or contradicts the plan of the run.
    """
    path, order, progress = record.path, arrays.get("order"), record.progress
    average = bool(plan.config.ema_decay)
    try:
        if progress is None:
            raise ValueError("it says no progress")
        running = {key: progress["running"][key] for key in ("loss", "correct", "seen")}
        best = {key: progress["best"][key] for key in ("accuracy", "epoch")}
        figures = [*running.values(), *best.values(), progress["seconds"]]
        _check_progress(*(progress[key] for key in COUNTS), order, figures, plan, average)
        vectors = {key: arrays[f"optimizer/{key}"] for key in optimizer}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} lacks what is needed to resume, or it does not fit together: {error}") from None
    size = sum(spec.size for spec in table)
    for key, vector in vectors.items():
        if vector.shape != (size,) or not is_finite(vector):
            raise InputError(f"{path}: the optimiser state {key} does not fit the model")
    flats = {}
    for prefix in ("params", "ema") if average else ("params",):
        flats[prefix] = np.empty(size, np.float32)
        fill(flats[prefix], table, arrays, prefix, path)
    return State(
        flats["params"], flats.get("ema"), vectors, progress["step"], progress["epoch"], progress["batch"], order,
        running, best, progress["seconds"],
    )  # fmt: skip


def _check_progress(step, epoch, batch, optimizer_steps, ema_steps, order, figures, plan, average):
    """Raises ValueError unless a checkpoint's counts fit each other, the plan, and the order of the images."""
    n, c = plan.images, plan.config
    if not all(type(number) is int for number in (step, epoch, batch, optimizer_steps, ema_steps)):
        raise ValueError("its progress is not counted in whole numbers")
    if not all(type(figure) in (int, float) and math.isfinite(figure) for figure in figures):
        raise ValueError("its progress holds a figure that is not a finite number")
    in_epoch, rest = divmod(batch, c.accumulate)
    if rest and batch != -(-n // c.batch_size):
        raise ValueError(f"batch {batch} is in the middle of an optimiser step")
    in_epoch += bool(rest)
    fits = 0 <= epoch <= c.epochs and 0 <= in_epoch <= plan.steps_per_epoch
    before = min(epoch * plan.steps_per_epoch, plan.total_steps)
    if not fits or step != before + in_epoch or step > plan.total_steps:
        raise ValueError(f"step {step}, epoch {epoch} and batch {batch} contradict each other")
    if optimizer_steps != step or ema_steps != (step if average else 0):
        raise ValueError("the optimiser or the moving average has made another number of steps")
    if batch and (order is None or not is_epoch_order(order, n)):
        raise ValueError("the order of the images is not that of an epoch")
