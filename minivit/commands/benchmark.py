"""How quick is a training step, next to PyTorch's, JAX's and the machine's own limit on the same CPU?"""

import argparse
import sys

from minivit import ViTConfig
from minivit.base.backend import device_name, find_device
from minivit.base.errors import InputError, drawing
from minivit.base.files import write_json
from minivit.benchmark import tables
from minivit.benchmark.agreement import Disagreement
from minivit.benchmark.contest import AGAINST, check_config, check_contenders, contest
from minivit.benchmark.layers import layers_report
from minivit.benchmark.loading import data_report
from minivit.benchmark.machine import machine, only_cores
from minivit.benchmark.scaling import scaling_report
from minivit.commands.cli import Parser, add_settings, figure_file, given, output_file
from minivit.kernels.cuda import PRECISIONS
from minivit.model import preset_fields
from minivit.model.costs import expected_flops
from minivit.training.config import TrainConfig, loading_settings
from minivit.training.engines.cut import check_workers
from minivit.training.recipes import find_config, read_recipe

EXAMPLES = """
examples:
  minivit benchmark step --against torch,torch-compile,jax      a training step; pip install -e ".[bench]"
  minivit benchmark step --preset Ti/16 --batch 32 --json ti.json --png ti.png
  minivit benchmark infer --against torch                       predictions: a batch of 256, and one image
  minivit benchmark layers                                      each layer alone, against its own floor
  minivit benchmark scaling --png scaling.png                   time against batch, depth, tokens and workers
  minivit benchmark data                                        the input pipeline
  minivit benchmark data --config cifar10-gpu-30min             with the augmentation and model of a recipe
  minivit benchmark step --against plain                        with and without the accelerated twins
  minivit benchmark kernels --precision bf16                    a GPU's kernels, against its rate of copying

Everybody runs in a process of its own and steps in turn; a ratio is the median of the ratios round by round, ours to
theirs: below 1 we are quicker, or smaller. The floor is the step's matrix products alone. The exit status is 0; 1 if
a contender's loss or gradients are not ours; 2 for bad input.
"""
TASKS = {
    "step": ("forward, backward and AdamW of one batch", 128, 20),
    "infer": ("predictions: of a batch, and of one image", 256, 20),
    "layers": ("each layer's forward and backward alone, against its own floor", 128, 20),
    "scaling": ("a step's time against batch size, depth, tokens and workers", 32, 5),
    "data": ("the input pipeline, with the augmentation of CIFAR or of a recipe", 128, 20),
    "kernels": ("each CUDA kernel of a step alone, against a copy of as many bytes", 128, 20),
}
NOT_COMPARED = ("dropout", "attention_dropout", "drop_path")  # random numbers: no two libraries draw the same


