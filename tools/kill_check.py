"""Check that training survives kill -9: resumed at random moments, it must end with the same numbers, bit for bit."""

import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minivit.base.errors import InputError
from minivit.commands.cli import Parser, run
from minivit.data.cifar.layouts import KINDS, PIXELS
from minivit.training.engines.cut import check_workers
from minivit.training.folder import BEST, LAST, METRICS, SUMMARY, read_metrics
from minivit.weights import checkpoint

EXAMPLES = """
examples:
  python tools/kill_check.py                          100 kills of each of four runs: half an hour
  python tools/kill_check.py --kills 5                a minute or two
  python tools/kill_check.py --runs digits --workers 4 --kills 50 --seed 3

A short training is started, killed at a random moment (while Python starts, while data are read, in a step, in a test,
in the writing of a checkpoint), resumed, killed, ... and at last left to its end. Every array of its last and best
checkpoint (parameters, optimiser state, moving average) and its metrics are compared with those of a run that nobody
interrupted. "cifar" is random images in CIFAR-10's binary files, trained with Muon, a moving average, and its first
epochs on images of half the size. The exit status is 0 if all are equal, 1 if one is not, 2 for bad input.
"""
TIMES = ("images_per_second", "seconds")  # in metrics.jsonl, the figures that no two runs share
EACH = "--quiet --ema-decay 0.95 --checkpoint-seconds 0.1 --log-every 1 --evaluate-every 1".split()
SETTINGS = {
    "digits": "--width 32 --depth 2 --mlp-dim 64 --batch-size 32 --accumulate 2 --dropout 0.1 --drop-path 0.1 "
    "--crop-padding 1 --epochs 40",
    "cifar": "--data cifar10 --preset Nano/4 --optimizer muon --half-size 0.5 --pooling mean --pos-embed sincos2d "
    "--batch-size 16 --flip --crop-padding 4 --mixup 0.2 --epochs 40",
}
RECORDS = 24  # images in each of CIFAR-10's files


class Row(NamedTuple):
    """What came of the kills of one run."""

    run: str
    workers: int
    steps: int  # of the training
    kills: int
    before: int  # of the kills came before the first checkpoint
    repeated: int  # steps that were made more than once
    seconds: float
    same: bool  # is every bit as in the run that nobody interrupted?


def write_cifar(folder):
    """Random images in CIFAR-10's binary files."""
    layout, rng = KINDS["cifar10"].layouts[0], np.random.default_rng(0)
    place = folder / layout.folder
    place.mkdir()
    for file in layout.image_files:
        records = rng.integers(0, 256, (RECORDS, 1 + PIXELS), dtype=np.uint8)
        records[:, 0] %= 10
        (place / file).write_bytes(records.tobytes())


