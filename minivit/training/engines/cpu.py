"""The engine of a processor: a batch -> micro-batches -> workers -> one summed flat gradient.

The batch is cut into micro-batches of a few images, equally many for each worker. Worker w runs forward and backward
on micro-batches w, w + W, w + 2W, ... one after the other and adds all of them into its own flat gradient buffer; the
buffers are then summed in the order of the workers. Three things follow:

* every processor core is busy with elementwise work too, not in the matrix products alone, because NumPy releases the
  interpreter lock in both; each worker's BLAS keeps to one thread;
* activations of a few images stay in the cache, and memory does not grow with the batch;
* the order of every sum is fixed, so the same seed and settings give the same bits, however the threads are scheduled.

Each part's loss is divided by the size of the whole batch, hence the summed gradient is that of the whole
batch's mean loss.
"""

from __future__ import annotations

import ctypes
import platform
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from threadpoolctl import threadpool_limits

from minivit.base.backend import array_module
from minivit.training.engines.cut import available_cores, default_micro_batch
from minivit.training.task import StepResult, cross_entropy

DROPOUT_STREAM = 3  # separates dropout's random numbers from those of shuffling (1) and augmentation (2)

# Of <malloc.h>, with what to set. Threads allocate from heaps of 64 MiB, of which half is the largest block.
MALLOC_OPTIONS = (
    (-3, 32 << 20),  # M_MMAP_THRESHOLD: blocks above this size are mapped one by one
    (-1, 1 << 30),  # M_TRIM_THRESHOLD: how much freed memory at a heap's end is kept
    (-2, 64 << 20),  # M_TOP_PAD: the same for the heaps of threads
)


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

    ``loss(model, images, targets, grads, denominator=, rng=)`` adds the gradient of one micro-batch into ``grads`` and
    returns its `StepResult`; a task's, by default that of classification.
    ``workers`` is the number of shares that a batch is cut into, each with a gradient buffer of its own (0: one per
    core); as many threads work on them, but no more than there are cores. ``micro_batch`` is the most images that a
    thread takes at a time (0: `default_micro_batch`).
    Inside the ``with`` block BLAS is limited to one thread per call; the caller's setting is restored at its end.
    ``grad`` is the flat gradient of the last `gradient` call.
    ``trained`` (n,), if given, is 0 for frozen parameters and 1 for the others: the gradient is multiplied by it.
    Raises  ValueError: workers or micro_batch is negative; (from `gradient`) the batch is empty.
    """

    def __init__(self, model, loss=cross_entropy, *, workers=0, micro_batch=0, seed=0, trained=None):
        if workers < 0 or micro_batch < 0:
            raise ValueError(f"workers and micro_batch must be at least 0, got {workers} and {micro_batch}")
        self.model, self.loss, self.seed, self.trained = model, loss, seed, trained
        self.micro_batch = self.predicted = micro_batch or default_micro_batch(model.config)
        self.workers = workers or available_cores()
        self._buffers = [model.gradient_buffer() for _ in range(self.workers)]
        self.grad = self._buffers[0][0]

    def __enter__(self):
        keep_freed_memory()
        self._limits = threadpool_limits(1, user_api="blas")
        self._pool = ThreadPoolExecutor(min(self.workers, available_cores()), thread_name_prefix="minivit")
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
        """The micro-batches of a batch of ``count`` images, as slices: as many for each worker, of even sizes.

        All workers then end together. A few images make fewer than one micro-batch per worker.
        """
        rounds = -(-count // (self.micro_batch * self.workers))
        n = min(rounds * self.workers, count)
        return [slice(count * i // n, count * (i + 1) // n) for i in range(n)]

    def gradient(self, images, targets, *, step=0, denominator=None, accumulate=False):
        """Gradient of the mean loss over a batch, left in ``self.grad``.

        Shapes  images (B, H, W, C) uint8 or float, targets (B, ...), such as labels (B,)  ->  StepResult
        ``step`` seeds dropout, with the micro-batch's number. To accumulate over several batches, pass the
        number of all their images as ``denominator`` and ``accumulate=True`` from the second one on.
        """
        if not len(images):
            raise ValueError("the batch has no image")
        parts = self.parts(len(images))
        denominator = len(images) if denominator is None else denominator

        def work(w):
            flat, grads = self._buffers[w]
            if w or not accumulate:
                flat[...] = 0.0
            return [
                self.micro_gradient(images[parts[m]], targets[parts[m]], grads, denominator, self.generator(step, m))
                for m in range(w, len(parts), self.workers)
            ]

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

    def micro_gradient(self, images, targets, grads, denominator, rng):
        """One micro-batch: adds its gradient into ``grads`` and returns its `StepResult`."""
        return self.loss(self.model, images, targets, grads, denominator=denominator, rng=rng)

    def stream(self, function, count, model):
        """What ``function(part)`` gives for ``count`` images in parts, as a list; ``part`` is a slice of their numbers.

        ``model`` is the one that the function runs. The cuts depend on ``micro_batch`` alone, not on the workers.
        """
        parts = [slice(i, i + self.predicted) for i in range(0, count, self.predicted)]
        results = [None] * len(parts)

        def work(i):
            results[i] = function(parts[i])

        self.each(work, range(len(parts)))
        return results

    def predict(self, images, model=None, *, features=False):
        """Logits of any number of images, streamed through the workers without caches.

        Shapes  images (n, H, W, C)  ->  logits (n, K); with ``features`` what the head reads, see `ViT.features`
        ``model`` may be another one of the same configuration (averaged weights). Images that lie elsewhere than the
        model are fetched a part at a time. The logits depend on the cuts of `stream` to the last bit.
        """
        model = model or self.model
        c, function = model.config, model.features if features else model.predict
        xp = array_module(model.flat)
        results = xp.empty((len(images), c.num_features if features else c.num_classes), model.flat.dtype)

        def work(part):
            results[part] = function(xp.asarray(images[part]))

        self.stream(work, len(images), model)
        return results
