"""The Visual Task Adaptation Benchmark: how well a checkpoint adapts to 19 tasks from 1,000 examples of each."""

import time
from pathlib import Path

from minivit import figures
from minivit.base.backend import device_name, find_device
from minivit.base.errors import InputError, drawing
from minivit.base.files import write_json
from minivit.commands.cli import Parser
from minivit.commands.flags import add_place, add_reading, add_weights, reading_of
from minivit.commands.training import draw_classification
from minivit.evaluation.inference import check_finite, predict_all
from minivit.evaluation.vtab import (
    BATCH,
    CLASSIFIERS,
    EXAMPLES,
    FINE_TUNING,
    STEPS,
    TASKS,
    find_tasks,
    fine_tune,
    fit_features,
    load_task,
    summary_of,
)
from minivit.training.engines.cut import check_workers
from minivit.weights.layouts import load_with_notes

HELP = f"""
examples:
  minivit vtab runs/imagefolder/last.npz --data-dir vtab                       a linear probe of each task
  minivit vtab runs/imagefolder/last.npz --data-dir vtab --method finetune     as the ViT paper does
  minivit vtab runs/cifar10/last.npz --data-dir vtab --tasks svhn eurosat

The folder holds, for each task, NAME.npz with arrays train_images, train_labels, test_images and test_labels, or
NAME/train/CLASS/*.png and NAME/test/CLASS/*.png. The names: {", ".join(TASKS[:10])},
{", ".join(TASKS[10:])}.
Tasks that are not there are named and left out of the means. probe and fewshot are logistic regression and least
squares on what the head reads. finetune trains everything, at the model's own image size and without augmentation;
the same command goes on where it stopped. See python -m pydoc minivit.evaluation.vtab.
"""


def show(summary):
    """Print the means as a page to read."""
    print()
    for group, each in summary["groups"].items():
        mean = "-" if each["mean"] is None else f"{each['mean']:.2%}"
        print(f"{group:14}{mean:>8}   {each['tasks']} of {each['of']} tasks")
    print(f"{'all':14}{summary['mean']:>8.2%}   {len(summary['tasks'])} of {len(TASKS)} tasks")
    if summary["missing"]:
        print(f"missing: {', '.join(summary['missing'])}")


def parse(argv):
    """The command line as a namespace."""
    parser = Parser(description=__doc__, epilog=HELP, command="vtab")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, such as runs/cifar10/last.npz")
    parser.add_argument("--data-dir", metavar="DIR", default="data/vtab", help="where the tasks lie [data/vtab]")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, metavar="NAME", help="some of the tasks [all there are]")
    parser.add_argument("--method", choices=(*CLASSIFIERS, "finetune"), default="probe", help="[probe]")
    parser.add_argument("--examples", type=int, default=EXAMPLES, metavar="N",
                        help="training examples of each task [1000]")  # fmt: skip
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help="finetune: optimiser steps [2500]")
    parser.add_argument("--lr", type=float, default=FINE_TUNING["lr"], metavar="X", help="finetune: peak rate [0.01]")
    parser.add_argument("--batch-size", type=int, default=BATCH, metavar="N", help="finetune: [512]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="which examples; order of fine-tuning [0]")
    add_weights(parser)
    add_reading(parser)
    add_place(parser)
    parser.add_argument(
        "--out", metavar="DIR", help="folder for vtab-METHOD.json, .png and runs [vtab beside CHECKPOINT]"
    )
    arguments = parser.parse_args(argv)
    if arguments.examples < 5 or arguments.steps < 1 or arguments.seed < 0:
        raise InputError("--examples must be at least 5, --steps at least 1 and --seed at least 0")
    return arguments


def adapt(arguments, model, dataset, folder, workers, device):
    """Adapt the model to a task: (accuracy, what else is known), or None if a signal stopped it."""
    if arguments.method == "finetune":
        summary = fine_tune(
            model, dataset, folder, steps=arguments.steps, seed=arguments.seed, workers=workers, device=device,
            lr=arguments.lr, batch_size=arguments.batch_size, draw=draw_classification,
        )  # fmt: skip
        return summary and (summary["test_accuracy"], {"steps": summary["steps"]})
    train, test = (
        predict_all(model, images, workers=workers, device=device, features=True)
        for images in (dataset.train_images, dataset.test_images)
    )
    for features in (train, test):
        check_finite(features, arguments.checkpoint, "features")
    score, l2 = fit_features(arguments.method, train, test, dataset)
    return score, {"l2": l2}


def main(argv=None):
    """Entry point; returns the exit status."""
    arguments = parse(argv)
    workers, device = check_workers(arguments.workers), find_device(arguments.device)
    path = Path(arguments.checkpoint)
    model, record = load_with_notes(
        path, weights=arguments.weights, named=False, need_head=False, **reading_of(arguments)
    )
    names = arguments.tasks or find_tasks(arguments.data_dir)
    names = [name for name in TASKS if name in names]  # each once
    data = {"examples": arguments.examples, "seed": arguments.seed}
    for name in names:  # what is missing or does not fit is told before any work
        load_task(arguments.data_dir, name, model.config, **data)
    out = Path(arguments.out or path.parent / "vtab")
    out.mkdir(parents=True, exist_ok=True)
    print(f"{path}: {arguments.method} from {arguments.examples} examples of each of {len(names)} tasks\n")
    scores, details = {}, {}
    for name in names:
        started = time.perf_counter()
        dataset = load_task(arguments.data_dir, name, model.config, **data)
        if (result := adapt(arguments, model, dataset, out / name, workers, device)) is None:
            return 130
        scores[name], more = result
        details[name] = more | {
            "accuracy": scores[name],
            "classes": len(dataset.class_names),
            "test_images": len(dataset.test_labels),
            "source": dataset.source,
            "seconds": round(time.perf_counter() - started, 2),
        }
        of = f"{details[name]['classes']} classes, {len(dataset.test_labels):,} test images"
        print(f"{name:14}{scores[name]:>8.2%}   {of}, {details[name]['seconds']:.0f} s", flush=True)
    summary = summary_of(scores)
    show(summary)
    file = out / f"vtab-{arguments.method}.json"
    settings = {"checkpoint": str(path), "weights": record.weights, "method": arguments.method, **data,
                "device": device_name(device)}  # fmt: skip
    write_json(file, settings | summary | {"tasks": details})
    print(f"\nwritten to {file}")
    with drawing():
        figures.save_vtab(file.with_suffix(".png"), summary, title=f"VTAB, {arguments.method}: {path}")
        print(f"drawn in {file.with_suffix('.png')}")
    return 0
