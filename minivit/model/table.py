"""The parameters of a model: one row for each, in the order of the forward pass."""

import math

from minivit.base.params import ParameterSpec, constant, lecun_normal, normal, ones, xavier_uniform, zeros
from minivit.layers.block import BLOCK_PARAMETERS, LS1, LS2, QK_NORM, RELATIVE
from minivit.options.stem.resnet import convolutions

STEM = "patch_embed.backbone."  # timm's prefix of the names of the stem's parameters


def block_parameters(config):
    """The names of a block's parameters, without ``blocks.i.``."""
    relative = RELATIVE if config.pos_embed == "relative" else ()
    return BLOCK_PARAMETERS + (QK_NORM if config.qk_norm else ()) + relative + (LS1 + LS2 if config.layer_scale else ())


def position_parameters(config):
    """The names of the parameters whose position is added to the input of each block: L tuples of none, one or two."""
    names = {"learned": ("pos_embed",), "learned2d": ("pos_embed_x", "pos_embed_y")}.get(config.pos_embed, ())
    if config.pos_at == "every":
        return [tuple(f"blocks.{i}.{name}" for name in names) for i in range(config.depth)]
    return [names] + [names if config.pos_at == "shared" else ()] * (config.depth - 1)


def parameter_table(config):
    """The model's parameters in the order of the forward pass, with timm's names and the official initialisers.

    Weight decay applies to matrices and the stem's kernels alone: not to biases, norms, LayerScale, the class token,
    registers or positions of any kind.
    """
    c, D, M = config, config.width, config.mlp_dim
    pixels = c.patch_size**2 * c.patch_channels
    table = []

    def add(name, shape, init, decay=False):
        table.append(ParameterSpec(name, shape, init, decay))

    def layernorm(name, size=D):
        add(f"{name}.weight", (size,), ones)
        add(f"{name}.bias", (size,), zeros)

    def layer_scale(name):
        if c.layer_scale:
            add(f"{name}.gamma", (D,), constant(c.layer_scale))

    def dense(name, n_in, n_out, init, bias_init=zeros):
        add(f"{name}.weight", (n_in, n_out), init, decay=True)
        add(f"{name}.bias", (n_out,), bias_init)

    def positions(before, relative):
        if c.pos_embed == "learned":
            add(f"{before}pos_embed", (1, c.num_tokens - c.registers, D), normal(0.02))
        elif c.pos_embed == "learned2d":
            add(f"{before}pos_embed_x", (1, c.grid_size, D // 2), normal(0.02))
            add(f"{before}pos_embed_y", (1, c.grid_size, D // 2), normal(0.02))
        elif c.pos_embed == "relative":
            add(relative, (1, 2 * c.sequence_length - 1, D // c.num_heads), normal(0.02))

    if c.pooling == "cls":
        add("cls_token", (1, 1, D), zeros)
    if c.registers:
        add("reg_token", (1, c.registers, D), normal(1e-6))  # nearly zero, as its authors and timm have it
    if c.pos_at != "every":
        positions("", "rel_pos")
    if c.stem:
        for (kernel, scale, shift), shape, _ in convolutions(c.channels, c.stem_width, c.stem_units):
            add(STEM + kernel, shape, lecun_normal(math.prod(shape[:3])), decay=True)
            add(STEM + scale, shape[3:], zeros if scale.endswith("norm3.weight") else ones)
            add(STEM + shift, shape[3:], zeros)
    dense("patch_embed.proj", pixels, D, lecun_normal(pixels))
    for i in range(c.depth):
        if c.pos_at == "every":
            positions(f"blocks.{i}.", f"blocks.{i}.attn.rel_pos")
        layernorm(f"blocks.{i}.norm1")
        # queries, keys and values are three (D, D) matrices side by side, and are initialised as such
        dense(f"blocks.{i}.attn.qkv", D, 3 * D, xavier_uniform(D, D))
        if c.qk_norm:
            layernorm(f"blocks.{i}.attn.q_norm", D // c.num_heads)
            layernorm(f"blocks.{i}.attn.k_norm", D // c.num_heads)
        dense(f"blocks.{i}.attn.proj", D, D, xavier_uniform(D, D))
        layer_scale(f"blocks.{i}.ls1")
        layernorm(f"blocks.{i}.norm2")
        dense(f"blocks.{i}.mlp.fc1", D, M, xavier_uniform(D, M), normal(1e-6))
        dense(f"blocks.{i}.mlp.fc2", M, D, xavier_uniform(M, D), normal(1e-6))
        layer_scale(f"blocks.{i}.ls2")
    layernorm("norm")
    if c.pooling == "seq":
        dense("attention_pool", D, 1, normal(0.02))
    if c.pre_logits:
        dense("pre_logits", D, c.pre_logits, lecun_normal(D))
    dense("head", c.num_features, c.num_classes, zeros)
    return tuple(table)
