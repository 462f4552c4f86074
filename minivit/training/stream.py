"""The batches of an epoch, as the steps of a run take them."""

from __future__ import annotations

from contextlib import closing
from itertools import islice

from minivit.data.loader import batches, epoch_order
from minivit.training.config import loading_settings
from minivit.training.step import Batch


def begin_epoch(run):
    """Draw the order of the epoch that a run takes up."""
    run.state.begin_epoch(epoch_order(run.plan.images, seed=run.config.seed, epoch=run.state.epoch))


def groups(run, *, half_size=False):
    """What each step of the epoch under way takes, from where the run stands on.

    With ``half_size`` images have half their height and width.
    Yields  (batches, images in them, batches of the epoch that are done then, whether the epoch ends there)
    """
    c, state, plan = run.config, run.state, run.plan
    epoch, start, group = state.epoch, state.batch, c.batch_size * c.accumulate
    order = state.order[: (plan.total_steps - epoch * plan.steps_per_epoch) * group]  # all, but at a run's end
    count, per_epoch = (-(-len(o) // c.batch_size) for o in (order, state.order))  # batches
    stream = batches(
        run.data.train_images, run.data.train_labels, order, c.batch_size, seed=c.seed, epoch=epoch, start=start,
        prefetch=0 if run.on_gpu else 2, half_size=half_size, **loading_settings(c, plan.model.num_classes),
    )  # fmt: skip

    def numbered():
        for index, images, labels in stream:
            number = epoch * per_epoch + index
            yield Batch(number, images, run.task.targets(images, labels, number))

    with closing(stream):  # ends its thread, also when the consumer breaks off
        source = numbered()
        for first in range(start, count, c.accumulate):
            after = min(first + c.accumulate, count)
            yield islice(source, after - first), min(group, len(order) - first * c.batch_size), after, after == count
