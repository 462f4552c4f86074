"""Train a Vision Transformer, from nothing or from where a run stopped."""

from dataclasses import replace
from pathlib import Path

from minivit.base.errors import InputError
from minivit.base.params import count
from minivit.commands.cli import Parser
from minivit.commands.training import (
    HELP,
    add_recipe,
    add_run,
    best_in_words,
    explain,
    free_folder,
    recipe_of_flags,
    refuse_idle_flags,
    resume_recipe,
    run_to_end,
    stopped_run,
    within_budget,
)
from minivit.training.config import train_config_of
from minivit.training.folder import refuse_used
from minivit.training.recipes import prepare
from minivit.training.trainer import Trainer
from minivit.weights.start import Start

EXAMPLES = """
examples:
  minivit train                                         the embedded digits, with minivit/configs/digits.toml
  minivit train --data cifar10 --data-dir data          CIFAR-10, with minivit/configs/cifar10.toml
  minivit train --config cifar10-1h                     a recipe, by the name of its file in configs/
  minivit train --data cifar10 --budget 30m             as many epochs as 30 minutes hold on this machine
  minivit train --resume --out runs/digits              go on where a run stopped
  minivit train --config my.toml --lr 5e-4 --seed 1     a settings file, two of its values changed
  minivit train --data folder --data-dir pictures       your own images, pictures/train/CLASS and pictures/test/CLASS
  minivit train --data folder --data-dir pictures --test-share 0.2      pictures/CLASS, a fifth of each for testing
  minivit train --data cifar10 --classes 0-4            five of the classes
  minivit train --data cifar10 --classes 5-9 --from runs/cifar10/last.npz --image-size 48
      fine-tunes that model on the others, at a larger size; --freeze '*,!head.*' would train its new head alone

Settings come from, in rising order: their defaults, the settings file (its preset, then its keys), --preset, the flags.
A settings file has the tables [data], [model] (and preset = "..." in it), [augmentation], [optimizer], [schedule],
[machine], [log] and [start]; the keys are the flags' names, in the groups below, and checkpoint for --from. Files of
earlier versions, with one table [train] for all of the training, are read too.
"""


def parse(argv):
    """The command line as a namespace; settings that were not given are absent from it."""
    parser = Parser(description=__doc__, epilog=EXAMPLES, command="train")
    where = add_recipe(parser)
    add_run(where, "NAME")
    return parser.parse_args(argv)


def start(arguments):
    """A `Trainer` at the beginning of a new run."""
    recipe = recipe_of_flags(arguments)
    out = Path(arguments.out) if arguments.out else free_folder(recipe.data["data"])
    refuse_used(out)
    dataset, model, config, begins = prepare(recipe)
    refuse_idle_flags(arguments, model, config)
    if arguments.budget is not None:
        config = within_budget(arguments, dataset, model, config)
    return Trainer(dataset, model, config, out, progress=not arguments.quiet, **begins, **HELP)


def resume(arguments):
    """A `Trainer` where the run in --out stopped; settings asked for again must be those of the run."""
    last, dataset, describe = stopped_run(arguments)
    _, record = last
    config = train_config_of(record)
    _, model, train, begins = resume_recipe(arguments, describe, record.path)
    for key, value in begins.items():
        if (before := (record.start or {}).get(key)) != value:
            raise InputError(
                f"{record.path} began with {key} {before}, not {value}; start a new run with another --out"
            )
    return Trainer(
        dataset, replace(record.config, **model), replace(config, **train), arguments.out, describe=describe,
        start=Start(None, record.start) if record.start else None, resume=last, progress=not arguments.quiet, **HELP,
    )  # fmt: skip


def main(argv=None):
    """Entry point; returns the exit status."""
    arguments = parse(argv)
    trainer = resume(arguments) if arguments.resume else start(arguments)
    c, data = trainer.model.config, trainer.dataset
    print(f"{data.name}: {data.source}")
    print(
        f"{len(data.train_images):,} training and {len(data.test_images):,} test images of "
        f"{c.image_size}x{c.image_size}x{c.channels}, {len(data.class_names)} classes"
    )
    print(
        f"ViT: patch {c.patch_size}, {c.num_tokens} tokens, width {c.width}, {c.depth} blocks, {c.num_heads} heads, "
        f"{trainer.model.flat.size:,} parameters; writing to {trainer.out}"
    )
    if trainer.origin:
        print(f"it begins with {trainer.origin.get('checkpoint')} ({trainer.origin.get('weights')})")
    if trainer.plan.frozen:
        frozen = count([spec for spec in trainer.model.table if spec.name in trainer.plan.frozen])
        print(f"{frozen:,} of the parameters stay as they are")
    explain(trainer)
    summary, length = run_to_end(trainer)
    if summary is None:
        return 130
    print(
        f"test accuracy {summary['test_accuracy']:.2%}{best_in_words(summary)} after {length} in "
        f"{summary['train_seconds']:.0f} s ({summary['images_per_second']:,.0f} images/s); "
        f"figures and checkpoints in {trainer.out}"
    )
    return 0
