r"""The transformer encoder block, pre-norm (Eq. 2-3 of the ViT paper).

Forward
        z'  = MSA(LN(z)) + z          (Eq. 2)
        z'' = MLP(LN(z')) + z'        (Eq. 3)

    The official code's dropout follows the output projection of the MSA and the second dense layer of the
    MLP; stochastic depth, where used, drops a whole branch just before it is added. LayerScale, where its parameters
    are in the mapping, multiplies the branch in between.

Backward
    A sum hands its gradient to both terms. With f the branch, z' = f(z) + z gives

        dz = dz' + J_f^T dz',

    where the product with f's transposed Jacobian is the branch's own backward, from its last step to its first.
    The residual path carries dz' unchanged: that is why gradients survive many blocks.

    Where only the first Q tokens of the result are read (after the last block, the class token alone), the others need
    neither ask in the attention nor pass through the MLP. They still answer: keys and values are those of all N tokens.

This file is glue: it takes the block's parameters by name from a mapping, and its backward *adds* each
gradient into a mapping of the same names (the layers themselves only return gradients).
"""

from typing import NamedTuple

from minivit.base.backend import accelerated
from minivit.layers.drop_path import drop_path_backward, drop_path_forward, drop_path_jvp
from minivit.layers.dropout import DropoutCache, dropout_backward, dropout_forward, dropout_jvp
from minivit.layers.layernorm import LayerNormCache, layernorm_backward, layernorm_forward, layernorm_jvp
from minivit.layers.mlp import MLPCache, mlp_backward, mlp_forward, mlp_jvp
from minivit.layers.msa import MSACache, msa_backward, msa_forward, msa_jvp
from minivit.options.layer_scale import LayerScaleCache, layer_scale_backward, layer_scale_forward, layer_scale_jvp

NORM1 = ("norm1.weight", "norm1.bias")
ATTN = ("attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias")
NORM2 = ("norm2.weight", "norm2.bias")
MLP = ("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias")
BLOCK_PARAMETERS = NORM1 + ATTN + NORM2 + MLP
QK_NORM = ("attn.q_norm.weight", "attn.q_norm.bias", "attn.k_norm.weight", "attn.k_norm.bias")  # only with QK-norm
RELATIVE = ("attn.rel_pos",)  # only with relative positions
LS1, LS2 = ("ls1.gamma",), ("ls2.gamma",)  # only with LayerScale


class BlockCache(NamedTuple):
    """What `block_backward` reads: the caches of its steps, in the order of the forward; ls1 and ls2 may be None."""

    norm1: LayerNormCache
    msa: MSACache
    dropout1: DropoutCache
    ls1: LayerScaleCache | None
    path1: DropoutCache
    norm2: LayerNormCache
    mlp: MLPCache
    dropout2: DropoutCache
    ls2: LayerScaleCache | None
    path2: DropoutCache


@accelerated
def block_forward(
    z, params, *, num_heads, queries=None, gelu="tanh", eps=1e-6, dropout=0.0, attention_dropout=0.0, drop_path=0.0,
    rng=None,
):  # fmt: skip
    """One encoder block.

    Math    z' = MSA(LN(z)) + z;  z'' = MLP(LN(z')) + z'                                               (Eq. 2-3)
    Shapes  z (B, N, D)  ->  z'' (B, N, D);  params maps BLOCK_PARAMETERS to arrays
            and, where the model has them, QK_NORM, RELATIVE, LS1 and LS2
    Cache   of each step
    With ``queries`` = Q, z'' (B, Q, D) is made for the first Q tokens alone: the same numbers as their rows of all.
    """

    def take(names):
        return [params[name] for name in names]

    ls1 = ls2 = None
    # Eq. 2
    u, norm1 = layernorm_forward(z, *take(NORM1), eps=eps)
    u, msa = msa_forward(
        u, *take(ATTN), *map(params.get, QK_NORM + RELATIVE), num_heads=num_heads, queries=queries, eps=eps,
        attention_dropout=attention_dropout, rng=rng,
    )  # (B, Q, D)  # fmt: skip
    u, dropout1 = dropout_forward(u, rate=dropout, rng=rng)
    if "ls1.gamma" in params:
        u, ls1 = layer_scale_forward(u, *take(LS1))
    u, path1 = drop_path_forward(u, rate=drop_path, rng=rng)
    z = z[:, :queries] + u  # z'
    # Eq. 3
    u, norm2 = layernorm_forward(z, *take(NORM2), eps=eps)
    u, mlp = mlp_forward(u, *take(MLP), gelu=gelu, dropout=dropout, rng=rng)
    u, dropout2 = dropout_forward(u, rate=dropout, rng=rng)
    if "ls2.gamma" in params:
        u, ls2 = layer_scale_forward(u, *take(LS2))
    u, path2 = drop_path_forward(u, rate=drop_path, rng=rng)
    z = z + u  # z''
    return z, BlockCache(norm1, msa, dropout1, ls1, path1, norm2, mlp, dropout2, ls2, path2)


