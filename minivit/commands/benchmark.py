"""How quick is a training step, next to PyTorch's, JAX's and the machine's own limit on the same CPU?"""

import argparse
import statistics
import sys

from minivit import ViTConfig
from minivit.base.backend import device_name, find_device
from minivit.base.errors import InputError
from minivit.benchmark import contest as bench
from minivit.commands.cli import Parser, add_settings, given, output_file, picture_file
from minivit.kernels.cuda import PRECISIONS
from minivit.laboratory.trace import expected_flops
from minivit.model import preset_fields
from minivit.training.recipes import find_config, read_recipe
from minivit.training.trainer import TrainConfig, check_workers, loading_settings, write_json

EXAMPLES = """
examples:
  minivit benchmark step --against torch,torch-compile,jax      a training step; pip install -e ".[bench]"
  minivit benchmark step --preset Ti/16 --batch 32 --json ti.json --png ti.png
  minivit benchmark infer --against torch                       predictions: a batch of 256, and one picture
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
MIB = 2**20
TASKS = {
    "step": ("forward, backward and AdamW of one batch", 128, 20),
    "infer": ("predictions: of a batch, and of one picture", 256, 20),
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
                             help=f"contenders, any of {', '.join(bench.AGAINST)} [none]")  # fmt: skip
        if name == "data":
            how.add_argument("--config", metavar="FILE", help="a recipe's augmentation, batch and model")
        how.add_argument("--batch", type=int, default=batch, metavar="N", help=f"pictures [{batch}]")
        how.add_argument("--pairs", type=int, default=pairs, metavar="N", help=f"rounds that count [{pairs}]")
        if name not in ("layers", "kernels"):
            how.add_argument("--patience", type=float, default=0.0, metavar="X",
                             help="seconds to spend on new rounds for disturbed ones [0]")  # fmt: skip
        if name != "kernels":
            how.add_argument("--threads", type=int, default=0, metavar="N", help="cores for everybody [0: all]")
            how.add_argument("--workers", type=int, default=0, metavar="N", help="our workers [0: one per core]")
        how.add_argument("--micro-batch", type=int, default=0, metavar="N", help="our micro-batch [0: the engine's]")
        how.add_argument("--seed", type=int, default=0, metavar="N", help="seed of parameters and pictures [0]")
        if name in ("step", "infer", "kernels"):
            device = "cuda" if name == "kernels" else "cpu"
            how.add_argument("--device", default=device, metavar="NAME", help=f"cpu or cuda, for everybody [{device}]")
            how.add_argument("--precision", choices=PRECISIONS, default="float32",
                             help="on a GPU; PyTorch's allow_tf32, or its autocast to bfloat16 [float32]")  # fmt: skip
        how.add_argument("--quiet", action="store_true", help="no progress bar")
        how.add_argument("--json", type=output_file, metavar="FILE", help="write everything as JSON")
        how.add_argument("--png", type=picture_file, metavar="FILE", help="draw the figure (.png, .pdf, .svg)")
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

    Raises  InputError: no such file, it is for pictures that are read from files, or model settings were given beside
            it.
    """
    if given(arguments, ViTConfig) or arguments.preset != "Mini/4":
        raise InputError("--config brings its own model: leave --preset and the model's flags out")
    recipe = read_recipe(find_config(arguments.config))
    config, train = ViTConfig(**recipe.model), TrainConfig(**recipe.train)
    if train.crop_area:
        raise InputError(
            f"{arguments.config} has crop_area, parts that are cut out as files are read; this benchmark times "
            "pictures that are in memory: choose another settings file"
        )
    arguments.preset, arguments.batch = str(arguments.config), train.batch_size
    return config, loading_settings(train, config.num_classes)


def milliseconds(entry):
    """Median and interquartile range, in 19 characters."""
    return f"{1e3 * entry['median']:9.2f} ±{1e3 * (entry['q3'] - entry['q1']):8.2f}"


def size(bytes_):
    return f"{bytes_ / MIB:8,.0f}" if bytes_ else f"{'?':>8}"


def print_contest(report, title):
    """The table of `bench.contest`."""
    print(f"\n{title}")
    on_gpu = "host" in report["contenders"]["minivit"]
    host = f"{'host ms':>10}" if on_gpu else ""
    print(f"{'':15}{'median ms ±   IQR':>19}{host}{'pictures/s':>12}{'ours / its':>12}{'quartiles':>14}"
          f"{'floor / its':>13}{'peak MiB':>10}{'at start':>10}")  # fmt: skip
    for name, c in report["contenders"].items():
        ratio, quarters = "", ""
        if name in bench.AGAINST:
            ratio, quarters = f"{c['ratio']['median']:.3f}", f"{c['ratio']['q1']:.3f}-{c['ratio']['q3']:.3f}"
        fraction = f"{c['floor_fraction']:.1%}" if "floor_fraction" in c else ""
        host = f"{1e3 * c['host']['median']:10.2f}" if on_gpu else ""
        print(f"{name:15}{milliseconds(c)}{host}{c['images_per_second']:12,.1f}{ratio:>12}{quarters:>14}{fraction:>13}"
              f"{size(c['peak_memory']):>10}{size(c['start_memory']):>10}")  # fmt: skip
    for name, c in report["contenders"].items():
        if "largest_error" in c:
            what = f"{c['largest_error']:.1e} in {'logits' if c['loss'] is None else 'gradients'}"
            what += f" (allowed {report['allowed']['gradient']:.0e})"
            if c["loss"] is not None:
                what += f", {c['loss_error']:.1e} in the loss (allowed {report['allowed']['loss']:.0e})"
            print(f"{name} agrees with us: largest relative error {what}")


