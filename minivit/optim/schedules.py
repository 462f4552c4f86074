r"""Learning rates over a run.

Of ``total`` steps, counted from 0, the first ``warmup`` rise, so that the optimiser's averages settle before the rate
is high:

    lr * (step + 1) / (warmup + 1)

After them, with p = (step - warmup) / (total - warmup) in [0, 1) as the share of the rest that is done:

    constant     lr
    linear       lr + (final - lr) * p
    cosine       final + (lr - final) * (1 + cos(pi * p)) / 2       (Loshchilov & Hutter 2016, arXiv:1608.03983)
    trapezoid    lr, and over the last ``cooldown`` of all steps linear to final

Example: four steps, without a warm-up and with one of a step
    >>> [round(learning_rate(step, 4, lr=1.0), 3) for step in range(4)]      # p = 0, 1/4, 1/2, 3/4
    [1.0, 0.854, 0.5, 0.146]
    >>> [round(learning_rate(step, 4, lr=1.0, schedule="linear"), 3) for step in range(4)]
    [1.0, 0.75, 0.5, 0.25]
    >>> [round(learning_rate(step, 4, lr=1.0, warmup_steps=1), 3) for step in range(4)]
    [0.5, 1.0, 0.75, 0.25]
"""

from __future__ import annotations

import math

from minivit.base.errors import InputError

SCHEDULES = ("cosine", "linear", "constant", "trapezoid")


def check_schedule(schedule):
    """Raises InputError unless it is the name of a schedule; the message tells of one that was removed."""
    if schedule == "onecycle":  # earlier versions had it
        raise InputError(f"schedule onecycle was removed; choose one of {', '.join(SCHEDULES)}")
    if schedule not in SCHEDULES:
        raise InputError(f"schedule must be one of {', '.join(SCHEDULES)}; got {schedule!r}")


def learning_rate(step, total_steps, *, lr, schedule="cosine", warmup_steps=0, final_lr=0.0, cooldown=0.2):
    """The learning rate of a step, counted from 0.

    Math    see the head of this file
    Raises  InputError: unknown schedule.
    """
    check_schedule(schedule)
    if step < warmup_steps:
        return lr * (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return lr
    if schedule == "trapezoid":
        falling = max(cooldown * total_steps, 1.0)  # steps of the descent
        return final_lr + (lr - final_lr) * min(1.0, (total_steps - step) / falling)
    p = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    if schedule == "linear":
        return lr + (final_lr - lr) * p
    return final_lr + (lr - final_lr) * (1.0 + math.cos(math.pi * p)) / 2.0
