r"""Blocks of which only the first tokens are read: the last block of a model that classifies by its class token.

Forward
    Nothing after the last block reads any token but the first (`minivit.layers.head`). So the others need no query in
    its attention, and need not pass through its MLP. Their keys and values still count: the queries that are left meet
    all N tokens. With Q tokens read, and MSA_Q for the attention whose queries are those of the first Q tokens alone,

        heads = attend(q[:Q], k, v)         (Q, Dh)   for each head
        z1    = MSA_Q(LN(z)) + z[:Q]        (Q, D)    (Eq. 2)
        z2    = MLP(LN(z1)) + z1            (Q, D)    (Eq. 3)

    are the first Q rows of what `minivit.layers.block` gives, number for number, for much less work: the other lines
    work on each token alone, and row i of the attention depends on q in its row i alone.

Backward, the same lines from the last to the first; dz2 (Q, D) is given
    As in `minivit.layers.block`, a sum passes its gradient to both of its terms:

        z2    = MLP(LN(z1)) + z1          =>   dz1 = (the branch's backward of dz2) + dz2           (Q, D)
        z1    = MSA_Q(LN(z)) + z[:Q]      =>   dz  = (the branch's backward of dz1) + [dz1; 0]      (N, D)
        heads = attend(q[:Q], k, v)       =>   dq  = [the attention's dq; 0],  dk and dv are the attention's

    The zeros are the rows of what was not read: a query beyond the first Q, and a token beyond them in the sum.

Example: of two tokens the first is read; its query is 0 and likes both keys equally
    >>> import numpy as np
    >>> q, k, v = np.array([[0.0], [5.0]]), np.array([[1.0], [-1.0]]), np.array([[2.0], [4.0]])
    >>> y, cache = first_queries_forward(q, k, v, reads=1)
    >>> y.tolist()                                        # the mean of both values
    [[3.0]]
    >>> dq, dk, dv = first_queries_backward(np.array([[1.0]]), cache)
    >>> dq.tolist(), dv.tolist()                          # the second query was not asked, its value was read
    ([[-1.0], [0.0]], [[0.5], [0.5]])
"""

from functools import partial
from typing import Any, NamedTuple

from minivit.base.backend import accelerated, array_module
from minivit.base.pairs import Pair, add_gradients
from minivit.layers.attention import ATTENTION
from minivit.layers.block import NORM1, NORM2, BlockCache, take
from minivit.layers.layernorm import layernorm_backward, layernorm_forward
from minivit.layers.mlp import MLP
from minivit.layers.msa import MSA


class FirstQueriesCache(NamedTuple):
    """What `first_queries_backward` reads."""

    attention: Any
    num_tokens: int  # N


@accelerated
def first_queries_forward(q, k, v, *extra, reads, attend=ATTENTION):
    """Attention of the first queries alone.

    Math    y = attend(q[:Q], k, v)
    Shapes  q, k, v (..., N, Dh)  ->  y (..., Q, Dh), Q = ``reads``
    Cache   of the attention
    """
    y, cache = attend.forward(q[..., :reads, :], k, v, *extra)  # (..., Q, Dh)
    return y, FirstQueriesCache(cache, q.shape[-2])


@accelerated
def first_queries_backward(dy, cache, *, attend=ATTENTION):
    """Backward of `first_queries_forward`.

    Math    dq = [the attention's dq; 0];  dk, dv are the attention's
    Shapes  dy (..., Q, Dh)  ->  dq, dk, dv (..., N, Dh), *dextra
    """
    # y = attend(q[:Q], k, v)
    dfirst, dk, dv, *dextra = attend.backward(dy, cache.attention)  # (..., Q, Dh), (..., N, Dh) each
    *outer, Q, Dh = dfirst.shape
    dq = array_module(dy).zeros((*outer, cache.num_tokens, Dh), dy.dtype)  # (..., N, Dh)
    dq[..., :Q, :] = dfirst
    return dq, dk, dv, *dextra


def with_first_queries(attend, reads):
    """The attention as a Pair whose queries are those of the first ``reads`` tokens."""
    return Pair(
        partial(first_queries_forward, reads=reads, attend=attend),
        partial(first_queries_backward, attend=attend),
        attend.names,
        attend.about | {"reads": reads},
    )


@accelerated
def first_tokens_forward(z, params, *, num_heads, reads, msa=MSA, mlp=MLP, eps=1e-6):
    """One encoder block, for the first tokens alone; the attention of ``msa`` is one `with_first_queries`.

    Math    z1 = MSA_Q(LN(z)) + z[:Q];  z2 = MLP(LN(z1)) + z1                                          (Eq. 2-3)
    Shapes  z (B, N, D)  ->  z2 (B, Q, D), Q = ``reads``
    Cache   as `block_forward`
    """
    # Eq. 2
    y, norm1_cache = layernorm_forward(z, *take(params, NORM1), eps=eps)  # (B, N, D)
    u, msa_cache = msa.forward(y, *take(params, msa.names), num_heads=num_heads)  # (B, Q, D)
    z1 = u + z[:, :reads]  # (B, Q, D)
    # Eq. 3
    y1, norm2_cache = layernorm_forward(z1, *take(params, NORM2), eps=eps)  # (B, Q, D)
    u1, mlp_cache = mlp.forward(y1, *take(params, mlp.names))  # (B, Q, D)
    z2 = u1 + z1  # (B, Q, D)
    return z2, BlockCache(norm1_cache, msa_cache, norm2_cache, mlp_cache)


@accelerated
def first_tokens_backward(dz2, cache, grads, *, msa=MSA, mlp=MLP):
    """Backward of `first_tokens_forward`.

    Math    as `minivit.layers.block.block_backward`, with zeros for the tokens that were not read
    Shapes  dz2 (B, Q, D)  ->  dz (B, N, D);  the gradients of the parameters are added into ``grads``
    """
    # z2 = MLP(LN(z1)) + z1                                                                        (Eq. 3)
    dy1, *dmlp = mlp.backward(dz2, cache.mlp)  # (B, Q, D)
    dbranch, *dnorm2 = layernorm_backward(dy1, cache.norm2)  # (B, Q, D)
    dz1 = dbranch + dz2
    # z1 = MSA_Q(LN(z)) + z[:Q]                                                                    (Eq. 2)
    dy, *dmsa = msa.backward(dz1, cache.msa)  # (B, N, D)
    dz, *dnorm1 = layernorm_backward(dy, cache.norm1)  # (B, N, D)
    dz[:, : dz1.shape[1]] += dz1
    for names, dparameters in ((NORM1, dnorm1), (msa.names, dmsa), (NORM2, dnorm2), (mlp.names, dmlp)):
        add_gradients(grads, names, dparameters)
    return dz
