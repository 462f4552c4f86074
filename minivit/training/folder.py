"""A run's folder:

    settings.json     what was asked for                    last.npz     the latest checkpoint, to resume from
    metrics.jsonl     a line per log step and evaluation    best.npz     that of the best accuracy on the test images
    summary.json      final figures, versions, wall time    curves.png, predictions.png, reconstructions.png

``last.npz`` is the first of them to be written: a folder that holds anything of a run can be resumed.
"""

from __future__ import annotations

import errno
import json
import os
from contextlib import contextmanager
from pathlib import Path

from minivit.base.errors import InputError
from minivit.base.files import write_atomically
from minivit.weights import checkpoint

LAST, BEST, METRICS, SUMMARY, SETTINGS = "last.npz", "best.npz", "metrics.jsonl", "summary.json", "settings.json"
CURVES, PREDICTIONS, RECONSTRUCTIONS = "curves.png", "predictions.png", "reconstructions.png"

_FIGURES = {
    "train": ("step", "epoch", "lr", "loss"),
    "test": ("step", "epoch", "loss", "accuracy", "train_loss", "train_accuracy"),
}  # what curves are drawn from


def refuse_used(folder):
    """Raises InputError if a new run in the folder would overwrite something."""
    for name in (LAST, BEST, METRICS, SUMMARY, SETTINGS, CURVES, PREDICTIONS, RECONSTRUCTIONS):
        if os.path.lexists(Path(folder) / name):
            other = "go on with --resume, or choose" if name == LAST else "choose"
            raise InputError(f"{folder} already holds a run's {name}; {other} another --out")


def last_checkpoint(folder):
    """The last checkpoint in a run's folder, as `checkpoint.read` gives it, or None where there is none.

    Raises  InputError: it is damaged.
    """
    path = Path(folder) / LAST
    return checkpoint.read(path) if path.exists() else None


@contextmanager
def lock(folder):
    """While active, no other process trains into the folder; the lock ends with the process, however that ends.

    Raises  InputError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise InputError(f"another process is training into {folder}; choose another --out") from None
            # otherwise this file system knows no locks
        yield
    finally:
        os.close(handle)


@contextmanager
def metrics_log(folder):
    """A function that appends a record, of its keyword arguments, to a run's metrics.jsonl."""
    with open(Path(folder) / METRICS, "a", encoding="utf-8") as file:

        def log(**record):
            file.write(json.dumps(record) + "\n")
            file.flush()

        yield log


def read_metrics(path):
    """The records of a metrics.jsonl; a line that is no whole record (its process was killed) is left out."""
    records = []
    if Path(path).exists():
        for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            figures = _FIGURES.get(record.get("kind")) if isinstance(record, dict) else None
            if figures and all(type(record.get(name)) in (int, float) for name in figures):
                records.append(record)
    return records


def trim_metrics(folder, step, epoch):
    """Drop the lines that an interrupted run wrote after its last checkpoint, of ``step`` and ``epoch``.

    Those steps are made again. After its last step an epoch is tested: a checkpoint from between the two counts the
    epoch as not done.
    """
    path = Path(folder) / METRICS
    kept = [r for r in read_metrics(path) if r["step"] <= step and (r["kind"] == "train" or r["epoch"] <= epoch)]
    lines = "".join(json.dumps(record) + "\n" for record in kept)
    write_atomically(path, lambda file: file.write(lines.encode()))
