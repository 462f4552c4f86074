"""A run's folder:

    settings.json     what was asked for                    last.npz     the latest checkpoint, to resume from
    metrics.jsonl     a line per log step and evaluation    previous.npz the one before it, should last.npz be damaged
    summary.json      final figures, versions, wall time    best.npz     that of the best accuracy on the test images
    curves.png, predictions.png, reconstructions.png

``last.npz`` is the first of them to be written: a folder that holds anything of a run can be resumed.

What a power cut can cost: a checkpoint's bytes are flushed to the disk before it gets its name, the name before the
training goes on, and the metrics before the checkpoint that counts their steps. A disk that says so too early may lose
the newest file, not those of minutes ago: then the run goes on from ``previous.npz``, or ``best.npz``.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

from minivit.base.errors import InputError
from minivit.base.files import naming, parse_json, write_atomically
from minivit.weights import checkpoint

LAST, BEST, PREVIOUS = "last.npz", "best.npz", "previous.npz"
METRICS, SUMMARY, SETTINGS = "metrics.jsonl", "summary.json", "settings.json"
CURVES, PREDICTIONS, RECONSTRUCTIONS = "curves.png", "predictions.png", "reconstructions.png"

_FIGURES = {
    "train": ("step", "epoch", "lr", "loss"),
    "test": ("step", "epoch", "loss", "accuracy", "train_loss", "train_accuracy"),
}  # what curves are drawn from


def refuse_used(folder):
    """Raises InputError if a new run in the folder would overwrite something."""
    for name in (LAST, BEST, PREVIOUS, METRICS, SUMMARY, SETTINGS, CURVES, PREDICTIONS, RECONSTRUCTIONS):
        if os.path.lexists(Path(folder) / name):
            other = "go on with --resume, or choose" if name == LAST else "choose"
            raise InputError(f"{folder} already holds a run's {name}; {other} another --out")


def last_checkpoint(folder):
    """The last checkpoint in a run's folder, as `checkpoint.read` gives it, or None where there is none.

    Where ``last.npz`` is damaged, the one before it, or the best, is taken; it is said on stderr.
    Raises  InputError: all of them are damaged.
    """
    folder = Path(folder)
    if not (folder / LAST).exists():
        return None
    try:
        return checkpoint.read(folder / LAST)
    except InputError as error:
        for name in (PREVIOUS, BEST):
            try:
                found = checkpoint.read(folder / name)
            except InputError:
                continue
            print(f"note: {error}: the run goes on from {name}", file=sys.stderr)
            return found
        raise


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
    path = Path(folder) / METRICS
    with naming(path):
        file = open(path, "ab", buffering=0)  # nothing waits in memory to be written when the file is closed

    def log(**record):
        line = (json.dumps(record) + "\n").encode()
        with naming(path):
            while line:
                line = line[file.write(line) :]

    with file:
        yield log


def _is_record(record):
    """Is this a whole record of a metrics.jsonl, of numbers that can be drawn?"""
    kind = record.get("kind") if isinstance(record, dict) else None
    figures = _FIGURES.get(kind) if isinstance(kind, str) else None
    if not figures or not all(type(record.get(name)) in (int, float) for name in figures):
        return False
    numbers = [value for value in record.values() if type(value) in (int, float)]
    return all(abs(value) < 1e30 for value in numbers) and record["epoch"] > 0 and record["step"] > 0


def read_metrics(path):
    """The records of a metrics.jsonl; a line that is no whole record (its process was killed) is left out."""
    records = []
    if Path(path).exists():
        for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = parse_json(line)
            except ValueError:
                continue
            if _is_record(record):
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
