"""What a checkpoint's features are worth: few-shot, linear probe or nearest neighbours on the frozen model."""

import sys
from pathlib import Path

import numpy as np

from minivit import figures
from minivit.base.backend import find_device
from minivit.base.errors import InputError, drawing
from minivit.base.files import write_json
from minivit.commands.cli import Parser
from minivit.commands.flags import add_data, add_place, add_reading, add_weights, reading_of
from minivit.evaluation import transfer
from minivit.evaluation.features import METHODS, Study, check_study, transfer_results, transfer_stem
from minivit.evaluation.inference import load_with_data
from minivit.training.engines.cut import check_workers

EXAMPLES = """
examples:
  minivit transfer runs/cifar10/last.npz                                   few-shot, as in the ViT paper
  minivit transfer runs/cifar10/last.npz --untrained --pixels              beside what needs no training
  minivit transfer runs/cifar10/last.npz --data cifar100 --method probe    classes it was not trained for
  minivit transfer runs/digits/last.npz --method knn --k 5

The features are what the head reads. fewshot: regularised least squares from a few examples of each class, the mean
over seeds; probe: logistic regression on all training images, its penalty chosen on a tenth of them; knn: votes of
the nearest training images by cosine. See python -m pydoc minivit.evaluation.transfer.
"""

OF_METHODS = {
    "shots": (list(transfer.SHOTS), ("fewshot",)),
    "seeds": ([0, 1, 2], ("fewshot", "probe")),
    "k": (transfer.NEIGHBOURS, ("knn",)),
    "temperature": (transfer.TEMPERATURE, ("knn",)),
}  # flags: the default, and the methods that read them
COMPARE = "compare"  # --pixels without a value


def show(results):
    """Print the accuracies as a table."""
    rows, method = results["rows"], results["method"]
    columns = [method if method != "fewshot" else f"{each['shots']} shot{'s' * (each['shots'] > 1)}"
               for each in rows[0]["accuracies"]]  # fmt: skip
    width = max(8, *(len(row["features"]) for row in rows))
    print(f"\n{'features':{width}}" + "".join(f"  {column:>15}" for column in columns))
    for row in rows:
        cells = [
            f"{each['mean']:.2%}" + ("" if each["spread"] is None else f" ± {100 * each['spread']:.2f}")
            for each in row["accuracies"]
        ]
        print(f"{row['features']:{width}}" + "".join(f"  {cell:>15}" for cell in cells))


def parse(argv):
    """The command line as a namespace; ``compare``: beside the pixels, ``reading``: see `reading_of`."""
    parser = Parser(description=__doc__, epilog=EXAMPLES, command="transfer")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, such as runs/cifar10/last.npz")
    add_data(parser, "data set, of any classes [the one it was trained on]")
    parser.add_argument("--method", choices=METHODS, default="fewshot", help="[fewshot]")
    parser.add_argument("--shots", type=int, nargs="+", metavar="N",
                        help="fewshot: examples of each class [1 5 10 25]")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N",
                        help="fewshot: which examples; probe: which images choose the penalty [0 1 2]")  # fmt: skip
    parser.add_argument("--k", type=int, metavar="N", help="knn: neighbours [20]")
    parser.add_argument("--temperature", type=float, metavar="X",
                        help="knn: a neighbour of cosine s has the weight exp(s / X) [0.07]")  # fmt: skip
    parser.add_argument("--untrained", action="store_true", help="compare with the same model, initialised at random")
    parser.add_argument("--pixels", nargs="?", const=COMPARE, default="", metavar="WHAT",
                        help="alone: compare with the pixels themselves; with half, imagenet, clip or MEAN,STD: what "
                        "those of weights of another program were")  # fmt: skip
    add_weights(parser)
    add_reading(parser, skip=("pixels",))
    add_place(parser)
    parser.add_argument("--out", metavar="DIR", help="folder for transfer-NAME.json and .png [the checkpoint's]")
    arguments = parser.parse_args(argv)
    for name, (default, methods) in OF_METHODS.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
        elif arguments.method not in methods:
            raise InputError(
                f"--{name} has no effect with --method {arguments.method}: it is of {' and '.join(methods)}"
            )
    shots, seeds = sorted(set(arguments.shots)), sorted(set(arguments.seeds))
    if shots[0] < 1 or seeds[0] < 0:
        raise InputError("--shots must be at least 1 and --seeds at least 0")
    arguments.compare = arguments.pixels == COMPARE
    arguments.pixels = "" if arguments.compare else arguments.pixels
    arguments.shots, arguments.seeds = shots, seeds
    return arguments


def main(argv=None):
    """Entry point; returns the exit status."""
    arguments = parse(argv)
    shots, seeds, reading = arguments.shots, arguments.seeds, reading_of(arguments)
    study = Study(arguments.method, tuple(shots), tuple(seeds), arguments.k, arguments.temperature)
    workers, device = check_workers(arguments.workers), find_device(arguments.device)
    path = Path(arguments.checkpoint)
    model, record, dataset = load_with_data(
        path,
        weights=arguments.weights,
        name=arguments.data,
        data_dir=arguments.data_dir,
        other_classes=True,
        reading=reading,
    )
    check_study(study, dataset)  # before the model runs over all images
    print(
        f"{path} on {dataset.name}: {len(dataset.train_images):,} training and {len(dataset.test_images):,} test "
        f"images, {len(dataset.class_names)} classes"
    )
    fewest = int(np.bincount(dataset.train_labels, minlength=len(dataset.class_names)).min())
    if study.method == "fewshot" and fewest < study.shots[-1]:
        print(f"note: a class has {fewest} training images: it gives no more shots than that", file=sys.stderr)
    out = Path(arguments.out or path.parent)
    out.mkdir(parents=True, exist_ok=True)
    results = transfer_results(
        path, model, record, dataset, study, untrained=arguments.untrained, pixels=arguments.compare, workers=workers,
        device=device,
    )  # fmt: skip
    show(results)
    stem = transfer_stem(study.method, dataset)
    write_json(out / f"{stem}.json", results)
    print(f"\nwritten to {out / stem}.json")
    if study.method == "fewshot":
        with drawing():
            figures.save_few_shot(out / f"{stem}.png", results, title=f"{path.parent.name}, few-shot on {dataset.name}")
            print(f"drawn in {out / stem}.png")
    return 0
