"""Flags that several commands have."""

from minivit.base.errors import InputError
from minivit.data import DATASETS
from minivit.options.exact_gelu import KINDS

READING = {  # what weights of another program, and the files beside them, may leave open
    "pixels": {"metavar": "WHAT", "default": "", "help": "what their pixels were: half (-1..1), imagenet, clip, or "
               "MEAN,STD in 0..1, or three means and three stds [what a file beside them says, or half]"},
    "imagenet_pixels": {"action": "store_true", "help": "the same as --pixels imagenet"},
    "heads": {"type": int, "default": 0, "metavar": "N", "help": "attention heads [what a file beside them says, or a "
              "guess]"},
    "gelu": {"choices": KINDS, "help": "GELU form [that of their program]"},
    "layernorm_eps": {"type": float, "metavar": "X", "help": "eps of LayerNorm [that of their program]"},
    "stem_groups": {"type": int, "metavar": "N", "help": "groups of GroupNorm in a hybrid's stem [32]"},
    "image_size": {"type": int, "default": 0, "metavar": "N", "help": "pixels, where positions do not tell"},
    "pooling": {"choices": ("cls", "mean"), "default": "", "help": "what is classified, where nothing tells"},
    "num_classes": {"type": int, "default": 0, "metavar": "K", "help": "give weights without a head one of zeros"},
}  # fmt: skip
CHANGES = ("gelu", "layernorm_eps", "stem_groups")  # which are fields of the model's configuration


def add_weights(parser):
    """Add ``--weights``: which of a checkpoint's parameters are taken."""
    parser.add_argument("--weights", choices=("auto", "params", "ema"), default="auto",
                        help="the parameters, their moving average, or the average if there is one [auto]")  # fmt: skip


def add_data(parser, text, place="where they lay in training"):
    """Add ``--data``, with the help ``text``, and ``--data-dir``."""
    parser.add_argument("--data", choices=DATASETS, help=text)
    parser.add_argument("--data-dir", metavar="DIR", help=f"where the data lie [{place}]")


def add_place(parser):
    """Add ``--workers`` and ``--device``: on what the model runs."""
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="threads; 0 for one per core [0]")
    parser.add_argument("--device", default="cpu", metavar="NAME",
                        help="where to compute: cpu, cuda, cuda:1, ... or auto [cpu]")  # fmt: skip


def add_reading(parser, *, skip=()):
    """Add the flags of weights of another program, but for those that the command has for more than that."""
    add = parser.add_argument_group("weights of another program, what no file beside them says").add_argument
    for name, keywords in READING.items():
        if name not in skip:
            add("--" + name.replace("_", "-"), **keywords)


def reading_of(arguments):
    """What flags of `add_reading` say, as keyword arguments of `minivit.weights.layouts.load_any`.

    Raises  InputError: a negative number; --imagenet-pixels beside other --pixels.
    """
    given = {name: value for name in READING if (value := getattr(arguments, name, None))}
    for name in ("heads", "image_size", "num_classes"):
        if given.get(name, 0) < 0:
            raise InputError("--heads, --image-size and --num-classes cannot be negative")
    if given.pop("imagenet_pixels", False) and given.setdefault("pixels", "imagenet") != "imagenet":
        raise InputError("--imagenet-pixels is --pixels imagenet: leave one of them out")
    changes = {name: value for name in CHANGES if (value := getattr(arguments, name, None)) is not None}
    return {name: value for name, value in given.items() if name not in CHANGES} | {"changes": changes}
