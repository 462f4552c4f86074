"""The Vision Transformer (Dosovitskiy et al. 2020, arXiv:2010.11929).

Letters, as in the paper, here and in every layer:

    B images      N tokens      D width       L depth       h heads       Dh = D // h
    P patch       C channels    M MLP width   K classes     H, W image    R pre-logits width

Data flows  images (B, H, W, C) -> tokens (B, N, D) -> L blocks -> logits (B, K)  and back the same way.
"""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from minivit import params as parameters
from minivit.backend import array_module, plain
from minivit.errors import InputError
from minivit.layers.axial import axial_map, from_axis, to_axis
from minivit.layers.block import (
    BLOCK_PARAMETERS,
    LS1,
    LS2,
    QK_NORM,
    RELATIVE,
    BlockCache,
    block_backward,
    block_forward,
    block_jvp,
)
from minivit.layers.dropout import DropoutCache, dropout_backward, dropout_forward, dropout_jvp
from minivit.layers.gelu import KINDS as GELUS
from minivit.layers.head import POOLINGS, HeadCache, head_backward, head_forward, head_jvp
from minivit.layers.msa import attention_map
from minivit.layers.patch_embed import (
    PatchEmbedCache,
    patch_embed_backward,
    patch_embed_forward,
    patch_embed_jvp,
    scale_pixels,
    sincos2d,
)
from minivit.layers.position import PositionCache, position_backward, position_forward, position_jvp
from minivit.layers.position2d import Position2dCache, position2d_backward, position2d_forward, position2d_jvp
from minivit.layers.registers import RegistersCache, registers_backward, registers_forward, registers_jvp
from minivit.layers.resnet import (
    ResNetCache,
    convolutions,
    output_of,
    resnet_backward,
    resnet_forward,
    resnet_jvp,
)
from minivit.params import ParameterSpec, constant, lecun_normal, normal, ones, xavier_uniform, zeros
from minivit.settings import check_choice, check_range, check_types, setting

# Position embeddings, and where each can be: added to the input of the first block; of every block, each with its own;
# or the same one shared by all. Relative positions are in the blocks' attention.
POSITIONS = {
    "learned": ("input", "every", "shared"),
    "learned2d": ("input", "every", "shared"),
    "sincos2d": ("input", "shared"),
    "relative": ("every", "shared"),
    "none": ("input",),
}
ATTENTIONS = ("full", "axial")

# width, depth, heads, MLP width. Ti and S: the official code's configs; B, L, H: Table 1 of the paper.
PAPER_SIZES = {
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "H": (1280, 32, 16, 5120),
}
# The same four numbers for 32 x 32 pictures.
SMALL_SIZES = {
    "Nano": (64, 4, 4, 128),
    "Micro": (128, 6, 4, 256),
    "Mini": (192, 6, 3, 768),
    "Midi": (384, 7, 6, 1536),
}
# The hybrids: size, stem, patch. The number in a name is that of the official files; R+Ti/16 has patches of 32 pixels.
HYBRIDS = {
    "R+Ti/16": ("Ti", "root", 8),
    "R26+S/32": ("S", "2,2,2,2", 1),
    "R50+B/16": ("B", "3,4,9", 1),
    "R50+B/32": ("B", "3,4,6,3", 1),
    "R50+L/16": ("L", "3,4,9", 1),
    "R50+L/32": ("L", "3,4,6,3", 1),
}
PRESETS = tuple(
    [f"{size}/{patch}" for size in PAPER_SIZES for patch in (8, 14, 16, 32)]
    + list(HYBRIDS)
    + [f"{size}/{patch}" for size in SMALL_SIZES for patch in (2, 4, 8)]
)
STEM = "patch_embed.backbone."  # timm's prefix of the names of the stem's parameters


