"""Train a Vision Transformer, from nothing or from where a run stopped."""

from dataclasses import replace
from pathlib import Path

from minivit import ViTConfig
from minivit.base.errors import InputError
from minivit.base.params import count
from minivit.commands.cli import Parser, given
from minivit.training.recipes import (
    add_recipe,
    add_run,
    check_same_data,
    free_folder,
    prepare,
    recipe_of_flags,
    run_to_end,
    stopped_run,
    trainer_of,
    within_budget,
)
from minivit.training.trainer import TrainConfig, Trainer, config_from, origin_of, refuse_used
from minivit.weights import checkpoint
from minivit.weights.start import Start, StartConfig

EXAMPLES = """
examples:
  minivit train                                         the embedded digits, with minivit/configs/digits.toml
  minivit train --data cifar10 --data-dir data          CIFAR-10, with minivit/configs/cifar10.toml
  minivit train --config cifar10-1h                     a recipe, by the name of its file in configs/
  minivit train --data cifar10 --budget 30m             as many epochs as 30 minutes hold on this machine
  minivit train --resume --out runs/digits              go on where a run stopped
  minivit train --config my.toml --lr 5e-4 --seed 1     a settings file, two of its values changed
  minivit train --data folder --data-dir pictures --preset Micro/4 --image-size 48
  minivit train --data cifar10 --classes 0-4            five of the classes
  minivit train --data cifar10 --classes 5-9 --from runs/cifar10/last.npz --image-size 48
      fine-tunes that model on the others, at a larger size; --freeze '*,!head.*' would train its new head alone

Settings come from, in rising order: their defaults, the settings file (its preset, then its keys), --preset, the flags.
A settings file has the tables [model] (and preset = "..." in it), [train], [data] and [start]; the keys are the flags'
names, and checkpoint for --from.
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
    if arguments.budget is None:
        return trainer_of(recipe, out, progress=not arguments.quiet)
    dataset, model, config, begins = prepare(recipe)
    config = within_budget(arguments, dataset, model, config)
    return Trainer(dataset, model, config, out, progress=not arguments.quiet, **begins)


def resume(arguments):
    """A `Trainer` where the run in --out stopped; settings asked for again must be those of the run."""
    path, meta, dataset, describe = stopped_run(arguments)
    model, train = checkpoint.config_of(meta, path), config_from(meta, path)
    origin, asked_start = origin_of(meta), given(arguments, StartConfig)
    asked_data, asked_model, asked_train = {}, given(arguments, ViTConfig), given(arguments, TrainConfig)
    if arguments.preset or arguments.config:
        asked_data, asked_model, asked_train, asked_start = recipe_of_flags(arguments, describe["data"])
    for key, value in asked_start.items():
        if (found := (origin or {}).get(key)) != value:
            raise InputError(f"{path} began with {key} {found}, not {value}; start a new run with another --out")
    check_same_data(arguments, asked_data, describe, path)
    model, train = replace(model, **asked_model), replace(train, **asked_train)
    start = Start(None, origin) if origin else None
    trainer = Trainer(
        dataset, model, train, arguments.out, describe=describe, start=start, progress=not arguments.quiet
    )  # fmt: skip
    trainer.restore(path)
    return trainer


def main(argv=None):
    """Entry point; returns the exit status."""
    arguments = parse(argv)
    trainer = resume(arguments) if arguments.resume else start(arguments)
    c, data = trainer.model.config, trainer.dataset
    print(f"{data.name}: {data.source}")
    print(
        f"{len(data.train_images):,} training and {len(data.test_images):,} test pictures of "
        f"{c.image_size}x{c.image_size}x{c.channels}, {len(data.class_names)} classes"
    )
    print(
        f"ViT: patch {c.patch_size}, {c.num_tokens} tokens, width {c.width}, {c.depth} blocks, {c.num_heads} heads, "
        f"{trainer.model.flat.size:,} parameters; writing to {trainer.out}"
    )
    if trainer.origin:
        print(f"it begins with {trainer.origin.get('checkpoint')} ({trainer.origin.get('weights')})")
    if trainer.frozen:
        frozen = count([spec for spec in trainer.model.table if spec.name in trainer.frozen])
        print(f"{frozen:,} of the parameters stay as they are")
    summary, length = run_to_end(trainer, resumed=arguments.resume)
    if summary is None:
        return 130
    print(
        f"test accuracy {summary['test_accuracy']:.2%} after {length} in "
        f"{summary['train_seconds']:.0f} s ({summary['images_per_second']:,.0f} pictures/s); "
        f"figures and checkpoints in {trainer.out}"
    )
    return 0
