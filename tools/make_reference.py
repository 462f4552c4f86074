"""Write the reference files of the test-suite from PyTorch/timm and JAX/Flax in float64, and from torchvision.

The tests compare minivit with other people's code without installing it: this script runs that code once and
stores what it computed in ``tests/data/NAME.npz``. Run it again only to change or to extend the references.

=====================  ======  =======  ==  ==  ==  =====  ==  ==  ==  ===============================
file                   source  pooling  B   N   D   depth  h   M   K   besides
=====================  ======  =======  ==  ==  ==  =====  ==  ==  ==  ===============================
timm_cls_h3            timm    cls      4   10  12  2      3   20  5   erf GELU
timm_mean_h1           timm    mean     3   16  10  3      1   14  7   erf GELU, label smoothing 0.1
flax_cls_prelogits_h2  Flax    cls      5   17  14  2      2   18  6   tanh GELU, pre-logits layer of 9
flax_mean_h4           Flax    mean     2   9   16  2      4   24  3   tanh GELU, soft targets
timm_hybrid_mean_h2    timm    mean     3   9   6   1      2   8   4   stem "1,1" of width 8, erf GELU
flax_hybrid_cls_h1     Flax    cls      2   5   6   2      1   7   3   stem "2,1" of width 4
=====================  ======  =======  ==  ==  ==  =====  ==  ==  ==  ===============================

The timm models are ``timm.models.vision_transformer.VisionTransformer``. The Flax model is written below from
``flax.linen`` layers in the order of the official JAX ViT (Dosovitskiy et al., arXiv 2010.11929). In both,
the last LayerNorm is applied to all tokens before the pooling, every LayerNorm has eps 1e-6, q, k and v have
biases, and the position embedding covers all tokens, the class token included. Every parameter is random,
also those that training starts from zero, so that each gradient is far from zero (but for the key bias, see
below).

The timm model of the hybrids is that of ``timm.models.vision_transformer_hybrid`` with two numbers of the official
code instead of timm's: eps 1e-6 in GroupNorm, and 1e-5 added to the standard deviation of a kernel, where timm
adds 1e-8 to the variance.

Contents of a file
------------------
``config``
    JSON text, the fields of ``minivit.ViTConfig``.
``settings``
    JSON text: source and versions, label smoothing, the AdamW settings, number of steps, seed.
``images``, ``labels`` or ``targets``
    (B, H, W, C) normalised pixels; (B,) class indices or (B, K) probabilities.
``logits``, ``loss``
    (B, K) and (): the forward pass, and the mean cross-entropy.
``features/block{i}``, ``attn/block{i}``
    (B, N, D) output of block i, and (B, h, N, N) its attention weights.
``param/NAME``, ``grad/NAME``, ``after/NAME``
    The parameters, the gradient of the loss, and the parameters after ten AdamW steps on the same batch.
``losses``
    (10,) the loss before each of the ten steps.

NAME is timm's parameter name, and the arrays have minivit's layout: matrices are (in, out), the rows of
``patch_embed.proj.weight`` run over (patch row, patch column, channel), the columns of ``attn.qkv.weight``
are q, then k, then v, each head-major. AdamW decays the matrices only.

The derivative of the loss by the key part of ``attn.qkv.bias`` is zero: softmax does not see it. The stored
values are rounding errors, and AdamW may make up to 1e-9 of them in ``after``: compare that part with an
absolute tolerance of 1e-8.

Every file is checked before it is written: a NumPy forward pass on the stored arrays gives the same logits,
loss, features and attention to 1e-12, central differences of the library's loss agree with the gradients, and
ten AdamW steps written out in NumPy lead to the same parameters.

The file ``torchvision_operations`` is of another kind: the image operations of AutoAugment on uint8. It holds
``color/before`` (4, 12, 16, 3) and ``grey/before`` (4, 12, 16, 1), ``KIND/after/OPERATION`` (magnitudes, 4, 12, 16, C)
what ``torchvision.transforms.functional`` makes of them, with bilinear interpolation, ``magnitude/OPERATION`` and the
``cifar10`` policy of AutoAugment, as JSON text.

The file ``resize`` holds ``grid/O`` (O, O, 2) and ``KIND/O-N`` (N, N, 2), what SciPy (``align-corners``:
``scipy.ndimage.zoom`` with ``order=1``) or PyTorch (the others: ``torch.nn.functional.interpolate``) makes of it;
``patch/O`` (O, O, 3, 2) and ``pi/O-N`` (N, N, 3, 2): those weights for larger and smaller patches by the
pseudo-inverse of PyTorch's bilinear resizing of all O * O pixels at once, antialiased.

The files ``layout_*`` hold small models as other programs store them: ``weights/KEY`` and ``grads/KEY`` with the
library's own names and shapes, ``images`` (4, H, W, C), ``dlogits`` (4, K), the ``logits``, and the gradients of
sum(dlogits logits), all in float64; ``settings`` names library, arguments and versions.

The file ``outside_pixels`` holds ``image/K`` (H, W, 3) uint8 and ``hf/N/K`` and ``timm/N/K`` (16, 16, 3) uint8, what
the image processors of transformers and the transforms of timm make of them before they rescale and normalise;
``settings`` has their configurations, N after N. The file ``outside_models`` holds ``NAME/weights/KEY`` (float32) of
small models, the JSON files beside them in ``settings``, and ``NAME/logits`` (3, 3) of those images, from the image on;
torchvision's model has the images of 8 x 8 pixels that it was given, ``torchvision/pixels``.

Requirements
------------
::

    pip install numpy scipy torch torchvision timm transformers safetensors "jax[cpu]" flax optax

The files were written with Python 3.11, numpy 2.4.6, torch 2.14.1, timm 1.0.31 and transformers 5.23.0; jax 0.10.2,
flax 0.12.8 and optax 0.2.8 (every file names its own versions in ``settings``). Another version, or another processor,
should change the last digits only.
"""

import argparse
import json
import math
import sys
import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

