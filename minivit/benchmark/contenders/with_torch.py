"""The Vision Transformer of `minivit.laboratory.torch_vit` at work: ``torch`` and ``torch-compile``.

Its fastest ordinary settings: fused AdamW, ``zero_grad(set_to_none=True)``, `torch.inference_mode`, a thread per core.
The threads wait as PyTorch's OpenMP has them wait (they spin for a moment and then sleep), which suits it best; since
the contenders pause between their turns, nobody else is disturbed.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from minivit.base import params
from minivit.benchmark.contenders import BETAS, EPS, LR, WEIGHT_DECAY, problem
from minivit.laboratory.torch_vit import ViT, turned
from minivit.model import parameter_table
from minivit.training.engines.cut import available_cores


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
        self.model.load(params.views(flat, table))
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