@dataclass(frozen=True)
class ViTConfig:
    """Everything that defines a model; wrong values are refused with a sentence that says what is wrong.

    Raises  InputError (a ValueError): from the constructor, for any impossible setting.
    """

    image_size: int = setting(32, "height and width of the pictures, pixels; those of a data set are scaled to it")
    patch_size: int = setting(4, "height and width P of a patch, pixels; with a stem, positions of its map")
    channels: int = setting(3, "colour channels C")
    num_classes: int = setting(10, "classes K")
    width: int = setting(192, "token width D")
    depth: int = setting(6, "number of blocks L")
    num_heads: int = setting(3, "attention heads h; the width must be a multiple")
    mlp_dim: int = setting(0, "hidden width M of the MLPs; 0 means 4 x width")
    pooling: str = setting(
        "cls",
        'what is classified: "cls" (class token), "mean" or "seq" (plain or learned mean of patches), "avg" (the plain '
        "mean before the last LayerNorm, as timm has it)",
    )
    pos_embed: str = setting(
        "learned",
        'positions: "learned", "learned2d" (of rows and columns), "sincos2d", "relative" (in the attention) or "none"',
    )
    pos_at: str = setting(
        "input",
        'where positions are added: "input", "every" (each block its own) or "shared" (each block the same)',
    )
    attention: str = setting(
        "full", 'who attends to whom: "full", or "axial" (rows of the grid in one block, columns in the next)'
    )
    pre_logits: int = setting(0, "width R of the tanh layer before the head; 0 for none")
    gelu: str = setting("tanh", 'GELU form: "tanh" (official code) or "erf" (timm)')
    registers: int = setting(0, "learned tokens beside the class token that the head does not read; 0 for none")
    qk_norm: bool = setting(False, "LayerNorm of each head's queries and keys")
    layer_scale: float = setting(0.0, "LayerScale: initial factor of the residual branches; 0 for none")
    stem: str = setting(
        "", 'ResNet that patches are cut from: "root", or the units of each stage, "3,4,9" for a ResNet-50; "" for none'
    )
    stem_width: int = setting(64, "channels of the stem's root")
    stem_groups: int = setting(32, "groups of channels in the stem's GroupNorm")
    layernorm_eps: float = setting(1e-6, "added to the variance in LayerNorm")
    dropout: float = setting(0.0, "dropout rate after the embedding, the MSA projection and both MLP layers")
    attention_dropout: float = setting(0.0, "dropout rate of the attention maps")
    drop_path: float = setting(0.0, "stochastic depth: drop rate of the last block, rising linearly from 0")

    def __post_init__(self):
        check_types(self)
        if self.mlp_dim == 0:
            object.__setattr__(self, "mlp_dim", 4 * self.width)
        check_range(self, 1, None, "image_size", "patch_size", "channels", "num_classes")
        check_range(self, 1, None, "width", "depth", "num_heads", "mlp_dim")
        check_range(self, 0, None, "pre_logits", "registers")
        check_range(self, 0.0, 1.0, "dropout", "attention_dropout", "drop_path", open_high=True)
        check_range(self, 1e-20, 1.0, "layernorm_eps")
        check_range(self, 0.0, 1.0, "layer_scale")
        check_choice(self, "pooling", POOLINGS)
        check_choice(self, "pos_embed", POSITIONS)
        check_choice(self, "pos_at", ("input", "every", "shared"))
        check_choice(self, "attention", ATTENTIONS)
        check_choice(self, "gelu", GELUS)
        check_range(self, 1, None, "stem_width", "stem_groups")
        if self.stem:
            self._check_stem()
        elif self.image_size % self.patch_size:
            raise InputError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.width % self.num_heads:
            raise InputError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        if self.qk_norm and self.width == self.num_heads:
            raise InputError("qk_norm needs heads of more than one dimension: LayerNorm of a single number is nothing")
        if self.pos_embed == "sincos2d" and self.width % 4:
            raise InputError(f'pos_embed "sincos2d" needs a width that is a multiple of 4, got {self.width}')
        if self.pos_embed == "learned2d" and self.width % 2:
            raise InputError(f'pos_embed "learned2d" halves the width, which must be even, got {self.width}')
        if self.pos_at not in (possible := POSITIONS[self.pos_embed]):
            names = " or ".join(f'"{name}"' for name in possible)
            raise InputError(f'with pos_embed "{self.pos_embed}", pos_at must be {names}, got "{self.pos_at}"')
        if self.pos_embed == "relative" and self.registers:
            raise InputError(
                'pos_embed "relative" counts along the tokens, where registers have no place: take 0 of them'
            )
        if self.attention == "axial" and (self.pooling == "cls" or self.registers):
            raise InputError(
                'attention "axial" is between patches alone: set pooling to "mean", "avg" or "seq", and registers to 0'
            )

    def _check_stem(self):
        if self.stem != "root":
            counts = [text.strip() for text in self.stem.split(",")]
            if not all(text.isascii() and text.isdigit() and int(text) for text in counts):
                raise InputError(
                    f'stem must be "root", or how many units each stage has, such as "3,4,9"; got {self.stem!r}'
                )
            object.__setattr__(self, "stem", ",".join(str(int(text)) for text in counts))
        if self.stem_width % self.stem_groups:
            raise InputError(f"stem_width {self.stem_width} is not a multiple of stem_groups {self.stem_groups}")
        if self.image_size % (self.stem_stride * self.patch_size):
            raise InputError(
                f"image_size {self.image_size} is not a multiple of {self.stem_stride * self.patch_size}: "
                f"stem {self.stem!r} makes maps of 1/{self.stem_stride} the size, which patch_size {self.patch_size} "
                "cuts up"
            )

    @classmethod
    def preset(cls, name, **changes):
        """A named model, e.g. ``ViTConfig.preset("B/16")`` or ``ViTConfig.preset("Micro/4", num_classes=100)``.

        Ti, S, B, L, H with patch 8, 14, 16, 32 and the hybrids R+Ti/16, R26+S/32, R50+B/16, R50+B/32, R50+L/16 and
        R50+L/32 at 224 pixels and 1000 classes; Nano, Micro, Mini, Midi with patch 2, 4, 8 at 32 pixels and 10 classes.
        """
        return cls(**{**preset_fields(name), **changes})

    @property
    def stem_units(self):
        """How many units each stage of the stem has: () for the root alone, and without a stem."""
        return tuple(int(count) for count in self.stem.split(",")) if self.stem not in ("", "root") else ()

    @property
    def stem_stride(self):
        """Pixels from one position of the stem's map to the next; 1 without a stem."""
        return output_of(self.stem_width, self.stem_units)[0] if self.stem else 1

    @property
    def patch_channels(self):
        """Channels of what patches are cut from: the picture, or the stem's map."""
        return output_of(self.stem_width, self.stem_units)[1] if self.stem else self.channels

    @property
    def grid_size(self):
        """Patches along one side of the image."""
        return self.image_size // (self.stem_stride * self.patch_size)

    @property
    def num_features(self):
        """How many numbers the head reads: R with a pre-logits layer, else D."""
        return self.pre_logits or self.width

    @property
    def num_tokens(self):
        """N: the patches, the registers, and the class token if there is one."""
        return self.grid_size**2 + self.registers + (self.pooling == "cls")

    @property
    def sequence_length(self):
        """Tokens that attend to each other: all N, or those of a row or column."""
        return self.grid_size if self.attention == "axial" else self.num_tokens


