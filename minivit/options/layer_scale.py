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

from typing import Any, NamedTuple

from minivit.base.backend import column_sum


class LayerScaleCache(NamedTuple):
    """What `layer_scale_backward` reads: both factors."""

    x: Any  # (..., D)
    gamma: Any  # (D,)


def layer_scale_forward(x, gamma):
    """Scale each entry of the rows.

    Math    y_j = gamma_j x_j
    Shapes  x (..., D), gamma (D,)  ->  y (..., D)
    Cache   x, gamma
    Source  arXiv:2103.17239
    """
    return x * gamma, LayerScaleCache(x, gamma)


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


def layer_scale_jvp(xdot, gammadot, cache):
    """Forward-mode derivative of `layer_scale_forward`.

    Math    ydot = gamma xdot + gammadot x
    Shapes  xdot (..., D), gammadot (D,)  ->  ydot (..., D)
    """
    x, gamma = cache
    # y = x * gamma
    return xdot * gamma + x * gammadot
