"""The figures and tables of the ViT paper, made again at a scale that a laptop bears.

`ENTRIES` lists them: which figure or table of the paper each mirrors, what differs from it, and the function that makes
it. That function takes a `Context`, writes its figures into the context's folder and returns what a page says of them.
What was made is remembered in the folder's index.json, so that nothing is made twice, and told by its index.md.

    model/           the run of the model that is analysed, where none is named: an ordinary run, see `minivit.training.trainer`
    NAME.png         the figure of an entry
    NAME/            the runs of an entry that trains, and its table
"""

from __future__ import annotations

import json
import math
import runpy
import shlex
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minivit import masked
from minivit.base.errors import InputError
from minivit.commands.cli import counted
from minivit.evaluation.inference import check_finite, load_with_data, on_device
from minivit.laboratory.trace import expected_flops
from minivit.layers.softmax import softmax_forward
from minivit.masked import TARGETS
from minivit.model import ViTConfig
from minivit.paper import analyses as analysis
from minivit.training.budget import time_of_epochs, within
from minivit.training.engine import available_cores
from minivit.training.recipes import CONFIGS, find_config, prepare, read_recipe, sizes_of, trainer_of
from minivit.training.sweep import (
    Row,
    Run,
    carry_out,
    going_on,
    read_sweep,
    result_of,
    results_of,
    runs_of,
    write_table,
)
from minivit.training.trainer import LAST, SUMMARY, config_from, quiet_overflow, write_json
from minivit.weights import checkpoint
from minivit.weights.checkpoint import write_atomically
from minivit.weights.layouts import file_of, is_readable, load_any

SCRIPTS = CONFIGS.parent / "scripts"
INDEX, PAGE, PLAN = "index.json", "index.md", "plan.json"
MODEL_WEIGHT = 4.0  # of the budget, for the model that several figures are of
PICTURES, SHEET = 128, 24  # test pictures whose attention is measured; and shown
QUICK = "Nano/4"  # the model of what trains several of them
LEAST = 5  # steps of a sweep's row
PROBE = 2.0  # seconds of each measurement of a sweep's rows
SPEED_BATCH, SPEED_TURNS = 256, 7  # pictures of a timed prediction; and how often it is timed
RESERVE = 0.05  # of a sweep's budget: for checkpoints, figures, and a machine that is slower later


class Stopped(Exception):
    """A training was stopped by a signal; the same command goes on with it."""


class Made(NamedTuple):
    """What an entry has made."""

    files: tuple[str, ...]  # the figures, in the context's folder
    caption: str  # what they show, with the figures that were measured
    table: str = ""  # Markdown


def length_of(epochs, steps):
    """How long a run was, in words; ``steps`` are 0 where it had whole epochs."""
    return counted(steps, "step") if steps else counted(epochs, "epoch")


class Entry(NamedTuple):
    """A figure or table of the paper."""

    name: str
    mirrors: str
    title: str
    differs: str  # from the paper's
    needs: str  # "nothing", "a model" or "training"
    seconds: float  # expected on two cores, beside training
    make: Callable[[Context], Made]
    missing: Callable[[], str] = lambda: ""  # why it cannot be made here, in words
    weight: float = 2.0  # of the budget, beside the others that train


