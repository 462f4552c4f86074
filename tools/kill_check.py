"""Check that training survives kill -9: resumed at random moments, it must end with the same numbers, bit for bit."""

import json
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from minivit.base.errors import InputError
from minivit.commands.cli import Parser, run
from minivit.training.engines.cut import check_workers
from minivit.training.folder import LAST, METRICS, SUMMARY, read_metrics
from minivit.weights import checkpoint

EXAMPLES = """
examples:
  python tools/kill_check.py                          10 kills with one worker, 10 with two: a minute or two
  python tools/kill_check.py --kills 50 --seed 3
  python tools/kill_check.py --workers 4 --epochs 40

A short training of the digits is started, killed after a random time, resumed, killed, ... until it ends. Its
parameters, optimiser state, moving average and metrics are compared with those of a run that nobody interrupted.
The exit status is 0 if all are equal, 1 if one is not, 2 for bad input.
"""
SETTINGS = (
    "--quiet --width 32 --depth 2 --mlp-dim 64 --batch-size 32 --accumulate 2 --dropout 0.1 --drop-path 0.1 "
    "--crop-padding 1 --ema-decay 0.95 --checkpoint-seconds 0.2 --log-every 1 --evaluate-every 1"
).split()
TIMES = ("images_per_second", "seconds")  # in metrics.jsonl, the figures that no two runs share


def launch(out, workers, epochs, *, resume):
    """Start the training in a process of its own; returns once it has read the data and is about to train."""
    command = [
        sys.executable,
        "-u",
        "-m",
        "minivit",
        "train",
        *SETTINGS,
        "--workers",
        workers,
        "--epochs",
        epochs,
        "--out",
        out,
    ]
    process = subprocess.Popen(
        [str(word) for word in command] + ["--resume"] * resume,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("ViT:"):
            return process
    process.wait()
    raise InputError(f"the training ended with status {process.returncode} before it began: {' '.join(said)}")


def finish(process):
    """Let the training run to its end."""
    said, _ = process.communicate()
    if process.returncode:
        raise InputError(f"the training ended with status {process.returncode}: {said}")


def final(out):
    """What must be the same at the end: every array of the last checkpoint, and the metrics without times."""
    arrays, _ = checkpoint.load(out / LAST)
    records = [{k: v for k, v in r.items() if k not in TIMES} for r in read_metrics(out / METRICS)]
    return arrays, [json.dumps(record) for record in records]


def check(folder, workers, epochs, kills, rng):
    """One uninterrupted run and one that is killed; returns whether they end alike."""
    whole, broken = folder / f"whole-{workers}", folder / f"broken-{workers}"
    finish(launch(whole, workers, epochs, resume=False))
    seconds = json.loads((whole / SUMMARY).read_text())["train_seconds"]
    arrays, records = final(whole)
    total = checkpoint.load(whole / LAST)[1]["progress"]["step"]
    print(f"workers {workers}: the uninterrupted run made {total} steps in {seconds:.1f} s", flush=True)
    for kill in range(1, kills + 1):
        process = launch(broken, workers, epochs, resume=(broken / LAST).exists())
        delay = rng.uniform(0, 1.7 * seconds / kills)  # below 2, so that the kills come before the end
        try:
            process.wait(delay)
            how = "it had ended by itself"
        except subprocess.TimeoutExpired:
            how = f"killed after {delay:.2f} s"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        reached = max((record["step"] for record in read_metrics(broken / METRICS)), default=0)
        saved = checkpoint.load(broken / LAST)[1]["progress"]["step"] if (broken / LAST).exists() else "none"
        print(f"workers {workers}: {kill:2}. {how}, at step {reached}, last checkpoint of step {saved}", flush=True)
    finish(launch(broken, workers, epochs, resume=(broken / LAST).exists()))
    resumed_arrays, resumed_records = final(broken)
    differing = [name for name in arrays if not np.array_equal(arrays[name], resumed_arrays.get(name))]
    same = not differing and arrays.keys() == resumed_arrays.keys() and records == resumed_records
    numbers = sum(array.size for array in arrays.values())
    print(
        f"workers {workers}: {len(arrays)} arrays ({numbers:,} numbers) and {len(records)} lines of metrics "
        + ("are equal bit for bit" if same else f"DIFFER: {', '.join(differing) or 'the metrics'}")
    )
    return same


def main(argv=None):
    """Entry point; returns the exit status."""
    parser = Parser(description=__doc__, epilog=EXAMPLES, prog="kill_check.py")
    parser.add_argument("--kills", type=int, default=10, metavar="N", help="kills for each number of workers [10]")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], metavar="N", help="numbers of workers [1 2]")
    parser.add_argument("--epochs", type=int, default=80, metavar="N", help="length of the training [80]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the moments [0]")
    arguments = parser.parse_args(argv)
    if arguments.kills < 1 or arguments.epochs < 1:
        raise InputError("--kills and --epochs must be at least 1")
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        same = [
            check(Path(folder), check_workers(workers), arguments.epochs, arguments.kills, rng)
            for workers in arguments.workers
        ]
    return 0 if all(same) else 1


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
