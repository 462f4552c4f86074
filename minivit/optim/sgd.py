r"""Stochastic gradient descent with momentum (Polyak 1964; Sutskever et al. 2013).

    g     <- g + lambda * mask * theta     weight decay: the gradient of lambda/2 times the sum of mask * theta^2
    m     <- mu * m + g                    the momentum m begins at 0
    theta <- theta - eta * m

With mu = 0 it is plain gradient descent. With mu = 0.9 a gradient g that stays the same gives m = g, 1.9 * g,
2.71 * g, ... and in the end g / (1 - mu) = 10 * g: directions that agree add up, those that change their sign cancel.

The letters are explained in `minivit.optim.optimizer`.

Example: a gradient that stays the same, for three steps
    >>> import numpy as np
    >>> theta, g = np.zeros(1), np.ones(1)
    >>> sgd = SGD(theta, np.ones(1), momentum=0.9)
    >>> for _ in range(3):
    ...     sgd.step(theta, g, lr=1.0)
    >>> sgd.state["momentum"].round(9).tolist(), theta.round(9).tolist()      # theta = -(1 + 1.9 + 2.71)
    ([2.71], [-5.61])
"""

from __future__ import annotations

from minivit.optim.optimizer import Optimizer


class SGD(Optimizer):
    """Gradient descent with momentum, and L2 weight decay on the masked entries.

    Shapes  flat, grad, decay_mask, scale, and the state "momentum": (n,)
    """

    vectors = ("momentum",)

    def __init__(self, flat, decay_mask, *, momentum=0.9, weight_decay=0.0, scale=None):
        Optimizer.__init__(self, flat, decay_mask, weight_decay=weight_decay, scale=scale)
        self.momentum = momentum

    def update(self, flat, grad, lr, piece):
        """The equations above, for a piece of the entries."""
        theta, g, m = flat[piece], grad[piece], self.state["momentum"][piece]  # views of theta and m are written to
        # g <- g + lambda * mask * theta
        if self.weight_decay:
            g = g + self.weight_decay * (self.decay_mask[piece] * theta)
        # m <- mu * m + g
        m *= self.momentum
        m += g
        # theta <- theta - eta * m
        theta -= self.rate(lr, piece) * m
