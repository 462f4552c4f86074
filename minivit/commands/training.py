"""What the commands that train share: the flags of a recipe, budgets, runs that go on, figures at the end."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from minivit.base.errors import InputError
from minivit.base.words import counted
from minivit.commands.cli import add_settings, given
from minivit.data import DATASETS
from minivit.data.source import DATA_KEYS, dataset_of
from minivit.laboratory.diagnosis import diagnose
from minivit.model import ViTConfig
from minivit.training.budget import seconds_of, within
from minivit.training.config import GROUPS, TrainConfig
from minivit.training.folder import LAST, last_checkpoint
from minivit.training.idle import refuse_idle
from minivit.training.plan import warning_of
from minivit.training.recipes import FINETUNE, TABLES, Recipe, find_config, own_config, read_recipe
from minivit.weights import checkpoint
from minivit.weights.start import StartConfig


def draw_classification(run, outputs):
    """The figures at the end of a run with labels."""
    from minivit.figures.runs import draw_classification  # matplotlib is slow to import, and only the end needs it

    draw_classification(run, outputs)


def draw_masked(run, outputs):
    """The figures at the end of a run of pre-training."""
    from minivit.figures.runs import draw_masked

    draw_masked(run, outputs)


HELP = {"draw": draw_classification, "diagnose": diagnose}  # what `Trainer` takes from outside of the training


def add_recipe(
    parser, *, skip=(), data=DATA_KEYS["data"], file=f"that of the data; with --from, {FINETUNE}", start=True
):  # fmt: skip
    """Add the flags of data, model and training; returns the first group of them, for the command's own.

    ``skip`` names settings of the training whose flags the command uses for something else, ``data`` and ``file`` are
    what the help calls the data set and the settings file that are taken by default. Without ``start`` there are no
    flags of a model to begin with.
    Settings that are not given are absent from the namespace; see `recipe_of_flags`.
    """
    where = parser.add_argument_group("data and output")
    add = where.add_argument
    add("--data", choices=DATASETS, default=None, help=f"data set [{data}]")
    add("--data-dir", metavar="DIR", default=None, help="where the data lie [data]")
    add(
        "--classes",
        metavar="LIST",
        default=None,
        help="classes to keep, as 0-4,7 or cat,dog: numbers and ranges, or names [all]",
    )
    add("--train-share", type=float, metavar="X", default=None, help="share of the training images to keep [1]")
    add("--test-share", type=float, metavar="X", default=None, help="of images in DIR/CLASS that are not split: the "
        "share of each class for testing, such as 0.2 [they are split: DIR/train/CLASS, DIR/test/CLASS]")  # fmt: skip
    add("--split-seed", type=int, metavar="N", default=None, help="what draws the images of --test-share [0]")
    add("--config", metavar="FILE", help=f"settings file, or the name of one in configs/ [{file}]")
    if start:
        group = parser.add_argument_group("start, in place of a model from nothing")
        group.add_argument(
            "--from", dest="checkpoint", metavar="FILE", default=argparse.SUPPRESS,
            help="begin with this checkpoint's model (its moving average if it has one) and its width, depth, ...; "
            "size of images (the data's own, unless --image-size is given) and patches, classes, dropout rates may "
            "differ, and sincos2d positions be learned on",
        )  # fmt: skip
        add_settings(group, StartConfig, skip=("checkpoint",))
        group.add_argument("--imagenet-pixels", dest="pixels", action="store_const", const="imagenet",
                           default=argparse.SUPPRESS, help="the same as --pixels imagenet")  # fmt: skip
    model = parser.add_argument_group("model")
    model.add_argument("--preset", metavar="NAME", default=None, help="a named size, such as Micro/4 or Ti/16")
    add_settings(model, ViTConfig)
    for name, settings in GROUPS.items():
        group = {"model": model, "data": where}.get(name) or parser.add_argument_group(name)
        add_settings(group, settings, skip=skip)
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
    if arguments.config:
        return find_config(arguments.config)
    return own_config(name or arguments.data or DATA_KEYS["data"])


def recipe_of_flags(arguments, name=None, *, tables=TABLES):
    """The settings that were asked for by flags of `add_recipe`, merged with their settings file, as a `Recipe`.

    ``name`` is the data set whose settings file is read unless a file is named; by default the one asked for.
    Raises  InputError: see `read_recipe`.
    """
    start = given(arguments, StartConfig)
    file = file_of_flags(arguments, FINETUNE if start else name)
    flags = [key for key in DATA_KEYS if key != "image_size"]  # whose flag is the model's
    data = {key: value for key in flags if (value := getattr(arguments, key)) is not None}
    return read_recipe(
        file, data=data, preset=arguments.preset, model=given(arguments, ViTConfig),
        train=given(arguments, TrainConfig), start=start, tables=tables,
    )  # fmt: skip


def free_folder(name):
    """runs/NAME, or the first of runs/NAME-2, runs/NAME-3, ... that holds nothing yet."""
    folder, number = Path("runs") / name, 2
    while folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        folder, number = Path("runs") / f"{name}-{number}", number + 1
    return folder


def within_budget(arguments, dataset, model, config, **keywords):
    """The settings of a training as long as fits into ``--budget`` on this machine, see `within`; told in one line.

    ``keywords`` are those of `Trainer`.
    Raises  InputError: epochs or steps were asked for too, or not even a step fits.
    """
    if both := {"epochs", "steps"} & set(given(arguments, TrainConfig)):
        raise InputError(f"--budget finds the number of epochs: leave --{both.pop()} out")
    config, each = within(seconds_of(arguments.budget), dataset, model, config, diagnose=diagnose, **keywords)
    fit = f"{counted(config.steps, 'step')} of it" if config.steps else config.epochs
    print(f"an epoch takes about {each:.3g} s on this machine: {fit} fit into {arguments.budget}", flush=True)
    return config


def stopped_run(arguments):
    """The run in ``--out`` that ``--resume`` goes on with: (its checkpoint, see `checkpoint.read`; Dataset; describe).

    Raises  InputError: no run is named, its checkpoint or data are missing or damaged.
    """
    if arguments.budget is not None:
        raise InputError("--budget is for a new run; one that stopped goes on to the end that it was given")
    if not arguments.out:
        raise InputError("--resume needs --out, the folder of the run to go on with")
    last = last_checkpoint(arguments.out) or checkpoint.read(Path(arguments.out) / LAST)
    dataset = dataset_of(last[1], data_dir=arguments.data_dir)
    describe = {key: last[1].data.get(key, default) for key, default in DATA_KEYS.items()}
    describe["data_dir"] = arguments.data_dir or describe["data_dir"]
    return last, dataset, describe


def refuse_idle_flags(arguments, *settings):
    """Raises InputError if a flag has no effect beside all the settings of a new run, objects of settings classes."""
    settings = {name: value for each in settings for name, value in asdict(each).items()}
    refuse_idle([name for name in settings if hasattr(arguments, name)], settings)


def resume_recipe(arguments, describe, path, recipe_of=recipe_of_flags):
    """What flags beside ``--resume`` ask for, and the settings file that they name: a `Recipe`, perhaps empty.

    ``recipe_of(arguments, name)`` reads that file; ``describe`` is of the run's data, ``path`` its checkpoint.
    Raises  InputError: other data than the run's.
    """
    recipe = Recipe({}, given(arguments, ViTConfig), given(arguments, TrainConfig), given(arguments, StartConfig))
    if arguments.preset or arguments.config:
        recipe = recipe_of(arguments, describe["data"])
    _check_same_data(arguments, recipe.data, describe, path)
    return recipe


def _check_same_data(arguments, data, describe, path):
    classes, own = arguments.classes or data.get("classes"), describe["classes"]
    if classes not in (None, own):
        raise InputError(f"{path} was trained on {f'the classes {own}' if own else 'all classes'}, not {classes}")
    share, own = arguments.train_share or data.get("train_share"), describe["train_share"]
    if share not in (None, own):
        raise InputError(f"{path} was trained on a share of {own or 1} of the training images, not of {share}")
    for key in ("test_share", "split_seed"):
        asked = data.get(key) if getattr(arguments, key) is None else getattr(arguments, key)
        if asked not in (None, describe[key]):
            raise InputError(f"{path} was trained on images split by {key} {describe[key]}, not by {asked}")
    name = arguments.data or data.get("data", describe["data"])
    if name != describe["data"]:
        raise InputError(f"{path} was trained on {describe['data']}, not on {name}")


FOLDER = (
    "that folder will hold last.npz, to go on from or to use; best.npz, of the epoch that was best on the test images; "
    "settings.json, metrics.jsonl and, at the end, figures and summary.json"
)  # of a run, in words


def explain(trainer):
    """Say what is in a run's folder, and warn of a run that is too short to learn anything."""
    print(FOLDER)
    if not trainer.resumed and (warning := warning_of(trainer.plan, trainer.origin)):
        print(f"warning: {warning}")


def best_in_words(summary):
    """The best test of a run, and what it was chosen by; "" where the last was the best."""
    if summary["best_epoch"] == summary["epochs"]:
        return ""
    best, epoch = summary["best_test_accuracy"], summary["best_epoch"]
    return f" (best on the test images, and chosen by them: {best:.2%} after epoch {epoch})"


def run_to_end(trainer):
    """Train to the end, and say where a run goes on that had stopped: (summary, its length in words).

    The summary is None if a signal stopped the run.
    """
    if trainer.resumed and trainer.finished:
        print(f"this run has made all of its {trainer.plan.total_steps} steps: its figures are drawn again")
    elif trainer.resumed:
        print(f"resuming at step {trainer.state.step} of {trainer.plan.total_steps}")
    steps, epochs = trainer.config.steps, trainer.config.epochs
    return trainer.run(), counted(steps, "step") if steps else counted(epochs, "epoch")