REQUIREMENTS = 'numpy scipy torch torchvision timm transformers safetensors "jax[cpu]" flax optax'
STEPS = 10
ADAMW = {"lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
REFERENCES = {
    "timm_cls_h3": {
        "config": {
            "image_size": 12,
            "patch_size": 4,
            "channels": 3,
            "num_classes": 5,
            "width": 12,
            "depth": 2,
            "num_heads": 3,
            "mlp_dim": 20,
            "pooling": "cls",
            "pos_embed": "learned",
            "pre_logits": 0,
            "gelu": "erf",
            "layernorm_eps": 1e-6,
        },
        "batch_size": 4,
        "label_smoothing": 0.0,
        "answers": "labels",
        "seed": 11,
    },
    "timm_mean_h1": {
        "config": {
            "image_size": 8,
            "patch_size": 2,
            "channels": 1,
            "num_classes": 7,
            "width": 10,
            "depth": 3,
            "num_heads": 1,
            "mlp_dim": 14,
            "pooling": "mean",
            "pos_embed": "learned",
            "pre_logits": 0,
            "gelu": "erf",
            "layernorm_eps": 1e-6,
        },
        "batch_size": 3,
        "label_smoothing": 0.1,
        "answers": "labels",
        "seed": 12,
    },
    "flax_cls_prelogits_h2": {
        "config": {
            "image_size": 12,
            "patch_size": 3,
            "channels": 3,
            "num_classes": 6,
            "width": 14,
            "depth": 2,
            "num_heads": 2,
            "mlp_dim": 18,
            "pooling": "cls",
            "pos_embed": "learned",
            "pre_logits": 9,
            "gelu": "tanh",
            "layernorm_eps": 1e-6,
        },
        "batch_size": 5,
        "label_smoothing": 0.0,
        "answers": "labels",
        "seed": 13,
    },
    "flax_mean_h4": {
        "config": {
            "image_size": 12,
            "patch_size": 4,
            "channels": 2,
            "num_classes": 3,
            "width": 16,
            "depth": 2,
            "num_heads": 4,
            "mlp_dim": 24,
            "pooling": "mean",
            "pos_embed": "learned",
            "pre_logits": 0,
            "gelu": "tanh",
            "layernorm_eps": 1e-6,
        },
        "batch_size": 2,
        "label_smoothing": 0.0,
        "answers": "targets",
        "seed": 14,
    },
}
REFERENCES |= {
    "timm_hybrid_mean_h2": {
        "config": {
            "image_size": 24,
            "patch_size": 1,
            "channels": 1,
            "num_classes": 4,
            "width": 6,
            "depth": 1,
            "num_heads": 2,
            "mlp_dim": 8,
            "pooling": "mean",
            "pos_embed": "learned",
            "pre_logits": 0,
            "gelu": "erf",
            "layernorm_eps": 1e-6,
            "stem": "1,1",
            "stem_width": 8,
            "stem_groups": 4,
        },
        "batch_size": 3,
        "label_smoothing": 0.0,
        "answers": "labels",
        "seed": 15,
    },
    "flax_hybrid_cls_h1": {
        "config": {
            "image_size": 16,
            "patch_size": 1,
            "channels": 2,
            "num_classes": 3,
            "width": 6,
            "depth": 2,
            "num_heads": 1,
            "mlp_dim": 7,
            "pooling": "cls",
            "pos_embed": "learned",
            "pre_logits": 0,
            "gelu": "tanh",
            "layernorm_eps": 1e-6,
            "stem": "2,1",
            "stem_width": 4,
            "stem_groups": 2,
        },
        "batch_size": 2,
        "label_smoothing": 0.1,
        "answers": "labels",
        "seed": 16,
    },
}


# ------------------------------------------------------------------------------------------------ the inputs


def stem_units(config):
    """Return how many units each stage of the stem has; () without a stem."""
    return tuple(map(int, config["stem"].split(","))) if config.get("stem") else ()


def timm_stem(config):
    """Return what makes timm's model a hybrid: its ResNetV2, with the official numbers; {} without a stem."""
    if not config.get("stem"):
        return {}
    import torch
    from timm.layers import GroupNormAct, HybridEmbed, StdConv2dSame, pad_same
    from timm.models.resnetv2 import ResNetV2

    class OfficialConv(StdConv2dSame):
        def forward(self, x):
            x = pad_same(x, self.kernel_size, self.stride) if self.same_pad else x
            std, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
            weight = (self.weight - mean) / (std + 1e-5)
            return torch.nn.functional.conv2d(x, weight, None, self.stride, self.padding)

    units, width = stem_units(config), config["stem_width"]
    backbone = ResNetV2(
        layers=units,
        channels=[4 * width * 2**s for s in range(len(units))],
        stem_chs=width,
        num_classes=0,
        global_pool="",
        in_chans=config["channels"],
        preact=False,
        stem_type="same",
        conv_layer=OfficialConv,
        norm_layer=partial(GroupNormAct, num_groups=config["stem_groups"], eps=1e-6),
    )
    return {"embed_layer": partial(HybridEmbed, backbone=backbone)}


def stem_convolutions(config):
    """Return [(names of kernel, scale and shift in timm; place in the official tree; kernel's shape; stride)]."""

    def row(prefix, conv, norm, place, shape, stride):
        prefix = "patch_embed.backbone." + prefix
        return [prefix + conv + ".weight", prefix + norm + ".weight", prefix + norm + ".bias"], place, shape, stride

    if not config.get("stem"):
        return []
    W = config["stem_width"]
    rows = [row("stem.", "conv", "norm", (("conv_root",), ("gn_root",)), (7, 7, config["channels"], W), 2)]
    channels = W
    for s, count in enumerate(stem_units(config)):
        narrow = W * 2**s
        for u in range(count):
            prefix, place = f"stages.{s}.blocks.{u}.", (f"block{s + 1}", f"unit{u + 1}")
            stride = 2 if s and not u else 1
            layers = [("conv1", "norm1", "1", (1, 1, channels, narrow), 1)]
            layers += [("conv2", "norm2", "2", (3, 3, narrow, narrow), stride)]
            layers += [("conv3", "norm3", "3", (1, 1, narrow, 4 * narrow), 1)]
            if not u:
                layers += [("downsample.conv", "downsample.norm", "_proj", (1, 1, channels, 4 * narrow), stride)]
            for conv, norm, key, shape, step in layers:
                rows.append(row(prefix, conv, norm, ((*place, "conv" + key), (*place, "gn" + key)), shape, step))
            channels = 4 * narrow
    return rows


def patch_sizes(config):
    """Return how many patches are in a row, and how many channels they have."""
    units = stem_units(config)
    stride, channels = (2 ** (len(units) + 1), config["stem_width"] * 2 ** (len(units) + 1)) if units else (1, 0)
    return config["image_size"] // stride // config["patch_size"], channels or config["channels"]


def parameter_shapes(config):
    """Return the shape of every parameter, in minivit's layout, by timm's name."""
    D, M, K = config["width"], config["mlp_dim"], config["num_classes"]
    P, R = config["patch_size"], config["pre_logits"]
    rows, channels = patch_sizes(config)
    num_tokens = rows**2 + (config["pooling"] == "cls")
    shapes = {"patch_embed.proj.weight": (P * P * channels, D), "patch_embed.proj.bias": (D,)}
    for names, _, kernel, _ in stem_convolutions(config):
        shapes |= dict(zip(names, (kernel, kernel[3:], kernel[3:]), strict=True))
    if config["pooling"] == "cls":
        shapes["cls_token"] = (1, 1, D)
    shapes["pos_embed"] = (1, num_tokens, D)
    for i in range(config["depth"]):
        block = f"blocks.{i}."
        shapes |= {block + "norm1.weight": (D,), block + "norm1.bias": (D,)}
        shapes |= {block + "attn.qkv.weight": (D, 3 * D), block + "attn.qkv.bias": (3 * D,)}
        shapes |= {block + "attn.proj.weight": (D, D), block + "attn.proj.bias": (D,)}
        shapes |= {block + "norm2.weight": (D,), block + "norm2.bias": (D,)}
        shapes |= {block + "mlp.fc1.weight": (D, M), block + "mlp.fc1.bias": (M,)}
        shapes |= {block + "mlp.fc2.weight": (M, D), block + "mlp.fc2.bias": (D,)}
    shapes |= {"norm.weight": (D,), "norm.bias": (D,)}
    if R:
        shapes |= {"pre_logits.weight": (D, R), "pre_logits.bias": (R,)}
    return shapes | {"head.weight": (R or D, K), "head.bias": (K,)}


def draw_parameters(config, rng):
    """Draw all parameters far from zero: attention is peaked, and no gradient vanishes."""
    params = {}
    for name, shape in parameter_shapes(config).items():
        noise = rng.standard_normal(shape)
        if len(shape) in (2, 4):  # matrices and kernels: a unit-variance input gives a standard deviation of 1.2
            params[name] = 1.2 / math.sqrt(math.prod(shape[:-1])) * noise
        elif "norm" in name and name.endswith("weight"):
            params[name] = 1.0 + 0.1 * noise
        else:
            params[name] = 0.3 * noise
    return params


def draw_batch(config, batch_size, kind, rng):
    """Draw normalised images, and class indices (``kind="labels"``) or probabilities (``kind="targets"``)."""
    size, K = config["image_size"], config["num_classes"]
    images = rng.standard_normal((batch_size, size, size, config["channels"]))
    if kind == "labels":
        return images, rng.integers(0, K, size=batch_size)
    return images, rng.dirichlet(np.ones(K), size=batch_size)


def is_decayed(name):
    """Tell whether AdamW decays a parameter (timm's name): the matrices, not the other parameters."""
    return name.endswith(".weight") and "norm" not in name


# -------------------------------------------------------------------------------------------- PyTorch / timm


class TimmReference:
    """The model, its loss, gradients and training by PyTorch and timm, in minivit's layout at the border.

    Parameters
    ----------
    config : dict
        minivit's configuration.
    images : ndarray (B, H, W, C)
    answers : ndarray (B,) or (B, K)
        Class indices or probabilities.
    label_smoothing : float
    """

    packages = ("torch", "timm")

    def __init__(self, config, images, answers, label_smoothing):
        import torch
        from timm.models.vision_transformer import VisionTransformer

        self.torch, self.config = torch, config
        self.model = VisionTransformer(
            **timm_stem(config),
            img_size=config["image_size"],
            patch_size=config["patch_size"],
            in_chans=config["channels"],
            num_classes=config["num_classes"],
            global_pool={"cls": "token", "mean": "avg"}[config["pooling"]],
            class_token=config["pooling"] == "cls",
            fc_norm=False,  # the last LayerNorm before the pooling
            embed_dim=config["width"],
            depth=config["depth"],
            num_heads=config["num_heads"],
            mlp_ratio=config["mlp_dim"] / config["width"],
        ).double()
        for block in self.model.blocks:
            block.attn.fused_attn = False  # the written-out attention, whose weights a hook can see
        self.images = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        self.answers = torch.from_numpy(answers)
        self.label_smoothing = label_smoothing

    def load(self, params):
        """Copy minivit's arrays into the model."""
        P, C, D = self.config["patch_size"], patch_sizes(self.config)[1], self.config["width"]
        state = {name: array.T if array.ndim == 2 else array for name, array in params.items()}
        state |= {name: array.transpose(3, 2, 0, 1) for name, array in params.items() if array.ndim == 4}
        kernel = params["patch_embed.proj.weight"].reshape(P, P, C, D)
        state["patch_embed.proj.weight"] = kernel.transpose(3, 2, 0, 1)  # (D, C, P, P)
        state = {name: self.torch.from_numpy(array.copy()) for name, array in state.items()}
        self.model.load_state_dict(state, strict=True)

    def export(self, tensors):
        """Return tensors in the model's layout as minivit's arrays."""
        arrays = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
        kernel = arrays["patch_embed.proj.weight"].transpose(2, 3, 1, 0)  # (P, P, C, D)
        arrays |= {name: array.transpose(2, 3, 1, 0) for name, array in arrays.items() if array.ndim == 4}
        arrays = {name: array.T if array.ndim == 2 else array for name, array in arrays.items()}
        arrays["patch_embed.proj.weight"] = kernel.reshape(-1, self.config["width"])
        return {name: array.copy() for name, array in arrays.items()}

    def current_loss(self):
        """Return the loss of the parameters that the model holds, with its graph."""
        logits = self.model(self.images)
        cross_entropy = self.torch.nn.functional.cross_entropy
        return cross_entropy(logits, self.answers, label_smoothing=self.label_smoothing)

    def loss(self, params):
        """Return the loss."""
        self.load(params)
        with self.torch.no_grad():
            return self.current_loss().item()

    def loss_and_grads(self, params):
        """Return the loss and its gradient by every parameter."""
        self.load(params)
        self.model.zero_grad()
        loss = self.current_loss()
        loss.backward()
        return loss.item(), self.export({name: p.grad for name, p in self.model.named_parameters()})

    def forward(self, params):
        """Return the logits, and lists of the blocks' outputs and attention weights."""
        self.load(params)
        features, attn, hooks = [], [], []

        def keep_in(values):
            return lambda module, inputs, output: values.append(output.numpy().copy())

        for block in self.model.blocks:
            hooks.append(block.register_forward_hook(keep_in(features)))
            hooks.append(block.attn.attn_drop.register_forward_hook(keep_in(attn)))  # dropout of rate 0
        with self.torch.no_grad():
            logits = self.model(self.images).numpy()
        for hook in hooks:
            hook.remove()
        return logits, features, attn

    def train(self, params):
        """Take the AdamW steps; return the loss before each, and the parameters after the last."""
        self.load(params)
        decayed = [p for name, p in self.model.named_parameters() if is_decayed(name)]
        others = [p for name, p in self.model.named_parameters() if not is_decayed(name)]
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        optimizer = self.torch.optim.AdamW(groups, **ADAMW)
        losses = []
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = self.current_loss()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, self.export(dict(self.model.named_parameters()))


# ------------------------------------------------------------------------------------------------ JAX / Flax


def make_flax_model(config, dtype="float64"):
    """Return a Flax module with the layers, the order and the parameter names of the official JAX ViT.

    Its call gives the logits and the list of the blocks' outputs; the attention weights are "intermediates".
    """
    import flax.linen as nn
    import jax.numpy as jnp

    dtypes = {"dtype": dtype, "param_dtype": dtype}
    zeros = nn.initializers.zeros

    def layernorm(name):
        return nn.LayerNorm(epsilon=config["layernorm_eps"], name=name, **dtypes)

    def dense(features, name):
        return nn.Dense(features, name=name, **dtypes)

    class MlpBlock(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.gelu(dense(config["mlp_dim"], "Dense_0")(x))  # tanh GELU
            return dense(config["width"], "Dense_1")(y)

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = layernorm("LayerNorm_0")(x)
            attention = nn.MultiHeadDotProductAttention(
                num_heads=config["num_heads"], deterministic=True, name="MultiHeadDotProductAttention_0", **dtypes
            )
            x = x + attention(y, y, sow_weights=True)
            return x + MlpBlock(name="MlpBlock_0")(layernorm("LayerNorm_1")(x))

    class AddPositions(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x + self.param("pos_embedding", zeros, (1, *x.shape[1:]), dtype)

    class Encoder(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = AddPositions(name="posembed_input")(x)
            features = []
            for i in range(config["depth"]):
                x = Block(name=f"encoderblock_{i}")(x)
                features.append(x)
            return layernorm("encoder_norm")(x), features

    def groupnorm(name):
        return nn.GroupNorm(config["stem_groups"], name=name, **dtypes)  # eps 1e-6

    class StandardizedConv(nn.Conv):
        def param(self, name, *arguments):
            w = super().param(name, *arguments)
            return (w - w.mean(axis=(0, 1, 2))) / (w.std(axis=(0, 1, 2)) + 1e-5)

    def conv(features, kernel, stride, name):  # padding is SAME
        return StandardizedConv(features, (kernel, kernel), (stride, stride), use_bias=False, name=name, **dtypes)

    class Unit(nn.Module):
        features: int
        stride: int

        @nn.compact
        def __call__(self, x):
            shortcut = x
            if x.shape[-1] != 4 * self.features or self.stride != 1:
                shortcut = groupnorm("gn_proj")(conv(4 * self.features, 1, self.stride, "conv_proj")(x))
            x = nn.relu(groupnorm("gn1")(conv(self.features, 1, 1, "conv1")(x)))
            x = nn.relu(groupnorm("gn2")(conv(self.features, 3, self.stride, "conv2")(x)))
            x = groupnorm("gn3")(conv(4 * self.features, 1, 1, "conv3")(x))
            return nn.relu(shortcut + x)

    class Stage(nn.Module):
        units: int
        features: int
        stride: int

        @nn.compact
        def __call__(self, x):
            for u in range(self.units):
                x = Unit(self.features, 1 if u else self.stride, name=f"unit{u + 1}")(x)
            return x

    class VisionTransformer(nn.Module):
        @nn.compact
        def __call__(self, images):
            if config.get("stem"):
                width = config["stem_width"]
                images = nn.relu(groupnorm("gn_root")(conv(width, 7, 2, "conv_root")(images)))
                images = nn.max_pool(images, (3, 3), (2, 2), "SAME")
                for s, units in enumerate(stem_units(config)):
                    images = Stage(units, width * 2**s, 2 if s else 1, name=f"block{s + 1}")(images)
            D, patch = config["width"], (config["patch_size"], config["patch_size"])
            x = nn.Conv(D, patch, patch, padding="VALID", name="embedding", **dtypes)(images)
            x = x.reshape(x.shape[0], -1, D)
            if config["pooling"] == "cls":
                cls = self.param("cls", zeros, (1, 1, D), dtype)
                x = jnp.concatenate([jnp.tile(cls, (x.shape[0], 1, 1)), x], axis=1)
            x, features = Encoder(name="Transformer")(x)
            x = x[:, 0] if config["pooling"] == "cls" else x.mean(axis=1)
            if config["pre_logits"]:
                x = nn.tanh(dense(config["pre_logits"], "pre_logits")(x))
            return dense(config["num_classes"], "head")(x), features

    return VisionTransformer()


class FlaxReference:
    """The model, its loss, gradients and training by JAX, Flax and Optax, in minivit's layout at the border.

    Takes the same arguments and has the same methods as `TimmReference`.
    """

    packages = ("jax", "flax", "optax")

    def __init__(self, config, images, answers, label_smoothing):
        import jax

        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_enable_x64", True)
        import optax

        self.jax, self.optax, self.config = jax, optax, config
        self.model = make_flax_model(config)
        self.images = images
        if answers.ndim == 1:
            answers = jax.nn.one_hot(answers, config["num_classes"], dtype="float64")
        targets = optax.smooth_labels(answers, label_smoothing)

        def loss(tree):
            logits, _ = self.model.apply({"params": tree}, images)
            return optax.softmax_cross_entropy(logits, targets).mean()

        self.tree_loss, self.tree_loss_and_grad = jax.jit(loss), jax.jit(jax.value_and_grad(loss))

    def load(self, params):
        """Return minivit's arrays as the tree of the Flax module."""
        P, D, h = (self.config[key] for key in ("patch_size", "width", "num_heads"))
        C = patch_sizes(self.config)[1]

        def norm(name):
            return {"scale": params[name + ".weight"], "bias": params[name + ".bias"]}

        def dense(name):
            return {"kernel": params[name + ".weight"], "bias": params[name + ".bias"]}

        kernel = params["patch_embed.proj.weight"].reshape(P, P, C, D)
        tree = {"embedding": {"kernel": kernel, "bias": params["patch_embed.proj.bias"]}}
        encoder = {"posembed_input": {"pos_embedding": params["pos_embed"]}, "encoder_norm": norm("norm")}
        tree |= {"Transformer": encoder, "head": dense("head")}
        if self.config["pooling"] == "cls":
            tree["cls"] = params["cls_token"]
        for (kernel, scale, shift), places, _, _ in stem_convolutions(self.config):
            leaves = {"kernel": params[kernel]}, {"scale": params[scale], "bias": params[shift]}
            for place, leaf in zip(places, leaves, strict=True):
                node = tree
                for part in place[:-1]:
                    node = node.setdefault(part, {})
                node[place[-1]] = leaf
        if self.config["pre_logits"]:
            tree["pre_logits"] = dense("pre_logits")
        for i in range(self.config["depth"]):
            block = f"blocks.{i}."
            attention = {}
            weights = np.split(params[block + "attn.qkv.weight"], 3, axis=1)
            biases = np.split(params[block + "attn.qkv.bias"], 3)
            for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
                attention[part] = {"kernel": weight.reshape(D, h, D // h), "bias": bias.reshape(h, D // h)}
            out = params[block + "attn.proj.weight"].reshape(h, D // h, D)
            attention["out"] = {"kernel": out, "bias": params[block + "attn.proj.bias"]}
            encoder[f"encoderblock_{i}"] = {
                "LayerNorm_0": norm(block + "norm1"),
                "MultiHeadDotProductAttention_0": attention,
                "LayerNorm_1": norm(block + "norm2"),
                "MlpBlock_0": {"Dense_0": dense(block + "mlp.fc1"), "Dense_1": dense(block + "mlp.fc2")},
            }
        return tree

    def export(self, tree):
        """Return a tree of the Flax module, parameters or gradients, as minivit's arrays."""
        D = self.config["width"]
        tree = self.jax.tree_util.tree_map(np.asarray, tree)
        arrays = {}

        def layer(name, leaves):
            arrays[name + ".weight"] = leaves["scale" if "scale" in leaves else "kernel"]
            arrays[name + ".bias"] = leaves["bias"]

        layer("patch_embed.proj", tree["embedding"])
        encoder = tree["Transformer"]
        layer("norm", encoder["encoder_norm"])
        layer("head", tree["head"])
        arrays["pos_embed"] = encoder["posembed_input"]["pos_embedding"]
        if "cls" in tree:
            arrays["cls_token"] = tree["cls"]
        if "pre_logits" in tree:
            layer("pre_logits", tree["pre_logits"])
        for names, places, _, _ in stem_convolutions(self.config):
            nodes = []
            for place in places:
                node = tree
                for part in place:
                    node = node[part]
                nodes.append(node)
            leaves = nodes[0]["kernel"], nodes[1]["scale"], nodes[1]["bias"]
            arrays |= dict(zip(names, leaves, strict=True))
        for i in range(self.config["depth"]):
            name, block = f"blocks.{i}.", encoder[f"encoderblock_{i}"]
            attention, mlp = block["MultiHeadDotProductAttention_0"], block["MlpBlock_0"]
            parts = [attention[part] for part in ("query", "key", "value")]
            arrays[name + "attn.qkv.weight"] = np.hstack([part["kernel"].reshape(D, D) for part in parts])
            arrays[name + "attn.qkv.bias"] = np.hstack([part["bias"].reshape(D) for part in parts])
            layer(name + "attn.proj", attention["out"])
            layer(name + "norm1", block["LayerNorm_0"])
            layer(name + "norm2", block["LayerNorm_1"])
            layer(name + "mlp.fc1", mlp["Dense_0"])
            layer(name + "mlp.fc2", mlp["Dense_1"])
        # the embedding's (P, P, C, D) and the attention output's (h, Dh, D) kernels become matrices
        shapes = parameter_shapes(self.config)
        return {name: arrays[name].reshape(shape) for name, shape in shapes.items()}

    def loss(self, params):
        """Return the loss."""
        return float(self.tree_loss(self.load(params)))

    def loss_and_grads(self, params):
        """Return the loss and its gradient by every parameter."""
        loss, grads = self.tree_loss_and_grad(self.load(params))
        return float(loss), self.export(grads)

    def forward(self, params):
        """Return the logits, and lists of the blocks' outputs and attention weights."""
        variables = {"params": self.load(params)}
        (logits, features), state = self.model.apply(variables, self.images, mutable=["intermediates"])
        inside = state["intermediates"]["Transformer"]
        blocks = [inside[f"encoderblock_{i}"] for i in range(self.config["depth"])]
        attn = [np.asarray(block["MultiHeadDotProductAttention_0"]["attention_weights"][0]) for block in blocks]
        return np.asarray(logits), [np.asarray(x) for x in features], attn

    def train(self, params):
        """Take the AdamW steps; return the loss before each, and the parameters after the last."""
        tree = self.load(params)
        mask = self.jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", tree)
        lr, (b1, b2), eps, weight_decay = ADAMW.values()
        optimizer = self.optax.adamw(lr, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=mask)
        state, losses = optimizer.init(tree), []
        for _ in range(STEPS):
            loss, grads = self.tree_loss_and_grad(tree)
            updates, state = optimizer.update(grads, state, tree)
            tree = self.optax.apply_updates(tree, updates)
            losses.append(float(loss))
        return losses, self.export(tree)


# ------------------------------------------------------------------------------------------ the cross-checks


def numpy_stem(config, params, images):
    """Return the stem's map, window by window."""

    def windows(x, size, stride, value):
        pads, counts = [], []
        for n in x.shape[1:3]:
            counts.append(-(-n // stride))
            total = max((counts[-1] - 1) * stride + size - n, 0)
            pads.append((total // 2, total - total // 2))
        x = np.pad(x, [(0, 0), *pads, (0, 0)], constant_values=value)
        starts = [
            [x[:, r * stride :, c * stride :][:, :size, :size] for c in range(counts[1])] for r in range(counts[0])
        ]
        return np.array(starts).transpose(2, 0, 1, 3, 4, 5)  # (B, rows, columns, size, size, C)

    def conv(x, row):
        (kernel, scale, shift), _, shape, stride = row
        w = params[kernel]
        w = (w - w.mean(axis=(0, 1, 2))) / (w.std(axis=(0, 1, 2)) + 1e-5)
        y = np.einsum("brcijk,ijko->brco", windows(x, shape[0], stride, 0.0), w)
        groups = y.reshape(*y.shape[:3], config["stem_groups"], -1)
        centred = groups - groups.mean(axis=(1, 2, 4), keepdims=True)
        std = np.sqrt((centred**2).mean(axis=(1, 2, 4), keepdims=True) + 1e-6)
        return (centred / std).reshape(y.shape) * params[scale] + params[shift]

    rows = iter(stem_convolutions(config))
    x = windows(np.maximum(conv(images, next(rows)), 0), 3, 2, -np.inf).max(axis=(3, 4))
    for count in stem_units(config):
        for u in range(count):
            y = np.maximum(conv(x, next(rows)), 0)
            y = np.maximum(conv(y, next(rows)), 0)
            y = conv(y, next(rows))
            x = np.maximum(y + (x if u else conv(x, next(rows))), 0)
    return x


def numpy_forward(config, params, images):
    """Return logits, block outputs and attention weights from minivit's arrays, in a few lines of NumPy."""
    P, D, h = (config[key] for key in ("patch_size", "width", "num_heads"))
    B, (rows, C) = len(images), patch_sizes(config)
    if config.get("stem"):
        images = numpy_stem(config, params, images)

    def linear(x, name):
        return x @ params[name + ".weight"] + params[name + ".bias"]

    def layernorm(x, name):
        centred = x - x.mean(axis=-1, keepdims=True)
        std = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + config["layernorm_eps"])
        return centred / std * params[name + ".weight"] + params[name + ".bias"]

    def gelu(x):
        if config["gelu"] == "erf":
            return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
        return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2

    patches = images.reshape(B, rows, P, rows, P, C).swapaxes(2, 3)  # (B, rows, rows, P, P, C)
    x = linear(patches.reshape(B, rows * rows, P * P * C), "patch_embed.proj")
    if config["pooling"] == "cls":
        x = np.concatenate([np.repeat(params["cls_token"], B, axis=0), x], axis=1)
    x = x + params["pos_embed"]
    features, attn = [], []
    for i in range(config["depth"]):
        block = f"blocks.{i}."
        q, k, v = np.split(linear(layernorm(x, block + "norm1"), block + "attn.qkv"), 3, axis=-1)
        q, k, v = (a.reshape(B, -1, h, D // h).swapaxes(1, 2) for a in (q, k, v))  # (B, h, N, Dh)
        scores = np.exp(q @ k.swapaxes(2, 3) / math.sqrt(D // h))
        attn.append(scores / scores.sum(axis=-1, keepdims=True))
        heads = (attn[-1] @ v).swapaxes(1, 2).reshape(x.shape)
        x = x + linear(heads, block + "attn.proj")
        x = x + linear(gelu(linear(layernorm(x, block + "norm2"), block + "mlp.fc1")), block + "mlp.fc2")
        features.append(x)
    x = layernorm(x, "norm")
    x = x[:, 0] if config["pooling"] == "cls" else x.mean(axis=1)
    if config["pre_logits"]:
        x = np.tanh(linear(x, "pre_logits"))
    return linear(x, "head"), features, attn


def numpy_loss(logits, answers, label_smoothing):
    """Return the mean cross-entropy of class indices or probabilities."""
    K = logits.shape[1]
    targets = np.eye(K)[answers] if answers.ndim == 1 else answers
    targets = (1 - label_smoothing) * targets + label_smoothing / K
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return -(targets * log_probs).sum(axis=1).mean()


def difference(a, b):
    """Return the largest absolute difference of two arrays of the same shape."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape, f"shapes {a.shape} and {b.shape}"
    return np.abs(a - b).max()


def check_forward(arrays):
    """Read a file's arrays back as a test would and compare with NumPy; return the largest difference."""
    config, settings = json.loads(str(arrays["config"])), json.loads(str(arrays["settings"]))
    params = {name.removeprefix("param/"): a for name, a in arrays.items() if name.startswith("param/")}
    answers = arrays["labels"] if "labels" in arrays else arrays["targets"]
    logits, features, attn = numpy_forward(config, params, arrays["images"])
    differences = [
        difference(logits, arrays["logits"]),
        difference(numpy_loss(logits, answers, settings["label_smoothing"]), arrays["loss"]),
        difference(arrays["losses"][0], arrays["loss"]),
    ]
    for i in range(config["depth"]):
        differences.append(difference(features[i], arrays[f"features/block{i}"]))
        differences.append(difference(attn[i], arrays[f"attn/block{i}"]))
        uniform = 1 / attn[i].shape[-1]
        assert np.abs(attn[i] - uniform).mean() > 0.3 * uniform, f"block {i}: attention is nearly uniform"
    assert max(differences) < 1e-12, f"NumPy's forward pass differs by {max(differences):.1e}"
    return max(differences)


def check_gradients(reference, params, grads, rng, entries=3, step=1e-5):
    """Compare some entries of every gradient with central differences of the library's loss.

    Returns
    -------
    float
        The largest ``|a - n| / (1e-3 + |a|)`` of the analytic a and the numeric n.
    """
    worst = 0.0
    for name, grad in grads.items():
        parts = {name: grad}
        if "qkv" in name:
            parts = dict(zip(("query", "key", "value"), np.split(grad, 3, axis=-1), strict=True))
        for part, values in parts.items():
            norm = np.linalg.norm(values)
            if part == "key" and name.endswith("bias"):
                assert norm < 1e-14, f"{name}, {part}: the gradient should be zero, its norm is {norm:.1e}"
            else:
                assert norm > 1e-4, f"{name}, {part}: the gradient has a norm of only {norm:.1e}"
        for flat in rng.choice(grad.size, size=min(entries, grad.size), replace=False):
            index = np.unravel_index(flat, grad.shape)
            sides = []
            for sign in (+1, -1):
                moved = params | {name: params[name].copy()}
                moved[name][index] += sign * step
                sides.append(reference.loss(moved))
            numeric = (sides[0] - sides[1]) / (2 * step)
            error = abs(grad[index] - numeric) / (1e-3 + abs(grad[index]))
            assert error < 1e-6, f"{name}, entry {flat}: gradient {grad[index]}, by differences {numeric}"
            worst = max(worst, error)
    return worst


def check_training(reference, params, losses, after):
    """Take the AdamW steps in NumPy with the library's gradients; return the largest difference."""
    lr, (b1, b2), eps, weight_decay = ADAMW.values()
    params = dict(params)
    m = {name: np.zeros_like(array) for name, array in params.items()}
    v = {name: np.zeros_like(array) for name, array in params.items()}
    worst = 0.0
    for t in range(1, STEPS + 1):
        loss, grads = reference.loss_and_grads(params)
        worst = max(worst, abs(loss - losses[t - 1]))
        for name, g in grads.items():
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g**2
            update = m[name] / (1 - b1**t) / (np.sqrt(v[name] / (1 - b2**t)) + eps)
            if is_decayed(name):
                update = update + weight_decay * params[name]
            params[name] = params[name] - lr * update
    for name, array in params.items():
        ours, theirs = array, after[name]
        if name.endswith("qkv.bias"):  # the middle third, the key's, holds amplified rounding errors
            (q, k, v), (q_after, k_after, v_after) = np.split(ours, 3), np.split(theirs, 3)
            assert difference(k, k_after) < 1e-8, f"{name}: the key part moved"
            ours, theirs = np.append(q, v), np.append(q_after, v_after)
        worst = max(worst, difference(ours, theirs))
    assert worst < 1e-10, f"NumPy's AdamW differs by {worst:.1e}"
    return worst


# --------------------------------------------------------------------------------------- image operations

OPERATIONS_FILE = "torchvision_operations"
RESIZE_FILE = "resize"
MAGNITUDES = {
    "identity": [0],
    "shear_x": [-0.7, 0.05, 0.99],
    "shear_y": [-0.99, 0.3, 0.5],
    "translate_x": [-30.0, -3.9, 5.2],
    "translate_y": [-4.0, 1.9, 30.0],
    "rotate": [-135.0, -4.5, 45.0, 90.0],
    "brightness": [-0.99, -0.33, 0.66],
    "color": [-0.99, -0.33, 0.66],
    "contrast": [-0.99, -0.33, 0.66],
    "sharpness": [-0.99, -0.33, 0.66],
    "posterize": [2, 5, 8],
    "solarize": [0.0, 93.5, 255.0],
    "invert": [0],
    "autocontrast": [0],
    "equalize": [0],
}


def image_operations():
    """What torchvision makes of a few images, as AutoAugment applies its operations."""
    import torch
    from torchvision.transforms import AutoAugmentPolicy, InterpolationMode
    from torchvision.transforms import autoaugment as policies

    rng = np.random.default_rng(21)
    y, x = np.arange(12)[:, None, None], np.arange(16)[:, None]
    noise = rng.integers(0, 256, (12, 16, 3))
    ramp = 9 * x + 7 * y + np.array([0, 20, 60])
    narrow = 100 + rng.integers(0, [40, 3, 1], (12, 16, 3))  # the last channel is of one value
    disc = np.where((x - 7) ** 2 + (y - 5) ** 2 < 20, [250, 130, 10], [5, 90, 200])
    color = np.stack([noise, ramp, narrow, disc]).astype(np.uint8)
    arrays = {"color/before": color, "grey/before": np.ascontiguousarray(color[..., :1])}
    for name, magnitudes in MAGNITUDES.items():
        arrays[f"magnitude/{name}"] = np.array(magnitudes, np.float64)
        title = {"autocontrast": "AutoContrast"}.get(name, name.title().replace("_", ""))
        for kind in ("color", "grey"):
            before = torch.from_numpy(arrays[f"{kind}/before"]).permute(0, 3, 1, 2)
            after = [
                policies._apply_op(before, title, m, interpolation=InterpolationMode.BILINEAR, fill=None)
                for m in magnitudes
            ]
            arrays[f"{kind}/after/{name}"] = torch.stack(after).permute(0, 1, 3, 4, 2).numpy()
    policy = policies.AutoAugment(AutoAugmentPolicy.CIFAR10).policies
    arrays["cifar10"] = np.array(json.dumps(policy))
    versions = {package: version(package) for package in ("torch", "torchvision", "numpy")}
    arrays["settings"] = np.array(json.dumps({"versions": versions}))
    return arrays


def resizing():
    """Grids and patch embeddings resized by SciPy and PyTorch, in float64: a dict of arrays."""
    import scipy.ndimage
    import torch
    from torch.nn.functional import interpolate

    def resized(grid, size, kind):  # (O, O, ...) -> (size, size, ...)
        planes = torch.from_numpy(grid.reshape(*grid.shape[:2], -1)).permute(2, 0, 1)[None]
        mode, *antialias = kind.split("-")
        planes = interpolate(planes, size=(size, size), mode=mode, align_corners=False, antialias=bool(antialias))
        return planes[0].permute(1, 2, 0).numpy().reshape(size, size, *grid.shape[2:])

    rng, arrays = np.random.default_rng(12), {}
    for old, sizes in {1: (3,), 2: (3, 5), 3: (2, 3, 7), 8: (1, 3, 4, 12), 14: (5, 24)}.items():
        arrays[f"grid/{old}"] = grid = rng.standard_normal((old, old, 2))
        for new in sizes:
            arrays[f"align-corners/{old}-{new}"] = scipy.ndimage.zoom(grid, (new / old, new / old, 1), order=1)
            for kind in ("bilinear", "bilinear-antialias", "bicubic", "bicubic-antialias"):
                arrays[f"{kind}/{old}-{new}"] = resized(grid, new, kind)
    for old, sizes in {4: (2, 3, 6, 8), 5: (7,)}.items():
        arrays[f"patch/{old}"] = weights = rng.standard_normal((old, old, 3, 2))
        for new in sizes:
            one_pixel = np.eye(old * old).reshape(old, old, -1)
            B = resized(one_pixel, new, "bilinear-antialias").reshape(new * new, -1)  # what becomes of each pixel
            inverse = torch.linalg.pinv(torch.from_numpy(B).T)
            resampled = inverse @ torch.from_numpy(weights.reshape(old * old, -1))
            arrays[f"pi/{old}-{new}"] = resampled.numpy().reshape(new, new, 3, 2)
    versions = {package: version(package) for package in ("torch", "scipy", "numpy")}
    arrays["settings"] = np.array(json.dumps({"versions": versions}))
    return arrays


# --------------------------------------------------------------------------------- models as others store them

SMALL = {"image_size": 6, "patch_size": 2, "num_classes": 5, "width": 8, "depth": 2, "num_heads": 2, "mlp_dim": 11}
TIMM_SMALL = {"img_size": 6, "patch_size": 2, "num_classes": 5, "embed_dim": 8, "depth": 2, "num_heads": 2}
LAYOUTS = {
    "layout_official": (
        "flax",
        SMALL | {"channels": 3, "pooling": "cls", "pre_logits": 7, "layernorm_eps": 1e-6},
    ),
    "layout_timm_registers": (
        "timm",
        TIMM_SMALL | {"mlp_ratio": 1.5, "reg_tokens": 2, "qk_norm": True, "init_values": 0.1},
    ),
    "layout_timm_average": ("timm", TIMM_SMALL | {"mlp_ratio": 1.5, "global_pool": "avg", "in_chans": 1}),
    "layout_timm_deit3": ("timm", TIMM_SMALL | {"mlp_ratio": 1.5, "no_embed_class": True, "init_values": 1e-6}),
    "layout_hf": (
        "transformers",
        {"image_size": 6, "patch_size": 2, "num_labels": 5, "hidden_size": 8, "num_hidden_layers": 2}
        | {"num_attention_heads": 2, "intermediate_size": 11},
    ),
    "layout_official_hybrid": (
        "flax",
        SMALL
        | {"image_size": 16, "patch_size": 1, "channels": 3, "pooling": "cls", "pre_logits": 0}
        | {"layernorm_eps": 1e-6, "stem": "2,1", "stem_width": 4, "stem_groups": 2},
    ),
}


def draw_like(key, array, rng):
    """Draw a parameter of another program: far from zero, the scales of LayerNorm around one."""
    scale = key.endswith("scale") or ("norm" in key and key.endswith("weight"))
    return scale + (0.1 if scale else 0.5) * rng.standard_normal(array.shape)


def flax_layout(config, images, dlogits, rng):
    """Return weights, gradients and logits of the official model."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    from flax.traverse_util import flatten_dict, unflatten_dict

    model = make_flax_model(config)
    shapes = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), images)["params"], sep="/")
    weights = {key: draw_like(key, shape, rng) for key, shape in shapes.items()}
    tree = unflatten_dict(weights, sep="/")
    grads = jax.grad(lambda tree: (model.apply({"params": tree}, images)[0] * dlogits).sum())(tree)
    logits = model.apply({"params": tree}, images)[0]
    return weights, {key: np.asarray(g) for key, g in flatten_dict(grads, sep="/").items()}, np.asarray(logits)


def torch_layout(library, arguments, images, dlogits, rng):
    """Return weights, gradients and logits of a model of timm or transformers, under the names of its files."""
    import torch
    from safetensors.numpy import load_file

    if library == "timm":
        from timm.models import VisionTransformer

        model = VisionTransformer(**arguments).double()
    else:
        from transformers import ViTConfig, ViTForImageClassification

        model = ViTForImageClassification(ViTConfig(**arguments)).double()

    def stored():
        if library == "timm":
            return {key: tensor.numpy().copy() for key, tensor in model.state_dict().items()}
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            return load_file(Path(folder) / "model.safetensors")

    model.load_state_dict({k: torch.from_numpy(draw_like(k, a, rng)) for k, a in model.state_dict().items()})
    weights = stored()
    logits = model.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    logits = logits if library == "timm" else logits.logits
    (logits * torch.from_numpy(dlogits)).sum().backward()
    with torch.no_grad():
        model.load_state_dict({key: parameter.grad for key, parameter in model.named_parameters()})
    return weights, stored(), logits.detach().numpy()


def make_layout(name):
    """Compute one of the files ``layout_*``."""
    library, arguments = LAYOUTS[name]
    rng = np.random.default_rng(31 + list(LAYOUTS).index(name))
    side = arguments["img_size" if library == "timm" else "image_size"]
    images = rng.standard_normal((4, side, side, arguments.get("in_chans", 3)))
    dlogits = rng.standard_normal((4, 5))
    make = flax_layout if library == "flax" else partial(torch_layout, library)
    weights, grads, logits = make(arguments, images, dlogits, rng)
    packages = ("numpy", library, "jax" if library == "flax" else "torch")
    settings = {"library": library, "arguments": arguments, "versions": {each: version(each) for each in packages}}
    arrays = {"settings": np.array(json.dumps(settings)), "images": images, "dlogits": dlogits, "logits": logits}
    for key, array in weights.items():
        assert grads[key].shape == array.shape and array.dtype == grads[key].dtype == np.float64, key
        arrays |= {f"weights/{key}": array, f"grads/{key}": grads[key]}
    return arrays


# ------------------------------------------------------------------- images and models of other programs

PIXELS_FILE, MODELS_FILE = "outside_pixels", "outside_models"
SIDE = 16
HF_CUTS = [
    {"image_processor_type": "ViTImageProcessor", "size": {"height": SIDE, "width": SIDE}},
    {"feature_extractor_type": "ViTFeatureExtractor", "size": SIDE, "resample": 3},
    {"image_processor_type": "ViTImageProcessorFast", "size": {"height": SIDE, "width": SIDE}, "resample": 0},
    {"image_processor_type": "SiglipImageProcessor", "size": {"height": SIDE, "width": SIDE}, "resample": 1},
    {"feature_extractor_type": "DeiTFeatureExtractor", "size": 19, "crop_size": SIDE},
    {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 17},
        "crop_size": {"height": SIDE, "width": SIDE},
    },
    {"feature_extractor_type": "CLIPFeatureExtractor", "size": SIDE, "crop_size": SIDE},
    {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 13}, "crop_size": SIDE, "resample": 2},
    {"image_processor_type": "ViTImageProcessor", "do_resize": False, "do_center_crop": True, "crop_size": SIDE},
]
TIMM_CUTS = [
    {"input_size": [3, SIDE, SIDE], "crop_pct": share, "crop_mode": mode, "interpolation": kind}
    | {"mean": [0.3, 0.5, 0.7]}
    for mode, share, kind in (
        ("center", 0.9, "bicubic"), ("center", 1.0, "bilinear"), ("center", 0.875, "lanczos"),
        ("squash", 1.0, "bicubic"), ("squash", 0.95, "bilinear"), ("border", 1.0, "bicubic"),
        ("border", 0.9, "nearest"),
    )
]  # fmt: skip


def outside_images():
    """Images of several shapes, smooth with some noise."""
    rng, images = np.random.default_rng(71), []
    for height, width in ((37, 61), (50, 23), (12, 10)):
        rows, columns = np.arange(height)[:, None, None], np.arange(width)[None, :, None]
        waves = 70 * np.sin(rows / 5) + 60 * np.sin(columns * np.array([0.15, 0.3, 0.4]))
        images.append(np.clip(128 + waves + rng.integers(-30, 30, (height, width, 3)), 0, 255).astype(np.uint8))
    return images


def outside_pixels():
    """What transformers and timm make of images before they rescale and normalise."""
    import transformers
    from PIL import Image
    from timm.data import create_transform, resolve_data_config

    images = outside_images()
    arrays = {f"image/{k}": image for k, image in enumerate(images)}
    for n, content in enumerate(HF_CUTS):
        name = content.get("image_processor_type", content.get("feature_extractor_type"))
        name = name.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast")
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "preprocessor_config.json").write_text(json.dumps(content))
            processor = getattr(transformers, name).from_pretrained(folder)
        for k, image in enumerate(images):
            values = processor(Image.fromarray(image), do_rescale=False, do_normalize=False, return_tensors="np")
            arrays[f"hf/{n}/{k}"] = values["pixel_values"][0].transpose(1, 2, 0).astype(np.uint8)
    for n, content in enumerate(TIMM_CUTS):
        transform = create_transform(**resolve_data_config({}, content), is_training=False, normalize=False)
        for k, image in enumerate(images):
            arrays[f"timm/{n}/{k}"] = transform(Image.fromarray(image)).numpy().transpose(1, 2, 0)
    versions = {each: version(each) for each in ("transformers", "timm", "torchvision", "torch", "pillow")}
    settings = {"hf": HF_CUTS, "timm": TIMM_CUTS, "versions": versions}
    return {"settings": np.array(json.dumps(settings)), **arrays}


TINY_HF = {
    "image_size": 8, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 12, "num_labels": 3,
}  # fmt: skip
EIGHT = {"size": {"height": 8, "width": 8}}
CUT = {"size": {"shortest_edge": 9}, "crop_size": {"height": 8, "width": 8}}
OUTSIDE_HF = {
    "vit": ("ViTForImageClassification", {"hidden_act": "gelu_new"}, "ViT", EIGHT),
    "vit, not normalised": ("ViTForImageClassification", {"qkv_bias": False}, "ViT", EIGHT | {"do_normalize": False}),
    "vit, not rescaled": (
        "ViTForImageClassification", {"layer_norm_eps": 1e-3}, "ViT",
        EIGHT | {"do_rescale": False, "image_mean": [110.0, 120.0, 130.0], "image_std": [50.0, 60.0, 70.0]},
    ),
    "vit, another factor": (
        "ViTForImageClassification", {}, "ViT",
        EIGHT | {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
    ),
    "deit, distilled": (
        "DeiTForImageClassificationWithTeacher", {}, "DeiT",
        {"size": {"height": 9, "width": 9}, "crop_size": {"height": 8, "width": 8}},
    ),
    "ijepa": ("IJepaForImageClassification", {}, "ViT", EIGHT),
    "dinov2 with registers": ("Dinov2WithRegistersForImageClassification", {"mlp_ratio": 2}, "Bit", CUT),
}  # fmt: skip
TIMM_TINY = {
    "img_size": 8,
    "patch_size": 4,
    "embed_dim": 8,
    "depth": 1,
    "num_heads": 2,
    "mlp_ratio": 1.5,
    "num_classes": 3,
}
OUTSIDE_TIMM = {
    "timm, distilled": ("deit_tiny_distilled_patch16_224", TIMM_TINY, {"crop_mode": "border", "crop_pct": 1.0}),
    "timm, registers": (
        "vit_base_patch16_reg4_gap_256", TIMM_TINY | {"reg_tokens": 2, "act_layer": "gelu_tanh"},
        {"crop_mode": "squash", "crop_pct": 0.9, "mean": (0.2, 0.3, 0.4), "std": (0.5, 0.6, 0.7)},
    ),
}  # fmt: skip


def outside_models():
    """Small models as transformers, timm and torchvision save them, and their logits of the images."""
    import timm
    import torch
    import transformers
    from PIL import Image
    from safetensors.numpy import load_file
    from timm.data import create_transform, resolve_data_config
    from timm.models import save_for_hf
    from torchvision.models import VisionTransformer

    images, arrays, files = [Image.fromarray(image) for image in outside_images()], {}, {}

    def drawn(model):
        rng = np.random.default_rng(72)
        state = {key: torch.from_numpy(draw_like(key, a, rng)).float() for key, a in model.state_dict().items()}
        model.load_state_dict(state)
        return model.eval()

    def keep(name, weights, beside, logits):
        arrays.update({f"{name}/weights/{key}": array for key, array in weights.items()})
        arrays[f"{name}/logits"], files[name] = logits.numpy(), beside

    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name, (kind, changes, processor, settings) in OUTSIDE_HF.items():
            kind = getattr(transformers, kind)
            known = kind.config_class.__dataclass_fields__
            sizes = {key: value for key, value in TINY_HF.items() if key in known or key == "num_labels"}
            model = drawn(kind(kind.config_class(**sizes | changes)))
            processor = getattr(transformers, f"{processor}ImageProcessor")(**settings)
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            beside = {n: json.loads((folder / n).read_text()) for n in ("config.json", "preprocessor_config.json")}
            pixels = torch.cat([processor(image, return_tensors="pt")["pixel_values"] for image in images])
            keep(name, load_file(folder / "model.safetensors"), beside, model(pixels).logits)
        for name, (architecture, arguments, data) in OUTSIDE_TIMM.items():
            model = drawn(timm.create_model(architecture, **arguments))
            model.pretrained_cfg = model.pretrained_cfg | data | {"input_size": (3, 8, 8)}
            save_for_hf(model, folder, model_args=arguments, safe_serialization=True)
            transform = create_transform(**resolve_data_config({}, model=model), is_training=False)
            beside = {"config.json": json.loads((folder / "config.json").read_text())}
            logits = model(torch.stack([transform(image) for image in images]))
            keep(name, load_file(folder / "model.safetensors"), beside, logits)
        model = drawn(VisionTransformer(8, 4, 1, 2, 8, 12, num_classes=3, representation_size=5))
        pixels = np.stack([np.asarray(image.resize((8, 8))) for image in images])
        mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
        logits = model(((torch.from_numpy(pixels) / 255 - mean) / std).permute(0, 3, 1, 2))
        arrays["torchvision/pixels"] = pixels
        keep("torchvision", {k: t.numpy() for k, t in model.state_dict().items()}, {}, logits)
    versions = {each: version(each) for each in ("transformers", "timm", "torchvision", "torch")}
    return {"settings": np.array(json.dumps({"files": files, "versions": versions})), **arrays}


# ------------------------------------------------------------------------------------------ the command line


FILES = [*REFERENCES, *LAYOUTS, OPERATIONS_FILE, RESIZE_FILE, PIXELS_FILE, MODELS_FILE]


def make_reference(name):
    """Compute and check one reference.

    Returns
    -------
    arrays : dict of ndarray
        The contents of the file.
    differences : dict of float
        The largest difference that each cross-check found.
    """
    spec = REFERENCES[name]
    config, answers_name = spec["config"], spec["answers"]
    rng = np.random.default_rng(spec["seed"])
    params = draw_parameters(config, rng)
    images, answers = draw_batch(config, spec["batch_size"], answers_name, rng)
    source = TimmReference if name.startswith("timm") else FlaxReference
    reference = source(config, images, answers, spec["label_smoothing"])
    logits, features, attn = reference.forward(params)
    loss, grads = reference.loss_and_grads(params)
    losses, after = reference.train(params)

    settings = {
        "source": source.packages[1],
        "versions": {package: version(package) for package in (*source.packages, "numpy")},
        "label_smoothing": spec["label_smoothing"],
        "adamw": ADAMW,
        "steps": STEPS,
        "seed": spec["seed"],
    }
    arrays = {"config": np.array(json.dumps(config)), "settings": np.array(json.dumps(settings))}
    arrays |= {"images": images, answers_name: answers}
    arrays |= {"logits": logits, "loss": np.array(loss), "losses": np.array(losses)}
    arrays |= {f"features/block{i}": x for i, x in enumerate(features)}
    arrays |= {f"attn/block{i}": x for i, x in enumerate(attn)}
    for parameter, shape in parameter_shapes(config).items():
        for prefix, table in (("param", params), ("grad", grads), ("after", after)):
            assert table[parameter].shape == shape and len(table) == len(params)
            arrays[f"{prefix}/{parameter}"] = table[parameter]
    for key, array in arrays.items():
        assert array.dtype.kind == "U" or array.dtype in (np.float64, np.int64), f"{key} is {array.dtype}"

    differences = {
        "forward": check_forward(arrays),
        "gradient": check_gradients(reference, params, grads, rng),
        "AdamW": check_training(reference, params, losses, after),
    }
    return arrays, differences


def parse_arguments(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="make_reference.py",
        description="Write the reference files of the tests from PyTorch/timm, transformers, JAX/Flax and torchvision.",
        epilog=f"files: {', '.join(FILES)}. requirements: pip install {REQUIREMENTS}",
    )
    default = Path(__file__).resolve().parent.parent / "tests" / "data"
    parser.add_argument("--out", type=Path, default=default, metavar="DIR", help="directory (tests/data)")
    parser.add_argument("--only", metavar="NAME", help="write this file only, a name without .npz")
    return parser.parse_args(argv)


def fail(message):
    """Print one line on what is wrong and return the exit status."""
    print(f"error: {message}", file=sys.stderr)
    return 2


def main(argv=None):
    """Write the files; return the exit status."""
    arguments = parse_arguments(argv)
    if arguments.only is not None and arguments.only not in FILES:
        return fail(f"--only {arguments.only}: choose from {', '.join(FILES)}")
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return fail(f"cannot write to {arguments.out} ({error.strerror}): choose another --out")
    for name in [arguments.only] if arguments.only else FILES:
        try:
            others = {OPERATIONS_FILE: image_operations, RESIZE_FILE: resizing}
            others |= {PIXELS_FILE: outside_pixels, MODELS_FILE: outside_models}
            if name in REFERENCES:
                arrays, differences = make_reference(name)
            else:
                arrays, differences = others[name]() if name in others else make_layout(name), {}
        except ImportError as error:
            return fail(f"{name}: {error}: pip install {REQUIREMENTS}")
        path = arguments.out / f"{name}.npz"
        partial = path.with_suffix(".partial.npz")  # an interrupted run leaves the old file as it was
        try:
            np.savez_compressed(partial, **arrays)
            partial.replace(path)
        except OSError as error:
            return fail(f"cannot write {path} ({error.strerror}): choose another --out")
        about = f"{path.name}: {path.stat().st_size / 1000:.1f} kB, {len(arrays)} arrays"
        if differences:
            checks = ", ".join(f"{check} {value:.1e}" for check, value in differences.items())
            about += f", loss {arrays['loss']:.12f}; differences: {checks}"
        print(about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
