"""What a model computes on the way: attention maps, tokens, positions, the map that patches are cut from."""

from typing import Any, NamedTuple

from minivit.base.backend import plain
from minivit.base.pairs import ChainCache, FollowCache
from minivit.model.images import checked_images
from minivit.options.axial import axial_map, is_column_block
from minivit.options.flash_attention import FlashAttentionCache
from minivit.options.flash_attention import attention_map as map_again
from minivit.options.position2d import position2d_forward
from minivit.options.stem.option import stem_part


class Intermediates(NamedTuple):
    """What `intermediates` saw on the way."""

    logits: Any  # (B, K)
    attention: tuple  # L arrays (B, h, N, N): the attention maps of each block; zero where an axial one does not look
    features: tuple  # 1 + L arrays (B, N, D): the embedded tokens, then the output of each block


def attention_map(cache):
    """The attention map (B, h, N, N) in a block's cache, or made again where it was not kept."""
    while not hasattr(cache, "softmax"):
        if isinstance(cache, FollowCache):
            cache = cache.second  # the block, behind what is added before it
        elif isinstance(cache, ChainCache):
            cache = cache.first  # the branch, before what follows it
        elif isinstance(cache, FlashAttentionCache):
            return map_again(cache.q, cache.k)
        else:
            cache = cache.msa if hasattr(cache, "msa") else cache.attention
    return cache.softmax.y


def intermediates(model, images):
    """Logits, attention maps and token features of every block, with no dropout.

    Shapes  images (B, H, W, C)  ->  Intermediates: logits (B, K), L maps (B, h, N, N), 1 + L features (B, N, D)
    """
    c, maps, tokens = model.config, [], []

    def visit(i, z, cache):
        tokens.append(z)
        if i:
            seen = attention_map(cache)
            if c.attention == "axial":
                seen = axial_map(seen, c.grid_size, columns=is_column_block(i - 1))
            maps.append(seen)

    with plain():  # kernels keep no attention maps
        parts = model.compose(every_token=True)
        logits = model.read(images, parts.head, parts=parts, visit=visit)
    return Intermediates(logits, tuple(maps), tuple(tokens))


def positions(model):
    """What is added to class token and patches before the first block, as one table, whatever makes it.

    Math    learned2d: [x_b, y_a] for the patch in row a and column b, zeros for the class token; none: zeros
    Shapes  ->  (1, N, D), of N tokens without registers
    """
    p, own = model.inputs, "blocks.0." if model.config.pos_at == "every" else ""
    if model.config.pos_embed == "learned2d":
        return position2d_forward(p["pos_embed"], p[f"{own}pos_embed_x"], p[f"{own}pos_embed_y"])[0]
    return p.get(f"{own}pos_embed", p["pos_embed"])


def feature_map(model, images):
    """What patches are cut from: the images themselves, or the stem's map of them.

    Shapes  images (B, H, W, C)  ->  (B, H / stride, W / stride, C'), with ``stem_stride`` and ``patch_channels``
    """
    images = checked_images(images, model.flat.dtype)
    return stem_part(model.config).forward(images, model.params)[0] if model.config.stem else images
