"""What a model consists of: the pairs of the plain Vision Transformer, wrapped by the options that are set.

`OPTIONS` lists them all. Each takes, in this order, what the one before it returned; one that is off returns it
unchanged. So the plain ViT consists of the pairs of `minivit.layers`, and of `minivit.options.first_tokens`, which
computes of the last block only what the head reads.
"""

from functools import partial

from minivit.base.pairs import Pair, Part, as_part
from minivit.layers.attention import ATTENTION
from minivit.layers.block import NORM1, NORM2, block_backward, block_forward
from minivit.layers.gelu import GELU
from minivit.layers.head import HEAD_NAMES, head_backward, head_forward
from minivit.layers.mlp import MLP, mlp_backward, mlp_forward
from minivit.layers.msa import MSA, msa_backward, msa_forward
from minivit.layers.patch_embed import EMBED_NAMES, patch_embed_backward, patch_embed_forward
from minivit.options import (
    attention_dropout,
    axial,
    dropping,
    exact_gelu,
    flash_attention,
    gated_mlp,
    layer_scale,
    pooling,
    positions,
    qk_norm,
    registers,
    relative_attention,
)
from minivit.options.first_tokens import first_tokens_backward, first_tokens_forward, with_first_queries
from minivit.options.option import Place
from minivit.options.recompute import recomputed
from minivit.options.stem import option as stem

OPTIONS = (
    pooling.OPTION,
    attention_dropout.OPTION,
    flash_attention.OPTION,
    relative_attention.OPTION,
    qk_norm.OPTION,
    exact_gelu.OPTION,
    gated_mlp.OPTION,
    axial.OPTION,
    positions.OPTION,
    registers.OPTION,
    dropping.DROPOUT,
    layer_scale.OPTION,
    dropping.DROP_PATH,
    stem.OPTION,
)


def wrapped(part, what, config, place):
    """The part, a Pair or a Part, in the wraps of all options for ``what``: "attend", "branch", "block", ..."""
    for option in OPTIONS:
        if wrap := getattr(option, what):
            part = wrap(part, config, place)
    return part


def embedding(config, rng=None):
    """Images to tokens, as a Part (Eq. 1)."""
    forward = partial(patch_embed_forward, patch_size=config.patch_size)
    return wrapped(as_part(Pair(forward, patch_embed_backward, EMBED_NAMES)), "embedding", config, Place(rng=rng))


def head(config):
    """Tokens to logits, as a Part (Eq. 4)."""
    forward = partial(head_forward, eps=config.layernorm_eps)
    return wrapped(as_part(Pair(forward, head_backward, HEAD_NAMES)), "head", config, Place())


def features(config):
    """Tokens to what the last linear map of the head reads, as a Part."""
    return as_part(pooling.features(config))


def block(config, i, *, rng=None, reads=None, recompute=False):
    """Block i as a Part (Eq. 2-3), with parameters by the names that they have within it.

    With ``reads``, only that many tokens of the result, the first ones, are computed.
    """
    if recompute:
        return recomputed(lambda rng: block(config, i, rng=rng, reads=reads), rng)
    c, place = config, Place(i, rng=rng, reads=reads)
    attend = wrapped(ATTENTION, "attend", c, place)
    if reads is not None:
        attend = with_first_queries(attend, reads)
    activation = wrapped(GELU, "activation", c, place)
    msa = Pair(
        partial(msa_forward, attend=attend), partial(msa_backward, attend=attend), MSA.names + attend.names,
        attend.about,
    )  # fmt: skip
    mlp = Pair(
        partial(mlp_forward, activation=activation), partial(mlp_backward, activation=activation), MLP.names,
        activation.about,
    )  # fmt: skip
    mlp = wrapped(mlp, "mlp", c, place)
    branches = {
        "msa": wrapped(msa, "branch", c, place._replace(branch=1)),
        "mlp": wrapped(mlp, "branch", c, place._replace(branch=2)),
    }
    settings = branches | {"num_heads": c.num_heads, "eps": c.layernorm_eps}
    if reads is None:
        forward, backward = partial(block_forward, **settings), partial(block_backward, **branches)
    else:
        forward = partial(first_tokens_forward, reads=reads, **settings)
        backward = partial(first_tokens_backward, **branches)
    names = NORM1 + branches["msa"].names + NORM2 + branches["mlp"].names
    return wrapped(Part(forward, backward, names), "block", c, place)


def full_name(i, name):
    """The name in the model of a block's parameter; one that begins with "/" is the model's own, shared by blocks."""
    return name[1:] if name.startswith("/") else f"blocks.{i}.{name}"


def constants(config):
    """What parts take by name and nothing learns: {name: float64 array}."""
    return {name: a for option in OPTIONS if option.constants for name, a in option.constants(config).items()}


def extra_rows(config, place):
    """The rows that options add to the parameter table at one place; see `minivit.options.option.Option`."""
    return [row for option in OPTIONS for row in option.rows(config).get(place, ())]
