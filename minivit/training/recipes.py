"""Settings files and flags, and the runs that are made of them: whatever trains takes the same ones.

A settings file is TOML with the tables [data], [model] (and ``preset`` in it), [train] and [start]; its keys are the
fields of `ViTConfig`, `TrainConfig` and `StartConfig`. Those that come with minivit lie in configs/ and are known by
their names.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from minivit.base.errors import InputError
from minivit.base.settings import field_names
from minivit.base.words import counted
from minivit.commands.cli import add_settings, given, read_toml
from minivit.data import DATASETS, FOLDERS, load
from minivit.model import ViTConfig, preset_fields
from minivit.training.budget import seconds_of, within
from minivit.training.trainer import LAST, TrainConfig, Trainer, check_data, dataset_of
from minivit.weights import checkpoint
from minivit.weights.start import StartConfig, load_start, prepare_start

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
FINETUNE = "finetune"  # the settings file of runs that begin with a trained model, unless they name another
DATA_KEYS = {"data": "digits", "data_dir": "data", "image_size": None, "classes": None, "train_share": None}
SECTIONS = {
    "data": DATA_KEYS,
    "model": ["preset", *field_names(ViTConfig)],
    "train": field_names(TrainConfig),
    "start": field_names(StartConfig),
}


class Recipe(NamedTuple):
    """Settings that were asked for; those that are absent have their defaults."""

    data: dict  # data, data_dir, image_size, classes, train_share
    model: dict  # of `ViTConfig`
    train: dict  # of `TrainConfig`
    start: dict = {}  # of `StartConfig`


def add_recipe(
    parser, *, skip=(), data=DATA_KEYS["data"], file=f"that of the data; with --from, {FINETUNE}", start=True
):  # fmt: skip
    """Add the flags of data, model and training; returns the first group of them, for the script's own.

    ``skip`` names settings of the training whose flags the script uses for something else, ``data`` and ``file`` are
    what the help calls the data set and the settings file that are taken by default. Without ``start`` there are no
    flags of a model to begin with.
    Settings that are not given are absent from the namespace; see `recipe_of_flags`.
    """
    where = parser.add_argument_group("data and output")
    where.add_argument("--data", choices=DATASETS, default=None, help=f"data set [{data}]")
    where.add_argument("--data-dir", metavar="DIR", default=None, help="where the data lie [data]")
    where.add_argument(
        "--classes", metavar="LIST", default=None, help="classes to keep: numbers, ranges, names, as 0-4,cat [all]"
    )
    where.add_argument(
        "--train-share", type=float, metavar="X", default=None, help="share of the training pictures to keep [1]"
    )
    where.add_argument("--config", metavar="FILE", help=f"settings file, or the name of one in configs/ [{file}]")
    if start:
        group = parser.add_argument_group("start, in place of a model from nothing")
        group.add_argument(
            "--from", dest="checkpoint", metavar="FILE", default=argparse.SUPPRESS,
            help="begin with this checkpoint's model (its moving average if it has one) and its width, depth, ...; "
            "size of pictures (the data's own, unless --image-size is given) and patches, classes, dropout rates may "
            "differ, and sincos2d positions be learned on",
        )  # fmt: skip
        add_settings(group, StartConfig, skip=("checkpoint",))
    model = parser.add_argument_group("model")
    model.add_argument("--preset", metavar="NAME", default=None, help="a named size, such as Micro/4 or Ti/16")
    add_settings(model, ViTConfig)
    add_settings(parser.add_argument_group("training"), TrainConfig, skip=skip)
    return where


def add_run(where, name):
    """Add the flags of a run's folder and time to a group; ``name`` is what the help calls the folder in runs."""
    where.add_argument(
        "--out", metavar="DIR", help=f"folder for the run [runs/{name}, or the first free runs/{name}-2, ...]"
    )
    where.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    where.add_argument("--budget", metavar="TIME", help="as many epochs, or steps of one, as fit into 90s, 10m or 2.5h")
    where.add_argument("--quiet", action="store_true", help="no progress bar")


