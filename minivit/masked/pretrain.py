"""Self-supervised runs: the loop of `minivit.training.trainer` with the task of `minivit.masked`, and their checkpoints.

What is masked in a batch is drawn from a Generator seeded by the run's seed and the batch's number, on the host, and in
the test pictures always by the same one. So a run resumes bit for bit, does not depend on its threads' micro-batches,
and sees the same masks on a GPU.

In metrics.jsonl and on the figures "accuracy" is the share of right guesses at the masked patches. It is to be compared
with ``chance``: how often the most frequent colour would be right. For regression it is the share of the variance that
is explained, 1 - loss / loss of the best constant prediction, of which chance is 0.

A checkpoint holds the encoder as an ordinary ViT (``params/NAME``, with a zero head of as many classes as the data
have), what pre-training added beside it, and in its meta ``pretraining``, the settings of `MaskedConfig`.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict

import numpy as np

from minivit.base.backend import array_module, to_device, to_host
from minivit.base.errors import InputError
from minivit.base.settings import settings_of
from minivit.kernels import cuda
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
from minivit.training.engine import Engine, StepResult
from minivit.training.engine_cuda import CudaEngine
from minivit.training.trainer import CURVES, METRICS, RECONSTRUCTIONS, Trainer, read_metrics
from minivit.weights import checkpoint
from minivit.weights.layouts import load_any

MASK_STREAM, TEST_STREAM = 4, 5  # random numbers apart from those of shuffling (1), augmentation (2) and dropout (3)
TEST_SEED = 0  # the test pictures are masked alike in all runs
CHUNK = 500  # pictures that are read at a time, for `chance_of`
PICTURES = 12  # that a figure shows


class _MaskedTask:
    """What an engine does with a micro-batch of pictures and their plan; comes before `Engine` or `CudaEngine`."""

    def forward_backward(self, images, plan, grads, denominator, rng):
        """One micro-batch: adds its gradient into ``grads`` and returns its `StepResult`."""
        prediction, cache = self.model.forward(images, plan, rng=rng, recompute=self.recompute)
        targets = self.model.targets(images, plan)
        loss, right, loss_cache = patch_loss(prediction, targets, self.model.classes, denominator=denominator)
        self.model.backward(patch_loss_gradient(1.0, loss_cache), cache, grads)
        return StepResult(loss, right)

    def measure(self, images, plan, model=None):
        """Mean loss of many pictures and how many guesses are right, streamed through the workers: `StepResult`."""
        model, size = model or self.model, self.predicted
        starts = range(0, len(images), size)
        xp = array_module(model.flat)
        results = [None] * len(starts)

        def work(i):
            part = slice(starts[i], starts[i] + size)
            pictures = xp.asarray(images[part])  # those of a folder are read now
            prediction, _ = model.forward(pictures, plan[part])
            targets = model.targets(pictures, plan[part])
            results[i] = patch_loss(prediction, targets, model.classes, denominator=len(images))[:2]

        with cuda.rounded(model.flat) if xp is not np else nullcontext():
            self.each(work, range(len(starts)))
        return StepResult(sum(loss for loss, _ in results), sum(right for _, right in results))


class MaskedEngine(_MaskedTask, Engine):
    """`Engine` for a `MaskedViT`: plans (B, 2, N) stand where labels do otherwise."""


class MaskedCudaEngine(_MaskedTask, CudaEngine):
    """`CudaEngine` for a `MaskedViT`."""

    def measure(self, images, plan, model=None):
        """See `_MaskedTask.measure`; pictures that do not fit into memory are cut, see `CudaEngine.fitting`."""
        return self.fitting(
            "predicted", len(images), lambda: super(MaskedCudaEngine, self).measure(images, plan, model)
        )


def plan_of_test(config, masked, count, seed=TEST_SEED):
    """What is masked of ``count`` test pictures, the whole set: by default the same in all runs."""
    return draw_plan(config, masked, count, np.random.default_rng([seed, TEST_STREAM]))


def chance_of(images, config, masked, plan):
    """What a prediction that does not look at the pictures reaches: (share of right guesses, loss).

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
    seen = frequency[frequency > 0]
    return float(frequency.max()), float(-(seen * np.log(seen)).sum())


