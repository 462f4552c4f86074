"""A trained model as the start of another: for other classes, larger images, other patches.

What the two models share is copied. The head, and the pre-logits layer before it, are replaced by a head of zeros, as
in the official code's fine-tuning, unless they are to be kept; positions and patch embedding are resized where the
number of patches or their size changes (see `minivit.weights.resize`).
"""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

from minivit.base.backend import to_host
from minivit.base.errors import InputError
from minivit.base.settings import check_choice, check_range, check_types, setting
from minivit.model import ViT
from minivit.options.positions import sincos2d
from minivit.weights import checkpoint
from minivit.weights.checkpoint import class_order
from minivit.weights.layouts import is_readable, load_with_notes
from minivit.weights.resize import KINDS, PATCH_KINDS, resize_patch_embedding, resize_positions, resize_table

# Settings of the model that may differ from the start's; the others come from it.
MAY_CHANGE = ("image_size", "patch_size", "num_classes", "pre_logits", "dropout", "attention_dropout", "drop_path")
HEAD = ("head.", "pre_logits.")
UNSAID = ("gelu", "layernorm_eps", "stem_groups")  # what weights of another program may leave open


@dataclass(frozen=True)
class StartConfig:
    """Where a run's first parameters come from.

    Raises  InputError (a ValueError): from the constructor, for any impossible setting.
    """

    checkpoint: str = setting("", "the checkpoint whose model a run begins with, its moving average if it has one")
    keep_head: bool = setting(
        False, "keep the checkpoint's head, for the same classes; otherwise the head begins at zero, without pre-logits"
    )
    pos_resize: str = setting(
        "align-corners", f"how positions are resized: {', '.join(KINDS)}; the first is the official code's"
    )
    patch_resize: str = setting(
        "pi", "how patches are: pi (pseudo-inverse: resized patches give the same tokens), or bilinear"
    )

    pixels: str = setting(
        "", "what its pixels were, of a file of another program that does not say: see minivit convert"
    )
    heads: int = setting(0, "its attention heads, of a file of another program that does not say")

    def __post_init__(self):
        check_types(self)
        check_range(self, 0, None, "heads")
        check_choice(self, "pos_resize", KINDS)
        check_choice(self, "patch_resize", PATCH_KINDS)
        if not self.checkpoint and any(getattr(self, f.name) != f.default for f in fields(self)):
            raise InputError(
                "keep_head, pos_resize, patch_resize, pixels and heads are of a start: name it with --from"
            )


class Start(NamedTuple):
    """The first parameters of a run."""

    flat: Any  # (n,) on the host, or None where they are known only by their origin
    origin: dict  # `StartConfig`'s fields, "weights": params or ema, "crc": CRC-32 of the checkpoint's parameters


def load_start(path, *, asked=None, **options):
    """The model that a file holds, and its `checkpoint.Record`, which says which of its parameters were taken.

    The file may be another program's (see `minivit.weights.layouts`); what had to be assumed of it is printed.
    ``asked`` are settings of the model that a user wants, which say what such a file does not; ``options`` are those of
    `load_with_notes`.
    Raises  InputError: no such file, or nothing that minivit reads.
    """
    if is_readable(path):
        asked = asked or {}
        options["changes"] = {name: asked[name] for name in UNSAID if name in asked}
        options["pooling"] = asked["pooling"] if asked.get("pooling") in ("cls", "mean") else ""
    return load_with_notes(path, named=False, **options)


def read_start(start, asked):
    """`load_start` of what a `StartConfig` names."""
    need = {"need_head": start.keep_head}
    return load_start(start.checkpoint, asked=asked, pixels=start.pixels, heads=start.heads, **need)


