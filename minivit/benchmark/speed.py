"""What one batch of a model costs, in a process of its own."""

from __future__ import annotations

from minivit.benchmark.child import Child
from minivit.benchmark.contenders import Job
from minivit.benchmark.turns import quartiles


def speed(config, task, batch, turns):
    """What a batch costs on all cores: {"images_per_second", "median", "q1", "q3" (seconds), "peak_memory" (bytes)}.

    ``task``: "infer" or "step"; ``turns``: how often it is timed, after a first time for nothing
    Raises  InputError: it cannot be done.
    """
    with Child("minivit", Job(task, config, batch, 0, {})) as child:
        child.ask("turn", 1)
        times = quartiles([child.ask("turn", 1)[0] for _ in range(turns)])
        return {"images_per_second": batch / times["median"], **times, "peak_memory": child.ask("memory")}
