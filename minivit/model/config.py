"""What defines a model: `ViTConfig`."""

from __future__ import annotations

from dataclasses import dataclass

from minivit.base.errors import InputError
from minivit.base.settings import check_choice, check_range, check_types, setting
from minivit.layers.gelu import KINDS as GELUS
from minivit.layers.head import POOLINGS
from minivit.model.presets import preset_fields
from minivit.options.stem.resnet import output_of

# Position embeddings, and where each can be: added to the input of the first block; of every block, each with its own;
# or the same one shared by all. Relative positions are in the blocks' attention.
POSITIONS = {
    "learned": ("input", "every", "shared"),
    "learned2d": ("input", "every", "shared"),
    "sincos2d": ("input", "shared"),
    "relative": ("every", "shared"),
    "none": ("input",),
}
ATTENTIONS = ("full", "axial")


@dataclass(frozen=True)
class ViTConfig:
    """Everything that defines a model; wrong values are refused with a sentence that says what is wrong.

    Raises  InputError (a ValueError): from the constructor, for any impossible setting.
    """

    image_size: int = setting(32, "height and width of the pictures, pixels; those of a data set are scaled to it")
    patch_size: int = setting(4, "height and width P of a patch, pixels; with a stem, positions of its map")
    channels: int = setting(3, "colour channels C")
    num_classes: int = setting(10, "classes K")
    width: int = setting(192, "token width D")
    depth: int = setting(6, "number of blocks L")
    num_heads: int = setting(3, "attention heads h; the width must be a multiple")
    mlp_dim: int = setting(0, "hidden width M of the MLPs; 0 means 4 x width")
    pooling: str = setting(
        "cls",
        'what is classified: "cls" (class token), "mean" or "seq" (plain or learned mean of patches), "avg" (the plain '
        "mean before the last LayerNorm, as timm has it)",
    )
    pos_embed: str = setting(
        "learned",
        'positions: "learned", "learned2d" (of rows and columns), "sincos2d", "relative" (in the attention) or "none"',
    )
    pos_at: str = setting(
        "input",
        'where positions are added: "input", "every" (each block its own) or "shared" (each block the same)',
    )
    attention: str = setting(
        "full", 'who attends to whom: "full", or "axial" (rows of the grid in one block, columns in the next)'
    )
    pre_logits: int = setting(0, "width R of the tanh layer before the head; 0 for none")
    gelu: str = setting("tanh", 'GELU form: "tanh" (official code) or "erf" (timm)')
    registers: int = setting(0, "learned tokens beside the class token that the head does not read; 0 for none")
    qk_norm: bool = setting(False, "LayerNorm of each head's queries and keys")
    layer_scale: float = setting(0.0, "LayerScale: initial factor of the residual branches; 0 for none")
    stem: str = setting(
        "", 'ResNet that patches are cut from: "root", or the units of each stage, "3,4,9" for a ResNet-50; "" for none'
    )
    stem_width: int = setting(64, "channels of the stem's root")
    stem_groups: int = setting(32, "groups of channels in the stem's GroupNorm")
    layernorm_eps: float = setting(1e-6, "added to the variance in LayerNorm")
    dropout: float = setting(0.0, "dropout rate after the embedding, the MSA projection and both MLP layers")
    attention_dropout: float = setting(0.0, "dropout rate of the attention maps")
    drop_path: float = setting(0.0, "stochastic depth: drop rate of the last block, rising linearly from 0")

    def __post_init__(self):
        check_types(self)
        if self.mlp_dim == 0:
            object.__setattr__(self, "mlp_dim", 4 * self.width)
        check_range(self, 1, None, "image_size", "patch_size", "channels", "num_classes")
        check_range(self, 1, None, "width", "depth", "num_heads", "mlp_dim")
        check_range(self, 0, None, "pre_logits", "registers")
        check_range(self, 0.0, 1.0, "dropout", "attention_dropout", "drop_path", open_high=True)
        check_range(self, 1e-20, 1.0, "layernorm_eps")
        check_range(self, 0.0, 1.0, "layer_scale")
        check_choice(self, "pooling", POOLINGS)
        check_choice(self, "pos_embed", POSITIONS)
        check_choice(self, "pos_at", ("input", "every", "shared"))
        check_choice(self, "attention", ATTENTIONS)
        check_choice(self, "gelu", GELUS)
        check_range(self, 1, None, "stem_width", "stem_groups")
        if self.stem:
            self._check_stem()
        elif self.image_size % self.patch_size:
            raise InputError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.width % self.num_heads:
            raise InputError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        if self.qk_norm and self.width == self.num_heads:
            raise InputError("qk_norm needs heads of more than one dimension: LayerNorm of a single number is nothing")
        if self.pos_embed == "sincos2d" and self.width % 4:
            raise InputError(f'pos_embed "sincos2d" needs a width that is a multiple of 4, got {self.width}')
        if self.pos_embed == "learned2d" and self.width % 2:
            raise InputError(f'pos_embed "learned2d" halves the width, which must be even, got {self.width}')
        if self.pos_at not in (possible := POSITIONS[self.pos_embed]):
            names = " or ".join(f'"{name}"' for name in possible)
            raise InputError(f'with pos_embed "{self.pos_embed}", pos_at must be {names}, got "{self.pos_at}"')
        if self.pos_embed == "relative" and self.registers:
            raise InputError(
                'pos_embed "relative" counts along the tokens, where registers have no place: take 0 of them'
            )
        if self.attention == "axial" and (self.pooling == "cls" or self.registers):
            raise InputError(
                'attention "axial" is between patches alone: set pooling to "mean", "avg" or "seq", and registers to 0'
            )

    def _check_stem(self):
        if self.stem != "root":
            counts = [text.strip() for text in self.stem.split(",")]
            if not all(text.isascii() and text.isdigit() and int(text) for text in counts):
                raise InputError(
                    f'stem must be "root", or how many units each stage has, such as "3,4,9"; got {self.stem!r}'
                )
            object.__setattr__(self, "stem", ",".join(str(int(text)) for text in counts))
        if self.stem_width % self.stem_groups:
            raise InputError(f"stem_width {self.stem_width} is not a multiple of stem_groups {self.stem_groups}")
        if self.image_size % (self.stem_stride * self.patch_size):
            raise InputError(
                f"image_size {self.image_size} is not a multiple of {self.stem_stride * self.patch_size}: "
                f"stem {self.stem!r} makes maps of 1/{self.stem_stride} the size, which patch_size {self.patch_size} "
                "cuts up"
            )

    @classmethod
    def preset(cls, name, **changes):
        """A named model, e.g. ``ViTConfig.preset("B/16")`` or ``ViTConfig.preset("Micro/4", num_classes=100)``.

        Ti, S, B, L, H with patch 8, 14, 16, 32 and the hybrids R+Ti/16, R26+S/32, R50+B/16, R50+B/32, R50+L/16 and
        R50+L/32 at 224 pixels and 1000 classes; Nano, Micro, Mini, Midi with patch 2, 4, 8 at 32 pixels and 10 classes.
        """
        return cls(**{**preset_fields(name), **changes})

    @property
    def stem_units(self):
        """How many units each stage of the stem has: () for the root alone, and without a stem."""
        return tuple(int(count) for count in self.stem.split(",")) if self.stem not in ("", "root") else ()

    @property
    def stem_stride(self):
        """Pixels from one position of the stem's map to the next; 1 without a stem."""
        return output_of(self.stem_width, self.stem_units)[0] if self.stem else 1

    @property
    def patch_channels(self):
        """Channels of what patches are cut from: the picture, or the stem's map."""
        return output_of(self.stem_width, self.stem_units)[1] if self.stem else self.channels

    @property
    def grid_size(self):
        """Patches along one side of the image."""
        return self.image_size // (self.stem_stride * self.patch_size)

    @property
    def num_features(self):
        """How many numbers the head reads: R with a pre-logits layer, else D."""
        return self.pre_logits or self.width

    @property
    def num_tokens(self):
        """N: the patches, the registers, and the class token if there is one."""
        return self.grid_size**2 + self.registers + (self.pooling == "cls")

    @property
    def sequence_length(self):
        """Tokens that attend to each other: all N, or those of a row or column."""
        return self.grid_size if self.attention == "axial" else self.num_tokens
