r"""Gated MLP, SwiGLU (Shazeer 2020, arXiv:2002.05202): one half of the hidden layer opens and closes the other.

Forward
    One linear map makes gate and value side by side, each M numbers; the gate goes through SiLU and multiplies:

        hidden  = x @ W1 + b1             (N, 2M)   read as [gate, value]
        opening = silu(gate)              (N, M)    silu(g) = g * s(g),  s(g) = 1 / (1 + exp(-g))
        p       = opening * value         (N, M)
        y       = p @ W2 + b2             (N, D)

    It has 3 * D * M weights; a plain MLP of M' hidden numbers has 2 * D * M', as many where M' = 3/2 * M.

Backward, the same lines from the last to the first; dy (N, D) is given

        y = p @ W2 + b2             =>   dp = dy @ W2^T        dW2 = p^T @ dy        db2 = column_sum(dy)

        p = opening * value         =>   dopening = dp * value                dvalue = dp * opening

    s(g) = 1 / (1 + exp(-g)) has the derivative exp(-g) / (1 + exp(-g))^2 = s * (1 - s), since
    exp(-g) / (1 + exp(-g)) = 1 - s. By the product rule silu'(g) = s + g * s * (1 - s), so

        opening = silu(gate)        =>   dgate = dopening * (s + gate * s * (1 - s))

        hidden = [gate, value]      =>   dhidden = [dgate, dvalue]

        hidden = x @ W1 + b1        =>   dx = dhidden @ W1^T   dW1 = x^T @ dhidden   db1 = column_sum(dhidden)

Example
    >>> import numpy as np
    >>> W1, W2 = np.array([[0.0, 1.0]]), np.array([[1.0]])        # the gate is 0, the value is x
    >>> y, cache = gated_mlp_forward(np.array([[4.0]]), W1, np.zeros(2), W2, np.zeros(1))
    >>> y.tolist()                                                # silu(0) = 0 stops it
    [[0.0]]
    >>> dx, dW1, *_ = gated_mlp_backward(np.array([[1.0]]), cache)
    >>> dx.tolist(), dW1.tolist()                                 # but its slope is 1/2: the gate learns
    ([[0.0]], [[8.0, 0.0]])
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from minivit.base.backend import accelerated, array_module
from minivit.base.errors import InputError
from minivit.base.pairs import Pair
from minivit.base.params import ParameterSpec, normal, xavier_uniform
from minivit.base.settings import check_choice, setting
from minivit.layers.linear import LinearCache, linear_backward, linear_forward
from minivit.layers.mlp import MLP_NAMES
from minivit.options.option import Option

MLPS = ("gelu", "swiglu")


class GatedMLPCache(NamedTuple):
    """What `gated_mlp_backward` reads."""

    fc1: LinearCache
    gate: Any  # (..., M)
    value: Any  # (..., M)
    s: Any  # (..., M)  1 / (1 + exp(-gate))
    fc2: LinearCache


@accelerated
def gated_mlp_forward(x, W1, b1, W2, b2):
    """Two linear maps with a gate between them.

    Math    [gate, value] = x @ W1 + b1;  y = (silu(gate) * value) @ W2 + b2
    Shapes  x (..., D), W1 (D, 2M), b1 (2M,), W2 (M, D), b2 (D,)  ->  y (..., D)
    Cache   of both linear maps, gate, value, the sigmoid of the gate
    Source  arXiv:2002.05202, Eq. 6
    """
    xp, M = array_module(x), W2.shape[0]
    hidden, fc1_cache = linear_forward(x, W1, b1)  # (..., 2M)
    gate, value = hidden[..., :M], hidden[..., M:]  # (..., M) each
    s = 0.5 * (1.0 + xp.tanh(0.5 * gate))  # the sigmoid, without an overflow
    opening = gate * s  # (..., M)
    y, fc2_cache = linear_forward(opening * value, W2, b2)  # (..., D)
    return y, GatedMLPCache(fc1_cache, gate, value, s, fc2_cache)


@accelerated
def gated_mlp_backward(dy, cache):
    """Backward of `gated_mlp_forward`.

    Math    dp = dy @ W2^T;  dvalue = dp * opening;  dgate = dp * value * (s + gate * s * (1 - s));
            dW2, db2 and dx, dW1, db1 are those of the linear maps
    Shapes  dy (..., D)  ->  dx (..., D), dW1 (D, 2M), db1 (2M,), dW2 (M, D), db2 (D,)
    """
    gate, value, s = cache.gate, cache.value, cache.s
    # y = p @ W2 + b2
    dp, dW2, db2 = linear_backward(dy, cache.fc2)  # (..., M)
    # p = opening * value, opening = gate * s
    dvalue = dp * (gate * s)
    dopening = dp * value
    # opening = gate * s, s = 1 / (1 + exp(-gate)), whose derivative is s * (1 - s)
    dgate = dopening * (s + gate * s * (1.0 - s))
    # hidden = x @ W1 + b1, hidden = [gate, value]
    dhidden = array_module(dy).concatenate([dgate, dvalue], axis=-1)  # (..., 2M)
    dx, dW1, db1 = linear_backward(dhidden, cache.fc1)  # (..., D)
    return dx, dW1, db1, dW2, db2


@dataclass(frozen=True)
class Settings:
    """Fields of the configuration."""

    mlp: str = setting("gelu", 'MLP of the blocks: "gelu" (the paper\'s) or "swiglu" (gated, mlp_dim / 2 gates)')


def check(config):
    """Raises InputError for another MLP, or one that cannot be halved."""
    check_choice(config, "mlp", MLPS)
    if config.mlp == "swiglu" and config.mlp_dim % 2:
        raise InputError(f'mlp "swiglu" halves mlp_dim, which must be even, got {config.mlp_dim}')


def rows(config):
    """fc1 makes gate and value, fc2 reads half as many numbers."""
    D, M = config.width, config.mlp_dim
    if config.mlp != "swiglu":
        return {}
    shapes = ((D, M), (M,), (M // 2, D), (D,))
    inits = (xavier_uniform(D, M // 2), normal(1e-6), xavier_uniform(M // 2, D), normal(1e-6))
    return {
        "mlp": [
            ParameterSpec(name, shape, init, len(shape) == 2)
            for name, shape, init in zip(MLP_NAMES, shapes, inits, strict=True)
        ]
    }


def mlp(pair, config, place):
    """The gated MLP in the plain one's place."""
    return Pair(gated_mlp_forward, gated_mlp_backward, MLP_NAMES, {"mlp": "swiglu"}) if config.mlp == "swiglu" else pair


OPTION = Option(Settings, check, rows, mlp=mlp)
