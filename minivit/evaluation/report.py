"""A run as one HTML page: settings, curves, what it gets right and wrong, calibration, speed, how to make it again.

The page needs nothing but itself: figures are SVG elements, pictures are data, and its own policy forbids a browser to
load anything. Whatever comes from a file or a folder passes through `html.escape`: see `tag`.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import math
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minivit.base.settings import field_names
from minivit.evaluation.inference import attention_map
from minivit.evaluation.metrics import BINS, best_temperature, calibration, measure
from minivit.figures import plots
from minivit.layers.loss import softmax_cross_entropy_forward
from minivit.layers.softmax import softmax_forward
from minivit.model import ViT, ViTConfig, preset_fields
from minivit.training.trainer import LAST, METRICS, SUMMARY, TrainConfig, origin_of, read_metrics, versions
from minivit.weights.start import MAY_CHANGE, StartConfig

STYLE = """
:root { color-scheme: light dark; --ink: #1e293b; --soft: #475569; --page: #ffffff; --card: #f1f5f9; --line: #cbd5e1;
  --mark: #c2410c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e2e8f0; --soft: #a3b1c6; --page: #0f172a; --card: #1e293b;
  --line: #3b4a61; --mark: #fb923c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0.5rem 0; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 0.5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 0.3rem; }
p { max-width: 48rem; margin: 0.5rem 0; }
a { color: inherit; }
nav a { margin-right: 0.9rem; white-space: nowrap; }
.soft { color: var(--soft); }
.mark { color: var(--mark); font-weight: 600; }
.tiles, .figures, .mistakes { display: grid; gap: 1rem; margin: 1rem 0; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(min(100%, 13rem), 1fr)); }
.tiles div, .mistakes div { background: var(--card); border-radius: 0.5rem; padding: 0.6rem 0.8rem; }
.tiles strong { display: block; font-size: 1.3rem; line-height: 1.3; }
.figures { grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); align-items: start; }
.mistakes { grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); }
.mistakes p { margin: 0; }
.mistakes img { width: 48%; margin-right: 2%; image-rendering: pixelated; border: 1px solid var(--line); }
figure { margin: 0; max-width: 36rem; }
figure svg { width: 100%; height: auto; fill: currentColor; }
.scroll { overflow-x: auto; max-width: 100%; }
.large { max-width: 42rem; }
.large svg { min-width: 28rem; }
.pair { display: flex; flex-wrap: wrap; gap: 1rem 2rem; align-items: flex-start; }
.pair > * { flex: 1 1 20rem; min-width: 0; }
.pair > .large { flex-grow: 2; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { text-align: left; padding: 0.15rem 0.9rem 0.15rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
#settings td:first-child { white-space: nowrap; }
#settings td:last-child { min-width: 13rem; }
@media (max-width: 40rem) { th, td { padding-right: 0.5rem; } }
pre { background: var(--card); padding: 0.7rem; border-radius: 0.5rem; overflow-x: auto; font-size: 0.85rem; }
summary { cursor: pointer; color: var(--soft); }
.formula { font-size: 1.05rem; margin-left: 1.5rem; }
"""


class Html(str):
    """Text that is HTML already and is not to be escaped again."""


def tag(name, /, *children, **attributes):
    """An HTML element: children and values of attributes are escaped unless they are `Html`; ``class_`` is class."""
    inside = "".join(child if isinstance(child, Html) else html.escape(str(child)) for child in children)
    named = "".join(f' {key.rstrip("_")}="{html.escape(str(value))}"' for key, value in attributes.items())
    return Html(f"<{name}{named}>" if name in ("br", "img", "meta") else f"<{name}{named}>{inside}</{name}>")


def table(head, rows, *, numbers=()):
    """A table that scrolls within a narrow page; ``numbers`` are the columns that are flush right."""

    def row(name, cells):
        return tag("tr", *(tag(name, c, **({"class_": "number"} if i in numbers else {})) for i, c in enumerate(cells)))

    body = tag("tbody", *(row("td", cells) for cells in rows))
    return tag("div", tag("table", tag("thead", row("th", head)), body), class_="scroll")


def figure(svg, says, *, large=False):
    """One of the figures of `minivit.figures.plots` with a description for those who cannot see it."""
    drawn = Html(svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(says)}" ', 1))
    return tag("figure", drawn, **({"class_": "large scroll"} if large else {}))


def percent(share, digits=2):
    """A share as a percentage; a dash for None."""
    return "\N{EN DASH}" if share is None else f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def duration(seconds):
    """A time in words, from seconds."""
    if seconds < 60:
        return f"{seconds:.3g}\N{NO-BREAK SPACE}s"
    if seconds < 3600:
        return f"{seconds / 60:.1f}\N{NO-BREAK SPACE}min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours}\N{NO-BREAK SPACE}h {minutes}\N{NO-BREAK SPACE}min"


# ---- what a run's folder holds ---------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A run and what its checkpoint says about the test pictures."""

    folder: Path
    model: ViT
    meta: dict  # of the checkpoint
    train: TrainConfig
    dataset: Any
    same: bool  # are these the pictures that it was trained and tested on?
    logits: Any  # (n, K), of the test pictures, on the host
    records: list  # of its metrics.jsonl
    summary: dict  # {} before its end
    own: dict  # the tables of the data set's own settings file


def number(content, name, default=None):
    """A finite, non-negative number of a dict that comes from a file, or the default if it has none of that name."""
    value = content.get(name) if isinstance(content, dict) else None
    return value if type(value) in (int, float) and 0 <= value < 1e15 else default


def records_of(folder):
    """The records of a run's metrics.jsonl that can be drawn: whole, of finite numbers, of an epoch and a step."""

    def sound(record):
        numbers = [value for value in record.values() if type(value) in (int, float)]
        return all(abs(value) < 1e15 for value in numbers) and record["epoch"] > 0 and record["step"] > 0

    path = Path(folder) / METRICS
    return [record for record in read_metrics(path) if sound(record)] if path.is_file() else []


def summary_of(folder):
    """The content of a run's summary.json; {} if there is none yet or it is damaged."""
    try:
        content = json.loads((Path(folder) / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def defaults_of(config):
    """The values that a settings object would have if nothing were asked for, as a dict."""
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    return defaults | ({"mlp_dim": 4 * config.width} if isinstance(config, ViTConfig) else {})


START_FLAGS = {
    f.name: ("--from" if f.name == "checkpoint" else "--" + f.name.replace("_", "-"), f.default)
    for f in dataclasses.fields(StartConfig)
}
BY_START = set(field_names(ViTConfig)) - {*MAY_CHANGE, "pos_embed"}
FITTED = ("image_size", "channels", "num_classes")  # settings of a model that follow the data


def command(config, train, data, own, start=None):
    """The command that trains the same model again, as a list of its words, a list for each flag.

    Every setting that is not the default is a flag, and so is one that ``own``, the tables of the data set's settings
    file (which `minivit train` reads by itself), would change. ``data`` is the checkpoint's description of the data,
    ``start`` that of where its first parameters came from (see `minivit.weights.start.Start`), or None.
    """
    name, place = data.get("data") or "digits", data.get("data_dir") or "data"
    parts = [["minivit", "train"]]
    if name != "digits":
        parts.append(["--data", name])
        if place != own.get("data", {}).get("data_dir", "data"):
            parts.append(["--data-dir", place])
    if name == "folder" or data.get("image_size"):
        parts.append(["--image-size", str(config.image_size)])
    if data.get("classes"):
        parts.append(["--classes", str(data["classes"])])
    if data.get("train_share"):
        parts.append(["--train-share", str(data["train_share"])])
    for key, value in (start or {}).items():
        if key in START_FLAGS and value != START_FLAGS[key][1]:
            flag = START_FLAGS[key][0]
            parts.append([flag] if value is True else [flag, str(value)])
    for settings, section in ((config, "model"), (train, "train")):
        asked, defaults = own.get(section, {}), defaults_of(settings)
        by_preset = preset_fields("Ti/16") if "preset" in asked else {}  # the sizes that any preset sets
        for key in field_names(type(settings)):
            value = getattr(settings, key)
            known = value == defaults[key] and asked.get(key, value) == value and key not in by_preset
            if start and settings is config:  # what is not asked for is the start's
                known = key in BY_START or asked.get(key) == value
            if key in FITTED or known:
                continue
            flag = "--" + key.replace("_", "-")
            parts.append([flag if value else f"--no-{flag[2:]}"] if type(value) is bool else [flag, str(value)])
    return parts


# ---- the parts of the page -------------------------------------------------------------------------------------------


def _headline(run, progress):
    c, data, train = run.model.config, run.dataset, run.train
    tests = [r for r in run.records if r["kind"] == "test"]
    seconds = number(run.summary, "train_seconds", number(progress, "seconds"))
    if tests:
        accuracy, after = percent(tests[-1]["accuracy"]), f"after epoch {tests[-1]['epoch']} of {train.epochs}"
        best = max(tests, key=lambda r: r["accuracy"])
        after += f"; best {percent(best['accuracy'])} after epoch {best['epoch']}"
    else:
        accuracy, after = "not tested yet", "no evaluation in its metrics.jsonl"
    blocks = f"{c.depth} block{'s' if c.depth > 1 else ''}"
    heads = f"{c.num_heads} head{'s' if c.num_heads > 1 else ''}"
    tiles = [
        (accuracy, "test accuracy", after),
        (data.name, "data", f"{len(data.train_images):,} training and {len(data.test_images):,} test pictures of "
         f"{c.image_size} × {c.image_size} × {c.channels}, {len(data.class_names)} classes"),
        (f"ViT, patch {c.patch_size}", "model", f"{c.num_tokens:,} tokens, width {c.width}, {blocks}, {heads}, "
          + {"cls": "class token", "mean": "mean pooling", "avg": "mean pooling", "seq": "sequence pooling"}[c.pooling]
          + (", axial attention" if c.attention == "axial" else "")),
        (f"{run.model.flat.size:,}", "parameters", ""),
        (duration(seconds) if seconds is not None else "unknown", "training time, tests included",
         f"on {run.summary['device']}" if isinstance(run.summary.get("device"), str) else ""),
    ]  # fmt: skip
    shown = (tag("div", what, tag("strong", value), tag("span", more, class_="soft")) for value, what, more in tiles)
    steps = train.steps or train.epochs * steps_per_epoch(run)
    at = f"step {number(progress, 'step', 0):,} of {steps:,}, epoch {number(progress, 'epoch', 0)} of {train.epochs}"
    if run.summary:
        state = tag("p", f"A finished run. Its {LAST} is of {at}.")
    else:
        state = tag("p", tag("span", "unfinished", class_="mark"), f": there is no whole {SUMMARY} of this run yet. "
                    f"Its {LAST}, which the figures about test pictures are of, is of {at}.")  # fmt: skip
    return tag(
        "header", tag("h1", f"{data.name}: a run of minivit"), tag("p", str(run.folder), class_="soft"),
        tag("div", *shown, class_="tiles"), state, tag("p", data.source, class_="soft"),
    )  # fmt: skip


def steps_per_epoch(run):
    """Optimiser steps that make an epoch of the run."""
    return -(-len(run.dataset.train_images) // (run.train.batch_size * run.train.accumulate))


def _settings(run):
    def shown(value):
        return ("yes" if value else "no") if type(value) is bool else "\N{EN DASH}" if value is None else value

    def group(title, rows):
        """Rows of (name, value, default, help): those that differ from their defaults, then the others, folded."""
        marked = [
            (tag("span", "● ", name, class_="mark"), tag("strong", shown(value)), shown(default), about)
            for name, value, default, about in rows
            if value != default
        ]
        others = [(name, shown(value), about) for name, value, default, about in rows if value == default]
        parts = [tag("h3", title)]
        parts += [table(("setting", "value", "default", "what it is"), marked)] if marked else []
        if others:
            label = f"{len(others)} settings of the {title.lower()} are the defaults"
            parts.append(tag("details", tag("summary", label), table(("setting", "value", "what it is"), others)))
        return tag("div", *parts)

    groups = []
    for title, settings in (("Model", run.model.config), ("Training", run.train)):
        values, defaults = dataclasses.asdict(settings), defaults_of(settings)
        about = {f.name: f.metadata["help"] for f in dataclasses.fields(settings)}
        groups.append(group(title, [(name, values[name], defaults[name], about[name]) for name in values]))
    data = run.meta["data"]
    what = (("data", "digits", "data set"), ("data_dir", "data", "where the data lie"),
            ("image_size", None, "size that the pictures are brought to, pixels"),
            ("classes", None, "classes that are kept"),
            ("train_share", None, "share of the training pictures that is kept"))  # fmt: skip
    groups.append(group("Data", [(name, data.get(name), default, about) for name, default, about in what]))
    if origin := origin_of(run.meta):
        fields = [(f.name, origin.get(f.name), f.default, f.metadata["help"]) for f in dataclasses.fields(StartConfig)]
        groups.append(group("Start", fields))
    said = tag("p", tag("span", "●", class_="mark"), " differs from the default of minivit (not of a settings file).")
    return tag("section", tag("h2", "Settings"), said, *groups, id="settings")


def _curve(run, name, says):
    return figure(plots.save_curve(None, name, run.records, per_epoch=steps_per_epoch(run)), says)


def _training(run):
    inside = [tag("h2", "Training")]
    if run.records:
        inside.append(tag("div", _curve(run, "loss", "Training and test loss against epochs"),
                          _curve(run, "accuracy", "Training and test accuracy against epochs"),
                          _curve(run, "lr", "Learning rate against epochs"), class_="figures"))  # fmt: skip
    else:
        inside.append(tag("p", f"There is nothing to draw in its {METRICS} yet."))
    return tag("section", *inside, id="training")


def _test(run, figures, confusion):
    names = run.dataset.class_names
    n, accuracy = figures["images"], figures["accuracy"]
    said = f"Of {n:,} test pictures {round(accuracy * n):,} are right, {percent(accuracy)}"
    if "top5_accuracy" in figures:
        said += f" ({percent(figures['top5_accuracy'])} within the first five)"
    said += f"; mean cross-entropy {figures['loss']:.4f}. Measured for this page with {LAST}, "
    said += "the moving average of the weights" if run.meta["weights"] == "ema" else "the weights themselves"
    said += ", and the mean of each picture's and its mirror image's logits." if run.train.test_flip else "."
    parts = [tag("h2", "Test pictures"), tag("p", said)]
    if (logged := number(run.summary, "test_accuracy")) is not None and logged != figures["accuracy"]:
        parts.append(tag("p", f"At its end the run itself counted {percent(logged)}: its weights, device or pictures "
                         "were others than those of this page.", class_="mark"))  # fmt: skip
    if not run.same:
        parts.append(tag("p", "These are not the pictures of its training run, perhaps another version of them.",
                         class_="mark"))  # fmt: skip
    drawn = plots.save_confusion(None, confusion, names, title="confusion matrix: pictures")
    matrix = figure(drawn, "Confusion matrix, rows are the true classes, columns the predicted", large=True)
    rows = [
        (each["name"], f"{each['count']:,}", *(percent(each[key], 1) for key in ("accuracy", "precision", "recall")))
        for each in figures["classes"]
    ]
    by_class = tag(
        "div", tag("h3", "By class"),
        table(("class", "pictures", "accuracy", "precision", "recall"), rows, numbers=range(1, 5)),
        tag("p", "Accuracy: share of all pictures that are rightly taken for this class or rightly not. Precision: "
            "share of those taken for it that are of it. Recall: share of those of it that are taken for it. A dash: "
            "there are none.", class_="soft"),
    )  # fmt: skip
    parts.append(tag("div", matrix, by_class, class_="pair"))
    return tag("section", *parts, id="test")


def _mistakes(run, probabilities, count):
    data, c = run.dataset, run.model.config
    guesses = probabilities.argmax(axis=1)
    wrong = np.flatnonzero(guesses != data.test_labels)
    confidence = probabilities[wrong, guesses[wrong]]
    chosen = wrong[np.argsort(-confidence, kind="stable")[:count]]
    row = "the class token's row" if c.pooling == "cls" else "the mean over the rows of all patches"
    parts = [tag("h2", "The most confident mistakes")]
    if not len(wrong):
        return tag("section", *parts, tag("p", "There is none: every test picture is right."), id="mistakes")
    parts.append(
        tag("p", f"{len(chosen)} of {len(wrong):,} wrong pictures, the surest first; beside each what the model "
            f"attended to: the attention of its last block, {row}, mean over the heads (yellow: most, violet: least).")
    )  # fmt: skip
    cards = []
    for i in chosen:
        image, truth, guess = data.test_images[i], int(data.test_labels[i]), int(guesses[i])
        seen = run.model.intermediates(image[None]).attention[-1][0]  # (h, N, N)
        pictures = (
            (plots.picture_png(image), f"test picture {i}"),
            (
                plots.picture_png(image, attention_map(seen, c.pooling, c.registers)),
                f"the attention over test picture {i}",
            ),
        )
        lines = [
            ("predicted ", tag("strong", data.class_names[guess]), f" {percent(probabilities[i, guess], 1)}"),
            ("truly ", tag("strong", data.class_names[truth]), f" {percent(probabilities[i, truth], 1)}"),
            (tag("span", f"test picture {i}", class_="soft"),),
        ]
        cards.append(
            tag("div", *(
                tag("img", src="data:image/png;base64," + base64.b64encode(png).decode(), alt=says)
                for png, says in pictures
            ), *(tag("p", *line) for line in lines))
        )  # fmt: skip
    return tag("section", *parts, tag("div", *cards, class_="mistakes"), id="mistakes")


GUO = "https://arxiv.org/abs/1706.04599"


def _calibration(run, probabilities, loss):
    labels = run.dataset.test_labels
    found = calibration(probabilities, labels)
    T = best_temperature(run.logits, labels)
    drawn = [figure(plots.save_calibration(None, found, title="as the model says it"),
                    "Reliability diagram: accuracy against confidence")]  # fmt: skip
    honest = (
        "It is fitted to the very test pictures on which it is judged here: what it gains is the most that any "
        "temperature can gain on them, not what to expect of new pictures. A temperature for use is to be fitted to "
        "pictures held out for it."
    )
    if T == 0.0:
        said = "Every test picture is right: the smaller the temperature, the smaller the loss, and none is best."
    elif math.isinf(T):
        said = "No temperature is better than equal probabilities for all classes: none is best."
    else:
        divided = run.logits.astype(np.float64) / T
        cooled = calibration(softmax_forward(divided)[0], labels)
        drawn.append(figure(plots.save_calibration(None, cooled, title=f"with all logits divided by T = {T:.3f}"),
                            "Reliability diagram with the best temperature"))  # fmt: skip
        better, _ = softmax_cross_entropy_forward(divided, labels)
        direction = "more" if T > 1 else "less"
        said = (
            f"T = {T:.3f}: with it the loss is {better:.4f} instead of {loss:.4f} and the calibration error "
            f"{percent(cooled.error)} instead of {percent(found.error)}. The model is {direction} sure of itself than "
            f"it should be. {honest}"
        )
    formula = Html(
        f"ECE = Σ<sub>m=1</sub><sup>{BINS}</sup> (|B<sub>m</sub>|&nbsp;/&nbsp;n) "
        "|acc(B<sub>m</sub>) − conf(B<sub>m</sub>)|"
    )
    return tag(
        "section", tag("h2", "Calibration"),
        tag("p", "Of all predictions made with a confidence (the probability of the predicted class) of 80 %, a "
            "calibrated model has 80 % right. The expected calibration error is the mean distance from that, over "
            f"{BINS} bins of equal width:"),
        tag("p", formula, class_="formula"),
        tag("p", Html("B<sub>m</sub> are those of the n test pictures whose confidence is above "
            f"(m−1)/{BINS} and at most m/{BINS}, acc is the share of them that is right, conf their mean confidence "),
            "(Guo, Pleiss, Sun and Weinberger 2017, On Calibration of Modern Neural Networks, Eq. 3, ",
            tag("a", "arXiv:1706.04599", href=GUO), ")."),
        tag("p", "Expected calibration error: ", tag("strong", percent(found.error)), "."),
        tag("p", "The temperature by which all logits are to be divided for the smallest cross-entropy (section 4.2 "
            f"there; it changes no prediction). {said}"),
        tag("div", *drawn, class_="figures"), id="calibration",
    )  # fmt: skip


def _speed(run):
    parts = [tag("h2", "Speed and gradient")]
    rate = number(run.summary, "images_per_second")
    if rate is not None:
        parts.append(tag("p", f"{rate:,.0f} training pictures per second over the whole run, its tests included."))
    if run.records:
        parts.append(tag("div", _curve(run, "throughput", "Pictures per second against epochs"),
                         _curve(run, "gradient norm", "Global norm of the gradient against epochs"),
                         _curve(run, "epoch time", "Seconds per epoch against epochs"), class_="figures"))  # fmt: skip
    else:
        parts.append(tag("p", f"There is nothing to draw in its {METRICS} yet."))
    return tag("section", *parts, id="speed")


def _again(run):
    parts = command(run.model.config, run.train, run.meta["data"], run.own, origin_of(run.meta))
    stored = run.meta.get("versions")
    rows = [(name, version) for name, version in (stored if isinstance(stored, dict) else {}).items()]
    rows += [(name, run.summary[name]) for name in ("device", "cores", "workers") if name in run.summary]
    mine = ", ".join(f"{name} {version}" for name, version in versions().items())
    return tag(
        "section", tag("h2", "To make it again"),
        tag("pre", tag("code", " \\\n  ".join(map(shlex.join, parts)))),
        tag("p", "In the folder of minivit. The same processor, NumPy and number of workers give the same bits, others "
            "nearly the same figures."),
        tag("h3", "Trained with"), table(("what", "version"), rows),
        tag("p", f"This page was made with {mine}.", class_="soft"), id="again",
    )  # fmt: skip


POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
PARTS = {"training": "Training", "test": "Test pictures", "mistakes": "Mistakes", "calibration": "Calibration",
         "speed": "Speed", "settings": "Settings", "again": "To make it again"}  # fmt: skip


def page(run, *, mistakes=12):
    """The whole page about a `Run`, with so many of its mistakes, as a text."""
    progress = run.meta.get("progress")
    probabilities, _ = softmax_forward(run.logits.astype(np.float64))  # (n, K)
    figures, confusion = measure(run.logits, run.dataset.test_labels, run.dataset.class_names)
    head = tag(
        "head", tag("meta", charset="utf-8"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{run.dataset.name}: {run.folder}"), tag("style", Html(STYLE)),
    )  # fmt: skip
    body = tag(
        "body", _headline(run, progress), tag("nav", *(tag("a", text, href=f"#{id_}") for id_, text in PARTS.items())),
        _training(run), _test(run, figures, confusion), _mistakes(run, probabilities, mistakes),
        _calibration(run, probabilities, figures["loss"]), _speed(run), _settings(run), _again(run),
    )  # fmt: skip
    return f'<!DOCTYPE html>\n<html lang="en">\n{head}\n{body}\n</html>\n'
