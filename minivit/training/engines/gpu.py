"""The engine of one GPU: the calls of `minivit.training.engines.cpu.Engine` without worker threads.

A GPU is busy with one micro-batch at a time, so a batch is cut only where its activations would not fit into memory.
Nothing here waits for the device: the figures of a batch stay on it until somebody reads them.
"""

from __future__ import annotations

import warnings

from minivit.base.backend import array_module
from minivit.kernels import cuda
from minivit.optim import one_by_one
from minivit.training.engines.cpu import Engine
from minivit.training.task import StepResult, cross_entropy

PREDICT = 1024  # images at a time


class CudaEngine(Engine):
    """Runs a model whose parameters are CuPy arrays over batches of CuPy arrays.

    ``micro_batch`` images go through the model at a time, 0 for the whole batch.
    """

    def __init__(self, model, loss=cross_entropy, *, micro_batch=0, seed=0, trained=None):
        super().__init__(model, loss, workers=1, seed=seed, trained=trained)
        self.micro_batch = micro_batch
        self.predicted = micro_batch or PREDICT  # images that `stream` takes at a time

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def each(self, function, items):
        """Call the function with each item, in turn: a GPU works on one at a time."""
        one_by_one(function, items)

    def parts(self, count):
        """The micro-batches of a batch of ``count`` images, as slices."""
        size = self.micro_batch or count
        return [slice(i, i + size) for i in range(0, count, size)]

    def gradient(self, images, targets, *, step=0, denominator=None, accumulate=False, generators=None):
        """See `Engine.gradient`. ``generators()`` makes what stands for the Generators of the micro-batches.

        A batch that does not fit into memory is cut in halves until it does: see `fitting`.
        """
        denominator = len(images) if denominator is None else denominator
        before = self.grad.copy() if accumulate else 0.0  # a batch that is begun again adds to this again

        def attempt():
            count = len(self.parts(len(images)))
            rngs = generators() if generators else [self.generator(step, m) for m in range(count)]
            return self.sum_of_parts(images, targets, rngs, denominator, before)

        return self.fitting("micro_batch", len(images), attempt)

    def sum_of_parts(self, images, targets, generators, denominator, before=0.0):
        """The gradient of a batch in the cut of now, added to ``before``."""
        flat, grads = self._buffers[0]
        flat[...] = before
        with cuda.rounded(self.model.flat):
            results = [
                self.micro_gradient(images[part], targets[part], grads, denominator, rng)
                for part, rng in zip(self.parts(len(images)), generators, strict=True)
            ]
        self._freeze()
        return StepResult(sum(r.loss for r in results), sum(r.correct for r in results))

    def fitting(self, name, count, function):
        """``function()``, which takes ``count`` images, so many at a time as the attribute ``name`` says.

        Where these do not fit into memory it is called again with half as many, with a warning.
        Raises  MemoryError: not even one image fits.
        """
        while True:
            try:
                return function()
            except MemoryError as error:
                self.halve(name, count, error)
            free_memory(self.grad)  # after the exception, whose traceback holds the arrays

    def halve(self, name, count, error):
        """Take half as many images at a time from now on. Raises the error if that is none."""
        size = min(getattr(self, name) or count, count)
        if size == 1:
            raise error
        fits = -(-size // 2)
        setattr(self, name, fits)
        like = f", as --gpu-micro-batch {fits} would" if name == "micro_batch" else ""
        warnings.warn(
            f"{size} images at a time do not fit into the device's memory ({error}): going on with {fits}{like}",
            stacklevel=4,
        )

    def stream(self, function, count, model):
        """See `Engine.stream`; what does not fit into memory is cut, see `fitting`."""

        def attempt():
            parts = [slice(i, i + self.predicted) for i in range(0, count, self.predicted)]
            with cuda.rounded(model.flat):
                return [function(part) for part in parts]

        return self.fitting("predicted", count, attempt)


def free_memory(array):
    """Give back what the library of an array keeps of freed device memory."""
    xp = array_module(array)
    if hasattr(xp, "get_default_memory_pool"):
        xp.get_default_memory_pool().free_all_blocks()
