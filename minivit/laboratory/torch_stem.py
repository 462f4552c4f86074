"""The ResNet of the hybrid models in PyTorch: its convolutions (NCHW, OIHW) behind our layout and TensorFlow's padding.

The modules hold no parameters: they are given ``parameters``, which looks them up by our names, in our shapes. A
module's ``arguments`` are our names of what it reads, see `minivit.laboratory.torch_vit`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from minivit.options.stem.conv2d import same_padding
from minivit.options.stem.resnet import CONV1, CONV2, CONV3, DOWNSAMPLE, ROOT


class Standardize(nn.Module):
    """A kernel (kh, kw, I, O) of mean 0 and variance 1, filter by filter."""

    arguments = ("w",)

    def forward(self, w):
        std, mean = torch.std_mean(w, dim=(0, 1, 2), correction=0)
        return (w - mean) / (std + 1e-5)


def padded(x, kernel, stride, value=0.0):
    """x (B, H, W, C) as (B, C, H', W'), with the border that TensorFlow gives it."""
    sizes = zip(x.shape[2:0:-1], kernel[::-1], strict=True)  # columns first
    border = [n for size, k in sizes for n in same_padding(size, k, stride)]
    return F.pad(x.permute(0, 3, 1, 2), border, value=value)


class Conv2d(nn.Module):
    """A convolution of x (B, H, W, I) with a kernel w (kh, kw, I, O)."""

    arguments = ("x", "w")

    def __init__(self, stride):
        super().__init__()
        self.stride = stride

    def forward(self, x, w):
        y = F.conv2d(padded(x, w.shape[:2], self.stride), w.permute(3, 2, 0, 1), stride=self.stride)
        return y.permute(0, 2, 3, 1)


class GroupNorm(nn.Module):
    """GroupNorm of x (B, H, W, C)."""

    arguments = ("x", "w", "b")

    def __init__(self, groups):
        super().__init__()
        self.groups = groups

    def forward(self, x, w, b):
        return F.group_norm(x.permute(0, 3, 1, 2), self.groups, w, b, 1e-6).permute(0, 2, 3, 1)


class ConvNorm(nn.Module):
    """A convolution with a standardised kernel, and GroupNorm."""

    arguments = ("x", "kernel", "w", "b")

    def __init__(self, groups, stride=1):
        super().__init__()
        self.standardize, self.conv2d, self.norm = Standardize(), Conv2d(stride), GroupNorm(groups)

    def forward(self, x, kernel, w, b):
        return self.norm(self.conv2d(x, self.standardize(kernel)), w, b)


class MaxPool(nn.Module):
    """The largest of 3 x 3 numbers, every second one: x (B, H, W, C) -> (B, H / 2, W / 2, C)."""

    def forward(self, x):
        return F.max_pool2d(padded(x, (3, 3), 2, -torch.inf), 3, 2).permute(0, 2, 3, 1)


class Root(nn.Module):
    """The first convolution, a ReLU and the pooling; ``parameters`` gives parameters by their names."""

    def __init__(self, groups, prefix):
        super().__init__()
        self.names = [prefix + name for name in ROOT]
        self.conv, self.relu, self.max_pool = ConvNorm(groups, 2), nn.ReLU(), MaxPool()

    def forward(self, x, parameters):
        return self.max_pool(self.relu(self.conv(x, *parameters(self.names))))


class Bottleneck(nn.Module):
    """Three convolutions and a shortcut around them."""

    def __init__(self, groups, prefix, stride, first):
        super().__init__()
        self.prefix, self.first = prefix, first
        self.conv1, self.conv2, self.conv3 = ConvNorm(groups), ConvNorm(groups, stride), ConvNorm(groups)
        self.relu1, self.relu2, self.relu3 = nn.ReLU(), nn.ReLU(), nn.ReLU()
        if first:
            self.downsample = ConvNorm(groups, stride)

    def forward(self, x, parameters):
        def conv(module, names, x):
            return module(x, *parameters([self.prefix + name for name in names]))

        y = self.relu1(conv(self.conv1, CONV1, x))
        y = self.relu2(conv(self.conv2, CONV2, y))
        y = conv(self.conv3, CONV3, y)
        if self.first:
            x = conv(self.downsample, DOWNSAMPLE, x)
        return self.relu3(x + y)


class Stage(nn.Module):
    """Bottlenecks in a row; all but the first stage halve the map."""

    def __init__(self, groups, s, units):
        super().__init__()
        places = [f"stages.{s}.blocks.{u}." for u in range(units)]
        self.blocks = nn.ModuleList(
            [Bottleneck(groups, place, 2 if s and not u else 1, u == 0) for u, place in enumerate(places)]
        )

    def forward(self, x, parameters):
        for block in self.blocks:
            x = block(x, parameters)
        return x


class Stem(nn.Module):
    """The ResNet that a hybrid cuts its patches from: images (B, H, W, C) -> a map (B, H', W', C')."""

    def __init__(self, config):
        super().__init__()
        units, groups = config.stem_units, config.stem_groups
        self.root = Root(groups, "stem." if units else "")
        self.stages = nn.ModuleList([Stage(groups, s, count) for s, count in enumerate(units)])

    def forward(self, x, parameters):
        x = self.root(x, parameters)
        for stage in self.stages:
            x = stage(x, parameters)
        return x
