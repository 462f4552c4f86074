"""The paper's figures of trainings side by side: sweeps, pre-training without labels, compute."""

from __future__ import annotations

from minivit import figures
from minivit.base.errors import InputError
from minivit.base.files import read_object, write_json
from minivit.base.words import counted
from minivit.masked import LEVELS, TARGETS
from minivit.model.costs import expected_flops
from minivit.paper.context import Result
from minivit.paper.trainings import (
    claim,
    error_of_sweep,
    finished_sweep,
    masked_recipe,
    run_of,
    standard_error,
)
from minivit.training.engines.cut import available_cores
from minivit.training.folder import LAST
from minivit.training.recipes import find_config, prepare, read_recipe, sizes_of
from minivit.training.sweep import result_of, results_of, runs_of, write_table

QUICK = "Nano/4"  # the model of what trains several of them
SPEED_BATCH, SPEED_TURNS = 256, 7  # images of a timed prediction; and how often it is timed
WHOLE = "in whole epochs or, where not one fits, in whole steps"  # how long runs are that a time is given
PLAIN = {  # how fine-tuning learns, and what it is compared with
    "init": "official", "whiten": False, "half_size": 0.0, "optimizer": "adamw", "lr": 1e-3, "schedule": "cosine",
    "warmup_epochs": 1.0,
}  # fmt: skip


# ---- sweeps


def make_sweep(context, name, title, **settings):
    """A sweep of minivit/configs/sweeps, its table and its figure."""
    sweep, folder = finished_sweep(context, name, title, **settings)
    text = write_table(sweep, folder, figures.save_sweep)
    path = context.figure(name)
    figures.save_sweep(path, read_object(folder / "table.json"))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    caption = f"{sweep_words(sweep, name)}. {error_of_sweep(sweep, folder)}"
    return Result((path.name,), caption, "\n".join(lines))


def sweep_words(sweep, name):
    """What the accuracies of a sweep are, as a sentence without its full stop."""
    return f"{sweep.title} of minivit/configs/sweeps/{name}.toml: accuracy of the test images after the last one"


def make_fine_tuning(context):
    """Section 3.2: a model of some of the classes learns the others, at two sizes of the images."""
    sweep, folder = finished_sweep(context, "pretraining", "Pre-training", share=0.4, model=sizes_of(QUICK))
    (first,) = runs_of(sweep, folder)
    before = result_of(first)
    if "diverged" in before:
        raise InputError(f"{first.folder} diverged at step {before['diverged']}: there is no model to begin with")
    begin = {"start": first.folder / LAST, "model": sizes_of(QUICK)}
    result = make_sweep(context, "finetuning", "Five other classes", share=0.6, **begin)
    sentence = (
        f"The model of the first five classes of {first.row.recipe.data['data']} had {before['accuracy']:.1%} after "
        f"{counted(before['epochs'], 'epoch')}."
    )
    return result._replace(caption=f"{result.caption} {sentence}")


# ---- pre-training without labels


def make_masked(context):
    """Section 4.6: one run of masked patch prediction."""
    folder = context.out / "masked"
    claim(context, folder, context.data)
    recipe, masked = masked_recipe("mpp", context.data)
    summary = run_of(context, folder, recipe, context.share, masked=masked)
    data, channels = summary["settings"]["data"]["data"], summary["settings"]["model"]["channels"]
    return Result(
        ("masked/reconstructions.png",),
        f"Test images of {data}, what the model sees of them, and the mean colours that it guesses under the masks: "
        f"{summary['test_accuracy']:.1%} are right, of {LEVELS**channels} colours, after "
        f"{counted(summary['epochs'], 'epoch')}; without looking {summary['chance_accuracy']:.1%}.",
    )


class _Comparison:
    """Runs of the same small model, with and without labels, each in its folder and within its time."""

    def __init__(self, context, folder):
        self.context, self.folder = context, folder
        claim(context, folder, [context.data, QUICK, PLAIN])

    def masked(self, name, seconds, method, *, target=None):
        """The summary of a run without labels."""
        recipe, masked = masked_recipe(method, self.context.data, target=target, preset=QUICK)
        return run_of(self.context, self.folder / name, recipe, seconds, masked=masked)

    def labelled(self, name, seconds, *, train=PLAIN, after=None):
        """The summary of a run with labels; ``after``: the name of the run whose model it begins with."""
        start = {"checkpoint": str(self.folder / after / LAST)} if after else {}
        file, data = find_config("cifar10"), self.context.data
        recipe = read_recipe(file, data=data, preset=QUICK, train=train, start=start)
        return run_of(self.context, self.folder / name, recipe, seconds)


def save_summaries(path, title, summaries):
    """The figure of a few runs' test accuracies, {name: summary}, the first to be compared with; `standard_error`."""
    accuracies = {name: summary["test_accuracy"] for name, summary in summaries.items()}
    first = next(iter(accuracies.values()))
    rows = [
        {"name": name, "mean": p, "runs": {"0": {"accuracy": p}}, "gain": p - first if number else None}
        for number, (name, p) in enumerate(accuracies.items())
    ]
    figures.save_sweep(path, {"title": title, "rows": rows})
    return standard_error(accuracies.values(), next(iter(summaries.values()))["test_images"])


