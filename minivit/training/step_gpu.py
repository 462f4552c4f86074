"""A GPU's steps, replayed from a CUDA graph.

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
from minivit.optim import Adam, AdamW, Muon
from minivit.options.dropping import drop_path_rate
from minivit.options.flash_attention import LONG
from minivit.training.engines.gpu import free_memory
from minivit.training.step import Figures, Step

LAYERNORM = re.compile(rf"(?!{re.escape(STEM)}).*norm\d?\.weight")  # its weights' names; a stem has GroupNorm


def _generators(draws):
    return [cuda.Draws(*pair) for pair in zip(draws[::2], draws[1::2], strict=True)]


class CudaStep(Step):
    """Makes the steps of a training on a GPU, each of one batch, from a CUDA graph where one can be made.

    A batch goes kernel by kernel, which compiles them; the second in a row of its shape is recorded, and all of this
    shape are replayed from then on. Both run the same kernels in the same order, so they give the same bits. Batches of
    another shape (an epoch's last) go kernel by kernel, and so does everything where a graph does not apply: other
    optimisers than Adam, AdamW and Muon, learning rates by layer, dropout of the attention maps of long sequences,
    LayerNorm of a width that its kernels do not take (above 1,024, or no multiple of 4), plain functions,
    products without cuBLAS, or ``graph=False``.

    What does not fit into memory is cut, before anything was updated: see `CudaEngine.fitting`.
    """

    def __init__(self, engine, optimizer, average=None, *, clip_norm=0.0, graph=True):
        super().__init__(engine, optimizer, average, clip_norm=clip_norm)
        c = engine.model.config
        self._rates = [drop_path_rate(c, i) for i in range(c.depth)]
        known = type(optimizer) in (Adam, AdamW, Muon) and optimizer.scale is None
        self.fused = known and kernels_wanted() and engine.model.flat.dtype == np.float32
        # dropouts of a micro-batch: of the embedding; in each block of the map, and after MSA, GELU and MLP
        self._keys = (c.dropout > 0.0) * (1 + 3 * c.depth) + (c.attention_dropout > 0.0) * c.depth
        flash = c.sequence_length >= LONG and c.pos_embed != "relative"  # it draws as it goes
        self._drawn = not (c.attention_dropout and flash)
        self._sequences = c.num_tokens // c.sequence_length  # of an image, each with a stochastic depth of its own
        # what CuPy multiplies cannot be recorded, and the plain LayerNorm's sums over rows are such products
        norms = [name.removesuffix("weight") for name in engine.model.params if LAYERNORM.fullmatch(name)]
        taken = all(cuda.takes_layernorm(*(engine.model.params[n + end] for end in ("weight", "bias"))) for n in norms)
        self._wanted = graph and self.fused and self._drawn and taken and cuda.machine().blas().recordable
        self._last = None  # the kind of the last batch
        self._kind = self._graph = self.pool = self._results = None  # of the graph; pool: its memory
        self.replays = 0  # how many steps a graph made

    def __call__(self, batches, count, lr):
        """See `Step`, with one batch; all figures stay on the device.

        Raises  MemoryError: not even one image fits.
        """
        if not self.fused:
            return super().__call__(batches, count, lr)
        (batch,) = batches
        hyper = cuda.hyper_of(self.optimizer, lr, self.average)
        kind = self._kind_of(batch)
        if self._wanted and kind == self._last and kind != self._kind:
            self._record(batch, hyper)
        if self._graph is not None and kind == self._kind:
            results = self._replay(batch, hyper)
        else:
            results = self._single(batch, hyper)
        self._last = self._kind_of(batch)
        self.optimizer.steps += 1
        if self.average:
            self.average.steps += 1
        return Figures(*results, count)

    def _kind_of(self, batch):
        return batch.images.shape, batch.targets.shape, self.engine.micro_batch

    def release(self):
        """Give back the graph and its memory."""
        pool = self.pool
        self._kind = self._graph = self.pool = self._results = None
        if pool is not None:
            pool.free_all_blocks()
        free_memory(self.engine.grad)

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

    def _single(self, batch, hyper):
        """The step, kernel by kernel."""
        xp = array_module(batch.images)

        def generators():
            return _generators([xp.asarray(draw) for draw in self._draw(len(batch.images), batch.number)])

        result = self.engine.gradient(batch.images, batch.targets, step=batch.number, generators=generators)
        return self._update(result, xp.asarray(hyper))

    def _update(self, result, hyper):
        engine, average = self.engine, self.average
        norm = cuda.gradient_norm(engine.grad)
        update = cuda.muon_step if isinstance(self.optimizer, Muon) else cuda.adam_step
        update(self.optimizer, engine.model.flat, engine.grad, hyper, norm, self.clip_norm)
        if average:
            average.flat += hyper[3] * (engine.model.flat - average.flat)
        return result.loss, result.correct, norm

    def _record(self, batch, hyper):
        """Make the graph of batches of this kind; nothing is computed yet. None is left where it cannot be made."""
        import cupy

        # memory that the graph uses must stay its own, also between two replays; what the steps before used is given
        # back first, or a step would take its memory twice
        self.release()
        stream, pool = cupy.cuda.get_current_stream(), cupy.cuda.MemoryPool()
        self.pool = pool
        try:
            self._images, self._targets, self._hyper = batch.images.copy(), batch.targets.copy(), cupy.asarray(hyper)
            self._draws = [cupy.asarray(draw) for draw in self._draw(len(batch.images), batch.number)]
            with cupy.cuda.using_allocator(pool.malloc):
                stream.begin_capture()
                try:
                    rngs = _generators(self._draws)
                    result = self.engine.sum_of_parts(self._images, self._targets, rngs, len(batch.images))
                    self._results = self._update(result, self._hyper)
                finally:
                    self._graph = stream.end_capture()
            self._graph.upload(stream)
            self._kind = self._kind_of(batch)
            return
        except MemoryError as error:
            self.engine.halve("micro_batch", len(batch.images), error)
        except Exception as error:
            warnings.warn(f"steps run kernel by kernel: no CUDA graph could be made ({error})", stacklevel=3)
            self._wanted = False
        self.release()  # after the exception, whose traceback holds the arrays

    def _replay(self, batch, hyper):
        import cupy

        self._images[...], self._targets[...] = batch.images, batch.targets
        draws = self._draw(len(batch.images), batch.number)
        for memory, values in zip([self._hyper, *self._draws], [hyper, *draws], strict=True):
            if values.size:
                memory.set(values)
        self._graph.launch(cupy.cuda.get_current_stream())
        self.replays += 1
        return tuple(result.copy() for result in self._results)  # the next replay writes over them
