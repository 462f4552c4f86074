r"""The Visual Task Adaptation Benchmark (Zhai et al. 2019, arXiv:1910.04867): 19 tasks, 1,000 examples of each.

The protocol: a model adapts to each task by itself from 1,000 labelled examples. Settings are chosen by learning from
800 of them and testing on the other 200; then the model learns from all 1,000 with the settings that were best, and its
accuracy on the task's whole test set is the task's score. The benchmark's score is the mean over the 19 tasks; the
means over its three groups say what kind of task a model is good at.

The data are the user's: in one folder, for each task

    NAME.npz                             arrays train_images (n, H, W, C) uint8, train_labels (n,), and of test likewise
    NAME/train/CLASS, NAME/test/CLASS    or folders of images

Of exactly 1,000 training examples in an .npz the first 800 and the last 200 are the two parts, as the benchmark's own
files have them; of more, and of images in folders, which come class by class, 1,000 are drawn from the seed, in
random order. Images are scaled as a whole to the model's size, whatever their shape.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from minivit.base.backend import to_host
from minivit.base.errors import InputError
from minivit.data import Dataset, check_dataset
from minivit.data.folder import load_folder, pillow_modules
from minivit.evaluation.transfer import PENALTIES, accuracy, choose, least_squares, logistic
from minivit.training.config import TrainConfig
from minivit.training.folder import last_checkpoint
from minivit.training.trainer import Trainer
from minivit.weights.start import Start, begin
from minivit.weights.tensor_files import read_arrays

GROUPS = {
    "natural": ("caltech101", "cifar100", "dtd", "flowers102", "pets", "sun397", "svhn"),
    "specialized": ("camelyon", "eurosat", "resisc45", "retinopathy"),
    "structured": (
        "clevr-count", "clevr-dist", "dmlab", "dspr-loc", "dspr-ori", "kitti-dist", "snorb-azim", "snorb-elev",
    ),
}  # fmt: skip
TASKS = tuple(name for names in GROUPS.values() for name in names)
EXAMPLES = 1000
MOST_CLASSES = 100_000  # of a task; a damaged label shall not make names for billions of them
LEARNING = 0.8  # share of the examples to learn from while settings are chosen
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
# What each method without training fits, and the penalties that it chooses from.
CLASSIFIERS = {"probe": (logistic, PENALTIES), "fewshot": (least_squares, tuple(2.0**k for k in range(0, 21, 2)))}
# The paper's fine-tuning (Table 4 and appendix B.1.1): one setting for all the tasks.
FINE_TUNING = {
    "optimizer": "sgd", "momentum": 0.9, "lr": 0.01, "schedule": "cosine", "weight_decay": 0.0, "clip_norm": 1.0,
}  # fmt: skip
STEPS, WARMUP, BATCH = 2500, 500, 512


def find_tasks(folder):
    """The names of the tasks whose data lie in a folder, in the benchmark's order.

    Raises  InputError: there is no such folder, or none of the tasks in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; put the tasks there, NAME.npz or NAME/train and NAME/test")
    names = [name for name in TASKS if (folder / f"{name}.npz").exists() or (folder / name).is_dir()]
    if not names:
        raise InputError(f"{folder} has none of the tasks: no NAME.npz nor folder NAME, NAME of {', '.join(TASKS)}")
    return names


def load_task(folder, name, config, *, examples=EXAMPLES, seed=0):
    """A task's data as a `Dataset` of ``examples`` training images, of the size and channels that a model takes.

    Raises  InputError: the data are missing or damaged, or fewer.
    """
    folder = Path(folder)
    file = folder / f"{name}.npz"
    if file.exists():
        dataset = _load_npz(file, name)
    elif (folder / name).is_dir():
        dataset = load_folder(folder / name, config.image_size, whole=True)._replace(name=name)
    else:
        raise InputError(f"there is no task {name} in {folder}: neither {name}.npz nor a folder {name}")
    dataset = check_dataset(dataset)
    n = len(dataset.train_labels)
    if n < examples:
        raise InputError(f"{name} ({dataset.source}) has {n} training examples, the protocol takes {examples}")
    rows = np.arange(n)
    if n > examples or not file.exists():  # folders come class by class
        rows = np.random.default_rng([seed, zlib.crc32(name.encode())]).permutation(n)[:examples]
    train, test = (
        _fitted(images, config, dataset.source) for images in (dataset.train_images[rows], dataset.test_images)
    )
    return dataset._replace(train_images=train, train_labels=dataset.train_labels[rows], test_images=test)


