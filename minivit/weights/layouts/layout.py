"""What a layout is: the keys of our parameters, how their arrays lie, what the file beside them says, what it can hold.

What most programs share stands here, PyTorch's way: a matrix is (out, in), a kernel (O, I, kh, kw). Each layout's own
names and rules stand in its file. A new part of the model needs a row in each layout's ``names``, nothing else if its
matrices lie as those of a linear map do.
"""

from __future__ import annotations

import re
from typing import ClassVar

from minivit.base.errors import InputError
from minivit.model import STEM

# Settings of `ViTConfig` that every layout can express, with any value; three are of training, not of the model.
SIZES = dict.fromkeys(
    ("image_size", "patch_size", "channels", "num_classes", "width", "depth", "num_heads", "mlp_dim")
    + ("dropout", "attention_dropout", "drop_path")
)
# What other programs put before the names of a model within a model.
PREFIXES = "module|model|backbone|encoder|net|network|trunk|visual|image_encoder|base_model|timm_model|_orig_mod"
PREFIXES += "|state_dict|model_state|teacher|student|target_encoder|ema|model_ema|feature_extractor"
POSITIONS = {"pos_embed": ("learned", "learned2d", "sincos2d", "none")}  # at the input: whatever makes the table


class Layout:
    """How a program stores a ViT."""

    name: ClassVar[str]  # on command lines
    names: ClassVar[dict]  # our tensor or module -> theirs, three where queries, keys and values lie apart
    aliases: ClassVar[tuple] = ()  # other names of the same tensors: (pattern, replacement), in this order
    block: ClassVar[str]  # the pattern of a block's number in a key
    holds: ClassVar[dict]  # setting -> the values that can be expressed, None for all; others must be a plain model's
    positions_without_table: ClassVar[str] = "none"  # pos_embed of a model whose file holds no positions
    may_lack_qkv_bias: ClassVar[bool] = True  # zeros stand for it then
    stem_note: ClassVar[str] = ""  # what a hybrid's reader is to know
    program: ClassVar[dict] = {"gelu": "erf", "layernorm_eps": 1e-6}  # its program's, where nothing is said
    mark: ClassVar[str]  # the pattern of the key of the patch embedding's weight; what stands before it is a prefix
    left_out: ClassVar[str] = "$."  # the pattern of keys that no classifier needs
    writes: ClassVar[bool] = True  # is it a layout of `write` too?
    distilled: ClassVar[tuple] = ()  # the modules of two heads, whose logits are averaged
    # Where a hybrid's stem lies: the beginnings of its keys, the number of the first stage and unit, a unit's place.
    stem: ClassVar[tuple | None] = None

    # ---- keys

    def stem_key(self, name):
        """The key of a parameter of the stem, None if there is none."""
        return None

    def ending(self, module, leaf):
        """What follows a module's name in the key of its ``weight`` or ``bias``."""
        return f".{leaf}"

    def keys(self, name):
        """A parameter's keys: one, or three where queries, keys and values lie apart; None if it has none."""
        if name.startswith(STEM):
            key = self.stem_key(name)
            return key and (key,)
        number = re.search(r"(?<=^blocks\.)\d+", name)
        pattern = re.sub(r"^blocks\.\d+", "blocks.{i}", name)
        module, _, leaf = pattern.rpartition(".")
        theirs = self.names.get(pattern) or self.names.get(module)
        if theirs is None:
            return None
        ending = "" if pattern in self.names else self.ending(module, leaf)
        modules = theirs if isinstance(theirs, tuple) else (theirs,)
        return tuple(each.format(i=number and number[0]) + ending for each in modules)

    def keys_in(self, tensors, name):
        """`keys` in a file, whose last LayerNorm may have another name."""
        return self.keys(name)

    def modules(self):
        """The names of all tensors and modules that the layout knows."""
        return {each for name in self.names.values() for each in (name if isinstance(name, tuple) else (name,))}

    # ---- shapes and arrays

    def part_shape(self, name, shape):
        """The shape, as ours, of what one key holds of a parameter: a third of ``attn.qkv``, where it has three."""
        return (*shape[:-1], shape[-1] // len(self.keys(name)))

    def kernel_sizes(self, shape):
        """(height, width, inputs, outputs) of a kernel of this shape."""
        return (*shape[2:], shape[1], shape[0])

    def outputs(self, shape):
        """How many numbers a linear map of this shape gives."""
        return shape[0]

    def shape(self, name, shape, config):
        """The shape of a parameter, or of a third of ``attn.qkv``, given ours."""
        shape = patch_shape(name, shape, config)
        if len(shape) == 4:
            return (shape[3], shape[2], *shape[:2])
        return shape[::-1] if len(shape) == 2 else shape

    def to_ours(self, array, shape):
        """An array in our shape."""
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T if array.ndim == 2 else array
        return array.reshape(shape)

    def to_theirs(self, array, shape):
        """The inverse of `to_ours`."""
        if len(shape) == 4:
            return array.reshape(*shape[2:], *shape[1::-1]).transpose(3, 2, 0, 1)
        return array.T if len(shape) == 2 else array.reshape(shape)

    # ---- files

    def tensors_in(self, tensors):
        """(the model's tensors, the prefix of their keys that was taken off), or None: it is another layout's file.

        Raises  InputError: the file holds several models.
        """
        found = [match for key in tensors if (match := re.fullmatch(rf"((?:(?:{PREFIXES})\.)*){self.mark}", key))]
        prefixes = sorted({match[1] for match in found}, key=lambda prefix: (len(prefix), prefix))
        if len(prefixes) > 1 and prefixes[0]:
            raise InputError(
                f"it holds several models, {' and '.join(prefixes)}: write one of them to a file of its own"
            )
        if not found:
            return None
        prefix = prefixes[0]
        return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}, prefix

    def blocks_apart(self, key, tensor, where):
        """A tensor of all blocks as those of single ones: a list of (key, tensor); others as they are."""
        return [(key, tensor)]

    def facts(self, extra, source):
        """What the content ``extra`` of the config.json beside a file says, and what the names of the
        tensors of a `sources.Source` tell: a dict.

        gelu, layernorm_eps: None where nothing is said; ``program`` has then those of the layout's program. Maybe:
        heads, head_size, image_size, class_names, preprocessing (a `Preprocessing`), pixels (a name: those of the
        program where nothing is said), pooling, prefix_positions ("all", "first" or "none": which tokens before the
        patches have positions), layer_scale, stem_groups, expected ({field of `ViTConfig`: what the file says it is}),
        qkv_bias, notes.
        Raises  InputError: it is of a model that ours is not.
        """
        raise NotImplementedError

    def heads(self, source, width):
        """The number of heads that the shapes show, 0 if they do not; ``source`` is a `sources.Source`."""
        name = "blocks.0.attn.q_norm.weight"
        return width // source.shape(name, 1)[0] if source.has(name) else 0

    def check_tensors(self, source):
        """Raises InputError if the tensors of a `sources.Source` contradict each other."""

    def texts(self, config, class_names, preprocessing):
        """The JSON files beside ``model.safetensors``, {name: content}; {} where a model is one file."""
        return {}


def patch_shape(name, shape, config):
    """Our shape of a parameter, with the patch embedding's matrix as a kernel (P, P, C, D)."""
    if name == "patch_embed.proj.weight":
        return (config.patch_size, config.patch_size, config.patch_channels, config.width)
    return shape
