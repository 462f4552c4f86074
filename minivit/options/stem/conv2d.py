r"""Convolution of feature maps, with TensorFlow's SAME padding and no bias.

Forward
    A window of kh x kw positions slides over the map in steps of ``stride``; what it sees, all channels of it, is one
    row of numbers, and the kernel is the matrix that the row is multiplied by:

        columns[b, r, c, (i, j, k)] = padded[b, r * stride + i, c * stride + j, k]
        y[b, r, c, o]               = sum_ijk columns[b, r, c, (i, j, k)] * w[i, j, k, o]

    With columns as a matrix (B * H' * W', kh * kw * I) and w as the matrix W (kh * kw * I, O) it is y = columns @ W:
    one matrix product does the work of all windows. Zeros around the map make the output H' = ceil(H / stride) rows
    high. They are

        before + after = (H' - 1) * stride + kh - H     (none where this is negative),      before = floor(half of it)

    so that an odd one comes after the map, at the bottom and on the right. (PyTorch's padding=1 puts it before: a
    strided layer then looks at other pixels.) The same holds for columns.

Backward, the same lines from the last to the first; dy is given

        y = columns @ W     =>   dW = columns^T @ dy              dcolumns = dy @ W^T

    as of every matrix product (`minivit.layers.linear`). Windows overlap: a pixel stands in as many rows of ``columns``
    as windows see it, and its gradient is the sum over all of them:

        dpadded[b, p, q, k] = sum of dcolumns[b, r, c, (i, j, k)] over all r, c, i, j
                              with r * stride + i = p and c * stride + j = q

    For one kernel position (i, j), each window (r, c) sees another pixel. So all windows can be added at once, without
    two of them writing to one place; the loop is over the kh * kw positions alone:

        dpadded[b, r * stride + i, c * stride + j, k] += dcolumns[b, r, c, (i, j, k)]      for all b, r, c, k

    and dx is dpadded without the border: zeros that were put in get no gradient.

Example: a row of three pixels and a kernel of two; one zero comes after the row
    >>> import numpy as np
    >>> x, w = np.array([1.0, 2.0, 3.0]).reshape(1, 1, 3, 1), np.array([1.0, 10.0]).reshape(1, 2, 1, 1)
    >>> y, cache = conv2d_forward(x, w)
    >>> y.ravel().tolist()                                # [1 * 1 + 2 * 10, 2 * 1 + 3 * 10, 3 * 1 + 0 * 10]
    [21.0, 32.0, 3.0]
    >>> dx, dw = conv2d_backward(np.array([1.0, 1.0, 1.0]).reshape(1, 1, 3, 1), cache)
    >>> dx.ravel().tolist(), dw.ravel().tolist()          # the first pixel meets w_0 alone, the others w_0 and w_1
    ([1.0, 11.0, 11.0], [6.0, 5.0])
"""

from typing import Any, NamedTuple

import numpy as np

from minivit.base.backend import accelerated, array_module, matmul, matmul_rows


class Conv2dCache(NamedTuple):
    """What `conv2d_backward` reads: not the columns, which hold each pixel kh kw times and are cheap to make again."""

    x: Any  # (B, H, W, I)
    w: Any  # (kh, kw, I, O)
    stride: int


def same_padding(size, kernel, stride):
    """How many entries SAME padding puts (before, after) an axis, so that ceil(size / stride) windows fit."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def interior(shape, kernel, stride):
    """Where the map lies in its padded version: ``padded[interior(...)]`` is the map."""
    (top, _), (left, _) = (same_padding(n, k, stride) for n, k in zip(shape[1:3], kernel, strict=True))
    return slice(None), slice(top, top + shape[1]), slice(left, left + shape[2])


def padded_shape(shape, kernel, stride):
    """The shape (B, H + padding, W + padding, C) that a map of shape (B, H, W, C) has between its zeros."""
    B, *sizes, C = shape
    return (B, *(n + sum(same_padding(n, k, stride)) for n, k in zip(sizes, kernel, strict=True)), C)


def pad(x, kernel, stride, value=0.0):
    """A copy of the map with SAME padding around it.

    Shapes  x (B, H, W, C)  ->  (B, H + padding, W + padding, C)
    """
    padded = array_module(x).full(padded_shape(x.shape, kernel, stride), value, x.dtype)
    padded[interior(x.shape, kernel, stride)] = x
    return padded


def taps(padded, kernel, stride):
    """Yield ((i, j), what position (i, j) of the kernel meets in all windows): views into the padded map.

    Shapes  padded (B, H + padding, W + padding, C)  ->  views (B, H', W', C)
    """
    (kh, kw), (height, width) = kernel, padded.shape[1:3]
    for i, j in np.ndindex(kh, kw):
        rows, columns = (slice(t, n - k + t + 1, stride) for t, n, k in ((i, height, kh), (j, width, kw)))
        yield (i, j), padded[:, rows, columns]


def _columns(x, kernel, stride):
    """What each window sees, as rows: (B, H', W', kh * kw * I); without a copy for a kernel of 1 x 1 in steps of 1."""
    kh, kw = kernel
    padded = pad(x, kernel, stride) if kh * kw > 1 else x
    view = array_module(x).lib.stride_tricks.sliding_window_view(padded, kernel, axis=(1, 2))[:, ::stride, ::stride]
    B, H, W, C = view.shape[:4]
    return view.transpose(0, 1, 2, 4, 5, 3).reshape(B, H, W, kh * kw * C)


@accelerated
def conv2d_forward(x, w, *, stride=1):
    """Convolve every image's map with every kernel.

    Math    y = columns(x) @ W
    Shapes  x (B, H, W, I), w (kh, kw, I, O)  ->  y (B, ceil(H / stride), ceil(W / stride), O)
    Cache   x, w
    Source  padding as tf.nn.conv2d and flax.linen.Conv have it by default
    """
    y = matmul_rows(_columns(x, w.shape[:2], stride), w.reshape(-1, w.shape[3]))  # (B, H', W', O)
    return y, Conv2dCache(x, w, stride)


@accelerated
def conv2d_backward(dy, cache, *, need_dx=True):
    """Backward of `conv2d_forward`.

    Math    dW = columns(x)^T @ dy;  dcolumns = dy @ W^T;
            dpadded[b, r * stride + i, c * stride + j, k] += dcolumns[b, r, c, (i, j, k)] for every (i, j)
    Shapes  dy (B, H', W', O)  ->  dx (B, H, W, I), dw (kh, kw, I, O)
    With ``need_dx=False`` (the layer that sees the images) dx is None and its product is saved.
    """
    x, w, stride = cache
    kernel = w.shape[:2]
    # y = columns @ W
    columns = _columns(x, kernel, stride)
    dw = matmul(columns.reshape(-1, columns.shape[-1]).T, dy.reshape(-1, dy.shape[-1])).reshape(w.shape)
    if not need_dx:
        return None, dw
    # (B, H', W', kh, kw, I)
    dcolumns = matmul_rows(dy, w.reshape(-1, w.shape[3]).T).reshape(*dy.shape[:3], *w.shape[:3])
    # columns[b, r, c, (i, j, k)] = padded[b, r * stride + i, c * stride + j, k]
    dpadded = array_module(dy).zeros(padded_shape(x.shape, kernel, stride), dy.dtype)
    for (i, j), met in taps(dpadded, kernel, stride):
        met += dcolumns[:, :, :, i, j]
    # padded: x between zeros
    return dpadded[interior(x.shape, kernel, stride)], dw
