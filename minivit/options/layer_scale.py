r"""LayerScale: a learned factor for each entry of a residual branch (Touvron et al. 2021, arXiv:2103.17239).

Forward
    With x = f(z) the result of a branch, each of its D entries is multiplied by a number of its own, the same for all
    tokens, before it is added:

        y_j = x_j * gamma_j
        z'  = z + y

    gamma starts at a small number (0.1 for up to 18 blocks, 1e-5 to 24, 1e-6 beyond), so that each block starts near
    the identity and takes part as far as training wants it to: deep models train that do not otherwise.

Backward, for the first line; dy is given
    y_j is linear in each of its two factors: it changes with x_j at the rate gamma_j, and with gamma_j at the rate x_j.
    gamma is shared by all rows, so that its gradient is a sum over them:

        dx_j = dy_j * gamma_j                  dgamma_j = sum_rows dy_j * x_j

Example: two tokens of D = 2
    >>> import numpy as np
    >>> y, cache = layer_scale_forward(np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([0.5, 0.25]))
    >>> y.tolist()
    [[0.5, 0.5], [1.5, 1.0]]
    >>> dx, dgamma = layer_scale_backward(np.array([[1.0, 1.0], [10.0, 0.0]]), cache)
    >>> dx.tolist(), dgamma.tolist()                      # dgamma = [1 * 1 + 10 * 3, 1 * 2 + 0 * 4]
    ([[0.5, 0.25], [5.0, 0.0]], [31.0, 2.0])
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from minivit.base.backend import accelerated, column_sum
from minivit.base.pairs import Pair, chain
from minivit.base.params import ParameterSpec, constant
from minivit.base.settings import check_range, setting
from minivit.options.option import Option


class LayerScaleCache(NamedTuple):
    """What `layer_scale_backward` reads: both factors."""

    x: Any  # (..., D)
    gamma: Any  # (D,)


@accelerated
def layer_scale_forward(x, gamma):
    """Scale each entry of the rows.

    Math    y_j = x_j * gamma_j
    Shapes  x (..., D), gamma (D,)  ->  y (..., D)
    Cache   x, gamma
    Source  arXiv:2103.17239
    """
    return x * gamma, LayerScaleCache(x, gamma)


@accelerated
def layer_scale_backward(dy, cache):
    """Backward of `layer_scale_forward`.

    Math    dx = dy * gamma;  dgamma = sum_rows dy * x
    Shapes  dy (..., D)  ->  dx (..., D), dgamma (D,)
    """
    x, gamma = cache
    # y = x * gamma
    product = (dy * x).reshape(-1, len(gamma))  # (rows, D)
    dgamma = column_sum(product)
    return dy * gamma, dgamma


@dataclass(frozen=True)
class Settings:
    """Fields of the configuration."""

    layer_scale: float = setting(0.0, "LayerScale: initial factor of the residual branches; 0 for none")


def check(config):
    """Raises InputError unless the factor lies in [0, 1]."""
    check_range(config, 0.0, 1.0, "layer_scale")


def rows(config):
    """A factor for each entry of both branches, in every block."""
    if not config.layer_scale:
        return {}
    return {
        f"branch{i}": [ParameterSpec(f"ls{i}.gamma", (config.width,), constant(config.layer_scale), False)]
        for i in (1, 2)
    }


def branch(pair, config, place):
    """The branch, scaled."""
    if not config.layer_scale:
        return pair
    name = f"ls{place.branch}"
    scale = Pair(layer_scale_forward, layer_scale_backward, (f"{name}.gamma",), {"layer_scale": True})
    return chain(pair, scale, name)


OPTION = Option(Settings, check, rows, branch=branch)
