"""The parameters of a model: one row for each, in the order of the forward pass."""

from minivit.base.params import ParameterSpec, dense, layernorm, lecun_normal, normal, xavier_uniform, zeros
from minivit.model.compose import extra_rows
from minivit.options.stem.option import STEM

__all__ = ["STEM", "mlp_matrices", "parameter_table"]


def mlp_rows(config):
    """The parameters of a block's MLP: the plain one's, or those of the option in its place."""
    D, M = config.width, config.mlp_dim
    plain = dense("mlp.fc1", D, M, xavier_uniform(D, M), normal(1e-6))
    return extra_rows(config, "mlp") or plain + dense("mlp.fc2", M, D, xavier_uniform(M, D), normal(1e-6))


def mlp_matrices(config):
    """The shapes (d, m) of the matrices of a block's MLP; every token that passes through it is multiplied by each."""
    return [row.shape for row in mlp_rows(config) if len(row.shape) == 2]


def block_table(config):
    """The parameters of one block, by their names within it."""
    c, D = config, config.width
    return [
        *extra_rows(c, "block"),
        *layernorm("norm1", D),
        # queries, keys and values are three (D, D) matrices side by side, and are initialised as such
        *dense("attn.qkv", D, 3 * D, xavier_uniform(D, D)),
        *extra_rows(c, "attention"),
        *dense("attn.proj", D, D, xavier_uniform(D, D)),
        *extra_rows(c, "branch1"),
        *layernorm("norm2", D),
        *mlp_rows(c),
        *extra_rows(c, "branch2"),
    ]


def parameter_table(config):
    """The model's parameters in the order of the forward pass, with timm's names and the official initialisers.

    Weight decay applies to matrices and the stem's kernels alone: not to biases, norms, LayerScale, the class token,
    registers or positions of any kind.
    """
    c, D = config, config.width
    pixels = c.patch_size**2 * c.patch_channels
    block = block_table(c)
    return (
        *([ParameterSpec("cls_token", (1, 1, D), zeros, False)] if c.class_tokens else []),
        *extra_rows(c, "tokens"),
        *extra_rows(c, "positions"),
        *extra_rows(c, "stem"),
        *dense("patch_embed.proj", pixels, D, lecun_normal(pixels)),
        *(row._replace(name=f"blocks.{i}.{row.name}") for i in range(c.depth) for row in block),
        *layernorm("norm", D),
        *extra_rows(c, "pooling"),
        *extra_rows(c, "features"),
        *dense("head", c.num_features, c.num_classes, zeros),
    )