def print_layers(report):
    """The table of `bench.layers_report`."""
    at = report["settings"]
    print(f"\nms of one call on a micro-batch of {at['micro_batch']} in {at['workers']} worker(s) at once; its floor: "
          "its matrix products (p) or a copy of as many bytes (t)")  # fmt: skip
    print(f"{'':22}{'':9}{'calls':>6}{'ms':>10}{'floor':>10}{'floor / it':>13}{'of the step':>13}")
    for row in report["layers"]:
        note = "  inside the one above" if row["inside_another"] else ""
        print(f"{row['layer']:22}{row['direction']:9}{row['times']:6}{1e3 * row['seconds']['median']:10.3f}"
              f"{1e3 * row['floor']['median']:10.3f} {row['floor_kind'][0]}{row['floor_fraction']:11.1%}"
              f"{row['share_of_step']:13.1%}{note}")  # fmt: skip
    print(f"{'the rest':31}{'':37}{report['rest_of_step']:14.1%}  additions, sums of gradients, waiting")
    print(f"a whole step: {1e3 * report['step']['median']:.1f} ms; all floors together {report['floor_fraction']:.1%}")


def print_kernels(report):
    """The table of `bandwidth.kernels_report`."""
    print("\none launch of each kernel of a step; its floor: a copy that reads and writes as many bytes in all")
    print(f"{'':26}{'launches':>9}{'MB':>10}{'us':>10}{'floor':>10}{'GB/s':>9}{'floor / it':>12}{'of the step':>13}")
    for row in report["layers"]:
        print(f"{row['layer']:26}{row['times']:9}{1e-6 * row['bytes']:10.3f}{1e6 * row['seconds']['median']:10.2f}"
              f"{1e6 * row['floor']['median']:10.2f}{1e-9 * row['bytes_per_second']:9,.0f}"
              f"{row['floor_fraction']:12.1%}{row['share_of_step']:13.1%}")  # fmt: skip
    print(f"{'the rest':86}{report['rest_of_step']:13.1%}  matrix products, and what CuPy launches")
    print(f"a whole step: {1e3 * report['step']['median']:.3f} ms; all floors together {report['floor_fraction']:.1%}; "
          f"the card copies 256 MiB at {1e-9 * report['copy_rate']['median']:,.0f} GB/s, read and written")  # fmt: skip


def print_scaling(report):
    """The table of `bench.scaling_report`."""
    for panel, found in report["panels"].items():
        points = found["points"]
        names = list(points[0]["contenders"])
        print(f"\n{panel:>8}{'GFLOP':>10}{'N^2 part':>11}" + "".join(f"{name + ', ms':>18}" for name in names)
              + f"{'GFLOP/s':>10}{'peak MiB':>10}")  # fmt: skip
        for p in points:
            mine = p["contenders"]["minivit"]
            print(f"{p['x']:8}{1e-9 * p['flops']:10.2f}{p['attention_share']:11.1%}"
                  + "".join(f"{1e3 * p['contenders'][name]['median']:18.2f}" for name in names)
                  + f"{1e-9 * p['flops'] / mine['median']:10.1f}{size(mine['peak_memory']):>10}")  # fmt: skip
        if "line" in found:
            start, each, off = (found["line"][key] for key in ("start", "each", "off"))
            print(f"ours is {1e3 * start:.2f} ms + {1e3 * each:.2f} ms x {panel}, to {off:.1%}")
        elif "power" in found:
            print("ours grows from each to the next as the power " + ", ".join(f"{p:.2f}" for p in found["power"]))
        else:
            times = ", ".join(f"{s['median']:.2f} ({s['q1']:.2f} to {s['q3']:.2f})" for s in found["speedup"])
            print(f"ours is quicker than with the first by {times}")


def print_data(report):
    """The table of `bench.data_report`."""
    step, pipeline = (report["contenders"][name] for name in ("minivit", "pipeline"))
    share, added = report["share_of_step"], report["added_to_step"]
    print(f"\ninput pipeline   {milliseconds(pipeline)} ms a batch, {report['images_per_second']:,.0f} pictures/s")
    print(f"training step    {milliseconds(step)} ms a batch, {report['batch'] / step['median']:,.0f} pictures/s")
    print(f"the pipeline's work is {share['median']:.2%} of a step ({share['q1']:.2%} to {share['q3']:.2%}); prepared "
          f"in the background it adds {added['median']:.2%} ({added['q1']:.2%} to {added['q3']:.2%})")  # fmt: skip


