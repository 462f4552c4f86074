"""Weights of other programs: the official ``.npz``, timm's and Hugging Face's ``.safetensors``, read and written.

    official      google-research/vision_transformer and big_vision: the keys of a Flax module, joined by "/"
    timm          timm.models.VisionTransformer's state_dict; with DeiT-3's names too
    hf            transformers' ViTForImageClassification and ViTModel

All of them hold the same numbers. What differs is names, `NAMES`, and how a matrix lies:

    weight of           ours                    official                    timm and Hugging Face
    a linear map        (in, out)               (in, out)                   (out, in)
    the patches         (P P C, D)              (P, P, C, D)                (D, C, P, P)
    q, k and v          (D, 3D)                 three of (D, h, Dh)         (3D, D), or three of (D, D)
    the heads' output   (D, D)                  (h, Dh, D)                  (D, D)
    a hybrid's stem     (kh, kw, I, O)          (kh, kw, I, O)              (O, I, kh, kw), not in Hugging Face's ViT

A file does not say all of a model. The GELU and LayerNorm's eps are its program's (official: tanh, 1e-6; timm: erf,
1e-6; Hugging Face: those of ``config.json``, else erf, 1e-12), and so are the number of heads, where shapes do not show
it, and the 32 groups of a stem's GroupNorm.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minivit.base import params as parameters
from minivit.base.errors import InputError
from minivit.base.settings import field_names
from minivit.model import PAPER_SIZES, STEM, ViT, ViTConfig, parameter_table
from minivit.options.stem.resnet import convolutions, official_name, output_of
from minivit.weights import checkpoint
from minivit.weights.checkpoint import is_finite, write_atomically
from minivit.weights.tensor_files import (
    FLOATS,
    Tensor,
    is_foreign,
    open_tensors,
    read_json,
    refused,
    write_npz,
    write_safetensors,
)

LAYOUTS = ("official", "timm", "hf")
MODEL_FILE = "model.safetensors"

_QKV = ("query", "key", "value")
_OFFICIAL, _HF = "Transformer/encoderblock_{i}", "vit.encoder.layer.{i}"
# Ours: official, timm, Hugging Face; None: not in that layout. A new part of the model needs a row here, nothing else
# if its matrices lie as those of a linear map do. (The stem's are in `minivit.options.stem.resnet.official_name`.)
NAMES = {
    "cls_token": ("cls", "cls_token", "vit.embeddings.cls_token"),
    "reg_token": (None, "reg_token", None),
    "pos_embed": ("Transformer/posembed_input/pos_embedding", "pos_embed", "vit.embeddings.position_embeddings"),
    "patch_embed.proj": ("embedding", "patch_embed.proj", "vit.embeddings.patch_embeddings.projection"),
    "blocks.{i}.norm1": (f"{_OFFICIAL}/LayerNorm_0", "blocks.{i}.norm1", f"{_HF}.layernorm_before"),
    "blocks.{i}.attn.qkv": (
        tuple(f"{_OFFICIAL}/MultiHeadDotProductAttention_1/{part}" for part in _QKV),
        "blocks.{i}.attn.qkv",
        tuple(f"{_HF}.attention.attention.{part}" for part in _QKV),
    ),
    "blocks.{i}.attn.q_norm": (None, "blocks.{i}.attn.q_norm", None),
    "blocks.{i}.attn.k_norm": (None, "blocks.{i}.attn.k_norm", None),
    "blocks.{i}.attn.proj": (
        f"{_OFFICIAL}/MultiHeadDotProductAttention_1/out",
        "blocks.{i}.attn.proj",
        f"{_HF}.attention.output.dense",
    ),
    "blocks.{i}.ls1.gamma": (None, "blocks.{i}.ls1.gamma", None),
    "blocks.{i}.norm2": (f"{_OFFICIAL}/LayerNorm_2", "blocks.{i}.norm2", f"{_HF}.layernorm_after"),
    "blocks.{i}.mlp.fc1": (f"{_OFFICIAL}/MlpBlock_3/Dense_0", "blocks.{i}.mlp.fc1", f"{_HF}.intermediate.dense"),
    "blocks.{i}.mlp.fc2": (f"{_OFFICIAL}/MlpBlock_3/Dense_1", "blocks.{i}.mlp.fc2", f"{_HF}.output.dense"),
    "blocks.{i}.ls2.gamma": (None, "blocks.{i}.ls2.gamma", None),
    "norm": ("Transformer/encoder_norm", "norm", "vit.layernorm"),
    "pre_logits": ("pre_logits", "pre_logits", "vit.pooler.dense"),
    "head": ("head", "head", "classifier"),
}
# Other names of the same tensors -> those of `NAMES`: (pattern, replacement) in the order in which they are applied.
ALIASES = {
    "official": (
        (r"MultiHeadDotProductAttention_0/", "MultiHeadDotProductAttention_1/"),  # current Flax
        (r"LayerNorm_1/", "LayerNorm_2/"),
        (r"MlpBlock_0/", "MlpBlock_3/"),
        (r"^pos_embedding$", "Transformer/posembed_input/pos_embedding"),  # big_vision
    ),
    "timm": (
        (r"\.gamma_([12])$", r".ls\1.gamma"),  # DeiT-3
        (r"^pre_logits\.fc\.", "pre_logits."),  # timm before 0.6
    ),
    "hf": (
        (r"^(?!vit\.|classifier\.)", "vit."),  # ViTModel
        (r"^vit\.layers\.", "vit.encoder.layer."),  # state_dict() of transformers 5, whose files keep the old names
        (r"\.attention\.q_proj\.", ".attention.attention.query."),
        (r"\.attention\.k_proj\.", ".attention.attention.key."),
        (r"\.attention\.v_proj\.", ".attention.attention.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    ),
}
CURRENT = (("MultiHeadDotProductAttention_1/", "MultiHeadDotProductAttention_0/"), ("LayerNorm_2/", "LayerNorm_1/"),
           ("MlpBlock_3/", "MlpBlock_0/"))  # fmt: skip
PREFIXES = ("", "params/", "params/img/", "opt/target/")  # of official files; what lies outside is not the model's
GELU_NAMES = {"gelu": "erf", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_tanh": "tanh"}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std of its pixels, red, green, blue, in 0..1
# timm's models whose heads are not 64 wide
WIDE_HEADS = {"huge": 16, "giant": 16, "gigantic": 16, "so400m": 16}
# timm's model with each stem, any size of which can be changed, but for the stem's width of 64 and its 32 groups
TIMM_STEMS = {
    "": "vit_base_patch16_224",
    "root": "vit_tiny_r_s16_p8_224",
    "2,2,2,2": "vit_small_r26_s32_224",
    "3,4,9": "vit_base_r50_s16_224",
    "3,4,6,3": "vit_large_r50_s32_224",
}
TIMM_EPS = (
    "timm's hybrids have other eps in GroupNorm and in the standardisation of kernels than the official code and "
    "minivit: its logits differ by about 1e-5 of the largest"
)


class Found(NamedTuple):
    """What `describe` found in a file, and what it had to assume."""

    layout: str
    tensors: dict  # of the model alone, under the names of `NAMES`
    config: ViTConfig
    has_prefix_positions: bool  # have class token and registers positions too?
    class_names: list | None  # if the file's config.json has them
    notes: list  # sentences
    where: str  # for messages
    normalisation: tuple = ()  # mean and std that its pictures were normalised by, (C,) each, if not 0.5 and 0.5

    def keys(self, name):
        """The keys of one of our parameters in this file."""
        return _keys_in(self.tensors, name, self.layout) or ()


# ---- names and shapes ------------------------------------------------------------------------------------------------


def keys_of(name, layout):
    """A parameter's keys in a layout: one, or three where queries, keys and values lie apart; None if it has none."""
    if name.startswith(STEM):
        return {"official": (official_name(name.removeprefix(STEM)),), "timm": (name,)}.get(layout)
    number = re.search(r"(?<=^blocks\.)\d+", name)
    pattern = re.sub(r"^blocks\.\d+", "blocks.{i}", name)
    module, _, leaf = pattern.rpartition(".")
    names = NAMES.get(pattern) or NAMES.get(module) or (None,) * len(LAYOUTS)
    theirs = names[LAYOUTS.index(layout)]
    if theirs is None:
        return None
    ending = ""
    if pattern not in NAMES:
        official = {"weight": "scale" if "norm" in module else "kernel", "bias": "bias"}
        ending = f"/{official[leaf]}" if layout == "official" else f".{leaf}"
    modules = theirs if isinstance(theirs, tuple) else (theirs,)
    return tuple(each.format(i=number and number[0]) + ending for each in modules)


