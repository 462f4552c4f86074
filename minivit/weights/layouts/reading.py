"""A `ViT` from what a file holds."""

from __future__ import annotations

import numpy as np

from minivit.base import params as parameters
from minivit.base.errors import InputError
from minivit.base.finite import is_finite
from minivit.model import ViT, parameter_table
from minivit.weights.layouts.description import TOKENS


def build(contents, *, dtype=np.float32):
    """The `ViT` of a file's `Contents`.

    Raises  InputError: a tensor is damaged or holds a number that is not finite.
    """
    table = parameter_table(contents.config)
    flat = np.zeros(parameters.count(table), dtype)
    views = parameters.views(flat, table)
    tokens = _tokens(contents)
    for name, view in views.items():
        with np.errstate(over="ignore"):  # what is too large for float32 is infinite, and refused
            if name in tokens:
                view[...] = tokens[name]
            else:
                _fill(view, name, contents)
        if not is_finite(view):
            key = (contents.keys(name) or (name,))[0]
            raise InputError(f"{contents.where}: {key} holds values that are not finite numbers")
    factor, mean, std = contents.pixels
    if not contents.config.stem and (factor != 1 / 255 or set(mean) | set(std) != {0.5}):
        _fold(views["patch_embed.proj.weight"], views["patch_embed.proj.bias"], factor, mean, std)
    return ViT(contents.config, flat=flat)


def _fill(view, name, contents):
    """Copy a parameter from the file; what the file does not have stays zero."""
    if contents.is_distilled and name.startswith("head."):
        _average_heads(view, name, contents)
        return
    shape = contents.layout.part_shape(name, view.shape)
    for k, key in enumerate(contents.keys(name)):
        if key in contents.tensors:
            part = contents.layout.to_ours(contents.tensors[key].read(), shape)
            view[..., k * shape[-1] : (k + 1) * shape[-1]] = part


def _average_heads(view, name, contents):
    """Two heads as one that reads the class token and the distillation token, side by side.

    Math    (x W + b + x' W' + b') / 2 = [x; x'] [W / 2; W' / 2] + (b + b') / 2
    Shapes  view (2 D, K) or (K,), with W and W' (D, K)
    """
    shape = (view.shape[0] // 2, *view.shape[1:]) if view.ndim == 2 else view.shape
    first, second = (contents.layout.to_ours(contents.tensors[key].read(), shape) for key in contents.keys(name))
    view[...] = np.concatenate([first, second]) / 2 if view.ndim == 2 else (first + second) / 2


def _fold(W, b, factor, mean, std):
    """Make a patch embedding of pixels (factor x - mean) / std, of x in 0..255, one of our pixels, in place.

    Math    ours v = x / 127.5 - 1, theirs u = (127.5 factor (v + 1) - mean) / std = a v + c for each channel:
            u W + b = v (a W) + (c W + b)
    Shapes  W (P*P*C, D), b (D,), mean and std (C,)
    """
    a, c = 127.5 * factor / std, (127.5 * factor - mean) / std
    repeats = len(W) // len(mean)
    b += np.tile(c, repeats) @ W
    W *= np.tile(a, repeats)[:, None]


def _tokens(contents):
    """Class token, registers and positions in our form.

    A position is added to a token, whoever stores the sum: ours has one for the class token and none for registers, so
    that theirs is added to the registers, and the class token's is zero where they have none. A class token that is
    not classified is a register.
    """
    D, c = contents.config.width, contents.config.class_tokens
    theirs = {}
    for name in TOKENS:
        keys = contents.layout.keys(name)
        if keys and keys[0] in contents.tensors:
            theirs[name] = contents.tensors[keys[0]].read().reshape(-1, D)  # (rows, D)
    tokens = {}
    prefix = [theirs[name] for name in ("cls_token", "dist_token", "reg_token") if name in theirs]
    prefix = np.concatenate([np.zeros((0, D)), *prefix])  # (p, D)
    if "pos_embed" in theirs:
        p = contents.prefix_positions
        own, patches = np.zeros_like(prefix), theirs["pos_embed"][p:]
        own[:p] = theirs["pos_embed"][:p]
        tokens["pos_embed"] = np.concatenate([own[:c], patches])
        prefix[c:] += own[c:]
    return tokens | {"cls_token": prefix[:c], "reg_token": prefix[c:]}