class Context:
    """Where an entry finds its model and how much it may train.

    ``run``: a run's folder or a checkpoint, or None: a model is trained in the folder ``out``/model with the settings
    file ``config``, whose epochs are the most that it gets. ``budget`` are the seconds for all that is trained;
    they are the ``share`` of each entry unless another is set (see `shares_of`). ``device``: where all that is done.
    """

    def __init__(self, out, *, run=None, config="paper", data=None, data_dir=None, budget=300.0, suffix=".png",
                 device="cpu", progress=True):  # fmt: skip
        self.out, self.run, self.config, self.suffix = Path(out), run, config, suffix
        self.share = budget
        self.data = {key: value for key, value in (("data", data), ("data_dir", data_dir)) if value is not None}
        self.device, self.progress = device, progress

    def figure(self, name):
        """The path of a figure."""
        return self.out / f"{name}{self.suffix}"

    def checkpoint(self, *, train=True):
        """The path of the model's checkpoint, made by training if need be; without ``train`` None instead.

        Raises  InputError: there is none;  Stopped
        """
        if self.run is not None:
            path = Path(self.run)
            return path / LAST if path.is_dir() and not is_readable(path) else path
        folder = self.out / "model"
        recipe = read_recipe(find_config(self.config), data=self.data)
        run = Run(Row("model", {}, recipe), recipe.train.get("seed", 0), folder)
        if result_of(run, free=("epochs", "steps")) is None:  # there are as many as the budget held
            if not train:
                return None
            self._train(recipe, folder)
        return folder / LAST

    def _train(self, recipe, folder):
        """Train the model, or go on where its training stopped."""
        recipe = going_on(recipe._replace(train=recipe.train | {"device": self.device}), folder)
        begun = (folder / LAST).exists()
        if begun:
            length = config_from(checkpoint.load(folder / LAST)[1], folder / LAST)
        else:
            dataset, model, config, *_ = prepare(recipe)
            length, each = within(self.share, dataset, model, config)
            length = replace(length, epochs=min(length.epochs, config.epochs))
            told = length_of(length.epochs, length.steps)
            print(f"training a model: {told}, an epoch takes about {each:.3g} s, in {folder}", flush=True)
            planned(folder, {"budget": self.share})
        train = recipe.train | {"epochs": length.epochs, "steps": length.steps}
        trainer = trainer_of(recipe._replace(train=train), folder, progress=self.progress)
        if begun:
            trainer.restore()
        if trainer.run() is None:
            raise Stopped

    @cached_property
    def analysed(self):
        """On which data the model is analysed: {"name", "data_dir"}, the name that was given if its file says none."""
        _, meta, _ = load_any(self.checkpoint(), named=False)
        known = isinstance(meta.get("data"), dict)
        return {"name": None if known else self.data.get("data"), "data_dir": self.data.get("data_dir")}

    @cached_property
    def trained(self):
        """(ViT, Dataset): the model to analyse and the data set that it was trained on."""
        model, _, dataset = load_with_data(self.checkpoint(), **self.analysed)
        return on_device(model, self.device), dataset

    @property
    def says(self):
        """The model in words."""
        model, dataset = self.trained
        c = model.config
        text = f"{dataset.name}, patch {c.patch_size}, width {c.width}, {c.depth} blocks, {c.num_heads} heads"
        try:
            summary = json.loads((self.checkpoint().parent / SUMMARY).read_text(encoding="utf-8"))
            length = length_of(summary["epochs"], summary["settings"]["train"]["steps"])
            return f"{text}; test accuracy {summary['test_accuracy']:.1%} after {length}"
        except (OSError, ValueError, KeyError, TypeError):
            return text

    def drawn(self, count):
        """Rows of so many test pictures, evenly drawn: in folders they lie class by class."""
        _, dataset = self.trained
        return np.sort(np.random.default_rng(0).permutation(len(dataset.test_images))[:count])

    @cached_property
    def seen(self):
        """Test pictures, evenly drawn, their labels, and the `analysis.Seen` of the model."""
        model, dataset = self.trained
        chosen = self.drawn(SHEET)
        images = dataset.test_images[chosen]
        with quiet_overflow():
            seen = analysis.rollout_maps(model, images)
        check_finite(seen.logits, self.checkpoint())
        return images, dataset.test_labels[chosen], seen


# ---- what needs a model ----------------------------------------------------------------------------------------------


def make_filters(context):
    """Fig. 7, left."""
    from minivit.figures import paper_plots

    model, _ = context.trained
    c = model.config
    found = analysis.filters(model.params["patch_embed.proj.weight"], c.patch_size)
    path = context.figure("filters")
    paper_plots.save_filters(path, found, title=f"patch embedding: {context.says}")
    return Made(
        (path.name,),
        f"The first {len(found.shares)} principal components of the {c.width} filters, scaled each by itself, with "
        f"their share of the variance: together {found.shares.sum():.0%}.",
    )


def make_positions(context):
    """Fig. 7, centre."""
    from minivit.figures import paper_plots

    model, _ = context.trained
    similarity = analysis.position_similarity(analysis.position_embedding(model))
    g = model.config.grid_size
    near = np.mean([similarity[r, c, r, c + 1] for r in range(g) for c in range(g - 1)]) if g > 1 else 1.0
    path = context.figure("positions")
    paper_plots.save_positions(path, similarity, kind=model.config.pos_embed, title=context.says)
    return Made(
        (path.name,),
        "Each small map is the cosine similarity of one patch's position embedding to those of all patches. "
        f"Neighbours in a row: {near:.2f} on average; all pairs: {similarity.mean():.2f}.",
    )


def make_distance(context):
    """Fig. 7, right; Fig. 11."""
    from minivit.figures import paper_plots

    model, dataset = context.trained
    images = dataset.test_images[context.drawn(PICTURES)]
    with quiet_overflow():
        distances = analysis.head_distances(model, images)
    check_finite(distances, context.checkpoint())
    c = model.config
    path = context.figure("distance")
    paper_plots.save_distances(
        path, distances, image_size=c.image_size, grid=c.grid_size, pictures=len(images), title=context.says
    )
    first, last = distances[0], distances[-1]
    return Made(
        (path.name,),
        f"How far the heads look: from {first.min():.1f} to {first.max():.1f} pixels in the first block, from "
        f"{last.min():.1f} to {last.max():.1f} in the last.",
    )


def make_rollout(context):
    """Fig. 6 and 14."""
    from minivit.figures import paper_plots

    _, dataset = context.trained
    images, labels, seen = context.seen
    probabilities, _ = softmax_forward(np.asarray(seen.logits, np.float64))
    guesses = probabilities.argmax(axis=1)
    titles = [(f"{dataset.class_names[k]} {p[k]:.0%}", k == truth)
              for k, p, truth in zip(guesses, probabilities, labels, strict=True)]  # fmt: skip
    path = context.figure("rollout")
    paper_plots.save_rollouts(path, images, seen.maps[-1], titles, title=context.says)
    right = int((guesses == labels).sum())
    return Made(
        (path.name,),
        f"{len(images)} test pictures drawn at random, each beside itself in the light of its attention rollout: the "
        "patch that counts least is darkest, the one that counts most (so many times as much) is brightest. "
        f"{right} are classified correctly.",
    )


