"""The engine of one GPU: the calls of `minivit.training.engine.Engine` without worker threads, and whole steps as CUDA graphs.

A GPU is busy with one micro-batch at a time, so a batch is cut only where its activations would not fit into memory.
Nothing here waits for the device: the figures of a batch stay on it until somebody reads them.

Launching the few hundred kernels of a step one by one takes the host longer than the GPU takes to run them. A graph
holds the whole step, is launched at once, and reads what changes from step to step from memory that stays where it
is: the batch, the factors and keys of what is dropped, and the optimiser's figures.
"""

from __future__ import annotations

import re
import warnings

import numpy as np

from minivit.base.backend import array_module, kernels_wanted
from minivit.kernels import cuda
from minivit.model import STEM
from minivit.optim import Adam, AdamW, Muon, clip_by_global_norm, one_by_one
from minivit.options.dropping import drop_path_rate
from minivit.options.flash_attention import LONG
from minivit.training.engine import Engine, StepResult

PREDICT = 1024  # pictures at a time
LAYERNORM = re.compile(rf"(?!{re.escape(STEM)}).*norm\d?\.weight")  # its weights' names; a stem has GroupNorm


class CudaEngine(Engine):
    """Runs a model whose parameters are CuPy arrays over batches of CuPy arrays.

    ``micro_batch`` pictures go through the model at a time, 0 for the whole batch.
    """

    def __init__(self, model, *, micro_batch=0, label_smoothing=0.0, seed=0, recompute=False, trained=None):
        super().__init__(
            model, workers=1, label_smoothing=label_smoothing, seed=seed, recompute=recompute, trained=trained
        )
        self.micro_batch = micro_batch
        self.predicted = micro_batch or PREDICT  # pictures that `predict` takes at a time

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def each(self, function, items):
        """Call the function with each item, in turn: a GPU works on one at a time."""
        one_by_one(function, items)

    def parts(self, count):
        """The micro-batches of a batch of ``count`` pictures, as slices."""
        size = self.micro_batch or count
        return [slice(i, i + size) for i in range(0, count, size)]

    def gradient(self, images, labels, *, step=0, denominator=None, accumulate=False, generators=None):
        """See `Engine.gradient`. ``generators()`` makes what stands for the Generators of the micro-batches.

        A batch that does not fit into memory is cut in halves until it does: see `fitting`.
        """
        denominator = len(images) if denominator is None else denominator
        before = self.grad.copy() if accumulate else 0.0  # a batch that is begun again adds to this again

        def attempt():
            count = len(self.parts(len(images)))
            made = generators() if generators else [self.generator(step, m) for m in range(count)]
            return self.sum_of_parts(images, labels, made, denominator, before)

        return self.fitting("micro_batch", len(images), attempt)

    def sum_of_parts(self, images, labels, generators, denominator, before=0.0):
        """The gradient of a batch in the cut of now, added to ``before``."""
        flat, grads = self._buffers[0]
        flat[...] = before
        with cuda.rounded(self.model.flat):
            results = [
                self.forward_backward(images[part], labels[part], grads, denominator, rng)
                for part, rng in zip(self.parts(len(images)), generators, strict=True)
            ]
        self._freeze()
        return StepResult(sum(r.loss for r in results), sum(r.correct for r in results))

    def fitting(self, name, count, function):
        """``function()``, which takes ``count`` pictures, so many at a time as the attribute ``name`` says.

        Where these do not fit into memory it is called again with half as many, with a warning.
        Raises  MemoryError: not even one picture fits.
        """
        while True:
            try:
                return function()
            except MemoryError as error:
                self.halve(name, count, error)
            _free_memory(self.grad)  # after the exception, whose traceback holds the arrays

    def halve(self, name, count, error):
        """Take half as many pictures at a time from now on. Raises the error if that is none."""
        size = min(getattr(self, name) or count, count)
        if size == 1:
            raise error
        fits = -(-size // 2)
        setattr(self, name, fits)
        like = f", as --gpu-micro-batch {fits} would" if name == "micro_batch" else ""
        warnings.warn(
            f"{size} pictures at a time do not fit into the device's memory ({error}): going on with {fits}{like}",
            stacklevel=4,
        )

    def predict(self, images, model=None, *, features=False):
        """See `Engine.predict`; pictures that lie on the host are fetched a part at a time."""
        model = model or self.model
        function = model.features if features else model.predict
        xp = array_module(model.flat)

        def attempt():
            size = self.predicted
            with cuda.rounded(model.flat):
                parts = [function(xp.asarray(images[i : i + size])) for i in range(0, len(images), size)]
            return xp.concatenate(parts)

        return self.fitting("predicted", len(images), attempt)


def _free_memory(array):
    """Give back what the library of an array keeps of freed device memory."""
    xp = array_module(array)
    if hasattr(xp, "get_default_memory_pool"):
        xp.get_default_memory_pool().free_all_blocks()


def _generators(draws):
    return [cuda.Draws(*pair) for pair in zip(draws[::2], draws[1::2], strict=True)]


class CudaStep:
    """Training steps - gradient, clipping, optimiser, moving average - replayed from a CUDA graph.

    A batch goes kernel by kernel, which compiles them; the second in a row of its shape is recorded, and all of this
    shape are replayed from then on. Both run the same kernels in the same order, so they give the same bits. Batches of
    another shape (an epoch's last) go kernel by kernel, and so does everything where a graph does not apply: other
    optimisers than Adam, AdamW and Muon, learning rates by layer, dropout of the attention maps of long sequences,
    LayerNorm of a width that its kernels do not take (above 1,024, or no multiple of 4), plain functions,
    products without cuBLAS, or ``graph=False``.

    What does not fit into memory is cut, before anything was updated: see `CudaEngine.fitting`.
    """

    def __init__(self, engine, optimizer, average=None, *, clip_norm=0.0, graph=True):
        self.engine, self.optimizer, self.average, self.clip_norm = engine, optimizer, average, clip_norm
        c = engine.model.config
        self._rates = [drop_path_rate(c, i) for i in range(c.depth)]
        known = type(optimizer) in (Adam, AdamW, Muon) and optimizer.scale is None
        self.fused = known and kernels_wanted() and engine.model.flat.dtype == np.float32
        # dropouts of a micro-batch: of the embedding; in each block of the map, and after MSA, GELU and MLP
        self._keys = (c.dropout > 0.0) * (1 + 3 * c.depth) + (c.attention_dropout > 0.0) * c.depth
        flash = c.sequence_length >= LONG and c.pos_embed != "relative"  # it draws as it goes
        self._drawn = not (c.attention_dropout and flash)
        self._sequences = c.num_tokens // c.sequence_length  # of a picture, each with a stochastic depth of its own
        # what CuPy multiplies cannot be recorded, and the plain LayerNorm's sums over rows are such products
        norms = [name.removesuffix("weight") for name in engine.model.params if LAYERNORM.fullmatch(name)]
        taken = all(cuda.takes_layernorm(*(engine.model.params[n + end] for end in ("weight", "bias"))) for n in norms)
        self._wanted = graph and self.fused and self._drawn and taken and cuda.machine().blas().recordable
        self._last = None  # the kind of the last batch
        self._kind = self._graph = self.pool = self._results = None  # of the graph; pool: its memory
        self.replays = 0  # how many steps a graph made

    def __call__(self, images, labels, *, step, lr):
        """One step on a batch: (loss, correct, gradient norm before clipping), all on the device.

        Raises  MemoryError: not even one picture fits.
        """
        if not self.fused:
            return self._plain(images, labels, step, lr)
        hyper = cuda.hyper_of(self.optimizer, lr, self.average)
        kind = self._kind_of(images, labels)
        if self._wanted and kind == self._last and kind != self._kind:
            self._record(images, labels, step, hyper)
        if self._graph is not None and kind == self._kind:
            results = self._replay(images, labels, step, hyper)
        else:
            results = self._single(images, labels, step, hyper)
        self._last = self._kind_of(images, labels)
        self.optimizer.steps += 1
        if self.average:
            self.average.steps += 1
        return results

    def _kind_of(self, images, labels):
        return images.shape, labels.shape, self.engine.micro_batch

    def release(self):
        """Give back the graph and its memory."""
        pool = self.pool
        self._kind = self._graph = self.pool = self._results = None
        if pool is not None:
            pool.free_all_blocks()
        _free_memory(self.engine.grad)

    def _draw(self, count, step):
        """The random numbers of each micro-batch (factors, keys, factors, ...), on the host; [] for Generators."""
        if not self._drawn:
            return []
        return [
            array
            for m, part in enumerate(self.engine.parts(count))
            for array in cuda.Draws.draw(
                self.engine.generator(step, m),
                self._rates,
                self._sequences * len(range(*part.indices(count))),
                self._keys,
            )
        ]

    def _single(self, images, labels, step, hyper):
        """The step, kernel by kernel."""
        xp = array_module(images)

        def generators():
            return _generators([xp.asarray(draw) for draw in self._draw(len(images), step)])

        result = self.engine.gradient(images, labels, step=step, generators=generators)
        return self._update(result, xp.asarray(hyper))

    def _update(self, result, hyper):
        engine, average = self.engine, self.average
        norm = cuda.gradient_norm(engine.grad)
        update = cuda.muon_step if isinstance(self.optimizer, Muon) else cuda.adam_step
        update(self.optimizer, engine.model.flat, engine.grad, hyper, norm, self.clip_norm)
        if average:
            average.flat += hyper[3] * (engine.model.flat - average.flat)
        return result.loss, result.correct, norm

    def _record(self, images, labels, step, hyper):
        """Make the graph of batches of this kind; nothing is computed yet. None is left where it cannot be made."""
        import cupy

        # memory that the graph uses must stay its own, also between two replays; what the steps before used is given
        # back first, or a step would take its memory twice
        self.release()
        stream, pool = cupy.cuda.get_current_stream(), cupy.cuda.MemoryPool()
        self.pool = pool
        try:
            self._images, self._labels, self._hyper = images.copy(), labels.copy(), cupy.asarray(hyper)
            self._draws = [cupy.asarray(draw) for draw in self._draw(len(images), step)]
            with cupy.cuda.using_allocator(pool.malloc):
                stream.begin_capture()
                try:
                    rngs = _generators(self._draws)
                    result = self.engine.sum_of_parts(self._images, self._labels, rngs, len(images))
                    self._results = self._update(result, self._hyper)
                finally:
                    self._graph = stream.end_capture()
            self._graph.upload(stream)
            self._kind = self._kind_of(images, labels)
            return
        except MemoryError as error:
            self.engine.halve("micro_batch", len(images), error)
        except Exception as error:
            warnings.warn(f"steps run kernel by kernel: no CUDA graph could be made ({error})", stacklevel=3)
            self._wanted = False
        self.release()  # after the exception, whose traceback holds the arrays

    def _replay(self, images, labels, step, hyper):
        import cupy

        self._images[...], self._labels[...] = images, labels
        for memory, values in zip([self._hyper, *self._draws], [hyper, *self._draw(len(images), step)], strict=True):
            if values.size:
                memory.set(values)
        self._graph.launch(cupy.cuda.get_current_stream())
        self.replays += 1
        return tuple(result.copy() for result in self._results)  # the next replay writes over them

    def _plain(self, images, labels, step, lr):
        result = self.engine.gradient(images, labels, step=step)
        norm = clip_by_global_norm(self.engine.grad, self.clip_norm)
        self.optimizer.step(self.engine.model.flat, self.engine.grad, lr)
        if self.average:
            self.average.update(self.engine.model.flat)
        return result.loss, result.correct, norm
