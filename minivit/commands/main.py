"""``minivit COMMAND ...``: the commands by what people want to do."""

import importlib
import sys

from minivit import __version__
from minivit.commands.cli import run

COMMANDS = {
    "train and use a model": {
        "train": "train a Vision Transformer, from nothing or from where a run stopped",
        "evaluate": "accuracy, per-class table, confusion matrix of a checkpoint",
        "predict": "classes of images, and what the model attends to",
        "report": "a run as one HTML page",
        "sweep": "settings side by side over seeds",
        "data": "download or describe a data set",
    },
    "study the gradients": {
        "gradcheck": "numerical against hand-written derivatives; hunt a planted mistake",
        "trace": "one batch in numbers, layer by layer",
        "visualize": "learning rates, curvature, augmentation, the journey of one image",
    },
    "start from other models": {
        "convert": "weights between minivit, the official files, timm and Hugging Face",
        "pretrain": "learn from images without labels",
        "transfer": "few-shot, linear probe, nearest neighbours on frozen features",
        "vtab": "the VTAB protocol on its 19 tasks",
    },
    "measure": {
        "benchmark": "time and memory of a step, against PyTorch, JAX and the matrix products alone",
        "paper": "the figures and tables of the ViT paper, made again",
    },
}
NAMES = [name for group in COMMANDS.values() for name in group]


def overview():
    """The list of commands, as ``minivit`` alone prints it."""
    lines = ["usage: minivit COMMAND ...   (minivit COMMAND --help tells its options)"]
    for title, group in COMMANDS.items():
        lines += ["", f"{title}:"] + [f"  {name:<10} {about}" for name, about in group.items()]
    return "\n".join(lines)


def main(argv=None):
    """Entry point of ``minivit``."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
    elif name == "--version":
        print(f"minivit {__version__}")
    elif name in NAMES:
        command = importlib.import_module(f"minivit.commands.{name}")
        run(lambda: command.main(rest))
    else:
        print(f"error: there is no command {name!r}; minivit --help lists them", file=sys.stderr)
        sys.exit(2)
