r"""The MLP of an encoder block: two linear maps with a GELU between them, applied to each token alone.

Forward
        hidden = gelu(x W1 + b1)          (N, M)    M = 4 D in the paper's models
        y      = dropout(hidden) W2 + b2  (N, D)

Backward
    The chain rule through the same steps in reverse order; nothing mixes tokens, so nothing is summed over
    them but the gradients of the shared weights.
"""

from typing import NamedTuple

from minivit.layers.dropout import DropoutCache, dropout_backward, dropout_forward, dropout_jvp
from minivit.layers.gelu import GeluCache, gelu_backward, gelu_forward, gelu_jvp
from minivit.layers.linear import LinearCache, linear_backward, linear_forward, linear_jvp


class MLPCache(NamedTuple):
    """What `mlp_backward` reads: the caches of its four steps."""

    fc1: LinearCache
    gelu: GeluCache
    dropout: DropoutCache
    fc2: LinearCache


def mlp_forward(x, W1, b1, W2, b2, *, gelu="tanh", dropout=0.0, rng=None):
    """Two-layer perceptron with GELU.

    Math    y = dropout(gelu(x W1 + b1)) W2 + b2                                        (the MLP of Eq. 3)
    Shapes  x (..., D), W1 (D, M), b1 (M,), W2 (M, D), b2 (D,)  ->  y (..., D)
    Cache   of its four steps
    """
    u, fc1_cache = linear_forward(x, W1, b1)  # (..., M)
    u, gelu_cache = gelu_forward(u, kind=gelu)
    u, dropout_cache = dropout_forward(u, rate=dropout, rng=rng)
    y, fc2_cache = linear_forward(u, W2, b2)  # (..., D)
    return y, MLPCache(fc1_cache, gelu_cache, dropout_cache, fc2_cache)


def mlp_backward(dy, cache):
    """Backward of `mlp_forward`.

    Shapes  dy (..., D)  ->  dx (..., D), dW1 (D, M), db1 (M,), dW2 (M, D), db2 (D,)
    """
    # y = u W2 + b2
    du, dW2, db2 = linear_backward(dy, cache.fc2)  # (..., M)
    # u = dropout(gelu(x W1 + b1))
    du = dropout_backward(du, cache.dropout)
    du = gelu_backward(du, cache.gelu)
    dx, dW1, db1 = linear_backward(du, cache.fc1)  # (..., D)
    return dx, dW1, db1, dW2, db2


def mlp_jvp(xdot, W1dot, b1dot, W2dot, b2dot, cache):
    """Forward-mode derivative of `mlp_forward`.

    Shapes  tangents like x, W1, b1, W2, b2  ->  ydot (..., D)
    """
    # u = dropout(gelu(x W1 + b1))
    udot = linear_jvp(xdot, W1dot, b1dot, cache.fc1)
    udot = gelu_jvp(udot, cache.gelu)
    udot = dropout_jvp(udot, cache.dropout)
    # y = u W2 + b2
    return linear_jvp(udot, W2dot, b2dot, cache.fc2)
