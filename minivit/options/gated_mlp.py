r"""Gated MLP, SwiGLU (Shazeer 2020, arXiv:2002.05202): one half of the hidden layer is a gate for the other.

Forward
    The MLP is that of `minivit.layers.mlp` with another activation. Its first linear map makes gate and value side by
    side, M numbers each; the gate goes through SiLU and is multiplied with the value:

        hidden = x @ W1 + b1                 (N, 2M)   read as [gate, value]
        p      = silu(gate) * value          (N, M)    silu(g) = g * s(g),  s(g) = 1 / (1 + exp(-g))
        y      = p @ W2 + b2                 (N, D)

    The first and the last line are linear maps; the second one is what stands here. With 2M = ``mlp_dim`` the MLP has
    3 * D * M weights, 3/4 of a plain MLP's 4 * D * M: take mlp_dim 4/3 times as large for as many.

Backward, entry by entry; dp is given, every product is elementwise

        p = silu(gate) * value      =>   dsilu = dp * value                   dvalue = dp * silu(gate)

    s(g) = 1 / (1 + exp(-g)) has the derivative exp(-g) / (1 + exp(-g))^2 = s * (1 - s), since
    exp(-g) / (1 + exp(-g)) = 1 - s. By the product rule silu'(g) = s + g * s * (1 - s), so

        silu(gate) = gate * s       =>   dgate = dsilu * (s + gate * s * (1 - s))

        hidden = [gate, value]      =>   dhidden = [dgate, dvalue]

Example: the gate is 0, the value 4
    >>> import numpy as np
    >>> p, cache = swiglu_forward(np.array([[0.0, 4.0]]))
    >>> p.tolist()                                                # silu(0) = 0 lets nothing through
    [[0.0]]
    >>> swiglu_backward(np.array([[1.0]]), cache).tolist()        # but its slope is 1/2: the gate learns
    [[2.0, 0.0]]
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from minivit.base.backend import accelerated, array_module
from minivit.base.errors import InputError
from minivit.base.pairs import Pair
from minivit.base.params import dense, normal, xavier_uniform
from minivit.base.settings import check_choice, setting
from minivit.options.option import Option

MLPS = ("gelu", "swiglu")


class SwigluCache(NamedTuple):
    """What `swiglu_backward` reads."""

    gate: Any  # (..., M)
    value: Any  # (..., M)
    s: Any  # (..., M)  1 / (1 + exp(-gate))


@accelerated
def swiglu_forward(hidden):
    """One half of the hidden numbers, through SiLU, times the other half.

    Math    [gate, value] = hidden;  p = silu(gate) * value
    Shapes  hidden (..., 2M)  ->  p (..., M)
    Cache   gate, value, the sigmoid of the gate
    Source  arXiv:2002.05202, Eq. 6
    """
    M = hidden.shape[-1] // 2
    gate, value = hidden[..., :M], hidden[..., M:]  # (..., M) each
    s = 0.5 * (1.0 + array_module(hidden).tanh(0.5 * gate))  # the sigmoid, without an overflow
    p = gate * s * value  # (..., M)
    return p, SwigluCache(gate, value, s)


@accelerated
def swiglu_backward(dp, cache):
    """Backward of `swiglu_forward`.

    Math    dvalue = dp * silu(gate);  dgate = dp * value * (s + gate * s * (1 - s));  dhidden = [dgate, dvalue]
    Shapes  dp (..., M)  ->  dhidden (..., 2M)
    """
    gate, value, s = cache
    # p = silu(gate) * value
    dvalue = dp * (gate * s)
    dsilu = dp * value
    # silu(gate) = gate * s, s = 1 / (1 + exp(-gate)), whose derivative is s * (1 - s)
    dgate = dsilu * (s + gate * s * (1.0 - s))
    # hidden = [gate, value]
    return array_module(dp).concatenate([dgate, dvalue], axis=-1)  # (..., 2M)


SWIGLU = Pair(swiglu_forward, swiglu_backward, about={"mlp": "swiglu"})


@dataclass(frozen=True)
class Settings:
    """Fields of the configuration."""

    mlp: str = setting("gelu", 'MLP of the blocks: "gelu" (the paper\'s) or "swiglu" (gated, mlp_dim / 2 gates)')


def check(config):
    """Raises InputError for another MLP, or for settings that a gated one does not follow."""
    check_choice(config, "mlp", MLPS)
    if config.mlp == "swiglu" and config.mlp_dim % 2:
        raise InputError(f'mlp "swiglu" halves mlp_dim, which must be even, got {config.mlp_dim}')
    if config.mlp == "swiglu" and config.gelu != "tanh":
        raise InputError(f'mlp "swiglu" has no GELU, so gelu "{config.gelu}" would do nothing: leave it out')


def rows(config):
    """fc1 makes gate and value, fc2 reads half as many numbers."""
    D, M = config.width, config.mlp_dim
    if config.mlp != "swiglu":
        return {}
    fc1 = dense("mlp.fc1", D, M, xavier_uniform(D, M // 2), normal(1e-6))
    return {"mlp": fc1 + dense("mlp.fc2", M // 2, D, xavier_uniform(M // 2, D), normal(1e-6))}


def activation(pair, config, place):
    """The gate in the place of GELU."""
    return SWIGLU if config.mlp == "swiglu" else pair


OPTION = Option(Settings, check, rows, activation=activation)
