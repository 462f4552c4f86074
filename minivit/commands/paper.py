"""Make the figures and tables of the ViT paper again, at a scale that a laptop bears."""

from pathlib import Path

from minivit.base.backend import find_device
from minivit.base.errors import InputError
from minivit.benchmark.speed import speed
from minivit.commands.cli import Parser
from minivit.commands.flags import READING, add_reading, reading_of
from minivit.data import DATASETS
from minivit.paper import entries, page
from minivit.paper.context import Context
from minivit.paper.trainings import Stopped
from minivit.training.budget import seconds_of

EXAMPLES = """
examples:
  minivit paper list                                           what there is, needs, and how long it takes
  minivit paper filters positions distance rollout --run runs/cifar10
  minivit paper rollout --data digits                          trains a small model of the digits first
  minivit paper paper-table8 --budget 30m                      a sweep, cut to half an hour
  minivit paper --all --budget 2h --out docs/paper             everything

Figures, tables and a page of all of them, index.md, go to --out. What is there is not made again, and what was
interrupted goes on: the same command, given again, ends the work. Where no --run is named, a model is trained first, by
minivit/configs/paper.toml or, with --data digits, minivit/configs/digits.toml. --budget is shared out among all
trainings that are to be made, those made already too; they get at most the epochs of their settings. A folder holds the
runs of one budget.
The exit status is 0, 130 if it was interrupted.
"""


def show_list(context):
    """Print what there is."""
    print(f"{'name':16} {'of the paper':24} {'needs':10} {'time':>7}  state")
    for entry in entries.ENTRIES:
        state = "made" if page.is_made(entry, context, any_budget=True) else ""
        time = "budget" if entry.needs == "training" else f"{entry.seconds} s"
        print(f"{entry.name:16} {entry.mirrors:24} {entry.needs:10} {time:>7}  {state}".rstrip())
    print("\na model: --run names one; otherwise it is trained first, within its share of the budget")


def command_of(entry, arguments):
    """The command that makes one figure again, but for its --budget, as a list of its words."""
    words, names = ["minivit", "paper", entry.name], ["out"]
    if entry.needs != "nothing":
        names = ["run", "config", "data", "data_dir", "out", *READING]
    for name in names:
        if (value := getattr(arguments, name, None)) or (value is not None and name not in READING):
            words += ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])
    for name, default in (("device", "cpu"), ("format", "png")):
        if (value := getattr(arguments, name)) != default:
            words += ["--" + name, value]
    return words


def parse(argv):
    """The command line as a namespace."""
    parser = Parser(description=__doc__, epilog=EXAMPLES, command="paper")
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to make, or list [list]")
    parser.add_argument("--all", action="store_true", help="make everything that can be made")
    parser.add_argument(
        "--run",
        metavar="PATH",
        help="what to analyse: a run's folder, a checkpoint, or weights of another program [a model is trained]",
    )
    parser.add_argument("--budget", default="5m", metavar="TIME", help="for all that trains: 90s, 10m or 2.5h [5m]")
    parser.add_argument("--out", default="runs/paper", metavar="DIR", help="folder for everything [runs/paper]")
    parser.add_argument(
        "--data",
        choices=DATASETS,
        help="data set of what trains [that of the settings], and of a model in --run whose file does not say its own",
    )
    parser.add_argument("--data-dir", metavar="DIR", help="where the data lie [data, or where they lay in training]")
    parser.add_argument("--config", metavar="FILE", help="settings of the model that is trained [paper, or digits]")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu, cuda, cuda:1, ..., or auto [cpu]")
    parser.add_argument("--format", choices=("png", "svg", "pdf"), default="png", help="of the figures [png]")
    parser.add_argument("--note", metavar="TEXT", help="a paragraph for the head of the page, kept in --out")
    parser.add_argument("--again", action="store_true", help="draw what is there already anew")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    add_reading(parser)
    arguments = parser.parse_args(argv)
    if arguments.all and arguments.names:
        raise InputError("--all makes everything: name nothing, or leave it out")
    if arguments.run is not None and not Path(arguments.run).exists():
        raise InputError(f"there is no run or checkpoint {arguments.run}")
    return arguments


def context_of(arguments):
    """The `Context` that the command line means."""
    budget, device = seconds_of(arguments.budget), find_device(arguments.device)
    config = arguments.config or ("digits" if arguments.data == "digits" else "paper")
    return Context(
        arguments.out, run=arguments.run, config=config, data=arguments.data, data_dir=arguments.data_dir,
        budget=budget, suffix=f".{arguments.format}", device=device, progress=not arguments.quiet, speed=speed,
        reading=reading_of(arguments),
    )  # fmt: skip


def make_all(group, context, arguments):
    """Make entries one after the other; returns the names of those that could not be made, which --all leaves out.

    Raises  InputError: one cannot be made, without --all;  Stopped
    """
    shares, failures = page.shares_of(group, context), []
    budget = context.share
    for entry in group:
        context.share = shares.get(entry.name, budget)
        if page.is_made(entry, context) and not arguments.again:
            print(f"{entry.name}: is in {context.out} already")
            continue
        print(f"{entry.name}: {entry.title} ({entry.mirrors})", flush=True)
        try:
            result = page.make(entry, context, command_of(entry, arguments))
        except InputError as error:
            if not arguments.all:
                raise InputError(f"{entry.name}: {error}") from None
            failures.append(entry.name)
            print(f"  not made: {error}", flush=True)
            continue
        print(f"  {', '.join(str(context.out / name) for name in result.files)}: {result.caption}", flush=True)
    return failures


def main(argv=None):
    """Entry point; returns the exit status."""
    arguments = parse(argv)
    context = context_of(arguments)
    if not arguments.all and [name.lower() for name in arguments.names] in ([], ["list"]):
        show_list(context)
        return 0
    names = dict.fromkeys(arguments.names)
    group = list(entries.ENTRIES) if arguments.all else [entries.entry_of(name) for name in names]
    if arguments.note is not None:
        page.add_to_page(context, "note", arguments.note)
    try:
        failures = make_all(group, context, arguments)
    except Stopped:
        return 130
    if len(failures) == len(group):
        raise InputError(f"nothing could be made of {', '.join(failures)}: the reasons stand above")
    print(f"the page of all figures: {context.out / page.PAGE}")
    return 0
