"""Figures of the benchmark: times in turn, memory, the input pipeline, layers and kernels, scaling."""

from __future__ import annotations

import numpy as np
from matplotlib.ticker import MaxNLocator

from minivit.figures.canvas import FLOOR, GOOD, OURS, SOFT, TEST, THEIRS, label, new_figure, own_style, save, style

BENCHMARK_COLORS = {"minivit": OURS, "minivit-fed": OURS, "plain": "#7dabf8", "torch": "#c2410c",
                    "torch-compile": "#ea8a4f", "jax": "#15803d"}  # fmt: skip


def _strip(axes, contenders, xlabel, title, *, note=None, names=None):
    """A row for each contender: a bar to its median, a dot for each round, the median in figures."""
    largest = max(max(c["seconds"]) for c in contenders.values())
    scale, unit = (1e3, "ms") if largest < 10 else (1.0, "s")
    for row, (name, c) in enumerate(contenders.items()):
        color = BENCHMARK_COLORS.get(name, FLOOR)
        axes.barh(row, scale * c["median"], color=color, alpha=0.35 if name in BENCHMARK_COLORS else 0.8, height=0.62)
        spread = np.linspace(-0.2, 0.2, len(c["seconds"]))  # round after round from top to bottom
        axes.plot([scale * s for s in c["seconds"]], row + spread, ".", color=color if color != FLOOR else THEIRS, ms=4)
        text = f"{scale * c['median']:,.4g} {unit}" + (f"  {note(name, c)}" if note else "")
        axes.text(scale * max(c["seconds"]) + 0.02 * scale * largest, row, text, va="center", fontsize=9)
    axes.set_yticks(range(len(contenders)), names or list(contenders))
    axes.invert_yaxis()
    axes.set_xlim(0, scale * largest * (1.6 if note else 1.2))
    style(axes, f"{xlabel}, {unit}", "", title)
    axes.grid(axis="y", visible=False)


def _against_us(name, c):
    """The figure that stands beside a contender's time."""
    if name == "minivit":
        return f"(floor {c['floor_fraction']:.0%} of it)" if "floor_fraction" in c else ""
    return f"(ours is {c['ratio']['median']:.2f}×)" if name in BENCHMARK_COLORS else ""


def _finish(figure, path, title):
    figure.suptitle(label(title, 100), fontsize=12, x=0.01, ha="left", weight="bold")
    save(figure, path)


@own_style
def save_contest(path, report, *, title=""):
    """Times and peak memory of `minivit.benchmark.contest.contest`; with "latency" in the report, of one image too."""
    contests = [report] + ([report["latency"]] if "latency" in report else [])
    rows = len(report["contenders"])
    figure = new_figure(4.6 * (1 + len(contests)) + 1, 0.42 * rows + 1.7)
    *panels, memory = figure.subplots(1, 1 + len(contests))
    for axes, each in zip(panels, contests, strict=True):
        what = f"a batch of {each['batch']}" if each["batch"] > 1 else "one image"
        each_title = f"{what}, {each['images_per_second']:,.0f} images/s"
        _strip(axes, each["contenders"], "time (dots: rounds, bar: median)", each_title, note=_against_us)
    programs = {
        name: c for name, c in report["contenders"].items() if c["peak_memory"] and not name.startswith("floor")
    }
    largest = max((c["peak_memory"] for c in programs.values()), default=1) / 2**20
    for row, (name, c) in enumerate(programs.items()):
        peak, start = c["peak_memory"] / 2**20, c["start_memory"] / 2**20
        memory.barh(row, peak, color=BENCHMARK_COLORS[name], alpha=0.45, height=0.62)
        memory.barh(row, start, color=BENCHMARK_COLORS[name], height=0.62)
        memory.text(peak + 0.02 * largest, row, f"{peak:,.0f}", va="center", fontsize=9)
    memory.set_yticks(range(len(programs)), list(programs))
    memory.invert_yaxis()
    memory.set_xlim(0, 1.2 * largest)
    style(memory, "MiB (dark: the imports alone)", "", "peak memory of the process")
    memory.grid(axis="y", visible=False)
    _finish(figure, path, title)


@own_style
def save_data(path, report, *, title=""):
    """Times of `minivit.benchmark.loading.data_report`."""
    figure = new_figure(8, 2.9)
    share, added = report["share_of_step"]["median"], report["added_to_step"]["median"]
    _strip(
        figure.subplots(), report["contenders"], f"time for a batch of {report['batch']} (dots: rounds, bar: median)",
        f"{report['images_per_second']:,.0f} augmented images/s: the work is {share:.2%} of a step; fed, it takes "
        f"{1 + added:.3f} times as long",
        names=["a step", "a step, fed", "the pipeline alone"],
    )  # fmt: skip
    _finish(figure, path, title)


