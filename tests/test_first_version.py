"""Checkpoints and settings files of minivit's first version give what they gave there.

``data/first_version/`` holds what that version wrote:

    checkpoints/NAME.npz    of small runs on the digits, ten of them stopped in the middle of an epoch ...
    runs.json               ... and the command lines that made them
    expected/NAME.npz       what the models answer, with gradients, and how the runs end
    expected/models.json    models of every combination of pooling, positions and attention, in numbers
    settings/               its settings files, and what it understood them, and many command lines, to mean
    help/NAME.txt           the options of its scripts

Numbers in float64 are compared to rounding. Runs are in float32, where processors round differently: a run that is
taken up again must end at the same parameters but for that.
"""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import load_script

from minivit import ViT, ViTConfig
from minivit.base.errors import InputError
from minivit.commands.training import recipe_of_flags
from minivit.layers.loss import softmax_cross_entropy_backward, softmax_cross_entropy_forward
from minivit.masked import MaskedConfig, MaskedViT, masked_table, patch_loss, patch_loss_gradient
from minivit.masked.pretrain import load_masked
from minivit.model import parameter_table, preset_fields
from minivit.training import recipes
from minivit.training.config import TrainConfig
from minivit.training.sweep import read_sweep
from minivit.weights import checkpoint
from minivit.weights.start import StartConfig


def command(name):
    """The module of a command line: it has ``parse(argv)``, ``start(arguments)`` and ``main(argv)``."""
    return load_script(name)


def understood(name, argv):
    """What a command line of train or pretrain asks for: (Recipe, MaskedConfig or None); nothing is read but files."""
    module = command(name)
    arguments = module.parse(argv)
    return module.recipe_and_task(arguments) if name == "pretrain" else (recipe_of_flags(arguments), None)


def help_of(name, capsys):
    """What ``--help`` of a script prints."""
    with pytest.raises(SystemExit):
        command(name).main(["--help"])
    return capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------

DATA = Path(__file__).resolve().parent / "data" / "first_version"
RUNS = json.loads((DATA / "runs.json").read_text())
CHECKPOINTS = sorted(path.stem for path in (DATA / "checkpoints").glob("*.npz"))
STOPPED = [name for name, run in RUNS.items() if run["stopped_at"]]
# Begins with an eigenvalue and a singular value decomposition, whose signs are the library's choice.
BEGINS_BY_DECOMPOSITION = ("avg-sincos2d-muon-half-size",)

# Settings that this version does without, and the values that switch them off: with these, files are read as ever.
REMOVED = {"sam": 0.0, "repeats": 1, "cutout": 0}
REMOVED_FLAGS = {"--sam", "--repeats", "--cutout"}


def stored(name):
    """The arrays of a file of expected numbers."""
    with np.load(DATA / "expected" / f"{name}.npz") as file:
        return dict(file)


def same(actual, expected, what, rtol=1e-10, atol=1e-12):
    """Equal up to ``rtol`` of each number and ``atol`` of the largest."""
    expected = np.asarray(expected)
    scale = np.abs(expected).max(initial=1e-300)
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol * scale, err_msg=what)


def around(model, flat):
    """The same model with other parameters, of their dtype."""
    if hasattr(model, "masked"):
        return MaskedViT(model.config, model.masked, flat=flat)
    return ViT(model.config, flat=flat)


