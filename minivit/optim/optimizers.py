r"""Optimisers over the flat parameter buffer, learning-rate schedules, gradient clipping, weight averaging.

With g the gradient, theta the parameters, eta the learning rate, lambda the weight decay, c the decay mask (1
for matrices, 0 for biases, LayerNorm, tokens and positions):

    SGD      g <- g + lambda c theta;  m <- mu m + g;  theta <- theta - eta m
    Adam     g <- g + lambda c theta;  m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;
             theta <- theta - eta (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)    (Kingma & Ba 2014, arXiv:1412.6980)
    AdamW    the same with theta <- theta - eta lambda c theta instead of decay in g
                                                                (Loshchilov & Hutter 2017, arXiv:1711.05101)
    Lion     u = sign(b1 m + (1 - b1) g);  theta <- theta - eta (u + lambda c theta);  m <- b2 m + (1 - b2) g
                                                                (Chen et al. 2023, arXiv:2302.06675)
    Muon     for each matrix (n, k) of the blocks, AdamW for everything else:
             m <- mu m + g;  O = U V^T of the singular value decomposition U S V^T of g + mu m, nearly;
             theta <- theta - eta (0.2 sqrt(max(n, k)) O + lambda c theta)
                                                 (Jordan et al. 2024, kellerjordan.github.io/posts/muon; the factor,
                                 with which an entry moves as far as under AdamW: Liu et al. 2025, arXiv:2502.16982)

An optimiser is its settings, its state vectors and its step count; `step` updates the parameters in place. With
``scale`` (n,), every entry has a learning rate of its own, eta scale.
Vectors are worked through in pieces that stay in the processor's cache, since each formula reads them several
times.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

from minivit.base.backend import accelerated, array_module
from minivit.base.errors import InputError

PIECE = 16384  # elements: five float32 vectors of this length fit an L2 cache of 512 KiB


def one_by_one(function, items):
    """Call the function with each item in turn."""
    for item in items:
        function(item)


def _pieces(flat, start=0, stop=None):
    """Slices that cover a flat vector: cache-sized on the CPU, one on a GPU, where each would be a launch."""
    stop = flat.size if stop is None else stop
    piece = PIECE if type(flat).__module__ == "numpy" else max(stop, 1)
    return [slice(i, min(i + piece, stop)) for i in range(start, stop, piece)]


class SGD:
    """Stochastic gradient descent with momentum, and L2 weight decay on the masked entries.

    Shapes  flat, grad, decay_mask, scale, and the state "momentum": (n,)
    """

    def __init__(self, flat, decay_mask, *, momentum=0.9, weight_decay=0.0, scale=None):
        self.momentum, self.weight_decay, self.decay_mask, self.scale = momentum, weight_decay, decay_mask, scale
        self.state = {"momentum": array_module(flat).zeros_like(flat)}
        self.steps = 0

    def step(self, flat, grad, lr):
        """Update ``flat`` in place from the gradient."""
        self.steps += 1
        for piece in _pieces(flat):
            theta, g, m = flat[piece], grad[piece], self.state["momentum"][piece]
            if self.weight_decay:
                g = g + self.weight_decay * (self.decay_mask[piece] * theta)
            m *= self.momentum
            m += g
            theta -= _rate(lr, self.scale, piece) * m


def _rate(lr, scale, piece):
    return lr if scale is None else lr * scale[piece]


class Adam:
    """Adam, with weight decay added to the gradient (L2) on the masked entries.

    Shapes  flat, grad, decay_mask, scale, and the states "m" and "v": (n,)
    """

    decoupled = False

    def __init__(self, flat, decay_mask, *, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, scale=None):
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.decay_mask, self.scale = decay_mask, scale
        xp = array_module(flat)
        self.state = {"m": xp.zeros_like(flat), "v": xp.zeros_like(flat)}
        self.steps = 0

    def step(self, flat, grad, lr):
        """Update ``flat`` in place from the gradient."""
        array_module(flat, grad)  # refuses anything else
        self.steps += 1
        for piece in _pieces(flat):
            self._update(flat, grad, lr, piece)

    def _update(self, flat, grad, lr, piece):
        """Adam's step number `steps` for a piece of the entries."""
        xp = array_module(flat, grad)
        beta1, beta2 = self.betas
        correction1 = 1.0 - beta1**self.steps
        correction2 = math.sqrt(1.0 - beta2**self.steps)
        theta, g, m, v = flat[piece], grad[piece], self.state["m"][piece], self.state["v"][piece]
        rate = _rate(lr, self.scale, piece)
        if self.weight_decay:
            decay = self.decay_mask[piece] * theta
            if self.decoupled:
                theta -= rate * self.weight_decay * decay
            else:
                g = g + self.weight_decay * decay
        m *= beta1
        m += (1.0 - beta1) * g
        v *= beta2
        v += (1.0 - beta2) * (g * g)
        denominator = xp.sqrt(v)
        denominator /= correction2
        denominator += self.eps
        update = m / denominator
        update *= rate / correction1
        theta -= update


