"""transformers' ViTs, a ``.safetensors`` with a ``config.json``: ViT, DeiT, ViT-MSN, MAE's encoder, I-JEPA, DINOv2.

Every key of config.json is followed, compared with the tensors, or refused with its name; those that change nothing of
what is computed are named in a note.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar

from minivit.base.errors import InputError
from minivit.weights.layouts.layout import POSITIONS, PREFIXES, SIZES, Layout
from minivit.weights.layouts.processors import of_transformers
from minivit.weights.preprocessing import Preprocessing
from minivit.weights.tensor_files import read_json

BLOCK = "vit.encoder.layer.{i}"
BASES = "vit|deit|ijepa|dinov2|dinov2_with_registers"  # what each program's classifier calls its model
KINDS = {  # model_type: LayerNorm's eps and pixels where nothing is said; what a classifier reads
    "vit": {"layernorm_eps": 1e-12, "pixels": "half", "pooling": "token"},
    "deit": {"layernorm_eps": 1e-12, "pixels": "imagenet", "pooling": "token"},
    "vit_msn": {"layernorm_eps": 1e-6, "pixels": "imagenet", "pooling": "token"},
    "vit_mae": {"layernorm_eps": 1e-12, "pixels": "imagenet", "pooling": "token"},
    "ijepa": {"layernorm_eps": 1e-12, "pixels": "imagenet", "pooling": "avg"},
    "dinov2": {"layernorm_eps": 1e-6, "pixels": "imagenet", "pooling": "cls+mean"},
    "dinov2_with_registers": {"layernorm_eps": 1e-6, "pixels": "imagenet", "pooling": "cls+mean"},
}
GELUS = {
    "gelu": "erf", "gelu_python": "erf", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh",
    "gelu_accurate": "tanh", "gelu_python_tanh": "tanh",
}  # fmt: skip
CLASSES = r"(ViT|DeiT|ViTMSN|ViTMAE|IJepa|Dinov2|Dinov2WithRegisters)"
CLASSES += r"(Model|Backbone|ForImageClassification(WithTeacher)?|ForPreTraining|ForMaskedImageModeling)"
EXPECTED = {
    "hidden_size": "width", "num_hidden_layers": "depth", "intermediate_size": "mlp_dim", "num_channels": "channels",
    "patch_size": "patch_size", "num_register_tokens": "registers", "pooler_output_size": "pre_logits",
}  # fmt: skip
FOLLOWED = {
    *EXPECTED, "model_type", "architectures", "num_attention_heads", "hidden_act", "layer_norm_eps", "image_size",
    "qkv_bias", "pooler_act", "id2label", "label2id", "mlp_ratio", "use_swiglu_ffn", "problem_type", "num_labels",
}  # fmt: skip
IDLE = {  # of training, of other tasks, of how results are returned, of generation
    "hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "initializer_range", "layerscale_value",
    "encoder_stride", "mask_ratio", "norm_pix_loss", "decoder_hidden_size", "decoder_num_hidden_layers",
    "decoder_num_attention_heads", "decoder_intermediate_size", "use_mask_token", "apply_layernorm",
    "reshape_hidden_states", "out_features", "out_indices", "stage_names", "transformers_version", "torch_dtype",
    "dtype", "finetuning_task", "task_specific_params", "return_dict", "output_hidden_states", "output_attentions",
    "torchscript", "use_bfloat16", "tf_legacy_loss", "pruned_heads", "tie_word_embeddings", "is_encoder_decoder",
    "is_decoder", "cross_attention_hidden_size", "add_cross_attention", "tie_encoder_decoder",
    "chunk_size_feed_forward", "tokenizer_class", "prefix",
    "bos_token_id", "pad_token_id", "eos_token_id", "sep_token_id",
    "decoder_start_token_id", "name_or_path", "attn_implementation", "use_cache", "gradient_checkpointing",
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores",
    "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
}  # fmt: skip


class HuggingFace(Layout):
    """transformers' files."""

    name = "hf"
    names = {
        "cls_token": "vit.embeddings.cls_token",
        "dist_token": "vit.embeddings.distillation_token",
        "reg_token": "vit.embeddings.register_tokens",
        "pos_embed": "vit.embeddings.position_embeddings",
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        "blocks.{i}.norm1": f"{BLOCK}.layernorm_before",
        "blocks.{i}.attn.qkv": tuple(f"{BLOCK}.attention.attention.{part}" for part in ("query", "key", "value")),
        "blocks.{i}.attn.proj": f"{BLOCK}.attention.output.dense",
        "blocks.{i}.ls1.gamma": f"{BLOCK}.layer_scale1.lambda1",
        "blocks.{i}.norm2": f"{BLOCK}.layernorm_after",
        "blocks.{i}.mlp.fc1": f"{BLOCK}.intermediate.dense",
        "blocks.{i}.mlp.fc2": f"{BLOCK}.output.dense",
        "blocks.{i}.ls2.gamma": f"{BLOCK}.layer_scale2.lambda1",
        "norm": "vit.layernorm",
        "pre_logits": "vit.pooler.dense",
        "head": "classifier",
    }
    aliases = (
        (r"^cls_classifier\.", "classifier."),
        (rf"^(?!({BASES})\.|classifier\.|distillation_classifier\.)", "vit."),  # a model without its classifier
        (rf"^({BASES})\.", "vit."),
        (r"^vit\.layers\.", "vit.encoder.layer."),  # state_dict() of transformers 5, whose files keep the old names
        (r"\.attention\.q_proj\.", ".attention.attention.query."),
        (r"\.attention\.k_proj\.", ".attention.attention.key."),
        (r"\.attention\.v_proj\.", ".attention.attention.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
        (r"(layer\.\d+)\.norm1\.", r"\1.layernorm_before."),  # DINOv2
        (r"(layer\.\d+)\.norm2\.", r"\1.layernorm_after."),
    )
    block = r"(?<=encoder\.layer\.)\d+"
    program: ClassVar[dict] = {"gelu": "erf", "layernorm_eps": 1e-12}
    mark = r"embeddings\.patch_embeddings\.projection\.weight"
    left_out = rf"((?:{BASES})\.)?(decoder\.|embeddings\.mask_token)"
    distilled = ("classifier", "distillation_classifier")
    holds = {**SIZES, **POSITIONS, "pooling": ("cls",), "gelu": None, "layernorm_eps": None}

    def modules(self):
        return super().modules() | {self.distilled[1]}

    def tensors_in(self, tensors):
        key = next((k for k in tensors if re.search(rf"(^|\.){self.mark}$", k)), None)
        if key is None:
            return None
        outer = re.fullmatch(rf"((?:(?:{PREFIXES})\.)*)(?:(?:{BASES})\.)?{self.mark}", key)
        if outer is None:  # another model's: its names are refused one by one
            return tensors, ""
        prefix = outer[1]
        return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}, prefix

    def facts(self, extra, source):
        where, tensors = source.where, source.tensors
        read, idle = self._preprocessing(where)
        notes = [f"preprocessor_config.json: of no effect here: {', '.join(idle)}"] if idle else []
        labelled = any(key.startswith("classifier.") for key in tensors)
        first = "first" if f"{self.names['reg_token']}" in tensors else "all"
        common = {"preprocessing": read, "notes": notes, "prefix_positions": first}
        if not extra:
            guess = "deit" if self.names["dist_token"] in tensors else "vit"
            pooling = None
            if labelled and tensors["classifier.weight"].shape[-1:] == (2 * self._width(tensors),):
                guess, pooling = "dinov2", "cls+mean"
            elif self.names["cls_token"] not in tensors:
                guess = "ijepa"
            scaled = any(".layer_scale1." in key for key in tensors)
            eps = {"layernorm_eps": 1e-6} if scaled else {}
            return common | {"pixels": KINDS["dinov2" if scaled else guess]["pixels"], "pooling": pooling} | eps
        check_config({"model_type": "vit"} | extra, where)
        kind = extra.get("model_type", "vit")
        _check_keys(extra, where)
        _check_values(extra, where, pooled=self.names["pre_logits"] + ".weight" in tensors)
        beside = set() if self.names["pre_logits"] + ".weight" in tensors else {"pooler_act", "pooler_output_size"}
        if idle := sorted(key for key in extra if key in IDLE | beside or key.startswith("_")):
            notes.append(f"config.json: of no effect on what is computed: {', '.join(idle)}")
        self._check_qkv(extra, tensors, where)
        ours, facts = KINDS[kind], {}
        facts["pooling"] = ours["pooling"]
        if facts["pooling"] == "cls+mean" and not labelled:
            facts["pooling"] = "token"
        names = extra.get("id2label") or {}
        if not isinstance(names, dict):
            raise InputError(f"{where}: id2label is {names!r}; it must name the class of each number")
        names = [names.get(str(k)) for k in range(len(names))]
        if isinstance(extra.get("label2id"), dict) and extra["label2id"] != {n: k for k, n in enumerate(names)}:
            notes.append("config.json: label2id contradicts id2label, which is followed")
        return common | facts | {
            "heads": extra.get("num_attention_heads", 12),
            "gelu": GELUS[extra.get("hidden_act", "gelu")],
            "layernorm_eps": extra.get("layer_norm_eps", ours["layernorm_eps"]),
            "image_size": extra.get("image_size"),
            "pixels": ours["pixels"],
            "class_names": None if names == [f"LABEL_{k}" for k in range(len(names))] else names,
            "expected": _expected(extra, tensors),
        }  # fmt: skip

    def _width(self, tensors):
        """The width, of the patch embedding."""
        return tensors[f"{self.names['patch_embed.proj']}.weight"].shape[0]

    def _preprocessing(self, where):
        """What preprocessor_config.json says: (`Preprocessing` or None, keys of no effect)."""
        path = Path(where).with_name("preprocessor_config.json")
        content = read_json(path)
        return of_transformers(content, path) if content else (None, [])

    def _check_qkv(self, extra, tensors, where):
        present = any(key.endswith("attention.query.bias") for key in tensors)
        said = extra.get("qkv_bias", True)
        if said is not present:
            there = "there are such biases" if present else "there are none"
            raise InputError(f"{where}: its config.json says qkv_bias {said}, and {there}")

    def check_tensors(self, source):
        if source.has("pre_logits.weight") and source.has("head.weight"):
            raise InputError(f"{source.where} holds a pooler and a classifier, which transformers never uses together")

    def texts(self, config, class_names, preprocessing):
        return {
            "config.json": hf_config(config, class_names),
            "preprocessor_config.json": hf_preprocessor(config, preprocessing),
        }