def launch(kind, folder, out, workers):
    """Start the training, or go on with it, in a process of its own."""
    words = [*EACH, *SETTINGS[kind].split(), "--data-dir", folder, "--workers", workers, "--out", out]
    if kind == "digits":
        words = [word for word in words if word not in ("--data-dir", folder)]  # they have no folder
    if (out / LAST).exists():
        words.append("--resume")
    return subprocess.Popen(
        [sys.executable, "-m", "minivit", "train", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def finish(process):
    """Let the training run to its end.

    Raises  InputError: it ends with an error.
    """
    said, _ = process.communicate()
    if process.returncode:
        raise InputError(f"the training ended with status {process.returncode}: {said}")


def final(out):
    """What must be the same at the end: the arrays of the checkpoints, and the metrics without times."""
    arrays = {f"{name} {key}": a for name in (LAST, BEST) for key, a in checkpoint.load(out / name)[0].items()}
    records = [{k: v for k, v in r.items() if k not in TIMES} for r in read_metrics(out / METRICS)]
    return arrays, [json.dumps(record) for record in records]


def step_of(out):
    """The step of the last checkpoint in a folder, None where there is none."""
    return checkpoint.load(out / LAST)[1]["progress"]["step"] if (out / LAST).exists() else None


def same_end(whole, broken):
    """Whether two folders hold the same run; what differs is printed."""
    (arrays, records), (others, other_records) = final(whole), final(broken)
    differing = [
        name for name in arrays.keys() | others.keys()
        if name not in arrays or name not in others or not np.array_equal(arrays[name], others[name])
    ]  # fmt: skip
    if records != other_records:
        differing.append(METRICS)
    if differing:
        print(f"DIFFER: {', '.join(sorted(differing))}")
    return not differing


def wait_for(process, out, steps, delay):
    """Wait until a run has made so many steps more than its last checkpoint had, and then for a delay in seconds."""
    goal = (step_of(out) or 0) + steps
    while steps and process.poll() is None and max([0, *(r["step"] for r in read_metrics(out / METRICS))]) < goal:
        time.sleep(0.01)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(delay)


def check(kind, folder, workers, kills, rng, say=print):
    """One run that nobody interrupts and one that is killed: a `Row`."""
    whole, broken = folder / f"whole-{kind}-{workers}", folder / f"broken-{kind}-{workers}"
    started = time.monotonic()
    finish(launch(kind, folder, whole, workers))
    summary = json.loads((whole / SUMMARY).read_text())
    total = time.monotonic() - started
    start, each = total - summary["train_seconds"], summary["train_seconds"] / summary["steps"]  # seconds, about
    before = repeated = ended = 0
    for kill in range(1, kills + 1):
        process = launch(kind, folder, broken, workers)
        if rng.random() < 0.15:  # while Python starts, or data are read
            goal, delay = 0, rng.uniform(0, start)
        else:  # after so many steps, and a part of one, of a test or of the writing of a checkpoint
            goal, delay = rng.uniform(0, 1.7 * summary["steps"] / kills), rng.uniform(0, 3 * each)
        wait_for(process, broken, goal, delay)
        ended += process.poll() is not None
        process.send_signal(signal.SIGKILL)
        said, _ = process.communicate()
        if process.returncode not in (0, -signal.SIGKILL):
            raise InputError(f"kill {kill}: the training ended with status {process.returncode}: {said}")
        saved = step_of(broken)
        reached = max((record["step"] for record in read_metrics(broken / METRICS)), default=0)
        before, repeated = before + (saved is None), repeated + max(0, reached - (saved or 0))
        say(f"{kind}, workers {workers}: kill {kill:3} at step {reached}, checkpoint of step {saved}")
    if ended:
        say(f"{kind}, workers {workers}: {ended} of the kills came after the end")
    finish(launch(kind, folder, broken, workers))
    seconds = time.monotonic() - started
    return Row(kind, workers, summary["steps"], kills - ended, before, repeated, seconds, same_end(whole, broken))


def table(rows):
    """The rows as Markdown."""
    lines = ["| run | workers | steps | kills | before the first checkpoint | steps made again | seconds | every bit |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        *cells, seconds, same = row
        lines.append(f"| {' | '.join(map(str, cells))} | {seconds:.0f} | {'the same' if same else 'DIFFERS'} |")
    return "\n".join(lines)


def main(argv=None):
    """Entry point; returns the exit status."""
    parser = Parser(description=__doc__, epilog=EXAMPLES, prog="kill_check.py")
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="kills of each run [100]")
    parser.add_argument("--runs", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="what is trained [both]")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], metavar="N", help="numbers of workers [1 2]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the moments [0]")
    parser.add_argument("--quiet", action="store_true", help="no line for each kill")
    arguments = parser.parse_args(argv)
    if arguments.kills < 1:
        raise InputError("--kills must be at least 1")
    rng = random.Random(arguments.seed)

    def say(line):
        if not arguments.quiet:
            print(line, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        write_cifar(Path(folder))
        rows = [
            check(kind, Path(folder), check_workers(workers), arguments.kills, rng, say)
            for kind in arguments.runs
            for workers in arguments.workers
        ]
    print(f"seed {arguments.seed}\n\n{table(rows)}")
    return 0 if all(row.same for row in rows) else 1


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
