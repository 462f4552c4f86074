r"""Layer normalisation of the last axis (Ba, Kiros & Hinton 2016, arXiv:1607.06450, Eq. 3-4).

Forward
    Each token is a row x of D numbers. Its own mean is subtracted, it is divided by its own standard deviation, and
    then every entry j is scaled by w_j and shifted by b_j:

        xc_j   = x_j - mean(x)          mean(x) = (1/D) * sum_i x_i, one number for each row
        var    = mean(xc * xc)          one number for each row
        rstd   = (var + eps)^(-1/2)     one number for each row
        xhat_j = xc_j * rstd
        y_j    = xhat_j * w_j + b_j

    The variance is that of the centred row; the shorter mean(x * x) - mean(x)^2 cancels in float32 where the mean is
    large.

Backward, one line of the forward after the other, from the last to the first; dy is given

    1.  y_j = xhat_j * w_j + b_j. All rows share w and b, so their gradients are sums over the rows:

            dw_j = sum_rows dy_j * xhat_j          db_j = sum_rows dy_j          dxhat_j = dy_j * w_j

    2.  xhat_j = xc_j * rstd. Each xc_j acts on xhat_j directly, and all of them act through rstd:

            drstd = sum_j dxhat_j * xc_j           dxc_j (direct) = dxhat_j * rstd

    3.  rstd = (var + eps)^(-1/2). Its derivative by var is (-1/2) * (var + eps)^(-3/2) = (-1/2) * rstd^3:

            dvar = (-1/2) * rstd^3 * drstd

    4.  var = (1/D) * sum_i xc_i^2. Its derivative by xc_j is (2/D) * xc_j:

            dxc_j (through rstd) = dvar * (2/D) * xc_j = -(1/D) * rstd^3 * drstd * xc_j

        Now put in xc_j = xhat_j / rstd, and drstd = sum_i dxhat_i * xc_i = sum_i dxhat_i * xhat_i / rstd. Two of the
        three powers of rstd cancel, and (1/D) * sum_i is a mean:

            dxc_j (through rstd) = -rstd * xhat_j * mean(dxhat * xhat)

        Both parts together are

            dxc_j = rstd * (dxhat_j - xhat_j * mean(dxhat * xhat))

    5.  xc_j = x_j - mean(x). Each x_i is in xc_i with the factor 1, and in every xc_j with the factor -1/D:

            dx_i = dxc_i - (1/D) * sum_j dxc_j = dxc_i - mean(dxc)

        By step 4 mean(dxc) = rstd * (mean(dxhat) - mean(xhat) * mean(dxhat * xhat)), and mean(xhat) = 0, because the
        mean of xc is 0 and rstd is the same in the whole row. So

            dx = rstd * (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat))

        which the code takes as one line: all products are elementwise, and each mean is one number for each row.

    Two things that the forward ignores have no gradient: adding one number to all of a row (sum_j dx_j = 0), and, for
    eps = 0, multiplying the centred row by one number (sum_j dx_j * xhat_j = 0).

Example
    >>> import numpy as np
    >>> x, w, b = np.array([[1.0, 5.0, 3.0, 3.0]]), np.ones(4), np.zeros(4)      # mean 3, variance 2
    >>> y, cache = layernorm_forward(x, w, b, eps=0.0)
    >>> (y * 2**0.5).round(9).tolist()                    # times sqrt(2), the standard deviation: whole numbers
    [[-2.0, 2.0, 0.0, 0.0]]
    >>> dx, dw, db = layernorm_backward(np.array([[1.0, 0.0, 0.0, 0.0]]), cache)
    >>> (dx * 2**0.5).round(9).tolist()                   # 1 - 1/4 - (-sqrt(2)) * (-sqrt(2)) / 4, ...; sum 0
    [[0.25, 0.25, -0.25, -0.25]]
"""

from typing import Any, NamedTuple

from minivit.base.backend import accelerated
from minivit.layers.linear import rows


class LayerNormCache(NamedTuple):
    """What `layernorm_backward` reads: x itself is not needed, xhat is."""

    xhat: Any  # (..., D)
    rstd: Any  # (..., 1)
    w: Any  # (D,)


def mean(x):
    """The mean of each row, kept as an axis: x (..., D)  ->  (..., 1)."""
    return x.mean(axis=-1, keepdims=True)


@accelerated
def layernorm_forward(x, w, b, *, eps=1e-6):
    """Normalise each row to mean 0 and variance 1, then scale and shift it.

    Math    xhat = (x - mean) / sqrt(var + eps),  y = xhat * w + b
    Shapes  x (..., D), w (D,), b (D,)  ->  y (..., D)
    Cache   xhat (..., D), rstd (..., 1), w
    Source  arXiv:1607.06450; eps = 1e-6 as in the official ViT code.
    """
    xc = x - mean(x)  # (..., D)
    var = mean(xc * xc)  # (..., 1)
    rstd = (var + eps) ** -0.5  # (..., 1)
    xhat = xc * rstd  # (..., D)
    y = xhat * w + b  # (..., D)
    return y, LayerNormCache(xhat, rstd, w)


@accelerated
def layernorm_backward(dy, cache):
    """Backward of `layernorm_forward`.

    Math    dw = sum dy * xhat,  db = sum dy,  dxhat = dy * w,
            dx = rstd * (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat))
    Shapes  dy (..., D)  ->  dx (..., D), dw (D,), db (D,)
    """
    xhat, rstd, w = cache
    # y = xhat * w + b
    dw = rows(dy * xhat).sum(axis=0)  # (D,)
    db = rows(dy).sum(axis=0)  # (D,)
    dxhat = dy * w  # (..., D)
    # xhat = xc * rstd, rstd = (mean(xc * xc) + eps)^(-1/2), xc = x - mean(x): steps 2 to 5 of the derivation
    dx = rstd * (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat))  # (..., D)
    return dx, dw, db
