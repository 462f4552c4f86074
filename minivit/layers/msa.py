r"""Multi-head self-attention (Eq. 5-8 of the ViT paper; Vaswani et al. 2017).

Forward
    One matrix makes queries, keys and values of all h heads, each head attends in its own Dh = D / h dimensions, and
    the results of the heads, side by side, are mixed by the output projection:

        [q, k, v] = x @ U_qkv + b_qkv                          (N, 3D), read as (N, 3, h, Dh)              (Eq. 5)
        SA_i      = softmax(q_i @ k_i^T / sqrt(Dh)) @ v_i      (N, Dh) for each head i                     (Eq. 6-7)
        y         = [SA_1, ..., SA_h] @ U_msa + b_msa          (N, D)                                      (Eq. 8)

    In the code U_qkv and U_msa are Wqkv and Wproj. The paper writes no biases, its code has them. The bias of the keys
    never matters: q_i @ (k_j + b)^T = q_i @ k_j^T + q_i @ b^T, and the second term is the same for all keys j, a
    constant in a row of scores, which softmax ignores. So its gradient is zero (in floats, but for rounding).

Backward
    The three lines in reverse order, each by its own backward. Splitting and joining heads only moves numbers to other
    places, so their backward moves the gradients back.

Example: the heads of one token, D = 4 and h = 2, are entries 1-2 and 3-4 of q, of k and of v
    >>> import numpy as np
    >>> q, k, v = split_heads(np.arange(12.0).reshape(1, 1, 12), 2)
    >>> q[0, :, 0].tolist(), v[0, :, 0].tolist()
    ([[0.0, 1.0], [2.0, 3.0]], [[8.0, 9.0], [10.0, 11.0]])
    >>> merge_heads(q, k, v).ravel().tolist() == list(range(12))
    True
"""

from typing import Any, NamedTuple

from minivit.base.backend import accelerated, array_module
from minivit.base.pairs import Pair
from minivit.layers.attention import ATTENTION
from minivit.layers.linear import LinearCache, linear_backward, linear_forward

MSA_NAMES = ("attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias")


class MSACache(NamedTuple):
    """What `msa_backward` reads: the caches of its three lines, and h."""

    qkv: LinearCache
    attention: Any  # that of the attention, by default an `AttentionCache`
    proj: LinearCache
    num_heads: int


def split_heads(x, num_heads, parts=3):
    """Columns ordered (parts, h, Dh) as one array for each part and head, a view: q, k, v = split_heads(qkv, h).

    Shapes  x (B, N, parts * D)  ->  (parts, B, h, N, Dh)
    """
    B, N, width = x.shape  # below: (B, N, parts, h, Dh) -> (parts, B, h, N, Dh)
    return x.reshape(B, N, parts, num_heads, width // (parts * num_heads)).transpose(2, 0, 3, 1, 4)


def merge_heads(*parts):
    """The inverse of `split_heads`: arrays (B, h, N, Dh) side by side as (B, N, parts * D)."""
    B, _, N, _ = parts[0].shape  # below: (parts, B, h, N, Dh) -> (B, N, parts, h, Dh)
    return array_module(*parts).stack(parts).transpose(1, 3, 0, 2, 4).reshape(B, N, -1)


@accelerated
def msa_forward(x, Wqkv, bqkv, Wproj, bproj, *extra, num_heads, attend=ATTENTION):
    """Multi-head self-attention over the tokens of each image.

    Math    [q, k, v] = x @ Wqkv + bqkv;  y = [SA_1, ..., SA_h] @ Wproj + bproj                           (Eq. 5-8)
    Shapes  x (B, N, D), Wqkv (D, 3D), bqkv (3D,), Wproj (D, D), bproj (D,)  ->  y (B, N, D)
    Cache   of the two linear maps and of the attention
    ``attend`` is the attention of the heads, and ``extra`` its parameters: the paper's has none.
    """
    qkv, qkv_cache = linear_forward(x, Wqkv, bqkv)  # (B, N, 3D)
    q, k, v = split_heads(qkv, num_heads)  # (B, h, N, Dh) each
    heads, attention_cache = attend.forward(q, k, v, *extra)  # (B, h, N, Dh)
    y, proj_cache = linear_forward(merge_heads(heads), Wproj, bproj)  # (B, N, D)
    return y, MSACache(qkv_cache, attention_cache, proj_cache, num_heads)


@accelerated
def msa_backward(dy, cache, *, attend=ATTENTION):
    """Backward of `msa_forward`.

    Math    Eq. 8, then Eq. 7-6 for each head, then Eq. 5, each by its own backward
    Shapes  dy (B, N, D)  ->  dx (B, N, D), dWqkv (D, 3D), dbqkv (3D,), dWproj (D, D), dbproj (D,), *dextra
    """
    # y = merge_heads(heads) @ Wproj + bproj
    dmerged, dWproj, dbproj = linear_backward(dy, cache.proj)  # (B, N, D)
    (dheads,) = split_heads(dmerged, cache.num_heads, parts=1)  # (B, h, N, Dh)
    # heads = attend(q, k, v)
    dq, dk, dv, *dextra = attend.backward(dheads, cache.attention)  # (B, h, N, Dh) each
    # q, k, v = split_heads(qkv)
    dqkv = merge_heads(dq, dk, dv)  # (B, N, 3D)
    # qkv = x @ Wqkv + bqkv
    dx, dWqkv, dbqkv = linear_backward(dqkv, cache.qkv)  # (B, N, D)
    return dx, dWqkv, dbqkv, dWproj, dbproj, *dextra


MSA = Pair(msa_forward, msa_backward, MSA_NAMES, ATTENTION.about)
