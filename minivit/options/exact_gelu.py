r"""GELU in its exact form (Hendrycks & Gimpel 2016, arXiv:1606.08415; the default of timm and PyTorch).

Forward
    y = x * Phi(x),      Phi(x) = (1 + erf(x / sqrt 2)) / 2,      the probability that a normal number is below x.

    `minivit.layers.gelu` approximates Phi by a tanh, as the official ViT code does; the two differ by up to 4.7e-4.

Backward
    The derivative of Phi is the normal density, phi(x) = exp(-x^2 / 2) / sqrt(2 pi), so by the product rule

        dx = dy * (Phi(x) + x * phi(x)).

    Phi is the dear part of the forward and is kept.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from minivit.base.backend import accelerated, array_module, erf
from minivit.base.pairs import Pair
from minivit.base.settings import check_choice, setting
from minivit.options.option import Option

SQRT_HALF = math.sqrt(0.5)
INV_SQRT_2PI = 1.0 / math.sqrt(2.0 * math.pi)
KINDS = ("tanh", "erf")


class ExactGeluCache(NamedTuple):
    """What `exact_gelu_backward` reads."""

    x: Any  # (...)
    phi: Any  # (...)  Phi(x)


@accelerated
def exact_gelu_forward(x):
    """Gaussian error linear unit, elementwise, in its exact form.

    Math    y = x * Phi(x)
    Shapes  x (...)  ->  y (...)
    Cache   x, Phi(x)
    Raises  ImportError: SciPy is not installed.
    Source  arXiv:1606.08415
    """
    phi = 0.5 * (1.0 + erf(x * SQRT_HALF))
    return x * phi, ExactGeluCache(x, phi)


@accelerated
def exact_gelu_backward(dy, cache):
    """Backward of `exact_gelu_forward`.

    Math    dx = dy * (Phi(x) + x * phi(x)),  phi(x) = exp(-x^2 / 2) / sqrt(2 pi)
    Shapes  dy (...)  ->  dx (...)
    """
    x, phi = cache
    # y = x * phi
    density = array_module(x).exp(-0.5 * x * x) * INV_SQRT_2PI
    return dy * (phi + x * density)


EXACT_GELU = Pair(exact_gelu_forward, exact_gelu_backward, about={"gelu": "erf"})


@dataclass(frozen=True)
class Settings:
    """Fields of the configuration."""

    gelu: str = setting("tanh", 'GELU form: "tanh" (official code) or "erf" (timm)')


def check(config):
    """Raises InputError for another form."""
    check_choice(config, "gelu", KINDS)


def activation(pair, config, place):
    """The exact form, where it is wanted."""
    return EXACT_GELU if config.gelu == "erf" else pair


OPTION = Option(Settings, check, activation=activation)