@own_style
def save_layers(path, report, *, title=""):
    """Where a step's time goes, layer by layer or kernel by kernel, and how much of it is each one's floor."""
    rows = [row for row in report["layers"] if not row["inside_another"] and row["share_of_step"] >= 0.001]
    step = report["step"]["median"]
    figure = new_figure(10, 0.27 * len(rows) + 1.9)
    axes = figure.subplots()
    largest = 100 * max(*(r["share_of_step"] for r in rows), report["rest_of_step"])
    for y, row in enumerate(rows):
        share = 100 * row["share_of_step"]
        color = {"forward": OURS, "backward": TEST}.get(row["direction"], GOOD)
        axes.barh(y, share, color=color, alpha=0.35, height=0.72)
        axes.barh(y, share * min(row["floor_fraction"], 1.0), color=color, height=0.72)
        axes.text(
            share + 0.01 * largest, y,
            f"{share:.1f} %, floor {row['floor_fraction']:.0%}"
            + (f", {1e-9 * row['bytes_per_second']:,.0f} GB/s" if "bytes_per_second" in row else ""),
            va="center", fontsize=8,
        )  # fmt: skip
    rest = 100 * report["rest_of_step"]
    axes.barh(len(rows), max(rest, 0.0), color=THEIRS, alpha=0.5, height=0.72)
    axes.text(max(rest, 0) + 0.01 * largest, len(rows), f"{rest:.1f} %",
              va="center", fontsize=8)  # fmt: skip
    kernels = "copy_rate" in report
    labels = [
        f"{row['times']} x {row['layer']}, {1e-6 * row['bytes']:.3g} MB" if kernels
        else f"{row['layer']} {row['direction']}" for row in rows
    ] + ["matrix products, CuPy's own" if kernels else "additions, sums, waiting"]  # fmt: skip
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlim(0, 1.25 * largest)
    if kernels:
        milliseconds, how = f"{1e3 * step:,.2f}", f"copies at {1e-9 * report['copy_rate']['median']:,.0f} GB/s"
    else:
        at, milliseconds = report["settings"], f"{1e3 * step:,.0f}"
        how = f"{at['workers']} workers, micro-batches of {at['micro_batch']}"
    style(axes, "share of a step's time, % (dark: the floor; calls below 0.1 % are left out)", "",
           f"a step of {report['batch']} images, {milliseconds} ms; all floors together "
           f"{report['floor_fraction']:.0%}; {how}",
    )  # fmt: skip
    axes.grid(axis="y", visible=False)
    _finish(figure, path, title)


@own_style
def save_scaling(path, report, *, title=""):
    """Step times of `minivit.benchmark.scaling.scaling_report`: a panel for each of batch, depth, tokens, workers."""
    texts = {"batch": "images in the batch, B", "depth": "blocks, L", "tokens": "tokens, N", "workers": "workers"}
    figure = new_figure(12, 7.2)
    for axes, (panel, facts) in zip(figure.subplots(2, 2).flat, report["panels"].items(), strict=True):
        points = facts["points"]
        x = np.array([p["x"] for p in points])
        for name in points[0]["contenders"]:
            times = [{key: 1e3 * p["contenders"][name][key] for key in ("median", "q1", "q3")} for p in points]
            median = np.array([t["median"] for t in times])
            spread = np.array([[t["median"] - t["q1"], t["q3"] - t["median"]] for t in times]).T
            axes.errorbar(x, median, spread, fmt="o-", color=BENCHMARK_COLORS.get(name, THEIRS), label=name, ms=4,
                          capsize=2, lw=1.4)  # fmt: skip
        mine = np.array([1e3 * p["contenders"]["minivit"]["median"] for p in points])
        note = _draw_law(axes, panel, facts, x, mine)
        if panel == "tokens":
            axes.set(xscale="log", yscale="log")
            axes.set_xticks(x, [str(n) for n in x])
            axes.minorticks_off()
        else:
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False, fontsize=8)
        batch = "" if panel == "batch" else f", batch of {points[0]['batch']}"
        style(axes, texts[panel] + batch, "a step, ms", note)
    _finish(figure, path, title)


def _draw_law(axes, panel, facts, x, mine):
    """The dotted line that our times ``mine``, in ms, are to be compared with; returns what it says of them."""
    points = facts["points"]
    if panel == "workers":
        axes.plot(x, mine[0] * x[0] / x, ":", color=SOFT, label=f"the time of {x[0]} / workers")
        return f"{facts['speedup'][-1]['median']:.2f} times as quick with {x[-1]} as with {x[0]}"
    if panel == "tokens":
        flops = np.array([p["flops"] for p in points], float)
        axes.plot(x, flops * np.median(mine / flops), ":", color=SOFT, label="in proportion to FLOPs")
        note = f"N² products: {points[0]['attention_share']:.0%} to {points[-1]['attention_share']:.0%}"
        power = facts["power"]
        return note + (f"; slope {power[0]:.2f} to {power[-1]:.2f}" if power else "")
    line = {key: 1e3 * facts["line"][key] for key in ("start", "each")}
    axes.plot(x, line["start"] + line["each"] * x, ":", color=SOFT, label="straight line through ours")
    what = {"batch": "image", "depth": "block"}[panel]
    return f"{line['each']:.2f} ms for each {what}, times at most {facts['line']['off']:.0%} off the line"
