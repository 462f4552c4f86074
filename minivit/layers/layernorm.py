r"""Layer normalisation of the last axis (Ba, Kiros & Hinton 2016, arXiv:1607.06450, Eq. 3-4).

Forward
    Each token is a row x of D numbers. With the row's own mean and variance,

        mean = 1/D sum_j x_j            var = 1/D sum_j (x_j - mean)^2
        rstd = (var + eps)^(-1/2)       xhat_j = (x_j - mean) rstd          y_j = xhat_j w_j + b_j.

    The variance is that of the centred row; the shorter E[x^2] - E[x]^2 cancels in float32 when the mean is
    large.

Backward
    w and b are shared by all rows, so their gradients are sums over the rows:

        dw_j = sum_rows dy_j xhat_j,      db_j = sum_rows dy_j,      dxhat_j = dy_j w_j.

    For dx, let xc = x - mean. From xhat = xc rstd, with all means over j,

        dxc_i  = dxhat_i rstd + (d rstd / d xc_i) sum_j dxhat_j xc_j
        d rstd / d xc_i = -1/2 rstd^3 (2 xc_i / D) = -rstd^2 xhat_i / D
        so  dxc_i = rstd (dxhat_i - xhat_i mean(dxhat xhat)),

    and from xc = x - mean(x), whose Jacobian I - 1/D 1 1^T only removes the mean, dx_i = dxc_i - mean(dxc).
    The mean of xhat is 0, hence

        dx = rstd (dxhat - mean(dxhat) - xhat mean(dxhat xhat)).

    In words: the two directions that the forward pass removes, a common shift and (but for eps) a common scale,
    get no gradient.
"""

from typing import Any, NamedTuple

from minivit.base.backend import accelerated, array_module, row_mean


class LayerNormCache(NamedTuple):
    """What `layernorm_backward` reads: x itself is not needed, xhat is."""

    xhat: Any  # (..., D)
    rstd: Any  # (..., 1)
    w: Any  # (D,)


@accelerated
def layernorm_forward(x, w, b, *, eps=1e-6):
    """Normalise each row to mean 0 and variance 1, then scale and shift.

    Math    xhat = (x - mean) / sqrt(var + eps),  y = xhat w + b
    Shapes  x (..., D), w (D,), b (D,)  ->  y (..., D)
    Cache   xhat (..., D), rstd (..., 1), w
    Source  arXiv:1607.06450; eps = 1e-6 as in the official ViT code.
    """
    xc = x - row_mean(x)  # (..., D)
    var = row_mean(xc * xc)  # (..., 1)
    rstd = (var + eps) ** -0.5
    xhat = xc
    xhat *= rstd  # in place: xc is ours and not read again
    y = xhat * w
    y += b
    return y, LayerNormCache(xhat, rstd, w)


@accelerated
def layernorm_backward(dy, cache):
    """Backward of `layernorm_forward`.

    Math    dw = sum dy xhat,  db = sum dy,  dxhat = dy w,
            dx = rstd (dxhat - mean(dxhat) - xhat mean(dxhat xhat))
    Shapes  dy (..., D)  ->  dx (..., D), dw (D,), db (D,)
    """
    xhat, rstd, w = cache
    D = dy.shape[-1]
    # y = xhat * w + b
    product = dy * xhat  # (..., D)
    ones = array_module(dy).ones(dy.size // D, dy.dtype)  # sums over rows as products: quicker than sum(axis=0)
    db = ones @ dy.reshape(-1, D)
    dw = ones @ product.reshape(-1, D)
    dxhat = dy * w  # (..., D)
    # xhat = (x - mean(x)) * rstd, where rstd depends on x too
    product *= w  # = dxhat * xhat
    dx = dxhat
    dx -= row_mean(dxhat)
    dx -= xhat * row_mean(product)
    dx *= rstd
    return dx, dw, db


def layernorm_jvp(xdot, wdot, bdot, cache):
    """Forward-mode derivative of `layernorm_forward`.

    Math    xcdot = xdot - mean(xdot);  xhatdot = rstd (xcdot - xhat mean(xhat xcdot));
            ydot = xhatdot w + xhat wdot + bdot
    Shapes  xdot (..., D), wdot (D,), bdot (D,)  ->  ydot (..., D)
    """
    xhat, rstd, w = cache
    # xhat = (x - mean(x)) * rstd, where rstd depends on x too
    xcdot = xdot - row_mean(xdot)
    xhatdot = rstd * (xcdot - xhat * row_mean(xhat * xcdot))
    # y = xhat * w + b
    return xhatdot * w + xhat * wdot + bdot
