"""A file's tensors under the names of their layout, and what is asked of their shapes."""

from __future__ import annotations

import math
import re

from minivit.base.errors import InputError
from minivit.model import STEM
from minivit.options.stem.resnet import convolutions, output_of


class Source:
    """The tensors of a file, each under the published name of its layout.

    ``notes`` gather what had to be assumed, in sentences.
    Raises  InputError: the file is of none of the ``layouts``, or holds what no part of the model takes.
    """

    def __init__(self, tensors, where, layouts):
        self.where, self.notes = where, []
        self.layout, tensors = self._recognise(tensors, layouts)
        self.norm_is_last = self.layout.keys_in(tensors, "norm.weight") != self.layout.keys("norm.weight")
        self.tensors = {}
        for key, tensor in tensors.items():
            for pattern, replacement in self.layout.aliases:
                key = re.sub(pattern, replacement, key)
            for name, one in self.layout.blocks_apart(key, tensor, where):
                if name in self.tensors:
                    raise InputError(f"{where} holds {name} under two names")
                self.tensors[name] = one
        self.stem_units = self._stem_units()
        self._refuse_unknown()

    def _recognise(self, tensors, layouts):
        """The layout, and the tensors of the model without a prefix."""
        for layout in layouts:
            try:
                parts = layout.tensors_in(tensors)
            except InputError as error:
                raise InputError(f"{self.where}: {error}") from None
            if parts is None:
                continue
            inside, prefix = parts
            self.seen = set(inside)  # the keys, before any is left out or renamed
            if idle := [key for key in inside if re.match(layout.left_out, key)]:
                self.notes.append(f"left out, of pre-training: {some_of(idle)}")
                inside = {key: tensor for key, tensor in inside.items() if key not in set(idle)}
            if outside := [key for key in tensors if not key.startswith(prefix)]:
                self.notes.append(f"left out, outside {prefix}: {some_of(outside)}")
            return layout, inside
        raise InputError(
            f"{self.where} has no layout known here (official .npz, timm, Hugging Face or torchvision ViT); it holds "
            + some_of(tensors)
        )

    def _stem_units(self):
        """How many units each stage of the stem has: () for the root alone, None without a stem; refuses gaps."""
        if self.layout.stem is None:
            return None
        begins, first, place = self.layout.stem
        if not any(re.match(begins, key) for key in self.tensors):
            return None
        pattern = re.escape(place).replace(r"\{\}", r"(\d{1,4})")
        present = {(int(match[1]), int(match[2])) for key in self.tensors if (match := re.match(pattern, key))}
        units = []
        while present:
            units.append(sum(s == first + len(units) for s, _ in present))
            needed = {(first + len(units) - 1, first + u) for u in range(max(1, units[-1]))}
            if lacking := needed - present:
                raise InputError(f"{self.where} lacks {place.format(*min(lacking))}, and holds later ones")
            present -= needed
        return tuple(units)

    def stem_fields(self):
        """The settings of the stem, and how many pixels of the image a step on its map is."""
        units = self.stem_units
        if units is None:
            return {}, 1
        root = f"{STEM}{'stem.' if units else ''}conv.weight"
        _, _, channels, width = self.layout.kernel_sizes(self.shape(root, 4))
        fields = {"channels": channels, "stem": ",".join(map(str, units)) or "root", "stem_width": width}
        return fields, output_of(width, units)[0]

    def _refuse_unknown(self):
        modules = self.layout.modules()
        stem = [] if self.stem_units is None else convolutions(1, 1, self.stem_units)
        stem = {self.key(STEM + name) for names, _, _ in stem for name in names}
        unknown = []
        for key in self.tensors.keys() - stem:
            pattern = re.sub(self.layout.block, "{i}", key)
            if pattern not in modules and re.sub(r"[./](weight|bias|kernel|scale)$", "", pattern) not in modules:
                unknown.append(key)
        if unknown:
            raise InputError(f"{self.where} holds what no part of the model takes: {some_of(unknown)}")

    def key(self, name):
        """The first key of a parameter."""
        return self.layout.keys_in(self.tensors, name)[0]

    def has(self, name):
        """Does the file hold a parameter?"""
        return self.layout.keys(name) is not None and self.key(name) in self.tensors

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
        numbers = {int(match[1]) for key in self.tensors if (match := pattern.match(key))}
        for i in range(max(1, len(numbers))):
            if i not in numbers:
                raise InputError(f"{self.where} lacks block {i} ({before}{i}{after})")
        return len(numbers)


def some_of(names):
    """The first few of some names, for a message."""
    names = sorted(names)
    return (", ".join(names[:4]) or "nothing") + (f" and {len(names) - 4} more" if len(names) > 4 else "")
