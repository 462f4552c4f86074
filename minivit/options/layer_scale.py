r"""LayerScale: a learned factor for each entry of a residual branch (Touvron et al. 2021, arXiv:2103.17239).

Forward
    With f the branch, each of its D entries is multiplied by a number of its own, the same for all tokens:

        z' = z + y,      y_j = gamma_j f_j(z).

    gamma starts at a small number (0.1 for up to 18 blocks, 1e-5 to 24, 1e-6 beyond), so that each block starts near
    the identity and takes part as far as training wants it to: deep models train that do not otherwise.

Backward
    y = diag(gamma) x is linear in each of its two factors:

        dx_j = gamma_j dy_j,      dgamma_j = sum_rows x_j dy_j      (gamma is shared by all rows: a sum over them).
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

    Math    y_j = gamma_j x_j
    Shapes  x (..., D), gamma (D,)  ->  y (..., D)
    Cache   x, gamma
    Source  arXiv:2103.17239
    """
    return x * gamma, LayerScaleCache(x, gamma)


@accelerated
def layer_scale_backward(dy, cache):
    """Backward of `layer_scale_forward`.

    Math    dx = gamma dy,  dgamma = sum x dy
    Shapes  dy (..., D)  ->  dx (..., D), dgamma (D,)
    """
    x, gamma = cache
    product = (dy * x).reshape(-1, len(gamma))  # (rows, D)
    # y = x * gamma
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