def parse(argv):
    """The command line as a namespace; settings of the model that were not given are absent from it."""
    parser = Parser(description=__doc__, epilog=EXAMPLES, command="benchmark")
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    for name, (text, batch, pairs) in TASKS.items():
        task = tasks.add_parser(name, help=text, description=text, epilog=EXAMPLES)
        how = task.add_argument_group("measurement")
        if name not in ("layers", "data", "kernels"):
            how.add_argument("--against", default="", metavar="NAME,...",
                             help=f"contenders, any of {', '.join(AGAINST)} [none]")  # fmt: skip
        if name == "data":
            how.add_argument("--config", metavar="FILE", help="a recipe's augmentation, batch and model")
        how.add_argument("--batch", type=int, default=batch, metavar="N", help=f"images [{batch}]")
        how.add_argument("--pairs", type=int, default=pairs, metavar="N", help=f"rounds that count [{pairs}]")
        if name not in ("layers", "kernels"):
            how.add_argument("--patience", type=float, default=0.0, metavar="X",
                             help="seconds to spend on new rounds for disturbed ones [0]")  # fmt: skip
        if name != "kernels":
            how.add_argument("--threads", type=int, default=0, metavar="N", help="cores for everybody [0: all]")
            how.add_argument("--workers", type=int, default=0, metavar="N", help="our workers [0: one per core]")
        how.add_argument("--micro-batch", type=int, default=0, metavar="N", help="our micro-batch [0: the engine's]")
        how.add_argument("--seed", type=int, default=0, metavar="N", help="seed of parameters and images [0]")
        if name in ("step", "infer", "kernels"):
            device = "cuda" if name == "kernels" else "cpu"
            how.add_argument("--device", default=device, metavar="NAME", help=f"cpu or cuda, for everybody [{device}]")
            how.add_argument("--precision", choices=PRECISIONS, default="float32",
                             help="on a GPU; PyTorch's allow_tf32, or its autocast to bfloat16 [float32]")  # fmt: skip
        how.add_argument("--quiet", action="store_true", help="no progress bar")
        how.add_argument("--json", type=output_file, metavar="FILE", help="write everything as JSON")
        how.add_argument("--png", type=figure_file, metavar="FILE", help="draw the figure (.png, .pdf, .svg)")
        model = task.add_argument_group("model")
        model.add_argument("--preset", default="Mini/4", metavar="NAME", help="a named size, such as Ti/16 [Mini/4]")
        model.add_argument("--heads", dest="num_heads", type=int, metavar="N", default=argparse.SUPPRESS,
                           help="attention heads h, the same as --num-heads")  # fmt: skip
        add_settings(model, ViTConfig, skip=NOT_COMPARED)
    arguments = parser.parse_args(argv)
    for name, low in (("batch", 1), ("pairs", 1), ("threads", 0), ("workers", 0), ("micro_batch", 0), ("seed", 0)):
        if (value := getattr(arguments, name, low)) < low:
            raise InputError(f"--{name.replace('_', '-')} must be at least {low}, got {value}")
    if not 0.0 <= getattr(arguments, "patience", 0.0) < float("inf"):
        raise InputError(f"--patience must be a number of seconds, got {arguments.patience}")
    check_workers(getattr(arguments, "workers", 0))
    arguments.against = [name for name in getattr(arguments, "against", "").split(",") if name]
    return arguments


def config_of(arguments):
    """The preset with the given flags; without --mlp-dim, another width brings its own MLP width along.

    Raises  InputError: impossible settings.
    """
    fields, own = preset_fields(arguments.preset), given(arguments, ViTConfig)
    if "width" in own:
        fields["mlp_dim"] = own["width"] * fields["mlp_dim"] // fields["width"]
    return ViTConfig(**fields | own)


def use_recipe(arguments):
    """Take model, batch and augmentation from a settings file: (ViTConfig, keyword settings of `data.batches`).

    Raises  InputError: no such file, it is for images that are read from files, or model settings were given beside
            it.
    """
    if given(arguments, ViTConfig) or arguments.preset != "Mini/4":
        raise InputError("--config brings its own model: leave --preset and the model's flags out")
    recipe = read_recipe(find_config(arguments.config))
    config, train = ViTConfig(**recipe.model), TrainConfig(**recipe.train)
    if train.crop_area:
        raise InputError(
            f"{arguments.config} has crop_area, parts that are cut out as files are read; this benchmark times "
            "images that are in memory: choose another settings file"
        )
    arguments.preset, arguments.batch = str(arguments.config), train.batch_size
    return config, loading_settings(train, config.num_classes)


def conditions(arguments, loading):
    """The keyword settings of a measurement.

    Raises  InputError: they do not go together.
    """
    common = {
        "batch": arguments.batch,
        "engine": {name: value for name in ("workers", "micro_batch") if (value := getattr(arguments, name, 0))},
        "pairs": arguments.pairs,
        "seed": arguments.seed,
        "progress": not arguments.quiet,
    }
    if arguments.task not in ("layers", "kernels"):
        common["patience"] = arguments.patience
    if loading:
        common["loading"] = loading
    if arguments.against or arguments.task in ("step", "infer", "scaling"):
        common["against"] = arguments.against
    if not hasattr(arguments, "device"):
        return common
    device = find_device(arguments.device)
    if arguments.task == "kernels" and device == "cpu":
        raise InputError("the kernels are a GPU's: --device cuda")
    if device not in ("cpu", "cuda:0"):
        raise InputError("the benchmark takes the first GPU: --device cuda")
    if device == "cpu" and arguments.precision != "float32":
        raise InputError(f"--precision {arguments.precision} is for a GPU: --device cuda")
    return common | {"device": device.partition(":")[0], "precision": arguments.precision}


