"""A run as one HTML page: settings, curves, what it gets right and wrong, calibration, speed, how to make it again.

The page needs nothing but itself, and whatever comes from a file or a folder is escaped: see `minivit.figures.html`.
"""

from __future__ import annotations

import dataclasses
import math
import shlex

import numpy as np

from minivit.evaluation.inference import attention_map
from minivit.evaluation.metrics import BINS, best_temperature, calibration, measure
from minivit.evaluation.runs import command, defaults_of, number
from minivit.figures.attention import image_png
from minivit.figures.curves import save_curve, training_label
from minivit.figures.html import Html, document, duration, image, percent, svg_figure, table, tag
from minivit.figures.predictions import save_calibration, save_confusion
from minivit.layers.loss import softmax_cross_entropy_forward
from minivit.layers.softmax import softmax_forward
from minivit.model import intermediates
from minivit.training.folder import LAST, METRICS, SUMMARY
from minivit.weights.checkpoint import versions
from minivit.weights.start import StartConfig


def _headline(run, progress):
    c, data, train = run.model.config, run.dataset, run.train
    tests = [r for r in run.records if r["kind"] == "test"]
    seconds = number(run.summary, "train_seconds", number(progress, "seconds"))
    if tests:
        accuracy, after = percent(tests[-1]["accuracy"]), f"after epoch {tests[-1]['epoch']} of {train.epochs}"
        best = max(tests, key=lambda r: r["accuracy"])
        after += f"; best {percent(best['accuracy'])} after epoch {best['epoch']} (chosen by the test images)"
    else:
        accuracy, after = "not tested yet", "no evaluation in its metrics.jsonl"
    blocks = f"{c.depth} block{'s' if c.depth > 1 else ''}"
    heads = f"{c.num_heads} head{'s' if c.num_heads > 1 else ''}"
    tiles = [
        (accuracy, "test accuracy", after),
        (data.name, "data", f"{len(data.train_images):,} training and {len(data.test_images):,} test images of "
         f"{c.image_size} × {c.image_size} × {c.channels}, {len(data.class_names)} classes"),
        (f"ViT, patch {c.patch_size}", "model", f"{c.num_tokens:,} tokens, width {c.width}, {blocks}, {heads}, "
          + {"cls": "class token", "mean": "mean pooling", "avg": "mean pooling", "seq": "sequence pooling"}
          .get(c.pooling, c.pooling)
          + (", axial attention" if c.attention == "axial" else "")),
        (f"{run.model.flat.size:,}", "parameters", ""),
        (duration(seconds) if seconds is not None else "unknown", "training time, tests included",
         f"on {run.summary['device']}" if isinstance(run.summary.get("device"), str) else ""),
    ]  # fmt: skip
    words = (tag("div", what, tag("strong", value), tag("span", more, class_="soft")) for value, what, more in tiles)
    steps = train.steps or train.epochs * steps_per_epoch(run)
    at = f"step {number(progress, 'step', 0):,} of {steps:,}, epoch {number(progress, 'epoch', 0)} of {train.epochs}"
    if run.summary:
        state = tag("p", f"A finished run. Its {LAST} is of {at}.")
    else:
        state = tag("p", tag("span", "unfinished", class_="mark"), f": there is no whole {SUMMARY} of this run yet. "
                    f"Its {LAST}, which the figures about test images are of, is of {at}.")  # fmt: skip
    return tag(
        "header", tag("h1", f"{data.name}: a run of minivit"), tag("p", str(run.folder), class_="soft"),
        tag("div", *words, class_="tiles"), state, tag("p", data.source, class_="soft"),
    )  # fmt: skip


