"""The stem of a hybrid in a model: patches are cut from a ResNet's map of the image (section 3.1)."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minivit.base.errors import InputError
from minivit.base.pairs import Part, chain_parts
from minivit.base.params import ParameterSpec, lecun_normal, ones, zeros
from minivit.base.settings import check_range, setting
from minivit.layers.patch_embed import scale_pixels
from minivit.options.option import Option
from minivit.options.stem.resnet import ResNetCache, convolutions, output_of, resnet_backward, resnet_forward

STEM = "patch_embed.backbone."  # timm's prefix of the names of the stem's parameters


@dataclass(frozen=True)
class Settings:
    """Fields of the configuration, and what follows from them."""

    stem: str = setting(
        "", 'ResNet that patches are cut from: "root", or the units of each stage, "3,4,9" for a ResNet-50; "" for none'
    )
    stem_width: int = setting(64, "channels of the stem's root")
    stem_groups: int = setting(32, "groups of channels in the stem's GroupNorm")

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
        """Channels of what patches are cut from: the image, or the stem's map."""
        return output_of(self.stem_width, self.stem_units)[1] if self.stem else self.channels


def check(config):
    """Raises InputError for a stem that is none, or whose map cannot be cut into patches."""
    c = config
    check_range(c, 1, None, "stem_width", "stem_groups")
    if not c.stem:
        return
    if c.stem != "root":
        counts = [text.strip() for text in c.stem.split(",")]
        if not all(text.isascii() and text.isdigit() and int(text) for text in counts):
            raise InputError(f'stem must be "root", or how many units each stage has, such as "3,4,9"; got {c.stem!r}')
        object.__setattr__(c, "stem", ",".join(str(int(text)) for text in counts))
    if c.stem_width % c.stem_groups:
        raise InputError(f"stem_width {c.stem_width} is not a multiple of stem_groups {c.stem_groups}")
    if c.image_size % (c.stem_stride * c.patch_size):
        raise InputError(
            f"image_size {c.image_size} is not a multiple of {c.stem_stride * c.patch_size}: stem {c.stem!r} makes "
            f"maps of 1/{c.stem_stride} the size, which patch_size {c.patch_size} cuts up"
        )


def rows(config):
    """Kernels, scales and shifts of every convolution."""
    specs = []
    for (kernel, scale, shift), shape, _ in convolutions(config.channels, config.stem_width, config.stem_units):
        specs.append(ParameterSpec(STEM + kernel, shape, lecun_normal(math.prod(shape[:3])), True))
        specs.append(ParameterSpec(STEM + scale, shape[3:], zeros if scale.endswith("norm3.weight") else ones, False))
        specs.append(ParameterSpec(STEM + shift, shape[3:], zeros, False))
    return {"stem": specs} if config.stem else {}


class StemCache(NamedTuple):
    """What the stem's backward reads."""

    resnet: ResNetCache
    bytes: bool  # whether the images came as bytes, of which nobody wants a gradient


def _own(named):
    """The stem's own, by their short names."""
    return {name.removeprefix(STEM): value for name, value in named.items() if name.startswith(STEM)}


def stem_part(config):
    """Images to the map that patches are cut from, as a Part."""
    units, groups = config.stem_units, config.stem_groups

    def forward(images, params):
        own = _own(params)
        pixels = scale_pixels(images, next(iter(own.values())).dtype)  # (B, H, W, C)
        y, cache = resnet_forward(pixels, own, units=units, groups=groups)
        return y, StemCache(cache, images.dtype == np.uint8)

    def backward(dy, cache, grads):
        # y = resnet(scale_pixels(images))
        return resnet_backward(dy, cache.resnet, _own(grads), need_dimages=not cache.bytes)

    return Part(forward, backward, tuple(row.name for row in rows(config)["stem"]))


def embedding(embed, config, place):
    """The embedding of the stem's map."""
    return chain_parts(stem_part(config), embed, first_name="stem") if config.stem else embed


OPTION = Option(Settings, check, rows, embedding=embedding)
