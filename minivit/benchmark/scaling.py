"""A step's time against batch size, depth, tokens and workers."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from minivit.benchmark.contenders import Job
from minivit.benchmark.contest import check_contenders, check_model, start
from minivit.benchmark.turns import paired_ratio, quartiles, take_turns
from minivit.model.costs import attention_flops, expected_flops
from minivit.training.engines.cut import available_cores


class Point(NamedTuple):
    """One measurement of a scaling panel."""

    x: int
    config: Any
    batch: int
    engine: dict


def scaling_points(config, batch, engine=None):
    """What `scaling_report` measures: {panel: list of `Point`}.

    The tokens are varied through the image's size, up to where the N^2 products are most of the work, with an eighth
    of the images; the workers with four times as many, enough for each to have several micro-batches.
    """
    engine = engine or {}
    batches = sorted({max(1, batch * k // 2) for k in (1, 2, 4, 8)})
    depths = sorted({max(1, config.depth * k // 6) for k in (1, 2, 3, 6, 12)})
    grids = sorted({max(1, config.grid_size * k // 4) for k in (2, 4, 8, 16, 24)})
    sizes = [replace(config, image_size=grid * config.patch_size) for grid in grids]
    cores = available_cores()
    workers = sorted({w for w in (1, 2, 4, 8, 16, 32, 64, 128, cores) if w <= cores})
    return {
        "batch": [Point(B, config, B, engine) for B in batches],
        "depth": [Point(L, replace(config, depth=L), batch, engine) for L in depths],
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
            teams = [
                start(stack, names, Job("step", p.config, p.batch, seed, p.engine), at=f" at {i}")
                for i, p in enumerate(those)
            ]
            everybody = [child for children, _ in teams for child in children]
            seconds, others, _ = take_turns(everybody, pairs, patience=patience, progress=progress)
            rows = []
            for point, (children, _) in zip(those, teams, strict=True):
                flops = sum(expected_flops(point.config, point.batch))
                rows.append({
                    "x": point.x, "batch": point.batch, "flops": flops, "image_size": point.config.image_size,
                    "attention_share": attention_flops(point.config, point.batch) / flops,
                    "contenders": {
                        name: {"seconds": seconds[child.name], "peak_memory": child.ask("memory")}
                        | quartiles(seconds[child.name])
                        for name, child in zip(names, children, strict=True)
                    },
                })  # fmt: skip
        x, mine = [p["x"] for p in rows], [p["contenders"]["minivit"] for p in rows]
        median = np.array([entry["median"] for entry in mine])
        panels[panel] = {"points": rows, "others": others}
        if panel in ("batch", "depth"):
            panels[panel]["line"] = line_through(x, median)
        elif panel == "tokens":
            panels[panel]["power"] = (np.diff(np.log(median)) / np.diff(np.log(x))).tolist()
        else:
            panels[panel]["speedup"] = [paired_ratio(mine[0]["seconds"], entry["seconds"]) for entry in mine]
    return {"batch": batch, "panels": panels}
