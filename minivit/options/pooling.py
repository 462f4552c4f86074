r"""What is classified: other poolings than the class token, and the layer before the head of the paper's pre-training.

Forward, of the n patches z_1, ..., z_n after the last block

        y = mean_n LN(z)            pooling "mean"     the average over patches (appendix D.3 of the paper)
        y = LN(mean_n z)            pooling "avg"      the same two the other way round (timm)
        y = pool(LN(z))             pooling "seq"      a learned weighted mean (`minivit.options.sequence_pool`)
        y = [x_0; mean x_i]         x = LN(z); "cls+mean": the class token and the mean of the patches, side by side
                                    (DINOv2's classifiers); "cls+register": the class token and the first register, the
                                    mean of one (DeiT's distillation token)
        y = tanh(u), u = y @ W + b  with ``pre_logits``, after any pooling (the paper's head for pre-training)

    Mean and LayerNorm do not commute: with "avg" a token of large numbers counts for more, with "mean" all count alike.

Backward, each line by itself

        y = tanh(u)             =>   du = dy * (1 - y^2)

    since tanh = sinh / cosh has by the quotient rule the derivative (cosh^2 - sinh^2) / cosh^2 = 1 - tanh^2.

        y = 1/n * sum_i x_i     =>   dx_i = dy / n

    Each of the n tokens moves y at the rate 1/n and gets the same gradient.

        x = z[:, first:]        =>   dz = [0; dx],   zero in the rows before ``first``, which were not read
        x = z[:, 0]             =>   dz = [dx; 0]
        y = [x_0; mean x_i]     =>   dx_0 = dy[:D],  dx_i = dy[D:] / n

    The rest is that of LayerNorm and of linear maps.

Example: one image, three tokens of D = 2, of which the last one has large numbers
    >>> import numpy as np
    >>> x = np.array([[[0.0, 2.0], [0.0, 2.0], [8.0, 0.0]]])
    >>> y, cache = mean_forward(x)
    >>> mean_backward(np.array([[3.0, 6.0]]), cache).tolist()
    [[[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]]]

    LayerNorm of two numbers gives -1 and 1. Before the mean ("mean"), all tokens count alike, two against one; after it
    ("avg"), the token of large numbers decides:

    >>> normed = layernorm_forward(x, np.ones(2), np.zeros(2))[0]
    >>> mean_forward(normed)[0].round(4).tolist()
    [[-0.3333, 0.3333]]
    >>> layernorm_forward(y, np.ones(2), np.zeros(2))[0].round(4).tolist()
    [[1.0, -1.0]]
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from minivit.base.backend import accelerated, array_module
from minivit.base.errors import InputError
from minivit.base.pairs import Pair, as_part, chain
from minivit.base.params import ParameterSpec, lecun_normal, normal, zeros
from minivit.base.settings import check_choice, check_range, setting
from minivit.layers.head import HEAD_LINEAR, NORM
from minivit.layers.layernorm import layernorm_backward, layernorm_forward
from minivit.layers.linear import linear_backward, linear_forward
from minivit.options.option import Option
from minivit.options.sequence_pool import sequence_pool_backward, sequence_pool_forward

BESIDE = ("cls+mean", "cls+register")  # of which the head reads 2 D numbers
POOLINGS = ("cls", "mean", "avg", "seq", *BESIDE)
PRE_LOGITS = ("pre_logits.weight", "pre_logits.bias")
ATTENTION_POOL = ("attention_pool.weight", "attention_pool.bias")


class PatchesCache(NamedTuple):
    """What `patches_backward` reads."""

    shape: tuple  # (B, N, D)
    first: int  # tokens before the patches


@accelerated
def patches_forward(z, *, first):
    """The patches of each image, without the ``first`` tokens.

    Shapes  z (B, N, D)  ->  (B, n, D), n = N - first
    """
    return z[:, first:], PatchesCache(z.shape, first)


@accelerated
def patches_backward(dx, cache):
    """Backward of `patches_forward`: zeros for the tokens that were not read.

    Shapes  dx (B, n, D)  ->  dz (B, N, D)
    """
    # x = z[:, first:]
    dz = array_module(dx).zeros(cache.shape, dx.dtype)
    dz[:, cache.first :] = dx
    return dz


@accelerated
def first_token_forward(z):
    """The class token of each image.

    Shapes  z (B, N, D)  ->  (B, D)
    """
    return z[:, 0], z.shape


@accelerated
def first_token_backward(dx, cache):
    """Backward of `first_token_forward`: zeros for the other tokens; the cache is the shape of z.

    Shapes  dx (B, D)  ->  dz (B, N, D)
    """
    # x = z[:, 0]
    dz = array_module(dx).zeros(cache, dx.dtype)
    dz[:, 0] = dx
    return dz


class MeanCache(NamedTuple):
    """What `mean_backward` reads."""

    shape: tuple  # (B, n, D)


@accelerated
def mean_forward(x):
    """The mean of the tokens of each image.

    Math    y = 1/n * sum_i x_i
    Shapes  x (B, n, D)  ->  y (B, D)
    """
    return x.mean(axis=1), MeanCache(x.shape)


@accelerated
def mean_backward(dy, cache):
    """Backward of `mean_forward`.

    Math    dx_i = dy / n
    Shapes  dy (B, D)  ->  dx (B, n, D)
    """
    # y = 1/n * sum_i x_i
    dx = array_module(dy).empty(cache.shape, dy.dtype)
    dx[...] = dy[:, None] / cache.shape[1]
    return dx


class BesideMeanCache(NamedTuple):
    """What `beside_mean_backward` reads."""

    shape: tuple  # (B, N, D)
    rows: slice  # of the tokens whose mean was taken


@accelerated
def beside_mean_forward(x, *, first, last=None):
    """The first token of each image, and the mean of those from ``first`` up to ``last``, side by side.

    Math    y = [x_0; 1/n sum_i x_i], n tokens i from first, not 0, to before last
    Shapes  x (B, N, D)  ->  y (B, 2 D)
    """
    rows = slice(first, last)
    return array_module(x).concatenate([x[:, 0], x[:, rows].mean(axis=1)], axis=1), BesideMeanCache(x.shape, rows)


@accelerated
def beside_mean_backward(dy, cache):
    """Backward of `beside_mean_forward`.

    Math    dx_0 = dy[:D];  dx_i = dy[D:] / n;  zero elsewhere
    Shapes  dy (B, 2 D)  ->  dx (B, N, D)
    """
    # y = [x_0; 1/n sum_i x_i]
    D = cache.shape[2]
    dx = array_module(dy).zeros(cache.shape, dy.dtype)
    dx[:, 0] = dy[:, :D]
    dx[:, cache.rows] = dy[:, None, D:] / dx[:, cache.rows].shape[1]
    return dx


class TanhCache(NamedTuple):
    """What `tanh_backward` reads: the result is all that the derivative needs."""

    y: Any  # (...)


@accelerated
def tanh_forward(x):
    """Hyperbolic tangent, elementwise.

    Shapes  x (...)  ->  y (...)
    """
    y = array_module(x).tanh(x)
    return y, TanhCache(y)


@accelerated
def tanh_backward(dy, cache):
    """Backward of `tanh_forward`.

    Math    dx = dy * (1 - y^2)
    Shapes  dy (...)  ->  dx (...)
    """
    # y = tanh(x), whose derivative is 1 - y^2
    return dy * (1.0 - cache.y * cache.y)


@dataclass(frozen=True)
class Settings:
    """Fields of the configuration."""

    pooling: str = setting(
        "cls",
        'what is classified: "cls" (class token), "mean" or "seq" (plain or learned mean of patches), "avg" (the plain '
        'mean before the last LayerNorm, as timm has it), "cls+mean" or "cls+register" (class token beside the mean or '
        "the first register)",
    )
    pre_logits: int = setting(0, "width R of the tanh layer before the head; 0 for none")

    @property
    def class_tokens(self):
        """How many class tokens there are: 1 or 0."""
        return int(self.pooling == "cls" or self.pooling in BESIDE)

    @property
    def num_pooled(self):
        """How many numbers pooling gives: D, or 2 D."""
        return 2 * self.width if self.pooling in BESIDE else self.width

    @property
    def num_features(self):
        """How many numbers the head reads: R with a pre-logits layer, else those of the pooling."""
        return self.pre_logits or self.num_pooled


def check(config):
    """Raises InputError for another pooling or a negative width."""
    check_choice(config, "pooling", POOLINGS)
    check_range(config, 0, None, "pre_logits")
    if config.pooling == "cls+register" and not config.registers:
        raise InputError('with pooling "cls+register", registers must be at least 1')


def rows(config):
    """The scores of "seq", and the layer before the head."""
    D, R = config.width, config.pre_logits
    result = {}
    if config.pooling == "seq":
        weight, bias = ATTENTION_POOL
        result["pooling"] = [ParameterSpec(weight, (D, 1), normal(0.02), True), ParameterSpec(bias, (1,), zeros, False)]
    if R:
        weight, bias = PRE_LOGITS
        result["features"] = [
            ParameterSpec(weight, (config.num_pooled, R), lecun_normal(config.num_pooled), True),
            ParameterSpec(bias, (R,), zeros, False),
        ]  # fmt: skip
    return result


def features(config):
    """Tokens to what the head reads, as a Pair."""
    norm = Pair(partial(layernorm_forward, eps=config.layernorm_eps), layernorm_backward, NORM)
    mean = Pair(mean_forward, mean_backward)
    pool = Pair(sequence_pool_forward, sequence_pool_backward, ATTENTION_POOL)
    beside = {"cls+mean": {"first": 1 + config.registers}, "cls+register": {"first": 1, "last": 2}}
    both = Pair(partial(beside_mean_forward, **beside.get(config.pooling, {})), beside_mean_backward)
    patches = Pair(partial(patches_forward, first=config.registers), patches_backward)
    pair = {
        "cls": lambda: chain(Pair(first_token_forward, first_token_backward), norm, "norm"),
        "mean": lambda: chain(chain(patches, norm, "norm"), mean, "pool"),
        "avg": lambda: chain(chain(patches, mean, "pool"), norm, "norm"),
        "seq": lambda: chain(chain(patches, norm, "norm"), pool, "pool"),
        **dict.fromkeys(BESIDE, lambda: chain(norm, both, "pool")),
    }[config.pooling]()
    if config.pre_logits:
        dense = Pair(linear_forward, linear_backward, PRE_LOGITS)
        pair = chain(chain(pair, dense, "pre_logits"), Pair(tanh_forward, tanh_backward), "tanh")
    return pair


def head(pair, config, place):
    """The head behind another pooling, or behind a pre-logits layer."""
    if config.pooling == "cls" and not config.pre_logits:
        return pair
    return as_part(chain(features(config), Pair(linear_forward, linear_backward, HEAD_LINEAR), "head"))


OPTION = Option(Settings, check, rows, head=head)