def steps_per_epoch(run):
    """Optimiser steps that make an epoch of the run."""
    return -(-len(run.dataset.train_images) // (run.train.batch_size * run.train.accumulate))


def _settings(run):
    def words(value):
        return ("yes" if value else "no") if type(value) is bool else "\N{EN DASH}" if value is None else value

    def group(title, rows):
        """Rows of (name, value, default, help): those that differ from their defaults, then the others, folded."""
        changes = [
            (tag("span", "● ", name, class_="mark"), tag("strong", words(value)), words(default), about)
            for name, value, default, about in rows
            if value != default
        ]
        others = [(name, words(value), about) for name, value, default, about in rows if value == default]
        parts = [tag("h3", title)]
        parts += [table(("setting", "value", "default", "what it is"), changes)] if changes else []
        if others:
            label = f"{len(others)} settings of the {title.lower()} are the defaults"
            parts.append(tag("details", tag("summary", label), table(("setting", "value", "what it is"), others)))
        return tag("div", *parts)

    groups = []
    for title, settings in (("Model", run.model.config), ("Training", run.train)):
        values, defaults = dataclasses.asdict(settings), defaults_of(settings)
        about = {f.name: f.metadata["help"] for f in dataclasses.fields(settings)}
        groups.append(group(title, [(name, values[name], defaults[name], about[name]) for name in values]))
    data = run.record.data
    what = (("data", "digits", "data set"), ("data_dir", "data", "where the data lie"),
            ("image_size", None, "size that the images are brought to, pixels"),
            ("classes", None, "classes that are kept"),
            ("train_share", None, "share of the training images that is kept"),
            ("test_share", None, "share of images that were not split that is for testing"),
            ("split_seed", 0, "what draws these"))  # fmt: skip
    groups.append(group("Data", [(name, data.get(name), default, about) for name, default, about in what]))
    if origin := run.record.start:
        fields = [(f.name, origin.get(f.name), f.default, f.metadata["help"]) for f in dataclasses.fields(StartConfig)]
        groups.append(group("Start", fields))
    text = tag("p", tag("span", "●", class_="mark"), " differs from the default of minivit (not of a settings file).")
    return tag("section", tag("h2", "Settings"), text, *groups, id="settings")


def _curve(run, name, says):
    return svg_figure(
        save_curve(None, name, run.records, per_epoch=steps_per_epoch(run), training=training_label(run.train)), says
    )


def _training(run):
    inside = [tag("h2", "Training")]
    if run.records:
        inside.append(tag("div", _curve(run, "loss", "Training and test loss against epochs"),
                          _curve(run, "accuracy", "Training and test accuracy against epochs"),
                          _curve(run, "lr", "Learning rate against epochs"), class_="figures"))  # fmt: skip
    else:
        inside.append(tag("p", f"There is nothing to draw in its {METRICS} yet."))
    return tag("section", *inside, id="training")


def _test(run, measures, confusion):
    names = run.dataset.class_names
    n, accuracy = measures["images"], measures["accuracy"]
    text = f"Of {n:,} test images {round(accuracy * n):,} are right, {percent(accuracy)}"
    if "top5_accuracy" in measures:
        text += f" ({percent(measures['top5_accuracy'])} within the first five)"
    text += f"; mean cross-entropy {measures['loss']:.4f}. Measured for this page with {LAST}, "
    text += "the moving average of the weights" if run.record.weights == "ema" else "the weights themselves"
    text += ", and the mean of each image's and its mirror image's logits." if run.train.test_flip else "."
    parts = [tag("h2", "Test images"), tag("p", text)]
    if (logged := number(run.summary, "test_accuracy")) is not None and logged != measures["accuracy"]:
        parts.append(tag("p", f"At its end the run itself counted {percent(logged)}: its weights, device or images "
                         "were others than those of this page.", class_="mark"))  # fmt: skip
    if not run.same:
        parts.append(tag("p", "These are not the images of its training run, perhaps another version of them.",
                         class_="mark"))  # fmt: skip
    chart = save_confusion(None, confusion, names, title="confusion matrix: images")
    matrix = svg_figure(chart, "Confusion matrix, rows are the true classes, columns the predicted", large=True)
    rows = [
        (each["name"], f"{each['count']:,}", *(percent(each[key], 1) for key in ("accuracy", "precision", "recall")))
        for each in measures["classes"]
    ]
    by_class = tag(
        "div", tag("h3", "By class"),
        table(("class", "images", "accuracy", "precision", "recall"), rows, numbers=range(1, 5)),
        tag("p", "Accuracy: share of all images that are rightly taken for this class or rightly not. Precision: "
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
    worst = wrong[np.argsort(-confidence, kind="stable")[:count]]
    row = "the class token's row" if c.class_tokens else "the mean over the rows of all patches"
    parts = [tag("h2", "The most confident mistakes")]
    if not len(wrong):
        return tag("section", *parts, tag("p", "There is none: every test image is right."), id="mistakes")
    parts.append(
        tag("p", f"{len(worst)} of {len(wrong):,} wrong images, the surest first; beside each what the model "
            f"attended to: the attention of its last block, {row}, mean over the heads (yellow: most, violet: least).")
    )  # fmt: skip
    cards = []
    for i in worst:
        pixels, truth, guess = data.test_images[i], int(data.test_labels[i]), int(guesses[i])
        attention = intermediates(run.model, pixels[None]).attention[-1][0]  # (h, N, N)
        overlay = image_png(pixels, attention_map(attention, c.pooling, c.registers))
        cards.append(
            tag(
                "div",
                image(image_png(pixels), f"test image {i}"),
                image(overlay, f"the attention over test image {i}"),
                tag(
                    "p", "predicted ", tag("strong", data.class_names[guess]), f" {percent(probabilities[i, guess], 1)}"
                ),
                tag("p", "truly ", tag("strong", data.class_names[truth]), f" {percent(probabilities[i, truth], 1)}"),
                tag("p", tag("span", f"test image {i}", class_="soft")),
            )
        )
    return tag("section", *parts, tag("div", *cards, class_="mistakes"), id="mistakes")


GUO = "https://arxiv.org/abs/1706.04599"


def _calibration(run, probabilities, loss):
    labels = run.dataset.test_labels
    bins = calibration(probabilities, labels)
    T = best_temperature(run.logits, labels)
    charts = [svg_figure(save_calibration(None, bins, title="as the model says it"),
                    "Reliability diagram: accuracy against confidence")]  # fmt: skip
    honest = (
        "It is fitted to the very test images on which it is judged here: what it gains is the most that any "
        "temperature can gain on them, not what to expect of new images. A temperature for use is to be fitted to "
        "images held out for it."
    )
    if T == 0.0:
        text = "Every test image is right: the smaller the temperature, the smaller the loss, and none is best."
    elif math.isinf(T):
        text = "No temperature is better than equal probabilities for all classes: none is best."
    else:
        scores = run.logits.astype(np.float64) / T
        softer = calibration(softmax_forward(scores)[0], labels)
        charts.append(svg_figure(save_calibration(None, softer, title=f"with all logits divided by T = {T:.3f}"),
                            "Reliability diagram with the best temperature"))  # fmt: skip
        better, _ = softmax_cross_entropy_forward(scores, labels)
        direction = "more" if T > 1 else "less"
        text = (
            f"T = {T:.3f}: with it the loss is {better:.4f} instead of {loss:.4f} and the calibration error "
            f"{percent(softer.error)} instead of {percent(bins.error)}. The model is {direction} sure of itself than "
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
        tag("p", Html("B<sub>m</sub> are those of the n test images whose confidence is above "
            f"(m−1)/{BINS} and at most m/{BINS}, acc is the share of them that is right, conf their mean confidence "),
            "(Guo, Pleiss, Sun and Weinberger 2017, On Calibration of Modern Neural Networks, Eq. 3, ",
            tag("a", "arXiv:1706.04599", href=GUO), ")."),
        tag("p", "Expected calibration error: ", tag("strong", percent(bins.error)), "."),
        tag("p", "The temperature by which all logits are to be divided for the smallest cross-entropy (section 4.2 "
            f"there; it changes no prediction). {text}"),
        tag("div", *charts, class_="figures"), id="calibration",
    )  # fmt: skip


def _speed(run):
    parts = [tag("h2", "Speed and gradient")]
    rate = number(run.summary, "images_per_second")
    if rate is not None:
        parts.append(tag("p", f"{rate:,.0f} training images per second over the whole run, its tests included."))
    if run.records:
        parts.append(tag("div", _curve(run, "throughput", "Images per second against epochs"),
                         _curve(run, "gradient norm", "Global norm of the gradient against epochs"),
                         _curve(run, "epoch time", "Seconds per epoch against epochs"), class_="figures"))  # fmt: skip
    else:
        parts.append(tag("p", f"There is nothing to draw in its {METRICS} yet."))
    return tag("section", *parts, id="speed")


def _again(run):
    parts = command(run.model.config, run.train, run.record.data, run.own, run.record.start)
    stored = run.record.versions
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


PARTS = {"training": "Training", "test": "Test images", "mistakes": "Mistakes", "calibration": "Calibration",
         "speed": "Speed", "settings": "Settings", "again": "To make it again"}  # fmt: skip


def page(run, *, mistakes=12):
    """The whole page about a `Run`, with so many of its mistakes, as a text."""
    progress = run.record.progress
    probabilities, _ = softmax_forward(run.logits.astype(np.float64))  # (n, K)
    measures, confusion = measure(run.logits, run.dataset.test_labels, run.dataset.class_names)
    return document(
        f"{run.dataset.name}: {run.folder}", _headline(run, progress),
        tag("nav", *(tag("a", text, href=f"#{id_}") for id_, text in PARTS.items())),
        _training(run), _test(run, measures, confusion), _mistakes(run, probabilities, mistakes),
        _calibration(run, probabilities, measures["loss"]), _speed(run), _settings(run), _again(run),
    )  # fmt: skip
