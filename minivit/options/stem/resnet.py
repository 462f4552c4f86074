r"""The ResNet that the hybrid models cut their patches from (ViT paper, Section 3.1; He et al. 2016, arXiv:1603.05027).

Forward
    Every convolution has its kernel standardised and is followed by GroupNorm:

        conv(x) = GN(conv2d(x, WS(kernel)))

    root         y = max_pool(relu(conv_7x7/2(images)))           a quarter of the height, ``width`` channels
    bottleneck   y = relu(shortcut(x) + f(x)),   f(x) = conv3_1x1(relu(conv2_3x3/stride(relu(conv1_1x1(x)))))
    stage        bottlenecks in a row

    f narrows the map to ``width`` channels (in the first stage), looks around, and widens it to four times as many. The
    shortcut is x where shapes allow (the identity), else conv_1x1/stride ("downsample"), in the first unit of each
    stage. The first stage keeps the size of the map; each later one halves height and width and doubles the channels.
    conv2 has the stride, not conv1.

    The scale of the last GroupNorm in f starts from zero, so that at first a unit passes on its shortcut.

    units     channels       of R + ViT-
    none      64             Ti/16 (the root alone)
    3,4,9     256 512 1024   B/16: the paper's ResNet-50 with the last stage's units in the third
    3,4,6,3   256 ... 2048   L/32
    2,2,2,2   256 ... 2048   S/32

Backward, each line from its last step to its first; dy is given

        y = GN(u)                       =>   du, dw, db are GroupNorm's
        u = conv2d(x, standard)         =>   dx and dstandard are the convolution's
        standard = WS(kernel)           =>   dkernel is that of the standardisation

    bottleneck: relu passes on what is positive. A sum hands its gradient to both of its terms, and x enters both:

        y = relu(s)                     =>   ds = dy * [y > 0]
        s = shortcut(x) + f(x)          =>   dx = J_shortcut^T @ ds + J_f^T @ ds

    The product with the transposed Jacobian of f is the backward of its five steps, from conv3 to conv1; that of the
    identity is ds itself.

This file is glue, as `minivit.layers.block` is: root, bottleneck, stage and resnet take parameters by timm's names from
a mapping, and *add* each gradient into a mapping of the same names.

Example: one pixel, and f = 0 because the scale of its last GroupNorm is 0: the unit is relu of its shortcut
    >>> import numpy as np
    >>> params = {name: np.ones((1, 1, 2, 2)) for name in ("conv1.weight", "conv2.weight", "conv3.weight")}
    >>> params |= {name: np.zeros(2) for names in (CONV1, CONV2, CONV3) for name in names[1:]}
    >>> y, cache = bottleneck_forward(np.array([[[[3.0, -4.0]]]]), params, groups=1)
    >>> (y == [3, 0]).all().item()
    True
    >>> grads = {name: np.zeros_like(value) for name, value in params.items()}
    >>> bottleneck_backward(np.ones((1, 1, 1, 2)), cache, grads).tolist()
    [[[[1.0, 0.0]]]]
    >>> output_of(64, (3, 4, 9))                          # the map has 1/16 of the image's height and 1,024 channels
    (16, 1024)
"""

from typing import NamedTuple

from minivit.base.backend import accelerated
from minivit.options.stem.conv2d import Conv2dCache, conv2d_backward, conv2d_forward
from minivit.options.stem.groupnorm import GroupNormCache, groupnorm_backward, groupnorm_forward
from minivit.options.stem.max_pool import MaxPoolCache, max_pool_backward, max_pool_forward
from minivit.options.stem.relu import ReLUCache, relu_backward, relu_forward
from minivit.options.stem.weight_standardization import (
    WeightStandardizationCache,
    weight_standardization_backward,
    weight_standardization_forward,
)

