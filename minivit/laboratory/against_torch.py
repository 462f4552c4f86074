"""The same model in PyTorch, tensor by tensor: which of ours is the first to differ?

PyTorch's autograd computes the gradient of every tensor that our backward returns, in float64: each layer there reads
its input through a node of its own, so that the node's gradient is what flows back through that layer alone, as ours
returns it. PyTorch is optional: ``pip install "minivit[bench]"``.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from minivit.base.errors import InputError
from minivit.laboratory.recorder import recording
from minivit.laboratory.trace import events
from minivit.layers.loss import softmax_cross_entropy_backward, softmax_cross_entropy_forward
from minivit.model import ViT

LIMIT = 1e-10  # relative differences up to here are rounding in float64
ZERO = 1e-13  # where every entry is below, they are rounding: softmax ignores the bias of the keys' LayerNorm
# Our path of a layer, from its name in `torch_vit.ViT`: (pattern, replacement), of which the first that fits counts.
PATHS = (
    (r"^classify$", "head"),
    (r"^(norm|head|pre_logits)$", r"head.\1"),
    (r"^attention_pool$", "head.pool.scores"),
    (r"^pool", "head.pool"),
    (r"^patch_embed", "embedding"),
    (r"^registers$", "embedding.registers"),
    (r"^positions\.0$", "embedding.position"),
    (r"^positions\.(\d+)$", r"blocks.\1.position"),
    (r"^stem", "embedding.stem.resnet"),
    (r"\.ls1$", ".msa.ls1"),
    (r"\.ls2$", ".mlp.ls2"),
    (r"\.attn\.(q_norm|k_norm)$", r".msa.attention.\1"),
    (r"\.attn\b", ".msa"),
    (r"\.gelu$", ".activation"),
)
# ... and what its stem calls otherwise than the caches of ours
PARTS = ((r"\.blocks(\.\d+)", r"\1"), ("standardize$", "standardization"), ("conv2d$", "conv"), ("max_pool$", "pool"))
# The gradients of the head, which ours returns at once, by its parts.
HEAD = {"dw": ("head.norm", "dw"), "db": ("head.norm", "db"), "dW": ("head.head", "dW"), "dbias": ("head.head", "db")}


class Compared(NamedTuple):
    """One tensor of both: where it is made, and how far apart they are."""

    path: str
    direction: str  # "forward" or "backward"
    name: str  # "y", or the gradient's: "dx", "dW", ...; at the end, with path "", the model's own by parameter
    shape: tuple
    error: float  # largest difference, relative to PyTorch's largest entry (absolute where that is below ZERO)


class _Watch:
    """What goes in and out of every layer of a PyTorch model, by our paths and names.

    ``outputs``: {path: tensor}; ``inputs``: {(path, gradient's name): the tensor whose gradient that is}
    """

    def __init__(self, model):
        from torch import nn

        self.outputs, self.inputs = {}, {}
        self.own = {nn.Linear: {"dW": "weight", "db": "bias"}, nn.LayerNorm: {"dw": "weight", "db": "bias"}}
        unseen = (type(model), nn.ModuleList, nn.Identity)
        for name, module in model.named_modules():
            if type(module) is not nn.Module and not isinstance(module, unseen):
                self._watch(module, self._path_of(name, model.config))

    def _path_of(self, name, config):
        for pattern, replacement in PATHS:
            if re.search(pattern, name):
                name = re.sub(pattern, replacement, name)
                break
        if name.startswith("embedding.stem"):
            for pattern, replacement in PARTS:
                name = re.sub(pattern, replacement, name)
        two = config.pos_embed == "learned2d" and name.endswith("position")
        return f"{name}2d" if two else name

    def _watch(self, module, path):
        names = getattr(module, "arguments", ("x",))
        for gradient, parameter in getattr(module, "gradients", self.own.get(type(module), {})).items():
            owner, _, leaf = parameter.rpartition(".")
            if (value := getattr(module.get_submodule(owner), leaf, None)) is not None:
                self.inputs[path, gradient] = value

        def before(module, inputs):
            fresh = list(inputs)
            for k, (name, x) in enumerate(zip(names, inputs, strict=False)):
                if x is not None:
                    fresh[k] = self.inputs[path, f"d{name}"] = _node(x)
            return tuple(fresh)

        def after(module, inputs, output):
            self.outputs[path] = output

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def gradient_of(self, path, name):
        """A tensor's gradient in our layout; None if nothing flowed back, KeyError if there is no such tensor."""
        from torch import nn

        tensor = self.inputs[path, name]
        transposed = isinstance(tensor, nn.Parameter) and tensor.ndim == 2  # of a linear map
        return tensor.grad.T if transposed and tensor.grad is not None else tensor.grad


def _node(x):
    """A tensor of its own with the same numbers, whose gradient is kept."""
    x = x.clone()
    if not x.requires_grad:
        x.requires_grad_()
    x.retain_grad()
    return x


def _run(config, params, images, labels, label_smoothing):
    """Forward and backward in PyTorch: (the `_Watch`, {parameter: gradient in our layout, None for none})."""
    import torch
    from torch.nn import functional

    from minivit.laboratory.torch_vit import Heads, turned
    from minivit.laboratory.torch_vit import ViT as TorchViT

    model = TorchViT(config, torch.float64)
    model.load(params)
    for module in model.modules():
        if isinstance(module, Heads):
            module.written_out = True
    watch = _Watch(model)
    logits = watch.inputs["loss", "dlogits"] = _node(model(torch.tensor(images)))
    loss = functional.cross_entropy(logits, torch.tensor(labels), label_smoothing=label_smoothing)
    watch.outputs["loss"] = loss
    loss.backward()
    grads = {name: p.grad if p.grad is None else turned(p.grad) for name, p in model.named_parameters()}
    return watch, grads


def compare(config, flat, images, labels, *, label_smoothing=0.0):
    """Every tensor of our forward and backward pass against PyTorch's, in the order in which ours are finished.

    Dropout and stochastic depth are off, in both.

    Shapes  flat (n,) float64, images (B, H, W, C) float64, labels (B,) or (B, K)  ->  a list of `Compared`
    Raises  InputError: PyTorch is not installed.
    """
    try:
        import torch  # noqa: F401
    except ImportError:
        raise InputError('the comparison needs PyTorch: pip install "minivit[bench]"') from None
    model = ViT(config, flat=flat)
    with recording(model=model, keep=True) as recorder:
        logits, cache = model.forward(images)
        _, loss_cache = softmax_cross_entropy_forward(logits, labels, label_smoothing=label_smoothing)
        recorder.name(loss_cache, "loss")
        dlogits = softmax_cross_entropy_backward(1.0, loss_cache)
        grads = model.gradient_buffer()[1]
        model.backward(dlogits, cache, grads)
    watch, their_grads = _run(config, model.params, images, labels, label_smoothing)
    compared, kept, records = [], recorder.kept, recorder.records
    paths = {record.path for record in records}
    for what, record, _ in events(records):
        if what != "out":
            continue
        for (path, direction, name), ours in kept.items():
            if (path, direction) != (record.path, record.direction) or _is_apart(path, name, config, paths):
                continue
            try:
                their_path, their_name = _their_names(path, name, config)
                expected = watch.outputs[their_path] if name == "y" else watch.gradient_of(their_path, their_name)
            except KeyError:
                raise KeyError(f"no counterpart in PyTorch for {name} of {path}") from None
            compared.append(_compared(path, direction, name, ours, expected))
    # what the model itself hands to the optimiser
    compared += [_compared("", "backward", name, grads[name], their_grads[name]) for name in grads]
    return compared


def _is_apart(path, name, config, paths):
    """Is it a tensor that the model in PyTorch does not have, since it is cut into other parts?"""
    if path.endswith(".attention.dropout"):  # relative attention calls it at any rate: at 0 it hands its input on
        return True
    if path == "head":  # only the plain head is one there too
        return name == "y" and (config.pooling != "cls" or config.pre_logits > 0)
    if path == "embedding":
        if name == "y":  # where a table is added behind it, PyTorch adds it at once
            return "embedding.position" in paths
        return (name == "dcls_token" and config.pooling != "cls") or (
            name == "dpos_embed" and (config.pos_embed not in ("learned", "sincos2d") or "embedding.position" in paths)
        )
    if path == "embedding.position":
        return True
    around_attention = path.endswith(".attention") and f"{path}.attention" in paths
    return around_attention or path == "head.tanh" or (path == "head.pool" and config.pooling != "seq")


def _their_names(path, name, config):
    """Our path and name of a tensor as `_Watch` has them: there is one attention, without steps around it."""
    path = re.sub(r"(\.attention)+", ".attention", path)
    if path == "head" and name in HEAD:
        return HEAD[name]
    if path == "head.pool":
        return ("head.pool.scores" if name in ("dW", "db") else path), name
    if name.startswith("down"):  # of the parameters that the attention has
        own = ["dwq", "dbq", "dwk", "dbk"] * config.qk_norm + ["dr"]
        name = own[int(name.removeprefix("down")) - 1]
    return path, "dx" if path.startswith("embedding.stem") and name == "dimages" else name


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