def answer(model, images, target, rng=None):
    """Outputs, loss and the flat gradient; ``target`` are labels, or the plan of a masked model."""
    outputs, cache = model.forward(images, rng=rng) if target.ndim == 1 else model.forward(images, target, rng=rng)
    if target.ndim == 1:
        loss, loss_cache = softmax_cross_entropy_forward(outputs, target)
        doutputs = softmax_cross_entropy_backward(1.0, loss_cache)
    else:
        loss, _, loss_cache = patch_loss(outputs, model.targets(images, target), model.classes)
        doutputs = patch_loss_gradient(1.0, loss_cache)
    flat, grads = model.gradient_buffer()
    model.backward(doutputs, cache, grads)
    return outputs, loss, flat


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_answers_as_it_did(name):
    """Outputs, loss and every gradient of a checkpoint's model are those of the first version, in float64 to rounding.

    The moving average's outputs, and outputs and gradient with dropout, whose random numbers come in the same order.
    """
    want = stored(name)
    path, masked = DATA / "checkpoints" / f"{name}.npz", "plan" in want
    load = load_masked if masked else checkpoint.load_model
    model, record = load(path, weights="params")
    images, target = want["images"], want["plan" if masked else "labels"]
    assert record.weights == "params" and model.flat.dtype == np.float32
    same(answer(model, images, target)[0], want["outputs32"], "outputs in float32", 1e-4, 1e-5)
    exact = around(model, model.flat.astype(np.float64))
    outputs, loss, gradient = answer(exact, images, target)
    same(outputs, want["outputs"], "outputs")
    same(loss, want["loss"], "loss")
    same(gradient, want["gradient"], "gradient")
    if "outputs_random" in want:
        outputs, loss, gradient = answer(exact, images, target, np.random.default_rng(1))
        same(outputs, want["outputs_random"], "outputs with dropout")
        same(loss, want["loss_random"], "loss with dropout")
        same(gradient, want["gradient_random"], "gradient with dropout")
    average, record = load(path)
    assert record.weights == ("ema" if "outputs_ema" in want else "params")
    if "outputs_ema" in want:
        average = around(average, average.flat.astype(np.float64))
        same(answer(average, images, target)[0], want["outputs_ema"], "outputs of the moving average")


# ---- runs ------------------------------------------------------------------------------------------------------------


def ending(folder, prefix="params"):
    """Of a run's last checkpoint: the model's configuration, the table of parameters, and the parameters by name."""
    arrays, record = checkpoint.read(folder / "last.npz")
    config = record.config
    if record.pretraining:
        table = masked_table(config, MaskedConfig(**record.pretraining))
    else:
        table = parameter_table(config)
    return config, table, {spec.name: arrays[f"{prefix}/{spec.name}"] for spec in table}


