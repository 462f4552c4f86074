"""A run, put together: plan, task, model, optimiser, state, engine and folder; the loop is in `minivit.training.loop`.

All that a run depends on at any moment is in its checkpoint, see `minivit.training.state`. A run that was interrupted
anywhere therefore goes on bit for bit. No checkpoint holds a number that is not finite: a run that diverges ends before
it is written.
"""

from __future__ import annotations

import shlex
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from minivit.base import params as parameters
from minivit.base.backend import device_name, to_device, to_host, use_device
from minivit.base.errors import InputError, drawing
from minivit.base.files import also_as, sync, write_json
from minivit.base.finite import is_finite, quiet_overflow
from minivit.data.source import fingerprint
from minivit.optim import EMA, Muon
from minivit.training import loop
from minivit.training.engines.cut import available_cores
from minivit.training.folder import BEST, LAST, METRICS, PREVIOUS, SETTINGS, SUMMARY, lock, refuse_used, trim_metrics
from minivit.training.parts import dataset_on_device, engine_of, first_parameters, optimizer_of
from minivit.training.plan import plan_of
from minivit.training.resume import check_same_run
from minivit.training.signals import StopOnSignals
from minivit.training.state import State, state_from
from minivit.training.step import NotFinite, Step
from minivit.training.step_gpu import CudaStep
from minivit.training.task import Classification
from minivit.weights import checkpoint


class Diverged(InputError):
    """A run that made a number that is not finite: its settings are to be changed."""


class Trainer:
    """One run: a model, an optimiser, where they stand, and the folder they write to.

    ``task(dataset, model_config, config)`` makes what is learned, see `minivit.training.task` [classification].
    ``describe`` is stored in checkpoints beside the model's configuration and the settings: how to find the data again.
    ``start``, a `minivit.weights.start.Start`, holds the first parameters if another model gives them, and their
    origin, which is stored too. ``resume``, a checkpoint as `checkpoint.read` gives it, is where the run goes on.
    ``draw(run, outputs)`` draws the figures at the end from the outputs of the last evaluation; ``diagnose`` names the
    first number that is not finite, see `minivit.training.step.Step`; ``on_epoch(run)`` is called after each epoch, to
    look at the run; it must not change it.
    Raises  InputError: settings, data, folder and checkpoint do not fit together; nothing has been written then.
    """

    def __init__(
        self, dataset, model_config, config, out, *, task=Classification, describe=None, start=None, resume=None,
        progress=True, draw=None, diagnose=None, on_epoch=None,
    ):  # fmt: skip
        self.dataset, self.out, self.progress, self.describe = dataset, Path(out), progress, describe or {}
        self.draw, self.diagnose, self.on_epoch = draw, diagnose, on_epoch
        self.task = task(dataset, model_config, config)
        self.plan = plan_of(dataset, model_config, config, self.task, start=start)
        self.config, self.on_gpu = self.plan.config, self.plan.device != "cpu"
        self.task.check()
        self.fingerprint, self.origin = fingerprint(dataset), start.origin if start else None
        if resume:
            check_same_run(resume[1], self.plan, self.task, self.origin, self.fingerprint)
        use_device(self.plan.device)
        self.data = dataset_on_device(dataset, self.plan.device)
        self._allocate(start, resume)
        self.resumed = Path(resume[1].path) if resume else None  # the checkpoint that the run goes on from
        self._started = None  # the moment when this process took up the training
        self._saved_at = time.monotonic()
        self._stop = None
        self._broken = False  # within the loop of a training that did not end as it should

    def _allocate(self, start, resume):
        """Make model, optimiser, average and state: new, from a start, or from a checkpoint."""
        c, device, table = self.config, self.plan.device, self.task.table()
        if resume:
            checkpoint.check_size(resume[0], table, resume[1].path)
            first = np.empty(parameters.count(table), np.float32)  # to be filled below
        elif start and start.flat is not None:
            first = start.flat.copy()
        else:
            first = first_parameters(self.task, self.dataset, c)
        self.model = self.task.model(to_device(first, device))
        self.optimizer, self.trained = optimizer_of(self.plan, self.model, table)
        self.ema = EMA(self.model.flat, c.ema_decay) if c.ema_decay else None
        self.tested_model = self.task.model(self.ema.flat) if self.ema else self.model
        self.state = State(self.model.flat, self.ema.flat if self.ema else None, self.optimizer.state)
        if resume:
            self.state.take(state_from(*resume, table, list(self.optimizer.state), self.plan), device)
            self.optimizer.steps = self.state.step
            if self.ema:
                self.ema.steps = self.state.step

    def learning_rate(self, step):
        """The learning rate of a step, counted from 0."""
        return self.plan.learning_rate(step)

    @property
    def finished(self):
        """Whether every epoch is done and tested."""
        return self.state.epoch == self.config.epochs

    @property
    def stopped(self):
        """Whether the run has been asked to stop."""
        return self._stop is not None

    def stop(self, reason):
        """Ask the run to stop after the step under way, with a checkpoint."""
        self._stop = reason

    def seconds(self):
        """How long the training has taken so far, in all the processes that took part."""
        return self.state.seconds + (0.0 if self._started is None else time.monotonic() - self._started)

    def pause(self):
        """Stop the clock."""
        self.state.seconds, self._started = self.seconds(), None

    def checkpoint_is_due(self):
        """Whether the last checkpoint is as old as it may become."""
        return time.monotonic() - self._saved_at >= self.config.checkpoint_seconds

    def evaluate(self, engine):
        """The task's `Evaluation` of the test images, by the averaged weights if there are such."""
        return self.task.evaluate(engine, self.tested_model, self.data)

    def save(self, name=LAST):
        """Write the run's state to a checkpoint in its folder.

        Raises  NotFinite: it holds a number that is not finite; nothing is written.  OSError: see `write_atomically`.
        """
        if not all(is_finite(to_host(vector)) for vector in self.state.vectors()):
            raise NotFinite("a parameter is not finite any more")
        sync(self.out / METRICS)  # lines of steps that the checkpoint counts are never written again
        if name == LAST:
            also_as(self.out / LAST, self.out / PREVIOUS)
        checkpoint.save(self.out / name, self.state.to_arrays(self.model.table), meta_of(self))
        if name == LAST:
            self._saved_at = time.monotonic()

    def settings(self):
        """What was asked for, for settings.json and summary.json."""
        start = {"start": self.origin} if self.origin else {}
        settings = {"model": asdict(self.plan.model), "train": asdict(self.config), "data": self.describe}
        return settings | start | self.task.settings

    def engine(self, *, half_size=False):
        """The engine that the settings ask for, a context manager; with ``half_size`` for images of half the size."""
        engine = engine_of(self.plan, self.task, self.model, self.trained, half_size=half_size)
        if isinstance(self.optimizer, Muon) and not half_size:
            self.optimizer.each = engine.each
        return engine

    def step_of(self, engine):
        """What makes the run's steps on an engine."""
        c, parts = self.config, (engine, self.optimizer, self.ema)
        if self.on_gpu and c.accumulate == 1:
            return CudaStep(*parts, clip_norm=c.clip_norm, graph=c.graph)
        return Step(*parts, clip_norm=c.clip_norm, diagnose=self.diagnose, check=c.check_finite)

    def run(self):
        """Train from where the run stands to its end; returns the summary, or None if it was stopped by a signal.

        After that, another call goes on, from the step that it had reached; not where a second Ctrl-C broke a step off.
        Raises  InputError: the folder holds another run, another process trains into it, or the run diverges.
        """
        if self._broken:
            raise InputError(f"this run broke off within a step; take it up again from {self.out / LAST}")
        self.out.mkdir(parents=True, exist_ok=True)
        self._stop = None
        with lock(self.out), StopOnSignals(self), quiet_overflow(), diverging(self):
            if self.resumed:
                if self.resumed in (self.out / PREVIOUS, self.out / BEST):  # last.npz is damaged
                    also_as(self.resumed, self.out / LAST)
                trim_metrics(self.out, self.state.step, self.state.epoch)
            else:
                refuse_used(self.out)
                self.save()  # from here on there is always something to resume from
                self.resumed = True  # by another call, too
            write_json(self.out / SETTINGS, self.settings())
            with self.engine() as engine:
                evaluation = None
                if not self.finished:
                    self._started = self._saved_at = time.monotonic()
                    self._broken = True
                    evaluation = loop.train(self, engine)
                    self._broken = False
                if self.finished and not self.stopped:
                    return finish(self, engine, evaluation or self.evaluate(engine))
        print(
            f"stopped at step {self.state.step} of {self.plan.total_steps}; go on with --resume --out "
            f"{shlex.quote(str(self.out))}"
        )
        return None


