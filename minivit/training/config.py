"""The settings of a training, in groups: each group is a class, a table of a settings file, and a part of --help.

    [model]         how the parameters begin, and which of them are trained (beside the fields of `ViTConfig`)
    [data]          batches (beside which data set it is)
    [augmentation]  what random changes images and labels get
    [optimizer]     the update
    [schedule]      how long it lasts, and the learning rate meanwhile
    [machine]       where it is computed, and in which pieces
    [log]           what is tested, checked and written, and how often

`TrainConfig` is all of them in one object, without the groups: so it is stored in checkpoints and settings.json.
"""

from __future__ import annotations

from dataclasses import dataclass

from minivit.base.errors import InputError
from minivit.base.settings import check_choice, check_range, check_types, field_names, setting, settings_of
from minivit.data.augment import CROP_MODES
from minivit.data.operations import POLICIES
from minivit.kernels import cuda
from minivit.model.initialisation import INITS
from minivit.optim import OPTIMIZERS, check_schedule
from minivit.training.engines.cut import check_workers


@dataclass(frozen=True)
class ModelSettings:
    """How the parameters begin, and which of them are trained."""

    init: str = setting("official", "initial parameters: official, or mimetic (attention that begins as it ends)")
    whiten: bool = setting(False, "begin with a patch embedding that whitens the training patches")
    freeze: str = setting(
        "",
        "parameters that stay as they are, by name: 'patch_embed*,blocks.[0-3].*', or '*,!head.*' for all but the head",
    )

    def check_model(self):
        """Raises InputError for an impossible setting of this group."""
        check_choice(self, "init", INITS)


@dataclass(frozen=True)
class DataSettings:
    """Batches."""

    batch_size: int = setting(128, "images per batch; with data folder what suits their number, unless it is given")
    accumulate: int = setting(1, "batches per optimiser step (gradient accumulation)")
    half_size: float = setting(
        0.0, "share of the epochs, the first, on images of half the height and width: a quarter of the patches"
    )
    seed: int = setting(0, "seed of initialisation, shuffling, augmentation and dropout")

    def check_data(self):
        """Raises InputError for an impossible setting of this group."""
        check_range(self, 1, None, "batch_size", "accumulate")
        check_range(self, 0.0, 1.0, "half_size")
        check_range(self, 0, None, "seed")


@dataclass(frozen=True)
class AugmentationSettings:
    """Random changes of images and labels."""

    policy: str = setting("none", "an operation or two on each image: none, trivial, rand or auto(Augment)")
    rand_count: int = setting(2, "operations on an image with the policy rand")
    rand_magnitude: int = setting(9, "their strength, 0 to 30")
    crop_area: float = setting(
        0.0, "of data imagefolder: train on random parts of at least this share of an image's area; 0 for its centre"
    )
    crop_padding: int = setting(0, "random crops after padding by so many pixels")
    crop_mode: str = setting("zero", "what the padding shows: zero (black) or reflect (the image mirrored)")
    flip: bool = setting(False, "random horizontal flips")
    rotate: float = setting(0.0, "random rotations by up to so many degrees")
    zoom: float = setting(0.0, "random scaling of height and width by up to this share")
    shear: float = setting(0.0, "random slant, pixels per row")
    shift: float = setting(0.0, "random displacement by up to so many pixels, fractions included")
    erasing: float = setting(0.0, "probability that a random rectangle of an image becomes noise")
    mixup: float = setting(0.0, "alpha of mixup, which blends images and labels in pairs; 0 for none")
    cutmix: float = setting(0.0, "alpha of CutMix, which pastes rectangles between images; 0 for none")
    mix_probability: float = setting(1.0, "share of batches that are mixed, half of them by each if both are on")
    label_smoothing: float = setting(0.0, "share of each target given to all classes alike")

    def check_augmentation(self):
        """Raises InputError for an impossible setting of this group."""
        check_choice(self, "policy", POLICIES)
        check_range(self, 1, 16, "rand_count")
        check_range(self, 0, 30, "rand_magnitude")
        check_range(self, 0.0, 1.0, "crop_area", "erasing", "mix_probability")
        check_range(self, 0, None, "crop_padding")
        check_choice(self, "crop_mode", CROP_MODES)
        check_range(self, 0.0, 180.0, "rotate")
        check_range(self, 0.0, 1.0, "zoom", "label_smoothing", open_high=True)
        check_range(self, 0.0, None, "shear", "shift")
        check_range(self, 0.0, 1000.0, "mixup", "cutmix")


