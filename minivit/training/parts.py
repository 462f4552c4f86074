"""What a run is made of, from its plan: data on the device, first parameters, optimiser, engine."""

from __future__ import annotations

from minivit.base import params as parameters
from minivit.base.backend import kernels_wanted, to_device
from minivit.data import is_lazy
from minivit.kernels import cuda
from minivit.model.initialisation import mimetic, whiten
from minivit.optim import make_optimizer
from minivit.training.engines.cpu import Engine
from minivit.training.engines.gpu import CudaEngine


def dataset_on_device(dataset, device):
    """The data set with its arrays on a device; images that are files stay files."""
    names = ("train_images", "train_labels", "test_images", "test_labels")
    arrays = {name: getattr(dataset, name) for name in names}
    return dataset._replace(**{k: a if is_lazy(a) else to_device(a, device) for k, a in arrays.items()})


def first_parameters(task, dataset, config):
    """The flat parameters of a run from nothing, on the host."""
    model = task.model()
    if config.init == "mimetic":
        mimetic(model, seed=config.seed)
    if config.whiten:
        whiten(model, dataset.train_images, dataset.train_labels, seed=config.seed)
    return model.flat


def optimizer_of(plan, model, table):
    """The optimiser of a plan, and what the gradient is multiplied by, 0 for frozen parameters, or None."""
    c, device, trained, scale = plan.config, plan.device, None, None
    if c.layer_decay < 1.0:
        scale = to_device(parameters.layer_scale(table, c.layer_decay), device)
    decayed = table
    if plan.frozen:
        decayed, trained = parameters.freeze(table, plan.frozen)
        trained = to_device(trained, device)
    optimizer = make_optimizer(
        c.optimizer, model.flat, to_device(parameters.decay_mask(decayed), device), table=table, momentum=c.momentum,
        beta1=c.beta1, beta2=c.beta2, eps=c.adam_eps, weight_decay=c.weight_decay, scale=scale,
    )  # fmt: skip
    return optimizer, trained


def engine_of(plan, task, model, trained, *, half_size=False):
    """The engine of a plan for a task's model, a context manager; ``trained`` is what `optimizer_of` says.

    With ``half_size``, for images of half the size: four times as many make a micro-batch of as many patches.
    """
    c, times = plan.config, 1
    if half_size:
        model, times = model.at_half_size(), 4
    if plan.device == "cpu":
        return Engine(
            model, task.loss, workers=c.workers, micro_batch=times * c.micro_batch, seed=c.seed, trained=trained
        )
    if kernels_wanted():
        cuda.machine().precision = c.precision
    return CudaEngine(model, task.loss, micro_batch=times * c.gpu_micro_batch, seed=c.seed, trained=trained)
