"""How long a run fits into a time: a few steps of the run itself, measured on the user's machine."""

from __future__ import annotations

import contextlib
import io
import math
import re
import tempfile
from bisect import bisect_right
from dataclasses import replace
from pathlib import Path

from minivit.base.errors import InputError
from minivit.data import take
from minivit.training.trainer import Trainer

PROBE_SECONDS = 10.0  # that the longer of the two measured runs is to take
CLEARLY = 1.25  # times as long as the shorter one it must have taken, to be more than noise
RESERVE = 0.03  # of the time: for checkpoints, figures, and a machine that is slower later
PREDICTION = 1 / 3  # of a step's time, for as many images: a forward pass without its backward
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def seconds_of(text):
    """The seconds that "90", "90s", "10m" or "2.5h" mean.

    Raises  InputError: another text, or no time above 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([smh]?)", text.strip())
    seconds = float(match[1]) * UNITS[match[2] or "s"] if match else 0.0
    if not 0.0 < seconds < math.inf:
        raise InputError(f"a budget is a time such as 90s, 10m or 2.5h; got {text!r}")
    return seconds


def seconds_of_training(dataset, model, config, steps, **keywords):
    """Wall time of a run of so many steps, which leaves nothing behind; ``keywords`` are those of `Trainer`.

    Where the images make fewer steps, it takes several epochs.
    Raises  KeyboardInterrupt: a signal stopped it.
    """
    group, n = config.batch_size * config.accumulate, len(dataset.train_images)
    count = min(n, group * min(steps, max(n // group, 1)))
    few = dataset._replace(
        train_images=take(dataset.train_images, slice(count)), train_labels=dataset.train_labels[:count],
        test_images=take(dataset.test_images, slice(1)), test_labels=dataset.test_labels[:1],
    )  # fmt: skip
    config = replace(config, steps=steps, evaluate_every=steps, checkpoint_seconds=1e9)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(
            few, model, config, Path(folder) / "run", progress=False, **keywords,
            on_epoch=lambda trainer: trainer.finished and trainer.stop("measured"),
        )  # fmt: skip
        trainer.run()
    if not trainer.finished:  # it took the signal for its own, and its time says nothing
        raise KeyboardInterrupt
    return trainer.seconds()


def seconds_of_step(dataset, model, config, *, probe=PROBE_SECONDS, **keywords):
    """Wall time of one optimiser step of a run, with its input pipeline and update.

    Two runs of different length are timed, so that what a run takes once drops out; the longer one takes ``probe``
    seconds, or fewer as soon as it takes clearly longer. Where none did, a step is its share of all of that run: too
    long rather than nothing.
    """
    seconds_of_training(dataset, model, config, 1, **keywords)  # memory from the system, compiled kernels
    short = seconds_of_training(dataset, model, config, 2, **keywords)
    steps = max(3, round(2 * probe / max(short, 1e-3)))
    while (long := seconds_of_training(dataset, model, config, steps, **keywords)) <= CLEARLY * short:
        if long >= probe:
            return long / steps
        steps *= 4
    return (long - short) / (steps - 2)


def time_of_epochs(dataset, model, config, *, probe=PROBE_SECONDS, **keywords):
    """Measure a run's steps; returns a function: the seconds that so many epochs take, with their evaluations.

    Of less than an epoch, with the one at its end.
    """
    batch = config.batch_size * config.accumulate
    step = seconds_of_step(dataset, model, replace(config, half_size=0.0), probe=probe, **keywords)
    small = 0.0
    if config.half_size:
        small = seconds_of_step(dataset, model, replace(config, half_size=1.0), probe=probe, **keywords)
    steps = -(-len(dataset.train_images) // batch)
    predictions = len(dataset.test_images) / batch * step * PREDICTION * (2 if config.test_flip else 1)

    def time_of(epochs):
        halved = config.half_size * epochs
        if epochs == int(epochs):
            halved = round(halved)
        elif epochs < 1:  # epochs are halved as a whole
            halved = round(config.half_size) * epochs
        tests = max(epochs / config.evaluate_every, 1)
        return steps * (halved * small + (epochs - halved) * step) + tests * predictions

    return time_of


def within(seconds, dataset, model, config, **keywords):
    """A run's settings with as many epochs as fit into a time or, where not one does, as many steps of the first.

    Returns (TrainConfig, measured seconds of an epoch with its evaluation, on average). ``keywords`` are `Trainer`'s.
    Raises  InputError: not even a step fits.
    """
    time_of, limit = time_of_epochs(dataset, model, config, **keywords), (1.0 - RESERVE) * seconds
    if epochs := bisect_right(range(1, 1 << 62), limit, key=time_of):
        return replace(config, epochs=epochs, steps=0), time_of(epochs) / epochs
    whole = -(-len(dataset.train_images) // (config.batch_size * config.accumulate))
    if steps := bisect_right(range(1, whole), limit, key=lambda count: time_of(count / whole)):
        return replace(config, epochs=1, steps=steps), time_of(1)
    raise InputError(
        f"a step and the test after it take about {time_of(1 / whole):.3g} s here, the budget is {seconds:.3g} s; give "
        "more time"
    )