def model_from(trained, request, where, *, keep_head=False):
    """The `ViTConfig` of a model that begins as the trained one, with the settings of a request.

    Raises  InputError: one is impossible, or cannot change.
    """
    if request.get("channels", trained.channels) != trained.channels:
        raise InputError(f"{where} takes images of {trained.channels} channels, not of {request['channels']}")
    config = replace(trained, **({} if keep_head else {"pre_logits": 0}) | request)
    for name, value in asdict(config).items():
        before = getattr(trained, name)
        to_learned = name == "pos_embed" and (before, value) == ("sincos2d", "learned")
        if value != before and name not in MAY_CHANGE and not to_learned:
            raise InputError(
                f"{where} has {name} {_shown(before)}, {_shown(value)} was asked for; leave it out, or begin without "
                "--from"
            )
    if not keep_head and config.pre_logits:
        raise InputError("a new head has no pre-logits layer; leave pre_logits out, or keep the head with --keep-head")
    if keep_head and config.pre_logits != trained.pre_logits:
        raise InputError(f"{where} has pre_logits {trained.pre_logits}, which --keep-head keeps; leave pre_logits out")
    return config


def _shown(value):
    return "none" if value == "" else value


def begin(trained, config, *, keep_head=False, pos_resize="align-corners", patch_resize="pi"):
    """The first parameters of a model of another configuration, from a trained one: a flat vector on the host.

    Learned positions may begin as the sine-cosine ones that the trained model had.

    Raises  InputError: a parameter is missing or has another shape, and none of these changes explains it.
    """
    old, new = trained.config, ViT(config)
    named = {name: to_host(array) for name, array in trained.params.items()}
    if old.pos_embed == "sincos2d":
        named["pos_embed"] = sincos2d(old.grid_size, old.width, prefix_tokens=old.class_tokens)
    for name, view in new.params.items():
        if not keep_head and name.startswith(HEAD):
            view[...] = 0.0
            continue
        array = named.get(name)
        if array is None:
            raise InputError(f"the start has no parameter {name}")
        last = name.rpartition(".")[2]
        if last == "pos_embed":
            prefix = old.class_tokens
            array = resize_positions(array, config.grid_size, prefix_tokens=prefix, kind=pos_resize)
        elif last in ("pos_embed_x", "pos_embed_y"):
            array = resize_table(array, config.grid_size, pos_resize)
        elif name == "patch_embed.proj.weight":
            array = resize_patch_embedding(array, config.patch_size, channels=config.patch_channels, kind=patch_resize)
        if array.shape != view.shape:
            raise InputError(
                f"the start's {name} has shape {array.shape}, the new model needs {view.shape}"
                + (
                    "; positions of this kind cannot be resized: leave the size of images and patches as it was, "
                    f"{old.image_size} and {old.patch_size}"
                    if "pos" in name
                    else ""
                )
            )
        view[...] = array
    return new.flat


def prepare_start(start, asked, class_names, loaded=None):
    """The model and the first parameters of a run that a `StartConfig` means: (ViTConfig, `Start`).

    ``asked`` are the fields of `ViTConfig` that the data and the user want, ``class_names`` those of the data,
    ``loaded`` what `load_start` returned, if it has been called.

    Raises  InputError: see `load_start`, `model_from` and `begin`; the head is to be kept for other classes.
    """
    trained, record = loaded or read_start(start, asked)
    config = model_from(trained.config, asked, start.checkpoint, keep_head=start.keep_head)
    order = class_order(record.class_names or [], class_names) if start.keep_head else None
    if start.keep_head:
        if order is None:
            few = checkpoint.few_classes(record)
            raise InputError(f"{start.checkpoint} was trained for the classes {few}: leave --keep-head out for others")
    settings = {"pos_resize": start.pos_resize, "patch_resize": start.patch_resize, "keep_head": start.keep_head}
    flat = begin(trained, config, **settings)
    if order is not None:  # classes are matched by name
        head = ViT(config, flat=flat).params
        for name in ("head.weight", "head.bias"):
            head[name][...] = head[name][..., order]
    said = {key: value for key, value in asdict(start).items() if value or key not in ("pixels", "heads")}
    origin = said | {"weights": record.weights, "crc": zlib.crc32(to_host(trained.flat))}
    return config, Start(flat, origin)
