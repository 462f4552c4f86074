"""What the scripts do with a trained model: load it with its data, run it over many images, see what it looks at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tqdm import tqdm

from minivit.base.backend import to_device, to_host, use_device
from minivit.base.errors import InputError
from minivit.base.finite import quiet_overflow
from minivit.data import FOLDERS, load, with_mirror_images
from minivit.data.source import check_fit, dataset_of, refuse_idle_data
from minivit.model import ViT
from minivit.training.engines.cpu import Engine
from minivit.training.engines.gpu import CudaEngine
from minivit.weights.layouts import load_with_notes

CHUNK = 512  # images between two steps of the progress bar


def load_with_data(path, *, weights="auto", name=None, data_dir=None, other_classes=False, reading=None):
    """A checkpoint's model and its `Record` (see `checkpoint.load_model`), and the data set that it is tested on.

    ``other_classes``: the data set that is named may have others than the model. ``reading``: what the user says of
    weights of another program, see `minivit.weights.layouts.describe`.
    Returns  (ViT, Record, Dataset)
    Raises  InputError: the checkpoint or the data are missing or damaged, or the images or classes are not the
    model's.
    """
    path = Path(path)
    model, record = load_with_notes(path, weights=weights, need_head=not other_classes or name is None, **reading or {})
    if record.pretraining is not None and not other_classes:
        raise InputError(
            f"{path} is of pre-training, its head knows no classes yet; minivit train --from begins with it, "
            "minivit visualize masked shows it"
        )
    c = model.config
    if name is not None and other_classes:
        refuse_idle_data(name, {"data_dir": data_dir})
        own = {"image_size": c.image_size, "preprocessing": record.preprocessing} if name in FOLDERS else {}
        dataset = load(name, data_dir or "data", **own)
    else:
        dataset = dataset_of(record, name=name, data_dir=data_dir)
    check_fit(dataset, c, path, classes=not other_classes)
    return model, record, dataset


def on_device(model, device):
    """The model with its parameters on a device of `find_device`, which becomes the one in use."""
    use_device(device)
    return ViT(model.config, flat=to_device(model.flat, device))


def predict_all(model, images, *, workers=0, micro_batch=0, device="cpu", flip=False, features=False):
    """Logits of all images on the host, with a progress bar if it takes over a second.

    Shapes  images (n, H, W, C)  ->  logits (n, K); with ``features`` what the head reads, see `ViT.features`
    With ``flip``, an image's logits are the mean of its own and of its mirror image's.
    """
    bar = tqdm(total=(2 if flip else 1) * len(images), desc="images", unit="", delay=1, disable=None)
    if device == "cpu":
        engine = Engine(model, workers=workers, micro_batch=micro_batch)
    else:
        engine = CudaEngine(on_device(model, device))

    def predict(view):
        parts = []
        for i in range(0, len(view), CHUNK):
            chunk = to_device(view[i : i + CHUNK], device)
            parts.append(to_host(engine.predict(chunk, features=features)))
            bar.update(len(parts[-1]))
        return np.concatenate(parts)

    with engine, bar, quiet_overflow():
        return with_mirror_images(predict, images, flip)


def check_finite(numbers, path, what="logits"):
    """Raises InputError if a checkpoint's logits hold a number that is not finite."""
    if not np.isfinite(numbers).all():
        raise InputError(f"{path} gives {what} that are not finite numbers: its parameters are far too large")


def attention_map(attention, pooling, registers=0):
    """What the classified token looks at, of one block's attention maps; registers are left out.

    Math    with a class token its row at the patches, without one the mean of the patches' rows; mean over the heads
    Shapes  attention (h, N, N)  ->  (grid, grid)
    """
    mean = attention.mean(axis=0)  # (N, N)
    row = (
        mean[0, 1 + registers :] if pooling.startswith("cls") else mean[registers:, registers:].mean(axis=0)
    )  # (grid * grid,)
    grid = round(len(row) ** 0.5)
    return row.reshape(grid, grid)