def file_of_flags(arguments, name=None):
    """The settings file that flags of `add_recipe` name, by default that of their data set, or None for none.

    Raises  InputError: see `find_config`.
    """
    own = CONFIGS / f"{name or arguments.data or DATA_KEYS['data']}.toml"
    return find_config(arguments.config) if arguments.config else own if own.exists() else None


def recipe_of_flags(arguments, name=None, *, sections=SECTIONS):
    """The settings that were asked for by flags of `add_recipe`, merged with their settings file, as a `Recipe`.

    ``name`` is the data set whose settings file is read unless a file is named; by default the one asked for.
    Raises  InputError: see `read_recipe`.
    """
    start = given(arguments, StartConfig)
    file = file_of_flags(arguments, FINETUNE if start else name)
    flags = ("data", "data_dir", "classes", "train_share")
    data = {key: value for key in flags if (value := getattr(arguments, key)) is not None}
    return read_recipe(
        file, data=data, preset=arguments.preset, model=given(arguments, ViTConfig),
        train=given(arguments, TrainConfig), start=start, sections=sections,
    )  # fmt: skip


def free_folder(name):
    """runs/NAME, or the first of runs/NAME-2, runs/NAME-3, ... that holds nothing yet."""
    folder, number = Path("runs") / name, 2
    while folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        folder, number = Path("runs") / f"{name}-{number}", number + 1
    return folder


def find_config(name, folder="", what="settings file"):
    """The path of a settings file: a file of that name, or minivit/configs/NAME.toml.

    ``folder`` is where in configs/ to look, ``what`` is what a message calls the file.
    Raises  InputError: there is neither; the message lists those of the folder.
    """
    own = CONFIGS / folder / f"{name}.toml"
    if own.exists() and not Path(name).is_file():
        return own
    if Path(name).exists() or "/" in str(name) or str(name).endswith(".toml"):
        return Path(name)
    known = ", ".join(sorted(path.stem for path in (CONFIGS / folder).glob("*.toml")))
    raise InputError(f"there is no {what} {name}; those that come with minivit are {known}")


def sizes_of(preset):
    """The sizes that a preset sets; what follows the data stays out unless it is asked for by name."""
    fields = {} if preset is None else preset_fields(preset)
    return {name: value for name, value in fields.items() if name not in ("image_size", "channels", "num_classes")}


def read_recipe(file, *, data=None, preset=None, model=None, train=None, start=None, sections=SECTIONS):
    """A settings file, or None for none, with settings that win over it: a `Recipe`.

    Epochs that are asked for also win over the file's steps. ``sections`` are the tables that the file may have, with
    their keys; others than `SECTIONS` are the caller's.
    Raises  InputError: no such file, an unknown or impossible setting of the data.
    """
    content = read_toml(file, sections) if file else {section: {} for section in SECTIONS}
    merged = DATA_KEYS | content["data"] | (data or {})
    where = file or "the settings"
    check_data(merged, where)
    if merged["data"] not in DATASETS:
        raise InputError(f"{where}: unknown data set {merged['data']!r}; choose one of {', '.join(DATASETS)}")
    sizes = sizes_of(content["model"].pop("preset", None)) | content["model"]
    train = train or {}
    if "epochs" in train and "steps" not in train:
        content["train"].pop("steps", None)
    return Recipe(
        merged, sizes | sizes_of(preset) | (model or {}), content["train"] | train, content["start"] | (start or {})
    )


