"""A `ViT` as another program reads it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from minivit.base.errors import InputError
from minivit.base.files import write_atomically
from minivit.base.settings import field_names
from minivit.model import ViTConfig, positions
from minivit.weights import checkpoint
from minivit.weights.layouts.description import LAYOUTS
from minivit.weights.layouts.official import CURRENT
from minivit.weights.preprocessing import own
from minivit.weights.tensor_files import write_npz, write_safetensors

MODEL_FILE = "model.safetensors"


def check_held(config, layout):
    """Raises InputError if a layout, by name, cannot hold a model of this configuration."""
    plain, holds = ViTConfig(), LAYOUTS[layout].holds
    for name in field_names(ViTConfig):
        value = getattr(config, name)
        values = holds.get(name, (getattr(plain, name),))
        if values is not None and value not in values:
            advice = f"; --{name.replace('_', '-')} {values[0]} writes the same parameters as if they were trained so"
            words = " or ".join(str(each) or "none" for each in values)
            raise InputError(
                f"the layout {layout} cannot hold {name} = {value!r} (only {words})"
                + (advice if name in ("gelu", "layernorm_eps", "stem_groups") else "")
            )


def tensors_of(model, layout, *, naming="published"):
    """A model's parameters in a layout, by name: {key: array}.

    Raises  InputError: see `check_held`.
    """
    config = model.config
    check_held(config, layout)
    layout = LAYOUTS[layout]
    c, arrays = config.class_tokens, {}
    table = positions(model)
    if config.registers:  # timm has rows for the registers too
        empty = np.zeros((1, config.registers, config.width), table.dtype)
        table = np.concatenate([table[:, :c], empty, table[:, c:]], axis=1)
    others = {name: array for name, array in model.params.items() if not name.startswith("pos_embed")}
    for name, array in ({"pos_embed": table} | others).items():
        shape = layout.part_shape(name, array.shape)
        for k, key in enumerate(layout.keys(name)):
            part = array[..., k * shape[-1] : (k + 1) * shape[-1]]
            arrays[key] = layout.to_theirs(part, layout.shape(name, shape, config))
    if layout.name == "timm" and config.pooling == "avg":
        arrays = {re.sub("^norm", "fc_norm", key): array for key, array in arrays.items()}
    for old, new in CURRENT if naming == "current" else ():
        arrays = {key.replace(old, new): array for key, array in arrays.items()}
    return arrays


def write(path, model, layout, *, class_names, preprocessing=None, naming="published", overwrite=False):
    """Write a model as another program reads it; returns the paths that were written.

    official: a file. timm, hf: a folder with ``model.safetensors`` and ``config.json``, for timm's
    ``create_model("local-dir:PATH", pretrained=True)`` and transformers' ``from_pretrained(PATH)``.
    minivit: a checkpoint.
    ``preprocessing`` is that of the model's images, a `Preprocessing`; None where they are cut as minivit cuts those of
    a folder.
    Raises  InputError: the layout cannot hold the model, or something is there already and not to be overwritten;
    nothing is written then. OSError: see `write_atomically`.
    """
    path, config = Path(path), model.config
    p = preprocessing
    texts = {} if layout == "minivit" else LAYOUTS[layout].texts(config, class_names, p or own(config.image_size))
    paths = [path / name for name in (*texts, MODEL_FILE)] if texts else [path]
    if texts and path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; {layout} needs a folder for {' and '.join(p.name for p in paths)}")
    if not texts and path.is_dir():
        raise InputError(f"{path} is a folder; name the .npz file to write")
    if existing := [each for each in paths if each.exists() and not overwrite]:
        raise InputError(f"{existing[0]} is there already; choose another name, or --overwrite it")
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
        meta |= {"preprocessing": p.folded()._asdict()} if p else {}
        checkpoint.save(path, checkpoint.named_arrays("params", model.flat, model.table), meta)
    return paths
