"""The training loop: epochs, evaluation, logs, figures, checkpoints; exact to resume.

All that a run depends on at any moment is in its checkpoint: parameters, optimiser state, moving average, the numbers
of the step, epoch and batch, and the order of the epoch under way. Random numbers need no state of their own:
shuffling, augmentation and dropout draw from generators seeded by (seed, purpose, epoch or step, batch or micro-batch),
so the counters *are* the generators' states. A run that was interrupted anywhere therefore goes on bit for bit.

A run's folder holds

    settings.json     what was asked for                    last.npz     the latest checkpoint, to resume from
    metrics.jsonl     a line per log step and evaluation    best.npz     the checkpoint of the best test accuracy
    summary.json      final figures, versions, wall time    curves.png, predictions.png

``last.npz`` is the first of them to be written: a folder that holds anything of a run can be resumed. No checkpoint
holds a number that is not finite: a run that diverges ends before it is written.
"""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import shlex
import signal
import sys
import threading
import time
import warnings
import zlib
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minivit import __version__
from minivit.base import params as parameters
from minivit.base.backend import device_name, erf, find_device, kernels_wanted, to_device, to_host, use_device
from minivit.base.errors import InputError
from minivit.base.settings import check_choice, check_range, check_types, setting, settings_of
from minivit.data import FOLDERS, is_lazy, with_mirror_images
from minivit.data import load as load_data
from minivit.data.augment import CROP_MODES
from minivit.data.loader import batches, epoch_order, is_epoch_order
from minivit.data.operations import POLICIES
from minivit.kernels import cuda
from minivit.laboratory.recorder import recording
from minivit.laboratory.trace import first_non_finite
from minivit.layers.loss import softmax_cross_entropy_forward
from minivit.model import ViT, parameter_table
from minivit.model.initialisation import INITS, mimetic, whiten
from minivit.optim import EMA, OPTIMIZERS, Muon, check_schedule, clip_by_global_norm, learning_rate, make_optimizer
from minivit.training.engine import Engine, available_cores, default_micro_batch
from minivit.training.engine_cuda import CudaEngine, CudaStep
from minivit.weights import checkpoint
from minivit.weights.checkpoint import fill, is_finite, named_arrays, write_atomically

MAX_WORKERS = 1024


