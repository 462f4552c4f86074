r"""Optimisers over the flat parameter buffer, learning-rate schedules, gradient clipping, weight averaging.

With g the gradient, theta the parameters, eta the learning rate, lambda the weight decay, c the decay mask (1
for matrices, 0 for biases, LayerNorm, tokens and positions):

    SGD      g <- g + lambda c theta;  m <- mu m + g;  theta <- theta - eta m
    Adam     g <- g + lambda c theta;  m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;
             theta <- theta - eta (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)    (Kingma & Ba 2014, arXiv:1412.6980)
    AdamW    the same with theta <- theta - eta lambda c theta instead of decay in g
                                                                (Loshchilov & Hutter 2017, arXiv:1711.05101)

An optimiser is its settings, its state vectors and its step count; `step` updates the parameters in place.
Vectors are worked through in pieces that stay in the processor's cache, since each formula reads them several
times.
"""

from __future__ import annotations

import math

from minivit.backend import array_module
from minivit.errors import InputError

PIECE = 16384  # elements: five float32 vectors of this length fit an L2 cache of 512 KiB


def _pieces(flat):
    """Slices that cover a flat vector: cache-sized on the CPU, one on a GPU, where each would be a launch."""
    piece = PIECE if type(flat).__module__ == "numpy" else max(flat.size, 1)
    return [slice(start, start + piece) for start in range(0, flat.size, piece)]


class SGD:
    """Stochastic gradient descent with momentum, and L2 weight decay on the masked entries.

    Shapes  flat, grad, decay_mask, and the state "momentum": (n,)
    """

    def __init__(self, flat, decay_mask, *, momentum=0.9, weight_decay=0.0):
        self.momentum, self.weight_decay, self.decay_mask = momentum, weight_decay, decay_mask
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
            theta -= lr * m


class Adam:
    """Adam, with weight decay added to the gradient (L2) on the masked entries.

    Shapes  flat, grad, decay_mask, and the states "m" and "v": (n,)
    """

    decoupled = False

    def __init__(self, flat, decay_mask, *, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        self.betas, self.eps, self.weight_decay, self.decay_mask = betas, eps, weight_decay, decay_mask
        xp = array_module(flat)
        self.state = {"m": xp.zeros_like(flat), "v": xp.zeros_like(flat)}
        self.steps = 0

    def step(self, flat, grad, lr):
        """Update ``flat`` in place from the gradient."""
        xp = array_module(flat, grad)
        self.steps += 1
        beta1, beta2 = self.betas
        correction1 = 1.0 - beta1**self.steps
        correction2 = math.sqrt(1.0 - beta2**self.steps)
        for piece in _pieces(flat):
            theta, g, m, v = flat[piece], grad[piece], self.state["m"][piece], self.state["v"][piece]
            if self.weight_decay:
                decay = self.decay_mask[piece] * theta
                if self.decoupled:
                    theta -= lr * self.weight_decay * decay
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
            update *= lr / correction1
            theta -= update


class AdamW(Adam):
    """Adam with decoupled weight decay: the decay shrinks the parameters directly and never enters m or v."""

    decoupled = True


OPTIMIZERS = ("adamw", "adam", "sgd")


def make_optimizer(name, flat, decay_mask, *, momentum=0.9, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0):
    """An optimiser by name; each takes the settings that concern it.

    Raises  InputError: unknown name.
    """
    if name == "sgd":
        return SGD(flat, decay_mask, momentum=momentum, weight_decay=weight_decay)
    if name in ("adam", "adamw"):
        kind = Adam if name == "adam" else AdamW
        return kind(flat, decay_mask, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay)
    raise InputError(f"optimizer must be one of {', '.join(OPTIMIZERS)}; got {name!r}")


SCHEDULES = ("cosine", "linear", "constant")


def learning_rate(step, total_steps, *, lr, schedule="cosine", warmup_steps=0, final_lr=0.0):
    """The learning rate of a step, counted from 0.

    Math    warm-up: lr (step + 1) / (warmup_steps + 1);
            after it, with p = (step - warmup) / (total - warmup) in [0, 1),
            cosine: final + (lr - final) (1 + cos(pi p)) / 2;  linear: lr + (final - lr) p;  constant: lr
    Raises  InputError: unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise InputError(f"schedule must be one of {', '.join(SCHEDULES)}; got {schedule!r}")
    if step < warmup_steps:
        return lr * (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return lr
    p = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    if schedule == "linear":
        return lr + (final_lr - lr) * p
    return final_lr + (lr - final_lr) * (1.0 + math.cos(math.pi * p)) / 2.0


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
