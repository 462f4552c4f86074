"""Settings files, and the runs that are made of them.

A settings file is TOML. Its tables are [data], [model] (with ``preset`` in it), [augmentation], [optimizer],
[schedule], [machine] and [log], see `minivit.training.config`, and [start], see `minivit.weights.start`; their keys are
the names of the settings. Files of earlier versions have all settings of the training in one table, [train]. Those that
come with minivit lie in configs/ and are known by their names.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NamedTuple

from minivit.base.errors import InputError
from minivit.base.files import check_tables, parse_toml
from minivit.base.settings import field_names
from minivit.data import DATASETS, FOLDERS, load
from minivit.data.source import DATA_KEYS, check_data, refuse_idle_data
from minivit.model import ViTConfig, preset_fields
from minivit.training.config import GROUPS, REMOVED, TrainConfig, without_removed
from minivit.training.plan import fitted
from minivit.training.trainer import Trainer
from minivit.weights.start import StartConfig, prepare_start, read_start

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
FINETUNE = "finetune"  # the settings file of runs that begin with a trained model, unless they name another
OF_GROUPS = {table: field_names(group) for table, group in GROUPS.items()}
TABLES = {
    "data": [*DATA_KEYS, *OF_GROUPS["data"]],
    "model": ["preset", *field_names(ViTConfig), *OF_GROUPS["model"]],
    **{table: names for table, names in OF_GROUPS.items() if table not in ("data", "model")},
    "start": field_names(StartConfig),
    "train": [*field_names(TrainConfig), *REMOVED],
}
FITTED_DATA = "folder"  # data whose batch size and epochs follow the number of images, see `fitted`
SECTIONS = ("data", "model", "train", "start")  # of a recipe


class Recipe(NamedTuple):
    """Settings that were asked for; those that are absent have their defaults."""

    data: dict  # of `DATA_KEYS`
    model: dict  # of `ViTConfig`
    train: dict  # of `TrainConfig`
    start: dict = {}  # of `StartConfig`


def in_sections(content, where, tables=TABLES):
    """The tables of a settings file as the sections of a recipe: those of the training's groups become "train".

    ``tables`` are those that there may be, with their keys; others than `TABLES` stay as they are.
    Returns  {section: {key: value}} with every section present
    Raises  InputError: an unknown or removed setting, one in the wrong table, or one that stands in two.
    """
    for table, values in content.items():
        for name in values if isinstance(values, dict) and table in tables else ():
            home = next((home for home, names in OF_GROUPS.items() if name in names), None)
            if home and name not in tables[table]:
                raise InputError(f"{where}: {name} stands in [{table}], it belongs in [{home}]")
    check_tables(content, tables, where)
    sections = {name: {} for name in SECTIONS} | {name: {} for name in tables if name not in TABLES}
    for table in (name for name in tables if name in content):  # [train] is the last
        for name, value in (without_removed(content[table], where) if table == "train" else content[table]).items():
            section = sections["train" if table in OF_GROUPS and name in OF_GROUPS[table] else table]
            if name in section:
                raise InputError(f"{where}: {name} stands in [train] and in another table; leave one of them out")
            section[name] = value
    return sections


def find_config(name, folder="", what="settings file"):
    """The path of a settings file: a file of that name, or minivit/configs/NAME.toml.

    ``folder`` is where in configs/ to look, ``what`` is what a message calls the file.
    Raises  InputError: there is neither; the message lists those of the folder.
    """
    own = own_config(name, folder)
    if own and not Path(name).is_file():
        return own
    if Path(name).exists() or "/" in str(name) or str(name).endswith(".toml"):
        return Path(name)
    known = ", ".join(sorted(path.stem for path in (CONFIGS / folder).glob("*.toml")))
    raise InputError(f"there is no {what} {name}; those that come with minivit are {known}")


def own_config(name, folder=""):
    """The path of the settings file minivit/configs/NAME.toml, or of one in a folder there; None if there is none."""
    path = CONFIGS / folder / f"{name}.toml"
    return path if path.exists() else None


def own_settings(name):
    """The sections of minivit/configs/NAME.toml, see `in_sections`; {} if there is none that can be read."""
    path = own_config(name)
    try:
        return in_sections(parse_toml(path), path) if path else {}
    except (InputError, OSError):
        return {}


def sizes_of(preset):
    """The sizes that a preset sets; what follows the data stays out unless it is asked for by name."""
    fields = {} if preset is None else preset_fields(preset)
    return {name: value for name, value in fields.items() if name not in ("image_size", "channels", "num_classes")}


def read_recipe(file, *, data=None, preset=None, model=None, train=None, start=None, tables=TABLES):
    """A settings file, or None for none, with settings that win over it: a `Recipe`.

    Epochs that are asked for also win over the file's steps. ``tables``: see `in_sections`.
    Raises  InputError: no such file, an unknown or impossible setting of the data.
    """
    content = in_sections(parse_toml(file) if file else {}, file, tables)
    merged = DATA_KEYS | content["data"] | (data or {})
    where = file or "the settings"
    check_data(merged, where)
    if merged["data"] not in DATASETS:
        raise InputError(f"{where}: unknown data set {merged['data']!r}; choose one of {', '.join(DATASETS)}")
    named = data or {}  # other data than the file's take no more of it than they need
    refuse_idle_data(merged["data"], named if "data" in named else content["data"] | named)
    if merged["data"] not in FOLDERS:
        merged |= {key: DATA_KEYS[key] for key in ("test_share", "split_seed")}
    sizes = sizes_of(content["model"].pop("preset", None)) | content["model"]
    train = train or {}
    if "epochs" in train and "steps" not in train:
        content["train"].pop("steps", None)
    return Recipe(
        merged, sizes | sizes_of(preset) | (model or {}), content["train"] | train, content["start"] | (start or {})
    )


def prepare(recipe, load_data=None):
    """Data and settings of a run: (Dataset, ViTConfig that fits it, TrainConfig, how it begins).

    The last are keyword arguments of `Trainer`: ``describe``, what a checkpoint says of the data, and ``start``.
    ``load_data`` takes the place of `minivit.data.load`, for callers that remember what was loaded.

    Raises  InputError: impossible settings, or the data or the checkpoint to start from are missing or damaged.
    """
    data, model, train, start = recipe
    config, start = TrainConfig(**train), StartConfig(**start)
    image_size = model.get("image_size") or data["image_size"]
    source = read_start(start, model) if start.checkpoint else None
    if source and not image_size and data["data"] in FOLDERS:  # whose images have no size of their own
        image_size = source[0].config.image_size
    kept = {key: data[key] for key in ("classes", "train_share")}
    if data.get("test_share"):
        kept |= {key: data[key] for key in ("test_share", "split_seed")}
    dataset = (load_data or load)(data["data"], data["data_dir"], image_size=image_size, **kept)
    _, size, _, channels = dataset.train_images.shape
    fields = {"image_size": size, "channels": channels, "num_classes": len(dataset.class_names), **model}
    describe = {**data, "data_dir": str(data["data_dir"]).replace(os.sep, "/"), "image_size": image_size}
    if data["data"] == FITTED_DATA:
        config = TrainConfig(**fitted(train, len(dataset.train_images)))
    if not start.checkpoint:
        return dataset, ViTConfig(**fields), config, {"describe": describe, "start": None}
    begun, begins = prepare_start(start, fields, dataset.class_names, source)
    if not image_size and size != (before := source[0].config.image_size):
        print(
            f"note: the model goes on at the size of the data, {size}x{size} pixels; {start.checkpoint} is of "
            f"{before}x{before}, to which --image-size {before} scales the data",
            file=sys.stderr,
        )
    return dataset, begun, config, {"describe": describe, "start": begins}


def trainer_of(recipe, out, **keywords):
    """A `Trainer` of a recipe, with other keyword arguments of `Trainer`: by default at the beginning of a new run.

    Raises  InputError
    """
    dataset, model, config, begins = prepare(recipe)
    return Trainer(dataset, model, config, out, **begins, **keywords)
