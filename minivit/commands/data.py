"""Download a data set, or show what is in one."""

import numpy as np

from minivit.base.errors import InputError
from minivit.base.files import write_json
from minivit.commands.cli import Parser, output_file
from minivit.data import DATASETS, fetch, load
from minivit.data.source import check_data, refuse_idle_data

EXAMPLES = """examples:
  minivit data fetch cifar10
  minivit data info digits
  minivit data info cifar100 --data-dir ~/datasets --json cifar100.json
  minivit data info folder --data-dir my_images --image-size 64
  minivit data info imagefolder --data-dir imagenet     reads every training image: finds the broken ones
"""


def channel_statistics(images):
    """Return the mean and standard deviation of each channel, in units of the full scale 255.

    Shapes
    ------
    images (n, H, W, C) uint8 -> two lists of C floats.
    """
    total = squares = count = 0
    for i in range(0, len(images), 1000):  # in pieces: the wider integers take 8 bytes a pixel
        pixels = images[i : i + 1000].reshape(-1, images.shape[-1]).astype(np.int64)
        total += pixels.sum(axis=0)
        squares += np.einsum("pc,pc->c", pixels, pixels)
        count += len(pixels)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))  # rounding may go below 0
    return (mean / 255).tolist(), (std / 255).tolist()


def describe(dataset):
    """Return what ``info`` reports of a data set, ready for JSON."""
    if not len(dataset.train_labels):
        raise InputError(f"{dataset.source} has no training images to take statistics of")
    mean, std = channel_statistics(dataset.train_images)
    counts = {
        split: np.bincount(labels, minlength=len(dataset.class_names)).tolist()
        for split, labels in (("train", dataset.train_labels), ("test", dataset.test_labels))
    }
    return {
        "name": dataset.name,
        "source": dataset.source,
        "train": len(dataset.train_labels),
        "test": len(dataset.test_labels),
        "image_shape": list(dataset.train_images.shape[1:]),
        "channel_mean": mean,
        "channel_std": std,
        "classes": [
            {"name": name, "train": train, "test": test}
            for name, train, test in zip(dataset.class_names, counts["train"], counts["test"], strict=True)
        ],
    }


def show(facts):
    """Print the facts of ``describe`` as a page to read."""
    print(f"{facts['name']}: {facts['train']:,} training and {facts['test']:,} test images")
    print(f"source   {facts['source']}")
    print(f"shape    {' x '.join(map(str, facts['image_shape']))} (height, width, channels), uint8")
    print(f"mean     {' '.join(f'{value:.4f}' for value in facts['channel_mean'])} (training split, of 1)")
    print(f"std      {' '.join(f'{value:.4f}' for value in facts['channel_std'])}")
    width = max(len(each["name"]) for each in facts["classes"])
    print(f"classes  {len(facts['classes'])}")
    print(f"  {'':{width}}  {'train':>7}  {'test':>7}")
    for each in facts["classes"]:
        print(f"  {each['name']:{width}}  {each['train']:7,}  {each['test']:7,}")


def parser():
    """Return the command line."""
    main_parser = Parser(command="data", description=__doc__, epilog=EXAMPLES)
    commands = main_parser.add_subparsers(dest="command", required=True)
    get = commands.add_parser(
        "fetch",
        help="download, verify and unpack a data set",
        description="Download, verify and unpack a data set; a download that broke off is continued.",
    )
    get.add_argument("name", choices=("cifar10", "cifar100"))
    info = commands.add_parser(
        "info",
        help="show counts, shapes, classes and channel statistics",
        description="Show counts, shapes, classes and channel statistics of a data set.",
    )
    info.add_argument("name", choices=DATASETS)
    for command in (get, info):
        command.add_argument("--data-dir", metavar="DIR", help="where the data lie [data]")
    info.add_argument("--test-share", type=float, metavar="X", help="share for testing, of images that are not split")
    info.add_argument("--split-seed", type=int, metavar="N", help="what draws the images of --test-share [0]")
    info.add_argument(
        "--image-size", type=int, metavar="N", help="scale to N x N [as they are; folder: 32, imagefolder: 224]"
    )
    info.add_argument("--json", type=output_file, metavar="FILE", help="also write the facts to FILE")
    return main_parser


def main(argv=None):
    """Run the command line; return the exit status."""
    arguments = parser().parse_args(argv)
    if arguments.command == "fetch":
        print(f"{arguments.name} is in {fetch(arguments.name, arguments.data_dir or 'data')}")
        return 0
    settings = {key: getattr(arguments, key) for key in ("data_dir", "image_size", "test_share", "split_seed")}
    check_data({key: settings[key] for key in ("test_share", "split_seed")}, "the flags")
    refuse_idle_data(arguments.name, settings)
    settings = {key: value for key, value in settings.items() if value is not None}
    facts = describe(load(arguments.name, **settings))
    show(facts)
    if arguments.json:
        write_json(arguments.json, facts)
    return 0
