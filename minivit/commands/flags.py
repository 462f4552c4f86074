"""Flags that several commands have."""

from minivit.data import DATASETS


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
