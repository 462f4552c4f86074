"""The Vision Transformer: its configuration, its parameters, its forward and its backward."""

from minivit.model.config import ATTENTIONS, POSITIONS, ViTConfig
from minivit.model.presets import HYBRIDS, PAPER_SIZES, PRESETS, SMALL_SIZES, preset_fields
from minivit.model.table import STEM, block_parameters, parameter_table, position_parameters
from minivit.model.vit import BlockInput, Intermediates, ViT, ViTCache, checked_images, pixels

__all__ = [
    "ATTENTIONS", "HYBRIDS", "PAPER_SIZES", "POSITIONS", "PRESETS", "SMALL_SIZES", "STEM", "BlockInput",
    "Intermediates", "ViT", "ViTCache", "ViTConfig", "block_parameters", "checked_images", "parameter_table", "pixels",
    "position_parameters", "preset_fields",
]  # fmt: skip