class AdamW(Adam):
    """Adam with decoupled weight decay: the decay shrinks the parameters directly and never enters m or v."""

    decoupled = True


class Lion:
    """Every entry moves by the same length, in the direction of the sign of an average of gradients.

    Shapes  flat, grad, decay_mask, scale, and the state "m": (n,)
    Its steps are longer than AdamW's, so that a learning rate 3 to 10 times lower and as much more decay suit it.
    """

    def __init__(self, flat, decay_mask, *, betas=(0.9, 0.99), weight_decay=0.0, scale=None):
        self.betas, self.weight_decay, self.decay_mask, self.scale = betas, weight_decay, decay_mask, scale
        self.state = {"m": array_module(flat).zeros_like(flat)}
        self.steps = 0

    def step(self, flat, grad, lr):
        """Update ``flat`` in place from the gradient."""
        xp = array_module(flat, grad)
        self.steps += 1
        beta1, beta2 = self.betas
        for piece in _pieces(flat):
            theta, g, m = flat[piece], grad[piece], self.state["m"][piece]
            u = xp.sign(beta1 * m + (1.0 - beta1) * g)
            if self.weight_decay:
                u += self.weight_decay * (self.decay_mask[piece] * theta)
            theta -= _rate(lr, self.scale, piece) * u
            m *= beta2
            m += (1.0 - beta2) * g


# Of the odd polynomial x -> a x + b x^3 + c x^5, which is made five times: steep at 0, so that small singular values
# grow quickly, and near 1 for all of (0, 1] in the end (Jordan et al. 2024).
NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315
NEWTON_SCHULZ_STEPS = 5


@accelerated
def orthogonalise(matrices):
    """The nearest matrices with orthonormal rows or columns, roughly: U V^T where M = U S V^T.

    Math    X_0 = M / |M|;  X <- a X + (b X X^T + c (X X^T)^2) X, which is U (a S + b S^3 + c S^5) V^T
    Shapes  (..., n, k)  ->  (..., n, k), with singular values between about 0.7 and 1.2
    """
    xp = array_module(matrices)
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.swapaxes(-1, -2) if tall else matrices  # the products are smaller on the short side
    x = x / (xp.sqrt((x * x).sum(axis=(-2, -1), keepdims=True)) + 1e-12)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.swapaxes(-1, -2)
        polynomial = gram @ gram
        polynomial *= c
        polynomial += b * gram
        x = a * x + polynomial @ x
    return x.swapaxes(-1, -2) if tall else x


class Matrices(NamedTuple):
    """Matrices that `Muon` takes at once: those of one name in some blocks, which lie equally far apart."""

    blocks: slice  # all of the blocks' parameters
    rows: slice  # which blocks
    columns: slice  # where in a block's parameters the matrices are
    shape: tuple  # (n, k count)
    count: int  # how many matrices (n, k) lie side by side


