"""How quick is it? A step of ours against PyTorch's, JAX's and the machine's own limit, in turn and pair by pair.

    report = contest(ViTConfig(), batch=128, against=("torch", "jax"))
    report["ratio_to_torch"], report["floor_fraction"]

**In turn**, so that a slow minute of the machine drops out of the ratios: see `minivit.benchmark.turns`.

**Each in its own process**, which waits on a pipe while another one steps (`minivit.benchmark.child`): thread pools do
not fight, and the peak memory is the contender's own.

**The same work**: loss, gradients and update agree with ours, see `minivit.benchmark.agreement`.

**The floor** is the step's matrix products alone (see `minivit.benchmark.contenders.ours`), timed in the same rounds;
the ``floor_fraction`` of a step is floor / step, 1 being as quick as the machine multiplies matrices.
"""

from __future__ import annotations

import contextlib
import importlib.util

from tqdm import tqdm

from minivit.base.errors import InputError
from minivit.benchmark.agreement import COARSER, GRADIENT_TOLERANCE, LOSS_TOLERANCE, agree, agree_after_update
from minivit.benchmark.child import Child
from minivit.benchmark.contenders import Job
from minivit.benchmark.turns import paired_ratio, quartiles, take_turns

AGAINST = ("torch", "torch-compile", "jax", "plain")  # whom one may ask for
NEEDS = {"torch": "torch", "torch-compile": "torch", "jax": "jax"}  # contender -> what must be installed
FLOORS = ("floor-threads", "floor-workers")
KEYS = (  # of a contest's report in any case: None for what was not measured
    "ratio_to_torch", "ratio_to_torch_compile", "ratio_to_jax", "memory_ratio_to_torch", "floor", "floor_fraction",
)  # fmt: skip


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
    limits = {"gradient": coarser * GRADIENT_TOLERANCE, "loss": coarser * LOSS_TOLERANCE}
    return summarise(contenders, batch=batch) | {"others": turns.others, "allowed": limits}


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
