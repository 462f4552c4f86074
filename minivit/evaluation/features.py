"""What a model's frozen features are worth, beside an untrained model's and the pixels themselves."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from minivit.base.backend import device_name
from minivit.base.errors import InputError
from minivit.evaluation.inference import check_finite, predict_all
from minivit.evaluation.transfer import (
    L2,
    NEIGHBOURS,
    PENALTIES,
    SHOTS,
    TEMPERATURE,
    accuracy,
    check_neighbours,
    few_shot,
    nearest_neighbours,
    probe,
)
from minivit.layers.patch_embed import scale_pixels
from minivit.model import ViT
from minivit.training.sweep import mean_and_spread

METHODS = ("fewshot", "probe", "knn")
CHUNK = 1000  # images whose pixels are scaled at a time


class Study(NamedTuple):
    """How features are measured."""

    method: str = "fewshot"
    shots: tuple[int, ...] = SHOTS  # fewshot: examples of each class
    seeds: tuple[int, ...] = (0, 1, 2)  # fewshot: which examples; probe: which images choose the penalty
    k: int = NEIGHBOURS  # knn: neighbours
    temperature: float = TEMPERATURE  # knn: a neighbour of cosine s has the weight exp(s / T)

    @property
    def settings(self):
        """What the method depends on, for JSON."""
        return {
            "fewshot": {"l2": L2}, "probe": {"penalties": PENALTIES},
            "knn": {"k": self.k, "temperature": self.temperature},
        }[self.method]  # fmt: skip


STUDY = Study()  # few-shot, as in the ViT paper


def pixels_of(images):
    """Pixels as features: (n, H W C) float32 in [-1, 1]."""
    chunks = [np.asarray(images[i : i + CHUNK]) for i in range(0, len(images), CHUNK)]
    return np.concatenate([scale_pixels(chunk, np.float32).reshape(len(chunk), -1) for chunk in chunks])


def accuracies_of(study, train, test, dataset):
    """What the method says of one kind of features: a list of dicts, one for each number of shots.

    Shapes  train (n, d), test (m, d), those of the data set's images
    """
    labels, truth, K = dataset.train_labels, dataset.test_labels, len(dataset.class_names)
    if study.method == "knn":
        votes = nearest_neighbours(train, labels, test, K, k=study.k, temperature=study.temperature)
        return [with_mean([{"accuracy": accuracy(votes, truth)}])]
    if study.method == "probe":
        runs = []
        for seed in study.seeds:
            selection = probe(train, labels, K, seed=seed)
            score = accuracy(selection.classifier.scores(test), truth)
            runs.append({"seed": seed, "l2": selection.l2, "accuracy": score})
        return [with_mean(runs)]
    scores = {seed: few_shot(train, labels, test, truth, K, shots=study.shots, seed=seed) for seed in study.seeds}
    return [
        {"shots": count} | with_mean([{"seed": seed, "accuracy": scores[seed][count]} for seed in study.seeds])
        for count in study.shots
    ]


def with_mean(runs):
    """Runs with their mean accuracy and its spread, for JSON."""
    mean, spread = mean_and_spread([run["accuracy"] for run in runs])
    return {"runs": runs, "mean": mean, "spread": spread}


def check_study(study, dataset):
    """Raises InputError if there is nothing to fit a classifier to, or too little for the method."""
    if not len(dataset.train_labels):
        raise InputError(f"{dataset.source} has no training images: there is nothing to fit a classifier to")
    if study.method == "knn":
        check_neighbours(len(dataset.train_labels), study.k, study.temperature)


def transfer_results(
    path, model, record, dataset, study=STUDY, *, untrained=False, pixels=False, workers=0, device="cpu"
):  # fmt: skip
    """Accuracies of simple classifiers on the features of a checkpoint's model: a dict for JSON.

    ``untrained`` and ``pixels``: compare with the same model, initialised at random, and with the pixels.
    Raises  InputError: see `check_study`; the features are not finite numbers.
    """
    check_study(study, dataset)
    splits = dataset.train_images, dataset.test_images

    def features_of(model):
        parts = [predict_all(model, images, workers=workers, device=device, features=True) for images in splits]
        for features in parts:
            check_finite(features, path, "features")
        return parts

    kinds = {"trained": lambda: features_of(model)}
    if untrained:
        seed = (record.settings or {}).get("seed", 0)
        kinds["untrained"] = lambda: features_of(ViT(model.config, seed=seed))
    if pixels:
        kinds["pixels"] = lambda: [pixels_of(images) for images in splits]
    rows = []
    for name, features in kinds.items():
        train, test = features()
        accuracies = accuracies_of(study, train, test, dataset)
        rows.append({"features": name, "dimensions": train.shape[1], "accuracies": accuracies})
    return {
        "checkpoint": str(path),
        "weights": record.weights,
        "data": dataset.name,
        "source": dataset.source,
        "classes": len(dataset.class_names),
        "train_images": len(splits[0]),
        "test_images": len(splits[1]),
        "device": device_name(device),
        "method": study.method,
        **study.settings,
        "rows": rows,
    }


def transfer_stem(method, dataset):
    """The name, without its ending, of the files that hold the results."""
    return f"transfer-{method}-{dataset.name}"
