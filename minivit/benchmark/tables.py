"""The tables of the benchmark's reports, as they are printed."""

from __future__ import annotations

import statistics

from minivit.benchmark.contest import AGAINST
from minivit.benchmark.turns import QUIET

MIB = 2**20


def milliseconds(entry):
    """Median and interquartile range, in 19 characters."""
    return f"{1e3 * entry['median']:9.2f} ±{1e3 * (entry['q3'] - entry['q1']):8.2f}"


def size(bytes_):
    """Bytes as MiB, in 8 characters; a question mark where they are not known."""
    return f"{bytes_ / MIB:8,.0f}" if bytes_ else f"{'?':>8}"


def print_contest(report, title):
    """The table of `contest.contest`."""
    print(f"\n{title}")
    on_gpu = "host" in report["contenders"]["minivit"]
    host = f"{'host ms':>10}" if on_gpu else ""
    print(f"{'':15}{'median ms ±   IQR':>19}{host}{'images/s':>12}{'ours / its':>12}{'quartiles':>14}"
          f"{'floor / its':>13}{'peak MiB':>10}{'at start':>10}")  # fmt: skip
    for name, c in report["contenders"].items():
        ratio, quarters = "", ""
        if name in AGAINST:
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
    """The table of `layers.layers_report`."""
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
    """The table of `scaling.scaling_report`."""
    for panel, facts in report["panels"].items():
        points = facts["points"]
        names = list(points[0]["contenders"])
        print(f"\n{panel:>8}{'GFLOP':>10}{'N^2 part':>11}" + "".join(f"{name + ', ms':>18}" for name in names)
              + f"{'GFLOP/s':>10}{'peak MiB':>10}")  # fmt: skip
        for p in points:
            mine = p["contenders"]["minivit"]
            print(f"{p['x']:8}{1e-9 * p['flops']:10.2f}{p['attention_share']:11.1%}"
                  + "".join(f"{1e3 * p['contenders'][name]['median']:18.2f}" for name in names)
                  + f"{1e-9 * p['flops'] / mine['median']:10.1f}{size(mine['peak_memory']):>10}")  # fmt: skip
        if "line" in facts:
            start, each, off = (facts["line"][key] for key in ("start", "each", "off"))
            print(f"ours is {1e3 * start:.2f} ms + {1e3 * each:.2f} ms x {panel}, to {off:.1%}")
        elif "power" in facts:
            print("ours grows from each to the next as the power " + ", ".join(f"{p:.2f}" for p in facts["power"]))
        else:
            times = ", ".join(f"{s['median']:.2f} ({s['q1']:.2f} to {s['q3']:.2f})" for s in facts["speedup"])
            print(f"ours is quicker than with the first by {times}")


def print_data(report):
    """The table of `loading.data_report`."""
    step, pipeline = (report["contenders"][name] for name in ("minivit", "pipeline"))
    share, added = report["share_of_step"], report["added_to_step"]
    print(f"\ninput pipeline   {milliseconds(pipeline)} ms a batch, {report['images_per_second']:,.0f} images/s")
    print(f"training step    {milliseconds(step)} ms a batch, {report['batch'] / step['median']:,.0f} images/s")
    print(f"the pipeline's work is {share['median']:.2%} of a step ({share['q1']:.2%} to {share['q3']:.2%}); prepared "
          f"in the background it adds {added['median']:.2%} ({added['q1']:.2%} to {added['q3']:.2%})")  # fmt: skip


def warn_of_others(shares):
    """Say so if other programs kept the cores busy."""
    numbers = [share for share in shares if share is not None]
    disturbed = sum(share > QUIET for share in numbers)
    if disturbed:
        print(f"\nin {disturbed} of {len(numbers)} rounds other programs took more than {QUIET:.0%} of the cores "
              f"(median {statistics.median(numbers):.0%}): take care with these, or give --patience")  # fmt: skip
