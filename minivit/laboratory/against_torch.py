"""The same model in PyTorch, tensor by tensor: which of ours is the first to differ?

PyTorch's autograd computes the gradient of every tensor that our backward returns, in float64: each layer there reads
its input through a node of its own, so that the node's gradient is what flows back through that layer alone, as ours
returns it. PyTorch is optional: ``pip install "minivit[bench]"``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from minivit.base.errors import InputError
from minivit.laboratory.trace import events, recording
from minivit.layers.loss import softmax_cross_entropy_backward, softmax_cross_entropy_forward
from minivit.model import STEM, ViT
from minivit.options.positions import sincos2d
from minivit.options.stem.conv2d import same_padding
from minivit.options.stem.resnet import CONV1, CONV2, CONV3, DOWNSAMPLE, ROOT

LIMIT = 1e-10  # relative differences up to here are rounding in float64
ZERO = 1e-13  # where every entry is below, they are rounding: softmax ignores the bias of the keys' LayerNorm


class Compared(NamedTuple):
    """One tensor of both: where it is made, and how far apart they are."""

    path: str
    direction: str  # "forward" or "backward"
    name: str  # "y", or the gradient's: "dx", "dW", ...; at the end, with path "", the model's own by parameter
    shape: tuple
    error: float  # largest difference, relative to PyTorch's largest entry (absolute where that is below ZERO)


class _Torch:
    """A forward pass in PyTorch that remembers, by our names, each layer's output, input nodes and parameters."""

    def __init__(self, torch, config, params):
        self.torch, self.config = torch, config
        self.p = {name: torch.tensor(np.array(value), requires_grad=True) for name, value in params.items()}
        self.outputs, self.inputs = {}, {}

    def read(self, path, name, x):
        """The layer's own node of a tensor that it reads."""
        x = x.clone()
        x.retain_grad()
        self.inputs[path, f"d{name}"] = x
        return x

    def wrote(self, path, y):
        self.outputs[path] = y
        return y

    def take(self, path, prefix, *names):
        """Parameters prefix.weight and prefix.bias, remembered as the gradients ``names`` of the layer at ``path``."""
        values = [self.p[f"{prefix}.{kind}"] for kind in ("weight", "bias")]
        self.inputs |= {(path, name): value for name, value in zip(names, values, strict=True)}
        return values

    def linear(self, path, prefix, x):
        W, b = self.take(path, prefix, "dW", "db")
        return self.wrote(path, self.read(path, "x", x) @ W + b)

    def layernorm(self, path, prefix, x):
        w, b = self.take(path, prefix, "dw", "db")
        x = self.read(path, "x", x)
        norm = self.torch.nn.functional.layer_norm
        return self.wrote(path, norm(x, x.shape[-1:], w, b, self.config.layernorm_eps))

    def attention(self, path, q, k, v, r=None):
        q, k, v = (self.read(path, name, x) for name, x in zip("qkv", (q, k, v), strict=True))
        logits = q @ k.transpose(-1, -2)
        if r is not None:
            r = self.read(path, "r", r)  # a node of the block's own, of a table that others may share
            N = k.shape[-2]
            place = self.torch.arange(N)
            keys = r[0, N - 1 - (place[:, None] - place)]  # (N, N, Dh): r(i - j)
            logits = logits + (q.unsqueeze(-2) * keys).sum(-1)
        scores = self.read(f"{path}.softmax", "x", logits / q.shape[-1] ** 0.5)
        attn = self.wrote(f"{path}.softmax", scores.softmax(dim=-1))
        return self.wrote(path, attn @ v)

    def msa(self, path, prefix, x):
        x = self.read(path, "x", x)
        self.take(path, f"{prefix}.qkv", "dWqkv", "dbqkv")
        self.take(path, f"{prefix}.proj", "dWproj", "dbproj")
        B, N, D = x.shape
        h = self.config.num_heads
        qkv = self.linear(f"{path}.qkv", f"{prefix}.qkv", x)
        q, k, v = qkv.reshape(B, N, 3, h, D // h).permute(2, 0, 3, 1, 4)
        if self.config.qk_norm:
            self.take(path, f"{prefix}.q_norm", "dwq", "dbq")
            self.take(path, f"{prefix}.k_norm", "dwk", "dbk")
            q, k = (self.layernorm(f"{path}.{n}", f"{prefix}.{n}", x) for n, x in (("q_norm", q), ("k_norm", k)))
        r = None
        if self.config.pos_embed == "relative":
            r = self.read(path, "r", self.p["rel_pos" if self.config.pos_at == "shared" else f"{prefix}.rel_pos"])
        heads = self.attention(f"{path}.attention", q, k, v, r).transpose(1, 2).reshape(B, N, D)
        return self.wrote(path, self.linear(f"{path}.proj", f"{prefix}.proj", heads))

    def mlp(self, path, prefix, x):
        self.take(path, f"{prefix}.fc1", "dW1", "db1")
        self.take(path, f"{prefix}.fc2", "dW2", "db2")
        u = self.linear(f"{path}.fc1", f"{prefix}.fc1", self.read(path, "x", x))
        form = {"tanh": "tanh", "erf": "none"}[self.config.gelu]
        u = self.read(f"{path}.gelu", "x", u)
        u = self.wrote(f"{path}.gelu", self.torch.nn.functional.gelu(u, approximate=form))
        return self.wrote(path, self.linear(f"{path}.fc2", f"{prefix}.fc2", u))

    def layer_scale(self, path, x):
        if (gamma := self.p.get(f"{path}.gamma")) is None:
            return x
        self.inputs[path, "dgamma"] = gamma
        return self.wrote(path, self.read(path, "x", x) * gamma)

    def block(self, path, z):
        z = self.read(path, "z", z)
        u = self.msa(f"{path}.msa", f"{path}.attn", self.layernorm(f"{path}.norm1", f"{path}.norm1", z))
        z = z + self.layer_scale(f"{path}.ls1", u)
        u = self.mlp(f"{path}.mlp", f"{path}.mlp", self.layernorm(f"{path}.norm2", f"{path}.norm2", z))
        z = z + self.layer_scale(f"{path}.ls2", u)
        return self.wrote(path, z)

    def position(self, i, z):
        """The position that is added before block i; before the first one, that of rows and columns alone."""
        c, name, g = self.config, "pos_embed", self.config.grid_size
        if i and c.pos_at == "input":
            return z
        path, before = f"blocks.{i}." if i else "", f"blocks.{i}." if c.pos_at == "every" else ""
        prefix = z.shape[1] - g * g  # tokens before the patches
        if c.pos_embed == "learned2d":
            path = f"{path}position2d"
            z, X, Y = (
                self.read(path, *pair)
                for pair in (("z", z), ("X", self.p[f"{before}{name}_x"]), ("Y", self.p[f"{before}{name}_y"]))
            )
            grid = self.torch.cat([X[:, None].expand(1, g, g, -1), Y[:, :, None].expand(1, g, g, -1)], dim=-1)
            grid = self.torch.nn.functional.pad(grid.reshape(1, g * g, -1), (0, 0, prefix, 0))
            return self.wrote(path, z + grid)
        if i and c.pos_embed in ("learned", "sincos2d"):
            path, at = f"{path}position", int(c.pooling == "cls")
            z, position = self.read(path, "z", z), self.read(path, "pos_embed", self.fixed_or_learned(before))
            rows = position[:, :at], position.new_zeros(1, c.registers, c.width), position[:, at:]
            return self.wrote(path, z + self.torch.cat(rows, dim=1))
        return z

    def fixed_or_learned(self, before=""):
        """One vector for each token but the registers."""
        c = self.config
        if c.pos_embed == "learned":
            return self.p[f"{before}pos_embed"]
        fixed = sincos2d(c.grid_size, c.width, prefix_tokens=int(c.pooling == "cls"))
        return self.torch.tensor(fixed, requires_grad=True)  # never trained, but its gradient is returned

    def conv_norm(self, path, names, x, stride):
        """The convolution by PyTorch's own (NCHW, OIHW), after padding as TensorFlow does."""
        torch, F, groups = self.torch, self.torch.nn.functional, self.config.stem_groups
        kernel, w, b = (self.p[STEM + name] for name in names)
        self.inputs |= {(path, "dkernel"): kernel, (path, "dw"): w, (path, "db"): b}
        x = self.read(path, "x", x) if path != "stem.root.conv" else x
        self.inputs[f"{path}.standardize", "dw"] = kernel
        std, mean = torch.std_mean(kernel, dim=(0, 1, 2), correction=0)
        standardized = self.wrote(f"{path}.standardize", (kernel - mean) / (std + 1e-5))
        standardized = self.read(f"{path}.conv2d", "w", standardized)
        x = self.read(f"{path}.conv2d", "x", x) if path != "stem.root.conv" else x
        sizes = zip(x.shape[2:0:-1], kernel.shape[1::-1], strict=True)  # columns first
        border = [n for size, k in sizes for n in same_padding(size, k, stride)]
        padded = F.pad(x.permute(0, 3, 1, 2), border)
        y = F.conv2d(padded, standardized.permute(3, 2, 0, 1), stride=stride)
        y = self.wrote(f"{path}.conv2d", y.permute(0, 2, 3, 1))
        self.inputs |= {(f"{path}.norm", "dw"): w, (f"{path}.norm", "db"): b}
        y = F.group_norm(self.read(f"{path}.norm", "x", y).permute(0, 3, 1, 2), groups, w, b, 1e-6)
        return self.wrote(path, self.wrote(f"{path}.norm", y.permute(0, 2, 3, 1)))

    def relu(self, path, x):
        return self.wrote(path, self.read(path, "x", x).relu())

    def bottleneck(self, path, prefix, x, stride):
        def conv(name, names, x, stride=1):
            return self.conv_norm(f"{path}.{name}", [prefix + each for each in names], x, stride)

        x = self.read(path, "x", x)
        y = self.relu(f"{path}.relu1", conv("conv1", CONV1, x))
        y = self.relu(f"{path}.relu2", conv("conv2", CONV2, y, stride))
        y = conv("conv3", CONV3, y)
        if STEM + prefix + DOWNSAMPLE[0] in self.p:
            x = conv("downsample", DOWNSAMPLE, x, stride)
        return self.wrote(path, self.relu(f"{path}.relu3", x + y))

    def stem(self, images):
        c, F = self.config, self.torch.nn.functional
        if not c.stem:
            return images
        prefix = "stem." if c.stem_units else ""
        y = self.conv_norm("stem.root.conv", [prefix + name for name in ROOT], images, 2)
        y = self.relu("stem.root.relu", y)
        y = self.read("stem.root.max_pool", "x", y)
        border = [n for size in y.shape[2:0:-1] for n in same_padding(size, 3, 2)]
        y = F.max_pool2d(F.pad(y.permute(0, 3, 1, 2), border, value=-np.inf), 3, 2).permute(0, 2, 3, 1)
        y = self.wrote("stem.root", self.wrote("stem.root.max_pool", y))
        for s, count in enumerate(c.stem_units):
            y = self.read(f"stem.stages.{s}", "x", y)
            for u in range(count):
                stage = f"stages.{s}."
                y = self.bottleneck(f"stem.{stage}blocks.{u}", f"{stage}blocks.{u}.", y, 2 if s and not u else 1)
            y = self.wrote(f"stem.stages.{s}", y)
        return self.wrote("stem", y)

    def embed(self, images):
        c, path = self.config, "patch_embed"
        images = self.stem(images)
        if c.stem:  # only then is its gradient made
            images = self.read(path, "images", images)
        B, grid, P = len(images), c.grid_size, c.patch_size
        patches = (
            images.reshape(B, grid, P, grid, P, c.patch_channels).permute(0, 1, 3, 2, 4, 5).reshape(B, grid**2, -1)
        )
        W, b = self.take(f"{path}.proj", "patch_embed.proj", "dW", "db")
        patches = self.read(f"{path}.proj", "x", patches) if c.stem else patches
        self.inputs |= {(path, "dW"): W, (path, "db"): b}
        z = self.wrote(f"{path}.proj", patches @ W + b)
        if "cls_token" in self.p:
            self.inputs[path, "dcls_token"] = self.p["cls_token"]
            z = self.torch.cat([self.p["cls_token"].expand(B, -1, -1), z], dim=1)
        if c.pos_embed in ("learned", "sincos2d"):
            position = self.fixed_or_learned("blocks.0." if c.pos_at == "every" else "")
            z = z + self.read(path, "pos_embed", position)
        return self.registers("registers", self.position(0, self.wrote(path, z)))

    def registers(self, path, z):
        if (registers := self.p.get("reg_token")) is None:
            return z
        z, at = self.read(path, "z", z), int(self.config.pooling == "cls")
        self.inputs[path, "dreg_token"] = registers
        return self.wrote(path, self.torch.cat([z[:, :at], registers.expand(len(z), -1, -1), z[:, at:]], dim=1))

    def sequence_pool(self, path, x):
        x = self.read(path, "x", x)
        self.take(path, "attention_pool", "dW", "db")
        scores = self.linear(f"{path}.scores", "attention_pool", x).transpose(1, 2)
        attn = self.wrote(f"{path}.softmax", self.read(f"{path}.softmax", "x", scores).softmax(dim=-1))
        return self.wrote(path, (attn @ x).squeeze(1))

    def head(self, z):
        z = self.read("head", "z", z)
        if self.config.pooling == "cls":
            y = self.layernorm("head.norm", "norm", z[:, 0])
        elif self.config.pooling == "avg":
            y = self.layernorm("head.norm", "norm", z[:, self.config.registers :].mean(dim=1))
        else:
            y = self.layernorm("head.norm", "norm", z[:, self.config.registers :])
            y = self.sequence_pool("head.pool", y) if self.config.pooling == "seq" else y.mean(dim=1)
        if self.config.pre_logits:
            y = self.linear("head.pre_logits", "pre_logits", y).tanh()
        return self.wrote("head", self.linear("head.head", "head", y))

    def run(self, images, labels, label_smoothing):
        """Forward and backward; fills ``outputs`` and the gradients of ``inputs``."""
        torch = self.torch
        z = self.embed(torch.tensor(images))
        c = self.config
        for i in range(c.depth):
            z = self.position(i, z) if i else z
            if c.attention == "axial":
                grid = z.reshape(len(z), c.grid_size, c.grid_size, c.width)
                lines = (grid.transpose(1, 2) if i % 2 else grid).reshape(-1, c.grid_size, c.width)
                grid = self.block(f"blocks.{i}", lines).reshape(grid.shape)
                z = (grid.transpose(1, 2) if i % 2 else grid).reshape(z.shape)
            else:
                z = self.block(f"blocks.{i}", z)
        logits = self.read("loss", "logits", self.head(z))
        entropy = torch.nn.functional.cross_entropy
        loss = entropy(logits, torch.tensor(labels), label_smoothing=label_smoothing)
        self.wrote("loss", loss).backward()


def compare(config, flat, images, labels, *, label_smoothing=0.0):
    """Every tensor of our forward and backward pass against PyTorch's, in the order in which ours are finished.

    Dropout and stochastic depth are off, in both.

    Shapes  flat (n,) float64, images (B, H, W, C) float64, labels (B,) or (B, K)  ->  a list of `Compared`
    Raises  InputError: PyTorch is not installed.
    """
    try:
        import torch
    except ImportError:
        raise InputError('the comparison needs PyTorch: pip install "minivit[bench]"') from None
    model = ViT(config, flat=flat)
    with recording([flat], keep=True) as recorder:
        logits, cache = model.forward(images)
        _, loss_cache = softmax_cross_entropy_forward(logits, labels, label_smoothing=label_smoothing)
        dlogits = softmax_cross_entropy_backward(1.0, loss_cache)
        grads = model.gradient_buffer()[1]
        model.backward(dlogits, cache, grads)
    theirs = _Torch(torch, config, model.params)
    theirs.run(images, labels, label_smoothing)
    compared = []
    for what, record, _ in events(recorder.records):
        if what != "out":
            continue
        for (path, direction, name), ours in recorder.kept.items():
            if (path, direction) != (record.path, record.direction):
                continue
            tensor = theirs.outputs.get(path) if name == "y" else theirs.inputs.get((path, name))
            if tensor is None:
                if "dropout" in path or "path" in path.rpartition(".")[2]:
                    continue  # dropout that is off has no counterpart
                raise KeyError(f"no counterpart in PyTorch for {name} of {path}")
            expected = tensor if name == "y" else tensor.grad
            compared.append(_compared(path, direction, name, ours, expected))
    # what the model itself hands to the optimiser
    compared += [_compared("", "backward", name, grads[name], theirs.p[name].grad) for name in grads]
    return compared


def _compared(path, direction, name, ours, expected):
    expected = np.zeros_like(ours) if expected is None else expected.detach().numpy()
    if ours.shape != expected.shape:  # our last block goes on with the class token alone, PyTorch's with every token
        first = tuple(slice(n) for n in ours.shape)
        if direction == "forward":
            expected = expected[first]
        else:  # the gradients that ours leaves out must be zero
            some, ours = ours, np.zeros_like(expected)
            ours[first] = some
    largest = np.abs(expected).max()
    scale = largest if largest > ZERO else 1.0
    error = np.abs(ours - expected).max() / scale if np.isfinite(ours).all() else np.inf
    return Compared(path, direction, name, ours.shape, float(error))
