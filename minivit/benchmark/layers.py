"""Each layer of a step alone, on a micro-batch in every worker at once, against its own floor."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from minivit.base import params
from minivit.benchmark.contenders import LR, Job, problem, turn
from minivit.benchmark.contenders.ours import (
    attention_backward_products,
    attention_forward_products,
    blas,
    linear_backward_products,
    linear_forward_products,
)
from minivit.benchmark.contest import check_model
from minivit.benchmark.turns import glance, paired_ratio, quartiles, share_of_others
from minivit.laboratory.recorder import arrays_in, recording
from minivit.layers.loss import softmax_cross_entropy_backward, softmax_cross_entropy_forward
from minivit.model import ViT
from minivit.optim import AdamW
from minivit.training.engines.cpu import Engine

LEAVES = (
    "linear", "layernorm", "gelu", "exact_gelu", "attention", "flash_attention", "softmax", "softmax_cross_entropy",
)  # fmt: skip


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


def _call_again(calls, path, direction):
    """A recorded call as it is made in a step: by a twin, where there is one."""
    function, arguments, keywords, *_ = calls[path, "forward"]
    if direction == "forward":
        return lambda: function(*arguments, **keywords)
    _, cache = function(*arguments, **keywords)  # what was recorded is that of the plain function
    backward, (dy, *_), *_ = calls[path, "backward"]
    return lambda: backward(dy, cache)


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
        with recording(model=model, calls=True) as recorder:
            logits, cache = model.forward(images)
            _, loss_cache = softmax_cross_entropy_forward(logits, labels)
            recorder.name(loss_cache, "loss")
            model.backward(softmax_cross_entropy_backward(1.0, loss_cache), cache, model.gradient_buffer()[1])
        passes.append(recorder.calls)
    layers = []
    for (path, direction), (function, *_) in passes[0].items():
        stem, block = function.__name__.rpartition("_")[0], path.startswith("blocks.")
        if stem not in LEAVES or (block and not path.startswith(prefixes)):
            continue
        calls, floors = [], []
        for each in passes:
            function, _, _, arguments, result = each[path, direction]
            kind, floor = _floor_of(function.__name__, arguments, result)
            calls.append(_call_again(each, path, direction))
            floors.append(floor)
        name, times = path, 1
        if path.startswith(prefixes[0]):
            name, times = path.removeprefix(prefixes[0]), depth + 1 - len(prefixes)
        elif block:
            name = "last " + path.removeprefix(prefixes[1])
        layers.append(Layer(name, direction, times, stem == "softmax", calls, floors, kind))
    return layers


def adamw_layer(optimizer, flat):
    """The update as a `Layer`: it reads parameters, gradient, two moments and the mask, and writes all but the mask."""
    gradient = np.full_like(flat, 1e-3)
    traffic = np.ones(flat.size * 4, np.float32)
    copy = np.empty_like(traffic)
    return Layer(
        "adamw", "update", 1, False, [lambda: optimizer.step(flat, gradient, LR)],
        [lambda: np.copyto(copy, traffic)], "traffic",
    )  # fmt: skip


def seconds_together(pool, functions):
    """Seconds of one call while each worker makes calls of its own, as many as fill 10 ms."""

    def seconds_of(repeats):
        started = time.perf_counter()
        list(pool.map(lambda function: [function() for _ in range(repeats)], functions))
        return (time.perf_counter() - started) / repeats

    once = seconds_of(2)
    return seconds_of(max(1, min(200, round(0.01 / max(once, 1e-6)))))


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
    with Engine(model, **engine) as running, ThreadPoolExecutor(running.workers) as pool:
        micro = min(running.micro_batch, batch)
        layers = captured_layers(model, images[:micro], labels[:micro], running.workers)
        layers.append(adamw_layer(optimizer, flat))

        def step():
            running.gradient(images, labels)
            optimizer.step(flat, running.grad, LR)

        turn(step, 2)
        steps, others, times = [], [], [Times([], []) for _ in layers]
        for _ in tqdm(range(pairs), desc="rounds", leave=False, disable=None if progress else True):
            before = glance()
            steps.append(turn(step, 1).seconds)
            for layer, (seconds, floor) in zip(layers, times, strict=True):
                seconds.append(seconds_together(pool, layer.calls))
                floor.append(seconds_together(pool, layer.floors))
            others.append(share_of_others(before, glance()))
        settings = {"workers": running.workers, "micro_batch": micro, "blas": blas()}
    waves = math.ceil(math.ceil(batch / micro) / settings["workers"])  # micro-batches that one worker makes
    rows = [
        {"layer": layer.path, "direction": layer.direction, "inside_another": layer.part, "floor_kind": layer.kind}
        | part_of_step(each, layer.times * (1 if layer.path == "adamw" else waves), steps)
        for layer, each in zip(layers, times, strict=True)
    ]
    return {"batch": batch, "others": others, "settings": settings} | report_of_parts(rows, steps)


class Times(NamedTuple):
    """Seconds of one call of a part of a step, and of its floor, in each round."""

    seconds: list
    floor: list


def part_of_step(times, count, steps):
    """What the `Times` of a part say of it, if a step makes ``count`` calls and takes ``steps`` seconds: for JSON."""
    return {
        "times": count, "seconds": quartiles(times.seconds), "floor": quartiles(times.floor),
        "floor_fraction": paired_ratio(times.floor, times.seconds)["median"],
        "share_of_step": float(np.median(count * np.asarray(times.seconds) / steps)),
    }  # fmt: skip


def report_of_parts(rows, steps):
    """What all parts of a step together say of it; those that lie inside another one do not count twice."""
    step, whole = quartiles(steps), [row for row in rows if not row["inside_another"]]
    return {
        "step": step, "layers": rows, "rest_of_step": 1.0 - sum(row["share_of_step"] for row in whole),
        "floor_fraction": sum(row["times"] * row["floor"]["median"] for row in whole) / step["median"],
    }  # fmt: skip
