"""The engine of one GPU: the calls of `minivit.engine.Engine` without worker threads, and whole steps as CUDA graphs.

A GPU is busy with one micro-batch at a time, so a batch is cut only where its activations would not fit into memory.
Nothing here waits for the device: the figures of a batch stay on it until somebody reads them.

Launching the few hundred kernels of a step one by one takes the host longer than the GPU takes to run them. A graph
holds the whole step, is launched at once, and reads what changes from step to step from memory that stays where it
is: the batch, the factors and keys of what is dropped, and the optimiser's figures.
"""

from __future__ import annotations

import warnings

import numpy as np

from minivit.backend import array_module, kernels_wanted
from minivit.engine import Engine, StepResult
from minivit.kernels import cuda
from minivit.layers.msa import LONG
from minivit.optim import Adam, AdamW, Muon, clip_by_global_norm, one_by_one

PREDICT = 1024  # pictures at a time


class CudaEngine(Engine):
    """Runs a model whose parameters are CuPy arrays over batches of CuPy arrays.

    ``micro_batch`` pictures go through the model at a time, 0 for the whole batch.
    """

    def __init__(self, model, *, micro_batch=0, label_smoothing=0.0, seed=0, recompute=False, trained=None):
        super().__init__(
            model, workers=1, label_smoothing=label_smoothing, seed=seed, recompute=recompute, trained=trained
        )
        self.micro_batch = micro_batch

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
        """See `Engine.gradient`. ``generators``: what stands for the Generator of each micro-batch."""
        flat, grads = self._buffers[0]
        if not accumulate:
            flat[...] = 0.0
        denominator = len(images) if denominator is None else denominator
        parts = self.parts(len(images))
        generators = generators or [self.generator(step, m) for m in range(len(parts))]
        with cuda.rounded(self.model.flat):
            results = [
                self.forward_backward(images[part], labels[part], grads, denominator, rng)
                for part, rng in zip(parts, generators, strict=True)
            ]
        self._freeze()
        return StepResult(sum(r.loss for r in results), sum(r.correct for r in results))

    def predict(self, images, model=None, *, features=False):
        """See `Engine.predict`; pictures that lie on the host are fetched a part at a time."""
        model = model or self.model
        function = model.features if features else model.predict
        xp, size = array_module(model.flat), self.micro_batch or PREDICT
        with cuda.rounded(model.flat):
            parts = [function(xp.asarray(images[i : i + size])) for i in range(0, len(images), size)]
        return xp.concatenate(parts)


def _free_memory(array):
    """Give back what the library of an array keeps of freed device memory."""
    xp = array_module(array)
    if hasattr(xp, "get_default_memory_pool"):
        xp.get_default_memory_pool().free_all_blocks()


