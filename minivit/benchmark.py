"""How quick is it? A step of ours against PyTorch's, JAX's and the machine's own limit, in turn and pair by pair.

    report = contest(ViTConfig(), batch=128, against=("torch", "jax"))
    report["ratio_to_torch"], report["floor_fraction"]

**In turn.** A machine that others use is quick now and slow a minute later, so two times taken one after the other
cannot be compared. The contenders step in turn, A B C A B C ..., and each ratio is taken within one round:

    ratio of A to B = median over the rounds of (seconds of A in the round / seconds of B in the same round)

with the quartiles beside it. A turn is one step, or as many as fill 0.2 seconds, of which the median counts; between
turns everybody rests for 50 ms, which is longer than the threads of OpenMP and of BLAS go on spinning.

On a GPU the seconds are the device's own, between events recorded before the first step of a turn and after the last;
beside them stand the host's, until it has launched the last step: near the device's, it is the host that is slow.

Others who use the machine do not slow everybody alike: a library that lets its threads meet after every operation
waits for the slowest one each time. So the report says what share of the cores went to other programs in each round,
and ``patience`` has disturbed rounds made again.

**Each in its own process**, which waits on a pipe while another one steps (`minivit.contenders`): thread pools do not
fight, and the peak memory is the contender's own.

**The same work.** Before anything is timed, the loss and every gradient of each contender (or its logits) must agree
with ours: an error of at most 1e-4 in the Euclidean norm of each parameter's gradient, and of 1e-5 in the loss.
float32 rounds to 6e-8, and a gradient sums up thousands of products: ours is off float64's by some 2e-6, and so are
correct contenders off ours. One with the other form of GELU, or with twice the LayerNorm epsilon, is off by 6e-4.
The loss after one update must agree too, to 1e-4 since AdamW's first step is the sign of the gradient, in which
rounding tells where the gradient is next to nothing; without the update the loss is off by some 1e-2.

**The floor** is the step's matrix products alone (see `minivit.contenders.ours`), timed in the same rounds; the
``floor_fraction`` of a step is floor / step, 1 being as quick as the machine multiplies matrices.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import pickle
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from minivit import __version__, params
from minivit.contenders import CONTENDERS, LR, Job, Turn, problem, turn
from minivit.contenders.ours import (
    attention_backward_products,
    attention_forward_products,
    blas,
    linear_backward_products,
    linear_forward_products,
)
from minivit.engine import Engine, available_cores
from minivit.errors import InputError
from minivit.loss import softmax_cross_entropy_backward, softmax_cross_entropy_forward
from minivit.model import ViT
from minivit.optim import AdamW
from minivit.trace import arrays_in, attention_flops, expected_flops, recording

AGAINST = ("torch", "torch-compile", "jax", "plain")  # whom one may ask for
NEEDS = {"torch": "torch", "torch-compile": "torch", "jax": "jax"}  # contender -> what must be installed
LOSS_TOLERANCE, GRADIENT_TOLERANCE, UPDATE_TOLERANCE = 1e-5, 1e-4, 1e-4  # relative: see the module's docstring
COARSER = {"float32": 1, "tf32": 100, "bf16": 1000}  # times these, for factors that are rounded to 2^-11 or 2^-8
TURN_SECONDS, PAUSE_SECONDS = 0.2, 0.05
QUIET = 0.05  # of the cores' time may go to other programs
FLOORS = ("floor-threads", "floor-workers")
KEYS = (  # of a contest's report in any case: None for what was not measured
    "ratio_to_torch", "ratio_to_torch_compile", "ratio_to_jax", "memory_ratio_to_torch", "floor", "floor_fraction",
)  # fmt: skip
ROOT = Path(__file__).resolve().parent.parent


class Disagreement(Exception):
    """A contender computes something else than we do: its times would mean nothing."""


def check_model(config):
    """Raises InputError for a model with a stem: neither the contenders nor the floor have one."""
    if config.stem:
        raise InputError(f"benchmarks are of models without a stem, not of stem {config.stem!r}: choose another model")


def check_contenders(names):
    """Raises InputError for a name that is none of `AGAINST`, or whose library is not installed."""
    for name in names:
        if name not in AGAINST:
            raise InputError(f"no contender {name!r}; the contenders are {', '.join(AGAINST)}")
        if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
            raise InputError(f'--against {name} needs {NEEDS[name]}: pip install "minivit[bench]"')


def check_config(config):
    """Raises InputError for a model that the contenders do not have: positions in the blocks, axial attention, ..."""
    c = config
    if c.pos_embed not in ("learned", "sincos2d", "none") or c.pos_at != "input" or c.attention != "full":
        raise InputError(
            f'the benchmark has no pos_embed "{c.pos_embed}" at "{c.pos_at}" with attention "{c.attention}"; '
            'it compares "learned", "sincos2d" or "none" at "input" with attention "full"'
        )


@contextlib.contextmanager
def only_cores(count):
    """Keep this process, and those that it starts meanwhile, to ``count`` cores; 0 for all of them.

    Raises  InputError: there are not so many, or the system cannot do it.
    """
    if not count or count == available_cores():
        yield
        return
    if not 0 < count < available_cores():
        raise InputError(f"--threads must be 1 to {available_cores()}, the cores that there are; got {count}")
    if not hasattr(os, "sched_setaffinity"):
        raise InputError("this system cannot keep a program to some of its cores: leave --threads out")
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


# ---- contenders in their processes -----------------------------------------------------------------------------------


class Child:
    """A contender at work in a process of its own; ``at`` tells it from the same one at another job.

    Raises  InputError: it cannot do the job; the message is its last word.
    """

    def __init__(self, contender, job, at=""):
        self.name = contender + at
        *who, environment = CONTENDERS[contender]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "minivit.contenders"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.errors, env={**os.environ, **environment, "PYTHONPATH": path},
        )  # fmt: skip
        try:
            about = self.ask(who, job)
        except BaseException:
            self.close()
            raise
        self.start_memory, self.settings = about["start_memory"], about["settings"]

    def ask(self, *request):
        """Send a request (first of all: who it is, and its job) and wait for what comes back."""
        try:
            pickle.dump(request, self.process.stdin)
            self.process.stdin.flush()
            kind, value = pickle.load(self.process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(60)  # its last words may come after its pipe is closed
            self.errors.seek(0)
            lines = self.errors.read().decode(errors="replace").split("\n")
            word = next((line.strip() for line in reversed(lines) if line.strip()), "it was killed, perhaps for memory")
            raise InputError(f"the process of {self.name} ended: {word}") from None
        if kind == "failed":
            raise InputError(f"{self.name} failed: {value}")
        return value

    def close(self):
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.errors.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def disagreement(ours, theirs):
    """How far apart two answers to "check" are, as (loss's relative error, largest error of an array, its name).

    Math    |theirs - ours| / |ours| in the Euclidean norm, array by array
    A gradient that is zero but for rounding is measured against a thousandth of the largest array's norm instead.
    Returns  inf where something is missing, of another shape, or not finite
    """
    (loss, arrays), (their_loss, their_arrays) = ours, theirs
    loss_error = 0.0 if loss is None else abs(their_loss - loss) / abs(loss)
    norms = {name: float(np.linalg.norm(array)) for name, array in arrays.items()}
    least = 1e-3 * max(norms.values())
    worst, where = 0.0, ""
    for name in arrays.keys() | their_arrays.keys():
        a, b = arrays.get(name), their_arrays.get(name)
        error = math.inf
        if a is not None and b is not None and a.shape == b.shape:
            error = float(np.linalg.norm(b - a)) / max(norms[name], least, 1e-30)
        error = error if math.isfinite(error) else math.inf
        if error >= worst:
            worst, where = error, name
    return loss_error if math.isfinite(loss_error) else math.inf, worst, where


def agree(name, ours, theirs, coarser=1):
    """Check a contender's loss and gradients, or logits, against ours: (loss's error, largest array's error).

    ``coarser``: how many times the tolerances.
    Raises  Disagreement
    """
    loss_error, worst, where = disagreement(ours, theirs)
    if loss_error > (allowed := coarser * LOSS_TOLERANCE):
        raise Disagreement(f"{name} disagrees: its loss is off by {loss_error:.1e}, allowed {allowed:.0e}")
    if worst > (allowed := coarser * GRADIENT_TOLERANCE):
        what = where if where == "logits" else f"the gradient of {where}"
        raise Disagreement(f"{name} disagrees: {what} is off by {worst:.1e}, allowed {allowed:.0e}")
    return loss_error, worst


def agree_after_update(name, ours, theirs, coarser=1):
    """Check a contender's loss after one step of the optimiser against ours: its relative error.

    Raises  Disagreement
    """
    error = abs(theirs - ours) / abs(ours)
    if not error <= (allowed := coarser * UPDATE_TOLERANCE):
        what = f"its loss after an update is off by {error:.1e}"
        raise Disagreement(f"{name} disagrees: {what}, allowed {allowed:.0e}")
    return error


class Turns(NamedTuple):
    """What `take_turns` measured, round by round."""

    seconds: dict  # contender -> seconds of a step in each round
    others: list  # share of the cores' time that went to other programs in each round; None where it is not known
    host: dict  # contender -> the host's seconds of a step in each round; None on a CPU, where they are the same


def take_turns(children, pairs, *, patience=0.0, progress=True):
    """Let the contenders step in turn, ``pairs`` rounds of it.

    A round in which other programs took more than 5 % of the cores is disturbed. For up to ``patience`` seconds more
    rounds are made in the place of such; the ``pairs`` least disturbed ones count, in their order.
    """
    repeats, rounds, others = {}, [], []
    for child in children:  # warm-up, and how long is a step?
        child.ask("turn", 2)
        once = child.ask("turn", 1)[0]
        repeats[child.name] = max(1, min(1000, round(TURN_SECONDS / max(once, 1e-6))))
    with tqdm(total=pairs, desc="rounds", leave=False, disable=None if progress else True) as bar:
        while True:
            if len(rounds) == pairs:
                enough = time.monotonic() + patience
            quiet = sum(share is None or share <= QUIET for share in others)
            if quiet >= pairs or (len(rounds) >= pairs and time.monotonic() >= enough):
                break
            before = _glance(children)
            turns = {}
            for child in children:
                time.sleep(PAUSE_SECONDS)
                turns[child.name] = Turn(*child.ask("turn", repeats[child.name]))
            rounds.append(turns)
            others.append(_share_of_others(before, _glance(children)))
            bar.update(others[-1] is None or others[-1] <= QUIET or patience == 0)
    chosen = sorted(sorted(range(len(rounds)), key=lambda i: others[i] or 0.0)[:pairs])
    seconds, host = ({c.name: [rounds[i][c.name][k] for i in chosen] for c in children} for k in (0, 2))
    return Turns(seconds, [others[i] for i in chosen], host)


def _busy_seconds():
    """Seconds that our cores have spent on anything since the machine started; None where the system does not tell."""
    try:
        cores = os.sched_getaffinity(0)
        lines = Path("/proc/stat").read_text().splitlines()
    except (AttributeError, OSError):
        return None
    total = 0
    for name, *ticks in (line.split() for line in lines if line.startswith("cpu")):
        if name != "cpu" and int(name[3:]) in cores:
            user, nice, system, _idle, _iowait, *rest = map(int, ticks[:8])  # rest: interrupts, and time stolen from us
            total += user + nice + system + sum(rest)
    return total / os.sysconf("SC_CLK_TCK")


def _own_seconds(children):
    """Seconds of processor time that the contenders and this process have taken."""
    ticks = 0
    for child in children:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{child.process.pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])  # utime and stime
    return ticks / (os.sysconf("SC_CLK_TCK") if ticks else 1) + time.process_time()


def _glance(children=()):
    """Seconds on the clock, seconds that our cores were busy, and those of them for us."""
    return time.monotonic(), _busy_seconds(), _own_seconds(children)


def _share_of_others(before, after):
    """The share of the cores' time, between two glances, that went to other programs; None if it is not known."""
    if before[1] is None:
        return None
    wall, busy, own = (b - a for a, b in zip(before, after, strict=True))
    return max(0.0, (busy - own) / (wall * available_cores()))


# ---- statistics ------------------------------------------------------------------------------------------------------


def quartiles(values):
    """{"median": ..., "q1": ..., "q3": ...}"""
    q1, median, q3 = (float(q) for q in np.quantile(values, (0.25, 0.5, 0.75)))
    return {"median": median, "q1": q1, "q3": q3}


def paired_ratio(a, b):
    """Quartiles of a_i / b_i over the rounds i: a slow minute of the machine is in both, and drops out."""
    return quartiles(np.asarray(a) / np.asarray(b))


# ---- step and infer --------------------------------------------------------------------------------------------------


def start(stack, names, job, *, at="", progress=False):
    """Start the contenders of a job, us first, and check each of them against us.

    Returns  (list of `Child`, {name: what is known of it: its settings, memory and errors}); ``stack`` closes them.
    Raises   InputError;  Disagreement
    """
    children, contenders, coarser = [], {}, COARSER[job.precision]
    for name in tqdm(names, desc="starting", leave=False, disable=None if progress else True):
        child = stack.enter_context(Child(name, job, at))
        children.append(child)
        contenders[name] = {"settings": child.settings, "start_memory": child.start_memory}
        if name in FLOORS:
            continue
        answer = child.ask("check")
        updated = child.ask("turn", 2)[1]  # the loss of the second step; None for predictions
        contenders[name] |= {"loss": answer[0], "updated_loss": updated}
        if name == "minivit":
            ours = answer
            continue
        loss_error, worst = agree(name, ours, answer, coarser)
        contenders[name] |= {"loss_error": loss_error, "largest_error": worst}
        if updated is not None:
            contenders[name]["updated_loss_error"] = agree_after_update(
                name, contenders["minivit"]["updated_loss"], updated, coarser
            )
    return children, contenders


def contest(
    config, *, task="step", batch=128, against=(), engine=None, pairs=20, seed=0, patience=0.0, floor=True,
    device="cpu", precision="float32", progress=True,
):  # fmt: skip
    """Us, others and the floor in turn: a dict for JSON.

    ``task`` is "step" (forward + backward + AdamW of one batch) or "infer" (logits of one batch); ``engine`` holds
    keyword settings of our `Engine`. A ratio is ours to theirs: below 1 we are quicker, or smaller.

    Raises  InputError: an unknown contender, or one that is not installed, or a model with a stem;  Disagreement
    """
    check_model(config)
    check_contenders(against)
    if device != "cpu" and "jax" in against:
        raise InputError("jax is a contender on the CPU alone; leave it out")
    names = ["minivit", *dict.fromkeys(against), *(FLOORS if floor and device == "cpu" else ())]
    job, coarser = Job(task, config, batch, seed, engine or {}, device, precision), COARSER[precision]
    with contextlib.ExitStack() as stack:
        children, contenders = start(stack, names, job, progress=progress)
        turns = take_turns(children, pairs, patience=patience, progress=progress)
        for name, child in zip(names, children, strict=True):
            contenders[name] |= {"seconds": turns.seconds[name], "peak_memory": child.ask("memory")}
            if device != "cpu":
                contenders[name]["host_seconds"] = turns.host[name]
    allowed = {"gradient": coarser * GRADIENT_TOLERANCE, "loss": coarser * LOSS_TOLERANCE}
    return summarise(contenders, batch=batch) | {"others": turns.others, "allowed": allowed}


def summarise(contenders, *, batch):
    """The figures of a contest, from {name: {"seconds": [...], "peak_memory": bytes, ...}}."""
    mine = contenders["minivit"]
    for entry in contenders.values():
        entry |= quartiles(entry["seconds"])
        entry["ratio"] = paired_ratio(mine["seconds"], entry["seconds"])
        if "host_seconds" in entry:
            entry["host"] = quartiles(entry["host_seconds"])
    report = dict.fromkeys(KEYS)
    for name, entry in contenders.items():
        if name in AGAINST:
            key = name.replace("-", "_")
            report[f"ratio_to_{key}"] = entry["ratio"]["median"]
            if mine["peak_memory"] and entry["peak_memory"]:
                report[f"memory_ratio_to_{key}"] = mine["peak_memory"] / entry["peak_memory"]
    if floors := [name for name in FLOORS if name in contenders]:
        report["floor"] = min(floors, key=lambda name: contenders[name]["median"])
        floor = contenders[report["floor"]]["seconds"]
        for entry in contenders.values():
            entry["floor_fraction"] = paired_ratio(floor, entry["seconds"])["median"]
        report["floor_fraction"] = mine["floor_fraction"]
    for entry in contenders.values():
        entry["images_per_second"] = batch / entry["median"]
    return report | {"images_per_second": mine["images_per_second"], "batch": batch, "contenders": contenders}


# ---- data ------------------------------------------------------------------------------------------------------------


def data_report(config, *, batch=128, engine=None, pairs=20, seed=0, patience=0.0, loading=None, progress=True):
    """The input pipeline alone, a step alone, and a step that the pipeline feeds, in turn: a dict for JSON.

    ``loading`` are keyword settings of `minivit.data.batches`: how pictures are augmented and mixed.
    """
    check_model(config)
    names, job = ("minivit", "minivit-fed", "pipeline"), Job("step", config, batch, seed, engine or {})
    job = job if loading is None else job._replace(loading=loading)
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(Child(name, job)) for name in names]
        seconds, others, _ = take_turns(children, pairs, patience=patience, progress=progress)
        settings = {child.name: child.settings for child in children}
    step, fed, pipeline = (seconds[name] for name in names)
    return {
        "batch": batch,
        "loading": job.loading,
        "others": others,
        "images_per_second": batch / quartiles(pipeline)["median"],
        "share_of_step": paired_ratio(pipeline, step),
        "added_to_step": {key: value - 1.0 for key, value in paired_ratio(fed, step).items()},
        "contenders": {
            name: {"seconds": seconds[name], "settings": settings[name]} | quartiles(seconds[name]) for name in names
        },
    }