def check_config(extra, where):
    """Raises InputError if a config.json of transformers is of another model than those that are known here."""
    kind = extra.get("model_type")
    if kind is not None and kind not in KINDS:
        raise InputError(f"{where}: its config.json is of a {kind!r}, not of a ViT known here ({', '.join(KINDS)})")
    if extra.get("use_swiglu_ffn"):
        raise InputError(f"{where}: its MLPs are gated (use_swiglu_ffn), with biases that ours do not have")


def _check_keys(extra, where):
    """Refuses keys of config.json that nobody knows here."""
    known = FOLLOWED | IDLE
    unknown = sorted(key for key in extra if key not in known and not key.startswith("_") and extra[key] is not None)
    if unknown:
        raise InputError(
            f"{where}: config.json has the unknown key {unknown[0]!r}; take it out if it changes nothing of what is "
            "computed"
        )


def _check_values(extra, where, *, pooled):
    """Refuses values of config.json that ours has not."""
    names = extra.get("architectures") or []
    strange = [name for name in names if not re.fullmatch(CLASSES, str(name))] if isinstance(names, list) else [names]
    if strange:
        raise InputError(f"{where}: its config.json is of the class {strange[0]!r}, which is not known here")
    act = extra.get("hidden_act", "gelu")
    if not isinstance(act, str) or act not in GELUS:
        raise InputError(f"{where}: its activation, hidden_act, is {act!r}; known here: {', '.join(GELUS)}")
    if pooled and extra.get("pooler_act", "tanh") != "tanh":
        raise InputError(f"{where}: its pooler's activation, pooler_act, is {extra['pooler_act']!r}, ours tanh")
    if extra.get("problem_type") not in (None, "single_label_classification"):
        raise InputError(f"{where}: problem_type is {extra['problem_type']!r}; only one class for each image is known")


