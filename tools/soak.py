"""Train for long, and look whether anything grows: memory, open files, threads, the time of a step."""

import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from minivit.base.errors import InputError
from minivit.base.files import write_json
from minivit.commands.cli import Parser, run
from minivit.data import Dataset
from minivit.figures.canvas import TEST, TRAIN, new_figure, save, style
from minivit.training.recipes import find_config, prepare, read_recipe
from minivit.training.trainer import Trainer

EXAMPLES = """
examples:
  python tools/soak.py                                 50,000 steps of the digits: some 15 minutes of one core
  python tools/soak.py --steps 5000 --out soak         soak.png and soak.json in the folder soak
  python tools/soak.py --data cifar10 --steps 2000     random images of CIFAR-10's shape, with its settings

The run is an ordinary one, with tests, checkpoints and metrics, in a folder that is removed. A tenth of the steps, at
the beginning, in which buffers are made, is left out. The exit status is 0 if nothing grows, 1 if something does, 2 for
bad input.
"""
SAMPLES = 200  # points of the figure
WARM_UP = 0.1  # share of the steps
MEMORY, SLOWER = 0.02, 1.1  # growth of the memory that counts as none, and of a step's time
LEAST = 4 * 2**20  # bytes of memory, of which the interpreter's own pools move as much to and fro
NAMES = {
    "memory": ("resident memory", "MiB"), "files": ("open files", ""), "threads": ("threads", ""),
    "step": ("a step, processor time", "ms"),
}  # fmt: skip


def now():
    """What the process holds: resident memory in MiB, open files, threads."""
    memory = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return {
        "memory": round(memory, 2),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
    }


def random_images(name, data_dir, **_):
    """A data set of CIFAR-10's shape: 6,400 random images to learn from, 1,000 to test on."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8) for n in (6400, 1000)]
    labels = [rng.integers(0, 10, len(part)) for part in images]
    return Dataset(name, images[0], labels[0], images[1], labels[1], tuple("0123456789"), "random images")


class Watch:
    """Takes samples while a `Trainer` makes its steps: each is of as many steps, with the median time of one."""

    def __init__(self, trainer):
        self.samples, self.every = [], max(1, trainer.plan.total_steps // SAMPLES)
        self.trainer, self.times, self.last, self.wall = trainer, [], None, time.monotonic()
        self.real, trainer.optimizer.step = trainer.optimizer.step, self.step

    def step(self, *arguments):
        """Make the optimiser's step, and look at what has been since the one before."""
        self.real(*arguments)
        used, step = time.process_time(), self.trainer.state.step + 1
        if self.last is not None:
            self.times.append(used - self.last)
        if step % self.every == 0 and self.times:
            wall = time.monotonic()
            median = 1e3 * float(np.median(self.times))  # tests and checkpoints stand between few of the steps
            self.samples.append({"at": step, **now(), "step": round(median, 4), "wall": round(wall - self.wall, 3)})
            self.times, self.wall = [], wall
            used = time.process_time()
        self.last = used


def verdict(samples):
    """Whether each figure is flat: {name: {"first", "last", "flat"}}, the medians of the first and last tenth.

    Samples of the warm-up are left out.
    """
    samples = samples[round(WARM_UP * len(samples)) :]
    part = max(1, len(samples) // 10)
    found = {}
    for name in NAMES:
        values = [sample[name] for sample in samples]
        first, last = (float(np.median(each)) for each in (values[:part], values[-part:]))
        most = {"memory": max(first * (1 + MEMORY), first + LEAST / 2**20), "step": first * SLOWER}.get(name, first)
        found[name] = {"first": first, "last": last, "flat": last <= most}
    return found


def draw(path, samples, found, title):
    """The samples against the steps."""
    figure = new_figure(11, 6)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    for axes, (name, (text, unit)) in zip(figure.subplots(2, 2).flat, NAMES.items(), strict=True):
        axes.plot([sample["at"] for sample in samples], [sample[name] for sample in samples], color=TRAIN, lw=1.2)
        axes.axvspan(0, WARM_UP * samples[-1]["at"], color="#f1f5f9")
        word = "flat" if found[name]["flat"] else "GROWS"
        figures = f"{found[name]['first']:,.4g} to {found[name]['last']:,.4g} {unit}".strip()
        axes.axhline(found[name]["first"], color=TEST, lw=0.8, ls="--")
        style(axes, "step", unit or "count", f"{text}: {figures}, {word}")
        axes.set_ylim(bottom=0)
    save(figure, path)


def soak(data, steps, folder, *, workers=0):
    """Train for so many steps with the settings of a data set; returns the samples."""
    recipe = read_recipe(find_config(data), train={"steps": steps, "workers": workers, "checkpoint_seconds": 5.0})
    dataset, model, config, begins = prepare(recipe, None if data == "digits" else random_images)
    config = replace(config, warmup_epochs=min(config.warmup_epochs, 1.0))
    with open(os.devnull, "w") as nowhere:
        trainer = Trainer(dataset, model, config, folder, progress=False, **begins)
        watch, stdout = Watch(trainer), sys.stdout
        sys.stdout = nowhere  # a line for each test
        try:
            summary = trainer.run()
        finally:
            sys.stdout = stdout
    if summary is None:
        raise InputError("the run was stopped before its end")
    return watch.samples


def main(argv=None):
    """Entry point; returns the exit status."""
    parser = Parser(description=__doc__, epilog=EXAMPLES, prog="soak.py")
    parser.add_argument("--data", choices=("digits", "cifar10"), default="digits", help="whose settings [digits]")
    parser.add_argument("--steps", type=int, metavar="N", help="steps [50000; of cifar10 2000]")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="threads [what suits the model]")
    parser.add_argument("--out", default=".", metavar="DIR", help="folder for soak.png and soak.json [.]")
    arguments = parser.parse_args(argv)
    steps = arguments.steps or {"digits": 50_000, "cifar10": 2_000}[arguments.data]
    if steps < 100:
        raise InputError("--steps must be at least 100, for ten samples")
    if not Path("/proc/self/statm").exists():
        raise InputError("soak.py reads /proc, which Linux alone has")
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        samples = soak(arguments.data, steps, Path(folder) / "run", workers=arguments.workers)
    found = verdict(samples)
    for name, (text, unit) in NAMES.items():
        first, last = found[name]["first"], found[name]["last"]
        print(f"{text:22} {first:10,.2f} {last:10,.2f} {unit:4} {'flat' if found[name]['flat'] else 'GROWS'}")
    title = f"{arguments.data}, {steps:,} steps"
    draw(out / "soak.png", samples, found, title)
    write_json(out / "soak.json", {"data": arguments.data, "steps": steps, "verdict": found, "samples": samples})
    print(f"{title}: {out / 'soak.png'}, {out / 'soak.json'}")
    return 0 if all(each["flat"] for each in found.values()) else 1


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
