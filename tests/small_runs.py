"""Runs that take a moment, and whether two of them did the same."""

import json
import tempfile
from pathlib import Path

import numpy as np

from minivit import ViTConfig
from minivit.data import load
from minivit.figures.runs import draw_classification
from minivit.laboratory.diagnosis import diagnose
from minivit.training.config import FREE_ON_RESUME, TrainConfig
from minivit.training.folder import BEST, LAST, METRICS, SUMMARY, last_checkpoint
from minivit.training.trainer import Trainer
from minivit.weights import checkpoint

DIGITS = load("digits")
# 60 images in batches of 8, two batches a step: 8 batches, 4 steps an epoch, the last of both smaller than the others
FEW = DIGITS._replace(
    train_images=DIGITS.train_images[:60],
    train_labels=DIGITS.train_labels[:60],
    test_images=DIGITS.test_images[:40],
    test_labels=DIGITS.test_labels[:40],
)
MODEL = ViTConfig(
    image_size=8, patch_size=4, channels=1, width=8, depth=2, num_heads=2, mlp_dim=16, dropout=0.1,
    attention_dropout=0.1, drop_path=0.2,
)  # fmt: skip
HARD = TrainConfig(
    epochs=3, batch_size=8, accumulate=2, lr=0.01, ema_decay=0.9, crop_padding=1, flip=True, label_smoothing=0.1,
    micro_batch=3, workers=1, log_every=1, checkpoint_seconds=1000.0, seed=5,
)  # fmt: skip
STEPS = 12


class Crash(BaseException):
    """Not an Exception, so that nothing handles it on its way: the nearest to a kill that one process can have."""


def crash():
    raise Crash


def trainer(out, config=HARD, *, model=MODEL, data=FEW, **keywords):
    """A small run at its beginning."""
    help_ = {"draw": draw_classification, "diagnose": diagnose}
    return Trainer(data, model, config, out, describe={"data": "digits"}, progress=False, **help_ | keywords)


def resumed(out, config=HARD, **keywords):
    """A small run where it stopped."""
    return trainer(out, config, resume=last_checkpoint(out), **keywords)


def before_step(run, step, action):
    """Call ``action`` when the optimiser is about to make a step (counted from 1)."""
    real = run.optimizer.step

    def counted(*arguments):
        if run.state.step + 1 == step:
            action()
        real(*arguments)

    run.optimizer.step = counted


def stop_at(run, step):
    """Stop a run after a step (counted from 1)."""
    before_step(run, step, lambda: run.stop("test"))


def timeless(path):
    """The lines of a metrics.jsonl without the figures that no two runs share."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines]


def assert_same_run(out, other):
    """Checkpoints, metrics and summaries of two folders are the same."""
    for name in (LAST, BEST):
        (arrays, meta), (others, other_meta) = checkpoint.load(out / name), checkpoint.load(other / name)
        assert arrays.keys() == others.keys()
        for key in arrays:
            np.testing.assert_array_equal(arrays[key], others[key], err_msg=f"{name}: {key}")
        for each in (meta, other_meta):
            del each["progress"]["seconds"]
            each["settings"] = {k: v for k, v in each["settings"].items() if k not in FREE_ON_RESUME}
        assert meta == other_meta
    assert timeless(out / METRICS) == timeless(other / METRICS)
    summaries = [json.loads((folder / SUMMARY).read_text()) for folder in (out, other)]
    for key in ("test_accuracy", "test_loss", "best_test_accuracy", "best_epoch", "steps"):
        assert summaries[0][key] == summaries[1][key]


_FOLDER = tempfile.TemporaryDirectory()  # it goes when the process ends
_WHOLE = {}


def whole(config=HARD):
    """The folder of an uninterrupted run with given settings, each run once; to be read."""
    if config not in _WHOLE:
        folder = Path(tempfile.mkdtemp(dir=_FOLDER.name))  # processes that were forked share _FOLDER
        assert trainer(folder, config).run()["steps"] == STEPS
        _WHOLE[config] = folder
    return _WHOLE[config]