def _keys_in(tensors, name, layout):
    """`keys_of` in a file: timm calls the last LayerNorm fc_norm where it comes after the pooling."""
    keys = keys_of(name, layout)
    if layout == "timm" and name.startswith("norm.") and f"fc_{keys[0]}" in tensors:
        return (f"fc_{keys[0]}",)
    return keys


def _their_shape(name, shape, config, layout):
    """The shape of a parameter, or of a third of ``attn.qkv``, in a layout, given ours."""
    D, h, P = config.width, config.num_heads, config.patch_size
    if name == "patch_embed.proj.weight":
        shape = (P, P, config.patch_channels, D)
    if len(shape) == 4:
        return shape if layout == "official" else (shape[3], shape[2], *shape[:2])
    if layout == "official":
        heads = {"attn.qkv.weight": (D, h, D // h), "attn.qkv.bias": (h, D // h), "attn.proj.weight": (h, D // h, D)}
        return heads.get(name.split(".", 2)[-1], shape)
    return shape[::-1] if len(shape) == 2 else shape


def _from_theirs(array, shape, layout):
    """An array of a layout in our shape."""
    if layout != "official":
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T if array.ndim == 2 else array
    return array.reshape(shape)


def _to_theirs(array, shape, layout):
    """The inverse of `_from_theirs`."""
    if layout == "official" or len(shape) not in (2, 4):
        return array.reshape(shape)
    if len(shape) == 4:
        return array.reshape(*shape[2:], *shape[1::-1]).transpose(3, 2, 0, 1)
    return array.T


def _part_shape(name, shape, layout):
    """The shape of what one key holds of a parameter of ours: a third of ``attn.qkv``, where it has three keys."""
    return (*shape[:-1], shape[-1] // len(keys_of(name, layout)))


# ---- reading ---------------------------------------------------------------------------------------------------------


class _Source:
    """A file's tensors under the names of `NAMES`, and what is asked of their shapes."""

    def __init__(self, tensors, where):
        self.where, self.notes = where, []
        self.layout, tensors = self._recognise(tensors)
        self.norm_is_last = self.layout == "timm" and "fc_norm.weight" in tensors
        self.tensors = {}
        for key, tensor in tensors.items():
            for pattern, replacement in ALIASES[self.layout]:
                key = re.sub(pattern, replacement, key)
            for name, one in self._unstacked(key, tensor):
                if name in self.tensors:
                    raise InputError(f"{where} holds {name} under two names")
                self.tensors[name] = one
        self.stem_units = self._stem_units()
        self._refuse_unknown()

    def _recognise(self, tensors):
        """The layout, and the tensors of the model without a prefix."""
        for prefix in PREFIXES:
            if f"{prefix}embedding/kernel" in tensors:
                inside = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
                if outside := [k for k in tensors if not k.startswith(prefix)]:
                    self.notes.append(f"left out, outside {prefix}: {_listed(outside)}")
                return "official", inside
        if "patch_embed.proj.weight" in tensors:
            return "timm", tensors
        if any(key.endswith("embeddings.patch_embeddings.projection.weight") for key in tensors):
            return "hf", tensors
        raise InputError(
            f"{self.where} has no layout known here (official .npz, timm or Hugging Face ViT); it holds "
            + _listed(tensors)
        )

    def _unstacked(self, key, tensor):
        """A tensor of all blocks, as big_vision's scan makes it, as those of single blocks; others as they are."""
        if self.layout == "official" and re.search(r"(^|/)gn[^/]*/[a-z]+$", key) and set(tensor.shape[:-1]) == {1}:
            return [(key, tensor._replace(shape=tensor.shape[-1:]))]  # (1, 1, 1, C) of old files; `build` reshapes it
        if not key.startswith("Transformer/encoderblock/"):
            return [(key, tensor)]
        if not tensor.shape or tensor.shape[0] > 10_000:
            raise InputError(f"{self.where}: {key} has shape {tensor.shape}, which is no stack of blocks")
        whole = []  # read once, for all blocks

        def block(i):
            if not whole:
                whole.append(tensor.read())
            return whole[0][i]

        return [
            (key.replace("encoderblock", f"encoderblock_{i}"), Tensor(tensor.shape[1:], tensor.kind, partial(block, i)))
            for i in range(tensor.shape[0])
        ]

    def _stem_units(self):
        """How many units each stage of the stem has: () for the root alone, None without a stem; refuses gaps."""
        official = self.layout == "official"
        begins = r"(conv_root|gn_root|block\d+)/" if official else re.escape(STEM)
        if self.layout == "hf" or not any(re.match(begins, key) for key in self.tensors):
            return None
        first, place = (1, "block{}/unit{}/") if official else (0, STEM + "stages.{}.blocks.{}.")
        pattern = re.escape(place).replace(r"\{\}", r"(\d{1,4})")
        seen = {(int(found[1]), int(found[2])) for key in self.tensors if (found := re.match(pattern, key))}
        units = []
        while seen:
            units.append(sum(s == first + len(units) for s, _ in seen))
            needed = {(first + len(units) - 1, first + u) for u in range(max(1, units[-1]))}
            if lacking := needed - seen:
                raise InputError(f"{self.where} lacks {place.format(*min(lacking))}, and holds later ones")
            seen -= needed
        return tuple(units)

    def stem_fields(self):
        """The settings of the stem, and how many pixels of the picture a step on its map is."""
        units = self.stem_units
        if units is None:
            return {}, 1
        root = f"{STEM}{'stem.' if units else ''}conv.weight"
        shape = self.shape(root, 4)
        channels, width = shape[2:] if self.layout == "official" else shape[1::-1]
        fields = {"channels": channels, "stem": ",".join(map(str, units)) or "root", "stem_width": width}
        return fields, output_of(width, units)[0]

    def _refuse_unknown(self):
        names = [row[LAYOUTS.index(self.layout)] for row in NAMES.values()]
        known = {each for name in names if name for each in (name if isinstance(name, tuple) else (name,))}
        known |= {"fc_norm"} if self.layout == "timm" else set()
        stem = [] if self.stem_units is None else convolutions(1, 1, self.stem_units)
        stem = {self.key(STEM + name) for names, _, _ in stem for name in names}
        unknown = []
        for key in self.tensors.keys() - stem:
            pattern = re.sub(r"(?<=encoderblock_)\d+|(?<=^blocks\.)\d+|(?<=encoder\.layer\.)\d+", "{i}", key)
            if pattern not in known and re.sub(r"[./](weight|bias|kernel|scale)$", "", pattern) not in known:
                unknown.append(key)
        if unknown:
            raise InputError(f"{self.where} holds what no part of the model takes: {_listed(unknown)}")

    def key(self, name):
        """The first key of a parameter."""
        return _keys_in(self.tensors, name, self.layout)[0]

    def has(self, name):
        return keys_of(name, self.layout) is not None and self.key(name) in self.tensors

    def shape(self, name, ndim):
        """The shape of a parameter in the file, of ``ndim`` axes."""
        if not self.has(name):
            raise InputError(f"{self.where} lacks {self.key(name)}")
        shape = self.tensors[self.key(name)].shape
        if len(shape) != ndim or not math.prod(shape):
            raise InputError(f"{self.where}: {self.key(name)} has shape {shape}")
        return shape

    def depth(self):
        """How many blocks there are; refuses gaps."""
        before, after = self.key("blocks.0.norm1.weight").split("0", 1)
        pattern = re.compile(re.escape(before) + r"(\d{1,4})[./]")
        numbers = {int(found[1]) for key in self.tensors if (found := pattern.match(key))}
        for i in range(max(1, len(numbers))):
            if i not in numbers:
                raise InputError(f"{self.where} lacks block {i} ({before}{i}{after})")
        return len(numbers)


def _listed(names):
    """The first few of some names, for a message."""
    names = sorted(names)
    return (", ".join(names[:4]) or "nothing") + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _hf_says(extra, where):
    """What a config.json of transformers says."""
    pictures = read_json(Path(where).with_name("preprocessor_config.json"))
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
        "normalisation": (pictures.get("image_mean"), pictures.get("image_std")),
        "class_names": None if names == [f"LABEL_{k}" for k in range(len(names))] else names,
    }


def _timm_says(extra, where):
    """What a config.json of timm says."""
    arguments = extra.get("model_args") or {}
    pictures = extra.get("pretrained_cfg") or {}
    return {
        "heads": arguments.get("num_heads"),
        "gelu": arguments.get("act_layer", "gelu"),
        "layernorm_eps": 1e-6,
        "image_size": arguments.get("img_size"),
        "class_names": extra.get("label_names"),
        "normalisation": (pictures.get("mean"), pictures.get("std")),
        "pooling": arguments.get("global_pool", extra.get("global_pool")),
        "no_embed_class": arguments.get("no_embed_class"),
        "layer_scale": arguments.get("init_values"),
        "architecture": extra.get("architecture"),
        "stem_groups": extra.get("stem_groups"),
    }


def _official_says(extra, where):
    """The official code has one GELU and one eps; its ``.npz`` files have nothing beside them."""
    return {"gelu": "gelu_tanh", "layernorm_eps": 1e-6}


_SAYS = {"official": _official_says, "timm": _timm_says, "hf": _hf_says}


def _heads(said, D, depth, source):
    """The number of heads, where neither shapes nor the user tell."""
    if said.get("heads"):
        return said["heads"]
    for word, heads in WIDE_HEADS.items():
        if word in re.split(r"[_\W]", str(said.get("architecture"))):
            return heads
    known = {(width, layers): heads for width, layers, heads, _ in PAPER_SIZES.values()}
    heads = known.get((D, depth), max(1, D // 64))
    source.notes.append(f"the file does not say how many heads there are: {heads} assumed (--heads)")
    return heads


def _pooling(said, wanted, has_cls, source):
    """Our name of the pooling: what the user says, what config.json says, or what the tensors' names suggest."""
    averaged = "avg" if source.norm_is_last else "mean"
    if said.get("pooling") is not None and not wanted:
        if said["pooling"] not in ("token", "avg"):
            raise InputError(f"{source.where}: its pooling is {said['pooling']!r}; only token and avg are known here")
        wanted = "cls" if said["pooling"] == "token" else "mean"
    if not wanted:
        if has_cls and source.norm_is_last:
            source.notes.append("fc_norm beside a class token: the mean of the patches is classified (--pooling)")
        wanted = "cls" if has_cls and not source.norm_is_last else "mean"
    return "cls" if wanted == "cls" else averaged


def _grid(rows, prefix, side, embedded, where):
    """Patches on a side, and whether the ``prefix`` tokens have positions too, from the rows of a position table.

    ``side`` (patches on a side) and ``embedded`` say what else is known, if they are not None.
    """
    possible = [
        (math.isqrt(patches), with_prefix)
        for patches, with_prefix in ((rows - prefix, True), (rows, False))[: 2 if prefix else 1]
        if patches > 0 and math.isqrt(patches) ** 2 == patches
    ]
    fitting = [(g, e) for g, e in possible if side in (None, g) and (embedded is None or not prefix or embedded == e)]
    if len(fitting) == 1:
        return fitting[0]
    about = f"{where} has {rows} positions for {prefix} tokens and the patches of a picture"
    if fitting:
        raise InputError(f"{about}, which can be read in two ways; say how large its pictures are (--image-size)")
    raise InputError(f"{about}, which " + (f"are not {side} x {side}" if side and possible else "are no square"))


def _side(size, P, where):
    """Patches on a side of a picture, None for an unknown size."""
    if isinstance(size, (list, tuple)) and size and all(each == size[0] for each in size):
        size = size[0]
    if not size:
        return None
    if type(size) is not int or size < 0 or size % P:
        raise InputError(f"{where}: pictures of {size} pixels are no multiple of the patches' {P}")
    return size // P


def _token_fields(source, said, P, pooling, image_size):
    """The settings that tell which tokens there are, and whether those before the patches have positions.

    P is in pixels of the picture, with a stem too.
    """
    has_cls = source.has("cls_token")
    registers = source.shape("reg_token", 3)[1] if source.has("reg_token") else 0
    fields = {"pooling": _pooling(said, pooling, has_cls, source)}
    fields["registers"] = registers + (has_cls and fields["pooling"] != "cls")
    if has_cls and fields["pooling"] != "cls":
        source.notes.append("the class token is not classified: here it is the first register")
    elif not has_cls and fields["pooling"] == "cls":
        raise InputError(f"{source.where} has no class token to classify (--pooling)")
    side, embedded = _side(image_size or said.get("image_size"), P, source.where), False
    if source.has("pos_embed"):
        rows, no_embed = source.shape("pos_embed", 3)[1], said.get("no_embed_class")
        no_embed = None if no_embed is None else not no_embed
        side, embedded = _grid(rows, has_cls + registers, side, no_embed, source.where)
    else:
        side, official = side or max(1, 224 // P), source.layout == "official"
        fields["pos_embed"] = "sincos2d" if official else "none"
        source.notes.append(
            f"the file has no positions: {'the fixed ones of big_vision' if official else 'none'}, for pictures of "
            f"{side * P} pixels (--image-size)"
        )
    return fields | {"image_size": side * P}, embedded


def describe_tensors(
    tensors, extra, where, *, heads=0, pooling="", image_size=0, num_classes=0, imagenet_pixels=False, changes=None,
    need_head=True,
):  # fmt: skip
    """What `describe` finds, of tensors by name and the content of their ``config.json``."""
    source = _Source(tensors, where)
    layout, notes = source.layout, source.notes
    said = _SAYS[layout](extra, where)
    if str(said["gelu"]) not in GELU_NAMES:
        raise InputError(f"{where}: its activation is {said['gelu']!r}; known here: {', '.join(GELU_NAMES)}")
    out = 1 if layout == "official" else 0  # the axis of what a linear map gives
    patch = source.shape("patch_embed.proj.weight", 4)
    P, P2, C, D = patch if layout == "official" else (*patch[2:], *patch[1::-1])
    if P != P2:
        raise InputError(f"{where} has patches of {P} x {P2} pixels; only square ones are known here")
    fields = {"patch_size": P, "channels": C, "width": D, "depth": source.depth()}
    stem, stride = source.stem_fields()
    fields |= stem
    if stem and layout == "timm":
        notes.append(TIMM_EPS)
    fields |= {"gelu": GELU_NAMES[said["gelu"]], "layernorm_eps": said["layernorm_eps"]}
    fields["mlp_dim"] = source.shape("blocks.0.mlp.fc1.weight", 2)[out]
    if layout == "official":
        shown = source.shape("blocks.0.attn.qkv.weight", 3)[1]
    else:
        fields["qk_norm"] = source.has("blocks.0.attn.q_norm.weight")
        shown = D // source.shape("blocks.0.attn.q_norm.weight", 1)[0] if fields["qk_norm"] else 0
    if heads and shown and heads != shown:
        raise InputError(f"{where} has {shown} heads, not {heads}")
    fields["num_heads"] = heads or shown or _heads(said, D, fields["depth"], source)
    if source.has("blocks.0.ls1.gamma"):
        fields["layer_scale"] = said.get("layer_scale") or 1e-5  # what it began with; nothing depends on it any more
    # head
    if source.has("pre_logits.weight"):
        fields["pre_logits"] = source.shape("pre_logits.weight", 2)[out]
        if layout == "hf" and source.has("head.weight"):
            raise InputError(f"{where} holds a pooler and a classifier, which transformers never uses together")
    if source.has("head.weight"):
        fields["num_classes"] = source.shape("head.weight", 2)[out]
        if num_classes not in (0, fields["num_classes"]):
            raise InputError(f"{where} has {fields['num_classes']} classes, not {num_classes}")
    elif num_classes or not need_head:
        fields["num_classes"] = num_classes or 1
        notes.append(f"the file has no head: one of zeros, for {fields['num_classes']} classes (--num-classes)")
    else:
        raise InputError(f"{where} has no head; say how many classes a new one, of zeros, shall have (--num-classes)")
    more, embedded = _token_fields(source, said, P * stride, pooling, image_size)
    fields |= more
    if stem and said.get("stem_groups") is not None:
        fields["stem_groups"] = said["stem_groups"]
    try:
        config = ViTConfig(**(fields | (changes or {})))
    except InputError as error:
        advice = " (--stem-groups)" if "stem_groups" in str(error) else ""
        raise InputError(f"{where}: {error}{advice}") from None
    names = said.get("class_names")
    if not (isinstance(names, list) and len(names) == config.num_classes and all(isinstance(n, str) for n in names)):
        names = None
    normalisation = _normalisation(IMAGENET if imagenet_pixels else said.get("normalisation"), config, source)
    found = Found(layout, source.tensors, config, embedded, names, notes, where, normalisation)
    _check(found, source)
    return found


def _normalisation(said, config, source):
    """Mean and std of a channel that pictures are normalised by, if they are not ours; (), if they are."""
    if not said or None in said:
        return ()
    mean, std = (np.broadcast_to(np.asarray(each, np.float64), config.channels) for each in said)
    if not (np.isfinite(mean) & (std > 0)).all():
        raise InputError(f"{source.where}: its pictures are normalised by mean {mean}, std {std}, which cannot be")
    if (mean == 0.5).all() and (std == 0.5).all():
        return ()
    if config.stem:
        raise InputError(
            f"{source.where}: its pictures are normalised by mean {mean}, std {std}; the standardised kernels of a "
            "hybrid's stem cannot take ours instead"
        )
    source.notes.append(f"pictures normalised by mean {mean}, std {std}: made part of the patch embedding")
    return mean, std


def _check(found, source):
    """Every tensor that the model needs is there, in the right shape and of floating-point numbers, and no other."""
    left, config = dict(source.tensors), found.config
    prefix_names = ("cls_token", "reg_token", "pos_embed")
    for spec in parameter_table(config):
        if spec.name in prefix_names:
            continue
        keys, shape = found.keys(spec.name), _part_shape(spec.name, spec.shape, found.layout)
        expected = _their_shape(spec.name, shape, config, found.layout)
        for key in keys:
            if (tensor := left.pop(key, None)) is None:
                if _may_lack(spec.name, source):
                    continue
                raise InputError(f"{found.where} lacks {key}")
            if tensor.shape != expected:
                raise InputError(f"{found.where}: {key} has shape {tensor.shape}, the model needs {expected}")
    for name in prefix_names:
        if source.has(name):
            tensor = left.pop(source.key(name))
            if tensor.shape != (1, tensor.shape[1], config.width) or (name == "cls_token" and tensor.shape[1] != 1):
                raise InputError(f"{found.where}: {source.key(name)} has shape {tensor.shape}")
    if left:
        raise InputError(f"{found.where} holds what the rest of it has no place for: {_listed(left)}")
    for key, tensor in source.tensors.items():
        if tensor.kind not in FLOATS:
            raise InputError(f"{found.where}: {key} holds {tensor.kind}, not floating-point numbers")


def _may_lack(name, source):
    """Zeros stand for a head that is not there, and for the biases of queries, keys and values of a model with none."""
    if name.startswith("head."):
        return not source.has("head.weight")
    no_bias = name.endswith("attn.qkv.bias") and not source.has("blocks.0.attn.qkv.bias")
    if no_bias and name.startswith("blocks.0."):
        source.notes.append("queries, keys and values have no biases: zeros")
    return no_bias and source.layout != "official"


def build(found, *, dtype=np.float32):
    """The `ViT` of what `describe` found.

    Raises  InputError: a tensor is damaged or holds a number that is not finite.
    """
    table = parameter_table(found.config)
    flat = np.zeros(parameters.count(table), dtype)
    views = parameters.views(flat, table)
    tokens = _tokens(found)
    for name, view in views.items():
        with np.errstate(over="ignore"):  # what is too large for float32 is infinite, and refused
            if name in tokens:
                view[...] = tokens[name]
            else:
                _fill(view, name, found)
        if not is_finite(view):
            key = (found.keys(name) or (name,))[0]
            raise InputError(f"{found.where}: {key} holds values that are not finite numbers")
    if found.normalisation:
        _fold(views["patch_embed.proj.weight"], views["patch_embed.proj.bias"], *found.normalisation)
    return ViT(found.config, flat=flat)


def _fill(view, name, found):
    """Copy a parameter from the file; what the file does not have stays zero."""
    shape = _part_shape(name, view.shape, found.layout)
    for k, key in enumerate(found.keys(name)):
        if key in found.tensors:
            part = _from_theirs(found.tensors[key].read(), shape, found.layout)
            view[..., k * shape[-1] : (k + 1) * shape[-1]] = part


def _fold(W, b, mean, std):
    """Make a patch embedding of pixels (x / 255 - mean) / std one of our pixels, in place.

    Math    ours v = 2 x / 255 - 1, theirs u = (v / 2 + 1/2 - mean) / std = a v + c for each channel:
            u W + b = v (a W) + (c W + b)
    Shapes  W (P*P*C, D), b (D,), mean and std (C,)
    """
    a, c = 0.5 / std, (0.5 - mean) / std
    repeats = len(W) // len(mean)
    b += np.tile(c, repeats) @ W
    W *= np.tile(a, repeats)[:, None]


def _tokens(found):
    """Class token, registers and positions in our form.

    A position is added to a token, whoever stores the sum: ours has one for the class token and none for registers, so
    that theirs is added to the registers, and the class token's is zero where they have none. A class token that is
    not classified is a register.
    """
    D, c = found.config.width, int(found.config.pooling == "cls")
    theirs = {}
    for name in ("cls_token", "reg_token", "pos_embed"):
        keys = keys_of(name, found.layout)
        if keys and keys[0] in found.tensors:
            theirs[name] = found.tensors[keys[0]].read()[0]  # (rows, D)
    tokens = {}
    prefix = [theirs[name] for name in ("cls_token", "reg_token") if name in theirs]
    prefix = np.concatenate([np.zeros((0, D)), *prefix])  # (p, D)
    if "pos_embed" in theirs:
        p = len(prefix) if found.has_prefix_positions else 0
        own, patches = np.zeros_like(prefix), theirs["pos_embed"][p:]
        own[:p] = theirs["pos_embed"][:p]
        tokens["pos_embed"] = np.concatenate([own[:c], patches])
        prefix[c:] += own[c:]
    return tokens | {"cls_token": prefix[:c], "reg_token": prefix[c:]}


def file_of(path):
    """The path of a model's weights: ``model.safetensors`` in a folder, or the path itself."""
    path = Path(path)
    return path / MODEL_FILE if path.is_dir() else path


def is_readable(path):
    """Is this a file, or a folder with one, for `read`, rather than a checkpoint of minivit?"""
    return is_foreign(file_of(path))


def describe(path, **options):
    """What is in a file, or in ``model.safetensors`` of a folder, without reading its tensors: a `Found`.

    ``heads``, ``pooling`` ("cls", "mean") and ``image_size`` say what the file does not; ``num_classes`` gives a file
    without a head one of zeros; ``imagenet_pixels`` says that pictures were normalised by ImageNet's mean and std, as
    for DeiT, where no file beside it does: the patch embedding then takes them our way; ``changes`` are fields of the
    `ViTConfig` to be set whatever the file says.
    Raises  InputError: there is no such file, it is broken, of no layout known here, or of a model that ours is not.
    """
    path = file_of(path)
    tensors = open_tensors(path)
    with refused(path):
        return describe_tensors(tensors, read_json(path.with_name("config.json")), str(path), **options)


def read(path, *, dtype=np.float32, **options):
    """A `ViT` from a file of another program, and what was found in it: see `describe` and `build`.

    Returns  (ViT, Found)
    """
    found = describe(path, **options)
    with refused(found.where):
        return build(found, dtype=dtype), found


def load_any(path, *, weights="auto", changes=None, named=True, **options):
    """A model from a checkpoint, or from a file of another program: see `checkpoint.load_model`, `read`.

    Returns  (ViT, meta, notes): meta has class names, of a checkpoint if they are to be ``named``, and which weights
    were taken; notes say what had to be assumed
    Raises  InputError: the file is missing, damaged, or of no kind known here.
    """
    path = Path(path)
    if not is_readable(path):
        model, meta = checkpoint.load_model(path, weights=weights)
        if named:
            checkpoint.class_names_of(meta, path)
        if given := [name for name, value in options.items() if value]:
            raise InputError(f"{path} is a checkpoint, which says itself what {given[0]} is")
        return ViT(replace(model.config, **(changes or {})), flat=model.flat), meta, []
    model, found = read(path, changes=changes, **options)
    names = found.class_names or [f"class {k}" for k in range(model.config.num_classes)]
    return model, {"class_names": names, "weights": "params"}, found.notes


# ---- writing ---------------------------------------------------------------------------------------------------------

_SIZES = dict.fromkeys(
    ("image_size", "patch_size", "channels", "num_classes", "width", "depth", "num_heads", "mlp_dim")
    + ("dropout", "attention_dropout", "drop_path")  # of training, not of the model
)
_STEM = dict.fromkeys(("stem", "stem_width"))
_TABLES = {"pos_embed": ("learned", "learned2d", "sincos2d", "none")}  # at the input: whatever makes the table
# What a layout, and the program that reads it, can express: the values of each setting, or None for all. Every other
# setting must be that of a plain model.
HOLDS = {
    "official": {**_SIZES, **_TABLES, **_STEM, "pooling": ("cls", "mean"), "pre_logits": None},
    "timm": {**_SIZES, **_TABLES, **_STEM, "pooling": ("cls", "mean", "avg"), "gelu": None}
    | dict.fromkeys(("registers", "qk_norm", "layer_scale", "stem_groups")),
    "hf": {**_SIZES, **_TABLES, "pooling": ("cls",), "gelu": None, "layernorm_eps": None},
}


def check_held(config, layout):
    """Raises InputError if a layout cannot hold a model of this configuration."""
    plain = ViTConfig()
    for name in field_names(ViTConfig):
        value = getattr(config, name)
        allowed = HOLDS[layout].get(name, (getattr(plain, name),))
        if allowed is not None and value not in allowed:
            advice = f"; --{name.replace('_', '-')} {allowed[0]} writes the same parameters as if they were trained so"
            known = " or ".join(str(each) or "none" for each in allowed)
            raise InputError(
                f"the layout {layout} cannot hold {name} = {value!r} (only {known})"
                + (advice if name in ("gelu", "layernorm_eps", "stem_groups") else "")
            )


def tensors_of(model, layout, *, naming="published"):
    """A model's parameters in a layout: {key: array}.

    Raises  InputError: see `check_held`.
    """
    config = model.config
    check_held(config, layout)
    c, arrays = int(config.pooling == "cls"), {}
    table = model.positions()
    if config.registers:  # timm has rows for the registers too
        empty = np.zeros((1, config.registers, config.width), table.dtype)
        table = np.concatenate([table[:, :c], empty, table[:, c:]], axis=1)
    others = {name: array for name, array in model.params.items() if not name.startswith("pos_embed")}
    for name, array in ({"pos_embed": table} | others).items():
        shape = _part_shape(name, array.shape, layout)
        for k, key in enumerate(keys_of(name, layout)):
            part = array[..., k * shape[-1] : (k + 1) * shape[-1]]
            arrays[key] = _to_theirs(part, _their_shape(name, shape, config, layout), layout)
    if layout == "timm" and config.pooling == "avg":
        arrays = {re.sub("^norm", "fc_norm", key): array for key, array in arrays.items()}
    for old, new in CURRENT if naming == "current" else ():
        arrays = {key.replace(old, new): array for key, array in arrays.items()}
    return arrays


def timm_arguments(config):
    """The arguments with which ``timm.models.VisionTransformer`` makes the same model; without its stem."""
    c, cls = config, config.pooling == "cls"
    ratio = c.mlp_dim // c.width if c.mlp_dim % c.width == 0 else c.mlp_dim / c.width
    if int(c.width * ratio) != c.mlp_dim:
        ratio = (c.mlp_dim + 0.5) / c.width  # timm cuts the product off
    arguments = {
        "img_size": c.image_size, "patch_size": c.patch_size, "in_chans": c.channels, "num_classes": c.num_classes,
        "embed_dim": c.width, "depth": c.depth, "num_heads": c.num_heads, "mlp_ratio": ratio,
        "global_pool": "token" if cls else "avg", "class_token": cls, "fc_norm": c.pooling == "avg",
    }  # fmt: skip
    arguments |= {"reg_tokens": c.registers} if c.registers else {}
    arguments |= {"qk_norm": True} if c.qk_norm else {}
    arguments |= {"init_values": c.layer_scale} if c.layer_scale else {}
    return arguments | ({"act_layer": "gelu_tanh"} if c.gelu == "tanh" else {})


def timm_call(config):
    """The Python expression that makes the same model, after ``import functools, timm, timm.models.resnetv2``."""
    given = [f"{name}={value!r}" for name, value in timm_arguments(config).items()]
    if config.stem:
        # timm's own models have GroupNorm's eps 1e-5; its kernels' eps, added to the variance, cannot be the official
        pieces = (
            f"in_chans={config.channels}, preact=False, stem_type='same', "
            "conv_layer=functools.partial(timm.layers.StdConv2dSame, eps=1e-8), "
            f"norm_layer=functools.partial(timm.layers.GroupNormAct, num_groups={config.stem_groups}, eps=1e-6)"
        )
        if units := config.stem_units:
            channels = [output_of(config.stem_width, units[: s + 1])[1] for s in range(len(units))]
            backbone = f"ResNetV2(layers={units}, channels={channels}, stem_chs={config.stem_width}, num_classes=0, "
            backbone += f"global_pool='', {pieces})"
        else:
            backbone = f"create_resnetv2_stem(out_chs={config.stem_width}, {pieces})".replace("in_chans", "in_chs")
        backbone = f"timm.models.resnetv2.{backbone}"
        given.append(f"embed_layer=functools.partial(timm.layers.HybridEmbed, backbone={backbone})")
    return f"timm.models.VisionTransformer({', '.join(given)})"


def timm_architecture(config):
    """timm's name of a model with this stem, every other size of which `timm_arguments` change; "" if it has none."""
    own = (config.stem_width, config.stem_groups) == (64, 32) or not config.stem
    return TIMM_STEMS.get(config.stem, "") if own else ""


def _timm_config(config, names):
    """The config.json of a timm model, for ``timm.create_model("local-dir:FOLDER", pretrained=True)``."""
    arguments = timm_arguments(config)
    root = f"{STEM}{'stem.' if config.stem_units else ''}conv"
    return {
        "architecture": timm_architecture(config) or "hybrid without a name in timm",  # so that timm says what it lacks
        "num_classes": config.num_classes,
        "num_features": config.width,
        "global_pool": arguments["global_pool"],
        "label_names": names,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [config.channels, config.image_size, config.image_size],
            "fixed_input_size": True,
            "mean": [0.5] * config.channels,
            "std": [0.5] * config.channels,
            "num_classes": config.num_classes,
            "first_conv": root if config.stem else "patch_embed.proj",
            "classifier": "head",
        },
    } | ({"stem_groups": config.stem_groups} if config.stem else {})


def hf_config(config, names):
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
        "id2label": {str(k): name for k, name in enumerate(names)},
        "label2id": {name: k for k, name in enumerate(names)},
    }


def _hf_preprocessor(config):
    """How transformers makes pictures into what the model takes: (x - 127.5) / 127.5."""
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


def write(path, model, layout, *, class_names, naming="published", overwrite=False):
    """Write a model as another program reads it; returns the paths that were written.

    official: a file. timm, hf: a folder with ``model.safetensors`` and ``config.json``, for timm's
    ``create_model("local-dir:PATH", pretrained=True)`` and transformers' ``from_pretrained(PATH)``.
    minivit: a checkpoint.
    Raises  InputError: the layout cannot hold the model, or something is there already and not to be overwritten;
    nothing is written then. OSError: see `write_atomically`.
    """
    path, config = Path(path), model.config
    texts = {}
    if layout == "timm":
        texts = {"config.json": _timm_config(config, class_names)}
    elif layout == "hf":
        texts = {"config.json": hf_config(config, class_names), "preprocessor_config.json": _hf_preprocessor(config)}
    paths = [path / name for name in (*texts, MODEL_FILE)] if texts else [path]
    if texts and path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; {layout} needs a folder for {' and '.join(p.name for p in paths)}")
    if not texts and path.is_dir():
        raise InputError(f"{path} is a folder; name the .npz file to write")
    if taken := [each for each in paths if each.exists() and not overwrite]:
        raise InputError(f"{taken[0]} is there already; choose another name, or --overwrite it")
    arrays = None if layout == "minivit" else tensors_of(model, layout, naming=naming)
    path.parent.mkdir(parents=True, exist_ok=True)
    if texts:
        path.mkdir(exist_ok=True)
        for name, content in texts.items():
            text = json.dumps(content, indent=2).encode()
            write_atomically(path / name, lambda file, text=text: file.write(text))
        write_safetensors(path / MODEL_FILE, arrays)
    elif layout == "official":
        write_npz(path, arrays)
    else:
        meta = checkpoint.model_meta(config) | {"class_names": list(class_names)}
        checkpoint.save(path, checkpoint.named_arrays("params", model.flat, model.table), meta)
    return paths
