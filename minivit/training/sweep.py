"""Sweeps: settings side by side over seeds, resumable, with a table of means and spreads.

A sweep is a TOML file:

    title = "what each ingredient gives"
    config = "cifar10"                # the settings file all rows start from, by path or name
    seeds = [0, 1, 2]

    [base.schedule]                   # changes for all rows, in the tables of settings files
    epochs = 7

    [[row]]
    name = "AdamW"
    optimizer.optimizer = "adamw"     # what this row changes: TABLE.KEY

In ``start.checkpoint`` "{seed}" stands for the run's seed: runs of another sweep, seed by seed.
Every run has a folder of its own, OUT/ROW-seedS, and is an ordinary run. One that is finished is left alone, and so is
one that diverged, which would do so again; one that stopped goes on. The figure of a run is its test accuracy after the
last epoch, never its best.
"""

from __future__ import annotations

import functools
import json
import math
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from minivit.base.errors import InputError
from minivit.base.files import parse_toml, read_object, write_atomically, write_json
from minivit.base.settings import defaults_of, refuse_unknown
from minivit.data import FOLDERS, load
from minivit.data.source import DATA_KEYS
from minivit.model import ViTConfig
from minivit.training.config import FREE_ON_RESUME, TrainConfig, train_config_of, without_removed
from minivit.training.folder import SETTINGS, SUMMARY, last_checkpoint
from minivit.training.plan import plan_of
from minivit.training.recipes import (
    FITTED_DATA,
    SECTIONS,
    TABLES,
    Recipe,
    find_config,
    in_sections,
    prepare,
    read_recipe,
)
from minivit.training.task import Classification
from minivit.training.trainer import Diverged, Trainer
from minivit.weights.start import StartConfig

TABLE = "table.json"
DIVERGED = "diverged.json"  # in the folder of a run that did: its settings, and the step
KEYS = ("title", "config", "seeds", "base", "row")
DEFAULTS = {
    "data": DATA_KEYS,
    "model": defaults_of(ViTConfig),
    "train": defaults_of(TrainConfig),
    "start": defaults_of(StartConfig),
}
FITTED = ("image_size", "channels", "num_classes")  # settings of a model that follow the data
CHOSEN = ("workers", "micro_batch")  # where these are 0, the run writes what it chose
# Where a run was made, and what changes none of its figures; not the precision, in which alone rows may differ.
FREE = ("data_dir", "device", "gpu_micro_batch", "graph", *FREE_ON_RESUME)


class Row(NamedTuple):
    """One setting of a sweep."""

    name: str
    changes: dict  # what differs from the base, {"optimizer": "adamw", ...}
    recipe: Recipe  # without its seed


class Sweep(NamedTuple):
    """What to run."""

    title: str
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]


class Run(NamedTuple):
    """One run of a sweep."""

    row: Row
    seed: int
    folder: Path


def read_sweep(path):
    """Read a sweep's file.

    Raises  InputError: no such file, not TOML, unknown or impossible entries, two rows of one name.
    """
    path = Path(path)
    content = parse_toml(path, "sweep")
    refuse_unknown(content, KEYS, path)
    seeds, rows = content.get("seeds", [0]), content.get("row")
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise InputError(f"{path}: seeds must be a list of whole numbers from 0 on, such as [0, 1, 2]")
    if len(set(seeds)) < len(seeds):
        raise InputError(f"{path}: a seed is named twice")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: nothing to run; each setting is a [[row]] with a name")
    file = content.get("config")
    if file is not None and not isinstance(file, str):
        raise InputError(f"{path}: config must be the name of a settings file")
    file = find_config(file) if file else None
    base = _sections(content.get("base", {}), f"{path} [base]")
    entries = []
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        refuse_unknown(row, ("name", *TABLES), where)
        name = row.get("name")
        if not isinstance(name, str) or not name.strip():
            raise InputError(f"{where} has no name")
        own = _sections({key: value for key, value in row.items() if key != "name"}, f"{where} ({name})")
        merged = {section: base[section] | own[section] for section in SECTIONS}
        preset = merged["model"].pop("preset", None)
        recipe = read_recipe(file, preset=preset, **merged)
        entries.append(Row(name, {key: value for section in own.values() for key, value in section.items()}, recipe))
    folders = [folder_name(row.name, 0) for row in entries]
    if repeated := {row.name for row, folder in zip(entries, folders, strict=True) if folders.count(folder) > 1}:
        raise InputError(f"{path}: two rows are called alike: {', '.join(sorted(repeated))}")
    title = content.get("title", path.stem)
    if not isinstance(title, str):
        raise InputError(f"{path}: title must be a text")
    return Sweep(title, tuple(seeds), tuple(entries))


