"""Where an entry of the paper's page finds its model, its data and its time."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minivit.base.files import read_object
from minivit.base.finite import quiet_overflow
from minivit.evaluation.inference import check_finite, load_with_data, on_device
from minivit.paper import analyses
from minivit.paper.trainings import length_of, plan_of, run_of, write_plan
from minivit.training.folder import LAST, SUMMARY
from minivit.training.recipes import find_config, read_recipe
from minivit.training.sweep import Row, Run, result_of
from minivit.weights.layouts import is_readable, load_any

SHEET = 24  # test images that are shown with their attention


class Result(NamedTuple):
    """What an entry has given."""

    files: tuple[str, ...]  # the figures, in the context's folder
    caption: str  # what they show, with the numbers that were measured
    table: str = ""  # Markdown


class Entry(NamedTuple):
    """A figure or table of the paper."""

    name: str
    mirrors: str
    title: str
    differs: str  # from the paper's
    needs: str  # "nothing", "a model" or "training"
    seconds: float  # expected on two cores, beside training
    make: Callable[[Context], Result]
    weight: float = 2.0  # of the budget, beside the others that train


class Context:
    """Where an entry finds its model and how much it may train.

    ``run``: a run's folder or a checkpoint, or None: a model is trained in the folder ``out``/model with the settings
    file ``config``, whose epochs are the most that it gets. ``budget`` are the seconds for all that is trained;
    they are the ``share`` of each entry unless another is set (see `minivit.paper.page.shares_of`). ``device``: where
    all that is done. ``speed(config, task, batch, turns)`` measures what a batch costs, a dict with at least
    images_per_second and peak_memory (`minivit.benchmark.speed.speed`). ``reading``: see `load_with_data`.
    """

    def __init__(self, out, *, run=None, config="paper", data=None, data_dir=None, budget=300.0, suffix=".png",
                 device="cpu", progress=True, speed=None, reading=None):  # fmt: skip
        self.out, self.run, self.config, self.suffix = Path(out), run, config, suffix
        self.share = budget
        self.data = {key: value for key, value in (("data", data), ("data_dir", data_dir)) if value is not None}
        self.device, self.progress, self.speed, self.reading = device, progress, speed, reading or {}

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
            if not plan_of(folder):
                write_plan(folder, {"budget": self.share})
            run_of(self, folder, recipe, self.share, capped=True)
        return folder / LAST

    @cached_property
    def analysed(self):
        """On which data the model is analysed, and how it is read: keywords of `load_with_data`.

        The data are those that were named if its file says none.
        """
        _, record, _ = load_any(self.checkpoint(), named=False, need_head=False, **self.reading)
        name = None if record.data else self.data.get("data")
        return {"name": name, "data_dir": self.data.get("data_dir"), "reading": self.reading}

    @cached_property
    def subject(self):
        """(ViT, Dataset): the model to analyse and the data set that it was trained on."""
        model, _, dataset = load_with_data(self.checkpoint(), **self.analysed)
        return on_device(model, self.device), dataset

    @property
    def description(self):
        """The model in words."""
        model, dataset = self.subject
        c = model.config
        text = f"{dataset.name}, patch {c.patch_size}, width {c.width}, {c.depth} blocks, {c.num_heads} heads"
        summary = read_object(self.checkpoint().parent / SUMMARY)
        try:
            length = length_of(summary["epochs"], summary["settings"]["train"]["steps"])
            return f"{text}; test accuracy {summary['test_accuracy']:.1%} after {length}"
        except (ValueError, KeyError, TypeError):
            return text

    def test_rows(self, count):
        """Rows of so many test images, evenly drawn: in folders they lie class by class."""
        _, dataset = self.subject
        return np.sort(np.random.default_rng(0).permutation(len(dataset.test_images))[:count])

    @cached_property
    def answers(self):
        """Test images, evenly drawn, their labels, and the `analyses.Answer` of the model."""
        model, dataset = self.subject
        rows = self.test_rows(SHEET)
        images = dataset.test_images[rows]
        with quiet_overflow():
            answer = analyses.rollout_maps(model, images)
        check_finite(answer.logits, self.checkpoint())
        return images, dataset.test_labels[rows], answer