def describe(arguments, c, place):
    """Print what is measured, and where."""
    print(f"{arguments.preset}: {c.image_size}x{c.image_size}x{c.channels} images, patch {c.patch_size}, "
          f"{c.num_tokens} tokens, width {c.width}, {c.depth} blocks, {c.num_heads} heads, MLP {c.mlp_dim}, "
          f"{c.num_classes} classes, {getattr(arguments, 'precision', 'float32')}")  # fmt: skip
    if "device" in place:
        print(f"on {place['device']}")
    print(f"on {place['cores']} core(s) of {place['processor']}, {place['blas'].rpartition(',')[0]}")
    if place["environment"]:
        print("environment: " + " ".join(f"{key}={value}" for key, value in place["environment"].items()))
    sys.stdout.flush()


def measure(task, config, common):
    """Make the measurements of a task and print its tables; returns the report.

    Raises  InputError;  Disagreement
    """
    if task == "layers":
        report, show = layers_report(config, **common), tables.print_layers
    elif task == "kernels":
        from minivit.benchmark import bandwidth  # needs CuPy

        report, show = bandwidth.kernels_report(config, **common), tables.print_kernels
    elif task == "data":
        report, show = data_report(config, **common), tables.print_data
    elif task == "scaling":
        report, show = scaling_report(config, **common), tables.print_scaling
    else:
        return measure_contest(task, config, common)
    show(report)
    return report


def measure_contest(task, config, common):
    """A contest of steps, or of predictions of a batch and of one image; see `measure`."""
    report = contest(config, task=task, **common)
    flops = expected_flops(config, common["batch"])
    flops = sum(flops) if task == "step" else flops.forward
    what = "forward, backward and AdamW" if task == "step" else "prediction"
    tables.print_contest(report, f"{what} of {common['batch']} images, {1e-9 * flops:.1f} GFLOP in products")
    if task == "infer":
        report["latency"] = contest(config, task="infer", **common | {"batch": 1})
        tables.print_contest(report["latency"], "prediction of one image")
    return report


def draw(arguments, report, place):
    """Draw the figure of a task."""
    from minivit import figures  # matplotlib is slow to import

    title = f"{arguments.preset} on {place['cores']} cores of {place['processor']}"
    if arguments.task == "kernels":
        title = f"{arguments.preset} on {place['device']}, {arguments.precision}"
    save = {"layers": figures.save_layers, "kernels": figures.save_layers, "scaling": figures.save_scaling,
            "data": figures.save_data}.get(arguments.task, figures.save_contest)  # fmt: skip
    save(arguments.png, report, title=title)


def main(argv=None):
    """Entry point; returns the exit status."""
    arguments = parse(argv)
    if getattr(arguments, "config", None):
        config, loading = use_recipe(arguments)
    else:
        config, loading = config_of(arguments), None
    check_config(config)
    check_contenders(arguments.against)
    common = conditions(arguments, loading)
    try:
        with only_cores(getattr(arguments, "threads", 0)):
            place = machine()
            if common.get("device") == "cuda":
                place["device"] = device_name("cuda:0")
            describe(arguments, config, place)
            report = measure(arguments.task, config, common)
    except Disagreement as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    parts = [report, *report.get("panels", {}).values()]
    tables.warn_of_others([share for part in parts for share in part.get("others", [])])
    if arguments.json:
        write_json(arguments.json, {
            "task": arguments.task, "command": " ".join(["benchmark.py", *(argv or sys.argv[1:])]),
            **report, "config": vars(config), "pairs": arguments.pairs, "seed": arguments.seed, "machine": place,
        })  # fmt: skip
    if arguments.png:
        with drawing():
            draw(arguments, report, place)
    return 0
