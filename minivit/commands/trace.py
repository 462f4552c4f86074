"""What happens in one batch: every tensor of the forward and backward pass, in numbers and as a figure."""

import argparse
import math
import re
import sys
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from minivit import ViT, ViTConfig
from minivit.base import params
from minivit.base.errors import InputError, drawing
from minivit.base.files import write_json
from minivit.base.finite import quiet_overflow
from minivit.commands.cli import Parser, add_settings, given, output_file
from minivit.commands.flags import add_reading, reading_of
from minivit.data import load
from minivit.data.source import check_fit, dataset_of
from minivit.laboratory.recorder import norm
from minivit.laboratory.trace import first_non_finite, trace_batch
from minivit.model import parameter_table, preset_fields
from minivit.training.engines.cpu import DROPOUT_STREAM
from minivit.weights.layouts import load_any

EXAMPLES = """
examples:
  minivit trace                                                 a small model, random images
  minivit trace --preset Ti/16 --batch-size 2 --random-head     Ti/16, its first block opened
  minivit trace --checkpoint runs/digits/last.npz --out out     a trained model on its data; out/trace.png
  minivit trace --levels 0                                      one line per block
  minivit trace --nan --scale-weights 1e15                      which tensor overflows first?

The batch is that of one worker of a training step: dropout acts, BLAS has one thread. It runs twice, and the figures
are those of the second time. A call is named by the field of the cache that keeps what its backward reads, such as
blocks.0.mlp.activation, and a tensor as in the docstring of its function. Operations are counted as the plain functions
do them. The exit status is 0; with --nan it is 1 if a tensor is not finite. 2 is bad input.
"""
MIB = 2**20
SHARED = ("gelu", "layernorm_eps", "stem_groups", "image_size", "pooling", "num_classes")  # flags of both groups


def parse(argv):
    """The command line as a namespace; settings of the model that were not given are absent from it."""
    parser = Parser(description=__doc__, epilog=EXAMPLES, command="trace")
    what = parser.add_argument_group("what is traced")
    what.add_argument("--checkpoint", metavar="FILE",
                      help="a checkpoint, such as runs/digits/last.npz, or weights of another program")  # fmt: skip
    what.add_argument("--preset", metavar="NAME", help="a named size, such as Micro/4 or Ti/16")
    what.add_argument("--data", choices=("digits", "cifar10", "random"),
                      help="images [those of the checkpoint's data set; random without a checkpoint]")  # fmt: skip
    what.add_argument("--data-dir", metavar="DIR", help="where the data lie [data, or where they lay in training]")
    what.add_argument("--batch-size", type=int, default=16, metavar="N", help="images [16]")
    what.add_argument("--seed", type=int, default=0, metavar="N", help="seed of parameters, images and dropout [0]")
    what.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="type of numbers [float32]")
    what.add_argument("--label-smoothing", type=float, default=0.0, metavar="X", help="of the loss [0.0]")
    what.add_argument("--scale-weights", type=float, default=1.0, metavar="X", help="multiply every parameter [1.0]")
    what.add_argument("--random-head", action="store_true",
                      help="fill the head with random numbers; at zero it lets no gradient pass")  # fmt: skip
    show = parser.add_argument_group("what is shown")
    show.add_argument("--levels", type=int, default=2, metavar="N", help="how deep calls inside calls are shown [2]")
    show.add_argument("--all", action="store_true", help="open every block, not the first alone")
    show.add_argument("--backward", action=argparse.BooleanOptionalAction, default=True, help="the backward pass [yes]")
    show.add_argument("--nan", action="store_true", help="name the first tensor that is not finite, and nothing else")
    show.add_argument("--json", type=output_file, metavar="FILE", help="write everything as JSON")
    show.add_argument("--out", metavar="DIR", help="folder for the figure, trace.png [no figure]")
    add_settings(parser.add_argument_group("model, without a checkpoint"), ViTConfig)
    add_reading(parser, skip=SHARED)
    arguments = parser.parse_args(argv)
    for name, low in (("batch_size", 1), ("seed", 0), ("levels", 0)):
        if getattr(arguments, name) < low:
            raise InputError(f"--{name.replace('_', '-')} must be at least {low}, got {getattr(arguments, name)}")
    if not 0.0 <= arguments.label_smoothing < 1.0:
        raise InputError(f"--label-smoothing must be at least 0 and below 1, got {arguments.label_smoothing}")
    if not math.isfinite(arguments.scale_weights):
        raise InputError(f"--scale-weights must be a finite number, got {arguments.scale_weights}")
    if arguments.checkpoint and (arguments.preset or given(arguments, ViTConfig).keys() - set(SHARED)):
        raise InputError("--checkpoint brings its own model: leave --preset and the model's flags out")
    return arguments


