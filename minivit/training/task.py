"""What a run learns: a task makes the model, its targets and its loss, tests it, and says how good it is.

`Classification` is one; `minivit.masked.pretrain.MaskedPrediction` has the same attributes and methods:

    settings                            what checkpoints and settings.json say of the task beside model and training
    merit                               what its figure of merit is called
    table()                             the table of the model's parameters
    check()                             raises InputError if nothing can be learned from the data
    model(flat)                         the model around a flat buffer, or (None) a new one on the host
    targets(images, labels, number)     what the loss takes beside the images of the batch with this number
    loss                                the loss of one micro-batch, as an engine takes it: see `cross_entropy`
    accuracy(loss, correct, images)     the figure of merit of so many images, from their mean loss and right guesses
    evaluate(engine, model, dataset)    an `Evaluation` of the test images; the data set's arrays are on the device
    summary()                           what else summary.json says
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from minivit.base.backend import to_host
from minivit.data import with_mirror_images
from minivit.layers.loss import softmax_cross_entropy_backward, softmax_cross_entropy_forward
from minivit.model import ViT, parameter_table


class StepResult(NamedTuple):
    """Figures of one batch; 0-d arrays on the model's device, so that nobody waits for them unless they are read."""

    loss: np.ndarray  # sum of the images' losses / denominator
    correct: np.ndarray  # how many images were classified correctly


class Evaluation(NamedTuple):
    """What a task says of the test images."""

    loss: float
    accuracy: float
    outputs: Any  # what figures are drawn from: logits (n, K) on the host, or None


def correct_count(logits, labels):
    """How many rows have their largest logit at the label (or at the largest soft target)."""
    expected = labels if labels.ndim == 1 else labels.argmax(axis=1)
    return (logits.argmax(axis=1) == expected).sum()


def cross_entropy(model, images, labels, grads, *, denominator=None, rng=None, label_smoothing=0.0, recompute=False):
    """The loss of one micro-batch of classification: adds its gradient into ``grads``.

    Shapes  images (B, H, W, C), labels (B,) or (B, K)  ->  StepResult
    ``denominator`` is the number of images of the whole batch [B]; ``rng`` draws what dropout drops [nothing is];
    with ``recompute`` activations are made again in the backward pass instead of being kept, see `ViT.forward`.
    """
    logits, cache = model.forward(images, rng=rng, recompute=recompute)
    loss, loss_cache = softmax_cross_entropy_forward(
        logits, labels, label_smoothing=label_smoothing, denominator=denominator
    )
    dlogits = softmax_cross_entropy_backward(1.0, loss_cache)
    model.backward(dlogits, cache, grads)
    return StepResult(loss, correct_count(logits, labels))


class Classification:
    """The task of a run with labels."""

    merit, settings = "accuracy", {}

    def __init__(self, dataset, model_config, config):
        self.model_config, self.config = model_config, config
        self.loss = partial(cross_entropy, label_smoothing=config.label_smoothing, recompute=config.recompute)

    def table(self):
        """See the head of this file, as for all methods."""
        return parameter_table(self.model_config)

    def check(self):
        pass

    def model(self, flat=None):
        return ViT(self.model_config, seed=self.config.seed, flat=flat)

    def targets(self, images, labels, number):
        return labels

    def accuracy(self, loss, correct, images):
        return correct / images

    def evaluate(self, engine, model, dataset):
        def predict(images):
            return to_host(engine.predict(images, model))

        logits = with_mirror_images(predict, dataset.test_images, self.config.test_flip)
        labels = to_host(dataset.test_labels)
        loss, _ = softmax_cross_entropy_forward(logits.astype(np.float64), labels)
        return Evaluation(float(loss), float((logits.argmax(axis=1) == labels).mean()), logits)

    def summary(self):
        return {}
