"""torchvision.models.VisionTransformer's state_dict, a ``.safetensors``: read, not written."""

from __future__ import annotations

from minivit.base.errors import InputError
from minivit.weights.layouts.layout import Layout

BLOCK = "encoder.layers.encoder_layer_{i}"


class Torchvision(Layout):
    """torchvision's files."""

    name = "torchvision"
    names = {
        "cls_token": "class_token",
        "pos_embed": "encoder.pos_embedding",
        "patch_embed.proj": "conv_proj",
        "blocks.{i}.norm1": f"{BLOCK}.ln_1",
        "blocks.{i}.attn.qkv.weight": f"{BLOCK}.self_attention.in_proj_weight",
        "blocks.{i}.attn.qkv.bias": f"{BLOCK}.self_attention.in_proj_bias",
        "blocks.{i}.attn.proj": f"{BLOCK}.self_attention.out_proj",
        "blocks.{i}.norm2": f"{BLOCK}.ln_2",
        "blocks.{i}.mlp.fc1": f"{BLOCK}.mlp.0",
        "blocks.{i}.mlp.fc2": f"{BLOCK}.mlp.3",
        "norm": "encoder.ln",
        "pre_logits": "heads.pre_logits",
        "head": "heads.head",
    }
    aliases = ((r"\.mlp\.linear_1\.", ".mlp.0."), (r"\.mlp\.linear_2\.", ".mlp.3."))  # before version 0.12
    block = r"(?<=encoder_layer_)\d+"
    mark = r"conv_proj\.weight"
    writes = False

    def facts(self, extra, source):
        if extra:
            raise InputError(
                f"{source.where} is torchvision's; the config.json beside it is of another program: take it away"
            )
        return {"pixels": "imagenet", "pooling": "token", "notes": []}
