"""A run and what its folder says: records, summary, predictions of its checkpoint, the command to make it again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from minivit.base.errors import InputError
from minivit.base.files import read_object
from minivit.base.settings import field_names
from minivit.data.source import fingerprint
from minivit.evaluation.inference import check_finite, load_with_data, predict_all
from minivit.model import ViT, ViTConfig, preset_fields
from minivit.training.config import TrainConfig, train_config_of
from minivit.training.folder import LAST, METRICS, SUMMARY, read_metrics
from minivit.training.idle import idle
from minivit.training.recipes import FINETUNE, FITTED_DATA, own_settings
from minivit.weights.checkpoint import Record
from minivit.weights.start import MAY_CHANGE, StartConfig


class Run(NamedTuple):
    """A run and what its checkpoint says about the test images."""

    folder: Path
    model: ViT
    record: Record  # of the checkpoint
    train: TrainConfig
    dataset: Any
    same: bool  # are these the images that it was trained and tested on?
    logits: Any  # (n, K), of the test images, on the host
    records: list  # of its metrics.jsonl
    summary: dict  # {} before its end
    own: dict  # the tables of the data set's own settings file


def read_run(folder, *, weights="auto", data_dir=None, workers=0, device="cpu"):
    """The `Run` in a folder, with the predictions of its last checkpoint.

    Raises  InputError: there is none, it is damaged, or its data are missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise InputError(f"{folder} {what}; name the folder of a run, such as runs/digits")
    path = folder / LAST
    if not path.exists():
        raise InputError(
            f"there is no checkpoint at {path}; a report is of a run of minivit train; minivit evaluate "
            "tests a model alone"
        )
    model, record, dataset = load_with_data(path, weights=weights, data_dir=data_dir)
    train = train_config_of(record)
    logits = predict_all(model, dataset.test_images, workers=workers, device=device, flip=train.test_flip)
    check_finite(logits, path)
    data = record.data | ({"data_dir": data_dir} if data_dir else {})
    return Run(
        folder, model, record._replace(data=data), train, dataset, data.get("fingerprint") == fingerprint(dataset),
        logits, records_of(folder), summary_of(folder), own_settings(FINETUNE if record.start else data.get("data")),
    )  # fmt: skip


def number(content, name, default=None):
    """A finite, non-negative number of a dict that comes from a file, or the default if it has none of that name."""
    value = content.get(name) if isinstance(content, dict) else None
    return value if type(value) in (int, float) and 0 <= value < 1e15 else default


def records_of(folder):
    """The records of a run's metrics.jsonl, see `read_metrics`; none if it is no file."""
    path = Path(folder) / METRICS
    return read_metrics(path) if path.is_file() else []


def summary_of(folder):
    """The content of a run's summary.json; {} if there is none yet or it is damaged."""
    return read_object(Path(folder) / SUMMARY)


def defaults_of(config):
    """The values that a settings object would have if none were chosen, as a dict."""
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
    if data.get("test_share"):
        parts.append(["--test-share", str(data["test_share"])])
        if data.get("split_seed"):
            parts.append(["--split-seed", str(data["split_seed"])])
    for key, value in (start or {}).items():
        if key in START_FLAGS and value != START_FLAGS[key][1]:
            flag = START_FLAGS[key][0]
            parts.append([flag] if value is True else [flag, str(value)])
    without_effect = idle(dataclasses.asdict(config) | dataclasses.asdict(train))
    for settings, section in ((config, "model"), (train, "train")):
        file_values, defaults = own.get(section, {}), defaults_of(settings)
        by_preset = preset_fields("Ti/16") if "preset" in file_values else {}  # the sizes that any preset sets
        for key in field_names(type(settings)):
            value = getattr(settings, key)
            needless = value == defaults[key] and file_values.get(key, value) == value and key not in by_preset
            if start and settings is config:  # what is not chosen is the start's
                needless = key in BY_START or file_values.get(key) == value
            if name == FITTED_DATA and key in ("batch_size", "epochs"):  # these would follow the number of images
                needless = False
            if key in FITTED or needless or key in without_effect:
                continue
            flag = "--" + key.replace("_", "-")
            parts.append([flag if value else f"--no-{flag[2:]}"] if type(value) is bool else [flag, str(value)])
    return parts
