"""Pre-train a Vision Transformer without labels: it guesses what is under masked patches."""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from minivit.base.errors import InputError
from minivit.base.files import read_toml
from minivit.base.settings import field_names
from minivit.commands.cli import Parser, add_settings, given
from minivit.commands.training import (
    HELP,
    add_recipe,
    add_run,
    draw_masked,
    explain,
    file_of_flags,
    free_folder,
    recipe_of_flags,
    refuse_idle_flags,
    resume_recipe,
    run_to_end,
    stopped_run,
    within_budget,
)
from minivit.masked import MaskedConfig
from minivit.masked.pretrain import MaskedPrediction, masked_of
from minivit.training.config import train_config_of
from minivit.training.folder import refuse_used
from minivit.training.recipes import TABLES, prepare
from minivit.training.trainer import Trainer

EXAMPLES = """
examples:
  minivit pretrain                                      masked patches of CIFAR-10, minivit/configs/pretrain-mpp.toml
  minivit pretrain --method mae                         a masked autoencoder, with minivit/configs/pretrain-mae.toml
  minivit pretrain --target downsized --epochs 2        sixteen colours of every patch
  minivit pretrain --method mae --budget 10m            as many epochs as ten minutes hold on this machine
  minivit pretrain --data digits --patch-size 2 --crop-padding 1 --no-flip   the embedded digits
  minivit pretrain --resume --out runs/mae-cifar10      go on where a run stopped
  minivit visualize masked runs/mae-cifar10/last.npz    what it sees and what it guesses

Two methods: mpp, the masked patch prediction of the ViT paper, and mae, the masked autoencoder. Test accuracy is the
share of right guesses at masked patches of the test images (of regression, the share of variance explained), to be
compared with guessing without looking. The checkpoints hold the encoder as an ordinary ViT with a zero head: what
begins with weights of a file can begin with them.

Settings come from, in rising order: their defaults, the settings file, --preset, the flags. A settings file has the
tables of minivit train and [pretraining]; by default it is minivit/configs/pretrain-METHOD.toml.
"""
ALL_TABLES = TABLES | {"pretraining": field_names(MaskedConfig)}


def parse(argv):
    """The command line as a namespace; settings that were not given are absent from it."""
    parser = Parser(description=__doc__, epilog=EXAMPLES, command="pretrain")
    add_settings(parser.add_argument_group("pre-training"), MaskedConfig)
    where = add_recipe(parser, data="that of the settings file", file="pretrain-METHOD", start=False)
    add_run(where, "METHOD-NAME")
    return parser.parse_args(argv)


def recipe_and_task(arguments):
    """What was asked for: (Recipe, MaskedConfig).

    Raises  InputError: an unknown or impossible setting.
    """
    name = f"pretrain-{getattr(arguments, 'method', MaskedConfig().method)}"
    file = file_of_flags(arguments, name)
    task = read_toml(file, ALL_TABLES)["pretraining"] if file else {}
    masked = MaskedConfig(**task | given(arguments, MaskedConfig))
    return recipe_of_flags(arguments, name, tables=ALL_TABLES), masked


def start(arguments):
    """A `Trainer` at the beginning of a new run."""
    recipe, masked = recipe_and_task(arguments)
    if recipe.start:
        raise InputError("pre-training begins from nothing: leave [start] out of the settings file")
    if recipe.model.get("pre_logits"):
        raise InputError("pre_logits is a layer of the head, which pre-training does not train: leave it out")
    out = Path(arguments.out) if arguments.out else free_folder(f"{masked.method}-{recipe.data['data']}")
    refuse_used(out)
    dataset, model, config, begins = prepare(recipe)
    refuse_idle_flags(arguments, model, config, masked)
    task = partial(MaskedPrediction, masked=masked)
    if arguments.budget is not None:
        config = within_budget(arguments, dataset, model, config, task=task)
    return Trainer(
        dataset, model, config, out, task=task, progress=not arguments.quiet, **begins, **HELP | {"draw": draw_masked}
    )


def resume(arguments):
    """A `Trainer` where the run in --out stopped; settings asked for again must be those of the run."""
    last, dataset, describe = stopped_run(arguments)
    _, record = last
    masked, config = masked_of(record), train_config_of(record)
    task = given(arguments, MaskedConfig)
    if arguments.preset or arguments.config:
        task = asdict(recipe_and_task(arguments)[1])
    _, model, train, _ = resume_recipe(
        arguments, describe, record.path, lambda arguments, _: recipe_and_task(arguments)[0]
    )
    return Trainer(
        dataset, replace(record.config, **model), replace(config, **train), arguments.out,
        task=partial(MaskedPrediction, masked=replace(masked, **task)), describe=describe, resume=last,
        progress=not arguments.quiet, **HELP | {"draw": draw_masked},
    )  # fmt: skip


def main(argv=None):
    """Entry point; returns the exit status."""
    arguments = parse(argv)
    trainer = resume(arguments) if arguments.resume else start(arguments)
    c, m, data = trainer.model.config, trainer.task.masked, trainer.dataset
    print(f"{data.name}: {data.source}")
    print(
        f"{len(data.train_images):,} training and {len(data.test_images):,} test images of "
        f"{c.image_size}x{c.image_size}x{c.channels}"
    )
    print(
        f"{m.method}: {trainer.model.predicted} of {c.grid_size**2} patches of {c.patch_size}x{c.patch_size}, target "
        f"{m.target}; width {c.width}, {c.depth} blocks, {trainer.model.flat.size:,} parameters, of which "
        f"{trainer.model.encoder.flat.size:,} are the encoder's; writing to {trainer.out}"
    )
    explain(trainer)
    summary, length = run_to_end(trainer)
    if summary is None:
        return 130
    figure = "right guesses" if trainer.model.classes else "variance explained"
    print(
        f"test loss {summary['test_loss']:.4f}, {figure} {summary['test_accuracy']:.2%} at the masked patches (without "
        f"looking {summary['chance_loss']:.4f}, {summary['chance_accuracy']:.2%}) after {length} in "
        f"{summary['train_seconds']:.0f} s ({summary['images_per_second']:,.0f} images/s); "
        f"figures and checkpoints in {trainer.out}"
    )
    return 0
