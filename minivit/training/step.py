"""One call makes one optimiser step: gradient, clipping, update, moving average."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from minivit.base.finite import is_finite
from minivit.optim import clip_by_global_norm
from minivit.weights.checkpoint import named_arrays


class NotFinite(Exception):
    """A run made a number that is not finite; ``str(error)`` says which."""


class Batch(NamedTuple):
    """What an engine takes."""

    number: int  # of the batch in its run; it seeds dropout
    images: Any  # (B, H, W, C)
    targets: Any  # (B, ...), such as labels (B,)


class Figures(NamedTuple):
    """Figures of one step. Those of a GPU stay there, so that nobody waits for them, until they are read."""

    loss: Any  # mean over the images
    correct: Any  # right guesses
    norm: Any  # of the gradient, before clipping
    count: int  # images

    def read(self):
        """The same as Python's numbers.

        Raises  NotFinite: one is not finite.
        """
        figures = Figures(float(self.loss), int(self.correct), float(self.norm), self.count)
        if not (math.isfinite(figures.loss) and math.isfinite(figures.norm)):
            raise NotFinite(f"the loss is {figures.loss}, its gradient's norm {figures.norm}")
        return figures


class Step:
    """Makes the steps of a training, on the processor or on a GPU.

    ``average``: the `EMA` of the weights, if there is one.
    ``diagnose(model, function)`` says in words which number of those that ``function()`` makes is the first that is not
    finite, "" if all are: it is asked where a step goes wrong on a processor. With ``check`` it is asked about each
    batch before it is learned, and the vectors of each update are looked at.
    """

    def __init__(self, engine, optimizer, average=None, *, clip_norm=0.0, diagnose=None, check=False):
        self.engine, self.optimizer, self.average, self.clip_norm = engine, optimizer, average, clip_norm
        self.diagnose, self.check = diagnose, check
        self.on_host = type(engine.model.flat) is np.ndarray

    def __call__(self, batches, count, lr):
        """One step at the learning rate ``lr`` on `Batch`es of ``count`` images together: `Figures`.

        Raises  NotFinite: on a processor the loss or the gradient is not finite, and nothing was updated; or, with
                ``check``, some other number.
        """
        loss = correct = None
        for k, batch in enumerate(batches):
            if self.check and (origin := self._origin(batch, count)):
                raise NotFinite(f"a number is not finite{origin}")
            result = self.engine.gradient(
                batch.images, batch.targets, step=batch.number, denominator=count, accumulate=k > 0
            )
            loss, correct = (loss + result.loss, correct + result.correct) if k else result
        norm = clip_by_global_norm(self.engine.grad, self.clip_norm)
        figures = Figures(loss, correct, norm, count)
        if self.on_host:
            try:
                figures = figures.read()
            except NotFinite as error:
                raise NotFinite(f"{error}{self._origin(batch, count)}") from None
        self.optimizer.step(self.engine.model.flat, self.engine.grad, lr)
        if self.average:
            self.average.update(self.engine.model.flat)
        if self.check:
            self._check_update()
        return figures

    def release(self):
        """Give back what a GPU keeps for the steps to come: nothing here."""

    def _origin(self, batch, count):
        """Where the first number of a batch that is not finite came from, in words; "" where that is not known."""
        engine = self.engine
        if self.diagnose is None:
            return ""
        for m, part in enumerate(engine.parts(len(batch.images))):
            _, grads = engine.model.gradient_buffer()
            arguments = batch.images[part], batch.targets[part], grads, count, engine.generator(batch.number, m)
            if text := self.diagnose(engine.model, lambda arguments=arguments: engine.micro_gradient(*arguments)):
                return f": {text}"
        return ""

    def _check_update(self):
        """Raises NotFinite, with the name of the first vector, if the update made a number that is not finite."""
        maker = f"{type(self.optimizer).__name__}.step"
        vectors = [(f"optimizer/{key}", vector, maker) for key, vector in self.optimizer.state.items()]
        vectors.append(("params", self.engine.model.flat, maker))
        if self.average:
            vectors.append(("ema", self.average.flat, "EMA.update"))
        for prefix, vector, maker in vectors:
            for name, array in named_arrays(prefix, vector, self.engine.model.table).items():
                if not is_finite(array):
                    raise NotFinite(f"{name}, made by {maker}, is the first tensor of the update that is not finite")
