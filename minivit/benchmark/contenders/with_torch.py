"""The same Vision Transformer in PyTorch, as one would write it there: ``torch`` and ``torch-compile``.

Its fastest ordinary settings: `nn.Linear` and `nn.LayerNorm`, `scaled_dot_product_attention`, fused AdamW,
``zero_grad(set_to_none=True)``, `torch.inference_mode`, a thread per core. The threads wait as PyTorch's OpenMP has
them wait (they spin for a moment and then sleep), which suits it best; since the contenders pause between their turns,
nobody else is disturbed. Parameter names are ours, which are timm's; PyTorch keeps the matrices transposed.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from minivit.base import params
from minivit.benchmark.contenders import BETAS, EPS, LR, WEIGHT_DECAY, problem
from minivit.layers.patch_embed import sincos2d
from minivit.model import parameter_table
from minivit.training.engines.cut import available_cores


class Attention(nn.Module):
    """Multi-head self-attention (Eq. 5-8), by `scaled_dot_product_attention`: x (B, N, D) -> (B, N, D)."""

    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        size, eps = config.width // config.num_heads, config.layernorm_eps
        self.q_norm, self.k_norm = (nn.LayerNorm(size, eps) if config.qk_norm else nn.Identity() for _ in range(2))
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x):
        B, N, D = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)  # (B, h, N, Dh)
        return self.proj(heads.transpose(1, 2).reshape(B, N, D))


class MLP(nn.Module):
    """The two-layer perceptron of Eq. 3: x (B, N, D) -> (B, N, D)."""

    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_dim)
        self.fc2 = nn.Linear(config.mlp_dim, config.width)
        self.approximate = {"tanh": "tanh", "erf": "none"}[config.gelu]

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class LayerScale(nn.Module):
    """A learned factor for each entry: x (B, N, D) -> (B, N, D)."""

    def __init__(self, config):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((config.width,), config.layer_scale))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """The encoder block, pre-norm (Eq. 2-3): z (B, N, D) -> (B, N, D)."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, config.layernorm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, config.layernorm_eps)
        self.mlp = MLP(config)
        self.ls1, self.ls2 = (LayerScale(config) if config.layer_scale else nn.Identity() for _ in range(2))

    def forward(self, z):
        z = z + self.ls1(self.attn(self.norm1(z)))
        return z + self.ls2(self.mlp(self.norm2(z)))


class PatchEmbed(nn.Module):
    """Patches, each mapped to the width (Eq. 1 without token and position): (B, H, W, C) -> (B, N, D)."""

    def __init__(self, config):
        super().__init__()
        self.grid, self.patch = config.grid_size, config.patch_size
        self.proj = nn.Linear(config.patch_size**2 * config.channels, config.width)

    def forward(self, images):
        B, _, _, C = images.shape
        n, P = self.grid, self.patch
        patches = images.reshape(B, n, P, n, P, C).permute(0, 1, 3, 2, 4, 5).reshape(B, n * n, P * P * C)
        return self.proj(patches)


class ViT(nn.Module):
    """`minivit.model.ViT`: images (B, H, W, C) uint8 -> logits (B, K)."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        if c.pooling == "cls":
            self.cls_token = nn.Parameter(torch.zeros(1, 1, c.width))
        if c.registers:
            self.reg_token = nn.Parameter(torch.zeros(1, c.registers, c.width))
        if c.pos_embed == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, c.num_tokens - c.registers, c.width))
        elif c.pos_embed == "sincos2d":
            fixed = sincos2d(c.grid_size, c.width, prefix_tokens=int(c.pooling == "cls"))
            self.register_buffer("pos_embed", torch.tensor(fixed, dtype=torch.float32), persistent=False)
        self.patch_embed = PatchEmbed(c)
        self.blocks = nn.Sequential(*[Block(c) for _ in range(c.depth)])
        self.norm = nn.LayerNorm(c.width, c.layernorm_eps)
        if c.pooling == "seq":
            self.attention_pool = nn.Linear(c.width, 1)
        if c.pre_logits:
            self.pre_logits = nn.Linear(c.width, c.pre_logits)
        self.head = nn.Linear(c.pre_logits or c.width, c.num_classes)

    def forward(self, images):
        c = self.config
        z = self.patch_embed((images.float() - 127.5) / 127.5)
        if c.pooling == "cls":
            z = torch.cat([self.cls_token.expand(len(z), -1, -1), z], dim=1)
        if c.pos_embed != "none":
            z = z + self.pos_embed
        if c.registers:
            at = int(c.pooling == "cls")
            z = torch.cat([z[:, :at], self.reg_token.expand(len(z), -1, -1), z[:, at:]], dim=1)
        z = self.blocks(z)
        y = z[:, 0] if c.pooling == "cls" else z[:, c.registers :]
        y = self.norm(y.mean(dim=1) if c.pooling == "avg" else y)
        if c.pooling == "mean":
            y = y.mean(dim=1)
        elif c.pooling == "seq":
            y = (self.attention_pool(y).softmax(dim=1).transpose(1, 2) @ y).squeeze(1)
        if c.pre_logits:
            y = self.pre_logits(y).tanh()
        return self.head(y)


def turned(value):
    """A matrix as the other side keeps it; anything else as it is."""
    return value.T if value.ndim == 2 else value


def recorded_event():
    """An event on the stream in use."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(before, after):
    """The seconds between two events."""
    after.synchronize()
    return 1e-3 * before.elapsed_time(after)


class Torch:
    """Eager, or through torch.compile in its default mode."""

    def __init__(self, job, *, compiled=False):
        torch.set_num_threads(available_cores())
        flat, images, labels = problem(job)
        self.task, self.device, self.precision = job.task, torch.device(job.device), job.precision
        self.images, self.labels = (torch.from_numpy(array).to(self.device) for array in (images, labels))
        table = parameter_table(job.config)
        self.model = ViT(job.config)
        named = params.views(flat, table)
        self.model.load_state_dict({name: torch.from_numpy(turned(value)) for name, value in named.items()})
        self.model.to(self.device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = job.precision != "float32"
        if job.device != "cpu":
            self.synchronize, self.device_memory = torch.cuda.synchronize, torch.cuda.max_memory_allocated
            self.event, self.between = recorded_event, between
        self.parameters = dict(self.model.named_parameters())
        groups = [
            {"params": [self.parameters[spec.name] for spec in table if spec.decay is decay],
             "weight_decay": WEIGHT_DECAY if decay else 0.0}
            for decay in (True, False)
        ]  # fmt: skip
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, fused=True)
        self.forward = torch.compile(self.run) if compiled else self.run
        self.settings = {"version": torch.__version__, "threads": torch.get_num_threads(), "compiled": compiled}
        if job.device != "cpu":
            self.settings |= {"device": torch.cuda.get_device_name(), "precision": job.precision}

    def run(self, images, labels):
        """What torch.compile sees: the model and its loss, or the model alone."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits = self.model(images)
            return logits if self.task == "infer" else F.cross_entropy(logits, labels)

    def check(self):
        if self.task == "infer":
            return None, {"logits": self.predict().float().cpu().numpy()}
        loss = self.loss()
        return loss.item(), {name: turned(p.grad.cpu().numpy()) for name, p in self.parameters.items()}

    @torch.inference_mode()
    def predict(self):
        return self.forward(self.images, self.labels)

    def loss(self):
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.forward(self.images, self.labels)
        loss.backward()
        return loss

    def step(self):
        if self.task == "infer":
            self.predict()
            return None
        loss = self.loss()
        self.optimizer.step()
        return loss.detach() if self.device.type == "cuda" else loss.item()  # .item() would wait for the GPU