@accelerated
def block_backward(dz, cache, grads):
    """Backward of `block_forward`.

    Math    dz' = dz'' + J_MLP.LN^T dz'';  dz = dz' + J_MSA.LN^T dz'
    Shapes  dz (B, Q, D)  ->  dz (B, N, D);  the parameter gradients are added into ``grads``
    """

    def add(names, gradients):
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                grads[name] += gradient

    # z'' = z' + path(ls(dropout(MLP(LN(z')))))                                                   (Eq. 3)
    du = drop_path_backward(dz, cache.path2)
    if cache.ls2 is not None:
        du, *dgamma = layer_scale_backward(du, cache.ls2)
        add(LS2, dgamma)
    du = dropout_backward(du, cache.dropout2)
    du, *dmlp = mlp_backward(du, cache.mlp)
    add(MLP, dmlp)
    du, *dnorm2 = layernorm_backward(du, cache.norm2)
    add(NORM2, dnorm2)
    dz = dz + du
    # z' = z + path(ls(dropout(MSA(LN(z)))))                                                      (Eq. 2)
    du = drop_path_backward(dz, cache.path1)
    if cache.ls1 is not None:
        du, *dgamma = layer_scale_backward(du, cache.ls1)
        add(LS1, dgamma)
    du = dropout_backward(du, cache.dropout1)
    du, *dmsa = msa_backward(du, cache.msa)
    add(ATTN + QK_NORM + RELATIVE, dmsa)
    du, *dnorm1 = layernorm_backward(du, cache.norm1)  # (B, N, D)
    add(NORM1, dnorm1)
    du[:, : dz.shape[1]] += dz
    return du


def block_jvp(zdot, paramsdot, cache):
    """Forward-mode derivative of `block_forward`.

    Math    z'dot = zdot + J_MSA.LN zdot;  z''dot = z'dot + J_MLP.LN z'dot
    Shapes  zdot (B, N, D), paramsdot like params  ->  z''dot (B, Q, D)
    """

    def take(names):
        return [paramsdot[name] for name in names]

    # Eq. 2
    udot = layernorm_jvp(zdot, *take(NORM1), cache.norm1)
    udot = msa_jvp(udot, *take(ATTN), *map(paramsdot.get, QK_NORM + RELATIVE), cache.msa)
    udot = dropout_jvp(udot, cache.dropout1)
    if cache.ls1 is not None:
        udot = layer_scale_jvp(udot, *take(LS1), cache.ls1)
    zdot = zdot[:, : udot.shape[1]] + drop_path_jvp(udot, cache.path1)
    # Eq. 3
    udot = layernorm_jvp(zdot, *take(NORM2), cache.norm2)
    udot = mlp_jvp(udot, *take(MLP), cache.mlp)
    udot = dropout_jvp(udot, cache.dropout2)
    if cache.ls2 is not None:
        udot = layer_scale_jvp(udot, *take(LS2), cache.ls2)
    return zdot + drop_path_jvp(udot, cache.path2)