def model_and_data(arguments):
    """The model that was asked for, and its data set: (ViT, Dataset or None for random images, name of the model)."""
    if arguments.checkpoint:
        model, record, notes = load_any(arguments.checkpoint, named=False, need_head=False, **reading_of(arguments))
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        dataset = None
        if arguments.data == "random" and arguments.data_dir:
            raise InputError(f"--data-dir {arguments.data_dir} has no effect: the images are random")
        if arguments.data != "random":
            dataset = dataset_of(record, name=arguments.data, data_dir=arguments.data_dir)
        return ViT(model.config, flat=model.flat.astype(arguments.dtype)), dataset, arguments.checkpoint
    settings = preset_fields(arguments.preset) if arguments.preset else {}
    dataset = None
    if arguments.data_dir and arguments.data != "cifar10":
        raise InputError(f"--data-dir {arguments.data_dir} has no effect: the images are {arguments.data or 'random'}")
    if arguments.data in ("digits", "cifar10"):
        dataset = load(arguments.data, arguments.data_dir or "data")
        _, size, _, channels = dataset.train_images.shape
        settings |= {"image_size": size, "channels": channels, "num_classes": len(dataset.class_names)}
    config = ViTConfig(**settings | given(arguments, ViTConfig))
    return ViT(config, seed=arguments.seed, dtype=arguments.dtype), dataset, arguments.preset or "ViT"


def batch_of(dataset, config, size, seed):
    """One batch: (images (B, H, W, C) uint8, labels (B,)), chosen from the training images, or random.

    Raises  InputError: the data do not fit the model, or are fewer than a batch.
    """
    rng = np.random.default_rng([seed, 1])
    if dataset is None:
        shape = (size, config.image_size, config.image_size, config.channels)
        return rng.integers(0, 256, shape, dtype=np.uint8), rng.integers(0, config.num_classes, size)
    check_fit(dataset, config)
    count = len(dataset.train_images)
    if size > count:
        raise InputError(f"--batch-size {size} is more than the {count:,} training images of {dataset.name}")
    chosen = rng.permutation(count)[:size]
    return dataset.train_images[chosen], dataset.train_labels[chosen]


def number(value):
    """A number in 8 characters: 0, or one digit after the point and an exponent; "-" for NaN, where there is none."""
    return f"{'-':>8}" if math.isnan(value) else f"{value:8.1e}" if value else "       0"


def shown(path, arguments):
    """Is a record, or a parameter, of this path part of the tables?"""
    parts = path.split(".")
    return arguments.all or parts[0] != "blocks" or parts[1] == "0"


def short_name(path, around):
    """The part of a path that is not of the call around it; that of a number with the word before it."""
    name = path.removeprefix(f"{around}.") if around else path
    return re.search(r"[^.]*[^.\d][^.]*(\.\d+)+$", path)[0] if name.isdigit() else name


def print_pass(trace, direction, arguments):
    """The table of one direction."""
    forward = direction == "forward"
    memory = "cached MiB" if forward else "norm"
    print(f"\n{direction.upper():25}{'Eq.':5}{'tensor':9}{'shape':15}{memory:>10}{'MFLOP':>10}{'ms':>9}{'GFLOP/s':>8}"
          f"{'mean':>10}{'std':>9}{'largest':>9}")  # fmt: skip
    around = []  # the paths of the calls that a call lies in
    for r in trace.records:
        around = [*around[: r.depth], r.path]
        if r.direction != direction or r.depth > arguments.levels or (r.depth and not shown(r.path, arguments)):
            continue
        name = "  " * r.depth + short_name(r.path, around[r.depth - 1] if r.depth else "")
        shape = "x".join(map(str, r.shape)) or "1"
        size = f"{r.cached / MIB:10.3f}" if forward else f"{number(next(iter(r.norms.values()), math.nan)):>10}"
        values = f"{number(r.mean):>10}{number(r.std):>9}{number(r.largest):>9}"
        if r.nonfinite:
            values = f"{f'{r.nonfinite:,} not finite':>28}"
        rate = f"{r.rate:8.1f}" if r.flops else " " * 8
        print(f"{name:25}{r.equation:5}{r.output:9}{shape:15}{size}{1e-6 * r.flops:10.3f}{1e3 * r.seconds:9.3f}{rate}"
              f"{values}")  # fmt: skip


def print_gradients(model, trace, arguments):
    """The table of the parameters' gradients."""
    print(f"\n{'PARAMETER':34}{'shape':14}{'numbers':>12}{'|gradient|':>12}{'|parameter|':>13}{'largest gradient':>18}")
    for name, g in params.views(trace.gradient, model.table).items():
        if shown(name, arguments):
            shape = "x".join(map(str, g.shape))
            print(f"{name:34}{shape:14}{g.size:12,}{number(norm(g)):>12}{number(norm(model.params[name])):>13}"
                  f"{number(float(np.abs(g).max())):>18}")  # fmt: skip


