"""transformers' ViTForImageClassification and ViTModel, a ``.safetensors`` with a ``config.json``."""

from __future__ import annotations

from pathlib import Path

from minivit.base.errors import InputError
from minivit.weights.layouts.layout import POSITIONS, SIZES, Layout
from minivit.weights.tensor_files import read_json

BLOCK = "vit.encoder.layer.{i}"


class HuggingFace(Layout):
    """transformers' files."""

    name = "hf"
    names = {
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        "blocks.{i}.norm1": f"{BLOCK}.layernorm_before",
        "blocks.{i}.attn.qkv": tuple(f"{BLOCK}.attention.attention.{part}" for part in ("query", "key", "value")),
        "blocks.{i}.attn.proj": f"{BLOCK}.attention.output.dense",
        "blocks.{i}.norm2": f"{BLOCK}.layernorm_after",
        "blocks.{i}.mlp.fc1": f"{BLOCK}.intermediate.dense",
        "blocks.{i}.mlp.fc2": f"{BLOCK}.output.dense",
        "norm": "vit.layernorm",
        "pre_logits": "vit.pooler.dense",
        "head": "classifier",
    }
    aliases = (
        (r"^(?!vit\.|classifier\.)", "vit."),  # ViTModel
        (r"^vit\.layers\.", "vit.encoder.layer."),  # state_dict() of transformers 5, whose files keep the old names
        (r"\.attention\.q_proj\.", ".attention.attention.query."),
        (r"\.attention\.k_proj\.", ".attention.attention.key."),
        (r"\.attention\.v_proj\.", ".attention.attention.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    )
    block = r"(?<=encoder\.layer\.)\d+"
    holds = {**SIZES, **POSITIONS, "pooling": ("cls",), "gelu": None, "layernorm_eps": None}

    def tensors_in(self, tensors):
        own = any(key.endswith("embeddings.patch_embeddings.projection.weight") for key in tensors)
        return (tensors, "") if own else None

    def facts(self, extra, where):
        images = read_json(Path(where).with_name("preprocessor_config.json"))
        if extra.get("model_type", "vit") != "vit":
            raise InputError(f"{where}: its config.json is of a {extra['model_type']!r}, not of a ViT")
        if extra.get("pooler_act", "tanh") != "tanh":
            raise InputError(f"{where}: its pooler's activation is {extra['pooler_act']!r}, ours tanh")
        names = extra.get("id2label", {})
        names = [names.get(str(k)) for k in range(len(names))]
        return {
            "heads": extra.get("num_attention_heads"),
            "gelu": extra.get("hidden_act", "gelu"),
            "layernorm_eps": extra.get("layer_norm_eps", 1e-12),
            "image_size": extra.get("image_size"),
            "normalisation": (images.get("image_mean"), images.get("image_std")),
            "class_names": None if names == [f"LABEL_{k}" for k in range(len(names))] else names,
        }

    def check_tensors(self, source):
        if source.has("pre_logits.weight") and source.has("head.weight"):
            raise InputError(f"{source.where} holds a pooler and a classifier, which transformers never uses together")

    def texts(self, config, class_names):
        return {"config.json": hf_config(config, class_names), "preprocessor_config.json": hf_preprocessor(config)}


def hf_config(config, class_names):
    """The config.json of transformers' ViTForImageClassification."""
    return {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "hidden_act": "gelu" if config.gelu == "erf" else "gelu_pytorch_tanh",
        "layer_norm_eps": config.layernorm_eps,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": config.channels,
        "qkv_bias": True,
        "id2label": {str(k): name for k, name in enumerate(class_names)},
        "label2id": {name: k for k, name in enumerate(class_names)},
    }


def hf_preprocessor(config):
    """How transformers makes images into what the model takes: (x - 127.5) / 127.5."""
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": config.image_size, "width": config.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * config.channels,
        "image_std": [0.5] * config.channels,
    }
