"""The loop of a training: epochs of steps, tests between them; exact to resume from any step."""

from __future__ import annotations

import math
import sys
import time
from contextlib import ExitStack, closing

from tqdm import tqdm

from minivit.training.folder import BEST, metrics_log
from minivit.training.step import NotFinite
from minivit.training.stream import begin_epoch, groups

BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"  # images/s is in the postfix


def progress_bar(total, done, wanted):
    """A bar of steps on stderr; none where that is not a terminal, or where it is not wanted."""
    return tqdm(
        total=total, initial=done, mininterval=0.25, dynamic_ncols=True, bar_format=BAR,
        disable=None if wanted else True,
    )  # fmt: skip


def train(run, engine):
    """Train from where a `Trainer` stands to its end, or until it is to stop, with a checkpoint at the end.

    Returns  the `Evaluation` of the last epoch, or None where the run stopped before it
    Raises  NotFinite
    """
    plan, state, evaluation = run.plan, run.state, None
    with ExitStack() as stack:
        log = stack.enter_context(metrics_log(run.out))
        bar = stack.enter_context(progress_bar(plan.total_steps, state.step, run.progress))
        whole, small = run.step_of(engine), None
        if state.epoch < plan.small_epochs:
            small = run.step_of(stack.enter_context(run.engine(half_size=True)))
        while not run.finished and not run.stopped:
            train_epoch(run, small if state.epoch < plan.small_epochs else whole, log, bar)
            if not run.stopped:
                if small and state.epoch + 1 == plan.small_epochs:
                    small.release()  # of its graph there is no more use
                evaluation = end_epoch(run, engine, log)
        run.pause()
        run.save()
    return evaluation


def train_epoch(run, step, log, bar):
    """The steps of the epoch under way, from where the run stands on."""
    c, state, plan = run.config, run.state, run.plan
    if state.batch == 0:
        begin_epoch(run)
    since, images = time.monotonic(), 0
    unread = []  # the figures of the steps that are still on the device
    half_size = step.engine.model.config.image_size < plan.model.image_size
    with closing(groups(run, half_size=half_size)) as steps:
        for batches, count, after, last in steps:
            lr = run.learning_rate(state.step)
            unread.append(step(batches, count, lr))
            logged = (state.step + 1) % c.log_every == 0 or state.step + 1 == plan.total_steps
            if logged or last or step.on_host:  # a GPU is not waited for in between
                figures = read(run, unread)
            state.step, state.batch = state.step + 1, after
            images += count
            bar.update()
            if logged:
                now = time.monotonic()
                rate, since, images = images / max(now - since, 1e-9), now, 0
                log(
                    kind="train", step=state.step, epoch=state.epoch + 1, lr=lr, loss=figures.loss,
                    accuracy=run.task.accuracy(figures.loss, figures.correct, count), grad_norm=figures.norm,
                    images_per_second=round(rate, 1),
                )  # fmt: skip
                loss, accuracy = running_figures(run)
                bar.set_postfix_str(f"loss {loss:.3f} acc {accuracy:.1%} {rate:,.0f} img/s")
            if run.stopped:
                break
            if run.checkpoint_is_due():
                read(run, unread)
                run.save()
        read(run, unread)


def read(run, unread):
    """Add the figures of the steps in the list to the epoch's and empty it: those of the last step.

    Raises  NotFinite
    """
    figures = None
    for each in unread:
        try:
            figures = each.read()
        except NotFinite as error:
            since = f" or in the {run.config.log_every} steps before it; on the CPU a run names the tensor;"
            raise NotFinite(f"{error}{since if run.on_gpu else ''}") from None
        run.state.add(figures)
    unread.clear()
    return figures


def running_figures(run):
    """Mean loss and figure of merit over the epoch so far."""
    running = run.state.running
    loss = running["loss"] / running["seen"]
    return loss, run.task.accuracy(loss, running["correct"], running["seen"])


def end_epoch(run, engine, log):
    """Count the epoch as done, and test the model if it is time: its `Evaluation`, or None."""
    c, state, merit = run.config, run.state, run.task.merit
    state.epoch, state.batch = state.epoch + 1, 0
    if run.on_epoch:
        run.on_epoch(run)
    if state.epoch % c.evaluate_every and not run.finished:
        return None
    evaluation = run.evaluate(engine)
    loss, accuracy, _ = evaluation
    if not math.isfinite(loss):
        raise NotFinite(f"the test loss is {loss}")
    train_loss, train_accuracy = running_figures(run)
    log(
        kind="test", step=state.step, epoch=state.epoch, loss=loss, accuracy=accuracy, train_loss=train_loss,
        train_accuracy=train_accuracy, seconds=round(run.seconds(), 2),
    )  # fmt: skip
    tqdm.write(
        f"epoch {state.epoch:3d}/{c.epochs}  train loss {train_loss:.4f} {merit} {train_accuracy:6.2%}  "
        f"test loss {loss:.4f} {merit} {accuracy:6.2%}  {run.seconds():.0f} s",
        file=sys.stdout,
    )
    sys.stdout.flush()
    if accuracy > state.best["accuracy"]:
        state.best = {"accuracy": accuracy, "epoch": state.epoch}
        run.save(BEST)
    return evaluation