def seen(spec, config):
    """Which entries of a parameter the loss depends on, as a mask.

    Softmax does not see what is added to all its inputs: the biases of keys, of their LayerNorm, and of attention
    pooling. Their gradient is 0 but for rounding, and what an optimiser that divides by its size makes of it is noise.
    """
    mask = np.ones(spec.size, bool)
    if spec.name.endswith("attn.qkv.bias") and not config.qk_norm:
        mask[spec.size // 3 : 2 * spec.size // 3] = False
    elif spec.name.endswith(("attn.k_norm.bias", "attention_pool.bias")):
        mask[:] = False
    return mask


def same_ending(folder, name):
    """A run's parameters, moving average and test figures are those of the first version, but for float32's rounding.

    Between OpenBLAS's kernels for five kinds of processor they differ by 1e-6 at most. Lion's update is a sign: where a
    gradient is nearly 0, rounding may turn it, by twice the learning rate, in a few entries.
    """
    want = stored(name)
    for prefix, flat in (("params", want["final"]), ("ema", want.get("final_ema"))):
        if flat is None:
            continue
        config, table, named = ending(folder, prefix)
        start, others = 0, []
        for spec in table:
            difference = np.abs(named[spec.name].ravel() - flat[start : start + spec.size])
            if count := int((difference[seen(spec, config)] > TOLERANCE).sum()):
                others.append(f"{spec.name}: {count} of {spec.size}, by up to {difference.max():.1e}")
            start += spec.size
        assert start == len(flat)
        turned = sum(int(line.split()[1]) for line in others)
        assert turned <= (0.01 * len(flat) if "lion" in RUNS[name]["arguments"] else 0), f"{prefix} differ: {others}"
    summary = json.loads((folder / "summary.json").read_text())
    loss, accuracy = want["test"]
    assert abs(summary["test_loss"] - loss) < 1e-4 and abs(summary["test_accuracy"] - accuracy) < 0.01


TOLERANCE = 1e-5  # of parameters


@pytest.mark.parametrize("name", STOPPED)
def test_a_run_that_was_stopped_goes_on(name, tmp_path, call, no_figures):
    """A run of the first version, stopped in the middle of an epoch, ends as it would have there."""
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(DATA / "checkpoints" / f"{name}.npz", folder / "last.npz")
    run = RUNS[name]
    ended = call(run["command"], "--resume", "--quiet", "--out", folder)
    assert ended.status == 0, ended.err
    assert f"resuming at step {run['stopped_at']} of " in ended.out
    same_ending(folder, name)


@pytest.mark.parametrize("name", [name for name in RUNS if name not in BEGINS_BY_DECOMPOSITION])
def test_a_run_from_its_beginning(name, tmp_path, call, no_figures, monkeypatch):
    """The same command line and seed begin with the same parameters and end with the same ones."""
    monkeypatch.chdir(DATA)
    run, folder = RUNS[name], tmp_path / "run"
    flags = ["--config", "settings/small.toml", "--quiet", "--out", folder]
    ended = call(run["command"], *flags, *run["arguments"])
    assert ended.status == 0, ended.err
    same_ending(folder, name)


# ---- models in numbers -----------------------------------------------------------------------------------------------

MODELS = json.loads((DATA / "expected" / "models.json").read_text())


def in_numbers(model, images, rng, recompute):
    """Logits, smoothed loss, and the gradient as its projections and norm."""
    labels = np.array([0, 2])
    logits, cache = model.forward(images, rng=rng, recompute=recompute)
    loss, loss_cache = softmax_cross_entropy_forward(logits, labels, label_smoothing=0.1)
    flat, grads = model.gradient_buffer()
    model.backward(softmax_cross_entropy_backward(1.0, loss_cache), cache, grads)
    return logits, loss, [*projections(flat), np.linalg.norm(flat)]


def projections(flat):
    """A long vector in three numbers."""
    n = np.arange(1, flat.size + 1)
    return [flat @ np.cos(n * frequency) for frequency in (1.0, 2.5, 0.01)]


@pytest.mark.parametrize("number", range(len(MODELS)))
def test_a_model_of_every_combination(number):
    """Pooling x positions x attention, with the other options in turn: initial parameters, answers and gradients."""
    want = MODELS[number]
    config = ViTConfig(**want["config"])
    model = ViT(config, seed=want["seed"], dtype=np.float64)
    assert model.flat.size == want["parameters"]
    same(projections(model.flat), want["initial"], "initial parameters", 0.0, 1e-9)
    n = np.arange(1, model.flat.size + 1)
    model.flat += 0.1 * np.sin(n * n % 1009)
    pixels = np.random.default_rng(100 + number)
    images = pixels.integers(0, 256, (2, config.image_size, config.image_size, 2), dtype=np.uint8)
    for kind, rng, recompute in (("plain", None, False), ("random", np.random.default_rng(1), bool(number % 2))):
        logits, loss, gradient = in_numbers(model, images, rng, recompute)
        same(logits, want[kind]["logits"], f"{kind} logits")
        same(loss, want[kind]["loss"], f"{kind} loss")
        same(gradient, want[kind]["gradient"], f"{kind} gradient", 0.0, 1e-11)


# ---- settings --------------------------------------------------------------------------------------------------------


def holds(settings, expected, what):
    """Settings are as they were; new ones are nobody's business, removed ones must have been off."""
    for key, value in expected.items():
        if key in REMOVED and key not in settings:
            assert value == REMOVED[key], f"{what}: {key}"
        else:
            assert settings[key] == value and type(settings[key]) is type(value), f"{what}: {key}"


def means(recipe, masked, expected, what):
    """A recipe and a task have the expected settings of data, model, training, start and pre-training."""
    holds(recipe.data, expected["data"], what)
    size = recipe.data["image_size"] or {"digits": 8, "imagefolder": 224}.get(recipe.data["data"], 32)
    holds(dataclasses.asdict(ViTConfig(**{"image_size": size} | recipe.model)), expected["model"], what)
    holds(dataclasses.asdict(TrainConfig(**recipe.train)), expected["train"], what)
    if "start" in expected:
        holds(dataclasses.asdict(StartConfig(**recipe.start)), expected["start"], what)
    else:
        assert not recipe.start
    if "pretraining" in expected:
        holds(dataclasses.asdict(masked), expected["pretraining"], what)


CONFIGS = json.loads((DATA / "settings" / "configs_resolved.json").read_text())
SWEEPS = json.loads((DATA / "settings" / "sweeps_resolved.json").read_text())
COMMANDS = json.loads((DATA / "settings" / "commands.json").read_text())
DEFAULTS = json.loads((DATA / "settings" / "defaults.json").read_text())


BETTERED = ("digits",)  # recipes of minivit that are other ones now


@pytest.fixture
def first_configs(monkeypatch):
    """The settings files that are known by name are those that came with the first version."""
    monkeypatch.setattr(recipes, "CONFIGS", DATA / "settings" / "configs")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_settings_file_means_what_it_meant(name):
    """Each settings file of the first version."""
    file = DATA / "settings" / "configs" / f"{name}.toml"
    means(*understood(CONFIGS[name]["command"], ["--config", str(file)]), CONFIGS[name], name)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in BETTERED])
