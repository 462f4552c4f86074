r"""The transformer encoder block, pre-norm (Eq. 2-3 of the ViT paper).

Forward
        z1 = MSA(LN(z)) + z           (Eq. 2; z' in the paper)
        z2 = MLP(LN(z1)) + z1         (Eq. 3)

Backward
    A sum passes its gradient to both of its terms. z1 = f(z) + z, where f = MSA(LN(.)) is the *branch*, gives

        dz = (the branch's backward of dz1) + dz1

    and the same holds for z2. The branch's backward is that of MSA and then that of LN. The second term takes dz1 past
    the branch unchanged: that is why gradients survive many blocks.

    A block takes its parameters by name from a mapping, and its backward *adds* each gradient into a mapping of the
    same names (the layers themselves only return gradients).

Example: with all parameters 0 both branches give 0, and a block passes everything on
    >>> import numpy as np
    >>> shapes = {"attn.qkv.weight": (2, 6), "attn.qkv.bias": (6,), "attn.proj.weight": (2, 2)}
    >>> shapes |= {"mlp.fc1.weight": (2, 4), "mlp.fc1.bias": (4,), "mlp.fc2.weight": (4, 2)}
    >>> params = {name: np.zeros(shapes.get(name, (2,))) for name in BLOCK_PARAMETERS}
    >>> z, cache = block_forward(np.array([[[1.0, 2.0]]]), params, num_heads=1)
    >>> z.tolist()
    [[[1.0, 2.0]]]
    >>> grads = {name: np.zeros_like(value) for name, value in params.items()}
    >>> block_backward(np.array([[[3.0, 4.0]]]), cache, grads).tolist(), grads["mlp.fc2.bias"].tolist()
    ([[[3.0, 4.0]]], [3.0, 4.0])
"""

from typing import Any, NamedTuple

from minivit.base.backend import accelerated
from minivit.base.pairs import add_gradients
from minivit.layers.layernorm import LayerNormCache, layernorm_backward, layernorm_forward
from minivit.layers.mlp import MLP
from minivit.layers.msa import MSA

NORM1 = ("norm1.weight", "norm1.bias")
NORM2 = ("norm2.weight", "norm2.bias")
BLOCK_PARAMETERS = NORM1 + MSA.names + NORM2 + MLP.names


class BlockCache(NamedTuple):
    """What `block_backward` reads: the caches of its layers, in the order of the forward."""

    norm1: LayerNormCache
    msa: Any  # by default an `MSACache`
    norm2: LayerNormCache
    mlp: Any  # by default an `MLPCache`


def take(params, names):
    """The parameters of these names, in the order of the names."""
    return [params[name] for name in names]


@accelerated
def block_forward(z, params, *, num_heads, msa=MSA, mlp=MLP, eps=1e-6):
    """One encoder block.

    Math    z1 = MSA(LN(z)) + z;  z2 = MLP(LN(z1)) + z1                                                (Eq. 2-3)
    Shapes  z (B, N, D)  ->  z2 (B, N, D);  params maps BLOCK_PARAMETERS to arrays
    Cache   of each layer
    ``msa`` and ``mlp`` are the Pairs after the LayerNorms.
    """
    # Eq. 2
    y, norm1_cache = layernorm_forward(z, *take(params, NORM1), eps=eps)  # (B, N, D)
    u, msa_cache = msa.forward(y, *take(params, msa.names), num_heads=num_heads)  # (B, N, D)
    z1 = u + z  # (B, N, D)
    # Eq. 3
    y1, norm2_cache = layernorm_forward(z1, *take(params, NORM2), eps=eps)  # (B, N, D)
    u1, mlp_cache = mlp.forward(y1, *take(params, mlp.names))  # (B, N, D)
    z2 = u1 + z1  # (B, N, D)
    return z2, BlockCache(norm1_cache, msa_cache, norm2_cache, mlp_cache)


@accelerated
def block_backward(dz2, cache, grads, *, msa=MSA, mlp=MLP):
    """Backward of `block_forward`.

    Math    dz1 = LN's backward of MLP's backward of dz2, + dz2;  dz = LN's backward of MSA's backward of dz1, + dz1
    Shapes  dz2 (B, N, D)  ->  dz (B, N, D);  the gradients of the parameters are added into ``grads``
    """
    # z2 = MLP(LN(z1)) + z1                                                                        (Eq. 3)
    dy1, *dmlp = mlp.backward(dz2, cache.mlp)  # (B, N, D)
    dbranch, *dnorm2 = layernorm_backward(dy1, cache.norm2)  # (B, N, D)
    dz1 = dbranch + dz2
    # z1 = MSA(LN(z)) + z                                                                          (Eq. 2)
    dy, *dmsa = msa.backward(dz1, cache.msa)  # (B, N, D)
    dbranch, *dnorm1 = layernorm_backward(dy, cache.norm1)  # (B, N, D)
    dz = dbranch + dz1
    for names, dparameters in ((NORM1, dnorm1), (msa.names, dmsa), (NORM2, dnorm2), (mlp.names, dmlp)):
        add_gradients(grads, names, dparameters)
    return dz