# ---- scaling ---------------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """One measurement of a scaling panel."""

    x: int
    config: Any
    batch: int
    engine: dict


def scaling_points(config, batch, engine=None):
    """What `scaling_report` measures: {panel: list of `Point`}.

    The tokens are varied through the picture's size, up to where the N^2 products are most of the work, with an eighth
    of the pictures; the workers with four times as many, enough for each to have several micro-batches.
    """
    engine = engine or {}
    change = lambda **changes: type(config)(**{**vars(config), **changes})  # noqa: E731
    batches = sorted({max(1, batch * k // 2) for k in (1, 2, 4, 8)})
    depths = sorted({max(1, config.depth * k // 6) for k in (1, 2, 3, 6, 12)})
    grids = sorted({max(1, config.grid_size * k // 4) for k in (2, 4, 8, 16, 24)})
    sizes = [change(image_size=grid * config.patch_size) for grid in grids]
    cores = available_cores()
    workers = sorted({w for w in (1, 2, 4, 8, 16, 32, 64, 128, cores) if w <= cores})
    return {
        "batch": [Point(B, config, B, engine) for B in batches],
        "depth": [Point(L, change(depth=L), batch, engine) for L in depths],
        "tokens": [Point(c.num_tokens, c, max(1, batch // 8), engine) for c in sizes],
        "workers": [Point(w, config, 4 * batch, {**engine, "workers": w}) for w in workers],
    }


def line_through(x, seconds):
    """The line t = start + each x nearest to the times in relative terms: {"start", "each", "off"}.

    ``off`` is the largest relative distance of a time from the line, 0 where there are fewer than three.
    """
    x, t = np.asarray(x, float), np.asarray(seconds, float)
    (start, each), *_ = np.linalg.lstsq(np.stack([1 / t, x / t], axis=1), np.ones_like(t), rcond=None)
    return {"start": float(start), "each": float(each), "off": float(np.abs((start + each * x) / t - 1).max())}


def scaling_report(config, *, batch=32, against=(), engine=None, pairs=5, seed=0, patience=0.0, progress=True):
    """Step times against batch size B, depth L, tokens N and workers: a dict for JSON.

    Everybody of a panel takes turns, at every point of it, so that a slow minute of the machine bends no curve. Each
    point carries ``attention_share``, the share of N^2 products in its matrix products; the panels of batch and depth
    carry the line through our times, that of tokens the ``power`` with which our time grows from each point to the
    next, that of workers the ``speedup`` over the first point, taken round by round.
    Raises  InputError;  Disagreement
    """
    check_model(config)
    check_contenders(against)
    panels = {}
    points = scaling_points(config, batch, engine)
    for panel, those in tqdm(points.items(), desc="panels", leave=False, disable=None if progress else True):
        names = ["minivit", *(() if panel == "workers" else dict.fromkeys(against))]
        with contextlib.ExitStack() as stack:
            started = [
                start(stack, names, Job("step", p.config, p.batch, seed, p.engine), at=f" at {i}")
                for i, p in enumerate(those)
            ]
            everybody = [child for children, _ in started for child in children]
            seconds, others, _ = take_turns(everybody, pairs, patience=patience, progress=progress)
            listed = []
            for point, (children, _) in zip(those, started, strict=True):
                flops = sum(expected_flops(point.config, point.batch))
                listed.append({
                    "x": point.x, "batch": point.batch, "flops": flops, "image_size": point.config.image_size,
                    "attention_share": attention_flops(point.config, point.batch) / flops,
                    "contenders": {
                        name: {"seconds": seconds[child.name], "peak_memory": child.ask("memory")}
                        | quartiles(seconds[child.name])
                        for name, child in zip(names, children, strict=True)
                    },
                })  # fmt: skip
        x, mine = [p["x"] for p in listed], [p["contenders"]["minivit"] for p in listed]
        median = np.array([entry["median"] for entry in mine])
        panels[panel] = {"points": listed, "others": others}
        if panel in ("batch", "depth"):
            panels[panel]["line"] = line_through(x, median)
        elif panel == "tokens":
            panels[panel]["power"] = (np.diff(np.log(median)) / np.diff(np.log(x))).tolist()
        else:
            panels[panel]["speedup"] = [paired_ratio(mine[0]["seconds"], entry["seconds"]) for entry in mine]
    return {"batch": batch, "panels": panels}


# ---- layers ----------------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """One call of a layer in a step, ready to be made again by each worker."""

    path: str
    direction: str
    times: int  # per micro-batch
    part: bool  # does it lie inside another one of the list?
    calls: list  # worker's -> the call
    floors: list  # worker's -> its floor: matrix products, or a copy of as many bytes
    kind: str  # of the floor: "products" or "traffic"


def _floor_of(function, arguments, result):
    """The floor of a call: ("products", what to run), or ("traffic", ...) for an elementwise one."""
    if function == "linear_forward":
        d, m = arguments["W"].shape
        products = linear_forward_products(arguments["x"].size // d, d, m)
    elif function == "linear_backward":
        d, m = arguments["cache"].W.shape
        products = linear_backward_products(arguments["dy"].size // m, d, m, need_dx=result[0] is not None)
    elif function in ("attention_forward", "flash_attention_forward"):
        (B, h, Q, Dh), N = arguments["q"].shape, arguments["k"].shape[2]
        products = attention_forward_products(B, N, h, Dh, queries=Q)
    elif function in ("attention_backward", "flash_attention_backward"):
        (B, h, Q, Dh), N = arguments["cache"].q.shape, arguments["cache"].k.shape[2]
        products = attention_backward_products(B, N, h, Dh, queries=Q)
    else:
        # each array that goes in is read once, each that comes out is written once
        arrays = {id(a): a for value in (arguments, result) for _, a in arrays_in(value) if a.ndim}
        half = np.ones(max(1, sum(a.nbytes for a in arrays.values()) // 8), np.float32)
        copy = np.empty_like(half)
        return "traffic", lambda: np.copyto(copy, half)
    return "products", lambda: [product.run() for product in products]


LEAVES = ("linear", "layernorm", "gelu", "attention", "flash_attention", "softmax", "softmax_cross_entropy")


def captured_layers(model, images, labels, workers):
    """Each kind of leaf call of a micro-batch's step, as a list of `Layer`.

    Those of block 0 stand for every block, but for the last one where it makes the class token alone: its own follow.
    Every worker has its own arrays, of a forward and backward pass that was really made.
    """
    depth = model.config.depth
    prefixes = ("blocks.0.",)
    if model.config.pooling == "cls" and depth > 1:
        prefixes += (f"blocks.{depth - 1}.",)
    passes = []
    for _ in range(workers):
        with recording([model.flat], calls=True) as recorder:
            logits, cache = model.forward(images)
            _, loss_cache = softmax_cross_entropy_forward(logits, labels)
            model.backward(softmax_cross_entropy_backward(1.0, loss_cache), cache, model.gradient_buffer()[1])
        passes.append(recorder.calls)
    layers = []
    for (path, direction), (function, *_) in passes[0].items():
        stem, block = function.__name__.rpartition("_")[0], path.startswith("blocks.")
        if stem not in LEAVES or (block and not path.startswith(prefixes)):
            continue
        calls, floors = [], []
        for each in passes:
            function, args, keywords, arguments, result = each[path, direction]
            calls.append(lambda f=function, a=args, k=keywords: f(*a, **k))
            kind, floor = _floor_of(function.__name__, arguments, result)
            floors.append(floor)
        name, times = path, 1
        if path.startswith(prefixes[0]):
            name, times = path.removeprefix(prefixes[0]), depth + 1 - len(prefixes)
        elif block:
            name = "last " + path.removeprefix(prefixes[1])
        layers.append(Layer(name, direction, times, stem == "softmax", calls, floors, kind))
    return layers


def layers_report(config, *, engine=None, batch=128, pairs=20, seed=0, progress=True):
    """Each layer's forward and backward alone, on a micro-batch in every worker at once, against its floor.

    The floor of a linear map and of attention is its matrix products alone; that of an elementwise layer is a copy
    which reads and writes as many bytes as all that it must read and write. Returns a dict for JSON; seconds are those
    of one call while every worker makes one.
    """
    check_model(config)
    engine = engine or {}
    flat, images, labels = problem(Job("step", config, batch, seed, engine))
    model = ViT(config, flat=flat)
    optimizer = AdamW(flat, params.decay_mask(model.table), weight_decay=0.05)
    rows = {}
    with Engine(model, **engine) as running, ThreadPoolExecutor(running.workers) as pool:
        micro = min(running.micro_batch, batch)
        layers = captured_layers(model, images[:micro], labels[:micro], running.workers)
        gradient = np.full_like(flat, 1e-3)
        traffic = np.ones(flat.size * 4, np.float32)  # reads theta, g, m, v and the mask, writes theta, m, v
        copy = np.empty_like(traffic)
        layers.append(Layer(
            "adamw", "update", 1, False, [lambda: optimizer.step(flat, gradient, LR)],
            [lambda: np.copyto(copy, traffic)], "traffic",
        ))  # fmt: skip

        def together(functions, repeats):
            """Seconds of one call while each worker makes ``repeats`` of its own."""
            started = time.perf_counter()
            list(pool.map(lambda function: [function() for _ in range(repeats)], functions))
            return (time.perf_counter() - started) / repeats

        def measure(functions):
            once = together(functions, 2)
            return together(functions, max(1, min(200, round(0.01 / max(once, 1e-6)))))

        def step():
            running.gradient(images, labels)
            optimizer.step(flat, running.grad, LR)

        turn(step, 2)
        steps, others = [], []
        for _ in tqdm(range(pairs), desc="rounds", leave=False, disable=None if progress else True):
            before = _glance()
            steps.append(turn(step, 1)[0])
            for layer in layers:
                row = rows.setdefault((layer.path, layer.direction), {"seconds": [], "floor": []})
                row["seconds"].append(measure(layer.calls))
                row["floor"].append(measure(layer.floors))
            others.append(_share_of_others(before, _glance()))
        settings = {"workers": running.workers, "micro_batch": micro, "blas": blas()}
    waves = math.ceil(math.ceil(batch / micro) / settings["workers"])  # micro-batches that one worker makes
    listed = []
    for layer in layers:
        row = rows[layer.path, layer.direction]
        times = layer.times * (1 if layer.path == "adamw" else waves)
        listed.append({
            "layer": layer.path, "direction": layer.direction, "times": times, "inside_another": layer.part,
            "floor_kind": layer.kind, "seconds": quartiles(row["seconds"]), "floor": quartiles(row["floor"]),
            "floor_fraction": paired_ratio(row["floor"], row["seconds"])["median"],
            "share_of_step": float(np.median(times * np.asarray(row["seconds"]) / steps)),
        })  # fmt: skip
    whole = [row for row in listed if not row["inside_another"]]
    return {
        "batch": batch, "others": others, "step": quartiles(steps), "layers": listed, "settings": settings,
        "rest_of_step": 1.0 - sum(row["share_of_step"] for row in whole),
        "floor_fraction": sum(r["times"] * r["floor"]["median"] for r in whole) / quartiles(steps)["median"],
    }  # fmt: skip


# ---- the machine -----------------------------------------------------------------------------------------------------


def processor():
    """The processor's name, as well as the system knows it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            return subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
    return platform.processor() or platform.machine()


def machine():
    """What the times depend on: processor, cores, BLAS, versions and settings from the environment."""
    names = ("OPENBLAS", "OMP", "GOMP", "KMP", "MKL", "BLIS", "VECLIB", "XLA", "JAX", "TORCH", "MINIVIT", "MALLOC")
    return {
        "processor": processor(), "cores": available_cores(), "blas": blas(), "system": platform.platform(),
        "python": platform.python_version(), "numpy": np.__version__, "minivit": __version__,
        "environment": {key: value for key, value in sorted(os.environ.items())
                        if key.split("_")[0] in names and key != "KMP_DUPLICATE_LIB_OK"},  # threadpoolctl sets that
    }  # fmt: skip
