"""The learning-rate finder: a few hundred training steps at a rising rate, and what their losses say.

A run begins as always - its own initialisation, batches, augmentation, optimiser and clipping - but on whole images,
also where its settings begin with halved ones, and its learning rate rises by the same factor from each step to the
next. While it is too low the loss stays, then it falls, and beyond some rate it rises or leaps: good peak rates lie
where it still falls well. One ramp takes the place of a dozen runs.

Math    rate of step i of n    r_i = low (high / low)^(i / (n - 1)),  i = 0 .. n - 1
        L_i is the loss of step i's batch before the update that r_i scales
        smoothed loss          a_i = b a_(i-1) + (1 - b) L_i,  a_(-1) = 0;   S_i = a_i / (1 - b^(i+1))
        The division makes the weights (1 - b) b^(i-j) of the losses L_j add up to one from the first step on (bias
        correction, as in Adam), so that S_0 = L_0; later S lags behind L by about b / (1 - b) steps.
        It ends                after n steps, after the first S_i > 4 min_(j<=i) S_j, or where a number is not finite
        steepest descent       the i with the least slope (S_(i+w) - S_(i-w)) / (ln r_(i+w) - ln r_(i-w)), w = n / 20
                               rounded down, of those whose i + w lies at the least S or before it; the slope negative
Source  Smith, "Cyclical Learning Rates for Training Neural Networks", arXiv:1506.01186, section 3.3 (there the rate
        rises linearly).
"""

from __future__ import annotations

import math
import os
from contextlib import closing
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from minivit.base.errors import InputError
from minivit.base.finite import quiet_overflow
from minivit.training.loop import progress_bar
from minivit.training.step import NotFinite
from minivit.training.stream import begin_epoch, groups
from minivit.training.trainer import Trainer

FEWEST = 10  # steps
TOO_HIGH = 4.0  # times the least smoothed loss: there it ends
SMOOTHING = 0.9  # b


class Ramp(NamedTuple):
    """What the finder saw: a rate, a loss and a smoothed loss for each of its steps, and the rates they suggest."""

    rates: np.ndarray  # (n,)
    losses: np.ndarray  # (n,)
    smoothed: np.ndarray  # (n,)
    ended: str  # why there are no more, in words
    least: int  # the step of the least smoothed loss
    steepest: int | None  # the step of steepest descent; None if the loss does not fall

    @property
    def suggestions(self):
        """Peak learning rates by name: the rate of steepest descent, a tenth of the one of the least loss.

        Empty if the loss does not fall.
        """
        if self.steepest is None:
            return {}
        return {
            "steepest descent": float(self.rates[self.steepest]),
            "a tenth of the least": float(self.rates[self.least]) / 10,
        }


def rising_rates(low, high, steps):
    """Learning rates that rise from ``low`` to ``high`` by equal factors.

    Shapes  ->  (steps,) float64
    Raises  InputError: no such rates.
    """
    if not (0.0 < low < math.inf and 0.0 < high < math.inf):
        raise InputError(f"lr_min and lr_max must be finite numbers above 0, got {low:g} and {high:g}")
    if low >= high:
        raise InputError(f"lr_min must be below lr_max, got {low:g} and {high:g}")
    if steps < FEWEST:
        raise InputError(f"steps must be at least {FEWEST}, got {steps}: fewer show no curve")
    rates = low * (high / low) ** (np.arange(steps) / (steps - 1))
    rates[-1] = high  # not a rounding beside it
    return rates


class Smoothing:
    """The running average S of the losses that it is called with, one after the other."""

    def __init__(self, decay=SMOOTHING):
        self.decay, self._average, self._weight = decay, 0.0, 0.0

    def __call__(self, loss):
        b = self.decay
        self._average = b * self._average + (1.0 - b) * loss
        self._weight = b * self._weight + (1.0 - b)  # 1 - b^(i+1)
        return self._average / self._weight


def steepest_descent(rates, smoothed, reach):
    """The step of steepest descent, see the head of this file; None if the loss does not fall.

    Shapes  rates (n,), smoothed (n,); ``reach`` is w
    """
    end = int(np.argmin(smoothed)) + 1  # nothing beyond the least loss counts
    x, y = np.log(rates[:end]), smoothed[:end]
    if end <= 2 * reach:
        return None
    slopes = (y[2 * reach :] - y[: -2 * reach]) / (x[2 * reach :] - x[: -2 * reach])
    steepest = int(np.argmin(slopes))
    return steepest + reach if slopes[steepest] < 0.0 else None


def endless_groups(run):
    """What each step of a run takes, epoch after epoch, see `groups`."""
    while True:
        begin_epoch(run)
        with closing(groups(run)) as steps:
            for batches, count, *_ in steps:
                yield batches, count
        run.state.epoch += 1


def climb(run, rates):
    """Make a step at each of the rates, until there is a reason to stop: (losses, smoothed losses, the reason)."""
    losses, smoothed, smooth = [], [], Smoothing()
    with quiet_overflow(), progress_bar(len(rates), 0, run.progress) as bar, run.engine() as engine:
        step = run.step_of(engine)
        with closing(endless_groups(run)) as steps:
            for rate, (batches, count) in zip(rates, steps, strict=False):
                try:
                    figures = step(batches, count, float(rate)).read()
                except NotFinite:
                    return losses, smoothed, "a number was not finite"
                losses.append(figures.loss)
                smoothed.append(smooth(figures.loss))
                bar.update()
                bar.set_postfix_str(f"loss {smoothed[-1]:.3f} lr {rate:.2g}")
                if smoothed[-1] > TOO_HIGH * min(smoothed):
                    return losses, smoothed, f"the smoothed loss was {TOO_HIGH:g} times its least"
    return losses, smoothed, "the highest rate was reached"


def find(dataset, model_config, config, *, low=1e-6, high=1.0, steps=200, start=None, progress=True):
    """Raise the learning rate of a run step by step; nothing is written anywhere.

    The run is the one of a `TrainConfig` (and of a ``start``, see `Trainer`), but for its learning rates and their
    schedule, its length, its moving average and its ``half_size``: all images are whole. The same settings give the
    same bits.

    Returns  `Ramp`
    Raises   InputError: no such rates; settings and data do not fit together; the very first step diverges.
    """
    rates = rising_rates(low, high, steps)
    config = replace(config, epochs=steps, steps=0, ema_decay=0.0, check_finite=False, half_size=0.0)
    run = Trainer(dataset, model_config, config, os.devnull, start=start, progress=progress)
    losses, smoothed, ended = climb(run, rates)
    n = len(losses)
    if not n:
        raise InputError("the loss of the very first batch is not finite, at any learning rate")
    smoothed = np.array(smoothed)
    steepest = steepest_descent(rates[:n], smoothed, max(1, steps // 20))
    return Ramp(rates[:n], np.array(losses), smoothed, ended, int(smoothed.argmin()), steepest)
