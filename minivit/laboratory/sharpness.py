"""Curvature along a run: the run is made again, in memory, and the largest eigenvalues are measured as it goes."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from minivit.base.backend import find_device, to_host
from minivit.laboratory import curvature
from minivit.laboratory.diagnosis import diagnose
from minivit.training.trainer import Trainer


def spectrum_facts(spectrum):
    """A `curvature.Spectrum` without its vectors, ready for JSON."""
    return {name: getattr(spectrum, name).tolist() for name in ("eigenvalues", "residuals", "converged")}


def largest_in_words(facts):
    """The largest eigenvalue, with how far it may be off where it has not converged."""
    value, residual, converged = (facts[name][0] for name in ("eigenvalues", "residuals", "converged"))
    return f"{value:9.3g}" if converged else f"{value:9.3g} +- {residual:.2g}"


def along_training(dataset, config, settings, images, labels, *, every, count, steps):
    """Train once more and measure: a record per measurement, ready for JSON, and the parameters at the end.

    ``every`` epochs, ``count`` eigenvalues by at most ``steps`` Hessian-vector products
    Returns  (records, flat (n,) float32), or None if it was stopped
    """
    records = []

    def measure(trainer):
        if not trainer.state.epoch % every or trainer.state.epoch == settings.epochs:
            record = record_of(trainer, config, settings, images, labels, count=count, steps=steps)
            show(record)
            records.append(record)

    quiet = replace(settings, evaluate_every=settings.epochs, checkpoint_seconds=1e9)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            dataset, config, quiet, Path(folder) / "run", progress=False, diagnose=diagnose, on_epoch=measure
        )
        if trainer.run() is None:
            return None
    return records, to_host(trainer.model.flat)


def record_of(trainer, config, settings, images, labels, *, count, steps):
    """The loss, its curvature and the edge of stability at the end of a trainer's epoch: a dict for JSON."""
    how = {"label_smoothing": settings.label_smoothing, "device": find_device(settings.device)}
    flat = to_host(trainer.model.flat).astype(np.float64)
    loss, _ = curvature.loss_gradient(config, flat, images, labels, **how)
    spectrum = curvature.sharpness(config, flat, images, labels, count=count, steps=steps, **how)
    lr = trainer.learning_rate(trainer.state.step - 1)
    record = {"epoch": trainer.state.epoch, "loss": float(loss), "lr": lr} | spectrum_facts(spectrum)
    record["edge"] = curvature.stability_edge(trainer.optimizer, lr) if lr else None
    if (scale := curvature.adam_scale(trainer.optimizer)) is not None:
        spectrum = curvature.sharpness(config, flat, images, labels, scale=scale, steps=steps, **how)
        record["preconditioned"] = spectrum_facts(spectrum)
    return record


def show(record):
    """Print a record as a line."""
    text = f"largest eigenvalue {largest_in_words(record)}"
    if "preconditioned" in record:
        text += f", as Adam sees it {largest_in_words(record['preconditioned'])}"
    text += f", edge {record['edge']:9.3g}" if record["edge"] is not None else ""
    print(f"epoch {record['epoch']:4d}  loss {record['loss']:.4f}  {text}", flush=True)
