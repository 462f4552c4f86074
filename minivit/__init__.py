"""minivit: a Vision Transformer from scratch on arrays, every forward and backward pass written out by hand."""

from minivit.base.errors import InputError
from minivit.layers.loss import softmax_cross_entropy_backward, softmax_cross_entropy_forward
from minivit.model import PRESETS, ViT, ViTConfig, parameter_table

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "InputError",
    "ViT",
    "ViTConfig",
    "__version__",
    "parameter_table",
    "softmax_cross_entropy_backward",
    "softmax_cross_entropy_forward",
]