@dataclass(frozen=True)
class OptimizerSettings:
    """The update of a step."""

    optimizer: str = setting("adamw", "adamw, adam, sgd, lion or muon (the matrices of the blocks; adamw the rest)")
    lr: float = setting(1e-3, "peak learning rate")
    layer_decay: float = setting(1.0, "factor of the learning rate from each block to the one before it")
    momentum: float = setting(0.9, "momentum of sgd and muon")
    beta1: float = setting(0.9, "decay rate of adam's and lion's first moment")
    beta2: float = setting(0.999, "decay rate of adam's second moment; of lion's average, for which 0.99 is usual")
    adam_eps: float = setting(1e-8, "added to adam's denominator")
    weight_decay: float = setting(0.05, "weight decay of the matrices")
    clip_norm: float = setting(1.0, "largest global norm of the gradient; 0 for no clipping")
    ema_decay: float = setting(0.0, "decay of the moving average of the weights, tested in their place; 0 for none")

    def check_optimizer(self):
        """Raises InputError for an impossible setting of this group."""
        check_choice(self, "optimizer", OPTIMIZERS)
        check_range(self, 0.0, None, "lr", "weight_decay", "clip_norm")
        check_range(self, 1e-3, 1.0, "layer_decay")
        check_range(self, 0.0, 1.0, "momentum", "beta1", "beta2", "ema_decay", open_high=True)
        check_range(self, 1e-30, 1.0, "adam_eps")


@dataclass(frozen=True)
class ScheduleSettings:
    """How long a training lasts, and the learning rate meanwhile."""

    epochs: int = setting(20, "passes over the training images; with data folder what suits their number, unless given")
    steps: int = setting(0, "optimiser steps in place of epochs, the last pass perhaps cut short; 0 for epochs")
    schedule: str = setting("cosine", "cosine, linear, constant or trapezoid, each after warmup_epochs")
    cooldown: float = setting(0.2, "share of the steps over which a trapezoid falls to final_lr")
    warmup_epochs: float = setting(1.0, "epochs over which the learning rate rises linearly; at most half of the run")
    warmup_steps: int = setting(0, "optimiser steps in place of warmup_epochs; 0 for warmup_epochs")
    final_lr: float = setting(0.0, "learning rate at the end of the schedule")

    def check_schedule(self):
        """Raises InputError for an impossible setting of this group."""
        check_range(self, 1, None, "epochs")
        check_range(self, 0, None, "steps", "warmup_steps")
        check_schedule(self.schedule)
        check_range(self, 0.0, 1.0, "cooldown")
        check_range(self, 0.0, None, "warmup_epochs", "final_lr")


@dataclass(frozen=True)
class MachineSettings:
    """Where a training is computed, and in which pieces."""

    workers: int = setting(
        0, "threads that share each batch; 0 for what suits the model (it fixes the order of sums)"
    )  # fmt: skip
    micro_batch: int = setting(
        0, "most images that a thread takes at a time; 0 for about 1,024 tokens (it fixes the order of sums)"
    )
    recompute: bool = setting(
        False, "make activations again in the backward pass instead of keeping them: less memory, more time, same bits"
    )
    device: str = setting("cpu", "where to compute: cpu, cuda, cuda:1 (the second GPU, ...), or auto")
    gpu_micro_batch: int = setting(0, "images that a GPU takes at a time; 0 for the whole batch")
    precision: str = setting(
        "float32", "on a GPU: float32, tf32 (factors of products rounded to 10 bits) or bf16 (blocks store 7)"
    )
    graph: bool = setting(
        True,
        "replay a GPU's steps from a CUDA graph, with adam, adamw and muon; not with layer_decay or accumulate, "
        "nor where a LayerNorm is wider than 1024 or its width no multiple of 4",
    )

    def check_machine(self):
        """Raises InputError for an impossible setting of this group."""
        check_workers(self.workers)
        check_range(self, 0, None, "micro_batch", "gpu_micro_batch")
        check_choice(self, "precision", cuda.PRECISIONS)


