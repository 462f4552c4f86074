"""Our own engine, its data pipeline, and the floor: the matrix products alone.

The **floor** of a step is the time of its matrix products, forward and backward, at the shapes in which the engine
does them, and of nothing else: no bias, no softmax, no LayerNorm, no memory taken or given back. It is measured
through the same BLAS in two ways, of which the quicker counts:

    floor-threads    whole batches, every product cut up by BLAS among its own threads
    floor-workers    micro-batches in several workers, every product by one BLAS thread, as the engine does

The blocks are alike, so one block's operands serve all of them: they stay in the cache better than a step's do, which
makes the floor lower, not higher.
"""

from __future__ import annotations

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits

from minivit import __version__
from minivit.base import params
from minivit.base.backend import device_name, find_device, kernels_wanted, synchronize, to_device, to_host, use_device
from minivit.benchmark.contenders import BETAS, EPS, LR, WEIGHT_DECAY, problem
from minivit.data import batches, epoch_order
from minivit.layers.msa import split_heads
from minivit.model import ViT
from minivit.model.table import mlp_matrices
from minivit.optim import AdamW
from minivit.training.engines.cpu import Engine
from minivit.training.engines.cut import available_cores, default_micro_batch
from minivit.training.step import Batch


def blas():
    """The BLAS that NumPy uses: its name, version, kernels and threads."""
    for info in threadpool_info():
        if info["user_api"] == "blas":
            parts = (info["internal_api"], info["version"], info.get("architecture"))
            return " ".join(str(part) for part in parts if part) + f", {info['num_threads']} thread(s)"
    return "unknown"


