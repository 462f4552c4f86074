"""The Vision Transformer: its configuration, its parameters, its forward and its backward."""

from minivit.model.config import ATTENTIONS, POSITIONS, ViTConfig
from minivit.model.images import checked_images, pixels
from minivit.model.inside import Intermediates, attention_map, feature_map, intermediates, positions
from minivit.model.presets import HYBRIDS, PAPER_SIZES, PRESETS, SMALL_SIZES, preset_fields
from minivit.model.table import STEM, parameter_table
from minivit.model.vit import ViT, ViTCache

__all__ = [
    "ATTENTIONS", "HYBRIDS", "PAPER_SIZES", "POSITIONS", "PRESETS", "SMALL_SIZES", "STEM", "Intermediates", "ViT",
    "ViTCache", "ViTConfig", "attention_map", "checked_images", "feature_map", "intermediates", "parameter_table",
    "pixels", "positions", "preset_fields",
]  # fmt: skip