def _expected(extra, tensors):
    """What config.json says of the sizes that the tensors have."""
    found = {ours: extra[key] for key, ours in EXPECTED.items() if extra.get(key) is not None}
    if "vit.pooler.dense.weight" not in tensors:
        found.pop("pre_logits", None)
    registers = tensors.get("vit.embeddings.register_tokens")
    if (said := found.pop("registers", None)) is not None and said != (registers.shape[1] if registers else 0):
        raise InputError(
            f"its config.json says num_register_tokens {said}, its tensors {registers and registers.shape}"
        )
    if "mlp_ratio" in extra:  # DINOv2's own; a key intermediate_size beside it is nobody's
        ratio, width = extra["mlp_ratio"], extra.get("hidden_size", 768)
        found["mlp_dim"] = int(width * ratio) if isinstance(ratio, int | float) and isinstance(width, int) else ratio
    return found


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


def hf_preprocessor(config, preprocessing):
    """How transformers makes images into what the model takes: as a `Preprocessing` says, pixels (x - 127.5) / 127.5.

    Raises  InputError: transformers cannot do it.
    """
    p: Preprocessing = preprocessing
    numbers = {name: number for number, name in {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}.items()}
    if p.resize not in ("none", "squash", "short") or p.resample not in numbers:
        raise InputError(f"transformers cannot resize images as this model's: {p.resize}, {p.resample}")
    squash = p.resize == "squash"
    size = {"height": p.size[0], "width": p.size[1]} if squash else {"shortest_edge": min(p.size, default=0)}
    kind = "ViT" if not p.crop else "DeiT" if squash else "Bit"
    found = {
        "image_processor_type": f"{kind}ImageProcessor",
        "do_resize": p.resize != "none",
        "resample": numbers[p.resample],
        "do_center_crop": p.crop is not None,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * config.channels,
        "image_std": [0.5] * config.channels,
    }
    found |= {"size": size} if p.resize != "none" else {}
    return found | ({"crop_size": {"height": p.crop[0], "width": p.crop[1]}} if p.crop else {})
