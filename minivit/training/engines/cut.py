"""How a batch is cut among threads: by the settings alone, so that a run's bits are the same on every machine."""

from __future__ import annotations

import os

from minivit.base.errors import InputError
from minivit.model.costs import expected_flops

MAX_WORKERS = 1024
# Tokens per micro-batch. Above some 500, steps of 65 to 197 tokens per image and widths of 128 to 384 all take the
# same time to 3 %, so that a rule does what a measurement would.
MICRO_BATCH_TOKENS = 1024
WORKERS = 2  # threads of a run, unless told otherwise, where the work is enough for two
# FLOPs of a batch's matrix products for each thread. Below, a second one costs more than it brings: a small model's
# step is mostly Python, which one thread runs at a time. The digits' batch of 64 has a quarter of it.
SHARE = 1e9


def available_cores():
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_workers(workers):
    """The number of threads that a setting of ``workers`` means where it changes no number: 0 is one per core.

    Raises  InputError: it is negative or beyond reason.
    """
    if not 0 <= workers <= MAX_WORKERS:
        raise InputError(f"workers must be at least 0 and at most {MAX_WORKERS}, got {workers}")
    return workers or available_cores()


def default_micro_batch(config):
    """Images per micro-batch for a model of this configuration, unless told otherwise."""
    tokens = config.num_tokens
    if config.stem:  # its maps hold more than few tokens let one expect: as much as patches of 16 pixels
        tokens = max(tokens, (config.image_size // 16) ** 2)
    return max(1, round(MICRO_BATCH_TOKENS / tokens))


def cut(config, batch_size):
    """How a run cuts its batches unless told otherwise: (workers, images per micro-batch).

    It depends on the model's configuration and the batch size alone, not on the machine: both fix the order of sums.
    One worker does a batch whose matrix products are less than `SHARE` for each of two.
    """
    workers = WORKERS if sum(expected_flops(config, batch_size)) >= WORKERS * SHARE else 1
    return workers, default_micro_batch(config)
