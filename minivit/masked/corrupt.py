r"""Corrupted patch embeddings: what a model sees whose task is to guess what was there (section 4.6, appendix B.1.2).

Forward
    Let e_0, ..., e_{N-1} be the patch embeddings of an image, before positions are added, and e_N the learned [mask]
    embedding, the same for all images. Each place i shows the embedding of its source s_i: i itself where nothing was
    done, N where it was masked, and j where it was exchanged for another patch j of the image:

        y_i = e_{s_i}

    As a matrix product, y = S @ [e; e_mask] with S_ij = 1 for j = s_i and 0 elsewhere: one 1 in each row.

Backward, dy is given
    Of a product it is [de; de_mask] = S^T @ dy (see `minivit.layers.linear`): a column of S says where an embedding is
    shown, and its gradient is the sum over these places,

        de_j    = sum_{i: s_i = j} dy_i      itself, unless corrupted, and every place that copied it; perhaps none
        de_mask = sum_{i: s_i = N} dy_i      summed over the images too: they share it

Example: one image of two patches, D = 1; place 0 is masked, place 1 shows patch 0
    >>> import numpy as np
    >>> e, mask, source = np.array([[[1.0], [2.0]]]), np.array([[[9.0]]]), np.array([[2, 0]])
    >>> y, cache = corrupt_forward(e, mask, source)
    >>> y.tolist()
    [[[9.0], [1.0]]]
    >>> de, dmask = corrupt_backward(np.array([[[10.0], [20.0]]]), cache)
    >>> de.tolist(), dmask.tolist()                       # patch 1 is shown nowhere
    ([[[20.0], [0.0]]], [[[10.0]]])
"""

from typing import Any, NamedTuple

from minivit.base.backend import accelerated, array_module, matmul


class CorruptCache(NamedTuple):
    """What `corrupt_backward` reads."""

    source: Any  # (B, N) integers from 0 to N


@accelerated
def corrupt_forward(e, mask_token, source):
    """Show at each place the embedding of its source.

    Math    y_i = e_{s_i}, with e_N the mask
    Shapes  e (B, N, D), mask_token (1, 1, D), source (B, N) integers from 0 to N  ->  y (B, N, D)
    Cache   the sources
    Source  Dosovitskiy et al. 2020, appendix B.1.2
    """
    xp = array_module(e, source)
    masks = xp.broadcast_to(mask_token, (len(e), 1, e.shape[-1]))
    shown = xp.concatenate([e, masks], axis=1)  # (B, N + 1, D)
    y = shown[xp.arange(len(e))[:, None], source]  # (B, N, D)
    return y, CorruptCache(source)


@accelerated
def corrupt_backward(dy, cache):
    """Backward of `corrupt_forward`.

    Math    [de; de_mask] = S^T @ dy, S_ij = [j = s_i];  dmask_token = sum_b de_mask
    Shapes  dy (B, N, D)  ->  de (B, N, D), dmask_token (1, 1, D)
    """
    xp = array_module(dy)
    N = dy.shape[1]
    # y = S @ [e; mask]: a product, because several places may add to one patch
    S = (cache.source[:, :, None] == xp.arange(N + 1)).astype(dy.dtype)  # (B, N, N + 1)
    dshown = matmul(S.swapaxes(1, 2), dy)  # (B, N + 1, D)
    # shown = [e; mask], the mask broadcast over the batch
    return dshown[:, :N], dshown[:, N:].sum(axis=0, keepdims=True)
