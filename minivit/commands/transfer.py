"""What a checkpoint's features are worth: few-shot, linear probe or nearest neighbours on the frozen model."""

import sys
from pathlib import Path

import numpy as np

from minivit import ViT
from minivit.base.backend import device_name, find_device
from minivit.base.errors import InputError
from minivit.commands.cli import Parser
from minivit.data import DATASETS
from minivit.evaluation import transfer
from minivit.evaluation.inference import check_finite, load_with_data, predict_all
from minivit import figures
from minivit.training.sweep import mean_and_spread
from minivit.training.trainer import check_workers, write_json

EXAMPLES = """
examples:
  minivit transfer runs/cifar10/last.npz                                   few-shot, as in the ViT paper
  minivit transfer runs/cifar10/last.npz --untrained --pixels              beside what needs no training
  minivit transfer runs/cifar10/last.npz --data cifar100 --method probe    classes it was not trained for
  minivit transfer runs/digits/last.npz --method knn --k 5

The features are what the head reads. fewshot: regularised least squares from a few examples of each class, the mean
over seeds; probe: logistic regression on all training pictures, its penalty chosen on a tenth of them; knn: votes of
the nearest training pictures by cosine. See python -m pydoc minivit.evaluation.transfer.
"""


def pixels_of(images):
    """Pixels as features: (n, H W C) float32 in [-1, 1]."""
    chunks = [np.asarray(images[i : i + 1000], np.float32) for i in range(0, len(images), 1000)]
    return np.concatenate([chunk.reshape(len(chunk), -1) / 127.5 - 1.0 for chunk in chunks])


def accuracies_of(arguments, train, train_labels, test, test_labels, classes):
    """What the method finds of one kind of features: a list of dicts, one for each number of shots."""
    if arguments.method == "knn":
        votes = transfer.nearest_neighbours(
            train, train_labels, test, classes, k=arguments.k, temperature=arguments.temperature
        )
        return [{"runs": [{"accuracy": transfer.accuracy(votes, test_labels)}]}]
    if arguments.method == "probe":
        runs = []
        for seed in arguments.seeds:
            chosen = transfer.probe(train, train_labels, classes, seed=seed)
            score = transfer.accuracy(chosen.classifier.scores(test), test_labels)
            runs.append({"seed": seed, "l2": chosen.l2, "accuracy": score})
        return [{"runs": runs}]
    found = {
        seed: transfer.few_shot(train, train_labels, test, test_labels, classes, shots=arguments.shots, seed=seed)
        for seed in arguments.seeds
    }
    return [
        {"shots": count, "runs": [{"seed": seed, "accuracy": found[seed][count]} for seed in arguments.seeds]}
        for count in arguments.shots
    ]


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


