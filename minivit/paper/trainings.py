"""The trainings of the paper's entries: each in its folder, within its time, gone on with where it stopped.

How long a run or a sweep is, is measured once and remembered in plan.json, so that what was stopped goes on with the
same settings; a folder holds the runs of one budget.
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import replace
from functools import partial

from minivit import figures
from minivit.base.errors import InputError
from minivit.base.files import read_object, read_toml, write_json
from minivit.base.settings import field_names
from minivit.base.words import counted
from minivit.evaluation.runs import summary_of
from minivit.figures import runs
from minivit.laboratory.diagnosis import diagnose
from minivit.masked import MaskedConfig
from minivit.masked.pretrain import MaskedPrediction
from minivit.training.budget import time_of_epochs, within
from minivit.training.config import train_config_of
from minivit.training.folder import last_checkpoint
from minivit.training.recipes import CONFIGS, TABLES, find_config, prepare, read_recipe
from minivit.training.sweep import carry_out, going_on, read_sweep, results_of, runs_of, write_table
from minivit.training.task import Classification
from minivit.training.trainer import Trainer

PLAN = "plan.json"
LEAST = 5  # steps of a sweep's row
PROBE = 2.0  # seconds of each measurement of a sweep's rows
RESERVE = 0.05  # of a sweep's budget: for checkpoints, figures, and a machine that is slower later


class Stopped(Exception):
    """A training was stopped by a signal; the same command goes on with it."""


def length_of(epochs, steps):
    """How long a run was, in words; ``steps`` are 0 where it had whole epochs."""
    return counted(steps, "step") if steps else counted(epochs, "epoch")


# ---- plans


def fingerprint_of(content):
    """A number that tells whether two things that JSON can hold are the same."""
    return zlib.crc32(json.dumps(content, sort_keys=True, default=str).encode())


def plan_of(folder):
    """What plan.json says of the runs in a folder; {} where there is none yet."""
    return read_object(folder / PLAN)


def write_plan(folder, plan):
    """Write plan.json; returns the plan."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / PLAN, plan)
    return plan


def own_plan(context, folder, content):
    """The plan of the runs in a folder, if they are of these settings and this budget; {} where there is none yet.

    Raises  InputError: they are of other settings, or of another share of the budget.
    """
    plan = plan_of(folder)
    if plan and (plan.get("budget"), plan.get("of")) != (context.share, fingerprint_of(content)):
        raise InputError(
            f"{folder} holds runs of other settings, or cut for another budget ({plan.get('budget', 0):g} s, not "
            f"{context.share:g} s); choose another --out"
        )
    return plan


def claim(context, folder, content):
    """Plan the runs of an entry in a folder; see `own_plan`."""
    if not own_plan(context, folder, content):
        write_plan(folder, {"budget": context.share, "of": fingerprint_of(content)})


# ---- a run


def run_of(context, folder, recipe, seconds, *, masked=None, capped=False):
    """The summary of the run of a recipe in a folder: finished already, gone on with, or as long as the time holds.

    ``masked``, a `MaskedConfig`, makes it one of pre-training; ``capped``: it gets no more epochs than its settings say
    Raises  InputError: not even a step fits, or the settings do not fit together;  Stopped
    """
    if summary := summary_of(folder):
        return summary
    task = Classification if masked is None else partial(MaskedPrediction, masked=masked)
    last = last_checkpoint(folder)
    recipe = going_on(recipe._replace(train=recipe.train | {"device": context.device}), last)
    dataset, model, config, begins = prepare(recipe)
    if last:
        length = train_config_of(last[1])
    else:
        length, each = within(seconds, dataset, model, config, task=task)
        if capped:
            length = replace(length, epochs=min(length.epochs, config.epochs))
        words = length_of(length.epochs, length.steps)
        print(f"training {words} in {folder}: an epoch takes about {each:.3g} s", flush=True)
    config = replace(config, epochs=length.epochs, steps=length.steps)
    run = Trainer(
        dataset, model, config, folder, task=task, resume=last, progress=context.progress,
        draw=runs.draw_classification if masked is None else runs.draw_masked, diagnose=diagnose, **begins,
    )  # fmt: skip
    if run.run() is None:
        raise Stopped
    return summary_of(folder)


def masked_recipe(method, data, *, target=None, preset=None):
    """The recipe of pre-training by a method, minivit/configs/pretrain-METHOD.toml: (Recipe, MaskedConfig)."""
    tables = TABLES | {"pretraining": field_names(MaskedConfig)}
    file = find_config(f"pretrain-{method}")
    settings = read_toml(file, tables)["pretraining"] | ({"target": target} if target else {})
    return read_recipe(file, data=data, preset=preset, tables=tables), MaskedConfig(**settings)


# ---- a sweep