def preset_fields(name):
    """The `ViTConfig` fields that a preset sets, as a dict.

    Raises  InputError: unknown name; the message lists the known ones.
    """
    if name not in PRESETS:
        raise InputError(f"no preset {name!r}; the presets are {', '.join(PRESETS)}")
    if name in HYBRIDS:
        size, stem, patch = HYBRIDS[name]
        return preset_fields(f"{size}/16") | {"patch_size": patch, "stem": stem}
    size, patch = name.split("/")
    paper = size in PAPER_SIZES
    width, depth, num_heads, mlp_dim = (PAPER_SIZES if paper else SMALL_SIZES)[size]
    fields = {"patch_size": int(patch), "width": width, "depth": depth, "num_heads": num_heads, "mlp_dim": mlp_dim}
    return fields | ({"image_size": 224, "num_classes": 1000} if paper else {"image_size": 32, "num_classes": 10})


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


def checked_images(images, dtype):
    """Pictures as the patch embedding takes them: uint8 as it is, floats, which are taken as scaled, of a dtype.

    Shapes  images (B, H, W, C)  ->  (B, H, W, C), uint8 or of the given dtype
    Raises  InputError: pictures of another integer type; (on the host) a float picture that is not finite.
    """
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind in "iub":
        raise InputError(f"pictures are {images.dtype}; give them as uint8 (0..255), or as floats scaled to -1..1")
    if array_module(images) is np and not np.isfinite(images).all():
        bad = int(np.argmin(np.isfinite(images).reshape(len(images), -1).all(axis=1)))
        raise InputError(f"picture {bad} of the batch has a pixel that is NaN or infinite")
    return images.astype(dtype, copy=False)