# ---- what needs nothing ----------------------------------------------------------------------------------------------

COST_MODELS, COST_SIZES = ("Ti/16", "S/16", "B/32", "B/16"), (64, 128, 192, 256)


def make_cost(context):
    """Fig. 12."""
    from minivit.figures import paper_plots

    models = {name: ViTConfig.preset(name) for name in COST_MODELS}
    points = analysis.cost(models, COST_SIZES, progress=context.progress)
    path = context.figure("cost")
    paper_plots.save_cost(path, points, title=f"{available_cores()} cores, float32")
    write_json(context.out / "cost.json", points)
    lines = ["| model | pixels | tokens | predictions/s | training pictures/s | peak memory of each, MiB |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for infer, step in zip(points[::2], points[1::2], strict=True):
        memory = ", ".join(f"{p['peak_memory'] / 2**20:,.0f}" if p["peak_memory"] else "?" for p in (infer, step))
        lines.append(
            f"| {infer['model']} | {infer['size']} | {infer['tokens']} | {infer['images_per_second']:.3g} | "
            f"{step['images_per_second']:.3g} | {memory} |"
        )
    batch = points[0]["batch"]
    caption = f"Pictures per second on {available_cores()} cores, and peak memory, in batches of {batch}, float32."
    return Made((path.name,), caption, "\n".join(lines))


# ---- what trains -----------------------------------------------------------------------------------------------------


def share_within(times, asked, budget):
    """The share of each row's epochs at which all rows of a sweep together fit into a time; at most 1.

    ``times``: for each row a function, the seconds of so many epochs (`budget.time_of_epochs`); ``asked``: the epochs
    of each row's settings
    """

    def seconds(share):
        return sum(time_of(share * n) for time_of, n in zip(times, asked, strict=True))

    low, high = 0.0, 1.0
    if seconds(high) <= budget:
        return high
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if seconds(middle) <= budget else (low, middle)
    return low


def plan_of(context, folder, made_of):
    """What plan.json says of the runs in a folder; {} where there is none yet.

    Raises  InputError: they are of other settings, or of another share of the budget.
    """
    plan = read_json(folder / PLAN)
    if plan and (plan.get("budget"), plan.get("of")) != (context.share, made_of):
        raise InputError(
            f"{folder} holds runs of other settings, or cut for another budget ({plan.get('budget', 0):g} s, not "
            f"{context.share:g} s); choose another --out"
        )
    return plan


def planned(folder, plan):
    """Write plan.json; returns the plan."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / PLAN, plan)
    return plan


def sure_of(accuracies, pictures):
    """How sure accuracies are that were measured once on so many test pictures, as a sentence.

    Math    the standard error of a share p of n pictures: sqrt(p (1 - p) / n); that of the p nearest to 1/2 is told
    """
    error = max(math.sqrt(p * (1 - p) / pictures) for p in accuracies)
    return (
        f"Of one run on {pictures:,} test pictures an accuracy has a standard error of up to {100 * error:.1f} points, "
        "and another seed would change more: rows as near to each other as that are not told apart."
    )


def sweep_of(context, name, *, share=1.0, start=None, model=None):
    """The sweep minivit/configs/sweeps/NAME.toml with one seed, cut to the budget, and the folder of its runs.

    All rows get the same share of their epochs, as whole steps. ``share``: of the context's share of the budget. Rows
    that begin with a checkpoint begin with ``start``; ``model`` are other settings of all models.
    How many steps fit is measured once and remembered: a sweep that was stopped goes on with the same.
    Raises  InputError: the budget is too small, or the folder holds the sweep as it was cut for another budget.
    """
    sweep = read_sweep(CONFIGS / "sweeps" / f"{name}.toml")

    def here(recipe):
        begins = recipe.start | {"checkpoint": str(start)} if recipe.start else recipe.start
        return recipe._replace(data=recipe.data | context.data, model=recipe.model | (model or {}), start=begins)

    def told(changes):
        return {key: value for key, value in changes.items() if key != "checkpoint"}  # of the file, not of `here`

    rows = [row._replace(recipe=here(row.recipe), changes=told(row.changes)) for row in sweep.rows]
    sweep = sweep._replace(seeds=sweep.seeds[:1], rows=tuple(rows))
    folder = context.out / name
    made_of = fingerprint_of([row._asdict() for row in sweep.rows])
    plan = plan_of(context, folder, made_of)
    if not plan:
        place = {"device": context.device}
        prepared = [prepare(row.recipe._replace(train=row.recipe.train | place))[:3] for row in sweep.rows]
        print(f"{name}: measuring {len(prepared)} settings", flush=True)
        times = [time_of_epochs(*each, probe=PROBE) for each in prepared]
        asked, seconds = [config.epochs for *_, config in prepared], (1 - RESERVE) * share * context.share
        cut = share_within(times, asked, seconds)
        steps = {}
        for row, (dataset, _, config), epochs in zip(rows, prepared, asked, strict=True):
            group = config.batch_size * config.accumulate
            steps[row.name] = int(cut * epochs * -(-len(dataset.train_images) // group))
        if min(steps.values()) < LEAST:
            raise InputError(
                f"{name}: {seconds:.0f} s hold {min(steps.values())} steps of each of its {len(rows)} settings on this "
                f"machine, too few to compare; give a larger --budget"
            )
        tests = len(prepared[0][0].test_labels)
        plan = planned(
            folder, {"budget": context.share, "of": made_of, "steps": steps, "share": cut, "test_pictures": tests}
        )

    def shorter(row):
        train = {key: value for key, value in row.recipe.train.items() if key != "epochs"}
        return row._replace(recipe=row.recipe._replace(train=train | {"steps": plan["steps"][row.name]}))

    steps = sorted(set(plan["steps"].values()))
    says = " to ".join(f"{n:,}" for n in dict.fromkeys((steps[0], steps[-1])))
    says += f" steps ({plan['share']:.0%})"
    return sweep._replace(title=says, rows=tuple(map(shorter, sweep.rows))), folder


def carried_out(context, name, title, **settings):
    """The sweep of `sweep_of`, once all its runs are finished, and their folder.

    Raises  Stopped
    """
    sweep, folder = sweep_of(context, name, **settings)
    sweep = sweep._replace(title=f"{title}: seed {sweep.seeds[0]}, {sweep.title}")
    finished = results_of(sweep, folder)
    left = [run for run in runs_of(sweep, folder) if (run.row.name, run.seed) not in finished]
    after = lambda: write_table(sweep, folder)  # noqa: E731
    if not carry_out(left, after, device=context.device, progress=context.progress):
        raise Stopped
    return sweep, folder


def sure_of_sweep(sweep, folder):
    """`sure_of` the results of a sweep."""
    accuracies = [result["accuracy"] for result in results_of(sweep, folder).values()]
    return sure_of(accuracies, read_json(folder / PLAN)["test_pictures"])


def make_sweep(context, name, title, **settings):
    """A sweep of minivit/configs/sweeps, its table and its figure."""
    from minivit.figures import plots

    sweep, folder = carried_out(context, name, title, **settings)
    text = write_table(sweep, folder)
    path = context.figure(name)
    plots.save_sweep(path, read_json(folder / "table.json"))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return Made(
        (path.name,),
        f"{sweep.title} of minivit/configs/sweeps/{name}.toml: accuracy of the test pictures after the last one. "
        + sure_of_sweep(sweep, folder),
        "\n".join(lines),
    )


def make_fine_tuning(context):
    """Section 3.2: a model of some of the classes learns the others, at two sizes of the pictures."""
    sweep, folder = carried_out(context, "pretraining", "Pre-training", share=0.4, model=sizes_of(QUICK))
    (first,) = runs_of(sweep, folder)
    before = result_of(first)
    if "diverged" in before:
        raise InputError(f"{first.folder} diverged at step {before['diverged']}: there is no model to begin with")
    begin = {"start": first.folder / LAST, "model": sizes_of(QUICK)}
    made = make_sweep(context, "finetuning", "Five other classes", share=0.6, **begin)
    said = (
        f"The model of the first five classes of {first.row.recipe.data['data']} had {before['accuracy']:.1%} after "
        f"{counted(before['epochs'], 'epoch')}."
    )
    return made._replace(caption=f"{made.caption} {said}")


# How the runs of `make_self_supervision` learn with labels, but for the one that takes the recipe as it is.
PLAIN = (
    "--init", "official", "--no-whiten", "--half-size", 0, "--optimizer", "adamw", "--lr", 1e-3,
    "--schedule", "cosine", "--warmup-epochs", 1,
)  # fmt: skip


WHOLE = "in whole epochs or, where not one fits, in whole steps"  # what --budget gives


def runs_in(context, folder):
    """A function that makes the runs of an entry: ``train(name, seconds, *flags, script)`` returns a run's summary.

    What is finished is left alone, what stopped goes on. Raises  InputError: see `plan_of`;  Stopped
    """
    shared = [word for key, value in context.data.items() for word in ("--" + key.replace("_", "-"), value)]
    shared += ["--preset", QUICK]
    made_of = fingerprint_of([shared, PLAIN])
    if not plan_of(context, folder, made_of):
        planned(folder, {"budget": context.share, "of": made_of})
    shared += ["--device", context.device, *([] if context.progress else ["--quiet"])]

    def train(name, seconds, *flags, script="train.py"):
        run = folder / name
        if not read_json(run / SUMMARY):
            begun = (run / LAST).exists()
            rest = ["--resume", "--device", context.device]
            rest = rest if begun else [*flags, *shared, "--budget", f"{seconds:g}s"]
            call_script(script, *rest, "--out", run)
        return read_json(run / SUMMARY)

    return train


def save_summaries(path, title, found):
    """The figure of a few runs' test accuracies; ``found``: {name: summary}, the first to be compared with."""
    from minivit.figures import plots

    accuracies = {name: said["test_accuracy"] for name, said in found.items()}
    first = next(iter(accuracies.values()))
    rows = [
        {"name": name, "mean": p, "runs": {"0": {"accuracy": p}}, "gain": p - first if number else None}
        for number, (name, p) in enumerate(accuracies.items())
    ]
    plots.save_sweep(path, {"title": title, "rows": rows})
    return sure_of(accuracies.values(), next(iter(found.values()))["test_images"])


def make_self_supervision(context):
    """Section 4.6: a time spent with labels alone, or half of it without."""
    folder, whole = context.out / "selfsupervision", context.share / 4
    train, labels = runs_in(context, folder), ["--config", "cifar10"]
    found = {"labels, as fine-tuned": train("plain", whole, *labels, *PLAIN)}
    for method, name in (("mpp", "masked patches, then labels"), ("mae", "masked autoencoder, then labels")):
        train(f"{method}-before", whole / 2, "--method", method, script="pretrain.py")
        begin = ["--from", folder / f"{method}-before" / LAST]
        found[name] = train(method, whole / 2, *labels, *PLAIN, *begin)
    found["labels, minivit/configs/cifar10.toml"] = train("recipe", whole, *labels)
    path, title = context.figure("selfsupervision"), f"{whole:.0f} s of training each"
    sure = save_summaries(path, f"Pre-training without labels: {title}, seed 0", found)
    lines = ["| | test accuracy | steps with labels | seconds with labels |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {said['test_accuracy']:.2%} | {said['steps']:,} | {said['train_seconds']:.0f} |"
        for name, said in found.items()
    ]
    caption = (
        f"At most {title}, {WHOLE}, all of it with labels, or half of it guessing masked patches: accuracy of "
        "the test pictures after the last epoch. The fine-tuning takes the settings of the first row, the last row "
        f"those of the recipe. {sure}"
    )
    return Made((path.name,), caption, "\n".join(lines))


def make_targets(context):
    """Appendix B.1.2: what masked patch prediction is to predict."""
    folder, each = context.out / "targets", context.share / (2 * len(TARGETS["mpp"]))
    train, before, found = runs_in(context, folder), {}, {}
    for target in TARGETS["mpp"]:
        asked = ["--method", "mpp", "--target", target]
        before[target] = train(f"{target}-before", each, *asked, script="pretrain.py")
        begin = ["--from", folder / f"{target}-before" / LAST]
        found[target] = train(target, each, "--config", "cifar10", *PLAIN, *begin)
    path, title = context.figure("targets"), f"{each:.0f} s without and as many with labels"
    sure = save_summaries(path, f"Targets of masked patch prediction: {title}, seed 0", found)
    lines = ["| target | what of it was right, or explained | without looking | steps | test accuracy | steps |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    lines += [
        f"| {target} | {said['test_accuracy']:.1%} | {said['chance_accuracy']:.1%} | {said['steps']:,} | "
        f"{found[target]['test_accuracy']:.2%} | {found[target]['steps']:,} |"
        for target, said in before.items()
    ]
    caption = (
        f"At most {title}, {WHOLE}: accuracy of the test pictures after fine-tuning a model that had guessed "
        "of masked patches their mean colours (3 bits of each channel), those of their 4 x 4 downsized version, or all "
        f"of their pixels, by regression. {sure}"
    )
    return Made((path.name,), caption, "\n".join(lines))


def data_of(sweep):
    """The name of a sweep's data set."""
    return sweep.rows[0].recipe.data["data"]


def points_of(sweep, folder):
    """The finished runs of a sweep for a figure of compute: [(ViTConfig, {"accuracy", "training_flops", ...})]."""
    results, points = results_of(sweep, folder), []
    for run in runs_of(sweep, folder):
        _, c, config, _ = prepare(run.row.recipe)
        step = sum(expected_flops(c, config.batch_size * config.accumulate))
        point = {
            "accuracy": results[run.row.name, run.seed]["accuracy"], "training_flops": config.steps * step,
            "prediction_flops": expected_flops(c, 1).forward,
        }  # fmt: skip
        points.append((c, point))
    return points


def make_hybrid(context):
    """Fig. 5: accuracy against the work of training, with and without a ResNet before the patches."""
    from minivit.figures import paper_plots

    sweep, folder = carried_out(context, "paper-hybrid", "ViTs and hybrids")
    kinds = {"": "ViT", "root": "hybrid: root", "1": "hybrid: root and a unit"}
    points = [
        {"kind": kinds[c.stem], "width": c.width, "tokens": c.num_tokens} | point
        for c, point in points_of(sweep, folder)
    ]
    path = context.figure("paper-hybrid")
    paper_plots.save_compute(path, points, title=f"{data_of(sweep)}: {sweep.title}")
    lines = [
        "| | width | tokens | test accuracy | training, TFLOP | a prediction, MFLOP |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {p['kind']} | {p['width']} | {p['tokens']} | {p['accuracy']:.2%} | {1e-12 * p['training_flops']:.3g} | "
        f"{1e-6 * p['prediction_flops']:.3g} |"
        for p in points
    ]
    caption = (
        f"{sweep.title} of minivit/configs/sweeps/paper-hybrid.toml: accuracy of the test pictures after the last one, against "
        "the work of the training's matrix products and convolutions, forward and backward; beside each stands the "
        f"width of its tokens. {sure_of_sweep(sweep, folder)}"
    )
    return Made((path.name,), caption, "\n".join(lines))


def make_axial(context):
    """Fig. 13: accuracy against the work of training, and against the speed of predictions."""
    from minivit.figures import paper_plots

    sweep, folder = carried_out(context, "paper-axial", "Full and axial attention")
    points = [
        {"attention": c.attention, "blocks": c.depth, "patch": c.patch_size, **point, "batch": SPEED_BATCH}
        | analysis.speed(c, "infer", SPEED_BATCH, SPEED_TURNS)
        for c, point in points_of(sweep, folder)
    ]
    path = context.figure("paper-axial")
    paper_plots.save_axial(path, points, title=f"{data_of(sweep)}: {sweep.title}")
    write_json(context.out / "paper-axial.json", points)
    lines = ["| attention | blocks | patch | test accuracy | training, TFLOP | a prediction, MFLOP | predictions/s |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    lines += [
        f"| {p['attention']} | {p['blocks']} | {p['patch']} | {p['accuracy']:.2%} | "
        f"{1e-12 * p['training_flops']:.3g} | {1e-6 * p['prediction_flops']:.3g} | {p['images_per_second']:,.0f} |"
        for p in points
    ]
    caption = (
        f"{sweep.title} of minivit/configs/sweeps/paper-axial.toml: accuracy of the test pictures after the last one, against "
        "the work of the training's matrix products, forward and backward, and against predictions per second on "
        f"{available_cores()} cores, float32, in batches of {SPEED_BATCH}. An axial block looks along rows or along "
        "columns: twice as many blocks, as the paper's Axial-ViT has, look along both as often as a full one does. "
        f"{sure_of_sweep(sweep, folder)}"
    )
    return Made((path.name,), caption, "\n".join(lines))


def make_few_shot(context):
    """Fig. 4, by minivit transfer."""
    folder = context.out / "fewshot"
    name, data_dir = context.analysed.values()
    data = [*(["--data", name] if name else []), *(["--data-dir", data_dir] if data_dir else [])]
    where = ["--device", context.device, "--out", folder]
    call_script("transfer.py", context.checkpoint(), "--untrained", "--pixels", *data, *where)
    _, dataset = context.trained
    return Made(
        (f"fewshot/transfer-fewshot-{dataset.name}.png",),
        "Regularised least squares on frozen features from a few examples of each class, three draws of them: of the "
        "trained model, of the same one untrained, and of the pixels themselves.",
    )


def make_masked(context):
    """Section 4.6, by minivit pretrain."""
    run = context.out / "masked"
    asked = ["--method", "mpp", "--device", context.device, "--out", run]
    asked += [] if context.progress else ["--quiet"]
    for key, value in context.data.items():
        asked += ["--" + key.replace("_", "-"), value]
    made_of = fingerprint_of(context.data)
    if not plan_of(context, run, made_of):
        planned(run, {"budget": context.share, "of": made_of})
    asked += ["--resume"] if (run / LAST).exists() else ["--budget", f"{context.share:g}s"]
    call_script("pretrain.py", *asked)
    said = read_json(run / SUMMARY)
    data, colours = said["settings"]["data"]["data"], masked.LEVELS ** said["settings"]["model"]["channels"]
    return Made(
        ("masked/reconstructions.png",),
        f"Test pictures of {data}, what the model sees of them, and the mean colours that it guesses under the masks: "
        f"{said['test_accuracy']:.1%} are right, of {colours} colours, after {counted(said['epochs'], 'epoch')}; "
        f"without looking {said['chance_accuracy']:.1%}.",
    )


def call_script(name, *arguments):
    """Run the ``main`` of one of the scripts in this process.

    Raises  InputError: what it raises, or that it ended with another status than 0;  Stopped
    """
    status = runpy.run_path(str(SCRIPTS / name))["main"]([str(argument) for argument in arguments])
    if status == 130:
        raise Stopped
    if status:
        raise InputError(f"scripts/{name} ended with status {status}")


# ---- the list --------------------------------------------------------------------------------------------------------


def without_file(path):
    """Why an entry that needs a file of the project cannot be made; empty if it can."""
    return lambda: "" if path.exists() else f"this version has no {path.relative_to(CONFIGS.parent)}"


def sweep_entry(name, mirrors, title, differs):
    """The entry of a sweep in minivit/configs/sweeps."""
    return Entry(name, mirrors, title, differs, "training", 0, lambda context: make_sweep(context, name, title),
                 without_file(CONFIGS / "sweeps" / f"{name}.toml"))  # fmt: skip


SMALL = "a small model of small pictures; the paper's are large ones, pre-trained on millions of pictures"
SCRATCH = (
    "trained from nothing on small pictures for a few epochs, one seed; the paper tests few-shot after pre-training"
)
ENTRIES = (
    Entry("filters", "Fig. 7, left", "Filters of the patch embedding", SMALL + "; RGB, 28 components as there",
          "a model", 2, make_filters),
    Entry("positions", "Fig. 7, centre; Fig. 10", "Similarity of position embeddings", SMALL, "a model", 2,
          make_positions),
    Entry("distance", "Fig. 7, right; Fig. 11", "Mean attention distance",
          SMALL + f"; {PICTURES} pictures as there; attention to the class token is left out", "a model", 10,
          make_distance),
    Entry("rollout", "Fig. 6, Fig. 14", "Attention from the output to the picture",
          SMALL + "; a map's light runs from its least to its largest value", "a model", 5, make_rollout),
    Entry("cost", "Fig. 12", "Speed and memory by size of model and picture",
          "this machine's processor, where the paper has a TPU core; peak memory, where the paper has the largest "
          "batch that fits: micro-batches keep ours from growing with the batch", "nothing", 150, make_cost),
    Entry("fewshot", "Fig. 4", "Few-shot accuracy of frozen features",
          SMALL + "; against examples of each class, where the paper varies the size of the pre-training set; and the "
          "model was trained with all labels of the very same data, which is no transfer",
          "a model", 60, make_few_shot, without_file(SCRIPTS / "transfer.py")),
    Entry("masked", "Section 4.6", "Masked patch prediction",
          "pre-trained on small pictures within the budget, where the paper has B/16 and JFT", "training", 0,
          make_masked, without_file(SCRIPTS / "pretrain.py"), 3.0),
    Entry("selfsupervision", "Section 4.6", "Pre-training without labels, then fine-tuning",
          "pre-trained and fine-tuned on the same small pictures within the budget; the paper has JFT and ImageNet",
          "training", 0, make_self_supervision, without_file(SCRIPTS / "pretrain.py"), 6.0),
    Entry("targets", "Appendix B.1.2", "What masked patch prediction predicts",
          "pre-trained and fine-tuned on the same small pictures within the budget; the paper has JFT, and compares "
          "few-shot accuracies", "training", 0, make_targets, without_file(SCRIPTS / "pretrain.py"), 5.0),
    Entry("finetuning", "Section 3.2, B.1.1", "Fine-tuning, also at a higher resolution",
          "from five classes of small pictures to the other five, as they are and at 48 pixels; the paper goes "
          "from 224 to 384",
          "training", 0, make_fine_tuning, without_file(CONFIGS / "sweeps" / "finetuning.toml")),
    Entry("paper-hybrid", "Fig. 5, Section 3.1", "ViTs and hybrids by compute",
          SCRATCH + "; stems of the root, or of it and one unit, with 16 channels, where the paper has a ResNet-50; "
          "the paper has ResNets alone too", "training", 0, make_hybrid,
          without_file(CONFIGS / "sweeps" / "paper-hybrid.toml")),
    sweep_entry("paper-datasize", "Fig. 3, Fig. 4", "Size of the training set",
                "trained from nothing on shares of one small data set, for as many steps each, one seed; the paper "
                "pre-trains on up to 300 million pictures, and tunes the regularisation of the smaller sets"),
    sweep_entry("paper-head", "Section 3.1, D.3", "Head with and without a hidden layer",
                SCRATCH + "; the paper has the hidden layer in pre-training alone, and no table of it"),
    sweep_entry("paper-optimizer", "Table 7", "SGD and Adam",
                "a ViT " + SCRATCH + "; the paper compares them for ResNets"),
    sweep_entry("paper-shape", "Fig. 8", "Depth, width, MLP and patch size", SCRATCH),
    sweep_entry("paper-pooling", "Fig. 9", "Class token or mean, by learning rate", SCRATCH),
    sweep_entry("paper-table8", "Table 8", "Position embeddings", SCRATCH),
    Entry("paper-axial", "Fig. 13", "Axial attention: accuracy, compute and speed",
          SCRATCH + ", on a TPU core where this is a processor, and has an AxialResNet too; the mean is classified in "
          "place of a class token; grids of 4 x 4 and 8 x 8 patches leave axial attention little to save",
          "training", 0, make_axial, without_file(CONFIGS / "sweeps" / "paper-axial.toml")),
)  # fmt: skip

ABSENT = (
    "Accuracies of pre-training on ImageNet, ImageNet-21k and JFT (Tables 2, 5 and 6; Fig. 3 to 5 at their scale): the "
    "settings of Tables 3 and 4 are in minivit/configs/paper-*.toml, the data and the machines are not here",
    "VTAB (Fig. 2, Table 9): `minivit vtab` has its protocol and its 19 tasks, whose pictures are to be supplied",
    "ImageNet-ReaL (Table 2): `minivit evaluate --real` has its metric; ObjectNet (D.9) has no code of its own",
    "ResNets by themselves (Fig. 3 to 5, Table 6) and the AxialResNet (Fig. 13): a ResNet is here only the stem of a "
    "hybrid",
    "The axes of Fig. 12 that a TPU gives: the largest batch that fits, speeds of one core",
)


def entry_of(name):
    """The entry of a name.

    Raises  InputError: there is none; the message lists them.
    """
    for entry in ENTRIES:
        if entry.name == name:
            return entry
    raise InputError(f"no figure {name!r}; there are {', '.join(entry.name for entry in ENTRIES)}")


# ---- making them -----------------------------------------------------------------------------------------------------


def read_json(path):
    """The content of a JSON file that holds a dict; {} if it is missing or damaged."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def fingerprint_of(content):
    """A number that tells whether two things that JSON can hold are the same."""
    return zlib.crc32(json.dumps(content, sort_keys=True, default=str).encode())


def made_from(entry, context):
    """What an entry's figure depends on, for JSON: where it is the same, nothing is to be made again."""
    content: dict[str, Any] = {"suffix": context.suffix}
    if entry.needs == "a model" and (path := context.checkpoint(train=False)) is not None:
        if (path := file_of(path)).is_file():
            content["checkpoint"] = zlib.crc32(path.read_bytes())
    if entry.needs == "training":
        content |= {"budget": context.share, "data": context.data}
    return content


def shares_of(entries, context):
    """The seconds for each of the entries, by name: the context's, by weight, but for those that train nothing.

    What is made already has its share like the others: the same command, given again, shares out as it did before.
    """
    weights = {entry.name: entry.weight for entry in entries if entry.needs == "training"}
    models = [entry.name for entry in entries if entry.needs == "a model" and context.run is None]
    whole = sum(weights.values()) + MODEL_WEIGHT * bool(models)
    weights |= dict.fromkeys(models, MODEL_WEIGHT)  # of one and the same model
    # four digits: what --budget says when an entry is made again alone
    return {name: float(f"{context.share * weight / whole:.4g}") for name, weight in weights.items()}


def budget_of(entry, context):
    """The --budget with which an entry alone is made as it was, in seconds; None if it trains nothing."""
    if entry.needs == "training":
        return context.share
    if entry.needs == "a model" and context.run is None:
        return read_json(context.out / "model" / PLAN).get("budget", context.share)
    return None


def is_made(entry, context, *, any_budget=False):
    """Is the figure in the folder already, and made from the same, perhaps but for the budget?"""
    known, wanted = read_json(context.out / INDEX).get(entry.name), made_from(entry, context)
    if not isinstance(known, dict) or not isinstance(before := known.get("from"), dict):
        return False
    if any_budget and "budget" in before:
        wanted["budget"] = before["budget"]
    if before != wanted:
        return False
    return all((context.out / name).is_file() for name in known.get("files", ["?"]))


def make(entry, context, command):
    """Make an entry's figures and write the page anew.

    ``command``: what a reader types to do it again, without its --budget.

    Raises  InputError: it cannot be made;  Stopped
    """
    if reason := entry.missing():
        raise InputError(f"{entry.name} cannot be made: {reason}")
    context.out.mkdir(parents=True, exist_ok=True)
    started_at = time.monotonic()
    made = entry.make(context)
    budget = budget_of(entry, context)
    add_to_page(context, entry.name, made._asdict() | {
        "from": made_from(entry, context),
        "command": shlex.join([*command, *([] if budget is None else ["--budget", f"{budget:.10g}s"])]),
        "seconds": time.monotonic() - started_at,
        "model": context.says if entry.needs == "a model" else "",
    })  # fmt: skip
    return made


def add_to_page(context, name, content):
    """Remember an entry, or the note (see `page_of`), in index.json, and write the page anew."""
    context.out.mkdir(parents=True, exist_ok=True)
    index = read_json(context.out / INDEX) | {name: content}
    write_json(context.out / INDEX, index)
    text = page_of(index)
    write_atomically(context.out / PAGE, lambda file: file.write(text.encode(errors="backslashreplace")))


def page_of(index):
    """The Markdown page of all figures that were made, from the content of index.json.

    What stands there under "note" is a paragraph at its head: of the data, say, what the program cannot know.
    """
    lines = [
        "# The figures of the ViT paper, made again",
        "",
        "After Dosovitskiy et al. 2020, [arXiv:2010.11929](https://arxiv.org/abs/2010.11929), by `minivit paper`.",
        "Its `--all --budget TIME` makes all of them and shares the time out; the command below a figure makes that",
        "one alone, with the time that it had. One seed and little training each: means are shown, not ends.",
    ]
    if isinstance(note := index.get("note"), str):
        lines += ["", note]
    for entry in ENTRIES:
        known = index.get(entry.name)
        if not isinstance(known, dict) or not known.keys() >= {*Made._fields, "command", "model"}:
            continue
        lines += ["", f"## {entry.title} ({entry.mirrors})", ""]
        lines += [f"![{entry.title}]({name})" for name in known["files"]]
        lines += ["", f"*{known['caption']}*", ""]
        lines += [f"What differs from the paper: {entry.differs}.", ""]
        if known["model"]:
            lines += [f"Model: {known['model']}.", ""]
        lines += ["```bash", known["command"], "```"]
        if known["table"]:
            lines += ["", known["table"]]
    lines += ["", "## What of the paper has no figure here", "", *(f"- {each}" for each in ABSENT)]
    return "\n".join(lines) + "\n"