def test_a_recipe_that_comes_with_minivit_is_what_it_was(name):
    """By its name, but for those that were bettered on purpose."""
    means(*understood(CONFIGS[name]["command"], ["--config", name]), CONFIGS[name], name)


def test_defaults_are_what_they_were():
    """Every setting that is not given has the value that it had."""
    classes = {"model": ViTConfig, "train": TrainConfig, "pretraining": MaskedConfig, "start": StartConfig}
    for kind, cls in classes.items():
        holds(dataclasses.asdict(cls()), DEFAULTS[kind], kind)


def test_presets_are_what_they_were():
    """Each named size is the model that it was."""
    for name, expected in json.loads((DATA / "settings" / "presets.json").read_text()).items():
        holds(dataclasses.asdict(ViTConfig(**preset_fields(name))), expected, name)


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_means_what_it_meant(name, first_configs):
    """Each sweep of the first version has the same rows, seeds and settings."""
    sweep, expected = read_sweep(DATA / "settings" / "configs" / "sweeps" / f"{name}.toml"), SWEEPS[name]
    assert sweep.title == expected["title"] and list(sweep.seeds) == expected["seeds"]
    assert len(sweep.rows) == len(expected["rows"])
    for row, wanted in zip(sweep.rows, expected["rows"], strict=True):
        assert row.name == wanted["name"] and row.changes == wanted["changes"]
        full = {kind: DEFAULTS[kind] | wanted[kind] for kind in ("model", "train")}
        rest = {kind: wanted[kind] for kind in ("data", "start") if kind in wanted}
        means(row.recipe, None, full | rest, f"{name}, {row.name}")


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_a_command_line_means_what_it_meant(number, tmp_path, monkeypatch, first_configs):
    """Flags, settings files and presets merge as they did; runs on the digits are set up as they were, to their end."""
    monkeypatch.chdir(DATA)
    expected = COMMANDS[number]
    name, argv = expected["command"], expected["arguments"]
    what = " ".join([name, *argv])
    means(*understood(name, argv), expected, what)
    if "run" not in expected:
        return
    module = command(name)
    trainer = module.start(module.parse([*argv, "--quiet", "--out", str(tmp_path / "run")]))
    assert not (tmp_path / "run").exists()
    holds(dataclasses.asdict(trainer.model.config), expected["run"]["model"], what)
    holds(dataclasses.asdict(trainer.config), expected["run"]["train"], what)
    holds(trainer.describe, expected["run"]["data"], what)
    if "start" in expected["run"]:
        holds(trainer.origin, expected["run"]["start"], what)
    assert (trainer.plan.total_steps, trainer.model.flat.size) == (expected["steps"], expected["parameters"])
    rates = [trainer.learning_rate(step) for step in expected["learning_rates_at"]]
    np.testing.assert_allclose(rates, expected["learning_rates"], rtol=1e-12, atol=1e-18)