@dataclass(frozen=True)
class TrainConfig:
    """Everything that defines a run beside the model and the data.

    Raises  InputError (a ValueError): from the constructor, for any impossible setting.
    """

    epochs: int = setting(20, "passes over the training pictures")
    steps: int = setting(0, "optimiser steps in place of epochs, the last pass perhaps cut short; 0 for epochs")
    batch_size: int = setting(128, "pictures per batch")
    half_size: float = setting(
        0.0, "share of the epochs, the first, on pictures of half the height and width: a quarter of the patches"
    )
    accumulate: int = setting(1, "batches per optimiser step (gradient accumulation)")
    init: str = setting("official", "initial parameters: official, or mimetic (attention that begins as it ends)")
    whiten: bool = setting(False, "begin with a patch embedding that whitens the training patches")
    freeze: str = setting(
        "",
        "parameters that stay as they are, by name: 'patch_embed*,blocks.[0-3].*', or '*,!head.*' for all but the head",
    )
    optimizer: str = setting("adamw", "adamw, adam, sgd, lion or muon (the matrices of the blocks; adamw the rest)")
    lr: float = setting(1e-3, "peak learning rate")
    layer_decay: float = setting(1.0, "factor of the learning rate from each block to the one before it")
    momentum: float = setting(0.9, "momentum of sgd and muon")
    beta1: float = setting(0.9, "decay rate of adam's and lion's first moment")
    beta2: float = setting(0.999, "decay rate of adam's second moment; of lion's average, for which 0.99 is usual")
    adam_eps: float = setting(1e-8, "added to adam's denominator")
    weight_decay: float = setting(0.05, "weight decay of the matrices")
    sam: float = setting(0.0, "take the gradient this far uphill, as SAM does; 0 for here")
    schedule: str = setting("cosine", "cosine, linear, constant or trapezoid, each after warmup_epochs")
    cooldown: float = setting(0.2, "share of the steps over which a trapezoid falls to final_lr")
    warmup_epochs: float = setting(1.0, "epochs over which the learning rate rises linearly; at most half of the run")
    warmup_steps: int = setting(0, "optimiser steps in place of warmup_epochs; 0 for warmup_epochs")
    final_lr: float = setting(0.0, "learning rate at the end of the schedule")
    clip_norm: float = setting(1.0, "largest global norm of the gradient; 0 for no clipping")
    ema_decay: float = setting(0.0, "decay of the moving average of the weights, tested in their place; 0 for none")
    label_smoothing: float = setting(0.0, "share of each target given to all classes alike")
    policy: str = setting("none", "an operation or two on each picture: none, trivial, rand or auto(Augment)")
    rand_count: int = setting(2, "operations on a picture with the policy rand")
    rand_magnitude: int = setting(9, "their strength, 0 to 30")
    crop_area: float = setting(
        0.0, "of data imagefolder: train on random parts of at least this share of a picture's area; 0 for its centre"
    )
    crop_padding: int = setting(0, "random crops after padding by so many pixels")
    crop_mode: str = setting("zero", "what the padding shows: zero (black) or reflect (the picture mirrored)")
    flip: bool = setting(False, "random horizontal flips")
    rotate: float = setting(0.0, "random rotations by up to so many degrees")
    zoom: float = setting(0.0, "random scaling of height and width by up to this share")
    shear: float = setting(0.0, "random slant, pixels per row")
    shift: float = setting(0.0, "random displacement by up to so many pixels, fractions included")
    erasing: float = setting(0.0, "probability that a random rectangle of a picture becomes noise")
    mixup: float = setting(0.0, "alpha of mixup, which blends pictures and labels in pairs; 0 for none")
    cutmix: float = setting(0.0, "alpha of CutMix, which pastes rectangles between pictures; 0 for none")
    mix_probability: float = setting(1.0, "share of batches that are mixed, half of them by each if both are on")
    seed: int = setting(0, "seed of initialisation, shuffling, augmentation and dropout")
    workers: int = setting(
        0, "threads; 0 for one per core of the machine that starts the run (it fixes the order of sums)"
    )
    micro_batch: int = setting(
        0, "most pictures that a thread takes at a time; 0 for about 1,024 tokens (it fixes the order of sums)"
    )
    recompute: bool = setting(
        False, "make activations again in the backward pass instead of keeping them: less memory, more time, same bits"
    )
    device: str = setting("cpu", "where to compute: cpu, cuda, cuda:1 (the second GPU, ...), or auto")
    gpu_micro_batch: int = setting(0, "pictures that a GPU takes at a time; 0 for the whole batch")
    precision: str = setting(
        "float32", "on a GPU: float32, tf32 (factors of products rounded to 10 bits) or bf16 (blocks store 7)"
    )
    graph: bool = setting(
        True,
        "replay a GPU's steps from a CUDA graph, with adam, adamw and muon; not with layer_decay, sam or accumulate, "
        "nor where a LayerNorm is wider than 1024 or its width no multiple of 4",
    )
    log_every: int = setting(10, "steps between two lines of metrics.jsonl")
    evaluate_every: int = setting(1, "epochs between two evaluations")
    test_flip: bool = setting(False, "test with the mean of the logits of each picture and its mirror image")
    check_finite: bool = setting(
        False,
        "look at every tensor of each step and stop at the first that is not finite, with its name and what made it; "
        "a step then takes some 2 times as long, of a tiny model 4 to 6 times",
    )
    checkpoint_seconds: float = setting(30.0, "seconds between two checkpoints; one is always written at the end")

    def __post_init__(self):
        check_types(self)
        check_range(self, 1, None, "epochs", "batch_size", "accumulate", "log_every", "evaluate_every")
        check_range(self, 0, None, "crop_padding", "seed", "micro_batch", "steps", "warmup_steps")
        check_choice(self, "crop_mode", CROP_MODES)
        check_range(self, 0.0, 180.0, "rotate")
        check_range(self, 0.0, None, "shear", "shift")
        check_choice(self, "policy", POLICIES)
        check_range(self, 1, 16, "rand_count")
        check_range(self, 0, 30, "rand_magnitude")
        check_range(self, 0.0, 1.0, "erasing", "mix_probability")
        check_range(self, 0.0, 1000.0, "mixup", "cutmix")
        check_range(self, 0.0, 1.0, "zoom", open_high=True)
        check_range(self, 0, MAX_WORKERS, "workers")
        check_range(
            self, 0.0, None, "lr", "weight_decay", "warmup_epochs", "final_lr", "clip_norm", "checkpoint_seconds"
        )
        check_range(self, 0.0, 100.0, "sam")
        check_range(self, 1e-3, 1.0, "layer_decay")
        check_range(self, 0.0, 1.0, "cooldown", "half_size", "crop_area")
        check_choice(self, "init", INITS)
        if self.sam and self.accumulate > 1:
            raise InputError("sam takes each batch's gradient twice; leave accumulate at 1")
        check_range(self, 0.0, 1.0, "momentum", "beta1", "beta2", "ema_decay", "label_smoothing", open_high=True)
        check_range(self, 1e-30, 1.0, "adam_eps")
        check_choice(self, "optimizer", OPTIMIZERS)
        check_schedule(self.schedule)
        check_range(self, 0, None, "gpu_micro_batch")
        check_choice(self, "precision", cuda.PRECISIONS)


# Settings that `minivit.data.augment` takes.
AUGMENTATION = (
    "policy", "rand_count", "rand_magnitude", "rotate", "zoom", "shear", "shift", "crop_padding", "crop_mode", "flip",
    "erasing",
)  # fmt: skip

# Settings that a resumed run may change: they alter neither the numbers nor their order.
FREE_ON_RESUME = ("recompute", "log_every", "check_finite", "checkpoint_seconds")
MAY_MOVE = ("device", "gpu_micro_batch", "precision", "graph")  # they change rounding alone: a run may go on elsewhere

LAST, BEST, METRICS, SUMMARY, SETTINGS = "last.npz", "best.npz", "metrics.jsonl", "summary.json", "settings.json"
BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"  # images/s is in the postfix
CURVES, PREDICTIONS, RECONSTRUCTIONS = "curves.png", "predictions.png", "reconstructions.png"


def loading_settings(config, num_classes):
    """The keyword settings of `minivit.data.batches` that a `TrainConfig` means: how pictures are augmented and mixed.

    ``mixing`` is None where no batch is to be mixed, so that labels stay class indices.
    """
    mixing = None
    if config.mixup or config.cutmix:
        mixing = {
            "num_classes": num_classes, "mixup_alpha": config.mixup, "cutmix_alpha": config.cutmix,
            "probability": config.mix_probability,
        }  # fmt: skip
    return {"mixing": mixing, "crop_area": config.crop_area, **{name: getattr(config, name) for name in AUGMENTATION}}