def pixels(images, dtype):
    """Pictures as numbers: uint8 is scaled to (x - 127.5) / 127.5; floats are taken as scaled already.

    Shapes  images (B, H, W, C)  ->  (B, H, W, C) of the given dtype
    Raises  as `checked_images`.
    """
    images = checked_images(images, dtype)
    return scale_pixels(images, dtype) if images.dtype == np.uint8 else images


class BlockInput(NamedTuple):
    """What makes a block's cache again: all that is kept of it with ``recompute``."""

    z: Any  # (B, N, D)
    rng: np.random.Generator | None  # as it was before the block


class ViTCache(NamedTuple):
    """What `ViT.backward` reads: the caches of the stem, the embedding, its dropout, each block and the head.

    ``positions`` are those of the positions that were added before each block; None where none was, or where the patch
    embedding did it.
    """

    stem: ResNetCache | None
    embed: PatchEmbedCache
    registers: RegistersCache | None
    dropout: DropoutCache
    positions: tuple[PositionCache | Position2dCache | None, ...]
    blocks: tuple[BlockCache | BlockInput, ...]
    head: HeadCache


class Intermediates(NamedTuple):
    """What `ViT.intermediates` saw on the way."""

    logits: Any  # (B, K)
    attention: tuple  # L arrays (B, h, N, N): the attention maps of each block; zero where an axial one does not look
    features: tuple  # 1 + L arrays (B, N, D): the embedded tokens, then the output of each block


