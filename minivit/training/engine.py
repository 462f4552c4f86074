"""A batch -> micro-batches -> workers -> one summed flat gradient.

The batch is cut into micro-batches of a few pictures, equally many for each worker. Worker w runs forward and backward
on micro-batches w, w + W, w + 2W, ... one after the other and adds all of them into its own flat gradient buffer; the
buffers are then summed in the order of the workers. Three things follow:

* every processor core is busy with elementwise work too, not in the matrix products alone, because NumPy releases the
  interpreter lock in both; each worker's BLAS keeps to one thread;
* activations of a few pictures stay in the cache, and memory does not grow with the batch;
* the order of every sum is fixed, so the same seed and settings give the same bits, however the threads are scheduled.

Each part's loss is divided by the size of the whole batch, hence the summed gradient is that of the whole
batch's mean loss.
"""

from __future__ import annotations

import ctypes
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from minivit.base.backend import array_module
from minivit.layers.loss import softmax_cross_entropy_backward, softmax_cross_entropy_forward

# Tokens per micro-batch. Above some 500, steps of 65 to 197 tokens per picture and widths of 128 to 384 all take the
# same time to 3 %, so that a rule does what a measurement would, and a run's settings stay the same on every machine.
MICRO_BATCH_TOKENS = 1024

DROPOUT_STREAM = 3  # separates dropout's random numbers from those of shuffling (1) and augmentation (2)

# Of <malloc.h>, with what to set. Threads allocate from heaps of 64 MiB, of which half is the largest block.
MALLOC_OPTIONS = (
    (-3, 32 << 20),  # M_MMAP_THRESHOLD: blocks above this size are mapped one by one
    (-1, 1 << 30),  # M_TRIM_THRESHOLD: how much freed memory at a heap's end is kept
    (-2, 64 << 20),  # M_TOP_PAD: the same for the heaps of threads
)


class StepResult(NamedTuple):
    """Figures of one batch; 0-d arrays on the model's device, so that nobody waits for them unless they are read."""

    loss: np.ndarray  # sum of the pictures' losses / denominator
    correct: np.ndarray  # how many pictures were classified correctly


