"""google-research/vision_transformer and big_vision: an ``.npz`` with the keys of a Flax module, joined by "/"."""

from __future__ import annotations

import re
from functools import partial
from typing import ClassVar

from minivit.base.errors import InputError
from minivit.model import STEM
from minivit.options.stem.resnet import official_name
from minivit.weights.layouts.layout import POSITIONS, SIZES, Layout, patch_shape
from minivit.weights.tensor_files import Tensor

BLOCK = "Transformer/encoderblock_{i}"
ATTENTION = f"{BLOCK}/MultiHeadDotProductAttention_1"
PREFIXES = ("", "params/", "params/img/", "opt/target/")  # what lies outside is not the model's
# The published names, and those that Flax gives the same modules now.
CURRENT = (("MultiHeadDotProductAttention_1/", "MultiHeadDotProductAttention_0/"), ("LayerNorm_2/", "LayerNorm_1/"),
           ("MlpBlock_3/", "MlpBlock_0/"))  # fmt: skip
MOST_BLOCKS = 10_000


class Official(Layout):
    """The official code's files."""

    name = "official"
    names = {
        "cls_token": "cls",
        "pos_embed": "Transformer/posembed_input/pos_embedding",
        "patch_embed.proj": "embedding",
        "blocks.{i}.norm1": f"{BLOCK}/LayerNorm_0",
        "blocks.{i}.attn.qkv": tuple(f"{ATTENTION}/{part}" for part in ("query", "key", "value")),
        "blocks.{i}.attn.proj": f"{ATTENTION}/out",
        "blocks.{i}.norm2": f"{BLOCK}/LayerNorm_2",
        "blocks.{i}.mlp.fc1": f"{BLOCK}/MlpBlock_3/Dense_0",
        "blocks.{i}.mlp.fc2": f"{BLOCK}/MlpBlock_3/Dense_1",
        "norm": "Transformer/encoder_norm",
        "pre_logits": "pre_logits",
        "head": "head",
    }
    aliases = (
        (r"MultiHeadDotProductAttention_0/", "MultiHeadDotProductAttention_1/"),
        (r"LayerNorm_1/", "LayerNorm_2/"),
        (r"MlpBlock_0/", "MlpBlock_3/"),
        (r"^pos_embedding$", "Transformer/posembed_input/pos_embedding"),  # big_vision
    )
    block = r"(?<=encoderblock_)\d+"
    holds = {**SIZES, **POSITIONS, "pooling": ("cls", "mean"), "pre_logits": None, "stem": None, "stem_width": None}
    positions_without_table = "sincos2d"
    program: ClassVar[dict] = {"gelu": "tanh", "layernorm_eps": 1e-6}
    mark = "embedding/kernel"
    may_lack_qkv_bias = False
    stem = r"(conv_root|gn_root|block\d+)/", 1, "block{}/unit{}/"

    def stem_key(self, name):
        return official_name(name.removeprefix(STEM))

    def ending(self, module, leaf):
        return "/bias" if leaf == "bias" else "/scale" if "norm" in module else "/kernel"

    def kernel_sizes(self, shape):
        return shape

    def outputs(self, shape):
        return shape[1]

    def shape(self, name, shape, config):
        D, h = config.width, config.num_heads
        apart = {"attn.qkv.weight": (D, h, D // h), "attn.qkv.bias": (h, D // h), "attn.proj.weight": (h, D // h, D)}
        return apart.get(name.split(".", 2)[-1], patch_shape(name, shape, config))

    def to_ours(self, array, shape):
        return array.reshape(shape)

    def to_theirs(self, array, shape):
        return array.reshape(shape)

    def tensors_in(self, tensors):
        for prefix in PREFIXES:
            if f"{prefix}embedding/kernel" in tensors:
                return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}, prefix
        return None

    def blocks_apart(self, key, tensor, where):
        if re.search(r"(^|/)gn[^/]*/[a-z]+$", key) and set(tensor.shape[:-1]) == {1}:
            return [(key, tensor._replace(shape=tensor.shape[-1:]))]  # (1, 1, 1, C) of old files; reshaped when read
        if not key.startswith("Transformer/encoderblock/"):
            return [(key, tensor)]
        if not tensor.shape or tensor.shape[0] > MOST_BLOCKS:  # big_vision's scan stacks the blocks
            raise InputError(f"{where}: {key} has shape {tensor.shape}, which is no stack of blocks")
        whole = []  # read once, for all blocks

        def block(i):
            if not whole:
                whole.append(tensor.read())
            return whole[0][i]

        return [
            (key.replace("encoderblock", f"encoderblock_{i}"), Tensor(tensor.shape[1:], tensor.kind, partial(block, i)))
            for i in range(tensor.shape[0])
        ]

    def facts(self, extra, source):
        """These files have nothing beside them."""
        return {}

    def heads(self, source, width):
        return source.shape("blocks.0.attn.qkv.weight", 3)[1]
