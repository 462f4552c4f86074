r"""Moving average of the weights, which is often better than the last weights (Polyak & Juditsky 1992).

    d_t     = min(decay, (1 + t) / (10 + t))
    average <- average + (1 - d_t) * (theta - average),      which is d_t * average + (1 - d_t) * theta

The average begins as the initial weights. The first d_t are small, d_1 = 2/11, d_2 = 3/12, ..., so that it forgets
them; they grow until they reach ``decay`` (0.999 at t = 8,990).

Example: the weight jumps from 0 to 1
    >>> import numpy as np
    >>> ema = EMA(np.zeros(1), decay=0.999)
    >>> ema.update(np.ones(1))
    >>> ema.flat.round(4).tolist()                        # 9/11 of the new weight, d_1 = 2/11 of the old one
    [0.8182]
"""

from __future__ import annotations

from minivit.optim.optimizer import pieces


class EMA:
    """Exponential moving average of the weights.

    Shapes  flat (n,), the average; it begins as a copy of the weights
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
        for piece in pieces(flat):
            average = self.flat[piece]
            # average <- average + (1 - d_t) * (theta - average)
            average += (1.0 - d) * (flat[piece] - average)