def main(argv=None):
    """Entry point; returns the exit status."""
    parser = Parser(description=__doc__, epilog=EXAMPLES, command="transfer")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, such as runs/cifar10/last.npz")
    parser.add_argument("--data", choices=DATASETS, help="data set, of any classes [the one it was trained on]")
    parser.add_argument("--data-dir", metavar="DIR", help="where the data lie [where they lay in training]")
    parser.add_argument("--method", choices=("fewshot", "probe", "knn"), default="fewshot", help="[fewshot]")
    parser.add_argument("--shots", type=int, nargs="+", default=list(transfer.SHOTS), metavar="N",
                        help="fewshot: examples of each class [1 5 10 25]")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N",
                        help="fewshot: which examples; probe: which pictures choose the penalty [0 1 2]")  # fmt: skip
    parser.add_argument("--k", type=int, default=transfer.NEIGHBOURS, metavar="N", help="knn: neighbours [20]")
    parser.add_argument("--temperature", type=float, default=transfer.TEMPERATURE, metavar="X",
                        help="knn: a neighbour of cosine s has the weight exp(s / X) [0.07]")  # fmt: skip
    parser.add_argument("--untrained", action="store_true", help="compare with the same model, initialised at random")
    parser.add_argument("--pixels", action="store_true", help="compare with the pixels themselves")
    parser.add_argument("--weights", choices=("auto", "params", "ema"), default="auto",
                        help="the parameters, their moving average, or the average if there is one [auto]")  # fmt: skip
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="threads; 0 for one per core [0]")
    parser.add_argument("--device", default="cpu", metavar="NAME",
                        help="where the model runs: cpu, cuda, cuda:1, ... or auto [cpu]")  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="folder for transfer-NAME.json and .png [the checkpoint's]")
    arguments = parser.parse_args(argv)
    arguments.shots, arguments.seeds = sorted(set(arguments.shots)), sorted(set(arguments.seeds))
    if arguments.shots[0] < 1 or arguments.seeds[0] < 0:
        raise InputError("--shots must be at least 1 and --seeds at least 0")
    workers, device = check_workers(arguments.workers), find_device(arguments.device)
    path = Path(arguments.checkpoint)
    model, meta, dataset = load_with_data(
        path, weights=arguments.weights, name=arguments.data, data_dir=arguments.data_dir, other_classes=True
    )
    if not len(dataset.train_labels):
        raise InputError(f"{dataset.source} has no training pictures: there is nothing to fit a classifier to")
    splits = dataset.train_images, dataset.test_images
    labels, classes = (dataset.train_labels, dataset.test_labels), len(dataset.class_names)
    print(
        f"{path} on {dataset.name}: {len(splits[0]):,} training and {len(splits[1]):,} test pictures, {classes} classes"
    )
    fewest = int(np.bincount(labels[0], minlength=classes).min())
    if arguments.method == "fewshot" and fewest < arguments.shots[-1]:
        print(f"note: a class has {fewest} training pictures: it gives no more shots than that", file=sys.stderr)
    if arguments.method == "knn":  # before the model runs over all pictures
        transfer.check_neighbours(len(splits[0]), arguments.k, arguments.temperature)
    out = Path(arguments.out or path.parent)
    out.mkdir(parents=True, exist_ok=True)

    def features_of(model):
        found = [predict_all(model, images, workers=workers, device=device, features=True) for images in splits]
        for features in found:
            check_finite(features, path, "features")
        return found

    kinds = {"trained": lambda: features_of(model)}
    if arguments.untrained:
        seed = meta["settings"].get("seed", 0) if isinstance(meta.get("settings"), dict) else 0
        kinds["untrained"] = lambda: features_of(ViT(model.config, seed=seed))
    if arguments.pixels:
        kinds["pixels"] = lambda: [pixels_of(images) for images in splits]
    rows = []
    for name, make in kinds.items():
        train, test = make()
        accuracies = accuracies_of(arguments, train, labels[0], test, labels[1], classes)
        for each in accuracies:
            each["mean"], each["spread"] = mean_and_spread([one["accuracy"] for one in each["runs"]])
        rows.append({"features": name, "dimensions": train.shape[1], "accuracies": accuracies})
    settings = {"fewshot": {"l2": transfer.L2}, "probe": {"penalties": transfer.PENALTIES},
                "knn": {"k": arguments.k, "temperature": arguments.temperature}}  # fmt: skip
    results = {
        "checkpoint": str(path),
        "weights": meta["weights"],
        "data": dataset.name,
        "source": dataset.source,
        "classes": classes,
        "train_images": len(splits[0]),
        "test_images": len(splits[1]),
        "device": device_name(device),
        "method": arguments.method,
        **settings[arguments.method],
        "rows": rows,
    }
    show(results)
    stem = f"transfer-{arguments.method}-{dataset.name}"
    write_json(out / f"{stem}.json", results)
    written = f"{out / stem}.json"
    if arguments.method == "fewshot":
        figures.save_few_shot(out / f"{stem}.png", results, title=f"{path.parent.name}, few-shot on {dataset.name}")
        written += " and .png"
    print(f"\nwritten to {written}")
    return 0
