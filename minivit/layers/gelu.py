r"""GELU, the Gaussian error linear unit (Hendrycks & Gimpel 2016, arXiv:1606.08415), in its two forms.

Forward
    exact        y = x Phi(x),  Phi(x) = (1 + erf(x / sqrt 2)) / 2                       (timm and PyTorch's default)
    tanh form    y = x/2 (1 + t),  t = tanh(u),  u = sqrt(2/pi) (x + 0.044715 x^3)       (the official ViT code)

    They differ by up to 4.7e-4 (at |x| = 2.7): small, but weights trained with one are not evaluated with the
    other.

Backward
    exact        dy/dx = Phi(x) + x phi(x),  phi(x) = exp(-x^2 / 2) / sqrt(2 pi)
    tanh form    dy/dx = (1 + t)/2 + x/2 (1 - t^2) u',  u' = sqrt(2/pi) (1 + 3 * 0.044715 x^2)

    using d tanh(u) = (1 - t^2) du. Each form's backward is the derivative of that form. t (or Phi) is the
    dear part of the forward, so it is kept; the polynomials are cheap and computed again.
"""

import math
from typing import Any, NamedTuple

from minivit.base.backend import array_module, erf

SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)
CUBIC = 0.044715
SQRT_HALF = math.sqrt(0.5)
INV_SQRT_2PI = 1.0 / math.sqrt(2.0 * math.pi)
KINDS = ("tanh", "erf")


class GeluCache(NamedTuple):
    """What `gelu_backward` reads: the input and the gate's inner function, and which form it was."""

    x: Any  # (...)
    gate: Any  # (...)  t = tanh(u), or Phi(x)
    kind: str


def gelu_forward(x, *, kind="tanh"):
    """Gaussian error linear unit, elementwise.

    Math    "tanh": y = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)));  "erf": y = x Phi(x)
    Shapes  x (...)  ->  y (...)
    Cache   x, and tanh(u) or Phi(x)
    Raises  ValueError: kind is neither; ImportError: "erf" without SciPy.
    """
    if kind not in KINDS:
        raise ValueError(f'gelu kind must be "tanh" or "erf", got {kind!r}')
    xp = array_module(x)
    if kind == "erf":
        gate = erf(x * SQRT_HALF)
        gate += 1.0
        gate *= 0.5  # Phi(x)
        return x * gate, GeluCache(x, gate, kind)
    u = x * x  # u = sqrt(2/pi) (x + 0.044715 x^3), in Horner's form: x**3 would call pow
    u *= SQRT_2_OVER_PI * CUBIC
    u += SQRT_2_OVER_PI
    u *= x
    gate = xp.tanh(u, out=u)  # t
    y = gate + 1.0
    y *= x
    y *= 0.5
    return y, GeluCache(x, gate, kind)


def gelu_backward(dy, cache):
    """Backward of `gelu_forward`.

    Math    dx = dy dy/dx;  "tanh": dy/dx = (1 + t)/2 + x/2 (1 - t^2) u';  "erf": dy/dx = Phi(x) + x phi(x)
    Shapes  dy (...)  ->  dx (...)
    """
    x, gate, kind = cache
    xp = array_module(x)
    if kind == "erf":
        # y = x Phi(x)  =>  dy/dx = Phi(x) + x phi(x)
        dx = x * x
        dx *= -0.5
        xp.exp(dx, out=dx)
        dx *= INV_SQRT_2PI  # phi(x)
        dx *= x
        dx += gate
        dx *= dy
        return dx
    # u = sqrt(2/pi) (x + 0.044715 x^3)  =>  u' = sqrt(2/pi) (1 + 3 * 0.044715 x^2)
    dx = x * x
    dx *= 3.0 * SQRT_2_OVER_PI * CUBIC
    dx += SQRT_2_OVER_PI
    # t = tanh(u)  =>  dt/dx = (1 - t^2) u'
    dtanh = gate * gate
    dtanh -= 1.0  # -(1 - t^2)
    dx *= dtanh
    # y = x/2 (1 + t)  =>  dy/dx = (1 + t)/2 + x/2 dt/dx
    dx *= x
    dx -= gate
    dx -= 1.0  # -2 dy/dx
    dx *= -0.5
    dx *= dy
    return dx


def gelu_jvp(xdot, cache):
    """Forward-mode derivative of `gelu_forward`, line by line: it shares no derivative with the backward.

    Math    "tanh": udot = sqrt(2/pi) (xdot + 0.044715 * 3 x^2 xdot), tdot = (1 - t^2) udot,
            ydot = (xdot (1 + t) + x tdot) / 2;  "erf": ydot = xdot Phi(x) + x Phidot
    Shapes  xdot (...)  ->  ydot (...)
    """
    x, gate, kind = cache
    xp = array_module(x)
    if kind == "erf":
        # Phi = (1 + erf(s)) / 2 with s = x / sqrt 2, and erf'(s) = 2 exp(-s^2) / sqrt(pi)
        s, sdot = x * SQRT_HALF, xdot * SQRT_HALF
        gatedot = xp.exp(-s * s) * sdot * (1.0 / math.sqrt(math.pi))
        # y = x Phi
        return xdot * gate + x * gatedot
    # u = p x with p = sqrt(2/pi) (1 + 0.044715 x^2)
    p = SQRT_2_OVER_PI * (1.0 + CUBIC * (x * x))
    pdot = SQRT_2_OVER_PI * CUBIC * (xdot * x + x * xdot)
    udot = pdot * x + p * xdot
    # t = tanh(u)
    tdot = (1.0 - gate * gate) * udot
    # y = (1 + t) x / 2
    return 0.5 * (tdot * x + (1.0 + gate) * xdot)
