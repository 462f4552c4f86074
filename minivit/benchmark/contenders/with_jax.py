"""The same Vision Transformer in JAX, on the CPU, as one would write it there: ``jax``.

Its fastest ordinary settings: one `jax.jit` around the whole training step (forward, backward, AdamW), whose
parameters and optimiser state are donated, so that their memory is used again; a thread per core.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from minivit.base import params
from minivit.benchmark.contenders import BETAS, EPS, LR, WEIGHT_DECAY, problem
from minivit.model import parameter_table
from minivit.options.positions import sincos2d


def linear(p, name, x):
    """y = x W + b, with the parameters called ``name``: x (..., d) -> (..., m)."""
    return x @ p[f"{name}.weight"] + p[f"{name}.bias"]


def layernorm(p, name, x, eps):
    """LayerNorm over the last axis: x (..., D) -> (..., D)."""
    mean = x.mean(-1, keepdims=True)
    var = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + eps) * p[f"{name}.weight"] + p[f"{name}.bias"]


def attention(p, name, x, num_heads, eps):
    """Multi-head self-attention (Eq. 5-8), by `jax.nn.dot_product_attention`: x (B, N, D) -> (B, N, D)."""
    B, N, D = x.shape
    q, k, v = jnp.moveaxis(linear(p, f"{name}.qkv", x).reshape(B, N, 3, num_heads, D // num_heads), 2, 0)
    if f"{name}.q_norm.weight" in p:
        q, k = layernorm(p, f"{name}.q_norm", q, eps), layernorm(p, f"{name}.k_norm", k, eps)
    return linear(p, f"{name}.proj", jax.nn.dot_product_attention(q, k, v).reshape(B, N, D))


def layer_scale(p, name, x):
    """x, or gamma x where there is a gamma: x (..., D) -> (..., D)."""
    return x * p[f"{name}.gamma"] if f"{name}.gamma" in p else x


def vit(config, p, images):
    """`minivit.model.ViT`: images (B, H, W, C) uint8 -> logits (B, K)."""
    c, P, n = config, config.patch_size, config.grid_size
    B = len(images)
    x = (images.astype(jnp.float32) - 127.5) / 127.5
    patches = x.reshape(B, n, P, n, P, c.channels).transpose(0, 1, 3, 2, 4, 5).reshape(B, n * n, -1)
    z = linear(p, "patch_embed.proj", patches)
    if c.class_tokens:
        z = jnp.concatenate([jnp.broadcast_to(p["cls_token"], (B, 1, c.width)), z], axis=1)
    if c.pos_embed == "learned":
        z = z + p["pos_embed"]
    elif c.pos_embed == "sincos2d":
        z = z + sincos2d(n, c.width, prefix_tokens=c.class_tokens).astype(np.float32)
    if c.registers:
        at = c.class_tokens
        z = jnp.concatenate([z[:, :at], jnp.broadcast_to(p["reg_token"], (B, c.registers, c.width)), z[:, at:]], axis=1)
    for i in range(c.depth):
        block = f"blocks.{i}"
        u = layernorm(p, f"{block}.norm1", z, c.layernorm_eps)
        u = attention(p, f"{block}.attn", u, c.num_heads, c.layernorm_eps)
        z = z + layer_scale(p, f"{block}.ls1", u)
        u = linear(p, f"{block}.mlp.fc1", layernorm(p, f"{block}.norm2", z, c.layernorm_eps))
        u = linear(p, f"{block}.mlp.fc2", jax.nn.gelu(u, approximate=c.gelu == "tanh"))
        z = z + layer_scale(p, f"{block}.ls2", u)
    y = z[:, 0] if c.pooling == "cls" else z if c.class_tokens else z[:, c.registers :]
    y = layernorm(p, "norm", y.mean(axis=1) if c.pooling == "avg" else y, c.layernorm_eps)
    if c.pooling == "mean":
        y = y.mean(axis=1)
    elif c.class_tokens and c.pooling != "cls":
        others = y[:, 1 + c.registers :] if c.pooling == "cls+mean" else y[:, 1:2]
        y = jnp.concatenate([y[:, 0], others.mean(axis=1)], axis=1)
    elif c.pooling == "seq":
        y = (jax.nn.softmax(linear(p, "attention_pool", y), axis=1) * y).sum(axis=1)
    if c.pre_logits:
        y = jnp.tanh(linear(p, "pre_logits", y))
    return linear(p, "head", y)


def cross_entropy(config, p, images, labels):
    """Mean cross-entropy of a batch: images (B, H, W, C) uint8, labels (B,) -> ()."""
    log_p = jax.nn.log_softmax(vit(config, p, images))
    return -jnp.take_along_axis(log_p, labels[:, None], axis=1).mean()


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def train_step(config, p, state, images, labels):
    """Forward, backward and AdamW: new parameters and optimiser state, and the loss."""
    loss, grads = jax.value_and_grad(cross_entropy, argnums=1)(config, p, images, labels)
    decayed = {spec.name: spec.decay for spec in parameter_table(config)}
    beta1, beta2 = BETAS
    t = state["t"] + 1
    m = {name: beta1 * state["m"][name] + (1 - beta1) * g for name, g in grads.items()}
    v = {name: beta2 * state["v"][name] + (1 - beta2) * g * g for name, g in grads.items()}

    def updated(name):
        theta = p[name] * (1 - LR * WEIGHT_DECAY) if decayed[name] else p[name]
        return theta - LR * (m[name] / (1 - beta1**t)) / (jnp.sqrt(v[name] / (1 - beta2**t)) + EPS)

    return {name: updated(name) for name in p}, {"m": m, "v": v, "t": t}, loss


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(config, p, images, labels):
    """What must agree with ours: the loss () and the gradient of each parameter by its name."""
    return jax.value_and_grad(cross_entropy, argnums=1)(config, p, images, labels)


class Jax:
    """jax.jit around the whole step."""

    def __init__(self, job):
        flat, images, labels = problem(job)
        self.task, self.config = job.task, job.config
        self.images, self.labels = jnp.asarray(images), jnp.asarray(labels)
        self.p = {name: jnp.array(value) for name, value in params.views(flat, parameter_table(job.config)).items()}
        zeros = [{name: jnp.zeros_like(value) for name, value in self.p.items()} for _ in range(2)]
        self.state = {"m": zeros[0], "v": zeros[1], "t": jnp.zeros((), jnp.int32)}
        self.predict = jax.jit(vit, static_argnums=0)
        self.settings = {"version": jax.__version__}

    def check(self):
        if self.task == "infer":
            return None, {"logits": np.asarray(self.predict(self.config, self.p, self.images))}
        loss, grads = loss_and_gradient(self.config, self.p, self.images, self.labels)
        return float(loss), {name: np.asarray(g) for name, g in grads.items()}

    def step(self):
        if self.task == "infer":
            self.predict(self.config, self.p, self.images).block_until_ready()
            return None
        self.p, self.state, loss = train_step(self.config, self.p, self.state, self.images, self.labels)
        jax.block_until_ready(self.p)
        return float(loss)