def refuse_used(folder):
    """Raises InputError if a new run in the folder would overwrite something."""
    for name in (LAST, BEST, METRICS, SUMMARY, SETTINGS, CURVES, PREDICTIONS, RECONSTRUCTIONS):
        if os.path.lexists(Path(folder) / name):
            other = "go on with --resume, or choose" if name == LAST else "choose"
            raise InputError(f"{folder} already holds a run's {name}; {other} another --out")


def fingerprint(dataset):
    """A number that tells whether two data sets hold the same training pictures, labels and test pictures.

    Of pictures that are files it sees names and lengths.
    """
    crc = 0
    for array in (dataset.train_images, dataset.train_labels, dataset.test_images, dataset.test_labels):
        crc = zlib.crc32(array.identity if is_lazy(array) else np.ascontiguousarray(array), crc)
    return crc


def dataset_of(meta, path, *, name=None, data_dir=None, image_size=None):
    """The data set that a checkpoint's meta describes, or the one that is named instead.

    ``image_size``: the model's, at which folders are read for which the meta says no other
    Raises  InputError: meta does not say, or the data are missing, damaged or of other classes than the checkpoint's.
    """
    stored = meta.get("data")
    stored = check_data(stored if isinstance(stored, dict) else {}, path)
    name = name or stored.get("data")
    if name is None:
        raise InputError(f"{path} does not say which data set it was trained on; name one with --data")
    keys = ("image_size", "classes", "train_share") if name == stored.get("data") else ()
    same = {key: stored.get(key) for key in keys}
    if name in FOLDERS and not same.get("image_size"):
        same["image_size"] = image_size
    try:
        dataset = load_data(name, data_dir or stored.get("data_dir", "data"), **same)
    except InputError as error:
        raise InputError(f"{error}; if the data lie elsewhere now, name the place with --data-dir") from None
    if list(dataset.class_names) != meta.get("class_names"):
        raise InputError(
            f"{path} was trained for other classes than those of {dataset.name} ({dataset.source}): "
            f"{checkpoint.few_classes(meta)}"
        )
    return dataset


def origin_of(meta):
    """What a checkpoint's meta says of where its first parameters came from (see `minivit.weights.start.Start`), or None."""
    origin = meta.get("start")
    return origin if isinstance(origin, dict) else None


def check_workers(workers):
    """The number of threads that a setting of ``workers`` means: itself, or one per core for 0.

    Raises  InputError: it is negative or beyond reason.
    """
    if not 0 <= workers <= MAX_WORKERS:
        raise InputError(f"workers must be at least 0 and at most {MAX_WORKERS}, got {workers}")
    return workers or available_cores()


def check_data(data, where):
    """The dict itself, once its keys that say how to find a data set are known to have the right types.

    Raises  InputError: one has another type.
    """
    texts = {str: "a text", int: "a whole number above 0", float: "a number above 0 and at most 1"}
    kinds = {"data": str, "data_dir": str, "image_size": int, "classes": str, "train_share": float}
    for key, kind in kinds.items():
        value = data.get(key)
        if value is None:
            continue
        if type(value) is not kind or (kind is int and value < 1) or (kind is float and not 0.0 < value <= 1.0):
            raise InputError(f"{where}: {key} must be {texts[kind]}, got {value!r}")
    return data


def versions():
    """Versions of what the numbers depend on."""
    return {"minivit": __version__, "python": platform.python_version(), "numpy": np.__version__}


def evaluate(engine, model, images, labels, *, flip=False):
    """Mean cross-entropy and accuracy over a set of pictures: (loss, accuracy, logits on the host).

    With ``flip``, a picture's logits are the mean of its own and of its mirror image's.
    """

    def predict(view):
        return to_host(engine.predict(view, model))

    labels, logits = to_host(labels), with_mirror_images(predict, images, flip)
    loss, _ = softmax_cross_entropy_forward(logits.astype(np.float64), labels)
    return float(loss), float((logits.argmax(axis=1) == labels).mean()), logits


def write_json(path, content):
    """Write a JSON file, atomically."""
    write_atomically(path, lambda file: file.write((json.dumps(content, indent=2) + "\n").encode()))


_FIGURES = {
    "train": ("step", "epoch", "lr", "loss"),
    "test": ("step", "epoch", "loss", "accuracy", "train_loss", "train_accuracy"),
}  # what save_curves draws


def read_metrics(path):
    """The records of a metrics.jsonl; a line that is no whole record (its process was killed) is left out."""
    records = []
    if Path(path).exists():
        for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            figures = _FIGURES.get(record.get("kind")) if isinstance(record, dict) else None
            if figures and all(type(record.get(name)) in (int, float) for name in figures):
                records.append(record)
    return records


class Diverged(InputError):
    """A run that made a number that is not finite: its settings are to be changed."""


