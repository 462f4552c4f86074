r"""Adam (Kingma & Ba 2014, arXiv:1412.6980) and AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101).

Two moving averages, both from 0, hold the mean of the gradient and the mean of its square:

    m <- b1 * m + (1 - b1) * g           first moment
    v <- b2 * v + (1 - b2) * g * g       second moment

Because they begin at 0, they are too small at first. If g were the same at every step,

    m_1 = (1 - b1) * g,    m_2 = b1 * m_1 + (1 - b1) * g = (1 - b1) * (1 + b1) * g,    ...,
    m_t = (1 - b1) * (1 + b1 + ... + b1^(t-1)) * g = (1 - b1^t) * g,    and v_t = (1 - b2^t) * g * g,

by the sum of a geometric series, so that a division makes up for it (the bias correction):

    mhat = m / (1 - b1^t)                vhat = v / (1 - b2^t)

    theta <- theta - eta * mhat / (sqrt(vhat) + eps)

At the first step mhat = g and vhat = g * g: with g = 0.5, eta = 0.001 and eps = 1e-8, the parameter moves by
0.001 * 0.5 / (0.5 + 1e-8) = 0.001. The length of a step does not depend on the length of the gradient.

The two differ in the weight decay alone:

    Adam     g     <- g + lambda * mask * theta              before the averages, which it enters
    AdamW    theta <- theta - eta * lambda * mask * theta    beside them ("decoupled"): every weight shrinks alike,
                                                             also where v is large

The letters are explained in `minivit.optim.optimizer`.

Example: a small and a large gradient make the same step
    >>> import numpy as np
    >>> theta = np.zeros(2)
    >>> adam = AdamW(theta, np.ones(2))
    >>> adam.step(theta, np.array([0.5, -50.0]), lr=0.001)
    >>> theta.round(9).tolist()
    [-0.001, 0.001]
"""

from __future__ import annotations

import math

from minivit.base.backend import array_module
from minivit.optim.optimizer import Optimizer


class Adam(Optimizer):
    """Adam, with weight decay added to the gradient (L2) on the masked entries.

    Shapes  flat, grad, decay_mask, scale, and the states "m" and "v": (n,)
    """

    vectors = ("m", "v")
    decoupled = False  # whether the weight decay stays out of the gradient

    def __init__(self, flat, decay_mask, *, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, scale=None):
        Optimizer.__init__(self, flat, decay_mask, weight_decay=weight_decay, scale=scale)
        self.betas, self.eps = betas, eps

    def update(self, flat, grad, lr, piece):
        """The equations above, for a piece of the entries."""
        xp = array_module(flat, grad)
        beta1, beta2 = self.betas
        correction1 = 1.0 - beta1**self.steps  # 1 - b1^t
        correction2 = math.sqrt(1.0 - beta2**self.steps)  # the root of 1 - b2^t
        theta, g = flat[piece], grad[piece]
        m, v = self.state["m"][piece], self.state["v"][piece]  # views, as theta: written in place
        rate = self.rate(lr, piece)
        if self.weight_decay:
            decay = self.decay_mask[piece] * theta
            if self.decoupled:
                # AdamW: theta <- theta - eta * lambda * mask * theta
                theta -= rate * self.weight_decay * decay
            else:
                # Adam: g <- g + lambda * mask * theta
                g = g + self.weight_decay * decay
        # m <- b1 * m + (1 - b1) * g
        m *= beta1
        m += (1.0 - beta1) * g
        # v <- b2 * v + (1 - b2) * g * g
        v *= beta2
        v += (1.0 - beta2) * (g * g)
        # sqrt(vhat) + eps, where sqrt(vhat) = sqrt(v) / sqrt(1 - b2^t)
        denominator = xp.sqrt(v)
        denominator /= correction2
        denominator += self.eps
        # theta <- theta - eta * mhat / (sqrt(vhat) + eps), where mhat = m / (1 - b1^t)
        change = m / denominator
        change *= rate / correction1
        theta -= change


class AdamW(Adam):
    """Adam with decoupled weight decay: the decay shrinks the parameters directly and never enters m or v."""

    decoupled = True
