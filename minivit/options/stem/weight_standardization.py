r"""Weight standardization of a convolution's kernel (Qiao et al. 2019, arXiv:1903.10520).

Forward
    The n = kh * kw * I numbers that make one output channel are given mean 0 and standard deviation (almost) 1; mean is
    the mean over these n numbers, each channel for itself:

        wc   = w - mean(w)
        std  = sqrt(mean(wc * wc))
        what = wc * r,      r = 1 / (std + eps)

    The learned w serves as a direction: its mean and its length do not matter, and a step cannot change a channel's
    scale, which GroupNorm after the convolution would take away again. Here eps is added to the standard deviation, as
    the official code does; others add one to the variance.

Backward, one line of the forward after the other, from the last to the first; dwhat is given

    1.  what_i = wc_i * r. Each wc_i counts directly, and all of them count through r:

            dwc_i (directly) = dwhat_i * r              dr = sum_j dwhat_j * wc_j

    2.  r = 1 / (std + eps), whose derivative by std is -1 / (std + eps)^2 = -r^2:

            dstd = -r^2 * dr

    3.  std = sqrt(1/n * sum_j wc_j^2). By wc_i the sum has the derivative 2 * wc_i, the root 1 / (2 * std):

            dwc_i (through std) = dstd * 1 / (2 * std) * 2/n * wc_i = -r^2 * dr * wc_i / (n * std)

        With wc_i * r = what_i, and dr * r = sum_j dwhat_j * what_j = n * mean(dwhat * what), it is

            dwc_i (through std) = -what_i / std * mean(dwhat * what)

    4.  wc_i = w_i - mean(w). Each w_i counts directly in wc_i, and as -1/n in every wc_j:

            dw_i = dwc_i - mean(dwc)

        The mean of dwc is r * mean(dwhat), as mean(what) = 0. Hence

            dw = r * (dwhat - mean(dwhat)) - what / std * mean(dwhat * what)

    A channel of equal weights has std = 0 and what = 0, and with it the last term.

Example: a kernel of four numbers with mean 3 and variance 2
    >>> import numpy as np
    >>> w = np.array([1.0, 5.0, 3.0, 3.0]).reshape(1, 1, 4, 1)
    >>> what, cache = weight_standardization_forward(w, eps=0.0)
    >>> (what.ravel() * 2**0.5).round(9).tolist()
    [-2.0, 2.0, 0.0, 0.0]
    >>> dw = weight_standardization_backward(np.array([1.0, 0.0, 0.0, 0.0]).reshape(1, 1, 4, 1), cache)
    >>> (dw.ravel() * 2**0.5).round(9).tolist()           # as in the example of LayerNorm
    [0.25, 0.25, -0.25, -0.25]
    >>> bool(abs((dw * w).sum()) < 1e-12)                 # at right angles to w, whose length does not matter
    True
"""

from typing import Any, NamedTuple

from minivit.base.backend import accelerated, column_sum


class WeightStandardizationCache(NamedTuple):
    """What `weight_standardization_backward` reads."""

    what: Any  # (kh, kw, I, O)
    std: Any  # (O,)
    eps: float


def _mean(w):
    """The mean of each output channel's weights, as a product: (kh, kw, I, O) -> (O,)."""
    rows = w.reshape(-1, w.shape[-1])
    return column_sum(rows) / len(rows)


@accelerated
def weight_standardization_forward(w, *, eps=1e-5):
    """Give the weights of each output channel mean 0 and standard deviation 1.

    Math    what = (w - mean) / (std + eps)
    Shapes  w (kh, kw, I, O)  ->  what (kh, kw, I, O)
    Cache   what, std (O,)
    Source  arXiv:1903.10520; the form and eps = 1e-5 are those of the official ViT code.
    """
    wc = w - _mean(w)
    std = _mean(wc * wc) ** 0.5  # (O,)
    what = wc / (std + eps)
    return what, WeightStandardizationCache(what, std, eps)


@accelerated
def weight_standardization_backward(dwhat, cache):
    """Backward of `weight_standardization_forward`.

    Math    dw = (dwhat - mean(dwhat)) / (std + eps) - what / std * mean(dwhat * what)
    Shapes  dwhat (kh, kw, I, O)  ->  dw (kh, kw, I, O)
    """
    what, std, eps = cache
    # what = wc / (std + eps), wc = w - mean(w)
    dw = (dwhat - _mean(dwhat)) / (std + eps)
    # std = sqrt(mean(wc * wc)); where it is zero, so is what
    dw -= what * (_mean(dwhat * what) / (std + (std == 0)))
    return dw
