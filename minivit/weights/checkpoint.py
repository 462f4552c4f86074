"""Checkpoints: one ``.npz`` file that anybody can read with NumPy, written so that no crash costs the previous one.

Inside are named arrays and ``meta``, a JSON text with everything that is not an array:

    params/NAME       the parameters, with the names and shapes of `minivit.model.parameter_table`
    ema/NAME          their moving average, if the run keeps one
    optimizer/NAME    the optimiser's state vectors, flat
    order             the order of the images in the epoch under way
    meta              format, configuration, settings, class names, progress

    >>> import json, numpy as np
    >>> with np.load("runs/digits/last.npz") as checkpoint:                             # doctest: +SKIP
    ...     meta, head = json.loads(str(checkpoint["meta"])), checkpoint["params/head.weight"]

Arrays are stored uncompressed and without pickles. Reading believes nothing: names, types and sizes are compared with
the file's own length before memory is taken, and each array's checksum (CRC-32, part of the zip format) is verified.
"""

from __future__ import annotations

import errno
import json
import platform
import unicodedata
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minivit import __version__
from minivit.base import params as parameters
from minivit.base.backend import to_host
from minivit.base.errors import InputError
from minivit.base.files import write_atomically
from minivit.base.finite import is_finite
from minivit.base.settings import settings_of
from minivit.layers.block import BLOCK_PARAMETERS
from minivit.model import ViT, ViTConfig, parameter_table
from minivit.weights.preprocessing import Preprocessing, of_meta
from minivit.weights.tensor_files import read_npy

FORMAT = "minivit checkpoint"
VERSION = 1


def save(path, arrays, meta):
    """Write arrays and meta as a checkpoint, atomically.

    Raises  OSError: see `write_atomically`.
    """
    meta = {"format": FORMAT, "version": VERSION, **meta}
    arrays = {name: to_host(array) for name, array in arrays.items()}
    write_atomically(path, lambda file: np.savez(file, meta=np.array(json.dumps(meta)), **arrays))


def named_arrays(prefix, flat, table):
    """The views of a flat buffer under ``prefix/NAME``, for `save`."""
    return {f"{prefix}/{name}": view for name, view in parameters.views(flat, table).items()}


def _read_members(path):
    """All arrays of an uncompressed ``.npz`` file by name."""
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(m.compress_type != zipfile.ZIP_STORED or m.file_size != m.compress_size for m in members):
            raise ValueError("it is compressed")
        if any(m.comment for m in members):  # NumPy writes none; a damaged length swallows the entries that follow
            raise ValueError("its directory is damaged")
        if sum(m.file_size for m in members) > path.stat().st_size:
            raise ValueError("its parts overlap")
        for m in members:
            name = m.filename.removesuffix(".npy")
            if name in arrays:
                raise ValueError(f"it holds {name} twice")
            arrays[name] = read_npy(archive.read(m), name)  # read() verifies the checksum
    return arrays


def load(path):
    """Read a checkpoint: (arrays, meta).

    Raises  InputError: no such file, or it is not a whole, unaltered checkpoint of this version.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"there is no checkpoint at {path}")
    if path.is_dir():
        raise InputError(f"{path} is a folder; name the checkpoint in it, such as {path / 'last.npz'}")
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    try:
        arrays = _read_members(path)
        meta = json.loads(str(arrays.pop("meta", "")))
        if meta["format"] != FORMAT:
            raise ValueError("its format is another one")
    except Exception as error:  # zipfile and NumPy raise nearly anything for a broken file
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno != errno.EINVAL):
            raise  # the file is not to blame; EINVAL is a seek to before its beginning
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is not a minivit checkpoint, or it is truncated or altered ({detail})") from None
    if meta.get("version") != VERSION:
        raise InputError(f"{path} has checkpoint version {meta.get('version')}; this minivit reads {VERSION}")
    return arrays, meta


class Record(NamedTuple):
    """What a checkpoint, or another program's file, says of its model and of the run that made it.

    What it does not say, or says in a form that cannot be read, is None; of the data it is {}.
    """

    path: Any  # of the file, as the user named it
    config: ViTConfig
    class_names: list | None = None
    weights: str = "params"  # which of its parameters a model was made of: "params", or "ema", their moving average
    data: dict = {}  # how to find the data set: data, data_dir, image_size, classes, train_share, name, fingerprint
    settings: dict | None = None  # of the training
    start: dict | None = None  # where the run's first parameters came from: see `minivit.weights.start.Start`
    pretraining: dict | None = None  # of a masked model
    progress: dict | None = None  # how far the run was
    versions: dict | None = None
    preprocessing: Preprocessing | None = None  # of its images, if they are cut as another program does


def record_of(meta, path):
    """The `Record` of a checkpoint's meta.

    Raises  InputError: the model's configuration is missing, or holds unknown or impossible settings.
    """
    if not isinstance(meta.get("config"), dict):
        raise InputError(f"{path} does not say which model it holds")
    names = meta.get("class_names")
    known = isinstance(names, list) and all(isinstance(name, str) for name in names)
    tables = ("settings", "start", "pretraining", "progress", "versions")
    return Record(
        path=path,
        config=settings_of(ViTConfig, meta["config"], path),
        class_names=names if known else None,
        data=meta["data"] if isinstance(meta.get("data"), dict) else {},
        preprocessing=of_meta(meta.get("preprocessing"), path),
        **{name: meta[name] if isinstance(meta.get(name), dict) else None for name in tables},
    )


def read(path):
    """A checkpoint's arrays and its `Record`.

    Raises  InputError: see `load` and `record_of`; it announces more blocks than it holds.
    """
    arrays, meta = load(path)
    record = record_of(meta, path)
    depth = record.config.depth
    if depth * len(BLOCK_PARAMETERS) > len(arrays):  # before anybody builds a table of any length
        raise InputError(f"{path} holds fewer blocks than the {depth} it announces")
    return arrays, record


def check_size(arrays, table, path):
    """Raises InputError if a checkpoint's arrays hold fewer numbers than a model has parameters."""
    if (size := parameters.count(table)) > sum(array.size for array in arrays.values()):
        raise InputError(f"{path} holds fewer numbers than the {size:,} parameters of its model")


