"""Named models: the sizes of the paper, of the official code, and small ones for 32 x 32 images."""

from minivit.base.errors import InputError

# width, depth, heads, MLP width. Ti and S: the official code's configs; B, L, H: Table 1 of the paper.
PAPER_SIZES = {
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "H": (1280, 32, 16, 5120),
}
# The same four numbers for 32 x 32 images.
SMALL_SIZES = {
    "Nano": (64, 4, 4, 128),
    "Micro": (128, 6, 4, 256),
    "Mini": (192, 6, 3, 768),
    "Midi": (384, 7, 6, 1536),
}
# The hybrids: size, stem, patch. The number in a name is that of the official files; R+Ti/16 has patches of 32 pixels.
HYBRIDS = {
    "R+Ti/16": ("Ti", "root", 8),
    "R26+S/32": ("S", "2,2,2,2", 1),
    "R50+B/16": ("B", "3,4,9", 1),
    "R50+B/32": ("B", "3,4,6,3", 1),
    "R50+L/16": ("L", "3,4,9", 1),
    "R50+L/32": ("L", "3,4,6,3", 1),
}
PRESETS = tuple(
    [f"{size}/{patch}" for size in PAPER_SIZES for patch in (8, 14, 16, 32)]
    + list(HYBRIDS)
    + [f"{size}/{patch}" for size in SMALL_SIZES for patch in (2, 4, 8)]
)


def preset_fields(name):
    """The `ViTConfig` fields that a preset sets, as a dict.

    Raises  InputError: unknown name; the message lists the known ones.
    """
    if name not in PRESETS:
        raise InputError(f"no preset {name!r}; the presets are {', '.join(PRESETS)}")
    if name in HYBRIDS:
        size, stem, patch = HYBRIDS[name]
        return preset_fields(f"{size}/16") | {"patch_size": patch, "stem": stem}
    size, patch = name.split("/")
    paper = size in PAPER_SIZES
    width, depth, num_heads, mlp_dim = (PAPER_SIZES if paper else SMALL_SIZES)[size]
    fields = {"patch_size": int(patch), "width": width, "depth": depth, "num_heads": num_heads, "mlp_dim": mlp_dim}
    return fields | ({"image_size": 224, "num_classes": 1000} if paper else {"image_size": 32, "num_classes": 10})