# ---- settings that are no more ---------------------------------------------------------------------------------------


def test_removed_settings_that_are_off_are_read(tmp_path):
    """A settings file, and a checkpoint, that names a removed setting at its value for "off" is read as before."""
    file = tmp_path / "old.toml"
    text = (DATA / "settings" / "small.toml").read_text()
    file.write_text(text + "".join(f"{name} = {value}\n" for name, value in REMOVED.items()))
    recipe, _ = understood("train", ["--config", str(file)])
    assert TrainConfig(**recipe.train).epochs == 3
    for name in CHECKPOINTS:  # all of them hold these keys: those of runs are resumed above
        _, meta = checkpoint.load(DATA / "checkpoints" / f"{name}.npz")
        if "settings" in meta:
            assert {key: meta["settings"][key] for key in REMOVED} == REMOVED


@pytest.mark.parametrize("line", ["sam = 0.05", "repeats = 2", "cutout = 3", 'schedule = "onecycle"'])
def test_removed_settings_that_are_on_are_refused(line, tmp_path, call):
    """A settings file that asks for a removed setting ends with one line that names it."""
    file = tmp_path / "old.toml"
    file.write_text((DATA / "settings" / "small.toml").read_text() + line + "\n")
    ended = call("train", "--config", file, "--out", tmp_path / "run")
    assert ended.status == 2 and len(ended.err.splitlines()) == 1
    assert line.split()[0] in ended.err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("key, value", [("sam", 0.05), ("repeats", 2), ("cutout", 3), ("schedule", "onecycle")])
def test_checkpoints_of_runs_with_removed_settings(key, value, tmp_path, call):
    """A run that used a removed setting cannot go on, and says so in one line; its model is read as ever."""
    arrays, meta = checkpoint.load(DATA / "checkpoints" / "cls-dropout-accumulate.npz")
    meta["settings"][key] = value
    folder = tmp_path / "run"
    folder.mkdir()
    checkpoint.save(folder / "last.npz", arrays, meta)
    before = (folder / "last.npz").read_bytes()
    ended = call("train", "--resume", "--out", folder)
    assert ended.status == 2 and len(ended.err.splitlines()) == 1 and key in ended.err
    assert (folder / "last.npz").read_bytes() == before
    model, _ = checkpoint.load_model(folder / "last.npz", weights="params")
    want = stored("cls-dropout-accumulate")
    same(answer(model, want["images"], want["labels"])[0], want["outputs32"], "outputs", 1e-4, 1e-5)


# ---- options of the scripts ------------------------------------------------------------------------------------------


def options_of(text):
    """The options that a help text lists; in its examples there is nothing else."""
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text))


@pytest.mark.parametrize("name", ["train", "pretrain"])
def test_no_option_got_lost(name, capsys, monkeypatch):
    """Every option that --help of train and pretrain listed in the first version is listed still."""
    monkeypatch.setenv("COLUMNS", "120")
    lost = options_of((DATA / "help" / f"{name}.txt").read_text()) - options_of(help_of(name, capsys)) - REMOVED_FLAGS
    assert not lost


def test_an_impossible_setting_is_refused():
    """What is compared above is checked as ever: no value passes because it is an old file's."""
    with pytest.raises(InputError, match="pooling"):
        ViTConfig(**DEFAULTS["model"] | {"pooling": "max"})