class Ours:
    """Engine and AdamW, or `Engine.predict`."""

    def __init__(self, job):
        self.task = job.task
        flat, self.images, self.labels = problem(job)
        self.model = ViT(job.config, flat=flat)
        mask = params.decay_mask(self.model.table)
        self.optimizer = AdamW(flat, mask, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
        self.engine = Engine(self.model, seed=job.seed, **job.engine)
        self.engine.__enter__()  # for as long as the process lives
        self.settings = {
            "version": __version__, "numpy": np.__version__, "blas": blas(),
            "workers": self.engine.workers, "micro_batch": self.engine.micro_batch,
            "kernels": os.environ.get("MINIVIT_KERNELS", "default"),
        }  # fmt: skip

    def check(self):
        if self.task == "infer":
            return None, {"logits": self.engine.predict(self.images)}
        result = self.engine.gradient(self.images, self.labels)
        return float(result.loss), params.views(self.engine.grad, self.model.table)

    def batch(self):
        return self.images, self.labels

    def step(self):
        if self.task == "infer":
            self.engine.predict(self.images)
            return None
        result = self.engine.gradient(*self.batch())
        self.optimizer.step(self.model.flat, self.engine.grad, LR)
        return float(result.loss)


class OursOnGpu:
    """The same on a GPU: CudaStep, or `CudaEngine.predict`."""

    def __init__(self, job):
        from minivit.kernels import cuda
        from minivit.training.engines.gpu import CudaEngine
        from minivit.training.step_gpu import CudaStep

        use_device(find_device(job.device))
        precision = job.precision if kernels_wanted() else "float32"
        if kernels_wanted():
            cuda.machine().precision = precision
        self.task = job.task
        flat, images, labels = (to_device(array, job.device) for array in problem(job))
        self.images, self.labels, self.count = images, labels, 0
        self.model = ViT(job.config, flat=flat)
        mask = to_device(params.decay_mask(self.model.table), job.device)
        optimizer = AdamW(flat, mask, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
        self.engine = CudaEngine(self.model, micro_batch=job.engine.get("micro_batch", 0), seed=job.seed)
        self.whole_step = CudaStep(self.engine, optimizer)
        import cupy

        self.settings = {
            "version": __version__, "cupy": cupy.__version__, "device": device_name(find_device(job.device)),
            "precision": precision, "kernels": os.environ.get("MINIVIT_KERNELS", "default"),
        }  # fmt: skip

    def check(self):
        if self.task == "infer":
            return None, {"logits": to_host(self.engine.predict(self.images))}
        result = self.engine.gradient(self.images, self.labels)
        return float(result.loss), params.views(to_host(self.engine.grad), self.model.table)

    def step(self):
        if self.task == "infer":
            self.engine.predict(self.images)
            return None
        figures = self.whole_step([Batch(self.count, self.images, self.labels)], len(self.images), LR)
        self.count += 1
        return figures.loss

    def synchronize(self):
        synchronize("cuda")

    def event(self):
        import cupy

        event = cupy.cuda.Event()
        event.record()  # on the stream in use
        return event

    def between(self, before, after):
        import cupy

        after.synchronize()
        return 1e-3 * cupy.cuda.get_elapsed_time(before, after)

    def device_memory(self):
        import cupy

        pools = [cupy.get_default_memory_pool(), self.whole_step.pool]
        return sum(pool.total_bytes() for pool in pools if pool is not None)


def ours(job):
    """Us, on the job's device."""
    return Ours(job) if job.device == "cpu" else OursOnGpu(job)


def endless_batches(job, *, prefetch):
    """Augmented batches, epoch after epoch, of a random data set eight batches long."""
    images, labels = problem(job)[1:]
    images, labels = np.concatenate([images] * 8), np.concatenate([labels] * 8)
    for epoch in itertools.count():
        order = epoch_order(len(images), seed=job.seed, epoch=epoch)
        stream = batches(images, labels, order, job.batch, seed=job.seed, epoch=epoch, prefetch=prefetch, **job.loading)
        for _, *batch in stream:
            yield batch


class Fed(Ours):
    """The training step on augmented batches that a background thread prepares, as in training."""

    def __init__(self, job):
        super().__init__(job)
        self.stream = endless_batches(job, prefetch=2)

    def batch(self):
        return next(self.stream)


class Pipeline:
    """The input pipeline alone: each step is one augmented batch, prepared on demand."""

    def __init__(self, job):
        self.stream = endless_batches(job, prefetch=0)
        self.settings = {"numpy": np.__version__, **job.loading}

    def step(self):
        next(self.stream)


class Product(NamedTuple):
    """``times`` products out = a @ b."""

    times: int
    a: Any
    b: Any
    out: Any

    @property
    def flops(self):
        return 2 * self.times * self.out.size * self.a.shape[-1]

    def run(self):
        for _ in range(self.times):
            np.matmul(self.a, self.b, out=self.out)


def _random(*shape):
    """Small random numbers, whatever the products: none overflows or is too small."""
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def linear_forward_products(rows, d, m, times=1):
    """y = x W for x (rows, d), W (d, m)."""
    return [Product(times, _random(rows, d), _random(d, m), _random(rows, m))]


def linear_backward_products(rows, d, m, times=1, *, need_dx=True):
    """dW = x^T dy, and dx = dy W^T where somebody wants it."""
    x, dy = _random(rows, d), _random(rows, m)
    products = [Product(times, x.T, dy, _random(d, m))]
    return products + ([Product(times, dy, _random(d, m).T, x)] if need_dx else [])


def attention_forward_products(B, N, num_heads, Dh, times=1, *, queries=None):
    """scores = q k^T and heads = attn v, on strided views as in `minivit.layers.msa`; ``queries`` as there."""
    q, k, v = split_heads(_random(B, N, 3 * num_heads * Dh), num_heads)  # (B, h, N, Dh)
    q = q[:, :, :queries]  # (B, h, Q, Dh)
    heads = _random(B, q.shape[2], num_heads, Dh).transpose(0, 2, 1, 3)
    attn = _random(B, num_heads, q.shape[2], N)
    return [Product(times, q, k.swapaxes(-1, -2), attn), Product(times, attn, v, heads)]


def attention_backward_products(B, N, num_heads, Dh, times=1, *, queries=None):
    """dv = attn^T dheads, dattn = dheads v^T, dq = dscores k, dk = dscores^T q."""
    q, k, v = split_heads(_random(B, N, 3 * num_heads * Dh), num_heads)
    dq, dk, dv = split_heads(_random(B, N, 3 * num_heads * Dh), num_heads)
    q, dq = q[:, :, :queries], dq[:, :, :queries]
    Q = q.shape[2]
    dheads = _random(B, Q, num_heads, Dh).transpose(0, 2, 1, 3)
    attn, dattn = _random(2, B, num_heads, Q, N)
    return [
        Product(times, attn.swapaxes(-1, -2), dheads, dv),
        Product(times, dheads, v.swapaxes(-1, -2), dattn),
        Product(times, dattn, k, dq),
        Product(times, dattn.swapaxes(-1, -2), q, dk),
    ]


def model_products(config, batch, *, backward=True):
    """Every matrix product of a forward pass (and a backward pass) over a batch, as a list of `Product`.

    The sum of their `Product.flops` is that of `minivit.model.costs.expected_flops`, but for sequences so long
    that the backward makes the attention map again: the floor keeps it.
    """
    c, D, L = config, config.width, config.depth
    N, patches = c.num_tokens, batch * c.grid_size**2
    # in the last block, only the tokens that the head reads ask and pass through the MLP
    blocks = [(L - 1, N), (1, 1)] if c.pooling == "cls" else [(L, N)]  # how many, and the tokens of each that ask
    blocks = [(times, Q) for times, Q in blocks if times]
    # (rows, d, m, times): qkv, proj and the MLP of each block; scores of sequence pooling; head
    linears = [(batch * N, D, 3 * D, L)]
    for times, Q in blocks:
        linears += [(batch * Q, d, m, times) for d, m in ((D, D), *mlp_matrices(c))]
    linears += [(patches, D, 1, 1)] if c.pooling == "seq" else []
    linears += [(batch, c.num_pooled, c.pre_logits, 1)] if c.pre_logits else []
    linears += [(batch, c.num_features, c.num_classes, 1)]
    embed = (patches, c.patch_size**2 * c.channels, D, 1)
    heads = [((batch, N, c.num_heads, D // c.num_heads, times), {"queries": Q}) for times, Q in blocks]
    n = c.grid_size**2
    tokens, attn, pooled = _random(batch, n, D), _random(batch, 1, n), _random(batch, 1, D)
    mixtures = [Product(1, attn, tokens, pooled)] if c.pooling == "seq" else []
    products = linear_forward_products(*embed) + mixtures
    products += [p for shape, only in heads for p in attention_forward_products(*shape, **only)]
    products += [p for linear in linears for p in linear_forward_products(*linear)]
    if backward:
        products += linear_backward_products(*embed, need_dx=False)
        if c.pooling == "seq":
            products += [
                Product(1, pooled, tokens.swapaxes(1, 2), attn),
                Product(1, attn.swapaxes(1, 2), pooled, tokens),
            ]
        products += [p for shape, only in heads for p in attention_backward_products(*shape, **only)]
        products += [p for linear in linears for p in linear_backward_products(*linear)]
    return products


class Floor:
    """The matrix products alone: see the module's docstring."""

    def __init__(self, job, *, blas_threads):
        cores = available_cores()
        workers = 1 if blas_threads else job.engine.get("workers") or cores
        size = job.engine.get("micro_batch") or default_micro_batch(job.config)
        rounds = 1 if blas_threads else -(-job.batch // (size * workers))
        count = min(rounds * workers, job.batch)  # micro-batches, as the engine cuts them
        sizes = [job.batch * (i + 1) // count - job.batch * i // count for i in range(count)]
        backward = job.task == "step"
        self.work = []  # for each worker, its micro-batches' products
        for w in range(workers):
            own = {size: model_products(job.config, size, backward=backward) for size in set(sizes[w::workers])}
            self.work.append([own[size] for size in sizes[w::workers]])
        self.limits = threadpool_limits(cores if blas_threads else 1, user_api="blas")
        self.pool = ThreadPoolExecutor(workers)
        self.settings = {
            "workers": workers, "micro_batch": max(sizes), "blas": blas(),
            "gflop": 1e-9 * sum(p.flops for parts in self.work for part in parts for p in part),
        }  # fmt: skip

    def step(self):
        def work(parts):
            for products in parts:
                for product in products:
                    product.run()

        list(self.pool.map(work, self.work))
