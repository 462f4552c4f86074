r"""Lion, "evolved sign momentum" (Chen et al. 2023, arXiv:2302.06675, algorithm 2).

    u     <- sign(b1 * m + (1 - b1) * g)         the direction: +1, -1 or 0 for each entry
    theta <- theta - eta * (u + lambda * mask * theta)
    m     <- b2 * m + (1 - b2) * g               a moving average of the gradient, from 0

Every entry moves by the same length eta, whatever its gradient: with b1 = 0.9, m = 0.2 and g = -1 the average is
0.9 * 0.2 + 0.1 * (-1) = 0.08, and the entry moves down, as its past gradients say. The newest gradient counts for
1 - b1 = 0.1 of the direction, but for 1 - b2 = 0.01 of the memory m. One state vector is kept, where Adam keeps two.

The letters are explained in `minivit.optim.optimizer`.

Example: the numbers above, and b2 = 0.99
    >>> import numpy as np
    >>> theta = np.zeros(1)
    >>> lion = Lion(theta, np.ones(1), betas=(0.9, 0.99))
    >>> lion.state["m"][:] = 0.2
    >>> lion.step(theta, np.array([-1.0]), lr=0.01)
    >>> theta.round(9).tolist(), lion.state["m"].round(9).tolist()            # m = 0.99 * 0.2 + 0.01 * (-1)
    ([-0.01], [0.188])
"""

from __future__ import annotations

from minivit.base.backend import array_module
from minivit.optim.optimizer import Optimizer


class Lion(Optimizer):
    """Every entry moves by the same length, in the direction of the sign of an average of gradients.

    Its steps are longer than AdamW's: a learning rate 3 to 10 times lower suits it, and a weight decay 3 to 10 times
    higher.
    Shapes  flat, grad, decay_mask, scale, and the state "m": (n,)
    """

    vectors = ("m",)

    def __init__(self, flat, decay_mask, *, betas=(0.9, 0.99), weight_decay=0.0, scale=None):
        Optimizer.__init__(self, flat, decay_mask, weight_decay=weight_decay, scale=scale)
        self.betas = betas

    def update(self, flat, grad, lr, piece):
        """The equations above, for a piece of the entries."""
        xp = array_module(flat, grad)
        beta1, beta2 = self.betas
        theta, g, m = flat[piece], grad[piece], self.state["m"][piece]  # views of theta and m are written to
        # u <- sign(b1 * m + (1 - b1) * g)
        u = xp.sign(beta1 * m + (1.0 - beta1) * g)
        # theta <- theta - eta * (u + lambda * mask * theta)
        if self.weight_decay:
            u += self.weight_decay * (self.decay_mask[piece] * theta)
        theta -= self.rate(lr, piece) * u
        # m <- b2 * m + (1 - b2) * g
        m *= beta2
        m += (1.0 - beta2) * g
