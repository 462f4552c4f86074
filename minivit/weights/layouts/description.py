"""What model a file holds: its settings from the shapes, from the config.json beside it, and from the user.

A file does not say all of a model. The GELU and LayerNorm's eps are its program's (official: tanh, 1e-6; timm: erf,
1e-6; Hugging Face: those of ``config.json``, else erf, 1e-12), and so are the number of heads, where shapes do not show
it, and the 32 groups of a stem's GroupNorm. What is assumed is said in notes.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import numpy as np

from minivit.base.errors import InputError
from minivit.model import PAPER_SIZES, ViTConfig, parameter_table
from minivit.weights.layouts.hugging_face import HuggingFace
from minivit.weights.layouts.layout import Layout
from minivit.weights.layouts.official import Official
from minivit.weights.layouts.sources import Source, some_of
from minivit.weights.layouts.timm import Timm
from minivit.weights.tensor_files import FLOATS

LAYOUTS = {layout.name: layout for layout in (Official(), Timm(), HuggingFace())}
GELU_NAMES = {"gelu": "erf", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_tanh": "tanh"}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std of its pixels, red, green, blue, in 0..1
WIDE_HEADS = {"huge": 16, "giant": 16, "gigantic": 16, "so400m": 16}  # timm's models whose heads are not 64 wide
TOKENS = ("cls_token", "reg_token", "pos_embed")


class Contents(NamedTuple):
    """What a file of weights holds, and what had to be assumed of it."""

    layout: Layout
    tensors: dict  # of the model alone, under the names of the layout
    config: ViTConfig
    has_prefix_positions: bool  # have class token and registers positions too?
    class_names: list | None  # if the file's config.json has them
    notes: list  # sentences
    where: str  # for messages
    normalisation: tuple = ()  # mean and std that its images were normalised by, (C,) each, if not 0.5 and 0.5

    def keys(self, name):
        """The keys of one of our parameters in this file."""
        return self.layout.keys_in(self.tensors, name) or ()


def describe_tensors(
    tensors, extra, where, *, heads=0, pooling="", image_size=0, num_classes=0, imagenet_pixels=False, changes=None,
    need_head=True,
):  # fmt: skip
    """The `Contents` of tensors by name and of their config.json ``extra``; see `minivit.weights.layouts.describe`."""
    source = Source(tensors, where, LAYOUTS.values())
    layout = source.layout
    facts = layout.facts(extra, where)
    if str(facts["gelu"]) not in GELU_NAMES:
        raise InputError(f"{where}: its activation is {facts['gelu']!r}; known here: {', '.join(GELU_NAMES)}")
    layout.check_tensors(source)
    fields, stride = _body_fields(source, facts, heads)
    fields |= _head_fields(source, num_classes, need_head)
    tokens, embedded = _token_fields(source, facts, fields["patch_size"] * stride, pooling, image_size)
    fields |= tokens
    if source.stem_units is not None and facts.get("stem_groups") is not None:
        fields["stem_groups"] = facts["stem_groups"]
    try:
        config = ViTConfig(**(fields | (changes or {})))
    except InputError as error:
        advice = " (--stem-groups)" if "stem_groups" in str(error) else ""
        raise InputError(f"{where}: {error}{advice}") from None
    names = facts.get("class_names")
    if not (isinstance(names, list) and len(names) == config.num_classes and all(isinstance(n, str) for n in names)):
        names = None
    normalisation = _normalisation(IMAGENET if imagenet_pixels else facts.get("normalisation"), config, source)
    contents = Contents(layout, source.tensors, config, embedded, names, source.notes, where, normalisation)
    _check(contents, source)
    return contents


def _body_fields(source, facts, heads):
    """The settings of patches, stem and blocks, and how many pixels of the image a step on the stem's map is."""
    layout = source.layout
    P, P2, C, D = layout.kernel_sizes(source.shape("patch_embed.proj.weight", 4))
    if P != P2:
        raise InputError(f"{source.where} has patches of {P} x {P2} pixels; only square ones are known here")
    fields = {"patch_size": P, "channels": C, "width": D, "depth": source.depth()}
    stem, stride = source.stem_fields()
    fields |= stem
    if stem and layout.stem_note:
        source.notes.append(layout.stem_note)
    fields |= {"gelu": GELU_NAMES[facts["gelu"]], "layernorm_eps": facts["layernorm_eps"]}
    fields["mlp_dim"] = layout.outputs(source.shape("blocks.0.mlp.fc1.weight", 2))
    fields["qk_norm"] = source.has("blocks.0.attn.q_norm.weight")
    visible = layout.heads(source, D)
    if heads and visible and heads != visible:
        raise InputError(f"{source.where} has {visible} heads, not {heads}")
    fields["num_heads"] = heads or visible or likely_heads(facts, D, fields["depth"], source.notes)
    if source.has("blocks.0.ls1.gamma"):
        fields["layer_scale"] = facts.get("layer_scale") or 1e-5  # what it began with; nothing depends on it any more
    return fields, stride


