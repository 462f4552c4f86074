"""What pre-training hides of an image, and what is to be said of it."""

from __future__ import annotations

from dataclasses import dataclass

from minivit.base.errors import InputError
from minivit.base.settings import check_choice, check_range, check_types, setting

TARGETS = {"mpp": ("colour", "downsized", "pixels"), "mae": ("normalised", "pixels")}  # the first is the default
RATIOS = {"mpp": 0.5, "mae": 0.75}
LEVELS = 8  # of a colour channel: 3 bits
SIDE = 4  # of a downsized patch
UNREAD = ("attention_pool.", "pre_logits.", "head.")  # parameters of a ViT that pre-training does not use
EPS = 1e-6  # added to the variance of a patch's pixels, as in the MAE's code


@dataclass(frozen=True)
class MaskedConfig:
    """What is hidden of an image and what is to be said of it.

    Raises  InputError (a ValueError): from the constructor, for any impossible setting.
    """

    method: str = setting("mpp", "mpp (masked patch prediction, of the ViT paper) or mae (masked autoencoder)")
    target: str = setting(
        "auto",
        "what is predicted of a patch: mpp colour, downsized or pixels; mae normalised or pixels; auto: the first",
    )
    ratio: float = setting(0.0, "share of the patches that are predicted; 0 for 0.5 with mpp, 0.75 with mae")
    mask_share: float = setting(0.8, "mpp: share of these that become the mask")
    random_share: float = setting(0.1, "mpp: share of these that become another patch; the rest stays")
    decoder_width: int = setting(128, "mae: width of the decoder")
    decoder_depth: int = setting(2, "mae: blocks of the decoder, with MLPs of 4 x its width")
    decoder_heads: int = setting(4, "mae: attention heads of the decoder")

    def __post_init__(self):
        check_types(self)
        check_choice(self, "method", tuple(TARGETS))
        if self.target == "auto":
            object.__setattr__(self, "target", TARGETS[self.method][0])
        check_choice(self, "target", TARGETS[self.method])
        if self.ratio == 0.0:
            object.__setattr__(self, "ratio", RATIOS[self.method])
        check_range(self, 0.0, 1.0, "ratio", "mask_share", "random_share")
        if self.mask_share + self.random_share > 1.0:
            raise InputError(
                f"mask_share {self.mask_share} and random_share {self.random_share} are more than all patches together"
            )
        check_range(self, 1, None, "decoder_width", "decoder_depth", "decoder_heads")
        if self.decoder_width % self.decoder_heads or self.decoder_width % 4:
            raise InputError(
                f"decoder_width {self.decoder_width} must be a multiple of decoder_heads {self.decoder_heads} and of 4"
            )


def check_fit(config, masked):
    """Raises InputError unless images of a `ViTConfig` can be masked as asked for."""
    plain = {"stem": "", "attention": "full", "pos_at": "input"}
    if other := [name for name, value in plain.items() if getattr(config, name) != value]:
        raise InputError(f"pre-training is of models without {other[0]} {getattr(config, other[0])}; leave it out")
    if config.pos_embed == "learned2d":
        raise InputError('pre-training takes positions "learned", "sincos2d" or "none", not "learned2d"')
    N = config.grid_size**2
    if not 0 < predicted_count(config, masked) < N:
        raise InputError(
            f"ratio {masked.ratio} of {N} patches is none or all of them; take another ratio or a smaller patch_size"
        )
    if masked.target == "downsized" and config.patch_size % SIDE:
        raise InputError(f"target downsized needs a patch_size that is a multiple of {SIDE}, not {config.patch_size}")
    if classes(config, masked) and config.channels > 3:
        raise InputError(f"{LEVELS} levels of {config.channels} channels are too many classes; take target pixels")


def predicted_count(config, masked):
    """n: how many patches of each image are predicted."""
    return round(masked.ratio * config.grid_size**2)


def classes(config, masked):
    """How many classes a prediction has; 0 for regression."""
    return LEVELS**config.channels if masked.target in ("colour", "downsized") else 0


def outputs(config, masked):
    """How many numbers are predicted for a patch."""
    each = {"colour": 1, "downsized": SIDE * SIDE}.get(masked.target, 0)
    return each * classes(config, masked) or config.patch_size**2 * config.channels