def make_self_supervision(context):
    """Section 4.6: a time spent with labels alone, or half of it without."""
    runs, whole = _Comparison(context, context.out / "selfsupervision"), context.share / 4
    summaries = {"labels, as fine-tuned": runs.labelled("plain", whole)}
    for method, name in (("mpp", "masked patches, then labels"), ("mae", "masked autoencoder, then labels")):
        runs.masked(f"{method}-before", whole / 2, method)
        summaries[name] = runs.labelled(method, whole / 2, after=f"{method}-before")
    summaries["labels, minivit/configs/cifar10.toml"] = runs.labelled("recipe", whole, train={})
    path, title = context.figure("selfsupervision"), f"{whole:.0f} s of training each"
    sure = save_summaries(path, f"Pre-training without labels: {title}, seed 0", summaries)
    lines = ["| | test accuracy | steps with labels | seconds with labels |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {each['test_accuracy']:.2%} | {each['steps']:,} | {each['train_seconds']:.0f} |"
        for name, each in summaries.items()
    ]
    caption = (
        f"At most {title}, {WHOLE}, all of it with labels, or half of it guessing masked patches: accuracy of "
        "the test images after the last epoch. The fine-tuning takes the settings of the first row, the last row "
        f"those of the recipe. {sure}"
    )
    return Result((path.name,), caption, "\n".join(lines))


def make_targets(context):
    """Appendix B.1.2: what masked patch prediction is to predict."""
    runs, seconds = _Comparison(context, context.out / "targets"), context.share / (2 * len(TARGETS["mpp"]))
    before, summaries = {}, {}
    for target in TARGETS["mpp"]:
        before[target] = runs.masked(f"{target}-before", seconds, "mpp", target=target)
        summaries[target] = runs.labelled(target, seconds, after=f"{target}-before")
    path, title = context.figure("targets"), f"{seconds:.0f} s without and as many with labels"
    sure = save_summaries(path, f"Targets of masked patch prediction: {title}, seed 0", summaries)
    lines = ["| target | what of it was right, or explained | without looking | steps | test accuracy | steps |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    lines += [
        f"| {target} | {each['test_accuracy']:.1%} | {each['chance_accuracy']:.1%} | {each['steps']:,} | "
        f"{summaries[target]['test_accuracy']:.2%} | {summaries[target]['steps']:,} |"
        for target, each in before.items()
    ]
    caption = (
        f"At most {title}, {WHOLE}: accuracy of the test images after fine-tuning a model that had guessed "
        "of masked patches their mean colours (3 bits of each channel), those of their 4 x 4 downsized version, or all "
        f"of their pixels, by regression. {sure}"
    )
    return Result((path.name,), caption, "\n".join(lines))


# ---- compute


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


def flops_words(point):
    """The FLOPs of a point as two cells of a table: of the training, of a prediction."""
    return f"{1e-12 * point['training_flops']:.3g} | {1e-6 * point['prediction_flops']:.3g}"


def make_hybrid(context):
    """Fig. 5: accuracy against the work of training, with and without a ResNet before the patches."""
    sweep, folder = finished_sweep(context, "paper-hybrid", "ViTs and hybrids")
    kinds = {"": "ViT", "root": "hybrid: root", "1": "hybrid: root and a unit"}
    points = [
        {"kind": kinds[c.stem], "width": c.width, "tokens": c.num_tokens} | point
        for c, point in points_of(sweep, folder)
    ]
    path, data = context.figure("paper-hybrid"), sweep.rows[0].recipe.data["data"]
    figures.save_compute(path, points, title=f"{data}: {sweep.title}")
    lines = [
        "| | width | tokens | test accuracy | training, TFLOP | a prediction, MFLOP |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {p['kind']} | {p['width']} | {p['tokens']} | {p['accuracy']:.2%} | {flops_words(p)} |" for p in points
    ]
    caption = (
        f"{sweep_words(sweep, 'paper-hybrid')}, against the work of the training's matrix products and convolutions, "
        f"forward and backward; beside each stands the width of its tokens. {error_of_sweep(sweep, folder)}"
    )
    return Result((path.name,), caption, "\n".join(lines))


def make_axial(context):
    """Fig. 13: accuracy against the work of training, and against the speed of predictions."""
    sweep, folder = finished_sweep(context, "paper-axial", "Full and axial attention")
    points = [
        {"attention": c.attention, "blocks": c.depth, "patch": c.patch_size, **point, "batch": SPEED_BATCH}
        | context.speed(c, "infer", SPEED_BATCH, SPEED_TURNS)
        for c, point in points_of(sweep, folder)
    ]
    path, data = context.figure("paper-axial"), sweep.rows[0].recipe.data["data"]
    figures.save_axial(path, points, title=f"{data}: {sweep.title}")
    write_json(context.out / "paper-axial.json", points)
    lines = ["| attention | blocks | patch | test accuracy | training, TFLOP | a prediction, MFLOP | predictions/s |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    lines += [
        f"| {p['attention']} | {p['blocks']} | {p['patch']} | {p['accuracy']:.2%} | {flops_words(p)} | "
        f"{p['images_per_second']:,.0f} |"
        for p in points
    ]
    caption = (
        f"{sweep_words(sweep, 'paper-axial')}, against the work of the training's matrix products, forward and "
        f"backward, and against predictions per second on {available_cores()} cores, float32, in batches of "
        f"{SPEED_BATCH}. An axial block looks along rows or along columns: twice as many blocks, as the paper's "
        "Axial-ViT has, look along both as often as a full one does. "
        f"{error_of_sweep(sweep, folder)}"
    )
    return Result((path.name,), caption, "\n".join(lines))
