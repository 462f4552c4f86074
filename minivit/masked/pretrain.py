"""Self-supervised runs: what they learn, as a task of `minivit.training.task`, and their checkpoints.

What is masked in a batch is drawn from a Generator seeded by the run's seed and the batch's number, on the host, and in
the test images always by the same one. So a run resumes bit for bit, does not depend on its threads' micro-batches,
and sees the same masks on a GPU.

In metrics.jsonl and on the figures "accuracy" is the share of right guesses at the masked patches. It is to be compared
with ``chance``: how often the most frequent colour would be right. For regression it is the share of the variance that
is explained, 1 - loss / loss of the best constant prediction, of which chance is 0.

A checkpoint holds the encoder as an ordinary ViT (``params/NAME``, with a zero head of as many classes as the data
have), what pre-training added beside it, and in its meta ``pretraining``, the settings of `MaskedConfig`.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property, partial

import numpy as np

from minivit.base.backend import array_module
from minivit.base.errors import InputError
from minivit.base.settings import settings_of
from minivit.masked import (
    MaskedConfig,
    MaskedViT,
    check_fit,
    classes,
    draw_plan,
    masked_table,
    painted,
    patch_loss,
    patch_loss_gradient,
    patch_targets,
    predicted_count,
    shown,
)
from minivit.training.task import Evaluation, StepResult
from minivit.weights import checkpoint
from minivit.weights.layouts import is_readable

MASK_STREAM, TEST_STREAM = 4, 5  # random numbers apart from those of shuffling (1), augmentation (2) and dropout (3)
TEST_SEED = 0  # the test images are masked alike in all runs
CHUNK = 500  # images that are read at a time, for `chance_of`


def masked_loss(model, images, plan, grads, *, denominator=None, rng=None, recompute=False):
    """The loss of one micro-batch of images and their plan (B, 2, N): adds its gradient into ``grads``.

    See `minivit.training.task.cross_entropy`.
    """
    prediction, cache = model.forward(images, plan, rng=rng, recompute=recompute)
    loss, right, loss_cache = patch_loss(
        prediction, model.targets(images, plan), model.classes, denominator=denominator
    )  # fmt: skip
    model.backward(patch_loss_gradient(1.0, loss_cache), cache, grads)
    return StepResult(loss, right)


def measure(engine, model, images, plan):
    """Mean loss of many images and how many guesses are right, streamed through an engine: `StepResult`."""
    xp = array_module(model.flat)

    def part_of(part):
        pixels = xp.asarray(images[part])  # those of a folder are read now
        prediction, _ = model.forward(pixels, plan[part])
        return patch_loss(prediction, model.targets(pixels, plan[part]), model.classes, denominator=len(images))[:2]

    results = engine.stream(part_of, len(images), model)
    return StepResult(sum(loss for loss, _ in results), sum(right for _, right in results))


def plan_of_test(config, masked, count, seed=TEST_SEED):
    """What is masked of ``count`` test images, the whole set: by default the same in all runs."""
    return draw_plan(config, masked, count, np.random.default_rng([seed, TEST_STREAM]))


def chance_of(images, config, masked, plan):
    """What a prediction that does not look at the images reaches: (share of right guesses, loss).

    The guess is the most frequent class, or the mean of the targets; the loss is the entropy of the classes, or the
    mean squared distance from the mean.
    """
    counts = np.zeros(classes(config, masked), np.int64)
    count, mean, scatter = 0, 0.0, 0.0  # of the numbers of a patch, for regression
    for i in range(0, len(plan), CHUNK):
        part = plan[i : i + CHUNK, 0, : predicted_count(config, masked)]
        targets = patch_targets(images[i : i + CHUNK], config, masked)[np.arange(len(part))[:, None], part]
        if len(counts):
            counts += np.bincount(targets.ravel(), minlength=len(counts))
            continue
        numbers = targets.reshape(-1, targets.shape[-1]).astype(np.float64)
        n, step = len(numbers), numbers.mean(axis=0) - mean
        scatter += n * numbers.var(axis=0) + step * step * (count * n / (count + n))
        mean += step * (n / (count + n))
        count += n
    if not len(counts):
        return 0.0, float((scatter / count).mean())
    frequency = counts / counts.sum()
    present = frequency[frequency > 0]
    return float(frequency.max()), float(-(present * np.log(present)).sum())


class MaskedPrediction:
    """The task of a self-supervised run; the methods are those that `minivit.training.task` describes.

    Raises  InputError: settings that mean nothing without classes, or that do not fit the model.
    """

    def __init__(self, dataset, model_config, config, *, masked):
        unusable = ("half_size", "label_smoothing", "mixup", "cutmix", "test_flip")
        if given := [name for name in unusable if getattr(config, name)]:
            raise InputError(f"{given[0]} means nothing in pre-training; leave it out")
        check_fit(model_config, masked)
        self.test_images, self.model_config, self.config, self.masked = (
            dataset.test_images, model_config, config, masked,
        )  # fmt: skip
        self.settings = {"pretraining": asdict(masked)}
        self.classes, self.predicted = classes(model_config, masked), predicted_count(model_config, masked)
        self.merit = "accuracy" if self.classes else "explained"
        self.loss = partial(masked_loss, recompute=config.recompute)

    def table(self):
        return masked_table(self.model_config, self.masked)

    def check(self):
        if not self.classes and not self.chance[1]:
            raise InputError("the test images are all of one colour: there is nothing to predict")

    def model(self, flat=None):
        return MaskedViT(self.model_config, self.masked, seed=self.config.seed, flat=flat)

    def targets(self, images, labels, number):
        rng = np.random.default_rng([self.config.seed, MASK_STREAM, number])
        plan = draw_plan(self.model_config, self.masked, len(images), rng)
        return array_module(images).asarray(plan)

    @cached_property
    def test_plan(self):
        """What is masked of the test images."""
        return plan_of_test(self.model_config, self.masked, len(self.test_images))

    @cached_property
    def chance(self):
        """See `chance_of`."""
        return chance_of(self.test_images, self.model_config, self.masked, self.test_plan)

    def accuracy(self, loss, correct, images):
        if not self.classes:
            return 1.0 - loss / self.chance[1]
        per_patch = 1 if self.masked.target == "colour" else 16
        return correct / (images * self.predicted * per_patch)

    def evaluate(self, engine, model, dataset):
        plan = array_module(model.flat).asarray(self.test_plan)
        result = measure(engine, model, dataset.test_images, plan)
        loss = float(result.loss)
        return Evaluation(loss, self.accuracy(loss, int(result.correct), len(plan)), None)

    def summary(self):
        accuracy, loss = self.chance
        return {"chance_accuracy": accuracy, "chance_loss": loss, "predicted": self.predicted}


def load_masked(path, *, weights="auto"):
    """A `MaskedViT` from a checkpoint of pre-training, and the checkpoint's `Record`.

    ``weights`` are as in `checkpoint.flat_parameters`.
    Raises  InputError: it is damaged, or not one of pre-training.
    """
    if is_readable(path):
        raise InputError(f"{path} is not of pre-training; minivit pretrain makes such checkpoints")
    arrays, record = checkpoint.read(path)
    masked = masked_of(record)
    flat, prefix = checkpoint.flat_parameters(arrays, record, lambda: masked_table(record.config, masked), weights)
    return MaskedViT(record.config, masked, flat=flat), record._replace(weights=prefix)


def masked_of(record):
    """The `MaskedConfig` that a checkpoint's `Record` describes.

    Raises  InputError: there is none, or it holds unknown or impossible settings.
    """
    if record.pretraining is None:
        raise InputError(f"{record.path} is not of pre-training; minivit pretrain makes such checkpoints")
    return settings_of(MaskedConfig, record.pretraining, record.path)


def reconstructions(model, images, plan):
    """Rows of images (B, H, W, C) uint8 by their names: as they are, as the model sees them, with what it predicts.

    Where the targets are classes there is a row of these too, the best that a prediction can be.
    """
    c, m = model.config, model.masked
    prediction, _ = model.forward(images, plan)
    rows = {"image": images, "seen": shown(images, plan, c, m), "predicted": painted(images, plan, prediction, c, m)}
    if model.classes:
        rows["target"] = painted(images, plan, model.targets(images, plan), c, m)
    return rows