@dataclass(frozen=True)
class LogSettings:
    """What is tested, checked and written, and how often."""

    log_every: int = setting(10, "steps between two lines of metrics.jsonl")
    evaluate_every: int = setting(1, "epochs between two evaluations")
    test_flip: bool = setting(False, "test with the mean of the logits of each image and its mirror image")
    check_finite: bool = setting(
        False,
        "look at every tensor of each step and stop at the first that is not finite, with its name and what made it; "
        "a step then takes some 2 times as long, of a tiny model 4 to 6 times",
    )
    checkpoint_seconds: float = setting(30.0, "seconds between two checkpoints; one is always written at the end")

    def check_log(self):
        """Raises InputError for an impossible setting of this group."""
        check_range(self, 1, None, "log_every", "evaluate_every")
        check_range(self, 0.0, None, "checkpoint_seconds")


GROUPS = {
    "model": ModelSettings, "data": DataSettings, "augmentation": AugmentationSettings, "optimizer": OptimizerSettings,
    "schedule": ScheduleSettings, "machine": MachineSettings, "log": LogSettings,
}  # fmt: skip


@dataclass(frozen=True)
class TrainConfig(
    LogSettings, MachineSettings, ScheduleSettings, OptimizerSettings, AugmentationSettings, DataSettings, ModelSettings
):
    """Everything that defines a run beside the model and the data: the settings of all groups.

    Raises  InputError (a ValueError): from the constructor, for any impossible setting.
    """

    def __post_init__(self):
        check_types(self)
        for group in GROUPS:
            getattr(self, f"check_{group}")()


# Settings that a resumed run may change: they alter neither the numbers nor their order.
FREE_ON_RESUME = ("recompute", "log_every", "check_finite", "checkpoint_seconds")
MAY_MOVE = ("device", "gpu_micro_batch", "precision", "graph")  # they change rounding alone: a run may go on elsewhere

# Settings of earlier versions, and their values for "off", which mean nothing any more.
REMOVED = {"sam": 0.0, "repeats": 1, "cutout": 0}


def without_removed(settings, where):
    """The settings of a dict that comes from a file, without those that this version has no more and that are off.

    Raises  InputError: one of them is on.
    """
    for name, off in REMOVED.items():
        if name in settings and (type(settings[name]) is bool or settings[name] != off):
            raise InputError(
                f"{where}: {name} {settings[name]!r} was a setting of an earlier version and is removed; "
                f"leave it out, or at {off}"
            )
    return {name: value for name, value in settings.items() if name not in REMOVED}


def train_config_of(record):
    """The `TrainConfig` that a checkpoint's `Record` describes.

    Raises  InputError: it is missing, or holds unknown, removed or impossible settings.
    """
    if record.settings is None:
        raise InputError(f"{record.path} does not say how its model was trained; the checkpoints of minivit train do")
    return settings_of(TrainConfig, without_removed(record.settings, record.path), record.path)


def loading_settings(config, num_classes):
    """The keyword settings of `minivit.data.batches` that a `TrainConfig` means: how images are augmented and mixed.

    ``mixing`` is None where no batch is to be mixed, so that labels stay class indices.
    """
    mixing = None
    if config.mixup or config.cutmix:
        mixing = {
            "num_classes": num_classes, "mixup_alpha": config.mixup, "cutmix_alpha": config.cutmix,
            "probability": config.mix_probability,
        }  # fmt: skip
    others = ("mixup", "cutmix", "mix_probability", "label_smoothing")
    augmentation = {name: getattr(config, name) for name in field_names(AugmentationSettings) if name not in others}
    return {"mixing": mixing, **augmentation}