def _sections(content, where):
    """The settings of a part of the file, by sections, see `in_sections`, each perhaps empty."""
    if not isinstance(content, dict):
        raise InputError(f"{where} must have the tables {', '.join(TABLES)}")
    sections = in_sections(content, where)
    if "seed" in sections["train"]:
        raise InputError(f"{where}: seeds stand at the head of the file")
    return sections


def folder_name(name, seed):
    """The folder of a run."""
    return f"{re.sub(r'[^a-z0-9.]+', '-', name.lower()).strip('-')}-seed{seed}"


def runs_of(sweep, out):
    """Every run, seed by seed, so that a sweep that is stopped has compared all rows on the seeds that it had."""
    return [Run(row, seed, Path(out) / folder_name(row.name, seed)) for seed in sweep.seeds for row in sweep.rows]


def recipe_of(run):
    """The recipe of a run, with its seed."""
    recipe, start = run.row.recipe, dict(run.row.recipe.start)
    if isinstance(start.get("checkpoint"), str):
        start["checkpoint"] = start["checkpoint"].replace("{seed}", str(run.seed))
    return recipe._replace(train=recipe.train | {"seed": run.seed}, start=start)


def going_on(recipe, last):
    """The recipe, with the threads and the micro-batch that a run chose which stopped.

    ``last`` is its checkpoint, as `last_checkpoint` gives it; without one the recipe stays as it is.
    """
    if last is None:
        return recipe
    config = train_config_of(last[1])
    chosen = {key: getattr(config, key) for key in CHOSEN if not recipe.train.get(key)}
    return recipe._replace(train=recipe.train | chosen)


def result_of(run, *, free=()):
    """What a finished run's summary says, or None: {"accuracy", "seconds", "epochs", "parameters"}.

    Of a run that diverged {"diverged": the step}. ``free`` are settings of the training that may be others than asked.
    Raises  InputError: the folder holds a finished run of other settings.
    """
    summary, noted = (read_object(run.folder / name) for name in (SUMMARY, DIVERGED))
    names = {"accuracy": "test_accuracy", "seconds": "train_seconds", "epochs": "epochs", "parameters": "parameters"}
    result = {key: summary.get(name) for key, name in names.items()}
    if not _is_result(result):
        summary, result = noted, {"diverged": noted.get("step")}
    settings = summary.get("settings")
    tables = settings.values() if isinstance(settings, dict) else [None]
    if not _is_result(result) or not all(isinstance(table, dict) for table in tables):
        return None  # there is none, or it is damaged
    without_removed(settings.get("train", {}), run.folder)
    for section, values in _expected(recipe_of(run), settings).items():
        for key, value in values.items():
            actual = settings.get(section, {}).get(key, DEFAULTS[section][key])  # earlier versions had fewer
            if actual != value and key not in (*FREE, *free):
                raise InputError(
                    f"{run.folder} holds a run with {key} {actual!r}, the sweep asks for {value!r}; choose another "
                    "--out"
                )
    return result


def _is_result(result):
    """Is this what `result_of` says of a run, with a finite number for each name? Files may be damaged."""
    return (
        isinstance(result, dict)
        and result.keys() in ({"diverged"}, {"accuracy", "seconds", "epochs", "parameters"})
        and all(type(value) in (int, float) and abs(value) < 1e15 for value in result.values())
    )


