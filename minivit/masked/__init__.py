"""Models that guess what is under masked patches, and their training."""

from minivit.masked.config import (
    EPS,
    LEVELS,
    RATIOS,
    SIDE,
    TARGETS,
    UNREAD,
    MaskedConfig,
    check_fit,
    classes,
    outputs,
    predicted_count,
)
from minivit.masked.loss import (
    PatchLossCache,
    patch_loss,
    patch_loss_gradient,
)
from minivit.masked.model import (
    BlocksCache,
    DecoderCache,
    EmbedCache,
    MaskedCache,
    MaskedViT,
    decoder_config,
    masked_table,
)
from minivit.masked.targets import (
    class_colours,
    colour_classes,
    draw_plan,
    painted,
    patch_targets,
    shown,
)

__all__ = [
    "BlocksCache",
    "DecoderCache",
    "EPS",
    "EmbedCache",
    "LEVELS",
    "MaskedCache",
    "MaskedConfig",
    "MaskedViT",
    "PatchLossCache",
    "RATIOS",
    "SIDE",
    "TARGETS",
    "UNREAD",
    "check_fit",
    "class_colours",
    "classes",
    "colour_classes",
    "decoder_config",
    "draw_plan",
    "masked_table",
    "outputs",
    "painted",
    "patch_loss",
    "patch_loss_gradient",
    "patch_targets",
    "predicted_count",
    "shown",
]