def print_totals(trace):
    """Sums of the trace, those of products and parameters beside the closed forms."""
    t = trace.totals
    print(f"\n{'TOTALS':12}{'recorded':>15}{'closed form':>15}{'':16}{'all operations':>16}{'time':>11}{'rate':>15}")

    def line(name, recorded, expected, digits, unit, rest=""):
        verdict = "equal" if recorded == expected else "DIFFERENT"
        print(f"{name:12}{recorded:15,.{digits}f}{expected:15,.{digits}f} {unit:6}{verdict:9}{rest}")

    for name, expected in zip(("forward", "backward"), trace.expected, strict=True):
        everything, seconds = (getattr(t, f"{name}_{figure}") for figure in ("flops", "seconds"))
        if everything:
            rest = f"{1e-6 * everything:10,.3f} MFLOP{1e3 * seconds:8.2f} ms{1e-9 * everything / seconds:7.1f} GFLOP/s"
            line(name, 1e-6 * getattr(t, f"{name}_matmul_flops"), 1e-6 * expected, 3, "MFLOP", rest)
    line("parameters", t.parameters, params.count(parameter_table(trace.config)), 0, "")
    print(f"{'caches':12}{t.cached / MIB:15,.3f}{'':15} MiB")
    print("MFLOP recorded and of the closed form are those of the matrix products")


def plain(value):
    """The value for JSON: no NumPy numbers, None for what is not finite."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value


def report_of(model, trace, nonfinite):
    """Everything, ready for JSON."""
    gradients = {}
    if trace.gradient is not None:
        gradients = {name: norm(g) for name, g in params.views(trace.gradient, model.table).items()}
    return plain(
        {
            "config": vars(trace.config),
            "batch": trace.batch,
            "dtype": trace.dtype,
            "loss": float(trace.loss),
            "totals": trace.totals._asdict(),
            "closed_forms": {
                **trace.expected._asdict(),
                "parameters": params.count(parameter_table(trace.config)),
            },
            "first_non_finite": nonfinite and nonfinite._asdict(),
            "gradient_norms": gradients,
            "records": [r._asdict() | {"gflop_per_second": r.rate} for r in trace.records],
        }
    )


def main(argv=None):
    """Entry point; returns the exit status."""
    arguments = parse(argv)
    model, dataset, name = model_and_data(arguments)
    config = model.config
    if arguments.out:
        Path(arguments.out).mkdir(parents=True, exist_ok=True)
    images, labels = batch_of(dataset, config, arguments.batch_size, arguments.seed)
    if arguments.random_head:
        head = model.params["head.weight"]
        head[...] = np.random.default_rng([arguments.seed, 2]).standard_normal(head.shape) * head.shape[0] ** -0.5
    with quiet_overflow(), threadpool_limits(1, user_api="blas"):
        model.flat *= model.flat.dtype.type(arguments.scale_weights)
        for _ in range(1 if arguments.nan else 2):  # the first time takes memory from the system
            trace = trace_batch(
                config, images, labels, flat=model.flat, backward=arguments.backward,
                rng=np.random.default_rng([arguments.seed, DROPOUT_STREAM]), label_smoothing=arguments.label_smoothing,
            )  # fmt: skip
        nonfinite = first_non_finite(trace)
    source, blocks = dataset.name if dataset else "random", "1 block" if config.depth == 1 else f"{config.depth} blocks"
    print(f"{name}: {len(images)} {source} images of {config.image_size}x{config.image_size}x{config.channels}, "
          f"patch {config.patch_size}, {config.num_tokens} tokens, width {config.width}, {blocks}, "
          f"{config.num_heads} heads, {trace.dtype}; loss {float(trace.loss):.4f}")  # fmt: skip
    if not arguments.nan:
        for direction in ("forward", "backward") if arguments.backward else ("forward",):
            print_pass(trace, direction, arguments)
        if arguments.backward:
            print_gradients(model, trace, arguments)
        if config.depth > 1 and not arguments.all:
            print("\nof the blocks, only the first is opened and its parameters listed; --all does so for every one")
        if arguments.backward and not model.params["head.weight"].any():
            print("\nThe head is zero, as at the start of training: no gradient passes it. --random-head fills it.")
        print_totals(trace)
    if nonfinite:
        print(("" if arguments.nan else "\n") + nonfinite.message)
    elif arguments.nan:
        print(f"every tensor is finite ({len(trace.records)} calls)")
    if arguments.json:
        write_json(arguments.json, report_of(model, trace, nonfinite))
    if arguments.out:
        figure = Path(arguments.out) / "trace.png"
        with drawing():
            from minivit import figures  # matplotlib is slow to import

            figures.save_trace(figure, trace, title=name)
            print(f"drawn in {figure}")
    return 1 if arguments.nan and nonfinite else 0