def prepare(recipe):
    """Data and settings of a run: (Dataset, ViTConfig that fits it, TrainConfig, how it begins).

    The last are keyword arguments of `Trainer`: ``describe``, what a checkpoint says of the data, and ``start``.

    Raises  InputError: impossible settings, or the data or the checkpoint to start from are missing or damaged.
    """
    data, model, train, start = recipe
    config, start = TrainConfig(**train), StartConfig(**start)
    image_size = model.get("image_size") or data["image_size"]
    found = load_start(start.checkpoint) if start.checkpoint else None
    if found and not image_size and data["data"] in FOLDERS:  # whose pictures have no size of their own
        image_size = found[0].config.image_size
    kept = {key: data[key] for key in ("classes", "train_share")}
    dataset = load(data["data"], data["data_dir"], image_size=image_size, **kept)
    _, size, _, channels = dataset.train_images.shape
    asked = {"image_size": size, "channels": channels, "num_classes": len(dataset.class_names), **model}
    describe = {**data, "data_dir": str(data["data_dir"]), "image_size": image_size}
    if not start.checkpoint:
        return dataset, ViTConfig(**asked), config, {"describe": describe, "start": None}
    fitted, begins = prepare_start(start, asked, dataset.class_names, found)
    if not image_size and size != (before := found[0].config.image_size):
        print(
            f"note: the model goes on at the size of the data, {size}x{size} pixels; {start.checkpoint} is of "
            f"{before}x{before}, to which --image-size {before} scales the data",
            file=sys.stderr,
        )
    return dataset, fitted, config, {"describe": describe, "start": begins}


def within_budget(arguments, dataset, model, config, trainer_of=None):
    """The settings of a training as long as fits into ``--budget`` on this machine, see `within`; told in one line.

    ``trainer_of`` makes the trainer of such a run [Trainer].
    Raises  InputError: epochs or steps were asked for too, or not even a step fits.
    """
    if asked := {"epochs", "steps"} & set(given(arguments, TrainConfig)):
        raise InputError(f"--budget finds the number of epochs: leave --{asked.pop()} out")
    config, each = within(seconds_of(arguments.budget), dataset, model, config, trainer_of)
    fit = f"{counted(config.steps, 'step')} of it" if config.steps else config.epochs
    print(f"an epoch takes about {each:.3g} s on this machine: {fit} fit into {arguments.budget}", flush=True)
    return config


def stopped_run(arguments):
    """The run in ``--out`` that ``--resume`` goes on with: (path of its checkpoint, its meta, Dataset, describe).

    Raises  InputError: no run is named, its checkpoint or data are missing or damaged.
    """
    if arguments.budget is not None:
        raise InputError("--budget is for a new run; one that stopped goes on to the end that it was given")
    if not arguments.out:
        raise InputError("--resume needs --out, the folder of the run to go on with")
    path = Path(arguments.out) / LAST
    _, meta = checkpoint.load(path)
    dataset = dataset_of(meta, path, data_dir=arguments.data_dir)
    describe = {key: meta["data"].get(key) for key in DATA_KEYS}
    describe["data_dir"] = arguments.data_dir or describe["data_dir"]
    return path, meta, dataset, describe


def check_same_data(arguments, asked, describe, path):
    """Raises InputError if flags, or settings ``asked`` for by a file, name other data than a run was trained on."""
    classes = arguments.classes or asked.get("classes")
    if classes not in (None, found := describe["classes"]):
        raise InputError(f"{path} was trained on {f'the classes {found}' if found else 'all classes'}, not {classes}")
    share = arguments.train_share or asked.get("train_share")
    if share not in (None, found := describe["train_share"]):
        raise InputError(f"{path} was trained on a share of {found or 1} of the training pictures, not of {share}")
    name = arguments.data or asked.get("data", describe["data"])
    if name != describe["data"]:
        raise InputError(f"{path} was trained on {describe['data']}, not on {name}")


def run_to_end(trainer, *, resumed):
    """Train to the end, and say where a run that was ``resumed`` goes on: (summary, its length in words).

    The summary is None if a signal stopped the run.
    """
    if resumed and trainer.finished:
        print(f"this run has made all of its {trainer.total_steps} steps: its figures are drawn again")
    elif resumed:
        print(f"resuming at step {trainer.step} of {trainer.total_steps}")
    steps, epochs = trainer.config.steps, trainer.config.epochs
    return trainer.run(), counted(steps, "step") if steps else counted(epochs, "epoch")


def trainer_of(recipe, out, *, progress=True):
    """A `Trainer` at the beginning of a new run.

    Raises  InputError
    """
    dataset, model, config, begins = prepare(recipe)
    return Trainer(dataset, model, config, out, progress=progress, **begins)
