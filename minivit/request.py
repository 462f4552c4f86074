"""What a command line asks to be trained: the data, the model and the settings, from settings files and flags.

Whatever trains takes the same flags and the same files: `add_request` puts them on a parser, `settings_of` merges what
was given, `load_requested` fetches the data and fits the model to them.
"""

from __future__ import annotations

from minivit.cli import add_settings, given, read_toml
from minivit.data import DATASETS, load
from minivit.errors import InputError
from minivit.model import ViTConfig, preset_fields
from minivit.settings import field_names
from minivit.train import TrainConfig, check_data

DATA_KEYS = {"data": "digits", "data_dir": "data", "image_size": None}


def add_request(parser, configs):
    """Add the flags; returns the first group of them, for the script's own.

    ``configs`` is the folder (a Path) of the data sets' own settings files, NAME.toml. Settings that are not given are
    absent from the namespace.
    """
    where = parser.add_argument_group("data and output")
    where.add_argument("--data", choices=DATASETS, default=None, help="data set [digits]")
    where.add_argument("--data-dir", metavar="DIR", default=None, help="where the data lie [data]")
    where.add_argument("--config", metavar="FILE.toml", help="settings file [configs/NAME.toml]")
    model = parser.add_argument_group("model")
    model.add_argument("--preset", metavar="NAME", default=None, help="a named size, such as Micro/4 or Ti/16")
    add_settings(model, ViTConfig)
    add_settings(parser.add_argument_group("training"), TrainConfig)
    parser.set_defaults(configs=configs)
    return where


def settings_of(arguments, name=None):
    """The three groups of settings that were asked for: (data, model, train) dicts, files and flags merged.

    ``name`` is the data set whose settings file is read unless a file is named; by default the one asked for.
    Raises  InputError: the file is missing or has a mistake; there is no such preset or data set.
    """
    name = name or arguments.data or DATA_KEYS["data"]
    file = arguments.config or arguments.configs / f"{name}.toml"
    sections = {"data": DATA_KEYS, "model": ["preset", *field_names(ViTConfig)], "train": field_names(TrainConfig)}
    if arguments.config or file.exists():
        content = read_toml(file, sections)
    else:
        content = {section: {} for section in sections}
    flags = {"data": arguments.data, "data_dir": arguments.data_dir}
    data = DATA_KEYS | content["data"] | {key: value for key, value in flags.items() if value is not None}
    check_data(data, file)
    if data["data"] not in DATASETS:
        raise InputError(f"{file}: unknown data set {data['data']!r}; choose one of {', '.join(DATASETS)}")
    model = sizes_of(content["model"].pop("preset", None)) | content["model"]
    model |= sizes_of(arguments.preset) | given(arguments, ViTConfig)  # what was typed wins over any file
    train = content["train"] | given(arguments, TrainConfig)
    return data, model, train


def sizes_of(preset):
    """The sizes that a preset sets; what follows the data stays out unless it is asked for by name."""
    fields = {} if preset is None else preset_fields(preset)
    return {name: value for name, value in fields.items() if name not in ("image_size", "channels", "num_classes")}


def load_requested(data, model):
    """Read the data set that was asked for and fit the model to its pictures and classes.

    ``data`` and ``model`` are dicts of `settings_of`.
    Returns  (`minivit.data.Dataset`, `ViTConfig`, a dict that says how to find the data again)
    Raises   InputError: the data are missing or damaged; an impossible model.
    """
    image_size = data["image_size"] or (model.get("image_size") if data["data"] == "folder" else None)
    dataset = load(data["data"], data["data_dir"], image_size=image_size)
    _, size, _, channels = dataset.train_images.shape
    fitted = {"image_size": size, "channels": channels, "num_classes": len(dataset.class_names)}
    describe = {"data": data["data"], "data_dir": str(data["data_dir"]), "image_size": image_size}
    return dataset, ViTConfig(**{**fitted, **model}), describe