ROOT = ("conv.weight", "norm.weight", "norm.bias")
CONV1 = ("conv1.weight", "norm1.weight", "norm1.bias")
CONV2 = ("conv2.weight", "norm2.weight", "norm2.bias")
CONV3 = ("conv3.weight", "norm3.weight", "norm3.bias")
DOWNSAMPLE = ("downsample.conv.weight", "downsample.norm.weight", "downsample.norm.bias")  # where shapes change
ROOT_STRIDE, EXPANSION = 4, 4  # of the convolution and the pooling; of conv3


class Convolution(NamedTuple):
    """One convolution with its GroupNorm: where it is, and its sizes."""

    names: tuple  # of the kernel, and of GroupNorm's w and b
    kernel: tuple  # (kh, kw, I, O)
    stride: int


def convolutions(channels, width, units):
    """Every convolution of the network, in the order of the forward pass.

    ``units`` counts those of each stage, (3, 4, 9); () stands for the root alone, whose names are then shorter.
    Returns  a list of `Convolution`
    """

    def named(prefix, names):
        return tuple(prefix + name for name in names)

    found = [Convolution(named("stem." if units else "", ROOT), (7, 7, channels, width), 2)]
    for s, count in enumerate(units):
        narrow, wide = width * 2**s, width * 2**s * EXPANSION
        for u in range(count):
            prefix = f"stages.{s}.blocks.{u}."
            C = wide if u else (wide // 2 if s else width)  # of what comes in
            stride = 1 if u or not s else 2
            found += [
                Convolution(named(prefix, CONV1), (1, 1, C, narrow), 1),
                Convolution(named(prefix, CONV2), (3, 3, narrow, narrow), stride),
                Convolution(named(prefix, CONV3), (1, 1, narrow, wide), 1),
            ]
            if not u:
                found.append(Convolution(named(prefix, DOWNSAMPLE), (1, 1, C, wide), stride))
    return found


def output_of(width, units):
    """(how many pixels of the image a step on the resulting map is, the map's channels)."""
    later = max(len(units) - 1, 0)  # stages that halve the map
    return ROOT_STRIDE * 2**later, width * 2**later * (EXPANSION if units else 1)


def official_name(name):
    """The name of a parameter in the official .npz files; kernels are (kh, kw, I, O) in both."""
    place, number, parts = "", "_root", name.split(".")
    if parts[0] == "stages":  # stages.S.blocks.U.conv1.weight, stages.S.blocks.U.downsample.conv.weight
        place = f"block{int(parts[1]) + 1}/unit{int(parts[3]) + 1}/"
        number = "_proj" if parts[4] == "downsample" else parts[4][-1]
    if parts[-2].startswith("conv"):
        return f"{place}conv{number}/kernel"
    return f"{place}gn{number}/{'scale' if parts[-1] == 'weight' else 'bias'}"


def _part(named, prefix):
    """The entries whose names begin with the prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}


def _take(named, names):
    return [named[name] for name in names]


def _add(grads, names, gradients):
    for name, gradient in zip(names, gradients, strict=True):
        grads[name] += gradient


# ---- conv: a convolution with a standardised kernel, and GroupNorm


class ConvNormCache(NamedTuple):
    """What `conv_norm_backward` reads."""

    standardization: WeightStandardizationCache
    conv: Conv2dCache
    norm: GroupNormCache


@accelerated
def conv_norm_forward(x, kernel, w, b, *, stride=1, groups=32):
    """A convolution with a standardised kernel, and GroupNorm.

    Math    y = GN(conv2d(x, WS(kernel)); w, b)
    Shapes  x (B, H, W, I), kernel (kh, kw, I, O), w (O,), b (O,)  ->  y (B, ceil(H / stride), ceil(W / stride), O)
    Cache   of each step
    """
    kernel, standardization = weight_standardization_forward(kernel)
    y, conv = conv2d_forward(x, kernel, stride=stride)
    y, norm = groupnorm_forward(y, w, b, groups=groups)
    return y, ConvNormCache(standardization, conv, norm)


@accelerated
def conv_norm_backward(dy, cache, *, need_dx=True):
    """Backward of `conv_norm_forward`.

    Math    du, dw, db are those of GN;  dx, dstandard those of conv2d;  dkernel that of WS
    Shapes  dy (B, H', W', O)  ->  dx (B, H, W, I) or None, dkernel (kh, kw, I, O), dw (O,), db (O,)
    """
    # y = GN(u; w, b)
    dy, dw, db = groupnorm_backward(dy, cache.norm)
    # u = conv2d(x, standard)
    dx, dkernel = conv2d_backward(dy, cache.conv, need_dx=need_dx)
    # standard = WS(kernel)
    dkernel = weight_standardization_backward(dkernel, cache.standardization)
    return dx, dkernel, dw, db


# ---- root


class RootCache(NamedTuple):
    """What `root_backward` reads."""

    conv: ConvNormCache
    relu: ReLUCache
    pool: MaxPoolCache


@accelerated
def root_forward(images, params, *, groups=32):
    """The first layers: they make a map of a quarter of the height and width.

    Math    y = max_pool(relu(conv_7x7/2(images)))
    Shapes  images (B, H, W, C), params maps ROOT to arrays  ->  y (B, H / 4, W / 4, width), rounded up
    Cache   of each step
    """
    y, conv = conv_norm_forward(images, *_take(params, ROOT), stride=2, groups=groups)
    y, relu = relu_forward(y)
    y, pool = max_pool_forward(y)
    return y, RootCache(conv, relu, pool)


@accelerated
def root_backward(dy, cache, grads, *, need_dimages=False):
    """Backward of `root_forward`: the parameters' gradients are added into ``grads``.

    Math    dy through max_pool, relu, conv
    Shapes  dy (B, H / 4, W / 4, width)  ->  dimages (B, H, W, C), or None unless asked for
    """
    # y = max_pool(relu(conv(images)))
    dy = max_pool_backward(dy, cache.pool)
    dy = relu_backward(dy, cache.relu)
    dimages, *dconv = conv_norm_backward(dy, cache.conv, need_dx=need_dimages)
    _add(grads, ROOT, dconv)
    return dimages


# ---- bottleneck


class BottleneckCache(NamedTuple):
    """What `bottleneck_backward` reads; downsample is None where the shortcut is x."""

    conv1: ConvNormCache
    relu1: ReLUCache
    conv2: ConvNormCache
    relu2: ReLUCache
    conv3: ConvNormCache
    downsample: ConvNormCache | None
    relu3: ReLUCache


@accelerated
def bottleneck_forward(x, params, *, stride=1, groups=32):
    """One residual unit.

    Math    y = relu(shortcut(x) + conv3(relu(conv2(relu(conv1(x))))))
    Shapes  x (B, H, W, I), params maps CONV1, CONV2, CONV3 and, where shapes change, DOWNSAMPLE to arrays
            ->  y (B, ceil(H / stride), ceil(W / stride), O)
    Cache   of each step
    """
    y, conv1 = conv_norm_forward(x, *_take(params, CONV1), groups=groups)
    y, relu1 = relu_forward(y)
    y, conv2 = conv_norm_forward(y, *_take(params, CONV2), stride=stride, groups=groups)
    y, relu2 = relu_forward(y)
    y, conv3 = conv_norm_forward(y, *_take(params, CONV3), groups=groups)
    shortcut, downsample = x, None
    if DOWNSAMPLE[0] in params:
        shortcut, downsample = conv_norm_forward(x, *_take(params, DOWNSAMPLE), stride=stride, groups=groups)
    y, relu3 = relu_forward(shortcut + y)
    return y, BottleneckCache(conv1, relu1, conv2, relu2, conv3, downsample, relu3)


@accelerated
def bottleneck_backward(dy, cache, grads):
    """Backward of `bottleneck_forward`: the parameters' gradients are added into ``grads``.

    Math    ds = dy * [y > 0];  dx = J_shortcut^T @ ds + J_f^T @ ds
    Shapes  dy (B, H', W', O)  ->  dx (B, H, W, I)
    """
    # y = relu(s)
    ds = relu_backward(dy, cache.relu3)
    # s = shortcut(x) + f(x)
    dshortcut = ds
    if cache.downsample is not None:
        dshortcut, *ddownsample = conv_norm_backward(ds, cache.downsample)
        _add(grads, DOWNSAMPLE, ddownsample)
    # f(x) = conv3(relu(conv2(relu(conv1(x)))))
    dx, *dconv3 = conv_norm_backward(ds, cache.conv3)
    _add(grads, CONV3, dconv3)
    dx = relu_backward(dx, cache.relu2)
    dx, *dconv2 = conv_norm_backward(dx, cache.conv2)
    _add(grads, CONV2, dconv2)
    dx = relu_backward(dx, cache.relu1)
    dx, *dconv1 = conv_norm_backward(dx, cache.conv1)
    _add(grads, CONV1, dconv1)
    return dx + dshortcut


# ---- stages, and all of it


@accelerated
def stage_forward(x, params, *, units, stride=1, groups=32):
    """Some residual units, of which the first has the stride.

    Math    y = unit(... unit(x))
    Shapes  x (B, H, W, I), params maps blocks.u.NAME  ->  y (B, ceil(H / stride), ceil(W / stride), O)
    Cache   of each unit, as a tuple
    """
    caches = []
    for u in range(units):
        x, cache = bottleneck_forward(x, _part(params, f"blocks.{u}."), stride=1 if u else stride, groups=groups)
        caches.append(cache)
    return x, tuple(caches)


@accelerated
def stage_backward(dy, cache, grads):
    """Backward of `stage_forward`: the parameters' gradients are added into ``grads``.

    Math    dy through each unit, from the last to the first
    Shapes  dy (B, H', W', O)  ->  dx (B, H, W, I)
    """
    # x = bottleneck(x), for each unit
    for u in reversed(range(len(cache))):
        dy = bottleneck_backward(dy, cache[u], _part(grads, f"blocks.{u}."))
    return dy


class ResNetCache(NamedTuple):
    """What `resnet_backward` reads."""

    root: RootCache
    stages: tuple


def _root_prefix(stages):
    """timm's name of the root has a prefix where stages follow, and none where it stands alone."""
    return "stem." if stages else ""


@accelerated
def resnet_forward(images, params, *, units=(), groups=32):
    """Images to the map that patches are cut from.

    Math    y = stages(root(images)), as many stages as ``units`` has counts
    Shapes  images (B, H, W, C), params maps the names of `convolutions`  ->  y (B, H / stride, W / stride, C'),
            rounded up, with stride and C' of `output_of`
    Cache   of each part
    """
    y, root = root_forward(images, _part(params, _root_prefix(units)), groups=groups)
    stages = []
    for s, count in enumerate(units):
        y, cache = stage_forward(y, _part(params, f"stages.{s}."), units=count, stride=2 if s else 1, groups=groups)
        stages.append(cache)
    return y, ResNetCache(root, tuple(stages))


@accelerated
def resnet_backward(dy, cache, grads, *, need_dimages=False):
    """Backward of `resnet_forward`: the parameters' gradients are added into ``grads``.

    Math    dy through the stages, from the last to the first, and the root
    Shapes  dy (B, H / stride, W / stride, C')  ->  dimages (B, H, W, C), or None unless asked for
    """
    # y = stages(root(images))
    for s in reversed(range(len(cache.stages))):
        dy = stage_backward(dy, cache.stages[s], _part(grads, f"stages.{s}."))
    return root_backward(dy, cache.root, _part(grads, _root_prefix(cache.stages)), need_dimages=need_dimages)
