r"""The MLP of an encoder block: two linear maps with a GELU between them, applied to each token alone (Eq. 3).

Forward
        hidden = x @ W1 + b1          (N, M)    M = 4 D in the paper's models
        active = gelu(hidden)         (N, M)
        y      = active @ W2 + b2     (N, D)

Backward
    The chain rule through the same three lines in reverse order. Each token goes alone; only the gradients of the
    weights and biases, which all tokens share, are sums over the tokens.

Example: one token, D = M = 1
    >>> import numpy as np
    >>> one, zero = np.ones((1, 1)), np.zeros(1)
    >>> y, cache = mlp_forward(one, one, zero, 2 * one, zero)
    >>> y.round(4).tolist()                               # 2 * gelu(1)
    [[1.6824]]
    >>> dx, dW1, db1, dW2, db2 = mlp_backward(one, cache)
    >>> dx.round(4).tolist(), dW2.round(4).tolist()       # 2 * gelu'(1), gelu(1)
    ([[2.1659]], [[0.8412]])
"""

from typing import Any, NamedTuple

from minivit.base.backend import accelerated
from minivit.base.pairs import Pair
from minivit.layers.gelu import GELU
from minivit.layers.linear import LinearCache, linear_backward, linear_forward

MLP_NAMES = ("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias")


class MLPCache(NamedTuple):
    """What `mlp_backward` reads: the caches of its three lines."""

    fc1: LinearCache
    activation: Any  # by default a `GeluCache`
    fc2: LinearCache


@accelerated
def mlp_forward(x, W1, b1, W2, b2, *, activation=GELU):
    """Two linear maps with GELU between them.

    Math    y = gelu(x @ W1 + b1) @ W2 + b2                                             (the MLP of Eq. 3)
    Shapes  x (..., D), W1 (D, M), b1 (M,), W2 (M, D), b2 (D,)  ->  y (..., D)
    Cache   of its three lines
    """
    hidden, fc1_cache = linear_forward(x, W1, b1)  # (..., M)
    active, activation_cache = activation.forward(hidden)  # (..., M)
    y, fc2_cache = linear_forward(active, W2, b2)  # (..., D)
    return y, MLPCache(fc1_cache, activation_cache, fc2_cache)


@accelerated
def mlp_backward(dy, cache, *, activation=GELU):
    """Backward of `mlp_forward`.

    Math    the three lines in reverse order, each by its own backward
    Shapes  dy (..., D)  ->  dx (..., D), dW1 (D, M), db1 (M,), dW2 (M, D), db2 (D,)
    """
    # y = active @ W2 + b2
    dactive, dW2, db2 = linear_backward(dy, cache.fc2)  # (..., M)
    # active = gelu(hidden)
    dhidden = activation.backward(dactive, cache.activation)  # (..., M)
    # hidden = x @ W1 + b1
    dx, dW1, db1 = linear_backward(dhidden, cache.fc1)  # (..., D)
    return dx, dW1, db1, dW2, db2


MLP = Pair(mlp_forward, mlp_backward, MLP_NAMES, GELU.about)