def available_cores():
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_micro_batch(config):
    """Pictures per micro-batch for a model of this configuration, unless told otherwise."""
    tokens = config.num_tokens
    if config.stem:  # its maps hold more than few tokens let one expect: as much as patches of 16 pixels
        tokens = max(tokens, (config.image_size // 16) ** 2)
    return max(1, round(MICRO_BATCH_TOKENS / tokens))


def correct_count(logits, labels):
    """How many rows have their largest logit at the label (or at the largest soft target)."""
    expected = labels if labels.ndim == 1 else labels.argmax(axis=1)
    return (logits.argmax(axis=1) == expected).sum()


def keep_freed_memory():
    """Tell glibc's malloc to keep freed blocks for the process instead of handing them back to the system.

    A micro-batch allocates and frees the same blocks, of some megabytes each, again and again. Handed back, every one
    of them would return as fresh pages that the system has to map and fill with zeros: a sixth of a step's time. Memory
    stays bounded by what a micro-batch needs at its peak. The setting is the process's and cannot be read, hence not
    restored; with another C library nothing is done.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in MALLOC_OPTIONS:
            mallopt(option, value)


class Engine:
    """Runs a model over batches with worker threads; use as a context manager.

    ``workers`` is the number of threads (0: one per core), ``micro_batch`` the most pictures that one takes at a time
    (0: `default_micro_batch`). ``recompute`` makes each block's activations again in the backward pass instead of
    keeping them (see `ViT.forward`): a third more work, the same bits, little memory.
    Inside the ``with`` block BLAS is limited to one thread per call; the caller's setting is restored at its end.
    ``grad`` is the flat gradient of the last `gradient` call.
    ``trained`` (n,), if given, is 0 for frozen parameters and 1 for the others: the gradient is multiplied by it.
    Raises  ValueError: workers or micro_batch is negative; (from `gradient`) the batch is empty.
    """

    def __init__(
        self, model, *, workers=0, micro_batch=0, label_smoothing=0.0, seed=0, recompute=False, trained=None
    ):  # fmt: skip
        if workers < 0 or micro_batch < 0:
            raise ValueError(f"workers and micro_batch must be at least 0, got {workers} and {micro_batch}")
        self.model, self.recompute, self.trained = model, recompute, trained
        self.micro_batch = self.predicted = micro_batch or default_micro_batch(model.config)
        self.workers = workers or available_cores()
        self.label_smoothing, self.seed = label_smoothing, seed
        self._buffers = [model.gradient_buffer() for _ in range(self.workers)]
        self.grad = self._buffers[0][0]

    def __enter__(self):
        keep_freed_memory()
        self._limits = threadpool_limits(1, user_api="blas")
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="minivit")
        return self

    def __exit__(self, *exception):
        self._pool.shutdown()
        self._limits.restore_original_limits()

    def each(self, function, items):
        """Call the function with each item, the workers side by side: every W-th item is a worker's."""
        items = list(items)
        shares = [items[w :: self.workers] for w in range(self.workers)]
        list(self._pool.map(lambda share: [function(item) for item in share], shares))

    def parts(self, count):
        """The micro-batches of a batch of ``count`` pictures, as slices: as many for each worker, of even sizes.

        All workers then end together. A few pictures make fewer than one micro-batch per worker.
        """
        rounds = -(-count // (self.micro_batch * self.workers))
        n = min(rounds * self.workers, count)
        return [slice(count * i // n, count * (i + 1) // n) for i in range(n)]

    def gradient(self, images, labels, *, step=0, denominator=None, accumulate=False):
        """Gradient of the mean loss over a batch, left in ``self.grad``.

        Shapes  images (B, H, W, C) uint8 or float, labels (B,) or (B, K)  ->  StepResult
        ``step`` seeds dropout, with the micro-batch's number. To accumulate over several batches, pass the
        number of all their pictures as ``denominator`` and ``accumulate=True`` from the second one on.
        """
        if not len(images):
            raise ValueError("the batch has no picture")
        parts = self.parts(len(images))
        denominator = len(images) if denominator is None else denominator

        def work(w):
            flat, grads = self._buffers[w]
            if w or not accumulate:
                flat[...] = 0.0
            results = []
            for m in range(w, len(parts), self.workers):
                rng = self.generator(step, m)
                results.append(self.forward_backward(images[parts[m]], labels[parts[m]], grads, denominator, rng))
            return results

        results = [result for worker in self._pool.map(work, range(self.workers)) for result in worker]
        for flat, _ in self._buffers[1:]:
            self.grad += flat
        self._freeze()
        return StepResult(sum(r.loss for r in results), sum(r.correct for r in results))

    def _freeze(self):
        if self.trained is not None:
            self.grad *= self.trained

    def generator(self, step, micro_batch):
        """The Generator of dropout for a micro-batch of a step."""
        return np.random.default_rng([self.seed, DROPOUT_STREAM, step, micro_batch])

    def forward_backward(self, images, labels, grads, denominator, rng):
        """One micro-batch: adds its gradient into ``grads`` and returns its `StepResult`."""
        logits, cache = self.model.forward(images, rng=rng, recompute=self.recompute)
        loss, loss_cache = softmax_cross_entropy_forward(
            logits, labels, label_smoothing=self.label_smoothing, denominator=denominator
        )
        dlogits = softmax_cross_entropy_backward(1.0, loss_cache)
        self.model.backward(dlogits, cache, grads)
        return StepResult(loss, correct_count(logits, labels))

    def predict(self, images, model=None, *, features=False):
        """Logits of any number of pictures, streamed through the workers without caches.

        Shapes  images (n, H, W, C)  ->  logits (n, K); with ``features`` what the head reads, see `ViT.features`
        ``model`` may be another one of the same configuration (averaged weights). The cuts, and hence the logits to the
        last bit, depend on ``micro_batch`` alone, not on the workers.
        """
        model = model or self.model
        c, function = model.config, model.features if features else model.predict
        width = c.num_features if features else c.num_classes
        results = array_module(model.flat).empty((len(images), width), model.flat.dtype)
        parts = [slice(i, i + self.micro_batch) for i in range(0, len(images), self.micro_batch)]

        def work(w):
            for part in parts[w :: self.workers]:
                results[part] = function(images[part])

        list(self._pool.map(work, range(self.workers)))
        return results
