r"""GELU in its exact form (Hendrycks & Gimpel 2016, arXiv:1606.08415; the default of timm and PyTorch).

Forward
        Phi(x) = (1 + erf(x / sqrt(2))) / 2         the probability that a normal number is below x
        y      = x * Phi(x)

    `minivit.layers.gelu` approximates Phi by a tanh, as the official ViT code does; the two differ by up to 4.7e-4.

Backward, entry by entry
    The error function is an integral, erf(u) = 2 / sqrt(pi) * (integral of exp(-s^2) over s from 0 to u), so that its
    derivative is erf'(u) = 2 / sqrt(pi) * exp(-u^2). With u = x / sqrt(2), which grows at the rate 1 / sqrt(2),

        Phi'(x) = 1/2 * erf'(u) / sqrt(2)
                = 1/2 * 2 / sqrt(pi) * exp(-x^2 / 2) / sqrt(2)
                = exp(-x^2 / 2) / sqrt(2 * pi)

    which is the density of the normal numbers. y depends on x directly and through Phi:

        dx (directly)    = dy * Phi(x)
        dx (through Phi) = dy * x * density(x),     density(x) = exp(-x^2 / 2) / sqrt(2 * pi)

    dx is the sum of both. Phi is the expensive part of the forward and is kept.

Example
    >>> import numpy as np
    >>> y, cache = exact_gelu_forward(np.array([-1.0, 0.0, 1.0]))
    >>> y.round(4).tolist()                               # the tanh form gives -0.1588, 0 and 0.8412
    [-0.1587, 0.0, 0.8413]
    >>> exact_gelu_backward(np.ones(3), cache).round(4).tolist()
    [-0.0833, 0.5, 1.0833]
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

    Math    dx = dy * (Phi(x) + x * density(x)),  density(x) = exp(-x^2 / 2) / sqrt(2 * pi)
    Shapes  dy (...)  ->  dx (...)
    """
    x, phi = cache
    # y = x * Phi(x), and Phi'(x) = density(x)
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