class Muon(AdamW):
    """Momentum whose matrices are made orthogonal; what is no matrix of a block is AdamW's.

    ``table`` is the model's parameter table. The queries', keys' and values' matrices are each taken by themselves.
    ``each`` calls a function with each of ``matrices``; an engine's spreads them over its threads (see `Engine.each`).
    Shapes  flat, grad, decay_mask, scale, and the states "m" and "v": (n,); v is unused where Muon acts
    """

    def __init__(self, flat, decay_mask, *, table, momentum=0.95, **settings):
        AdamW.__init__(self, flat, decay_mask, **settings)  # super() is a closure, which mutate.py cannot exchange
        self.momentum, self.each = momentum, one_by_one
        self.matrices, self.others = [], _pieces(flat)
        inside = [i for i, spec in enumerate(table) if spec.name.startswith("blocks.")]
        if not inside:
            return
        ends = list(itertools.accumulate(spec.size for spec in table))
        starts = [0, *ends]
        first, last = starts[inside[0]], ends[inside[-1]]
        of_block = [i for i in inside if table[i].name.startswith("blocks.0.")]
        self.depth = depth = len(inside) // len(of_block)
        # on a GPU all blocks at once, where each launch counts; on the CPU one by one, so that threads can share them
        together = type(flat).__module__ != "numpy"
        rows = [slice(0, depth)] if together else [slice(i, i + 1) for i in range(depth)]
        size, matrices = (last - first) // depth, [i for i in of_block if len(table[i].shape) == 2]
        self.matrices = [
            Matrices(
                slice(first, last), some, slice(starts[i] - first, ends[i] - first), table[i].shape,
                3 if table[i].name.endswith("qkv.weight") else 1,
            )
            for i in matrices
            for some in rows
        ]  # fmt: skip
        taken = [(starts[i] + j * size, ends[i] + j * size) for j in range(depth) for i in matrices]
        edges = [0, *(edge for span in taken for edge in span), flat.size]
        gaps = zip(edges[::2], edges[1::2], strict=True)  # what lies between the matrices
        self.others = [piece for start, stop in gaps for piece in _pieces(flat, start, stop)]

    def step(self, flat, grad, lr):
        """Update ``flat`` in place from the gradient."""
        array_module(flat, grad)  # refuses anything else
        self.steps += 1
        for piece in self.others:
            self._update(flat, grad, lr, piece)
        self.update_matrices(flat, grad, lr)

    def update_matrices(self, flat, grad, lr):
        """Muon's part of a step; ``lr`` may be an array () on the device."""
        self.each(lambda matrices: self._update_matrices(flat, grad, lr, matrices), self.matrices)

    def _update_matrices(self, flat, grad, lr, matrices):
        blocks, rows, columns, (n, width), count = matrices

        def of(vector):
            """The matrices' entries (blocks, n k count), a view."""
            return vector[blocks].reshape(self.depth, -1)[rows, columns]

        theta, g, m = of(flat), of(grad), of(self.state["m"])
        m *= self.momentum
        m += g
        u = (g + self.momentum * m).reshape(-1, n, count, width // count).swapaxes(1, 2)  # (blocks, count, n, k)
        o = orthogonalise(u).swapaxes(1, 2).reshape(theta.shape)
        rate = lr if self.scale is None else lr * of(self.scale)
        if self.weight_decay:
            theta -= rate * self.weight_decay * (of(self.decay_mask) * theta)
        o *= 0.2 * math.sqrt(max(n, width // count))
        o *= rate
        theta -= o


OPTIMIZERS = ("adamw", "adam", "sgd", "lion", "muon")


def make_optimizer(
    name, flat, decay_mask, *, table=(), momentum=0.9, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, scale=None
):
    """An optimiser by name; each takes the settings that concern it.

    Raises  InputError: unknown name.
    """
    shared, adam = {"weight_decay": weight_decay, "scale": scale}, {"betas": (beta1, beta2), "eps": eps}
    if name == "sgd":
        return SGD(flat, decay_mask, momentum=momentum, **shared)
    if name == "lion":
        return Lion(flat, decay_mask, betas=(beta1, beta2), **shared)
    if name == "muon":
        return Muon(flat, decay_mask, table=table, momentum=momentum, **adam, **shared)
    if name in ("adam", "adamw"):
        return (Adam if name == "adam" else AdamW)(flat, decay_mask, **adam, **shared)
    raise InputError(f"optimizer must be one of {', '.join(OPTIMIZERS)}; got {name!r}")


SCHEDULES = ("cosine", "linear", "constant", "trapezoid", "onecycle")
ONE_CYCLE_RISE = 0.3  # share of the steps
ONE_CYCLE_START = 1 / 25  # share of the peak


def learning_rate(step, total_steps, *, lr, schedule="cosine", warmup_steps=0, final_lr=0.0, cooldown=0.2):
    """The learning rate of a step, counted from 0.

    Math    warm-up: lr (step + 1) / (warmup_steps + 1);
            after it, with p = (step - warmup) / (total - warmup) in [0, 1),
            cosine: final + (lr - final) (1 + cos(pi p)) / 2;  linear: lr + (final - lr) p;  constant: lr;
            trapezoid: lr, then linear to final over the last ``cooldown`` of all steps
            onecycle, which has its own warm-up: from lr / 25 up and from lr down to final, by half a cosine wave each,
            the first over 30 % of the steps (Smith & Topin 2017, arXiv:1708.07120)
    Raises  InputError: unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise InputError(f"schedule must be one of {', '.join(SCHEDULES)}; got {schedule!r}")

    def half_wave(begin, end, p):
        return end + (begin - end) * (1.0 + math.cos(math.pi * p)) / 2.0

    if schedule == "onecycle":
        rise = ONE_CYCLE_RISE * total_steps
        if step < rise:
            return half_wave(ONE_CYCLE_START * lr, lr, step / rise)
        return half_wave(lr, final_lr, (step - rise) / (total_steps - rise))
    if step < warmup_steps:
        return lr * (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return lr
    if schedule == "trapezoid":
        falling = max(cooldown * total_steps, 1.0)
        return final_lr + (lr - final_lr) * min(1.0, (total_steps - step) / falling)
    p = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    if schedule == "linear":
        return lr + (final_lr - lr) * p
    return half_wave(lr, final_lr, p)


def clip_by_global_norm(grad, max_norm):
    """Scale the whole gradient so that its Euclidean norm is at most ``max_norm`` (in place); 0 means no clipping.

    Math    g <- g min(1, max_norm / |g|)
    Shapes  grad (n,)  ->  the norm before clipping, () on the gradient's device (nothing is read back to the host)
    """
    xp = array_module(grad)
    norm = xp.sqrt(grad @ grad)
    if max_norm:
        # written without a branch on the value, which would wait for the device; the tiny number keeps 0 / 0 away
        grad *= xp.minimum(1.0, max_norm / (norm + 1e-12)).astype(grad.dtype)
    return norm


class EMA:
    """Exponential moving average of the weights (Polyak averaging).

    Math    d_t = min(decay, (1 + t) / (10 + t));  average <- d_t average + (1 - d_t) theta
    The smaller d_t of the first steps lets the average forget the initial weights.
    """

    def __init__(self, flat, decay):
        self.decay, self.flat, self.steps = decay, flat.copy(), 0

    def decay_at(self, step):
        """d_t, for steps counted from 1."""
        return min(self.decay, (1 + step) / (10 + step))

    def update(self, flat):
        """Take the new weights into the average."""
        self.steps += 1
        d = self.decay_at(self.steps)
        for piece in _pieces(flat):
            average = self.flat[piece]
            average += (1.0 - d) * (flat[piece] - average)
