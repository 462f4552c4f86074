"""Accuracies side by side: the rows of a sweep, few-shot classifiers, the tasks of VTAB."""

from __future__ import annotations

import numpy as np

from minivit.figures.canvas import BAD, GOOD, INK, OURS, TEST, THEIRS, label, new_figure, own_style, save, style


@own_style
def save_sweep(path, table):
    """Accuracies of `minivit.training.sweep.table_of`: a row for each setting, a dot for each seed, a line at the mean.

    Settings that have no finished run are left out.
    """
    base = table["rows"][0]
    first, rows = base["mean"], [row for row in table["rows"] if row["runs"]]
    figure = new_figure(8.5, 0.42 * len(rows) + 1.6)
    axes = figure.subplots()
    for y, row in enumerate(rows):
        values = [100 * run["accuracy"] for run in row["runs"].values()]
        color = THEIRS if row is base else OURS
        axes.plot(values, [y] * len(values), "o", color=color, alpha=0.55, ms=6)
        axes.plot([100 * row["mean"]] * 2, [y - 0.3, y + 0.3], color=color, lw=2.4)
        text = f"{100 * row['mean']:.2f}" + (f"  ({100 * row['gain']:+.2f})" if row["gain"] is not None else "")
        axes.annotate(text, (max(values), y), (8, 0), textcoords="offset points", va="center", fontsize=9)
    if first is not None:
        axes.axvline(100 * first, color=THEIRS, ls=":", lw=1.2, zorder=0)
    axes.set_yticks(range(len(rows)), [label(row["name"], 40) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.18)
    style(axes, "test accuracy after the last epoch, % (dots: seeds, line: mean)", "", label(table["title"], 90))
    axes.grid(axis="y", visible=False)
    save(figure, path)


@own_style
def save_few_shot(path, results, *, title=""):
    """Accuracy against examples of each class: a line for each row of ``results``, a band of one deviation over seeds.

    ``results``: as `minivit transfer` writes them, rows with mean and spread for each number of ``shots``
    """
    figure = new_figure(6.4, 4.2)
    axes = figure.subplots()
    for row, color in zip(results["rows"], (OURS, BAD, THEIRS), strict=False):
        shots = [each["shots"] for each in row["accuracies"]]
        mean = 100 * np.array([each["mean"] for each in row["accuracies"]])
        spread = 100 * np.array([each["spread"] or 0.0 for each in row["accuracies"]])
        axes.plot(shots, mean, "o-", color=color, lw=1.8, ms=5, label=label(row["features"], 40))
        axes.fill_between(shots, mean - spread, mean + spread, color=color, alpha=0.15, lw=0)
    axes.set_xscale("log")
    axes.set_xticks(shots, [str(count) for count in shots])
    axes.minorticks_off()
    axes.axhline(100 / results["classes"], color=INK, ls=":", lw=1, zorder=0, label="chance")
    axes.set_ylim(bottom=0)
    style(axes, "training images of each class", "test accuracy, %", label(title, 60))
    axes.legend(frameon=False, fontsize=9)
    save(figure, path)


@own_style
def save_vtab(path, summary, *, title=""):
    """Accuracies of `minivit.evaluation.vtab.summary_of`: a bar for each task, in its group, a line at each mean."""
    figure = new_figure(6.8, 0.28 * len(summary["tasks"]) + 1.9)
    axes = figure.subplots()
    names = list(summary["tasks"])
    y, ticks = 0, []
    for (group, each), color in zip(summary["groups"].items(), (OURS, GOOD, TEST), strict=True):
        members = [names.pop(0) for _ in range(each["tasks"])]
        if not members:
            continue
        rows = [y + i for i in range(len(members))]
        scores = [100 * summary["tasks"][name] for name in members]
        axes.barh(rows, scores, color=color, alpha=0.75, height=0.7)
        for row, score in zip(rows, scores, strict=True):
            ink = "white" if score > 10 else INK  # on its bar, or beside one too short for it
            axes.text(1.5, row, f"{score:.1f}", va="center", fontsize=9, color=ink, weight="bold")
        some = "" if each["tasks"] == each["of"] else f", {each['tasks']} of {each['of']}"
        mean = f"{group}: {100 * each['mean']:.1f}{some}"
        axes.plot([100 * each["mean"]] * 2, [rows[0] - 0.5, rows[-1] + 0.5], color=color, lw=1.6, ls="--", label=mean)
        ticks += zip(rows, members, strict=True)
        y += len(members) + 0.6
    axes.set_yticks([row for row, _ in ticks], [name for _, name in ticks])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    mean = f"mean of {len(ticks)} tasks: {100 * summary['mean']:.1f}"
    style(axes, f"test accuracy, % ({mean})", "", label(title, 70))
    axes.grid(axis="y", visible=False)
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=3)
    save(figure, path)
