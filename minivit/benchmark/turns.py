"""Contenders in turn, round by round, and what the rounds say.

A machine that others use is quick now and slow a minute later, so two times taken one after the other cannot be
compared. The contenders step in turn, A B C A B C ..., and each ratio is taken within one round:

    ratio of A to B = median over the rounds of (seconds of A in the round / seconds of B in the same round)

with the quartiles beside it. A turn is one step, or as many as fill 0.2 seconds, of which the median counts; between
turns everybody rests for 50 ms, which is longer than the threads of OpenMP and of BLAS go on spinning.

On a GPU the seconds are the device's own, between events recorded before the first step of a turn and after the last;
beside them stand the host's, until it has launched the last step: near the device's, it is the host that is slow.

Others who use the machine do not slow everybody alike: a library that lets its threads meet after every operation
waits for the slowest one each time. So the report says what share of the cores went to other programs in each round,
and ``patience`` has disturbed rounds made again.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from minivit.benchmark.contenders import Turn
from minivit.training.engines.cut import available_cores

TURN_SECONDS, PAUSE_SECONDS = 0.2, 0.05
QUIET = 0.05  # of the cores' time may go to other programs


def quartiles(values):
    """{"median": ..., "q1": ..., "q3": ...}"""
    q1, median, q3 = (float(q) for q in np.quantile(values, (0.25, 0.5, 0.75)))
    return {"median": median, "q1": q1, "q3": q3}


def paired_ratio(a, b):
    """Quartiles of a_i / b_i over the rounds i: a slow minute of the machine is in both, and drops out."""
    return quartiles(np.asarray(a) / np.asarray(b))


class Turns(NamedTuple):
    """What `take_turns` measured, round by round."""

    seconds: dict  # contender -> seconds of a step in each round
    others: list  # share of the cores' time that went to other programs in each round; None where it is not known
    host: dict  # contender -> the host's seconds of a step in each round; None on a CPU, where they are the same


def take_turns(children, pairs, *, patience=0.0, progress=True):
    """Let the contenders step in turn, ``pairs`` rounds of it.

    A round in which other programs took more than 5 % of the cores is disturbed. For up to ``patience`` seconds more
    rounds are made in the place of such; the ``pairs`` least disturbed ones count, in their order.
    """
    repeats, rounds, others = {}, [], []
    for child in children:  # warm-up, and how long is a step?
        child.ask("turn", 2)
        once = child.ask("turn", 1)[0]
        repeats[child.name] = max(1, min(1000, round(TURN_SECONDS / max(once, 1e-6))))
    with tqdm(total=pairs, desc="rounds", leave=False, disable=None if progress else True) as bar:
        while True:
            if len(rounds) == pairs:
                enough = time.monotonic() + patience
            quiet = sum(share is None or share <= QUIET for share in others)
            if quiet >= pairs or (len(rounds) >= pairs and time.monotonic() >= enough):
                break
            before = glance(children)
            turns = {}
            for child in children:
                time.sleep(PAUSE_SECONDS)
                turns[child.name] = Turn(*child.ask("turn", repeats[child.name]))
            rounds.append(turns)
            others.append(share_of_others(before, glance(children)))
            bar.update(others[-1] is None or others[-1] <= QUIET or patience == 0)
    best = sorted(sorted(range(len(rounds)), key=lambda i: others[i] or 0.0)[:pairs])
    seconds, host = ({c.name: [rounds[i][c.name][k] for i in best] for c in children} for k in (0, 2))
    return Turns(seconds, [others[i] for i in best], host)


def glance(children=()):
    """Seconds on the clock, seconds that our cores were busy, and those of them for us."""
    return time.monotonic(), _busy_seconds(), _own_seconds(children)


def share_of_others(before, after):
    """The share of the cores' time, between two glances, that went to other programs; None if it is not known."""
    if before[1] is None:
        return None
    wall, busy, own = (b - a for a, b in zip(before, after, strict=True))
    return max(0.0, (busy - own) / (wall * available_cores()))


def _busy_seconds():
    """Seconds that our cores have spent on anything since the machine started; None where the system does not tell."""
    try:
        cores = os.sched_getaffinity(0)
        lines = Path("/proc/stat").read_text().splitlines()
    except (AttributeError, OSError):
        return None
    total = 0
    for name, *ticks in (line.split() for line in lines if line.startswith("cpu")):
        if name != "cpu" and int(name[3:]) in cores:
            user, nice, system, _idle, _iowait, *rest = map(int, ticks[:8])  # rest: interrupts, and time stolen from us
            total += user + nice + system + sum(rest)
    return total / os.sysconf("SC_CLK_TCK")


def _own_seconds(children):
    """Seconds of processor time that the contenders and this process have taken."""
    ticks = 0
    for child in children:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{child.process.pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])  # utime and stime
    return ticks / (os.sysconf("SC_CLK_TCK") if ticks else 1) + time.process_time()
