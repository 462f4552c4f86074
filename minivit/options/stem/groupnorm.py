r"""Group normalisation of feature maps (Wu & He 2018, arXiv:1803.08494).

Forward
    The C channels are cut into G groups of neighbours. One image's numbers of one group, n = H * W * C / G of them at
    all positions of its C / G channels, are normalised together; mean is the mean over these n numbers:

        xc   = x - mean(x)
        var  = mean(xc * xc)            rstd = (var + eps)^(-1/2)
        xhat = xc * rstd                y    = xhat * w + b,      w and b one number for each channel

    LayerNorm over a token is the case H = W = G = 1. No image sees another one, unlike in batch normalisation.

Backward, the same lines from the last to the first; dy is given

    1.  y = xhat * w + b. All images and positions share the w and b of a channel c, so their gradients are sums:

            dw_c = sum_bhw dy_bhwc * xhat_bhwc          db_c = sum_bhw dy_bhwc          dxhat_bhwc = dy_bhwc * w_c

    2.  The other lines are those of `minivit.layers.layernorm` for one row, the n numbers of a group. Its steps 2 to 5
        ask of the row only that mean is its mean, hence for each group

            dx = rstd * (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat))

    w differs within a group, so it is multiplied in before the means.

A mean over a group is the mean over its channels of their means over the positions. The latter is a product with ones;
the former has few numbers to do with.

Example: one image of two positions and two channels, which are one group of mean 3 and variance 2
    >>> import numpy as np
    >>> x, w, b = np.array([[[[1.0, 5.0], [3.0, 3.0]]]]), np.array([1.0, 10.0]), np.zeros(2)
    >>> y, cache = groupnorm_forward(x, w, b, groups=1, eps=0.0)
    >>> (y * 2**0.5).round(9).tolist()                    # the second channel is scaled by 10
    [[[[-2.0, 20.0], [0.0, 0.0]]]]
    >>> dx, dw, db = groupnorm_backward(np.array([[[[1.0, 0.0], [0.0, 0.0]]]]), cache)
    >>> (dx * 2**0.5).round(9).tolist()                   # as in the example of LayerNorm; they sum to 0
    [[[[0.25, 0.25], [-0.25, -0.25]]]]
"""

from typing import Any, NamedTuple

from minivit.base.backend import accelerated, array_module, column_sum, matmul


class GroupNormCache(NamedTuple):
    """What `groupnorm_backward` reads."""

    xhat: Any  # (B, H, W, C)
    rstd: Any  # (B, 1, 1, C), the same for all channels of a group
    w: Any  # (C,)
    groups: int


def _group_mean(x, groups):
    """Each image's mean over its positions and over the channels of a group: (B, H, W, C) -> (B, 1, 1, C)."""
    xp = array_module(x)
    B, H, W, C = x.shape
    means = matmul(xp.full(H * W, 1.0 / (H * W), x.dtype), x.reshape(B, H * W, C))  # (B, C)
    means = means.reshape(B, groups, C // groups).mean(axis=2, keepdims=True)  # (B, G, 1)
    return xp.broadcast_to(means, (B, groups, C // groups)).reshape(B, 1, 1, C)


@accelerated
def groupnorm_forward(x, w, b, *, groups=32, eps=1e-6):
    """Normalise each group of channels of each image to mean 0 and variance 1, then scale and shift.

    Math    xhat = (x - mean) / sqrt(var + eps),  y = xhat * w + b
    Shapes  x (B, H, W, C), w (C,), b (C,)  ->  y (B, H, W, C);  C a multiple of ``groups``
    Cache   xhat (B, H, W, C), rstd (B, 1, 1, C), w
    Source  arXiv:1803.08494; 32 groups and eps = 1e-6 as in the official ViT code (timm has 1e-5).
    """
    xc = x - _group_mean(x, groups)
    var = _group_mean(xc * xc, groups)  # (B, 1, 1, C)
    rstd = (var + eps) ** -0.5
    xhat = xc
    xhat *= rstd  # in place: xc is ours and not read again
    y = xhat * w
    y += b
    return y, GroupNormCache(xhat, rstd, w, groups)


@accelerated
def groupnorm_backward(dy, cache):
    """Backward of `groupnorm_forward`.

    Math    dw = sum_bhw dy * xhat;  db = sum_bhw dy;  dxhat = dy * w;
            dx = rstd * (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat)), means over a group
    Shapes  dy (B, H, W, C)  ->  dx (B, H, W, C), dw (C,), db (C,)
    """
    xhat, rstd, w, groups = cache
    C = dy.shape[-1]
    # y = xhat * w + b
    product = dy * xhat
    db = column_sum(dy.reshape(-1, C))
    dw = column_sum(product.reshape(-1, C))
    dxhat = dy * w  # (B, H, W, C)
    # xhat = xc * rstd, rstd = (mean(xc * xc) + eps)^(-1/2), xc = x - mean(x): step 2 of the derivation
    product *= w  # = dxhat * xhat
    dx = dxhat
    dx -= _group_mean(dxhat, groups)
    dx -= xhat * _group_mean(product, groups)
    dx *= rstd
    return dx, dw, db