class Trainer:
    """One run: a model, an optimiser, where they stand, and the folder they write to.

    ``describe`` is stored in checkpoints beside the model's configuration and the settings: how to find the data again.
    ``start``, a `minivit.weights.start.Start`, holds the first parameters if another model gives them, and their origin, which
    is stored too.
    ``on_epoch(trainer)``, if given, is called after each epoch, to look at the run; it must not change it.
    What is learned is classification; `minivit.masked.pretrain.Pretrainer` changes the methods under "the task".
    Raises  InputError: settings, data and folder do not fit together; nothing has been written then.
    """

    engines = (Engine, CudaEngine)  # of the CPU, of a GPU
    task = {}  # what checkpoints and settings.json say beside model, settings and data
    merit = "accuracy"  # what the figure of merit is called

    def __init__(
        self, dataset, model_config, config, out, *, describe=None, start=None, progress=True, on_epoch=None
    ):  # fmt: skip
        self.device = find_device(config.device)
        if config.check_finite and self.device != "cpu":
            raise InputError("check_finite looks at every tensor on the CPU; leave it out, or take --device cpu")
        micro_batch = config.micro_batch or default_micro_batch(model_config)
        config = replace(config, workers=check_workers(config.workers), micro_batch=micro_batch)
        if not (n := len(dataset.train_images)):
            raise InputError(f"{dataset.source} has no training pictures: there is nothing to learn from")
        self.steps_per_epoch = -(-n // (config.batch_size * config.accumulate))
        if config.steps:
            config = replace(config, epochs=-(-config.steps // self.steps_per_epoch))
        self.total_steps = config.steps or config.epochs * self.steps_per_epoch
        if start and (config.init != "official" or config.whiten):
            raise InputError("a run that begins with another model's parameters takes no --init and no --whiten")
        self.dataset, self.config, self.out, self.progress = dataset, config, Path(out), progress
        self.describe, self.on_epoch = describe or {}, on_epoch
        height, width, channels = dataset.train_images.shape[1:]
        if (height, width, channels) != (model_config.image_size, model_config.image_size, model_config.channels):
            raise InputError(
                f"the pictures are {height}x{width}x{channels}, the model takes "
                f"{model_config.image_size}x{model_config.image_size}x{model_config.channels}"
            )
        if (K := len(dataset.class_names)) != model_config.num_classes:
            raise InputError(
                f"the data have {K} classes, the model has {model_config.num_classes}; leave num_classes out"
            )
        if config.crop_padding >= height:
            raise InputError(
                f"crop_padding {config.crop_padding} moves whole pictures out of sight; they have {height} pixels"
            )
        if config.crop_area and not is_lazy(dataset.train_images):
            raise InputError(
                "crop_area cuts parts out of pictures as their files are read, which is done with data imagefolder "
                f"alone; those of {dataset.name} are in memory, all of one size: leave it 0"
            )
        _check_memory(model_config, config)
        if model_config.gelu == "erf":
            erf(np.zeros(1))  # SciPy is optional: say so before anything is written
        self.fingerprint = fingerprint(dataset)
        use_device(self.device)
        self._train_data, self._test_data = (
            [array if is_lazy(array) else to_device(array, self.device) for array in split]
            for split in ((dataset.train_images, dataset.train_labels), (dataset.test_images, dataset.test_labels))
        )
        self.origin = start.origin if start else None
        self.model_config = model_config
        first = self._initial() if not start or start.flat is None else start.flat.copy()
        self.model = self._model(to_device(first, self.device))
        table, self.trained = self.model.table, None
        self.frozen = parameters.frozen_names(table, config.freeze) if config.freeze else []
        if self.frozen:
            table, trained = parameters.freeze(table, self.frozen)
            self.trained = to_device(trained, self.device)
        mask = to_device(parameters.decay_mask(table), self.device)
        scale = None
        if config.layer_decay < 1.0:
            scale = to_device(parameters.layer_scale(self.model.table, config.layer_decay), self.device)
        self.optimizer = make_optimizer(
            config.optimizer, self.model.flat, mask, table=self.model.table, momentum=config.momentum,
            beta1=config.beta1, beta2=config.beta2, eps=config.adam_eps, weight_decay=config.weight_decay, scale=scale,
        )  # fmt: skip
        self.ema = EMA(self.model.flat, config.ema_decay) if config.ema_decay else None
        self.tested_model = self._model(self.ema.flat) if self.ema else self.model
        self.small_epochs = round(config.half_size * config.epochs)
        if self.small_epochs:
            self.model.at_half_size()  # refuses what cannot be halved
        self.step = self.epoch = self.batch = 0
        self.order = None
        self.running = {"loss": 0.0, "correct": 0, "seen": 0}  # over the epoch under way
        self.best = {"accuracy": -1.0, "epoch": 0}
        self.seconds = 0.0  # of training, up to ...
        self._started = None  # ... the moment when this process took it up
        self._saved_at = time.monotonic()
        self._restored = False
        self._whole_steps = {}  # on a GPU, what makes all of a step at once, for each engine
        self._stop = None

    def _initial(self):
        """The flat parameters at the start, on the host."""
        c = self.config
        model = self._model()
        if c.init == "mimetic":
            mimetic(model, seed=c.seed)
        if c.whiten:
            whiten(model, self.dataset.train_images, self.dataset.train_labels, seed=c.seed)
        return model.flat

    def learning_rate(self, step):
        """The learning rate of a step, counted from 0."""
        c = self.config
        warmup = min(c.warmup_steps or round(c.warmup_epochs * self.steps_per_epoch), self.total_steps // 2)
        return learning_rate(
            step, self.total_steps, lr=c.lr, schedule=c.schedule, final_lr=c.final_lr, warmup_steps=warmup,
            cooldown=c.cooldown,
        )  # fmt: skip

    @property
    def finished(self):
        """Whether every epoch is done and evaluated."""
        return self.epoch == self.config.epochs

    # ---- the task ----------------------------------------------------------------------------------------------------

    def _model(self, flat=None):
        """The model around a flat buffer, or a new one with its initial parameters on the host."""
        return ViT(self.model_config, seed=self.config.seed, flat=flat)

    def _targets(self, images, labels, number):
        """What the engine takes beside the pictures of a batch with this number."""
        return labels

    def _accuracy(self, loss, correct, pictures):
        """The figure of merit of so many pictures, from their mean loss and how many guesses were right."""
        return correct / pictures

    def _evaluate(self, engine):
        """Loss, accuracy and outputs of the test pictures."""
        return evaluate(engine, self.tested_model, *self._test_data, flip=self.config.test_flip)

    def _summary(self):
        """What else summary.json says."""
        return {}

    def _draw(self, logits):
        """The figures at the end, from what `_evaluate` gave."""
        from minivit import figures  # matplotlib is slow to import, and only the end needs it

        data = self.dataset
        figures.save_curves(self.out / CURVES, read_metrics(self.out / METRICS), title=data.name)
        figures.save_predictions(self.out / PREDICTIONS, data.test_images, data.test_labels, logits, data.class_names)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def save(self, name=LAST):
        """Write the run's state to a checkpoint in its folder.

        Raises  InputError: it holds a number that is not finite; nothing is written.  OSError: see `write_atomically`.
        """
        arrays = named_arrays("params", self.model.flat, self.model.table)
        if self.ema:
            arrays |= named_arrays("ema", self.ema.flat, self.model.table)
        arrays |= {f"optimizer/{key}": vector for key, vector in self.optimizer.state.items()}
        if self.order is not None:
            arrays["order"] = self.order
        vectors = (self.tested_model.flat, self.model.flat, *self.optimizer.state.values())
        if not all(is_finite(to_host(vector)) for vector in vectors):
            raise self._diverged("a parameter is not finite any more")
        meta = {
            **checkpoint.model_meta(self.model.config),
            "settings": asdict(self.config),
            "data": {**self.describe, "name": self.dataset.name, "fingerprint": self.fingerprint},
            "class_names": list(self.dataset.class_names),
            "start": self.origin,
            **self.task,
            "progress": {
                "step": self.step,
                "epoch": self.epoch,
                "batch": self.batch,
                "running": self.running,
                "best": self.best,
                "seconds": self._elapsed(),
                "optimizer_steps": self.optimizer.steps,
                "ema_steps": self.ema.steps if self.ema else 0,
            },
            "versions": versions(),
        }
        checkpoint.save(self.out / name, arrays, meta)
        if name == LAST:
            self._saved_at = time.monotonic()

    def restore(self, path=None):
        """Take up the state of a checkpoint, by default the run's last one.

        Raises  InputError: it is damaged, or belongs to another model, other settings or other data; nothing changes.
        """
        path = Path(path or self.out / LAST)
        arrays, meta = checkpoint.load(path)
        if (stored := checkpoint.config_of(meta, path)) != self.model.config:
            raise InputError(f"{path} holds another model: {_difference(asdict(stored), asdict(self.model.config))}")
        stored, asked = meta.get("pretraining"), self.task.get("pretraining")
        if (stored is None) != (asked is None):
            command = "train" if stored is None else "pretrain"
            raise InputError(f"{path} is of another kind of run; go on with minivit {command} --resume")
        if stored != asked:
            raise InputError(f"{path} was trained for another task: {_difference(stored, asked)}")
        settings = asdict(config_from(meta, path))
        if difference := _difference(settings, asdict(self.config), FREE_ON_RESUME + MAY_MOVE):
            raise InputError(
                f"{path} was trained with other settings: {difference}; start a new run with another --out"
            )
        if difference := self._other_start(origin_of(meta)):
            raise InputError(f"{path} began with other parameters: {difference}; start a new run with another --out")
        data = meta.get("data")
        if not isinstance(data, dict) or data.get("fingerprint") != self.fingerprint:
            raise InputError(f"{path} was trained on other pictures than those of {self.dataset.name} found now")
        order = arrays.get("order")
        try:
            progress = meta["progress"]
            numbers = [progress[key] for key in ("step", "epoch", "batch", "optimizer_steps", "ema_steps")]
            running = {key: progress["running"][key] for key in self.running}
            best = {key: progress["best"][key] for key in self.best}
            seconds = progress["seconds"]
            self._check_progress(*numbers, order, [*running.values(), *best.values(), seconds])
            vectors = {key: arrays[f"optimizer/{key}"] for key in self.optimizer.state}
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} lacks what is needed to resume, or it does not fit together: {error}") from None
        for key, vector in vectors.items():
            if vector.shape != self.model.flat.shape or not is_finite(vector):
                raise InputError(f"{path}: the optimiser state {key} does not fit the model")
        found = {"params": self.model.flat, **({"ema": self.ema.flat} if self.ema else {})}
        for prefix in found:
            flat = np.empty(self.model.flat.shape, np.float32)
            fill(flat, self.model.table, arrays, prefix, path)
            vectors[prefix] = flat
        for key, vector in vectors.items():
            (found.get(key, self.optimizer.state.get(key)))[...] = to_device(vector, self.device)
        if self.ema:
            self.ema.steps = numbers[4]
        self.step, self.epoch, self.batch, self.optimizer.steps, _ = numbers
        self.order, self.running, self.best, self.seconds = order, running, best, seconds
        self._restored = True

    def _other_start(self, stored):
        """How a checkpoint's start differs from this run's, in words; the file itself may have moved."""
        stored, own = ({"crc": None, **(origin or {})} for origin in (stored, self.origin))
        return _difference(stored, own, ("checkpoint",))

    def _check_progress(self, step, epoch, batch, optimizer_steps, ema_steps, order, figures):
        n, c = len(self.dataset.train_images), self.config
        if not all(type(number) is int for number in (step, epoch, batch, optimizer_steps, ema_steps)):
            raise ValueError("its progress is not counted in whole numbers")
        if not all(type(figure) in (int, float) and math.isfinite(figure) for figure in figures):
            raise ValueError("its progress holds a figure that is not a finite number")
        in_epoch, rest = divmod(batch, c.accumulate)
        if rest and batch != -(-n // c.batch_size):
            raise ValueError(f"batch {batch} is in the middle of an optimiser step")
        in_epoch += bool(rest)
        fits = 0 <= epoch <= c.epochs and 0 <= in_epoch <= self.steps_per_epoch
        before = min(epoch * self.steps_per_epoch, self.total_steps)
        if not fits or step != before + in_epoch or step > self.total_steps:
            raise ValueError(f"step {step}, epoch {epoch} and batch {batch} contradict each other")
        if optimizer_steps != step or ema_steps != (step if self.ema else 0):
            raise ValueError("the optimiser or the moving average has made another number of steps")
        if batch and (order is None or not is_epoch_order(order, n)):
            raise ValueError("the order of the pictures is not that of an epoch")

    def _origin(self, engine, images, labels, index, denominator):
        """Where the first number that is not finite came from, in words: the batch once more, recorded."""
        if self.device != "cpu":  # the figures were read late: the parameters have moved on since
            return f" or in the {self.config.log_every} steps before it; on the CPU a run names the tensor"
        for m, part in enumerate(engine.parts(len(images))):
            with recording(model=self.model, figures=False) as recorder:
                grads = self.model.gradient_buffer()[1]
                engine.forward_backward(images[part], labels[part], grads, denominator, engine.generator(index, m))
            if found := first_non_finite(recorder):
                return f": {found.message}"
        return ""

    def _check_update(self):
        """Raises InputError, with the name of the first vector, if the update made a number that is not finite."""
        made = f"{type(self.optimizer).__name__}.step"
        vectors = [(f"optimizer/{key}", vector, made) for key, vector in self.optimizer.state.items()]
        vectors.append(("params", self.model.flat, made))
        if self.ema:
            vectors.append(("ema", self.ema.flat, "EMA.update"))
        for prefix, vector, made in vectors:
            for name, array in named_arrays(prefix, vector, self.model.table).items():
                if not is_finite(array):
                    raise self._diverged(
                        f"{name}, made by {made}, is the first tensor of the update that is not finite"
                    )

    def _diverged(self, what):
        return Diverged(
            f"{what} at step {self.step} (epoch {self.epoch + 1}): the run diverged; {self.out / LAST} holds it "
            "from before; start again with a lower --lr, a longer --warmup-epochs or another --clip-norm"
        )

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def run(self):
        """Train from where the run stands to its end; returns the summary, or None if it was stopped by a signal.

        Raises  InputError: the folder holds another run, another process trains into it, or the run diverges.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        with _locked(self.out), _signals(self), quiet_overflow():
            if self._restored:
                self._trim_metrics()
            else:
                refuse_used(self.out)
                self.save()  # from here on there is always something to resume from
            write_json(self.out / SETTINGS, self._settings())
            with (engine := self._engine()):
                if not self.finished:
                    self._train(engine)
                if self.finished and self._stop is None:
                    return self._finish(engine)
        print(
            f"stopped at step {self.step} of {self.total_steps}; go on with --resume --out {shlex.quote(str(self.out))}"
        )
        return None

    def _settings(self):
        """What was asked for, for settings.json and summary.json."""
        start = {"start": self.origin} if self.origin else {}
        settings = {"model": asdict(self.model.config), "train": asdict(self.config), "data": self.describe}
        return settings | start | self.task

    def _engine(self, *, half_size=False):
        """The engine that the settings ask for, a context manager; on a GPU also what makes a whole step.

        With ``half_size``, for pictures of half the size: four times as many make a micro-batch of as many patches.
        """
        c = self.config
        model, times = (self.model.at_half_size(), 4) if half_size else (self.model, 1)
        shared = {
            "label_smoothing": c.label_smoothing,
            "seed": c.seed,
            "recompute": c.recompute,
            "trained": self.trained,
        }
        if self.device == "cpu":
            engine = self.engines[0](model, workers=c.workers, micro_batch=times * c.micro_batch, **shared)
        else:
            if kernels_wanted():
                cuda.machine().precision = c.precision
            engine = self.engines[1](model, micro_batch=times * c.gpu_micro_batch, **shared)
            if c.accumulate == 1 and not c.sam:
                self._whole_steps[engine] = CudaStep(
                    engine, self.optimizer, self.ema, clip_norm=c.clip_norm, graph=c.graph
                )
        if isinstance(self.optimizer, Muon) and not half_size:
            self.optimizer.each = engine.each
        return engine

    def _train(self, engine):
        self._started = self._saved_at = time.monotonic()
        # the bar goes to stderr and is off where that is not a terminal
        bar = tqdm(
            total=self.total_steps, initial=self.step, mininterval=0.25, dynamic_ncols=True, bar_format=BAR,
            disable=None if self.progress else True,
        )  # fmt: skip
        begins_small = self.epoch < self.small_epochs
        with (
            open(self.out / METRICS, "a", encoding="utf-8") as metrics, bar,
            self._engine(half_size=True) if begins_small else nullcontext() as small,
        ):  # fmt: skip
            while not self.finished and self._stop is None:
                self._train_epoch(small if self.epoch < self.small_epochs else engine, metrics, bar)
                if self._stop is None:
                    if self.epoch + 1 == self.small_epochs and (step := self._whole_steps.pop(small, None)):
                        step.release()  # of its graph there is no more use
                    self._end_epoch(engine, metrics)
            self.seconds, self._started = self._elapsed(), None
            self.save()

    def _train_epoch(self, engine, metrics, bar):
        c, data = self.config, self.dataset
        if self.batch == 0:
            self.order = epoch_order(len(data.train_images), seed=c.seed, epoch=self.epoch)
            self.running = {"loss": 0.0, "correct": 0, "seen": 0}
        on_gpu, whole_step = self.device != "cpu", self._whole_steps.get(engine)
        group = c.batch_size * c.accumulate  # pictures per optimiser step
        order = self.order[: (self.total_steps - self.epoch * self.steps_per_epoch) * group]  # all, but at a run's end
        stream = batches(
            *self._train_data, order, c.batch_size, seed=c.seed, epoch=self.epoch, start=self.batch,
            prefetch=0 if on_gpu else 2, half_size=engine.model.config.image_size < self.model.config.image_size,
            **loading_settings(c, self.model.config.num_classes),
        )  # fmt: skip
        since, seen_since = time.monotonic(), 0
        loss, correct = 0.0, 0
        unread = []  # (loss, correct, gradient norm, pictures) of the steps whose figures are still on the device
        per_epoch = -(-len(self.order) // c.batch_size)  # batches
        last_batch = -(-len(order) // c.batch_size) - 1
        try:
            for index, images, labels in stream:
                first = index // c.accumulate * group  # the step's first picture, in the order of the epoch
                size = min(group, len(order) - first)
                position = index % c.accumulate
                number = self.epoch * per_epoch + index
                labels = self._targets(images, labels, number)
                if c.check_finite and (origin := self._origin(engine, images, labels, number, size)):
                    raise self._diverged(f"a number is not finite{origin}")
                lr = self.learning_rate(self.step)
                if whole_step:
                    loss, correct, norm = whole_step(images, labels, step=number, lr=lr)
                else:
                    result = engine.gradient(images, labels, step=number, denominator=size, accumulate=position > 0)
                    loss, correct = loss + result.loss, correct + result.correct
                    if position < c.accumulate - 1 and index < last_batch:
                        continue
                    if c.sam:
                        self._gradient_uphill(engine, images, labels, number, size)
                    norm = clip_by_global_norm(engine.grad, c.clip_norm)
                unread.append((loss, correct, norm, size))
                loss, correct = 0.0, 0
                log = (self.step + 1) % c.log_every == 0 or self.step + 1 == self.total_steps
                if log or index == last_batch or not on_gpu:  # a GPU is not waited for in between
                    figures = self._read(unread)
                    if not all(map(math.isfinite, figures)):
                        origin = self._origin(engine, images, labels, number, size)
                        raise self._diverged(f"the loss is {figures[0]}, its gradient's norm {figures[2]}{origin}")
                if not whole_step:
                    self.optimizer.step(self.model.flat, engine.grad, lr)
                    if self.ema:
                        self.ema.update(self.model.flat)
                    if c.check_finite:
                        self._check_update()
                self.step, self.batch = self.step + 1, index + 1
                seen_since += size
                bar.update()
                if log:
                    now = time.monotonic()
                    rate = seen_since / max(now - since, 1e-9)
                    since, seen_since = now, 0
                    accuracy = self._accuracy(figures[0], figures[1], size)
                    _log(
                        metrics, kind="train", step=self.step, epoch=self.epoch + 1, lr=lr, loss=figures[0],
                        accuracy=accuracy, grad_norm=figures[2], images_per_second=round(rate, 1),
                    )  # fmt: skip
                    loss_so_far, accuracy = self._running_figures()
                    bar.set_postfix_str(f"loss {loss_so_far:.3f} acc {accuracy:.1%} {rate:,.0f} img/s")
                if self._stop is not None:
                    break
                if time.monotonic() - self._saved_at >= c.checkpoint_seconds:
                    self._read(unread)
                    self.save()
            self._read(unread)
        finally:
            stream.close()

    def _gradient_uphill(self, engine, images, labels, number, size):
        """Replace a batch's gradient g by that at theta + rho g / |g| (Foret et al. 2020, arXiv:2010.01412)."""
        flat, kept = self.model.flat, self.model.flat.copy()
        norm = clip_by_global_norm(engine.grad, 0.0)
        flat += engine.grad * (self.config.sam / (norm + 1e-12))
        engine.gradient(images, labels, step=number, denominator=size)
        flat[...] = kept

    def _read(self, unread):
        """Add the figures of the steps in the list to the epoch's and empty it: (loss, correct, norm) of the last."""
        figures = ()
        for loss, correct, norm, size in unread:
            figures = float(loss), int(correct), float(norm)
            if not all(map(math.isfinite, figures)):
                break
            self.running["loss"] += figures[0] * size
            self.running["correct"] += figures[1]
            self.running["seen"] += size
        unread.clear()
        return figures

    def _running_figures(self):
        """Mean loss and accuracy over the epoch so far."""
        seen = self.running["seen"]
        loss = self.running["loss"] / seen
        return loss, self._accuracy(loss, self.running["correct"], seen)

    def _end_epoch(self, engine, metrics):
        c = self.config
        self.epoch, self.batch = self.epoch + 1, 0
        if self.on_epoch:
            self.on_epoch(self)
        if self.epoch % c.evaluate_every and self.epoch < c.epochs:
            return
        loss, accuracy, _ = self._evaluate(engine)
        if not math.isfinite(loss):
            raise self._diverged(f"the test loss is {loss}")
        train_loss, train_accuracy = self._running_figures()
        _log(
            metrics, kind="test", step=self.step, epoch=self.epoch, loss=loss, accuracy=accuracy,
            train_loss=train_loss, train_accuracy=train_accuracy, seconds=round(self._elapsed(), 2),
        )  # fmt: skip
        tqdm.write(
            f"epoch {self.epoch:3d}/{c.epochs}  train loss {train_loss:.4f} {self.merit} {train_accuracy:6.2%}  "
            f"test loss {loss:.4f} {self.merit} {accuracy:6.2%}  {self._elapsed():.0f} s",
            file=sys.stdout,
        )
        sys.stdout.flush()
        if accuracy > self.best["accuracy"]:
            self.best = {"accuracy": accuracy, "epoch": self.epoch}
            self.save(BEST)

    def _finish(self, engine):
        data = self.dataset
        loss, accuracy, outputs = self._evaluate(engine)
        summary = {
            "test_accuracy": accuracy,
            "test_loss": loss,
            "best_test_accuracy": self.best["accuracy"],
            "best_epoch": self.best["epoch"],
            "train_seconds": round(self.seconds, 2),  # with the evaluations, and of all the processes that took part
            "images_per_second": round(self._pictures() / max(self.seconds, 1e-9), 1),
            "epochs": self.config.epochs,
            "steps": self.step,
            "parameters": int(self.model.flat.size),
            "test_images": len(data.test_images),
            "data": data.source,
            "workers": engine.workers,
            "cores": available_cores(),
            "device": device_name(self.device),
            **self._summary(),
            "settings": self._settings(),
            "versions": versions(),
        }
        self._draw(outputs)
        write_json(self.out / SUMMARY, summary)
        return summary

    def _pictures(self):
        """How many pictures all epochs hold."""
        c, n = self.config, len(self.dataset.train_images)
        last = self.total_steps - (c.epochs - 1) * self.steps_per_epoch  # steps
        return (c.epochs - 1) * n + min(n, last * c.batch_size * c.accumulate)

    def _elapsed(self):
        return self.seconds + (0.0 if self._started is None else time.monotonic() - self._started)

    def _trim_metrics(self):
        """Drop the lines that an interrupted run wrote after its last checkpoint: those steps are made again."""
        path = self.out / METRICS
        kept = [r for r in read_metrics(path) if self._has_passed(r)]
        lines = "".join(json.dumps(record) + "\n" for record in kept)
        write_atomically(path, lambda file: file.write(lines.encode()))

    def _has_passed(self, record):
        # after its last step an epoch is evaluated: a checkpoint from between the two counts the epoch as not done
        return record["step"] <= self.step and (record["kind"] == "train" or record["epoch"] <= self.epoch)

    def stop(self, reason):
        """Ask the run to stop after the step under way, with a checkpoint."""
        self._stop = reason


class _signals:
    """While active, Ctrl-C and SIGTERM stop the run after its step; a second Ctrl-C interrupts at once."""

    def __init__(self, trainer):
        self.trainer = trainer

    def _handle(self, number, frame):
        if self.trainer._stop is not None:
            raise KeyboardInterrupt
        self.trainer.stop(number)

    def __enter__(self):
        self._previous = {}
        if threading.current_thread() is threading.main_thread():  # signals can be set nowhere else
            self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *exception):
        for number, handler in self._previous.items():
            signal.signal(number, handler)


@contextmanager
def quiet_overflow():
    """While active, NumPy does not warn of numbers that overflow: its user tells of figures that are not finite."""
    with warnings.catch_warnings():  # not np.errstate, which other threads would not see
        warnings.filterwarnings("ignore", "(overflow|invalid value|divide by zero) encountered", RuntimeWarning)
        yield


@contextmanager
def _locked(folder):
    """While active, no other process trains into the folder; the lock ends with the process, however that ends.

    Raises  InputError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise InputError(f"another process is training into {folder}; choose another --out") from None
            # otherwise this file system knows no locks
        yield
    finally:
        os.close(handle)


def _check_memory(model, config):
    """Raises InputError if training the model takes more memory than the machine has; nothing is allocated here."""
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


def config_from(meta, path):
    """The `TrainConfig` that a checkpoint's meta describes.

    Raises  InputError: it is missing, or holds unknown or impossible settings.
    """
    settings = meta.get("settings")
    if not isinstance(settings, dict):
        raise InputError(f"{path} does not say how its model was trained; the checkpoints of minivit train do")
    return settings_of(TrainConfig, settings, path)


def _log(file, **record):
    file.write(json.dumps(record) + "\n")
    file.flush()


def _difference(stored, asked, free=()):
    """The first few settings that differ, in words; empty if none does."""
    parts = [
        f"{name} {stored.get(name)} there, {asked.get(name)} asked for"
        for name in dict.fromkeys([*stored, *asked])
        if name not in free and stored.get(name) != asked.get(name)
    ]
    return ", ".join(parts[:3]) + (", ..." if len(parts) > 3 else "")