def warn_of_others(shares):
    """Say so if other programs kept the cores busy."""
    known = [share for share in shares if share is not None]
    disturbed = sum(share > bench.QUIET for share in known)
    if disturbed:
        print(f"\nin {disturbed} of {len(known)} rounds other programs took more than {bench.QUIET:.0%} of the cores "
              f"(median {statistics.median(known):.0%}): take these figures with care, or give --patience")  # fmt: skip


def main(argv=None):
    """Entry point; returns the exit status."""
    arguments = parse(argv)
    loading = None
    if getattr(arguments, "config", None):
        config, loading = use_recipe(arguments)
    else:
        config = config_of(arguments)
    bench.check_config(config)
    bench.check_contenders(arguments.against)
    engine = {name: getattr(arguments, name) for name in ("workers", "micro_batch") if getattr(arguments, name, 0)}
    common = {
        "batch": arguments.batch, "engine": engine, "pairs": arguments.pairs, "seed": arguments.seed,
        "progress": not arguments.quiet,
    }  # fmt: skip
    if arguments.task not in ("layers", "kernels"):
        common["patience"] = arguments.patience
    if loading:
        common["loading"] = loading
    if hasattr(arguments, "device"):
        device = find_device(arguments.device)
        if arguments.task == "kernels" and device == "cpu":
            raise InputError("the kernels are a GPU's: --device cuda")
        if device not in ("cpu", "cuda:0"):
            raise InputError("the benchmark takes the first GPU: --device cuda")
        if device == "cpu" and arguments.precision != "float32":
            raise InputError(f"--precision {arguments.precision} is for a GPU: --device cuda")
        common |= {"device": device.partition(":")[0], "precision": arguments.precision}
    try:
        with bench.only_cores(getattr(arguments, "threads", 0)):
            place = bench.machine()
            c = config
            print(f"{arguments.preset}: {c.image_size}x{c.image_size}x{c.channels} pictures, patch {c.patch_size}, "
                  f"{c.num_tokens} tokens, width {c.width}, {c.depth} blocks, {c.num_heads} heads, MLP {c.mlp_dim}, "
                  f"{c.num_classes} classes, {getattr(arguments, 'precision', 'float32')}")  # fmt: skip
            if common.get("device") == "cuda":
                place["device"] = device_name("cuda:0")
                print(f"on {place['device']}")
            print(f"on {place['cores']} core(s) of {place['processor']}, {place['blas'].rpartition(',')[0]}")
            if place["environment"]:
                print("environment: " + " ".join(f"{key}={value}" for key, value in place["environment"].items()))
            sys.stdout.flush()
            if arguments.task == "layers":
                report = bench.layers_report(config, **common)
                print_layers(report)
            elif arguments.task == "kernels":
                from minivit.benchmark import bandwidth

                report = bandwidth.kernels_report(config, **common)
                print_kernels(report)
            elif arguments.task == "data":
                report = bench.data_report(config, **common)
                print_data(report)
            elif arguments.task == "scaling":
                report = bench.scaling_report(config, against=arguments.against, **common)
                print_scaling(report)
            else:
                report = bench.contest(config, task=arguments.task, against=arguments.against, **common)
                step = arguments.task == "step"
                flops = sum(expected_flops(c, arguments.batch)) if step else expected_flops(c, arguments.batch).forward
                what = "forward, backward and AdamW" if step else "prediction"
                print_contest(report, f"{what} of {arguments.batch} pictures, {1e-9 * flops:.1f} GFLOP in products")
                if not step:
                    report["latency"] = bench.contest(
                        config, task="infer", against=arguments.against, **common | {"batch": 1}
                    )
                    print_contest(report["latency"], "prediction of one picture")
    except bench.Disagreement as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    warn_of_others([share for part in [report, *report.get("panels", {}).values()] for share in part.get("others", [])])
    if arguments.json:
        write_json(arguments.json, {
            "task": arguments.task, "command": " ".join(["benchmark.py", *(argv or sys.argv[1:])]),
            **report, "config": vars(config), "pairs": arguments.pairs, "seed": arguments.seed, "machine": place,
        })  # fmt: skip
    if arguments.png:
        from minivit import figures  # matplotlib is slow to import

        title = f"{arguments.preset} on {place['cores']} cores of {place['processor']}"
        if arguments.task == "kernels":
            title = f"{arguments.preset} on {place['device']}, {arguments.precision}"
        draw = {
            "layers": figures.save_layers,
            "kernels": figures.save_layers,
            "scaling": figures.save_scaling,
            "data": figures.save_data,
        }
        draw.get(arguments.task, figures.save_contest)(arguments.png, report, title=title)
    return 0
