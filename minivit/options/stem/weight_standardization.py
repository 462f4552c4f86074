r"""Weight standardization of a convolution's kernel (Qiao et al. 2019, arXiv:1903.10520).

Forward
    The n = kh kw I numbers that make one output channel are given mean 0 and standard deviation (almost) 1:

        wc = w - mean(w),      std = sqrt(mean(wc^2)),      what = wc / (std + eps),

    each channel for itself. The learned w serves as a direction: its mean and its length do not matter, and a step
    cannot change a channel's scale, which GroupNorm after the convolution would take away again. Here eps is added to
    the standard deviation, as the official code does; others add one to the variance.

Backward
    From what = wc r, r = 1 / (std + eps), with all means over the n numbers of a channel,

        dwc_i  = dwhat_i r + (d r / d wc_i) sum_j dwhat_j wc_j
        d std / d wc_i = wc_i / (n std)            =>    d r / d wc_i = -r^2 wc_i / (n std)
        so  dwc_i  = r dwhat_i - (what_i / std) mean(dwhat what),

    and w - mean(w) takes the mean off: dw = dwc - mean(dwc), where mean(what) = 0. Hence

        dw = r (dwhat - mean(dwhat)) - (what / std) mean(dwhat what).

    A channel of equal weights has std = 0 and what = 0, and with it the last term.
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

    Math    dw = (dwhat - mean(dwhat)) / (std + eps) - (what / std) mean(dwhat what)
    Shapes  dwhat (kh, kw, I, O)  ->  dw (kh, kw, I, O)
    """
    what, std, eps = cache
    # what = wc / (std + eps), wc = w - mean
    dw = (dwhat - _mean(dwhat)) / (std + eps)
    # std = sqrt(mean(wc^2)); where it is zero, so is what
    dw -= what * (_mean(dwhat * what) / (std + (std == 0)))
    return dw
