"""The figures at the end of a run: what `minivit.training.trainer.Trainer` takes as ``draw``."""

from __future__ import annotations

import numpy as np

from minivit import figures
from minivit.base.backend import to_host
from minivit.masked import MaskedViT
from minivit.masked.pretrain import TEST_SEED, plan_of_test, reconstructions
from minivit.training.folder import CURVES, METRICS, PREDICTIONS, RECONSTRUCTIONS, read_metrics

IMAGES = 12  # that a figure of reconstructions shows


def draw_classification(run, logits):
    """The curves of a run with labels, and some of the test images with what it predicts."""
    data = run.dataset
    figures.save_curves(
        run.out / CURVES, read_metrics(run.out / METRICS), title=data.name,
        training=figures.training_label(run.config),
    )  # fmt: skip
    figures.save_predictions(run.out / PREDICTIONS, data.test_images, data.test_labels, logits, data.class_names)


def draw_masked(run, outputs):
    """The curves of a run of pre-training, and what it sees and predicts of some of the test images."""
    task = run.task
    title = f"{run.dataset.name}, {task.masked.method}"
    accuracy, loss = task.chance
    figures.save_masked_curves(
        run.out / CURVES, read_metrics(run.out / METRICS), chance={"loss": loss, "accuracy": accuracy},
        regression=not task.classes, title=title,
    )  # fmt: skip
    model = MaskedViT(task.model_config, task.masked, flat=to_host(run.tested_model.flat))
    draw_reconstructions(run.out / RECONSTRUCTIONS, model, run.dataset, title=title)


def draw_reconstructions(path, model, dataset, *, count=IMAGES, seed=TEST_SEED, title=""):
    """Write the figure of `reconstructions` of test images, evenly spaced over the set.

    ``seed`` masks other patches than the tests do.
    """
    images = dataset.test_images
    rows = np.linspace(0, len(images) - 1, min(count, len(images))).astype(int)
    plan = plan_of_test(model.config, model.masked, len(images), seed)[rows]
    if model.masked.target == "normalised":
        title += "; the predicted patches with the true mean and standard deviation of each"
    figures.save_contact_sheet(path, reconstructions(model, images[rows], plan), title=title)
