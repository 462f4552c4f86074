"""What a run will do: its settings, complete and known to fit model, data and machine, and the steps that they mean."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from minivit.base import params as parameters
from minivit.base.backend import erf, find_device
from minivit.base.errors import InputError
from minivit.base.words import counted
from minivit.data import is_lazy
from minivit.data.source import check_fit
from minivit.model import ViT, ViTConfig, parameter_table
from minivit.optim import learning_rate
from minivit.training.config import TrainConfig
from minivit.training.engines.cut import cut


class Plan(NamedTuple):
    """What a run will do."""

    model: ViTConfig
    config: TrainConfig  # with the numbers in place of 0 that a run chooses: workers, micro_batch, epochs
    device: str  # "cpu", "cuda:0", ...
    images: int  # of the training set
    steps_per_epoch: int
    total_steps: int
    small_epochs: int  # the first of the epochs, on images of half the size
    frozen: list  # names of the parameters that stay as they are

    @property
    def images_in_all(self):
        """How many images all steps take."""
        c = self.config
        last = self.total_steps - (c.epochs - 1) * self.steps_per_epoch  # steps of the last epoch
        return (c.epochs - 1) * self.images + min(self.images, last * c.batch_size * c.accumulate)

    def learning_rate(self, step):
        """The learning rate of a step, counted from 0."""
        c = self.config
        warmup = min(c.warmup_steps or round(c.warmup_epochs * self.steps_per_epoch), self.total_steps // 2)
        return learning_rate(
            step, self.total_steps, lr=c.lr, schedule=c.schedule, final_lr=c.final_lr, warmup_steps=warmup,
            cooldown=c.cooldown,
        )  # fmt: skip


FEW_STEPS = 300  # with fewer, a model that begins with nothing has hardly begun to learn
STEPS, PASSES, BATCHES = 1000, 20, (16, 128)  # of a fitted run: about so many steps, least passes, batch sizes


def fitted(settings, images):
    """The settings of a training, a dict, with a batch size and epochs that suit so many images where they have none.

    The batch is a power of two, about a sixth of the images, and within `BATCHES`; the epochs make some `STEPS`
    optimiser steps, and at least `PASSES` passes.
    """
    settings, (low, high) = dict(settings), BATCHES
    batch = settings.setdefault("batch_size", min(max(2 ** round(math.log2(max(images, 1) / 6)), low), high))
    if not settings.get("steps") and "epochs" not in settings:
        per_epoch = -(-images // (batch * settings.get("accumulate", 1)))
        settings["epochs"] = max(PASSES, -(-STEPS // max(per_epoch, 1)))
    return settings


def warning_of(plan, start=None):
    """One line that says what to change where a run from nothing makes few steps, or "" where it does not."""
    steps, c = plan.total_steps, plan.config
    if steps >= FEW_STEPS or start:
        return ""
    size = c.batch_size * c.accumulate
    smaller = f", or a smaller --batch-size than {c.batch_size}" if size > BATCHES[0] else ""
    epochs = -(-STEPS // plan.steps_per_epoch)
    return (
        f"{counted(steps, 'optimiser step')} in all ({plan.images:,} images in batches of {size}): a model that begins "
        f"with nothing learns little in fewer than {FEW_STEPS}; take more, such as --epochs {epochs}{smaller}"
    )


def plan_of(dataset, model_config, config, task, *, start=None):
    """The `Plan` of a run of a task; nothing is allocated.

    ``start``: see `minivit.weights.start.Start`, or None.
    Raises  InputError: settings, model, data and machine do not fit together.
    """
    device = find_device(config.device)
    if config.check_finite and device != "cpu":
        raise InputError("check_finite looks at every tensor on the CPU; leave it out, or take --device cpu")
    if not (n := len(dataset.train_images)):
        raise InputError(f"{dataset.source} has no training images: there is nothing to learn from")
    workers, micro_batch = cut(model_config, config.batch_size)
    config = replace(
        config, workers=config.workers or workers, micro_batch=config.micro_batch or micro_batch
    )  # fmt: skip
    steps_per_epoch = -(-n // (config.batch_size * config.accumulate))
    if config.steps:
        config = replace(config, epochs=-(-config.steps // steps_per_epoch))
    if start and (config.init != "official" or config.whiten):
        raise InputError("a run that begins with another model's parameters takes no --init and no --whiten")
    check_fit(dataset, model_config)
    _check_augmentation(dataset, config)
    _check_memory(model_config, config)
    if model_config.gelu == "erf":
        erf(np.zeros(1))  # SciPy is optional: say so before anything is written
    table = task.table()
    frozen = parameters.frozen_names(table, config.freeze) if config.freeze else []
    small_epochs = round(config.half_size * config.epochs)
    if small_epochs:  # refuses what cannot be halved
        ViT(model_config, flat=np.empty(parameters.count(table), np.float32)).at_half_size()
    total_steps = config.steps or config.epochs * steps_per_epoch
    return Plan(model_config, config, device, n, steps_per_epoch, total_steps, small_epochs, frozen)


def _check_augmentation(dataset, config):
    height = dataset.train_images.shape[1]
    if config.crop_padding >= height:
        raise InputError(
            f"crop_padding {config.crop_padding} moves whole images out of sight; they have {height} pixels"
        )
    if config.crop_area and not is_lazy(dataset.train_images):
        raise InputError(
            "crop_area cuts parts out of images as their files are read, which is done with data imagefolder "
            f"alone; those of {dataset.name} are in memory, all of one size: leave it 0"
        )


def _check_memory(model, config):
    """Raises InputError if training the model takes more memory than the machine has."""
    one, two = (parameters.count(parameter_table(replace(model, depth=depth))) for depth in (1, 2))
    count = one + (model.depth - 1) * (two - one)
    # parameters, decay mask, the optimiser's vectors, the average, and a gradient per worker; 4 bytes each
    vectors = 2 + (1 if config.optimizer == "sgd" else 2) + bool(config.ema_decay) + config.workers
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if 4 * vectors * count > memory:
            raise InputError(
                f"the model has {count:,} parameters, training it takes at least {4e-9 * vectors * count:,.0f} GB of "
                f"memory, this machine has {1e-9 * memory:,.0f}; choose a smaller width, depth, mlp_dim or preset, or "
                "fewer workers"
            )