class Pretrainer(Trainer):
    """A self-supervised run; see `Trainer`.

    Raises  InputError: settings that mean nothing without classes, or that do not fit the model.
    """

    engines = (MaskedEngine, MaskedCudaEngine)

    def __init__(self, dataset, model_config, config, out, *, masked, **keywords):
        unusable = ("half_size", "label_smoothing", "mixup", "cutmix", "test_flip")
        if asked := [name for name in unusable if getattr(config, name)]:
            raise InputError(f"{asked[0]} means nothing in pre-training; leave it out")
        check_fit(model_config, masked)
        self.masked, self.task = masked, {"pretraining": asdict(masked)}
        self.merit = "accuracy" if classes(model_config, masked) else "explained"
        super().__init__(dataset, model_config, config, out, **keywords)
        test_plan = plan_of_test(model_config, masked, len(dataset.test_images))
        self.chance, self.chance_loss = chance_of(dataset.test_images, model_config, masked, test_plan)
        if not classes(model_config, masked) and not self.chance_loss:
            raise InputError("the test pictures are all of one colour: there is nothing to predict")
        self._test_plan = to_device(test_plan, self.device)

    def _model(self, flat=None):
        return MaskedViT(self.model_config, self.masked, seed=self.config.seed, flat=flat)

    def _targets(self, images, labels, number):
        rng = np.random.default_rng([self.config.seed, MASK_STREAM, number])
        return to_device(draw_plan(self.model_config, self.masked, len(images), rng), self.device)

    def _accuracy(self, loss, correct, pictures):
        if not self.model.classes:
            return 1.0 - loss / self.chance_loss
        per_patch = 1 if self.masked.target == "colour" else 16
        return correct / (pictures * self.model.predicted * per_patch)

    def _evaluate(self, engine):
        images, _ = self._test_data
        result = engine.measure(images, self._test_plan, self.tested_model)
        loss = float(result.loss)
        return loss, self._accuracy(loss, int(result.correct), len(images)), None

    def _draw(self, outputs):
        from minivit import figures  # matplotlib is slow to import, and only the end needs it

        title = f"{self.dataset.name}, {self.masked.method}"
        chance = {"loss": self.chance_loss, "accuracy": self.chance}
        records = read_metrics(self.out / METRICS)
        figures.save_masked_curves(
            self.out / CURVES, records, chance=chance, regression=not self.model.classes, title=title
        )
        model = MaskedViT(self.model_config, self.masked, flat=to_host(self.tested_model.flat))
        draw_reconstructions(self.out / RECONSTRUCTIONS, model, self.dataset, title=title)

    def _summary(self):
        return {"chance_accuracy": self.chance, "chance_loss": self.chance_loss, "predicted": self.model.predicted}


def load_masked(path, *, weights="auto"):
    """A `MaskedViT` from a checkpoint of pre-training, and the checkpoint's meta.

    ``weights`` are as in `checkpoint.load_model`.
    Raises  InputError: it is damaged, or not one of pre-training.
    """
    _, meta, _ = load_any(path, weights=weights, named=False)  # the encoder alone: refuses what does not fit together
    masked, config = masked_of(meta, path), checkpoint.config_of(meta, path)
    arrays, _ = checkpoint.load(path)
    table = masked_table(config, masked)
    flat = np.empty(sum(spec.size for spec in table), np.float32)
    checkpoint.fill(flat, table, arrays, meta["weights"], path)
    return MaskedViT(config, masked, flat=flat), meta


def masked_of(meta, path):
    """The `MaskedConfig` that a checkpoint's meta describes.

    Raises  InputError: there is none, or it holds unknown or impossible settings.
    """
    settings = meta.get("pretraining")
    if not isinstance(settings, dict):
        raise InputError(f"{path} is not of pre-training; minivit pretrain makes such checkpoints")
    return settings_of(MaskedConfig, settings, path)


def reconstructions(model, images, plan):
    """Rows of pictures (B, H, W, C) uint8 by their names: as they are, as the model sees them, with what it predicts.

    Where the targets are classes there is a row of these too, the best that a prediction can be.
    """
    c, m = model.config, model.masked
    prediction, _ = model.forward(images, plan)
    rows = {"picture": images, "seen": shown(images, plan, c, m), "predicted": painted(images, plan, prediction, c, m)}
    if model.classes:
        rows["target"] = painted(images, plan, model.targets(images, plan), c, m)
    return rows


def draw_reconstructions(path, model, dataset, *, count=PICTURES, seed=TEST_SEED, title=""):
    """Write the figure of `reconstructions` of test pictures, evenly spaced over the set.

    ``seed`` masks other patches than the tests do.
    """
    from minivit import figures

    images = dataset.test_images
    chosen = np.linspace(0, len(images) - 1, min(count, len(images))).astype(int)
    plan = plan_of_test(model.config, model.masked, len(images), seed)[chosen]
    if model.masked.target == "normalised":
        title += "; the predicted patches with the true mean and standard deviation of each"
    figures.save_contact_sheet(path, reconstructions(model, images[chosen], plan), title=title)
