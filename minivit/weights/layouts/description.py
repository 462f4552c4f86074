"""What model a file holds: its settings from the shapes, from the config.json beside it, and from the user.

A file does not say all of a model. The GELU and LayerNorm's eps are its program's (official: tanh, 1e-6; timm: erf,
1e-6; Hugging Face: those of ``config.json``), and so are the number of heads, where shapes do not show it, what pixels
become, and the 32 groups of a stem's GroupNorm. What is assumed is said in one note.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import numpy as np

from minivit.base.errors import InputError
from minivit.model import PAPER_SIZES, ViTConfig, parameter_table
from minivit.weights.layouts.hugging_face import HuggingFace, check_config
from minivit.weights.layouts.layout import Layout
from minivit.weights.layouts.official import Official
from minivit.weights.layouts.sources import Source, some_of
from minivit.weights.layouts.timm import Timm
from minivit.weights.layouts.torchvision import Torchvision
from minivit.weights.preprocessing import HALF, PIXELS, Preprocessing, pixels_of
from minivit.weights.tensor_files import FLOATS

READABLE = (Official(), Timm(), HuggingFace(), Torchvision())
LAYOUTS = {layout.name: layout for layout in READABLE if layout.writes}
GELU_NAMES = {"erf": "exact GELU", "tanh": "tanh GELU"}  # in words
TOKENS = ("cls_token", "dist_token", "reg_token", "pos_embed")
UNSAID = {"heads": "--heads", "gelu": "--gelu", "layernorm_eps": "--layernorm-eps", "pixels": "--pixels"}


class Contents(NamedTuple):
    """What a file of weights holds, and what had to be assumed of it."""

    layout: Layout
    tensors: dict  # of the model alone, under the names of the layout
    config: ViTConfig
    prefix_positions: int  # how many of the tokens before the patches have positions too
    class_names: list | None  # if the file's config.json has them
    notes: list  # sentences
    where: str  # for messages
    preprocessing: Preprocessing | None = None  # of its images, as a file beside it says
    pixels: tuple = (1 / 255, *HALF)  # factor, mean and std: what pixels 0..255 become, u = (factor x - mean) / std

    def keys(self, name):
        """The keys of one of our parameters in this file."""
        if name.startswith("head.") and self.is_distilled:
            return tuple(f"{module}.{name.partition('.')[2]}" for module in self.layout.distilled)
        return self.layout.keys_in(self.tensors, name) or ()

    @property
    def is_distilled(self):
        """Are there two heads, of class token and distillation token?"""
        return self.config.pooling == "cls+register"


def describe_tensors(
    tensors, extra, where, *, heads=0, pooling="", image_size=0, num_classes=0, imagenet_pixels=False, pixels="",
    changes=None, need_head=True,
):  # fmt: skip
    """The `Contents` of tensors by name and of their config.json ``extra``; see `minivit.weights.layouts.describe`."""
    changes, pixels = changes or {}, pixels or ("imagenet" if imagenet_pixels else "")
    if not READABLE[0].tensors_in(tensors):  # official files have nothing beside them
        check_config(extra, where)
    source = Source(tensors, where, READABLE)
    layout = source.layout
    facts = layout.facts(extra, source)
    source.notes += facts.get("notes", [])
    layout.check_tensors(source)
    fields, stride = _body_fields(source, facts, heads)
    fields |= _head_fields(source, num_classes, need_head)
    tokens, prefix = _token_fields(source, facts, fields, stride, pooling, image_size)
    fields |= tokens
    if source.stem_units is not None and facts.get("stem_groups") is not None:
        fields["stem_groups"] = facts["stem_groups"]
    _check_expected(facts.get("expected", {}), fields | {"pooling": None}, source)
    try:
        config = ViTConfig(**(fields | changes))
    except InputError as error:
        advice = " (--stem-groups)" if "stem_groups" in str(error) else ""
        raise InputError(f"{where}: {error}{advice}") from None
    names = facts.get("class_names")
    if not (isinstance(names, list) and len(names) == config.num_classes and all(isinstance(n, str) for n in names)):
        names = None
    numbers = _pixels(facts, pixels, config, source)
    preprocessing = facts.get("preprocessing")
    if preprocessing and pixels:
        preprocessing = preprocessing._replace(rescale=1 / 255, mean=HALF[0], std=HALF[1])
    assumed = _assumptions(facts, config, {**changes, "heads": heads, "pixels": pixels}, numbers)
    contents = Contents(layout, source.tensors, config, prefix, names, [], where, preprocessing, numbers)
    _check(contents, source)
    _check_size(contents, source)
    return contents._replace(notes=assumed + source.notes)


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
    program = layout.program | {key: facts[key] for key in layout.program if facts.get(key) is not None}
    fields |= {"gelu": program["gelu"], "layernorm_eps": program["layernorm_eps"]}
    fields["mlp_dim"] = layout.outputs(source.shape("blocks.0.mlp.fc1.weight", 2))
    fields["qk_norm"] = source.has("blocks.0.attn.q_norm.weight")
    visible = layout.heads(source, D)
    if heads and visible and heads != visible:
        raise InputError(f"{source.where} has {visible} heads, not {heads}")
    said = facts.get("heads") or D // (facts.get("head_size") or D + 1)
    facts["heads"] = visible or said  # 0 if nothing tells
    fields["num_heads"] = heads or visible or said or likely_heads(D, fields["depth"])
    if source.has("blocks.0.ls1.gamma"):
        fields["layer_scale"] = facts.get("layer_scale") or 1e-5  # what it began with; nothing depends on it any more
    return fields, stride


def likely_heads(width, depth):
    """The number of heads, where neither shapes nor files nor the user tell: the paper's, or 64 numbers for each."""
    sizes = {(width, layers): heads for width, layers, heads, _ in PAPER_SIZES.values()}
    return sizes.get((width, depth), max(1, width // 64))


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


def _token_fields(source, facts, fields, stride, pooling, image_size):
    """The settings that tell which tokens there are, and how many of those before the patches have positions."""
    P, has_cls, has_dist = fields["patch_size"] * stride, source.has("cls_token"), source.has("dist_token")
    registers = (source.shape("reg_token", 3)[1] if source.has("reg_token") else 0) + has_dist
    tokens = {"pooling": _pooling(facts, pooling, has_cls, source)}
    tokens["registers"] = registers + (has_cls and not tokens["pooling"].startswith("cls"))
    if has_cls and not tokens["pooling"].startswith("cls"):
        source.notes.append("the class token is not classified: here it is the first register")
    elif not has_cls and tokens["pooling"].startswith("cls"):
        raise InputError(f"{source.where} has no class token to classify (--pooling)")
    if has_dist and tokens["pooling"] == "cls":
        source.notes.append("the distillation token has no head: here it is a register")
    side, embedded = _side(image_size or facts.get("image_size"), P, source.where), 0
    if source.has("pos_embed"):
        rows = source.shape("pos_embed", len(source.tensors[source.key("pos_embed")].shape))[-2]
        counts = {"all": has_cls + registers, "first": int(has_cls), "none": 0}
        said = facts.get("prefix_positions")
        allowed = [counts[said]] if said else sorted({counts["all"], counts["none"]}, reverse=True)
        side, embedded = _grid(rows, has_cls + registers, allowed, side, source.where)
    else:
        side = side or max(1, 224 // P)
        tokens["pos_embed"] = source.layout.positions_without_table
        kind = "none" if tokens["pos_embed"] == "none" else "the fixed ones of big_vision"
        source.notes.append(f"the file has no positions: {kind}, for images of {side * P} pixels (--image-size)")
    return tokens | {"image_size": side * P}, embedded


def _pooling(facts, kind, has_cls, source):
    """Our name of the pooling: what the user says, what config.json says, or what the tensors' names suggest."""
    averaged = "avg" if source.norm_is_last else "mean"
    said = facts.get("pooling")
    if said not in (None, "token", "avg", "cls+mean"):
        raise InputError(f"{source.where}: its pooling is {said!r}; only token and avg are known here")
    if not kind and said:
        kind = {"token": "cls", "avg": "mean"}.get(said, said)
    if not kind:
        if has_cls and source.norm_is_last:
            source.notes.append("fc_norm beside a class token: the mean of the patches is classified (--pooling)")
        kind = "cls" if has_cls and not source.norm_is_last else "mean"
    distilled = source.layout.distilled
    if distilled and f"{distilled[1]}.weight" in source.tensors:
        if kind != "cls" or not source.has("dist_token"):
            raise InputError(f"{source.where} has two heads, and no distillation token that is classified")
        return "cls+register"
    return averaged if kind == "mean" else kind


def _grid(rows, prefix, allowed, side, where):
    """Patches on a side, and how many of the ``prefix`` tokens have positions too, from the rows of a position table.

    ``allowed`` are the numbers of such tokens that can be, ``side`` (patches on a side) what else is known, or None.
    """
    possible = [
        (math.isqrt(rows - count), count)
        for count in allowed
        if rows > count and math.isqrt(rows - count) ** 2 == rows - count
    ]
    fitting = [(g, count) for g, count in possible if side in (None, g)]
    if len(fitting) == 1:
        return fitting[0]
    about = f"{where} has {rows} positions for {prefix} tokens and the patches of an image"
    if fitting:
        raise InputError(f"{about}, which can be read in two ways; say how large its images are (--image-size)")
    raise InputError(f"{about}, which " + (f"are not {side} x {side}" if side and possible else "are no square"))


def _side(size, P, where):
    """Patches on a side of an image, None for an unknown size."""
    if isinstance(size, (list, tuple)) and size:
        if any(each != size[0] for each in size):
            raise InputError(f"{where}: its images are {' x '.join(map(str, size))} pixels; only square ones are known")
        size = size[0]
    if not size:
        return None
    if type(size) is not int or size < 0 or size % P:
        raise InputError(f"{where}: images of {size} pixels are no multiple of the patches' {P}")
    return size // P


def _check_expected(expected, fields, source):
    """Refuses a config.json that contradicts the tensors."""
    for name, value in expected.items():
        if isinstance(value, list | tuple) and value and all(each == value[0] for each in value):
            value = value[0]
        found = fields.get(name, 0)
        if value is not None and value != found:
            raise InputError(f"{source.where}: its configuration says {name} {value!r}, its tensors {found!r}")


def _pixels(facts, pixels, config, source):
    """What pixels 0..255 become, u = (factor x - mean) / std: (factor, mean (C,), std (C,))."""
    factor, (mean, std) = 1 / 255, PIXELS[facts.get("pixels") or "half"]
    if pixels:
        mean, std = pixels_of(pixels, config.channels)
    elif facts.get("preprocessing"):
        said = facts["preprocessing"]
        factor, mean, std = said.rescale, said.mean, said.std
    if {len(mean), len(std)} - {1, config.channels} and not facts.get("preprocessing") and not pixels:
        mean, std = HALF  # a program's pixels are of three channels
    if {len(mean), len(std)} - {1, config.channels}:
        raise InputError(f"{source.where}: its images are normalised by mean {mean}, std {std}, and have "
                         f"{config.channels} channels")  # fmt: skip
    mean, std = (np.broadcast_to(np.asarray(each, np.float64), config.channels) for each in (mean, std))
    if not (np.isfinite(mean) & (std > 0)).all():
        raise InputError(f"{source.where}: its images are normalised by mean {mean}, std {std}, which cannot be")
    if factor == 1 / 255 and (mean == 0.5).all() and (std == 0.5).all():
        return factor, mean, std
    scaled = "" if factor == 1 / 255 else f", after a factor of {factor:.6g}"
    if config.stem:
        raise InputError(
            f"{source.where}: its images are normalised by mean {mean}, std {std}{scaled}; the standardised kernels of "
            "a hybrid's stem cannot take ours instead"
        )
    source.notes.append(f"images normalised by mean {mean}, std {std}{scaled}: made part of the patch embedding")
    return factor, mean, std


def _assumptions(facts, config, given, numbers):
    """One note on what nothing says: [] where all is said."""
    unsaid = []
    if not facts.get("preprocessing") and not given["pixels"]:
        _, mean, std = numbers
        mean, std = (
            f"{each[0]:g}" if len(set(each)) == 1 else "/".join(f"{v:g}" for v in each) for each in (mean, std)
        )
        unsaid.append(f"pixels 0..1 of mean {mean} and std {std} (--pixels)")
    if not facts["heads"] and not given["heads"]:
        unsaid.append(f"how many heads there are: {config.num_heads} assumed (--heads)")
    if facts.get("gelu") is None and "gelu" not in given:
        unsaid.append(f"{GELU_NAMES[config.gelu]} (--gelu)")
    if facts.get("layernorm_eps") is None and "layernorm_eps" not in given:
        unsaid.append(f"LayerNorm before each branch, with eps {config.layernorm_eps:g} (--layernorm-eps)")
    if not unsaid:
        return []
    size = f"images of {config.image_size} x {config.image_size} pixels"
    return [f"no file says these, which are assumed: {'; '.join(unsaid)}; {size}, by its positions"]


def _check_size(contents, source):
    """Refuses preprocessing whose images are of another size than the model's."""
    side, said = contents.config.image_size, contents.preprocessing
    if said and said.output not in (None, (side, side)):
        height, width = said.output
        raise InputError(
            f"{source.where}: its images are made {height} x {width} pixels, and its positions are for {side} x {side}"
        )


def _check(contents, source):
    """Every tensor that the model needs is there, in the right shape and of floating-point numbers, and no other."""
    rest, layout, where = dict(source.tensors), contents.layout, contents.where
    for spec in parameter_table(contents.config):
        if spec.name in TOKENS:
            continue
        ours, keys = spec.shape, contents.keys(spec.name)
        if contents.is_distilled and spec.name == "head.weight":
            ours = (spec.shape[0] // 2, spec.shape[1])
        parts = 1 if spec.name.startswith("head.") else len(keys)
        expected = layout.shape(spec.name, (*ours[:-1], ours[-1] // max(1, parts)), contents.config)
        for key in keys:
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
                name in ("cls_token", "dist_token") and tensor.shape[1] != 1
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
    no_bias = re.search(r"attn\.qkv\.bias$", name) and not source.has("blocks.0.attn.qkv.bias")
    if no_bias and name.startswith("blocks.0."):
        source.notes.append("queries, keys and values have no biases: zeros")
    return no_bias and source.layout.may_lack_qkv_bias
