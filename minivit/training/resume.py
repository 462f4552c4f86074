"""Is a checkpoint the run's own? What it says of model, task, settings, start and data against what is asked for."""

from __future__ import annotations

from dataclasses import asdict

from minivit.base.errors import InputError
from minivit.training.config import FREE_ON_RESUME, MAY_MOVE, train_config_of


def check_same_run(record, plan, task, origin, fingerprint):
    """Raises InputError if a checkpoint's `Record` belongs to another model, task, settings, start or data.

    ``origin``: where this run's first parameters came from, or None; ``fingerprint``: of its data.
    """
    path = record.path
    if record.config != plan.model:
        raise InputError(f"{path} holds another model: {_difference(asdict(record.config), asdict(plan.model))}")
    there, own = record.pretraining, task.settings.get("pretraining")
    if (there is None) != (own is None):
        raise InputError(
            f"{path} is of another kind of run; go on with minivit {'train' if there is None else 'pretrain'} --resume"
        )
    if there != own:
        raise InputError(f"{path} was trained for another task: {_difference(there, own)}")
    settings = asdict(train_config_of(record))
    if difference := _difference(settings, asdict(plan.config), FREE_ON_RESUME + MAY_MOVE):
        raise InputError(f"{path} was trained with other settings: {difference}; start a new run with another --out")
    starts = [{"crc": None, **(start or {})} for start in (record.start, origin)]
    if difference := _difference(*starts, ("checkpoint",)):  # the file itself may have moved
        raise InputError(f"{path} began with other parameters: {difference}; start a new run with another --out")
    if record.data.get("fingerprint") != fingerprint:
        raise InputError(f"{path} was trained on other images than those found now")


def _difference(there, own, free=()):
    """The first few settings that differ, in words; empty if none does."""
    parts = [
        f"{name} {there.get(name)} there, {own.get(name)} asked for"
        for name in dict.fromkeys([*there, *own])
        if name not in free and there.get(name) != own.get(name)
    ]
    return ", ".join(parts[:3]) + (", ..." if len(parts) > 3 else "")