class ViT:
    """A configuration and its parameters; calls leave nothing behind, so threads may share one model.

    ``flat`` is the buffer that holds every parameter (the model's dtype and device are its), ``params`` the
    named views into it. Give ``flat`` to wrap an existing buffer (an average, a perturbed copy, a GPU array)
    without copying; otherwise the parameters are initialised from ``seed``.
    """

    def __init__(self, config, *, seed=0, dtype=np.float32, flat=None):
        self.config = config
        self.table = parameter_table(config)
        self.flat = parameters.initialise(self.table, seed=seed, dtype=dtype) if flat is None else flat
        self.params = parameters.views(self.flat, self.table)
        self._block_names = block_parameters(config)
        self._blocks = [self._of_block(self.params, i) for i in range(config.depth)]
        self._stem = self._of_stem(self.params)
        self._position_names = position_parameters(config)
        self._positions = [tuple(self.params[name] for name in names) for names in self._position_names]
        if config.pos_embed == "sincos2d":
            fixed = sincos2d(config.grid_size, config.width, prefix_tokens=int(config.pooling == "cls"))
            fixed = (array_module(self.flat).asarray(fixed, dtype=self.flat.dtype),)
            self._positions = [fixed] + [fixed if config.pos_at == "shared" else ()] * (config.depth - 1)
        # what the patch embedding adds; rows and columns are added behind it
        self._position = self._positions[0][0] if len(self._positions[0]) == 1 else None

    def __repr__(self):
        return f"ViT({self.config}, {self.flat.size:,} parameters, {self.flat.dtype})"

    def _of_block(self, named, i):
        """A block's own by their names in it; a table of relative positions may be that of all blocks."""
        shared = {"attn.rel_pos": named["rel_pos"]} if "rel_pos" in named else {}
        return {name: named[f"blocks.{i}.{name}"] for name in self._block_names if name not in shared} | shared

    @staticmethod
    def _of_stem(named):
        return {name.removeprefix(STEM): value for name, value in named.items() if name.startswith(STEM)}

    def drop_path_rate(self, i):
        """Stochastic depth's rate of block i: it rises linearly from 0 to the configuration's."""
        c = self.config
        return c.drop_path * (i / (c.depth - 1) if c.depth > 1 else 1.0)

    def _block_settings(self, i):
        c = self.config
        only_class_token = c.pooling == "cls" and i == c.depth - 1
        return {
            "num_heads": c.num_heads,
            "queries": 1 if only_class_token else None,  # the head reads no other row of the last block
            "gelu": c.gelu,
            "eps": c.layernorm_eps,
            "dropout": c.dropout,
            "attention_dropout": c.attention_dropout,
            "drop_path": self.drop_path_rate(i),
        }

    def positions(self):
        """What is added to class token and patches before the first block, as one table, whatever makes it.

        Math    learned2d: [x_b, y_a] for the patch in row a and column b, zeros for the class token; none: zeros
        Shapes  ->  (1, N, D), of N tokens without registers
        """
        c, added = self.config, self._positions[0]
        if len(added) == 1:
            return added[0]
        empty = array_module(self.flat).zeros((1, c.num_tokens - c.registers, c.width), self.flat.dtype)
        return position2d_forward(empty, *added)[0] if added else empty

    def feature_map(self, images):
        """What patches are cut from, the pictures themselves or the stem's map of them, and the stem's cache or None.

        Shapes  images (B, H, W, C)  ->  (B, H / stride, W / stride, C'), with ``stem_stride`` and ``patch_channels``
        """
        c = self.config
        if not c.stem:
            return checked_images(images, self.flat.dtype), None
        return resnet_forward(pixels(images, self.flat.dtype), self._stem, units=c.stem_units, groups=c.stem_groups)

    def _embed(self, images, rng):
        c, p = self.config, self.params
        if images.ndim != 4 or images.shape[1:] != (c.image_size, c.image_size, c.channels):
            expected = f"(B, {c.image_size}, {c.image_size}, {c.channels})"
            raise InputError(f"this model takes pictures of shape {expected}, got {tuple(images.shape)}")
        x, stem = self.feature_map(images)
        z, embed = patch_embed_forward(
            x,
            p["patch_embed.proj.weight"],
            p["patch_embed.proj.bias"],
            p.get("cls_token"),
            self._position,
            patch_size=c.patch_size,
        )
        position = registers = None
        if len(self._positions[0]) == 2:
            z, position = position2d_forward(z, *self._positions[0])
        if c.registers:
            z, registers = registers_forward(z, p["reg_token"], at=int(c.pooling == "cls"))
        z, dropout = dropout_forward(z, rate=c.dropout, rng=rng)
        return z, position, (stem, embed, registers, dropout)

    def _add_position(self, i, z):
        """The input of block i, from the output of the one before: with a position added, where there is one."""
        c, position = self.config, self._positions[i]
        if i == 0 or not position:  # the embedding has added that of the first block
            return z, None
        if len(position) == 2:
            return position2d_forward(z, *position)
        return position_forward(z, *position, at=int(c.pooling == "cls"), registers=c.registers)

    def _position_backward(self, i, dz, cache, grads):
        """Backward of the position added before block i; its gradients are added into ``grads``."""
        if cache is None:
            return dz
        back = position_backward if isinstance(cache, PositionCache) else position2d_backward
        dz, *gradients = back(dz, cache)
        for name, gradient in zip(self._position_names[i], gradients, strict=False):  # fixed positions have no name
            grads[name] += gradient
        return dz

    def _head(self, z):
        c = self.config
        return head_forward(z, self.params, pooling=c.pooling, registers=c.registers, eps=c.layernorm_eps)

    def at_half_size(self):
        """The same parameters, in the same buffer, as a model of pictures of half the height and width.

        A patch there stands for four of the others, and has the mean of their positions.
        Raises  InputError: positions are learned, or the patches of a side cannot be halved.
        """
        c = self.config
        if c.pos_embed not in ("sincos2d", "none"):
            raise InputError('pictures of half the size need fixed positions: pos_embed "sincos2d" or "none"')
        if c.grid_size % 2:
            raise InputError(f"pictures of half the size need an even number of patches on a side, not {c.grid_size}")
        small = ViT(replace(c, image_size=c.image_size // 2), flat=self.flat)
        if self._position is not None:  # one array, also where all blocks share it
            g, D = c.grid_size, c.width
            grid = self._position[:, -g * g :].reshape(g // 2, 2, g // 2, 2, D).mean(axis=(1, 3))
            small._position[:, -((g // 2) ** 2) :] = grid.reshape(1, -1, D)
        return small

    def gradient_buffer(self):
        """A flat buffer of zeros like the parameters, and its named views: what `backward` adds into."""
        flat = array_module(self.flat).zeros_like(self.flat)
        return flat, parameters.views(flat, self.table)

    def _axis(self, i, move, array):
        """`to_axis` or `from_axis` for block i: even ones attend along rows, odd ones along columns."""
        return move(array, self.config.grid_size, columns=i % 2 == 1) if self.config.attention == "axial" else array

    def _block(self, i, z, rng, **changes):
        settings = self._block_settings(i) | changes
        z, cache = block_forward(self._axis(i, to_axis, z), self._blocks[i], **settings, rng=rng)
        return self._axis(i, from_axis, z), cache

    def forward(self, images, *, rng=None, recompute=False):
        """Logits, and the cache for `backward`.

        Math    Eq. 1-4: embed (behind the stem, if there is one), L blocks, final LayerNorm, pooling, head
        Shapes  images (B, H, W, C) uint8, or floats scaled to about [-1, 1]  ->  logits (B, K)
        Dropout and stochastic depth act only when a Generator is given (training).
        With ``recompute``, the cache holds of each block its input alone, and `backward` runs the block forward once
        more, with the same dropout masks (Chen et al. 2016, arXiv:1604.06174).
        Raises  InputError: pictures of another shape, or with NaN pixels.
        """
        z, position, embedding = self._embed(images, rng)  # (B, N, D)
        positions, blocks = [position], []
        for i in range(self.config.depth):
            if i:
                z, position = self._add_position(i, z)
                positions.append(position)
            block_input = BlockInput(z, deepcopy(rng)) if recompute else None
            z, cache = self._block(i, z, rng)  # (B, N, D); (B, 1, D) at the end
            blocks.append(block_input or cache)
        logits, head = self._head(z)  # (B, K)
        return logits, ViTCache(*embedding, tuple(positions), tuple(blocks), head)

    def backward(self, dlogits, cache, grads, *, need_dimages=False):
        """Backward of `forward`: every parameter's gradient is *added* into ``grads`` (see `gradient_buffer`).

        Shapes  dlogits (B, K)  ->  dimages (B, H, W, C) with respect to the scaled pixels, or None unless asked for
        """
        # logits = head(z_L)
        dz = head_backward(dlogits, cache.head, grads)  # (B, N, D) or (B, 1, D)
        # z_l = block(position(z_{l-1})), in rows or columns where attention is axial
        for i in reversed(range(self.config.depth)):
            block = cache.blocks[i]
            if isinstance(block, BlockInput):
                _, block = self._block(i, block.z, deepcopy(block.rng))
            dz = block_backward(self._axis(i, to_axis, dz), block, self._of_block(grads, i))
            dz = self._axis(i, from_axis, dz)  # (B, N, D)
            if i:
                dz = self._position_backward(i, dz, cache.positions[i], grads)
        # z_0 = dropout(registers(position2d(embed(stem(images)))))
        dz = dropout_backward(dz, cache.dropout)
        if cache.registers is not None:
            dz, dreg_token = registers_backward(dz, cache.registers)
            grads["reg_token"] += dreg_token
        dz = self._position_backward(0, dz, cache.positions[0], grads)
        need_dx = need_dimages or cache.stem is not None
        dimages, dW, db, dcls_token, dpos_embed = patch_embed_backward(dz, cache.embed, need_dimages=need_dx)
        grads["patch_embed.proj.weight"] += dW
        grads["patch_embed.proj.bias"] += db
        if "cls_token" in grads:
            grads["cls_token"] += dcls_token
        if len(self._position_names[0]) == 1:  # a fixed sine-cosine embedding has no gradient to keep
            grads[self._position_names[0][0]] += dpos_embed
        if cache.stem is not None:
            dimages = resnet_backward(dimages, cache.stem, self._of_stem(grads), need_dimages=need_dimages)
        return dimages

    def jvp(self, imagesdot, flatdot, cache):
        """Forward-mode derivative of `forward`: how the logits move when pictures and parameters move.

        Shapes  imagesdot (B, H, W, C) in scaled pixels, flatdot (n,) like the parameters  ->  logitsdot (B, K)
        """
        if any(isinstance(block, BlockInput) for block in cache.blocks):
            raise ValueError("the cache of a forward with recompute=True holds no intermediate values to differentiate")
        tangents = parameters.views(flatdot, self.table)
        positions = [[tangents[name] for name in names] for names in self._position_names]
        if cache.stem is not None:
            imagesdot = resnet_jvp(imagesdot, self._of_stem(tangents), cache.stem)
        zdot = patch_embed_jvp(
            imagesdot,
            tangents["patch_embed.proj.weight"],
            tangents["patch_embed.proj.bias"],
            tangents.get("cls_token"),
            positions[0][0] if positions[0] else 0.0,  # a fixed sine-cosine embedding does not move
            cache.embed,
        )
        if cache.positions[0] is not None:
            zdot = position2d_jvp(zdot, *positions[0], cache.positions[0])
        if cache.registers is not None:
            zdot = registers_jvp(zdot, tangents["reg_token"], cache.registers)
        zdot = dropout_jvp(zdot, cache.dropout)
        for i in range(self.config.depth):
            if i and positions[i]:
                move = position_jvp if isinstance(cache.positions[i], PositionCache) else position2d_jvp
                zdot = move(zdot, *positions[i], cache.positions[i])
            zdot = block_jvp(self._axis(i, to_axis, zdot), self._of_block(tangents, i), cache.blocks[i])
            zdot = self._axis(i, from_axis, zdot)  # (B, N, D); (B, 1, D) at the end
        return head_jvp(zdot, tangents, cache.head)  # (B, K)

    def predict(self, images):
        """Logits alone, with no dropout; each block's cache is dropped at once.

        Shapes  images (B, H, W, C)  ->  logits (B, K)
        """
        return self._predicted(images)[0]

    def features(self, images):
        """What the head reads, with no dropout: a picture as the model sees it, for other classifiers to start from.

        Math    y of Eq. 4: after the final LayerNorm, the pooling, and the tanh of a pre-logits layer if there is one
        Shapes  images (B, H, W, C)  ->  (B, R), or (B, D) without a pre-logits layer
        """
        return self._predicted(images)[1].head.x

    def _predicted(self, images):
        z, *_ = self._embed(images, None)
        for i in range(self.config.depth):
            z, _ = self._block(i, self._add_position(i, z)[0], None)
        return self._head(z)

    def intermediates(self, images):
        """Logits, attention maps and token features of every block, with no dropout.

        Shapes  images (B, H, W, C)  ->  Intermediates: logits (B, K), L maps (B, h, N, N), 1 + L features (B, N, D)
        """
        with plain():  # kernels keep no attention maps
            z, *_ = self._embed(images, None)
            attention, features = [], [z]
            for i in range(self.config.depth):
                z, cache = self._block(i, self._add_position(i, z)[0], None, queries=None)  # every token
                seen = attention_map(cache.msa)
                if self.config.attention == "axial":
                    seen = self._axis(i, axial_map, seen)
                attention.append(seen)
                features.append(z)
            return Intermediates(self._head(z)[0], tuple(attention), tuple(features))