@contextmanager
def diverging(run):
    """While active, a number that is not finite ends the run with one line that says what to do."""
    try:
        yield
    except NotFinite as error:
        raise Diverged(
            f"{error} at step {run.state.step} (epoch {run.state.epoch + 1}): the run diverged; {run.out / LAST} holds "
            "it from before; start again with a lower --lr, a longer --warmup-epochs or another --clip-norm"
        ) from None


def meta_of(run):
    """The meta of a run's checkpoints: everything in them that is not an array."""
    return {
        **checkpoint.model_meta(run.plan.model),
        "settings": asdict(run.config),
        "data": {**run.describe, "name": run.dataset.name, "fingerprint": run.fingerprint},
        "class_names": list(run.dataset.class_names),
        "start": run.origin,
        **run.task.settings,
        "progress": replace(run.state, seconds=run.seconds()).progress(),
        "versions": checkpoint.versions(),
    }


def finish(run, engine, evaluation):
    """Write the summary of a run, which is returned, and then draw its figures."""
    summary = summary_of(run, engine, evaluation)
    write_json(run.out / SUMMARY, summary)
    if run.draw:
        with drawing():
            run.draw(run, evaluation.outputs)
    return summary


def summary_of(run, engine, evaluation):
    """The content of a finished run's summary.json."""
    state = run.state
    return {
        "test_accuracy": evaluation.accuracy,
        "test_loss": evaluation.loss,
        "best_test_accuracy": state.best["accuracy"],
        "best_epoch": state.best["epoch"],
        "best_is": "the best on the test images, chosen by them",
        "train_seconds": round(state.seconds, 2),  # with the evaluations, and of all the processes that took part
        "images_per_second": round(run.plan.images_in_all / max(state.seconds, 1e-9), 1),
        "epochs": run.config.epochs,
        "steps": state.step,
        "parameters": int(run.model.flat.size),
        "test_images": len(run.dataset.test_images),
        "data": run.dataset.source,
        "workers": engine.workers,
        "cores": available_cores(),
        "device": device_name(run.plan.device),
        **run.task.summary(),
        "settings": run.settings(),
        "versions": checkpoint.versions(),
    }
