"""Weights of other programs: the official ``.npz``, timm's and Hugging Face's ``.safetensors``, read and written.

    official      google-research/vision_transformer and big_vision: the keys of a Flax module, joined by "/"
    timm          timm.models.VisionTransformer's state_dict; with the names of DeiT, MAE and DINOv2 too
    hf            transformers' ViT, DeiT, ViT-MSN, MAE, I-JEPA and DINOv2; written as its ViT
    torchvision   torchvision.models.VisionTransformer's state_dict; only read

All of them hold the same numbers. What differs is names, a file for each layout, and how a matrix lies:

    weight of           ours                    official                    timm and Hugging Face
    a linear map        (in, out)               (in, out)                   (out, in)
    the patches         (P P C, D)              (P, P, C, D)                (D, C, P, P)
    q, k and v          (D, 3D)                 three of (D, h, Dh)         (3D, D), or three of (D, D)
    the heads' output   (D, D)                  (h, Dh, D)                  (D, D)
    a hybrid's stem     (kh, kw, I, O)          (kh, kw, I, O)              (O, I, kh, kw), not in Hugging Face's ViT
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from minivit.base.errors import InputError
from minivit.model import ViT
from minivit.weights import checkpoint
from minivit.weights.layouts.description import LAYOUTS, Contents, describe_tensors
from minivit.weights.layouts.hugging_face import hf_config
from minivit.weights.layouts.reading import build
from minivit.weights.layouts.timm import EPS_NOTE, timm_architecture, timm_arguments, timm_call
from minivit.weights.layouts.writing import MODEL_FILE, check_held, tensors_of, write
from minivit.weights.preprocessing import IMAGENET
from minivit.weights.tensor_files import INDEX, is_foreign, open_tensors, read_json, refused

__all__ = [
    "EPS_NOTE",
    "IMAGENET",
    "LAYOUTS",
    "Contents",
    "build",
    "check_held",
    "describe",
    "describe_tensors",
    "file_of",
    "hf_config",
    "is_readable",
    "load_any",
    "load_with_notes",
    "read",
    "tensors_of",
    "timm_architecture",
    "timm_arguments",
    "timm_call",
    "write",
]

OTHERS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".ckpt", ".onnx", ".gguf")


def file_of(path):
    """The path of a model's weights: the path itself, or the file of weights in a folder.

    In a folder it is ``model.safetensors``, the index of several such files, or the only file of weights of any kind.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    for name in (MODEL_FILE, INDEX):
        if (path / name).exists():
            return path / name
    others = sorted(each for each in path.iterdir() if each.suffix in OTHERS)
    whole = [each for each in others if each.suffix == ".safetensors"] or others
    return whole[0] if len(whole) == 1 else path / MODEL_FILE


def is_readable(path):
    """Is this a file, or a folder with one, for `read`, rather than a checkpoint of minivit?"""
    return is_foreign(file_of(path))


def describe(path, **options):
    """What is in a file, or in ``model.safetensors`` of a folder, without reading its tensors: its `Contents`.

    ``heads``, ``pooling`` ("cls", "mean") and ``image_size`` say what the file does not; ``num_classes`` gives a file
    without a head one of zeros; ``imagenet_pixels`` says that images were normalised by ImageNet's mean and std, as
    for DeiT, where no file beside it does: the patch embedding then takes them our way; so does ``pixels`` for others
    (see `pixels_of`); ``changes`` are fields of the `ViTConfig` to be set whatever the file says.
    Raises  InputError: there is no such file, it is broken, of no layout known here, or of a model that ours is not.
    """
    path = file_of(path)
    tensors = open_tensors(path)
    with refused(path):
        return describe_tensors(tensors, read_json(path.with_name("config.json")), str(path), **options)


def read(path, *, dtype=np.float32, **options):
    """A `ViT` from a file of another program, and the file's contents: see `describe` and `build`.

    Returns  (ViT, Contents)
    """
    contents = describe(path, **options)
    with refused(contents.where):
        return build(contents, dtype=dtype), contents


def load_any(path, *, weights="auto", changes=None, named=True, anyway=False, **options):
    """A model from a checkpoint, or from a file of another program: see `checkpoint.load_model`, `read`.

    ``anyway``: changes are those of a checkpoint's configuration too.
    Returns  (ViT, `Record`, notes): it has class names, of a checkpoint if they are to be ``named``, and which weights
    were taken; notes say what had to be assumed
    Raises  InputError: the file is missing, damaged, or of no kind known here.
    """
    path = Path(path)
    if not is_readable(path):
        model, record = checkpoint.load_model(path, weights=weights)
        if named:
            checkpoint.class_names_of(record)
        if needless := [name for name, value in options.items() if value and name != "need_head"]:
            raise InputError(f"{path} is a checkpoint, which says itself what {needless[0]} is")
        if changes and not anyway:
            raise InputError(f"{path} is a checkpoint, which says itself what {min(changes)} is")
        model = ViT(replace(model.config, **(changes or {})), flat=model.flat)
        return model, record._replace(config=model.config), []
    model, contents = read(path, changes=changes, **options)
    names = contents.class_names or [f"class {k}" for k in range(model.config.num_classes)]
    p = contents.preprocessing and contents.preprocessing.folded()
    return model, checkpoint.Record(path, model.config, names, preprocessing=p), contents.notes


def load_with_notes(path, **options):
    """`load_any`, whose notes are printed on stderr: (ViT, Record)."""
    model, record, notes = load_any(path, **options)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return model, record
