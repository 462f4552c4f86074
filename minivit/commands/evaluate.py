"""Test a checkpoint: accuracy, a table of the classes, the confusion matrix."""

import argparse
import sys
import time
from pathlib import Path

from minivit import figures
from minivit.base.backend import device_name, find_device
from minivit.base.errors import drawing
from minivit.base.files import write_json
from minivit.commands.cli import Parser, output_file
from minivit.commands.flags import add_data, add_place, add_reading, add_weights, reading_of
from minivit.data.source import fingerprint
from minivit.evaluation.inference import check_finite, load_with_data, predict_all
from minivit.evaluation.metrics import measure, read_real, real_accuracy
from minivit.training.engines.cut import check_workers
from minivit.training.folder import BEST

EXAMPLES = """
examples:
  minivit evaluate runs/digits/last.npz
  minivit evaluate runs/cifar10/last.npz --data-dir ~/datasets --json result.json
  minivit evaluate runs/pets/last.npz --data-dir more_pets --weights params --out more_pets_result
  minivit evaluate runs/imagefolder/last.npz --real real.json             ImageNet, and ImageNet-ReaL
"""


def show(facts):
    """Print the figures as a page to read."""
    print(f"accuracy   {facts['accuracy']:.2%}")
    if "top5_accuracy" in facts:
        print(f"top 5      {facts['top5_accuracy']:.2%}")
    if "real_accuracy" in facts:
        print(f"ReaL       {facts['real_accuracy']:.2%} of the {facts['real_images']:,} images that have its labels")
    print(f"loss       {facts['loss']:.4f}")
    print(f"speed      {facts['images_per_second']:,.0f} images/s "
          + (f"with {facts['workers']} workers" if facts["device"] == "cpu" else f"on {facts['device']}"))  # fmt: skip
    width = max(5, *(len(each["name"]) for each in facts["classes"]))
    print(f"\n{'class':{width}}  images  precision   recall")
    for each in facts["classes"]:
        precision, recall = ("-" if value is None else f"{value:.1%}" for value in (each["precision"], each["recall"]))
        print(f"{each['name']:{width}}  {each['count']:8,}  {precision:>9}  {recall:>7}")


def parse(argv):
    """The command line as a namespace."""
    parser = Parser(description=__doc__, epilog=EXAMPLES, command="evaluate")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, such as runs/digits/last.npz")
    add_data(parser, "data set [the one it was trained on]")
    add_weights(parser)
    add_reading(parser)
    add_place(parser)
    parser.add_argument("--out", metavar="DIR", help="folder for confusion-NAME.png [the checkpoint's]")
    parser.add_argument("--flip", action=argparse.BooleanOptionalAction,
                        help="test with the mean over each image and its mirror image [as the run did]")  # fmt: skip
    parser.add_argument("--real", metavar="FILE", help="ImageNet's reassessed labels, real.json: accuracy by them too")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write every figure as JSON")
    return parser.parse_args(argv)


def main(argv=None):
    """Entry point; returns the exit status."""
    arguments = parse(argv)
    workers, device = check_workers(arguments.workers), find_device(arguments.device)
    path = Path(arguments.checkpoint)
    model, record, dataset = load_with_data(
        path,
        weights=arguments.weights,
        name=arguments.data,
        data_dir=arguments.data_dir,
        reading=reading_of(arguments),
    )
    images, labels, names = dataset.test_images, dataset.test_labels, dataset.class_names
    print(f"{path} on {len(images):,} test images of {dataset.name}: {dataset.source}")
    same = record.data.get("fingerprint") == fingerprint(dataset)
    if not same:
        print("warning: these are not the images of its training run, perhaps another version of them", file=sys.stderr)
    elif path.name == BEST:
        print("this checkpoint is of the epoch that was best on these test images: its accuracy is a little too good")
    real = read_real(arguments.real, dataset.test_names, len(names)) if arguments.real else None
    out = Path(arguments.out or path.parent)
    out.mkdir(parents=True, exist_ok=True)
    flip = arguments.flip
    if flip is None:  # as the run itself tests
        flip = (record.settings or {}).get("test_flip") is True
    started = time.perf_counter()
    logits = predict_all(model, images, workers=workers, device=device, flip=flip)
    seconds = time.perf_counter() - started
    check_finite(logits, path)
    measures, confusion = measure(logits, labels, names)
    if real is not None:
        measures["real_accuracy"], measures["real_images"] = real_accuracy(logits.argmax(axis=1), real)
    facts = {
        "checkpoint": str(path),
        "weights": record.weights,
        "data": dataset.name,
        "source": dataset.source,
        "pictures_of_training_run": same,
        "workers": workers,
        "device": device_name(device),
        "flip": flip,
        "seconds": round(seconds, 3),
        "images_per_second": round(len(images) / seconds, 1),
        **measures,
    }
    show(facts)
    figure = out / f"confusion-{path.stem}.png"
    title = f"{dataset.name}: {facts['accuracy']:.2%} of {len(images):,} right"
    if arguments.json:
        write_json(arguments.json, facts)
    with drawing():
        figures.save_confusion(figure, confusion, names, title=title)
        print(f"\nconfusion matrix in {figure}")
    return 0
