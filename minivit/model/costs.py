"""What a model costs, in closed form: the floating-point operations of its matrix products, from its sizes alone.

A multiply-add is 2 operations: a product of (n, d) and (d, m) takes 2 n d m. The laboratory counts what is really done
(`minivit.laboratory.trace`), and its counts are these.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from minivit.model.table import mlp_matrices
from minivit.options.flash_attention import LONG
from minivit.options.stem.resnet import convolutions


class ExpectedFLOPs(NamedTuple):
    """FLOPs of the matrix products of a batch."""

    forward: int
    backward: int


def _queries(config, every_token=False):
    """How many tokens of an image have a query: (in all blocks together, in those that keep no attention map)."""
    N = config.num_tokens
    last = 1 if config.pooling == "cls" and not every_token else N
    queries = (config.depth - 1) * N + last
    if config.sequence_length < LONG or config.pos_embed == "relative":
        return queries, 0
    return queries, queries if last >= LONG else queries - last


def _stem_products(config):
    """FLOPs of each convolution of the stem, for one image."""
    side, flops = config.image_size, []
    if not config.stem:
        return flops
    for layer in convolutions(config.channels, config.stem_width, config.stem_units):
        if "downsample" not in layer.names[0]:  # which sees the map that conv2 has halved already
            side = -(-side // layer.stride)
        flops.append(2 * side**2 * math.prod(layer.kernel))
        if len(flops) == 1:
            side = -(-side // 2)  # the root's pooling
    return flops


def expected_flops(config, batch, *, every_token=False, image_gradient=False):
    """FLOPs in matrix products that one batch takes, from the configuration alone.

    Math    forward / B = 2 n P^2 C D + sum_blocks (6 N D^2 + 4 Q N D + 2 Q (D^2 + 2 D M)) + 2 (D R + R K), or 2 D K for
            the last term without a pre-logits layer,
            of 2 D where the head reads two tokens, and 4 n D for sequence pooling; n patches, N tokens, of which Q
            have a query: 1 in the last block if the head reads the class token alone, else N; ``every_token`` counts N,
            as published figures do
            an option's MLP: 2 Q d m for each of its matrices (d, m), in place of 4 Q D M
            axial attention: 4 Q g D in place of 4 Q N D, for g patches in a row; relative positions, with S tokens in a
            sequence (N, or g): 2 Q (S + Q - 1) D more in each block, 2 N (2 g - 1) D with axial attention
            a stem adds 2 H' W' kh kw I O for each convolution; C is then the channels of its map
            backward = 2 forward - the first product, 2 B n P^2 C D or the root's: two products for each one, but no
            gradient of the images unless ``image_gradient``; and 2 B Q N D for each block of Q >= LONG, which makes its
            attention map again
    Returns  ExpectedFLOPs
    """
    c, D = config, config.width
    embed = 2 * c.grid_size**2 * c.patch_size**2 * c.patch_channels * D
    stem = _stem_products(c)
    N, (queries, again) = c.num_tokens, _queries(c, every_token)
    S = c.sequence_length
    mlp = sum(2 * d * m for d, m in mlp_matrices(c))
    blocks = c.depth * 6 * N * D**2 + queries * (4 * S * D + 2 * D**2 + mlp)
    if c.pos_embed == "relative":
        last = queries - (c.depth - 1) * N  # in the last block
        blocks += 2 * D * ((c.depth - 1) * N * (2 * S - 1) + last * (S + min(S, last) - 1))
    pool = 4 * c.grid_size**2 * D if c.pooling == "seq" else 0
    head = pool + 2 * (c.num_pooled * c.pre_logits + c.num_features * c.num_classes)
    forward = sum(stem) + embed + blocks + head
    unneeded = 0 if image_gradient else (stem[0] if stem else embed)
    return ExpectedFLOPs(batch * forward, batch * (2 * forward - unneeded + 2 * again * S * D))


def attention_flops(config, batch):
    """Those of `expected_flops`, forward and backward together, that grow with N^2, without those of offsets.

    Math    sum_blocks B (12 Q N D + 2 [Q >= LONG] Q N D): two products forward and four backward, q k^T again;
            g in place of N with axial attention
    """
    queries, again = _queries(config)
    return batch * (12 * queries + 2 * again) * config.sequence_length * config.width