def class_names_of(record):
    """The class names of a `Record`, one for each class of its model.

    Raises  InputError: they are missing, or there are more or fewer.
    """
    names, classes = record.class_names, record.config.num_classes
    if names is None:
        raise InputError(f"{record.path} does not say what its classes are called")
    if len(names) != classes:
        raise InputError(f"{record.path} has a model of {classes} classes and names for {len(names)}")
    return names


def class_order(names, wanted):
    """Where each of the ``wanted`` class names stands among ``names``; None unless both have the same, each once.

    Lists that are equal may hold a name twice. Letters with marks are the same however they are written (NFC).
    """
    names, wanted = ([unicodedata.normalize("NFC", name) for name in each] for each in (names, wanted))
    if names == wanted:
        return list(range(len(names)))
    if len(set(names)) != len(names) or sorted(names) != sorted(wanted):
        return None
    numbers = {name: k for k, name in enumerate(names)}
    return [numbers[name] for name in wanted]


def few_classes(record):
    """The first few of a model's class names, for a message; and what to do where its file named none."""
    names = record.class_names or []
    few = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    numbered = names and names == [f"class {k}" for k in range(len(names))]
    return few + (" (minivit convert --class-names FILE gives them their names)" if numbered else "")


def versions():
    """Versions of what the numbers depend on, for files that are written."""
    return {"minivit": __version__, "python": platform.python_version(), "numpy": np.__version__}


def fill(flat, table, arrays, prefix, path):
    """Copy the arrays ``prefix/NAME`` of a checkpoint into a flat buffer.

    Raises  InputError: an array is missing, has another shape or is not finite; the buffer is unchanged then.
    """
    values = {}
    for spec in table:
        array = arrays.get(f"{prefix}/{spec.name}")
        if array is None:
            raise InputError(f"{path} lacks {prefix}/{spec.name}")
        if array.shape != spec.shape:
            raise InputError(f"{path}: {prefix}/{spec.name} has shape {array.shape}, the model needs {spec.shape}")
        if not is_finite(array):
            raise InputError(f"{path}: {prefix}/{spec.name} holds values that are not finite numbers")
        values[spec.name] = array
    for name, view in parameters.views(flat, table).items():
        view[...] = values[name]


def flat_parameters(arrays, record, table_of, weights="auto"):
    """The parameters that a checkpoint holds for a model: (flat float32 buffer, "params" or "ema").

    ``table_of()`` makes the model's parameter table. ``weights``: "params", "ema" (the moving average), or "auto": the
    average if there is one.
    Raises  InputError: there is no average, or see `fill`.
    """
    path = record.path
    has_average = any(name.startswith("ema/") for name in arrays)
    if weights == "ema" and not has_average:
        raise InputError(f"{path} holds no moving average; use the plain weights")
    prefix = "ema" if has_average and weights != "params" else "params"
    table = table_of()
    check_size(arrays, table, path)
    flat = np.empty(parameters.count(table), np.float32)
    fill(flat, table, arrays, prefix, path)
    return flat, prefix


def load_model(path, *, weights="auto"):
    """A `ViT` from a checkpoint, and the checkpoint's `Record`, whose ``weights`` say which were taken.

    ``weights`` are as in `flat_parameters`.
    Raises  InputError: see `load`, `record_of` and `flat_parameters`.
    """
    arrays, record = read(path)
    flat, prefix = flat_parameters(arrays, record, lambda: parameter_table(record.config), weights)
    return ViT(record.config, flat=flat), record._replace(weights=prefix)


def model_meta(config):
    """The part of meta that describes the model."""
    return {"config": asdict(config)}
