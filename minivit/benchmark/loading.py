"""The input pipeline beside a training step: does it keep up?"""

from __future__ import annotations

import contextlib

from minivit.benchmark.child import Child
from minivit.benchmark.contenders import Job
from minivit.benchmark.contest import check_model
from minivit.benchmark.turns import paired_ratio, quartiles, take_turns


def data_report(config, *, batch=128, engine=None, pairs=20, seed=0, patience=0.0, loading=None, progress=True):
    """The input pipeline alone, a step alone, and a step that the pipeline feeds, in turn: a dict for JSON.

    ``loading`` are keyword settings of `minivit.data.batches`: how images are augmented and mixed.
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
