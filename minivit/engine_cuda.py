"""The engine of one GPU: the same calls as `minivit.engine.Engine`, without worker threads.

A GPU is busy with one micro-batch at a time, so a batch is cut only where its activations would not fit into memory.
Nothing here waits for the device: the figures of a batch stay on it until somebody reads them.
"""

from __future__ import annotations

from minivit.backend import array_module
from minivit.engine import Engine, StepResult


class CudaEngine(Engine):
    """Runs a model whose parameters are CuPy arrays over batches of CuPy arrays.

    ``micro_batch`` pictures go through the model at a time, 0 for the whole batch.
    """

    def __init__(self, model, *, micro_batch=0, label_smoothing=0.0, seed=0):
        super().__init__(model, workers=1, micro_batch=micro_batch, label_smoothing=label_smoothing, seed=seed)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def parts(self, count):
        """The micro-batches of a batch of ``count`` pictures, as slices."""
        size = self.micro_batch or count
        return [slice(i, i + size) for i in range(0, count, size)]

    def gradient(self, images, labels, *, step=0, denominator=None, accumulate=False):
        """See `Engine.gradient`."""
        flat, grads = self._buffers[0]
        if not accumulate:
            flat[...] = 0.0
        denominator = len(images) if denominator is None else denominator
        results = [
            self.forward_backward(images[part], labels[part], grads, denominator, self.generator(step, m))
            for m, part in enumerate(self.parts(len(images)))
        ]
        return StepResult(sum(r.loss for r in results), sum(r.correct for r in results))

    def predict(self, images, model=None):
        """See `Engine.predict`."""
        model = model or self.model
        parts = [model.predict(images[part]) for part in self.parts(len(images))]
        return array_module(model.flat).concatenate(parts)