class CudaStep:
    """Training steps - gradient, clipping, optimiser, moving average - replayed from a CUDA graph.

    The first batch goes kernel by kernel, which compiles them; the second, of the same shape, is recorded and from then
    on replayed. Both run the same kernels in the same order, so they give the same bits. Batches of another shape (an
    epoch's last) always go kernel by kernel, and so does everything where a graph does not apply: other optimisers than
    Adam, AdamW and Muon, learning rates by layer, dropout of the attention maps of long sequences, plain functions,
    products without cuBLAS, or ``graph=False``.
    """

    def __init__(self, engine, optimizer, average=None, *, clip_norm=0.0, graph=True):
        self.engine, self.optimizer, self.average, self.clip_norm = engine, optimizer, average, clip_norm
        c = engine.model.config
        self._rates = [engine.model.drop_path_rate(i) for i in range(c.depth)]
        known = type(optimizer) in (Adam, AdamW, Muon) and optimizer.scale is None
        self.fused = known and kernels_wanted() and engine.model.flat.dtype == np.float32
        # dropouts of a micro-batch: of the embedding; in each block of the map, and after MSA, GELU and MLP
        self._keys = (c.dropout > 0.0) * (1 + 3 * c.depth) + (c.attention_dropout > 0.0) * c.depth
        flash = c.sequence_length >= LONG and c.pos_embed != "relative"  # it draws as it goes
        self._drawn = not (c.attention_dropout and flash)
        self._sequences = c.num_tokens // c.sequence_length  # of a picture, each with a stochastic depth of its own
        self._wanted = graph and self.fused and self._drawn and cuda.machine().blas().recordable
        self._shape = self._graph = self.pool = self._results = None  # pool: the graph's memory
        self.replays = 0  # how many steps a graph made

    def __call__(self, images, labels, *, step, lr):
        """One step on a batch: (loss, correct, gradient norm before clipping), all on the device.

        A batch that does not fit into memory is cut in halves until it does, with a warning; the engine's
        ``micro_batch`` is then what fits.
        Raises  MemoryError: not even one picture fits.
        """
        while True:
            try:
                return self._step(images, labels, step, lr)
            except MemoryError as error:
                size = self.engine.micro_batch or len(images)
                if size == 1:
                    raise
                self.engine.micro_batch = fits = -(-size // 2)
                warnings.warn(
                    f"{size} pictures at a time do not fit into the device's memory ({error}): going on with {fits}, "
                    f"as --gpu-micro-batch {fits} would",
                    stacklevel=2,
                )
            # after the exception, whose traceback holds the arrays
            self._shape = self._graph = self.pool = self._results = None
            _free_memory(images)

    def _step(self, images, labels, step, lr):
        if not self.fused:
            return self._plain(images, labels, step, lr)
        xp = array_module(images)
        shape = (images.shape, labels.shape)
        draws = self._draw(len(images), step)
        hyper = cuda.hyper_of(self.optimizer, lr, self.average)
        if not self._wanted or (self._shape is not None and shape != self._shape):
            results = self._run(images, labels, [xp.asarray(draw) for draw in draws], xp.asarray(hyper), step)
        elif self._shape is None:
            self._shape = shape
            self._images, self._labels = images.copy(), labels.copy()
            self._draws, self._hyper = [xp.asarray(draw) for draw in draws], xp.asarray(hyper)
            results = self._run(images, labels, self._draws, self._hyper, step)
        else:
            self._images[...], self._labels[...] = images, labels
            for memory, values in zip([self._hyper, *self._draws], [hyper, *draws], strict=True):
                if values.size:
                    memory.set(values)
            results = self._replay(step)
        self.optimizer.steps += 1
        if self.average:
            self.average.steps += 1
        return results

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

    def _run(self, images, labels, draws, hyper, step):
        """The step, kernel by kernel."""
        engine, average = self.engine, self.average
        generators = [cuda.Draws(*pair) for pair in zip(draws[::2], draws[1::2], strict=True)]
        result = engine.gradient(images, labels, step=step, generators=generators)
        norm = cuda.gradient_norm(engine.grad)
        update = cuda.muon_step if isinstance(self.optimizer, Muon) else cuda.adam_step
        update(self.optimizer, engine.model.flat, engine.grad, hyper, norm, self.clip_norm)
        if average:
            average.flat += hyper[3] * (engine.model.flat - average.flat)
        return result.loss, result.correct, norm

    def _replay(self, step):
        import cupy

        stream = cupy.cuda.get_current_stream()
        if self._graph is None:
            # memory that the graph uses must stay its own, also between two replays; what the first step used is
            # given back first, or a step would take its memory twice
            _free_memory(self._images)
            self.pool = cupy.cuda.MemoryPool()
            try:
                with cupy.cuda.using_allocator(self.pool.malloc):
                    stream.begin_capture()
                    try:
                        self._results = self._run(self._images, self._labels, self._draws, self._hyper, step)
                    finally:
                        self._graph = stream.end_capture()
            except MemoryError:
                raise
            except Exception as error:
                warnings.warn(f"steps run kernel by kernel: no CUDA graph could be made ({error})", stacklevel=3)
                self._graph, self._wanted = None, False
                return self._run(self._images, self._labels, self._draws, self._hyper, step)
            self._graph.upload(stream)
        self._graph.launch(stream)
        self.replays += 1
        return tuple(result.copy() for result in self._results)  # the next replay writes over them

    def _plain(self, images, labels, step, lr):
        result = self.engine.gradient(images, labels, step=step)
        norm = clip_by_global_norm(self.engine.grad, self.clip_norm)
        self.optimizer.step(self.engine.model.flat, self.engine.grad, lr)
        if self.average:
            self.average.update(self.engine.model.flat)
        return result.loss, result.correct, norm