def share_within(times, epochs, budget):
    """The share of each row's epochs at which all rows of a sweep together fit into a time; at most 1.

    ``times``: for each row a function, the seconds of so many epochs (`budget.time_of_epochs`); ``epochs``: those of
    each row's settings
    """

    def seconds(share):
        return sum(time_of(share * n) for time_of, n in zip(times, epochs, strict=True))

    low, high = 0.0, 1.0
    if seconds(high) <= budget:
        return high
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if seconds(middle) <= budget else (low, middle)
    return low


def sweep_of(context, name, *, share=1.0, start=None, model=None):
    """The sweep minivit/configs/sweeps/NAME.toml with one seed, cut to the budget, and the folder of its runs.

    All rows get the same share of their epochs, as whole steps. ``share``: of the context's share of the budget. Rows
    that begin with a checkpoint begin with ``start``; ``model`` are other settings of all models.
    Raises  InputError: the budget is too small, or the folder holds the sweep as it was cut for another budget.
    """
    sweep, folder = read_sweep(CONFIGS / "sweeps" / f"{name}.toml"), context.out / name

    def here(row):
        recipe = row.recipe
        begins = recipe.start | {"checkpoint": str(start)} if recipe.start else recipe.start
        changes = {key: value for key, value in row.changes.items() if key != "checkpoint"}  # of the file, not of here
        model_here, data = recipe.model | (model or {}), recipe.data | context.data
        return row._replace(recipe=recipe._replace(data=data, model=model_here, start=begins), changes=changes)

    rows = tuple(map(here, sweep.rows))
    content = [row._asdict() for row in rows]
    plan = own_plan(context, folder, content)
    if not plan:
        cut = cut_to_budget(context, name, rows, (1 - RESERVE) * share * context.share)
        plan = write_plan(folder, {"budget": context.share, "of": fingerprint_of(content), **cut})

    def shorter(row):
        train = {key: value for key, value in row.recipe.train.items() if key != "epochs"}
        return row._replace(recipe=row.recipe._replace(train=train | {"steps": plan["steps"][row.name]}))

    steps = sorted(set(plan["steps"].values()))
    title = " to ".join(f"{n:,}" for n in dict.fromkeys((steps[0], steps[-1]))) + f" steps ({plan['share']:.0%})"
    return sweep._replace(title=title, seeds=sweep.seeds[:1], rows=tuple(map(shorter, rows))), folder


def cut_to_budget(context, name, rows, seconds):
    """How many steps of each row of a sweep fit into a time: {"steps": {row: steps}, "share", "test_pictures"}.

    Raises  InputError: too few.
    """
    place = {"device": context.device}
    parts = [prepare(row.recipe._replace(train=row.recipe.train | place))[:3] for row in rows]
    print(f"{name}: measuring {len(parts)} settings", flush=True)
    times = [time_of_epochs(*each, probe=PROBE) for each in parts]
    epochs, steps = [config.epochs for *_, config in parts], {}
    share = share_within(times, epochs, seconds)
    for row, (dataset, _, config), whole in zip(rows, parts, epochs, strict=True):
        group = config.batch_size * config.accumulate
        steps[row.name] = int(share * whole * -(-len(dataset.train_images) // group))
    if (least := min(steps.values())) < LEAST:
        raise InputError(
            f"{name}: {seconds:.0f} s hold {least} steps of each of its {len(rows)} settings on this machine, too few "
            "to compare; give a larger --budget"
        )
    return {"steps": steps, "share": share, "test_pictures": len(parts[0][0].test_labels)}


def finished_sweep(context, name, title, **settings):
    """The sweep of `sweep_of`, once all its runs are finished, and their folder.

    Raises  Stopped
    """
    sweep, folder = sweep_of(context, name, **settings)
    sweep = sweep._replace(title=f"{title}: seed {sweep.seeds[0]}, {sweep.title}")
    finished = results_of(sweep, folder)
    left = [run for run in runs_of(sweep, folder) if (run.row.name, run.seed) not in finished]
    how = {"draw": runs.draw_classification, "diagnose": diagnose}
    after = partial(write_table, sweep, folder, figures.save_sweep)
    if not carry_out(left, after, device=context.device, progress=context.progress, **how):
        raise Stopped
    return sweep, folder


# ---- how sure it is


def standard_error(accuracies, images):
    """How sure accuracies are that were measured once on so many test images, as a sentence.

    Math    the standard error of a share p of n images: sqrt(p (1 - p) / n); that of the p nearest to 1/2 is told
    """
    error = max(math.sqrt(p * (1 - p) / images) for p in accuracies)
    return (
        f"Of one run on {images:,} test images an accuracy has a standard error of up to {100 * error:.1f} points, "
        "and another seed would change more: rows as near to each other as that are not told apart."
    )


def error_of_sweep(sweep, folder):
    """`standard_error` of the results of a sweep."""
    accuracies = [result["accuracy"] for result in results_of(sweep, folder).values()]
    return standard_error(accuracies, plan_of(folder)["test_pictures"])
