"""The same Vision Transformer in PyTorch, as one would write it there: what ours is compared with, and timed against.

Its fastest ordinary settings: `nn.Linear`, `nn.LayerNorm`, `scaled_dot_product_attention`. Parameter names and shapes
are ours, which are timm's; but PyTorch keeps the matrix of a linear map transposed (`turned`). Only this module, what
compares with it and the benchmark's contender import PyTorch, which is optional: ``pip install "minivit[bench]"``.

Every layer is a module, so that hooks can see what goes in and comes out (`minivit.laboratory.against_torch`): a
module's ``arguments`` are our names of what it reads, its ``gradients`` our names of its parameters' gradients.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from minivit.laboratory.torch_stem import Stem
from minivit.model import STEM, parameter_table
from minivit.options.positions import sincos2d


def turned(value):
    """A matrix as the other side keeps it; anything else as it is."""
    return value.T if value.ndim == 2 else value


# ---- attention, MLP, block


class Softmax(nn.Module):
    """Over the last axis."""

    def forward(self, x):
        return x.softmax(dim=-1)


class Heads(nn.Module):
    """softmax(q k^T / sqrt(Dh)) v (Eq. 6-7): q, k, v (B, h, N, Dh) -> (B, h, N, Dh).

    ``r`` (1, 2 N - 1, Dh), or None: the table of relative positions, r[N - 1 - (i - j)] for query i and key j.
    With ``written_out`` it is made of its parts even where `scaled_dot_product_attention` could do it.
    """

    arguments = ("q", "k", "v", "r")

    def __init__(self):
        super().__init__()
        self.softmax, self.written_out = Softmax(), False

    def forward(self, q, k, v, r=None):
        if r is None and not self.written_out:
            return F.scaled_dot_product_attention(q, k, v)
        scores = q @ k.transpose(-1, -2)  # (B, h, N, N)
        if r is not None:
            N = k.shape[-2]
            place = torch.arange(N)
            keys = r[0, N - 1 - (place[:, None] - place)]  # (N, N, Dh)
            scores = scores + (q.unsqueeze(-2) * keys).sum(-1)
        return self.softmax(scores / q.shape[-1] ** 0.5) @ v


class Attention(nn.Module):
    """Multi-head self-attention (Eq. 5-8): x (B, N, D) -> (B, N, D); ``r`` as in `Heads`."""

    arguments = ("x", "r")
    gradients = {
        "dWqkv": "qkv.weight", "dbqkv": "qkv.bias", "dWproj": "proj.weight", "dbproj": "proj.bias",
        "dwq": "q_norm.weight", "dbq": "q_norm.bias", "dwk": "k_norm.weight", "dbk": "k_norm.bias",
    }  # fmt: skip

    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        size, eps = config.width // config.num_heads, config.layernorm_eps
        self.q_norm, self.k_norm = (nn.LayerNorm(size, eps) if config.qk_norm else nn.Identity() for _ in range(2))
        self.attention = Heads()
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x, r=None):
        B, N, D = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        heads = self.attention(self.q_norm(q), self.k_norm(k), v, r)  # (B, h, N, Dh)
        return self.proj(heads.transpose(1, 2).reshape(B, N, D))


class MLP(nn.Module):
    """The two-layer perceptron of Eq. 3: x (B, N, D) -> (B, N, D)."""

    gradients = {"dW1": "fc1.weight", "db1": "fc1.bias", "dW2": "fc2.weight", "db2": "fc2.bias"}

    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_dim)
        self.gelu = nn.GELU(approximate={"tanh": "tanh", "erf": "none"}[config.gelu])
        self.fc2 = nn.Linear(config.mlp_dim, config.width)

    def forward(self, x):
        return self.fc2(self.gelu(self.fc1(x)))


class GatedMLP(nn.Module):
    """The gated MLP, SwiGLU: x (B, N, D) -> (B, N, D)."""

    gradients = MLP.gradients

    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_dim)
        self.fc2 = nn.Linear(config.mlp_dim // 2, config.width)

    def forward(self, x):
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


class LayerScale(nn.Module):
    """A learned factor for each entry: x (B, N, D) -> (B, N, D)."""

    gradients = {"dgamma": "gamma"}

    def __init__(self, config):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((config.width,), config.layer_scale))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """The encoder block, pre-norm (Eq. 2-3): z (B, N, D) -> (B, N, D); ``r`` as in `Heads`."""

    arguments = ("z",)

    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, config.layernorm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, config.layernorm_eps)
        self.mlp = (GatedMLP if config.mlp == "swiglu" else MLP)(config)
        self.ls1, self.ls2 = (LayerScale(config) if config.layer_scale else nn.Identity() for _ in range(2))

    def forward(self, z, r=None):
        z = z + self.ls1(self.attn(self.norm1(z), r))
        return z + self.ls2(self.mlp(self.norm2(z)))


# ---- tokens and positions


class PatchEmbed(nn.Module):
    """Patches, each mapped to the width, the class token and the positions (Eq. 1): (B, H, W, C) -> (B, N, D)."""

    arguments = ("images", "cls_token", "pos_embed")
    gradients = {"dW": "proj.weight", "db": "proj.bias"}

    def __init__(self, config):
        super().__init__()
        self.grid, self.patch = config.grid_size, config.patch_size
        self.proj = nn.Linear(config.patch_size**2 * config.patch_channels, config.width)

    def forward(self, images, cls_token=None, pos_embed=None):
        B, _, _, C = images.shape
        n, P = self.grid, self.patch
        patches = images.reshape(B, n, P, n, P, C).permute(0, 1, 3, 2, 4, 5).reshape(B, n * n, P * P * C)
        z = self.proj(patches)
        if cls_token is not None:
            z = torch.cat([cls_token.expand(B, -1, -1), z], dim=1)
        return z if pos_embed is None else z + pos_embed


class Registers(nn.Module):
    """Register tokens after the first ``at`` tokens: z (B, N, D) -> (B, N + R, D)."""

    arguments = ("z", "reg_token")

    def __init__(self, at):
        super().__init__()
        self.at = at

    def forward(self, z, reg_token):
        return torch.cat([z[:, : self.at], reg_token.expand(len(z), -1, -1), z[:, self.at :]], dim=1)


class Position(nn.Module):
    """A position for each token but the registers, added before a block: z (B, N, D) -> (B, N, D)."""

    arguments = ("z", "pos_embed")

    def __init__(self, at, registers):
        super().__init__()
        self.at, self.registers = at, registers

    def forward(self, z, pos_embed):
        none = pos_embed.new_zeros(1, self.registers, z.shape[-1])
        return z + torch.cat([pos_embed[:, : self.at], none, pos_embed[:, self.at :]], dim=1)


class Position2d(nn.Module):
    """Positions of columns X and rows Y, added to the patches: z (B, N, D) -> (B, N, D)."""

    arguments = ("z", "X", "Y")

    def forward(self, z, X, Y):
        g = X.shape[1]
        grid = torch.cat([X[:, None].expand(1, g, g, -1), Y[:, :, None].expand(1, g, g, -1)], dim=-1)
        prefix = z.shape[1] - g * g  # tokens before the patches
        return z + F.pad(grid.reshape(1, g * g, -1), (0, 0, prefix, 0))


class SequencePool(nn.Module):
    """The mean of the tokens, weighted by attention: x (B, N, D), scores (B, N, 1) -> (B, D)."""

    arguments = ("x",)

    def __init__(self):
        super().__init__()
        self.softmax = Softmax()

    def forward(self, x, score):
        return (self.softmax(score(x).transpose(1, 2)) @ x).squeeze(1)


# ---- the model


class Part(nn.Module):
    """A part of a model, ``function``, which needs no parameters of its own, as a module that hooks can see."""

    def __init__(self, function, *arguments):
        super().__init__()
        self.function, self.arguments = function, arguments

    def forward(self, *inputs):
        return self.function(*inputs)


class ViT(nn.Module):
    """`minivit.model.ViT`: images (B, H, W, C), uint8 or scaled to -1..1 -> logits (B, K)."""

    def __init__(self, config, dtype=torch.float32):
        super().__init__()
        c = self.config = config
        at = c.class_tokens
        if c.stem:
            self.stem = Stem(c)
        self.patch_embed = PatchEmbed(c)
        self.registers = Registers(at)
        kind = Position2d if c.pos_embed == "learned2d" else lambda: Position(at, c.registers)
        self.positions = nn.ModuleList([kind() for _ in range(c.depth)])  # one added before each block, if any
        self.blocks = nn.ModuleList([Block(c) for _ in range(c.depth)])
        self.norm = nn.LayerNorm(c.width, c.layernorm_eps)
        if c.pooling == "seq":
            self.attention_pool, self.pool = nn.Linear(c.width, 1), SequencePool()
        if c.pre_logits:
            self.pre_logits = nn.Linear(c.num_pooled, c.pre_logits)
        self.head = nn.Linear(c.num_features, c.num_classes)
        self.classify = Part(self._classify, "z")
        for spec in parameter_table(c):  # what belongs to no linear map and no norm: tokens, positions, kernels
            self._add_parameter(spec.name, spec.shape)
        if c.pos_embed == "sincos2d":
            fixed = torch.tensor(sincos2d(c.grid_size, c.width, prefix_tokens=at), dtype=dtype)
            self.register_buffer("fixed_position", fixed, persistent=False)
        self.to(dtype)

    def _add_parameter(self, name, shape):
        """A parameter under our name, in our shape, unless a module has it already."""
        module, (*path, leaf) = self, name.split(".")
        for each in path:
            if not hasattr(module, each):
                module.add_module(each, nn.Module())
            module = getattr(module, each)
        if not hasattr(module, leaf):
            module.register_parameter(leaf, nn.Parameter(torch.zeros(shape)))

    def load(self, params):
        """Take our parameters, {name: array in our shape}."""
        self.load_state_dict({name: torch.tensor(turned(value)) for name, value in params.items()})

    def position(self, i):
        """What is added before block i: () for nothing, one tensor, or two for columns and rows."""
        c = self.config
        if i and c.pos_at == "input":
            return ()
        if c.pos_embed == "sincos2d":
            return (self.fixed_position,)
        owner = self.blocks[i] if c.pos_at == "every" else self
        names = {"learned": ("pos_embed",), "learned2d": ("pos_embed_x", "pos_embed_y")}.get(c.pos_embed, ())
        return tuple(getattr(owner, name) for name in names)

    def relative(self, i):
        """The table of relative positions of block i, or None."""
        if self.config.pos_embed != "relative":
            return None
        return self.rel_pos if self.config.pos_at == "shared" else self.blocks[i].attn.rel_pos

    def embed(self, images):
        """The tokens that enter the first block: (B, N, D)."""
        c, position = self.config, self.position(0)
        if images.dtype == torch.uint8:
            images = (images.float() - 127.5) / 127.5
        if c.stem:
            images = self.stem(images, lambda names: [self.get_parameter(STEM + name) for name in names])
        cls_token = self.cls_token if c.class_tokens else None
        z = self.patch_embed(images, cls_token, position[0] if len(position) == 1 else None)
        if len(position) == 2:
            z = self.positions[0](z, *position)
        return self.registers(z, self.reg_token) if c.registers else z

    def forward(self, images):
        z = self.embed(images)
        for i, block in enumerate(self.blocks):
            if i and (position := self.position(i)):
                z = self.positions[i](z, *position)
            z = self.along_lines(z, block, i % 2) if self.config.attention == "axial" else block(z, self.relative(i))
        return self.classify(z)

    def along_lines(self, z, block, columns):
        """A block of axial attention: along the rows of patches, or along the columns."""
        g = self.config.grid_size
        grid = z.reshape(len(z), g, g, -1)
        grid = grid.transpose(1, 2) if columns else grid
        grid = block(grid.reshape(-1, g, z.shape[-1])).reshape(grid.shape)
        return (grid.transpose(1, 2) if columns else grid).reshape(z.shape)

    def _classify(self, z):
        c = self.config
        y = z[:, 0] if c.pooling == "cls" else z if c.class_tokens else z[:, c.registers :]
        y = self.norm(y.mean(dim=1) if c.pooling == "avg" else y)
        if c.pooling == "mean":
            y = y.mean(dim=1)
        elif c.class_tokens and c.pooling != "cls":
            others = y[:, 1 + c.registers :] if c.pooling == "cls+mean" else y[:, 1:2]
            y = torch.cat([y[:, 0], others.mean(dim=1)], dim=1)
        elif c.pooling == "seq":
            y = self.pool(y, self.attention_pool)
        if c.pre_logits:
            y = self.pre_logits(y).tanh()
        return self.head(y)
