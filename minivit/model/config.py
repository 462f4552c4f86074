"""What defines a model: `ViTConfig`, the sizes of the plain ViT and the fields of every option."""

from __future__ import annotations

from dataclasses import dataclass

from minivit.base.errors import InputError
from minivit.base.settings import check_choice, check_range, check_types, setting
from minivit.model.compose import OPTIONS
from minivit.model.presets import preset_fields
from minivit.options.axial import ATTENTIONS

__all__ = ["ATTENTIONS", "POSITIONS", "ViTConfig"]

POSITIONS = {name: places for option in OPTIONS for name, places in option.positions.items()}  # and where each can be


@dataclass(frozen=True)
class PlainConfig:
    """The sizes of the plain Vision Transformer."""

    image_size: int = setting(32, "height and width of the images, pixels; those of a data set are scaled to it")
    patch_size: int = setting(4, "height and width P of a patch, pixels; with a stem, positions of its map")
    channels: int = setting(3, "colour channels C")
    num_classes: int = setting(10, "classes K")
    width: int = setting(192, "token width D")
    depth: int = setting(6, "number of blocks L")
    num_heads: int = setting(3, "attention heads h; the width must be a multiple")
    mlp_dim: int = setting(0, "hidden width M of the MLPs; 0 means 4 x width")
    layernorm_eps: float = setting(1e-6, "added to the variance in LayerNorm")


@dataclass(frozen=True)
class ViTConfig(*(option.settings for option in reversed(OPTIONS)), PlainConfig):
    """Everything that defines a model; wrong values are refused with a sentence that says what is wrong.

    Raises  InputError (a ValueError): from the constructor, for any impossible setting.
    """

    def __post_init__(self):
        check_types(self)
        if self.mlp_dim == 0:
            object.__setattr__(self, "mlp_dim", 4 * self.width)
        check_range(self, 1, None, "image_size", "patch_size", "channels", "num_classes")
        check_range(self, 1, None, "width", "depth", "num_heads", "mlp_dim")
        check_range(self, 1e-20, 1.0, "layernorm_eps")
        check_choice(self, "pos_embed", POSITIONS)
        if not self.stem and self.image_size % self.patch_size:
            raise InputError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.width % self.num_heads:
            raise InputError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        for option in OPTIONS:
            option.check(self)
        if self.pos_at not in (possible := POSITIONS[self.pos_embed]):
            names = " or ".join(f'"{name}"' for name in possible)
            raise InputError(f'with pos_embed "{self.pos_embed}", pos_at must be {names}, got "{self.pos_at}"')

    @classmethod
    def preset(cls, name, **changes):
        """A named model, e.g. ``ViTConfig.preset("B/16")`` or ``ViTConfig.preset("Micro/4", num_classes=100)``.

        Ti, S, B, L, H with patch 8, 14, 16, 32 and the hybrids R+Ti/16, R26+S/32, R50+B/16, R50+B/32, R50+L/16 and
        R50+L/32 at 224 pixels and 1000 classes; Nano, Micro, Mini, Midi with patch 2, 4, 8 at 32 pixels and 10 classes.
        """
        return cls(**{**preset_fields(name), **changes})

    @property
    def grid_size(self):
        """Patches along one side of the image."""
        return self.image_size // (self.stem_stride * self.patch_size)

    @property
    def num_tokens(self):
        """N: the patches, the registers, and the class token if there is one."""
        return self.grid_size**2 + self.registers + self.class_tokens

    @property
    def sequence_length(self):
        """Tokens that attend to each other: all N, or those of a row or column."""
        return self.grid_size if self.attention == "axial" else self.num_tokens