def _load_npz(path, name):
    arrays = read_arrays(path, ARRAYS)
    for k in (1, 3):
        if arrays[k].dtype.kind not in "iu" or arrays[k].ndim != 1:
            raise InputError(f"{path}: {ARRAYS[k]} must be whole numbers (n,), got {arrays[k].dtype} {arrays[k].shape}")
        arrays[k] = arrays[k].astype(np.int64)
        if arrays[k].max(initial=0) >= MOST_CLASSES:
            raise InputError(f"{path}: {ARRAYS[k]} has a label {arrays[k].max()}, far beyond the classes of any task")
    classes = max((int(labels.max()) + 1 for labels in (arrays[1], arrays[3]) if len(labels)), default=1)
    return Dataset(name, *arrays, tuple(str(k) for k in range(classes)), str(path))


def _fitted(images, config, source):
    """Images scaled to a model's size; grey ones get as many channels as it takes."""
    n, H, W, C = images.shape
    if C not in (1, config.channels):
        raise InputError(f"{source} has images of {C} channels, the model takes {config.channels}")
    size = config.image_size
    if (H, W) != (size, size):
        if C not in (1, 3):
            raise InputError(f"{source} has images of {H}x{W}x{C}: scale them to {size}x{size} beforehand")
        Image, _ = pillow_modules()
        bilinear = Image.Resampling.BILINEAR
        small = [Image.fromarray(image[..., 0] if C == 1 else image).resize((size, size), bilinear) for image in images]
        images = np.stack([np.asarray(image) for image in small]).reshape(n, size, size, C)
    return np.repeat(images, config.channels, axis=3) if C < config.channels else images


def fit_features(method, train, test, dataset):
    """Score of a classifier on frozen features: its penalty is chosen on the last fifth, all examples are learned.

    Shapes  train (n, d), test (m, d)  ->  accuracy, the penalty
    """
    fit, penalties = CLASSIFIERS[method]
    labels, classes = dataset.train_labels, len(dataset.class_names)
    rows = np.arange(round(LEARNING * len(labels)), len(labels))
    selection = choose(fit, train, labels, classes, rows, penalties=penalties)
    return accuracy(selection.classifier.scores(test), dataset.test_labels), selection.l2


def fine_tune(
    model, dataset, out, *, steps=STEPS, seed=0, workers=0, device="cpu", progress=True, draw=None, **changes
):  # fmt: skip
    """Train all of a model on a task's examples, by the paper's settings; goes on where an earlier call stopped.

    ``changes`` are other settings of `TrainConfig`; ``draw``: see `Trainer`. The head begins at zero, as the paper has
    it (section 3.2).
    Returns  the run's summary, or None if it was stopped by a signal
    Raises  InputError: see `Trainer`, or the folder holds a run that began with another model.
    """
    settings = FINE_TUNING | {"batch_size": BATCH} | changes
    settings["batch_size"] = min(settings["batch_size"], len(dataset.train_labels))
    config = TrainConfig(
        steps=steps, warmup_steps=round(WARMUP / STEPS * steps), evaluate_every=steps, seed=seed, workers=workers,
        device=device, **settings,
    )  # fmt: skip
    model_config = replace(model.config, num_classes=len(dataset.class_names), pre_logits=0)
    start = Start(begin(model, model_config), {"crc": zlib.crc32(to_host(model.flat))})
    run = Trainer(
        dataset, model_config, config, out, start=start, resume=last_checkpoint(out), progress=progress, draw=draw
    )  # fmt: skip
    return run.run()


def summary_of(scores):
    """Means of the scores of tasks, a dict: of each group, of all; what is missing is named.

    Returns  {"tasks": {name: score}, "groups": {group: {"mean", "tasks", "of"}}, "mean", "missing": [names]}
    A mean is that of the tasks that there are, None where there are none.
    """

    def mean(names):
        own = [scores[name] for name in names if name in scores]
        return {"mean": sum(own) / len(own) if own else None, "tasks": len(own), "of": len(names)}

    return {
        "tasks": {name: scores[name] for name in TASKS if name in scores},
        "groups": {group: mean(names) for group, names in GROUPS.items()},
        "mean": mean(TASKS)["mean"],
        "missing": [name for name in TASKS if name not in scores],
    }