def _expected(recipe, settings):
    """The settings that a run of the recipe has, section by section; what the data or the run choose is left out.

    ``settings`` are those of the run in question.
    """
    data, model, train, start = recipe
    follow = {"batch_size", "epochs"} - train.keys() if data["data"] == FITTED_DATA else set()
    data, train = dict(data), DEFAULTS["train"] | train
    if model.get("image_size") or (start and data["data"] in FOLDERS and not data["image_size"]):
        del data["image_size"]  # the model's is compared; or it is the start's
    if not start:  # otherwise what is not asked for is the start's
        model = {key: value for key, value in DEFAULTS["model"].items() if key not in FITTED} | model
    if model.get("mlp_dim") == 0:
        model = model | {"mlp_dim": 4 * model.get("width", settings.get("model", {}).get("width", 0))}
    left_out = follow | {key for key in CHOSEN if not train[key]} | ({"epochs"} if train["steps"] else set())
    train = {key: value for key, value in train.items() if key not in left_out}
    return {"data": data, "model": model, "train": train, "start": DEFAULTS["start"] | start}


def mean_and_spread(values):
    """(mean, sample standard deviation or None for one value)."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def known_results(out):
    """Results of an earlier table.json in the folder: {(row's name, its recipe, seed): result}.

    A run's folder may so be deleted, and its figure stays.
    """
    try:
        return {
            (row["name"], _written(row["recipe"]), int(seed)): result
            for row in read_object(Path(out) / TABLE)["rows"]
            for seed, result in row["runs"].items()
            if _is_result(result)
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def results_of(sweep, out):
    """The results of all runs that are finished or diverged: {(row's name, seed): what `result_of` says}."""
    known, results = known_results(out), {}
    for run in runs_of(sweep, out):
        result = result_of(run) or known.get((run.row.name, _written(run.row.recipe._asdict()), run.seed))
        if result:
            results[run.row.name, run.seed] = result
    return results


def _written(recipe):
    """A recipe as text, the same whether or not it names what is not asked for."""
    settings = {name: {k: v for k, v in section.items() if v is not None} for name, section in recipe.items()}
    return json.dumps({name: section for name, section in settings.items() if section}, sort_keys=True)


def table_of(sweep, out):
    """The figures of all finished runs, ready for JSON: one entry per row, in the file's order.

    Each has its ``runs``, seed by seed, the step at which others ``diverged``, the runs' ``mean`` accuracy, ``spread``
    (the sample standard deviation), and ``gain``: the mean over the seeds that both have of its accuracy less the first
    row's, with ``gain_error``, that mean's standard error.
    """
    results, rows, first = results_of(sweep, out), [], {}
    for row in sweep.rows:
        ended = {seed: results[row.name, seed] for seed in sweep.seeds if (row.name, seed) in results}
        runs = {seed: run for seed, run in ended.items() if "diverged" not in run}
        entry = {
            "name": row.name, "changes": row.changes, "recipe": row.recipe._asdict(),
            "runs": {str(seed): run for seed, run in runs.items()},
            "diverged": {str(seed): run["diverged"] for seed, run in ended.items() if seed not in runs},
            "mean": None, "spread": None, "gain": None, "gain_error": None, "seconds": None, "epochs": None,
        }  # fmt: skip
        if runs:
            entry["mean"], entry["spread"] = mean_and_spread([run["accuracy"] for run in runs.values()])
            entry["epochs"] = mean_and_spread([run["epochs"] for run in runs.values()])[0]
            entry["seconds"] = min(run["seconds"] for run in runs.values())  # others may have had company
            if gains := [run["accuracy"] - first[seed]["accuracy"] for seed, run in runs.items() if seed in first]:
                gain, spread = mean_and_spread(gains)
                entry |= {"gain": gain, "gain_error": None if spread is None else spread / math.sqrt(len(gains))}
        first = runs if row is sweep.rows[0] else first
        rows.append(entry)
    return {"title": sweep.title, "seeds": list(sweep.seeds), "rows": rows}


def markdown(table):
    """The table as Markdown."""

    def percent(value, sign=""):
        return "" if value is None else f"{100 * value:{sign}.2f}"

    lines = [
        f"# {table['title']}", "",
        f"Test accuracy after the last epoch, per cent: mean over the seeds {', '.join(map(str, table['seeds']))} "
        "± standard deviation; gain over the first row, seed by seed, ± standard error; seconds of the quickest run.",
        "",
        "| | changes | accuracy | gain | each seed | epochs | seconds |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in table["rows"]:
        changes = ", ".join(f"{key} {value}" for key, value in row["changes"].items()) or "as the settings file"
        spread = f" ± {percent(row['spread'])}" if row["spread"] is not None else ""
        error = f" ± {percent(row['gain_error'])}" if row["gain_error"] is not None else ""
        gain = f"{percent(row['gain'], '+')}{error}" if row["gain"] is not None else ""
        shown = {seed: percent(run["accuracy"]) for seed, run in row["runs"].items()}
        shown |= {seed: f"diverged at step {step}" for seed, step in row["diverged"].items()}
        each = " ".join(shown[seed] for seed in map(str, table["seeds"]) if seed in shown)
        epochs, seconds = (f"{row[key]:,.0f}" if row[key] is not None else "" for key in ("epochs", "seconds"))
        none = "" if row["diverged"] else "not run yet"
        mean = f"{percent(row['mean'])}{spread}" if row["mean"] is not None else none
        lines.append(f"| {row['name']} | {changes} | {mean} | {gain} | {each} | {epochs} | {seconds} |")
    return "\n".join(lines) + "\n"


def write_table(sweep, out, draw=None):
    """Write table.md, table.json and, where ``draw(path, table)`` draws it, sweep.png; returns the Markdown."""
    table = table_of(sweep, out)
    text = markdown(table)
    write_json(Path(out) / TABLE, table)
    write_atomically(Path(out) / "table.md", lambda file: file.write(text.encode()))
    if draw:
        draw(Path(out) / "sweep.png", table)
    return text


def carry_out(runs, after, *, device=None, progress=True, **keywords):
    """Make runs one after the other, each from where it stopped; ``after()`` is called after each.

    ``device``: where they are made, if not where their settings say. Results of several devices are one table's.
    ``keywords`` are those of `Trainer`. A run that diverges is noted in its folder, and the others are made.

    Returns  whether all were made; False if a signal stopped one
    Raises  InputError: one has impossible settings: all rows, and all that they start from, are looked at before the
            first begins.
    """
    ready = prepare_all(runs, device)
    for number, each in enumerate(runs, start=1):
        print(f"\n{number} of {len(runs)}: {each.row.name}, seed {each.seed}", flush=True)
        dataset, model, config, begins = ready[_kind_of(each)]
        last, recipe = last_checkpoint(each.folder), recipe_of(each)
        recipe = going_on(recipe, last)
        config = replace(config, seed=each.seed, **{key: recipe.train.get(key, 0) for key in CHOSEN})
        trainer = Trainer(dataset, model, config, each.folder, resume=last, progress=progress, **begins, **keywords)
        started_at = time.monotonic()
        try:
            summary = trainer.run()
        except Diverged as error:
            settings = json.loads((each.folder / SETTINGS).read_text(encoding="utf-8"))
            write_json(each.folder / DIVERGED, {"step": trainer.state.step, "settings": settings})
            print(f"{each.row.name}, seed {each.seed}: {error}", flush=True)
        else:
            if summary is None:
                return False
            print(f"{each.row.name}, seed {each.seed}: {summary['test_accuracy']:.2%} "
                  f"in {time.monotonic() - started_at:.0f} s", flush=True)  # fmt: skip
        after()
    return True


def _kind_of(run):
    """What runs have in common that differ by their seed alone: their row and what they start from."""
    return run.row.name, recipe_of(run).start.get("checkpoint")


def prepare_all(runs, device=None):
    """What `prepare` says of each kind of run, see `_kind_of`, the same data loaded once: a dict.

    Raises  InputError: one has impossible settings.
    """
    load_once, ready = functools.cache(load), {}
    for each in runs:
        if (kind := _kind_of(each)) in ready:
            continue
        recipe = recipe_of(each)
        if device:
            recipe = recipe._replace(train=recipe.train | {"device": device})
        dataset, model, config, begins = ready[kind] = prepare(recipe, load_once)
        plan_of(dataset, model, config, Classification(dataset, model, config), start=begins["start"])
    return ready
