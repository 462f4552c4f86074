"""Checkpoints that were altered are refused, and change nothing."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from small_runs import HARD, MODEL, resumed, stop_at, trainer

from minivit.base import params as parameters
from minivit.base.errors import InputError
from minivit.training import parts
from minivit.training.folder import LAST
from minivit.weights import checkpoint

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The arrays and meta of a run stopped in the middle of its second epoch."""
    out = tmp_path_factory.mktemp("stopped")
    run = trainer(out)
    stop_at(run, 6)
    run.run()
    return checkpoint.load(out / LAST)


def altered(key, value, section="progress"):
    def change(arrays, meta):
        if value is None:
            del meta[section][key]
        else:
            meta[section][key] = value

    return change


def array(key, value):
    def change(arrays, meta):
        if value is None:
            del arrays[key]
        else:
            arrays[key] = value(arrays[key])

    return change


def whole_section(section, value):
    return lambda arrays, meta: meta.__setitem__(section, value)


ALTERED = {
    "no progress": whole_section("progress", None),
    "progress a list": whole_section("progress", [1]),
    "no step": altered("step", None),
    "step of another": altered("step", 7),
    "step a float": altered("step", 6.0),
    "step a text": altered("step", "6"),
    "negative": altered("epoch", -1),
    "epoch beyond the end": altered("epoch", 9),
    "odd batch": altered("batch", 3),
    "batch beyond the end": altered("batch", 400),
    "optimiser steps": altered("optimizer_steps", 5),
    "average's steps": altered("ema_steps", 0),
    "running a number": altered("running", 3),
    "running incomplete": altered("running", {"loss": 1.0}),
    "running NaN": altered("running", {"loss": math.nan, "correct": 1, "seen": 2}),
    "best a text": altered("best", {"accuracy": "high", "epoch": 1}),
    "seconds a text": altered("seconds", "many"),
    "order missing": array("order", None),
    "order no permutation": array("order", lambda a: a * 0),
    "order of floats": array("order", lambda a: a.astype(float)),
    "order of texts": array("order", lambda a: a.astype(str)),
    "order too short": array("order", lambda a: a[:-1]),
    "optimiser missing": array("optimizer/m", None),
    "optimiser short": array("optimizer/m", lambda a: a[:-1]),
    "optimiser NaN": array("optimizer/v", lambda a: a * np.nan),
    "optimiser of texts": array("optimizer/v", lambda a: a.astype("U4")),
    "average NaN": array("ema/head.weight", lambda a: a * np.nan),
    "parameter missing": array("params/head.weight", None),
    "parameter NaN": array("params/norm.bias", lambda a: a + np.inf),
    "settings missing": whole_section("settings", None),
    "settings a list": whole_section("settings", []),
    "settings unknown": altered("speed", 3, "settings"),
    "settings of another type": altered("lr", "fast", "settings"),
    "other settings": altered("lr", 0.5, "settings"),
    "other model": altered("width", 16, "config"),
    "data missing": whole_section("data", None),
    "other images": altered("fingerprint", 3, "data"),
}


@pytest.mark.parametrize("change", ALTERED.values(), ids=ALTERED.keys())
def test_an_altered_checkpoint_is_refused_and_changes_nothing(tmp_path, stopped, change):
    arrays, meta = dict(stopped[0]), json.loads(json.dumps(stopped[1]))
    change(arrays, meta)
    checkpoint.save(tmp_path / LAST, arrays, meta)
    before = (tmp_path / LAST).read_bytes()
    with pytest.raises(InputError) as raised:
        resumed(tmp_path)
    assert str(tmp_path / LAST) in str(raised.value) and "\n" not in str(raised.value)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [(LAST, before)]


def test_settings_that_change_no_number_may_change(tmp_path, stopped):
    checkpoint.save(tmp_path / LAST, *stopped)
    run = resumed(tmp_path, replace(HARD, log_every=5, check_finite=True, checkpoint_seconds=1.0))
    assert run.state.step == run.optimizer.steps == run.ema.steps == 6
    for name, value in asdict(replace(HARD, lr=0.02, seed=6, workers=2)).items():
        if value != getattr(HARD, name):
            with pytest.raises(InputError, match=f"other settings: {name} "):
                resumed(tmp_path, replace(HARD, **{name: value}))


@pytest.mark.parametrize(("key", "on", "off"), [("sam", 0.05, 0.0), ("repeats", 2, 1), ("cutout", 3, 0)])
def test_settings_of_earlier_versions(tmp_path, stopped, key, on, off):
    """A run that had them switched off goes on; one that had them on is refused, and its model is read as ever."""
    arrays, meta = stopped[0], json.loads(json.dumps(stopped[1]))
    meta["settings"][key] = off
    checkpoint.save(tmp_path / LAST, arrays, meta)
    assert resumed(tmp_path).state.step == 6
    meta["settings"][key] = on
    checkpoint.save(tmp_path / LAST, arrays, meta)
    with pytest.raises(InputError, match=f"{key} {on} was a setting of an earlier version and is removed"):
        resumed(tmp_path)
    checkpoint.load_model(tmp_path / LAST)


def test_a_run_goes_on_without_being_begun(tmp_path, stopped, monkeypatch):
    """No initialisation is made that the checkpoint would overwrite, and the checkpoint is read once."""
    config, model = replace(HARD, init="mimetic", whiten=True), replace(MODEL, patch_size=2)
    run = trainer(tmp_path, config, model=model)
    stop_at(run, 6)
    run.run()
    reads, real = [], checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda path: reads.append(path) or real(path))
    for module, name in ((parts, "mimetic"), (parts, "whiten"), (parameters, "initialise")):
        monkeypatch.setattr(module, name, lambda *arguments, **keywords: pytest.fail("it was begun"))
    again = resumed(tmp_path, config, model=model)
    assert reads == [tmp_path / LAST] and again.state.step == 6
    np.testing.assert_array_equal(again.model.flat, run.model.flat)
    np.testing.assert_array_equal(again.ema.flat, run.ema.flat)