def likely_heads(facts, width, depth, notes):
    """The number of heads, where neither shapes nor the user tell; an assumption is added to the notes."""
    if facts.get("heads"):
        return facts["heads"]
    for word, heads in WIDE_HEADS.items():
        if word in re.split(r"[_\W]", str(facts.get("architecture"))):
            return heads
    sizes = {(width, layers): heads for width, layers, heads, _ in PAPER_SIZES.values()}
    heads = sizes.get((width, depth), max(1, width // 64))
    notes.append(f"the file does not say how many heads there are: {heads} assumed (--heads)")
    return heads


def _head_fields(source, num_classes, need_head):
    """The settings of the head."""
    fields, outputs = {}, source.layout.outputs
    if source.has("pre_logits.weight"):
        fields["pre_logits"] = outputs(source.shape("pre_logits.weight", 2))
    if source.has("head.weight"):
        fields["num_classes"] = outputs(source.shape("head.weight", 2))
        if num_classes not in (0, fields["num_classes"]):
            raise InputError(f"{source.where} has {fields['num_classes']} classes, not {num_classes}")
    elif num_classes or not need_head:
        fields["num_classes"] = num_classes or 1
        source.notes.append(
            f"the file has no head: one of zeros, for {fields['num_classes']} classes (--num-classes)"
        )  # fmt: skip
    else:
        raise InputError(
            f"{source.where} has no head; say how many classes a new one, of zeros, shall have (--num-classes)"
        )
    return fields


def _token_fields(source, facts, P, pooling, image_size):
    """The settings that tell which tokens there are, and whether those before the patches have positions.

    P is in pixels of the image, with a stem too.
    """
    has_cls = source.has("cls_token")
    registers = source.shape("reg_token", 3)[1] if source.has("reg_token") else 0
    fields = {"pooling": _pooling(facts, pooling, has_cls, source)}
    fields["registers"] = registers + (has_cls and fields["pooling"] != "cls")
    if has_cls and fields["pooling"] != "cls":
        source.notes.append("the class token is not classified: here it is the first register")
    elif not has_cls and fields["pooling"] == "cls":
        raise InputError(f"{source.where} has no class token to classify (--pooling)")
    side, embedded = _side(image_size or facts.get("image_size"), P, source.where), False
    if source.has("pos_embed"):
        rows, no_embed = source.shape("pos_embed", 3)[1], facts.get("no_embed_class")
        no_embed = None if no_embed is None else not no_embed
        side, embedded = _grid(rows, has_cls + registers, side, no_embed, source.where)
    else:
        side = side or max(1, 224 // P)
        fields["pos_embed"] = source.layout.positions_without_table
        kind = "none" if fields["pos_embed"] == "none" else "the fixed ones of big_vision"
        source.notes.append(f"the file has no positions: {kind}, for images of {side * P} pixels (--image-size)")
    return fields | {"image_size": side * P}, embedded


def _pooling(facts, kind, has_cls, source):
    """Our name of the pooling: what the user says, what config.json says, or what the tensors' names suggest."""
    averaged = "avg" if source.norm_is_last else "mean"
    if facts.get("pooling") is not None and not kind:
        if facts["pooling"] not in ("token", "avg"):
            raise InputError(f"{source.where}: its pooling is {facts['pooling']!r}; only token and avg are known here")
        kind = "cls" if facts["pooling"] == "token" else "mean"
    if not kind:
        if has_cls and source.norm_is_last:
            source.notes.append("fc_norm beside a class token: the mean of the patches is classified (--pooling)")
        kind = "cls" if has_cls and not source.norm_is_last else "mean"
    return "cls" if kind == "cls" else averaged


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
    about = f"{where} has {rows} positions for {prefix} tokens and the patches of an image"
    if fitting:
        raise InputError(f"{about}, which can be read in two ways; say how large its images are (--image-size)")
    raise InputError(f"{about}, which " + (f"are not {side} x {side}" if side and possible else "are no square"))


def _side(size, P, where):
    """Patches on a side of an image, None for an unknown size."""
    if isinstance(size, (list, tuple)) and size and all(each == size[0] for each in size):
        size = size[0]
    if not size:
        return None
    if type(size) is not int or size < 0 or size % P:
        raise InputError(f"{where}: images of {size} pixels are no multiple of the patches' {P}")
    return size // P


def _normalisation(pair, config, source):
    """Mean and std of a channel that images are normalised by, if they are not ours; (), if they are."""
    if not pair or None in pair:
        return ()
    mean, std = (np.broadcast_to(np.asarray(each, np.float64), config.channels) for each in pair)
    if not (np.isfinite(mean) & (std > 0)).all():
        raise InputError(f"{source.where}: its images are normalised by mean {mean}, std {std}, which cannot be")
    if (mean == 0.5).all() and (std == 0.5).all():
        return ()
    if config.stem:
        raise InputError(
            f"{source.where}: its images are normalised by mean {mean}, std {std}; the standardised kernels of a "
            "hybrid's stem cannot take ours instead"
        )
    source.notes.append(f"images normalised by mean {mean}, std {std}: made part of the patch embedding")
    return mean, std


def _check(contents, source):
    """Every tensor that the model needs is there, in the right shape and of floating-point numbers, and no other."""
    rest, layout, where = dict(source.tensors), contents.layout, contents.where
    for spec in parameter_table(contents.config):
        if spec.name in TOKENS:
            continue
        expected = layout.shape(spec.name, layout.part_shape(spec.name, spec.shape), contents.config)
        for key in contents.keys(spec.name):
            if (tensor := rest.pop(key, None)) is None:
                if _may_lack(spec.name, source):
                    continue
                raise InputError(f"{where} lacks {key}")
            if tensor.shape != expected:
                raise InputError(f"{where}: {key} has shape {tensor.shape}, the model needs {expected}")
    for name in TOKENS:
        if source.has(name):
            tensor = rest.pop(source.key(name))
            if tensor.shape != (1, tensor.shape[1], contents.config.width) or (
                name == "cls_token" and tensor.shape[1] != 1
            ):
                raise InputError(f"{where}: {source.key(name)} has shape {tensor.shape}")
    if rest:
        raise InputError(f"{where} holds what the rest of it has no place for: {some_of(rest)}")
    for key, tensor in source.tensors.items():
        if tensor.kind not in FLOATS:
            raise InputError(f"{where}: {key} holds {tensor.kind}, not floating-point numbers")


def _may_lack(name, source):
    """Zeros stand for a head that is not there, and for the biases of queries, keys and values of a model with none."""
    if name.startswith("head."):
        return not source.has("head.weight")
    no_bias = name.endswith("attn.qkv.bias") and not source.has("blocks.0.attn.qkv.bias")
    if no_bias and name.startswith("blocks.0."):
        source.notes.append("queries, keys and values have no biases: zeros")
    return no_bias and source.layout.may_lack_qkv_bias
