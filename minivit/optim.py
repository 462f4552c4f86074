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
             theta <- theta - eta (0.2 sqrt(max(n, k)) O + lambda theta)
                                                 (Jordan et al. 2024, kellerjordan.github.io/posts/muon; the factor,
                                 with which an entry moves as far as under AdamW: Liu et al. 2025, arXiv:2502.16982)

An optimiser is its settings, its state vectors and its step count; `step` updates the parameters in place. With
``scale`` (n,), every entry has a learning rate of its own, eta scale.
Vectors are worked through in pieces that stay in the processor's cache, since each formula reads them several
times.
"""

from __future__ import annotations

import math

from minivit.backend import array_module
from minivit.errors import InputError

PIECE = 16384  # elements: five float32 vectors of this length fit an L2 cache of 512 KiB


def one_by_one(function, items):
    """Call the function with each item in turn."""
    for item in items:
        function(item)


def _pieces(flat, start=0, stop=None):
    """Slices that cover a flat vector: cache-sized on the CPU, one on a GPU, where each would be a launch."""
    stop = flat.size if stop is None else stop
    piece = PIECE if type(flat).__module__ == "numpy" else max(stop - start, 1)
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


class Muon(AdamW):
    """Momentum whose matrices are made orthogonal; what is no matrix of a block is AdamW's.

    ``table`` is the model's parameter table. The queries', keys' and values' matrices are each taken by themselves.
    ``each`` calls a function with every matrix; an engine's spreads them over its threads (see `Engine.each`).
    Shapes  flat, grad, decay_mask, scale, and the states "m" and "v": (n,); v is unused where Muon acts
    """

    def __init__(self, flat, decay_mask, *, table, momentum=0.95, **settings):
        super().__init__(flat, decay_mask, **settings)
        self.momentum, self.each = momentum, one_by_one
        self.matrices, self.others = [], []  # (slice, shape, how many matrices lie side by side); slices for AdamW
        start = end = 0  # of what AdamW takes
        for spec in table:
            stop = end + spec.size
            if spec.name.startswith("blocks.") and len(spec.shape) == 2:
                self.others += _pieces(flat, start, end)
                self.matrices.append((slice(end, stop), spec.shape, 3 if spec.name.endswith("qkv.weight") else 1))
                start = stop
            end = stop
        self.others += _pieces(flat, start, end)

    def step(self, flat, grad, lr):
        """Update ``flat`` in place from the gradient."""
        self.steps += 1
        for piece in self.others:
            self._update(flat, grad, lr, piece)
        self.each(lambda matrix: self._update_matrix(flat, grad, lr, *matrix), self.matrices)

    def _update_matrix(self, flat, grad, lr, entries, shape, count):
        n, k = shape[0], shape[1] // count
        theta, g, m = flat[entries], grad[entries], self.state["m"][entries]
        m *= self.momentum
        m += g
        u = (g + self.momentum * m).reshape(n, count, k).swapaxes(0, 1)  # (count, n, k)
        o = orthogonalise(u).swapaxes(0, 1).reshape(-1)
        rate = _rate(lr, self.scale, entries)
        if self.weight_decay:
            theta -= rate * self.weight_decay * theta
        o *= 0.2 * math.sqrt(max(n, k))
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
ONE_CYCLE_RISE, ONE_CYCLE_START = 0.3, 1 / 25  # share of the steps, and of the peak


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
