"""Sweeps: their files, their runs, their tables."""

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from minivit.base.errors import InputError
from minivit.data import load, with_classes
from minivit.model import ViTConfig
from minivit.training import loop, plan, recipes, sweep, trainer
from minivit.training.config import TrainConfig
from minivit.training.folder import LAST, SUMMARY
from minivit.training.recipes import CONFIGS, Recipe, trainer_of
from minivit.training.sweep import Row, Run, recipe_of, result_of
from minivit.weights.start import StartConfig

BEFORE = "runs/sweep-pretraining"  # where minivit sweep writes the sweep of that name

TINY = """
title = "tiny"
config = "{config}"
seeds = [0, 1]
[base.train]
epochs = 1
checkpoint_seconds = 1000.0
[[row]]
name = "AdamW"
[[row]]
name = "SGD, quick"
train.optimizer = "sgd"
train.lr = 0.1
model.depth = 1
"""


@pytest.fixture
def file(tmp_path, request):
    """A sweep of two rows and two seeds."""
    path = tmp_path / "s.toml"
    path.write_text(TINY.format(config=request.config.rootpath / "tests" / "tiny.toml"))
    return path


def test_rows_are_the_base_with_changes(file):
    found = sweep.read_sweep(file)
    assert (found.title, found.seeds) == ("tiny", (0, 1))
    plain, sgd = found.rows
    assert plain.changes == {} and sgd.changes == {"optimizer": "sgd", "lr": 0.1, "depth": 1}
    assert plain.recipe.train["epochs"] == sgd.recipe.train["epochs"] == 1
    assert sgd.recipe.train == plain.recipe.train | {"optimizer": "sgd", "lr": 0.1}
    assert sgd.recipe.model == plain.recipe.model | {"depth": 1}
    folders = [run.folder.name for run in sweep.runs_of(found, "out")]
    assert folders == ["adamw-seed0", "sgd-quick-seed0", "adamw-seed1", "sgd-quick-seed1"]
    assert [sweep.recipe_of(run).train["seed"] for run in sweep.runs_of(found, "out")] == [0, 0, 1, 1]


def test_a_row_may_name_a_preset(file):
    file.write_text(file.read_text().replace("model.depth = 1", 'model.preset = "Nano/4"\nmodel.depth = 3'))
    model = sweep.read_sweep(file).rows[1].recipe.model
    assert (model["width"], model["depth"], model["patch_size"]) == (64, 3, 4)


def test_runs_are_made_once_and_compared(file, tmp_path, call, no_figures):
    ended = call("sweep", file, "--out", tmp_path / "o", "--quiet", "--seeds", 0)
    assert ended.status == 0, ended.err
    first = json.loads((tmp_path / "o" / "table.json").read_text())
    summary = json.loads((tmp_path / "o" / "adamw-seed0" / "summary.json").read_text())
    assert first["rows"][0]["runs"]["0"]["accuracy"] == summary["test_accuracy"] and first["rows"][0]["spread"] is None
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("o/*/last.npz")}
    ended = call("sweep", file, "--out", tmp_path / "o", "--quiet")
    assert ended.status == 0 and "2 runs are finished" in ended.out and "1 of 2: AdamW, seed 1" in ended.out
    assert all(path.stat().st_mtime_ns == time for path, time in before.items()) and len(before) == 2
    table = json.loads((tmp_path / "o" / "table.json").read_text())
    a, b = ([run["accuracy"] for run in row["runs"].values()] for row in table["rows"])
    assert len(a) == len(b) == 2
    gains = [y - x for x, y in zip(a, b, strict=True)]
    assert table["rows"][1]["gain"] == pytest.approx(sum(gains) / 2)
    for row in table["rows"]:  # of the run that was disturbed least
        assert row["seconds"] == min(run["seconds"] for run in row["runs"].values())
    assert table["rows"][1]["gain_error"] == pytest.approx(abs(gains[0] - gains[1]) / 2)
    assert table["rows"][0]["spread"] == pytest.approx(abs(a[0] - a[1]) / math.sqrt(2))
    text = (tmp_path / "o" / "table.md").read_text()
    assert text in ended.out and "| SGD, quick | depth 1, optimizer sgd, lr 0.1 | " in text
    assert (tmp_path / "o" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    shutil.rmtree(tmp_path / "o" / "adamw-seed0")  # its figure stays
    ended = call("sweep", file, "--out", tmp_path / "o", "--quiet")
    assert ended.status == 0 and "4 runs are finished" in ended.out
    again = json.loads((tmp_path / "o" / "table.json").read_text())
    assert again == table and not (tmp_path / "o" / "adamw-seed0").exists()
    ended = call("sweep", file, "--out", tmp_path / "o", "--table", "--rows", "AdamW", "--seeds", 1)
    assert ended.status == 0 and "1 rows, 1 seeds; 1 runs are finished" in ended.out
    assert json.loads((tmp_path / "o" / "table.json").read_text()) == table  # of all rows and seeds
    file.write_text(file.read_text().replace("epochs = 1", "epochs = 2"))
    for folder in tmp_path.glob("o/*-seed*"):
        shutil.rmtree(folder)
    assert call("sweep", file, "--out", tmp_path / "o", "--quiet", "--rows", "AdamW", "--seeds", 1).status == 0
    changed = json.loads((tmp_path / "o" / "table.json").read_text())["rows"][0]
    assert {seed: run["epochs"] for seed, run in changed["runs"].items()} == {
        "1": 2
    }  # of other settings, the old one does not count


def test_a_run_that_stopped_goes_on(file, tmp_path, call, no_figures, monkeypatch):
    file.write_text(file.read_text().replace("epochs = 1", "epochs = 3").replace("seeds = [0, 1]", "seeds = [0]"))
    expected = call("sweep", file, "--out", tmp_path / "whole", "--quiet", "--rows", "AdamW")
    assert expected.status == 0, expected.err

    end_epoch = loop.end_epoch

    def stop_after_the_second(run, *arguments):
        end_epoch(run, *arguments)
        if run.state.epoch == 2:
            run.stop(15)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "end_epoch", stop_after_the_second)
        ended = call("sweep", file, "--out", tmp_path / "cut", "--quiet", "--rows", "AdamW")
    assert ended.status == 130 and not (tmp_path / "cut" / "table.md").exists()
    ended = call("sweep", file, "--out", tmp_path / "cut", "--quiet", "--rows", "AdamW")
    assert ended.status == 0 and "epoch   3/3" in ended.out and "epoch   2/3" not in ended.out
    tables = [json.loads((tmp_path / name / "table.json").read_text())["rows"][0] for name in ("whole", "cut")]
    assert tables[0]["runs"]["0"]["accuracy"] == tables[1]["runs"]["0"]["accuracy"]


def test_finished_runs_of_other_settings_are_not_mixed_in(file, tmp_path, call, no_figures):
    assert call("sweep", file, "--out", tmp_path / "o", "--quiet", "--rows", "AdamW", "--seeds", 0).status == 0
    file.write_text(file.read_text().replace("epochs = 1", "epochs = 2"))
    ended = call("sweep", file, "--out", tmp_path / "o", "--quiet")
    assert ended.status == 2 and "adamw-seed0 holds a run with epochs 1, the sweep asks for 2" in ended.err


def noted(run, *, diverged=False, **changes):
    """Write into a run's folder that a run on the digits is finished whose settings are the defaults with changes."""
    settings = {
        "model": asdict(ViTConfig(image_size=8, channels=1, **changes.get("model", {}))),
        "train": asdict(TrainConfig(**{"workers": 2, "micro_batch": 7} | changes.get("train", {}))),
        "data": {"data": "digits", "data_dir": "data", "image_size": None, "classes": None} | changes.get("data", {}),
    }  # fmt: skip
    if "start" in changes:
        settings["start"] = asdict(StartConfig(**changes["start"])) | {"weights": "ema", "crc": 1}
    run.folder.mkdir()
    if diverged:
        text, name = {"step": 5, "settings": settings}, sweep.DIVERGED
    else:
        text, name = {"test_accuracy": 0.5, "train_seconds": 1.0, "epochs": 1, "parameters": 9}, SUMMARY
    (run.folder / name).write_text(json.dumps(text | {"settings": settings}))


def run_of(folder, **asked):
    data = {"data": "digits", "data_dir": "data", "image_size": None, "classes": None} | asked.pop("data", {})
    return Run(Row("a", {}, Recipe(data, asked.get("model", {}), asked.get("train", {}), asked.get("start", {}))), 0,
               folder / "a-seed0")  # fmt: skip


def at(section, **values):
    return {section: values}


OTHER = [
    # what is asked for, and a run that was made otherwise
    (at("train", whiten=False), at("train", whiten=True), "whiten True, the sweep asks for False"),
    (at("train", label_smoothing=0.0), at("train", label_smoothing=0.3), "label_smoothing 0.3"),
    (at("train", half_size=0.0), at("train", half_size=0.69), "half_size 0.69"),
    (at("train", optimizer="sgd"), {}, "optimizer 'adamw', the sweep asks for 'sgd'"),
    (at("train", workers=1), {}, "workers 2"),
    (at("train", micro_batch=8), {}, "micro_batch 7"),
    (at("train", steps=7), at("train", steps=8), "steps 8"),
    (at("train", steps=7), {}, "steps 0"),
    (at("train", precision="bf16"), {}, "precision 'float32'"),
    ({}, at("train", steps=8), "steps 8"),
    ({}, at("train", epochs=7), "epochs 7"),
    ({}, at("train", ema_decay=0.99), "ema_decay 0.99, the sweep asks for 0.0"),
    ({}, at("train", mixup=0.8), "mixup 0.8"),
    ({}, at("train", seed=1), "seed 1"),
    ({}, at("model", dropout=0.1), "dropout 0.1"),
    ({}, at("model", mlp_dim=100), "mlp_dim 100, the sweep asks for 768"),
    (at("model", width=96), at("model", width=96, mlp_dim=100), "mlp_dim 100, the sweep asks for 384"),
    (at("model", mlp_dim=32), at("model", mlp_dim=64), "mlp_dim 64, the sweep asks for 32"),
    (at("model", image_size=16), {}, "image_size 8, the sweep asks for 16"),
    (at("data", image_size=16), {}, "image_size None, the sweep asks for 16"),
    ({}, at("data", image_size=16), "image_size 16, the sweep asks for None"),
    ({}, at("data", classes="0-4"), "classes '0-4', the sweep asks for None"),
    (at("data", classes="5-9"), at("data", classes="0-4"), "classes '0-4', the sweep asks for '5-9'"),
    ({}, at("data", data="cifar10"), "data 'cifar10'"),
    ({}, at("start", checkpoint="x.npz"), "checkpoint 'x.npz', the sweep asks for ''"),
    (at("start", checkpoint="x.npz"), {}, "checkpoint '', the sweep asks for 'x.npz'"),
    (at("start", checkpoint="x.npz"), at("start", checkpoint="x.npz", keep_head=True), "keep_head True"),
]


@pytest.mark.parametrize("diverged", [False, True])
@pytest.mark.parametrize(("asked", "found", "said"), OTHER, ids=[said for *_, said in OTHER])
def test_a_run_of_other_settings_is_no_result(tmp_path, asked, found, said, diverged):
    run = run_of(tmp_path, **asked)
    noted(run, diverged=diverged, **found)
    with pytest.raises(InputError) as caught:
        result_of(run)
    assert f"a-seed0 holds a run with {said}" in str(caught.value)


SAME = [
    ({}, at("train", device="cuda:1", gpu_micro_batch=64, graph=False)),
    (at("train", device="cuda"), {}),
    ({}, at("train", recompute=True, log_every=1, check_finite=True, checkpoint_seconds=0.0)),
    ({}, at("data", data_dir="elsewhere")),
    (at("train", workers=0, micro_batch=0), {}),
    (at("train", steps=7), at("train", steps=7, epochs=3)),
    (at("train", steps=7, epochs=99), at("train", steps=7, epochs=3)),
    (at("model", width=96, mlp_dim=0), at("model", width=96)),
    (at("model", image_size=8), at("data", image_size=8)),
    (at("start", checkpoint="x.npz"), {"start": {"checkpoint": "x.npz"}, "model": {"width": 96, "depth": 3}}),
    ({"start": {"checkpoint": "x.npz"}, "model": {"mlp_dim": 0}}, {"start": {"checkpoint": "x.npz"},
                                                                  "model": {"width": 96}}),
    ({"start": {"checkpoint": "x.npz"}, "data": {"data": "folder"}},
     {"start": {"checkpoint": "x.npz"}, "data": {"data": "folder", "image_size": 48}}),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "found"), SAME)
def test_what_a_run_chooses_and_where_it_was_made_is_free(tmp_path, asked, found):
    run = run_of(tmp_path, **asked)
    assert result_of(run) is None
    noted(run, **found)
    assert result_of(run) == {"accuracy": 0.5, "seconds": 1.0, "epochs": 1, "parameters": 9}


def test_summaries_of_earlier_versions_have_the_defaults_of_what_came_later(tmp_path):
    run = run_of(tmp_path, train={"lr": 0.1})
    noted(run, train={"lr": 0.1})
    path = run.folder / SUMMARY
    summary = json.loads(path.read_text())
    for section, key in (("train", "precision"), ("model", "stem"), ("data", "classes")):
        del summary["settings"][section][key]
    path.write_text(json.dumps(summary))
    assert result_of(run)["accuracy"] == 0.5
    assert result_of(run_of(tmp_path, train={"lr": 0.1, "epochs": 3}), free=("epochs",))
    summary["settings"]["train"]["sam"] = 0.0
    path.write_text(json.dumps(summary))
    assert result_of(run)["accuracy"] == 0.5
    summary["settings"]["train"]["sam"] = 0.05
    path.write_text(json.dumps(summary))
    with pytest.raises(InputError, match="a-seed0: sam 0.05 was a setting of an earlier version"):
        result_of(run)


def diverging(file):
    """The sweep's file with a first row that diverges at its second step."""
    first = 'train = {optimizer = "sgd", lr = 1e30, clip_norm = 0.0, warmup_epochs = 0.0, ema_decay = 0.0}'
    file.write_text(file.read_text().replace('name = "AdamW"', f'name = "too high"\n{first}'))


def test_a_run_that_diverges_is_noted_and_the_others_are_made(file, tmp_path, call, no_figures):
    diverging(file)
    out = tmp_path / "o"
    ended = call("sweep", file, "--out", out, "--quiet")
    assert ended.status == 1 and "2 runs diverged" in ended.out and ended.err == ""
    assert "4 of 4: SGD, quick, seed 1" in ended.out and "start again with a lower --lr" in ended.out
    table = json.loads((out / "table.json").read_text())
    high, quick = table["rows"]
    assert high["runs"] == {} and high["mean"] is None and set(high["diverged"]) == {"0", "1"}
    assert quick["diverged"] == {} and set(quick["runs"]) == {"0", "1"} and quick["gain"] is None
    step = json.loads((out / "too-high-seed0" / sweep.DIVERGED).read_text())["step"]
    assert high["diverged"]["0"] == step > 0
    assert f" |  |  | diverged at step {step} diverged at step {high['diverged']['1']} | " in ended.out
    assert "not run yet" not in ended.out
    before = (out / "too-high-seed0" / "last.npz").stat().st_mtime_ns
    again = call("sweep", file, "--out", out, "--quiet")
    assert again.status == 1 and "4 runs are finished" in again.out and "1 of" not in again.out
    assert (out / "too-high-seed0" / "last.npz").stat().st_mtime_ns == before
    assert json.loads((out / "table.json").read_text()) == table
    assert call("sweep", file, "--out", out, "--table", "--rows", "SGD, quick").status == 0
    shutil.rmtree(out / "too-high-seed0")
    ended = call("sweep", file, "--out", out, "--quiet", "--seeds", 0)
    assert ended.status == 1 and "1 of 1: too high, seed 0" in ended.out and "1 run diverged" in ended.out
    assert json.loads((out / "table.json").read_text()) == table | {"seeds": [0, 1]}


def test_a_stopped_sweep_goes_on_with_its_threads(file, tmp_path, call, no_figures, monkeypatch):
    file.write_text(file.read_text().replace("epochs = 1", "epochs = 2\nworkers = 0"))
    flags = ["--quiet", "--rows", "AdamW", "--seeds", 0]
    end_epoch = loop.end_epoch
    with monkeypatch.context() as patch:
        patch.setattr(loop, "end_epoch", lambda run, *a: (end_epoch(run, *a), run.stop(15)))
        patch.setattr(plan, "cut", lambda config, batch_size: (2, 7))
        assert call("sweep", file, "--out", tmp_path / "o", *flags).status == 130
    monkeypatch.setattr(plan, "cut", lambda config, batch_size: (1, 11))
    ended = call("sweep", file, "--out", tmp_path / "o", *flags)
    assert ended.status == 0, ended.err
    assert "epoch   2/2" in ended.out and "epoch   1/2" not in ended.out
    assert json.loads((tmp_path / "o" / "adamw-seed0" / SUMMARY).read_text())["workers"] == 2
    assert "1 runs are finished" in call("sweep", file, "--out", tmp_path / "o", *flags).out


def test_every_checkpoint_to_begin_with_is_looked_at_before_any_run(file, tmp_path, call):
    file.write_text(file.read_text() + f'start.checkpoint = "{tmp_path}/{{seed}}.npz"\n')
    run = sweep.runs_of(sweep.read_sweep(file), tmp_path / "o")[1]
    recipe = recipe_of(run)._replace(start={})
    trainer = trainer_of(recipe, tmp_path / "first", progress=False)
    trainer.out.mkdir()
    trainer.save()
    for missing in (0, 1):
        shutil.copy(tmp_path / "first" / LAST, tmp_path / f"{1 - missing}.npz")
        ended = call("sweep", file, "--out", tmp_path / "o", "--quiet")
        assert ended.status == 2 and f"there is no checkpoint at {tmp_path}/{missing}.npz" in ended.err
        assert not (tmp_path / "o").exists()
        (tmp_path / f"{1 - missing}.npz").unlink()


def test_rows_may_begin_with_the_runs_of_another_sweep(file, tmp_path, call, no_figures):
    """Seed by seed; and runs of steps are found again."""
    file.write_text(file.read_text().split("[[row]]")[0] + '[base.data]\nclasses = "0-4"\n[[row]]\nname = "before"\n')
    assert call("sweep", file, "--out", tmp_path / "o", "--quiet").status == 0
    second = tmp_path / "t.toml"
    second.write_text(
        file.read_text().replace('"0-4"', '"5-9"').replace('name = "before"', 'name = "after"')
        + f'train.steps = 3\nstart.checkpoint = "{tmp_path}/o/before-seed{{seed}}/last.npz"\n'
    )
    for _ in range(2):
        ended = call("sweep", second, "--out", tmp_path / "p", "--quiet")
        assert ended.status == 0, ended.err
    assert "2 runs are finished" in ended.out
    for seed in (0, 1):
        settings = json.loads((tmp_path / "p" / f"after-seed{seed}" / "summary.json").read_text())["settings"]
        assert settings["start"]["checkpoint"] == f"{tmp_path}/o/before-seed{seed}/last.npz"
        assert settings["data"]["classes"] == "5-9" and settings["train"]["steps"] == 3
    shutil.rmtree(tmp_path / "o" / "before-seed0")
    ended = call("sweep", second, "--out", tmp_path / "q", "--quiet")
    assert ended.status == 2 and f"there is no checkpoint at {tmp_path}/o/before-seed0/last.npz" in ended.err


def test_tables_of_earlier_versions_count(file, tmp_path, call, no_figures):
    """Their recipes do not name what came later."""
    assert call("sweep", file, "--out", tmp_path / "o", "--quiet", "--seeds", 0).status == 0
    path = tmp_path / "o" / "table.json"
    table = json.loads(path.read_text())
    for row in table["rows"]:
        del row["recipe"]["start"], row["recipe"]["data"]["classes"]
    path.write_text(json.dumps(table))
    for row in ("adamw", "sgd-quick"):
        shutil.rmtree(tmp_path / "o" / f"{row}-seed0")
    ended = call("sweep", file, "--out", tmp_path / "o", "--table", "--seeds", 0)
    assert ended.status == 0 and "2 runs are finished" in ended.out


def test_impossible_settings_are_found_before_any_run(file, tmp_path, call):
    file.write_text(file.read_text().replace("model.depth = 1", "model.width = 7"))
    ended = call("sweep", file, "--out", tmp_path / "o", "--quiet")
    assert ended.status == 2 and "not a multiple of num_heads" in ended.err and not (tmp_path / "o").exists()


BAD = {
    "title = 3": "title must be a text",
    "seeds = [0, 1]@seeds = 3": "seeds must be a list of whole numbers",
    "seeds = [0, 1]@seeds = []": "seeds must be a list",
    "seeds = [0, 1]@seeds = [1, 1]": "a seed is named twice",
    'name = "AdamW"@': "row 1 has no name",
    'name = "AdamW"@name = "SGD  QUICK!"': "two rows are called alike: SGD  QUICK!, SGD, quick",
    "train.lr = 0.1@train.learning = 1": "unknown setting 'learning'",
    "train.lr = 0.1@train = 1": "is not a TOML file",
    "train.lr = 0.1@train.seed = 1": "seeds stand at the head of the file",
    "train.lr = 0.1@lr = 1": "unknown setting 'lr'",
    "[base.train]@[base.training]": "unknown setting 'training'",
    "[base.train]\nepochs = 1\ncheckpoint_seconds = 1000.0@base = 3": "[base] must have the tables data, model,",
    "[[row]]@[[rows]]": "unknown setting 'rows'",
    'title = "tiny"@title = ': "is not a TOML file",
}  # fmt: skip


@pytest.mark.parametrize("change", BAD)
def test_bad_files(file, change):
    old, _, new = change.rpartition("@") if "@" in change else ('title = "tiny"', "", change)
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    with pytest.raises(InputError) as caught:
        sweep.read_sweep(file)
    assert BAD[change] in str(caught.value)


def test_bad_arguments(file, tmp_path, call):
    for arguments, said in (
        ([tmp_path / "no.toml"], "there is no sweep"), ([tmp_path], "is a folder, not a sweep"),
        ([file, "--rows", "Adam"], "no row 'Adam'; the rows are AdamW, SGD, quick"),
        ([file, "--seeds", -1], "--seeds must be at least 0"),
        ([file, "--table", "--out", tmp_path / "none"], "nothing has been run"),
    ):  # fmt: skip
        ended = call("sweep", *arguments)
        assert ended.status == 2 and said in ended.err, said


@pytest.mark.parametrize("path", sorted((CONFIGS / "sweeps").glob("*.toml")), ids=lambda path: path.stem)
def test_the_sweeps_that_come_with_minivit_are_models_and_trainings(path):
    """Every row makes a model of CIFAR-10 images, or of the digits, and a training; no two rows are the same."""
    rows = sweep.read_sweep(path).rows
    size = 8 if path.stem == "digits" else 32
    for row in rows:
        ViTConfig(**{"image_size": size} | row.recipe.model)
        TrainConfig(**row.recipe.train)
        StartConfig(**row.recipe.start)
    assert len({str(row.recipe) for row in rows}) == len(rows)


@pytest.mark.parametrize("path", sorted((CONFIGS / "sweeps").glob("*.toml")), ids=lambda path: path.stem)
def test_the_runs_of_the_sweeps_that_come_with_minivit_are_their_results(tmp_path, path, monkeypatch):
    """On a few images; not of another row either."""
    rng = np.random.default_rng(0)
    few = load("digits")
    if path.stem != "digits":
        images, labels = rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8), np.arange(40) % 10
        few = few._replace(name="cifar10", train_images=images, train_labels=labels, test_images=images,
                           test_labels=labels)  # fmt: skip

    def loaded(name, data_dir, *, image_size=None, classes=None, train_share=None):
        found = with_classes(few, classes) if classes else few
        if image_size:
            images = rng.integers(0, 256, (len(found.train_images), image_size, image_size, 3), dtype=np.uint8)
            found = found._replace(train_images=images, test_images=images)
        return found

    monkeypatch.setattr(recipes, "load", loaded)
    monkeypatch.chdir(tmp_path)
    if path.stem == "finetuning":
        for run in sweep.runs_of(sweep.read_sweep(path.with_stem("pretraining")), BEFORE)[:1]:
            trainer = trainer_of(recipe_of(run), run.folder, progress=False)
            trainer.out.mkdir(parents=True)
            trainer.save()
    runs = [run for run in sweep.runs_of(sweep.read_sweep(path), "out") if run.seed == 0]
    figures = {"test_accuracy": 0.5, "train_seconds": 1.0, "epochs": 1, "parameters": 9}
    for run in runs:
        settings = trainer_of(recipe_of(run), run.folder, progress=False).settings()
        run.folder.mkdir(parents=True)
        (run.folder / SUMMARY).write_text(json.dumps(figures | {"settings": settings}))
    for run in runs:
        assert result_of(run)["accuracy"] == 0.5
        for other in runs:
            if other is not run:
                with pytest.raises(InputError, match="holds a run with"):
                    result_of(run._replace(folder=other.folder))


def test_fine_tuning_begins_with_the_runs_that_pre_training_writes():
    folder = CONFIGS / "sweeps"
    begins = {run.folder / "last.npz" for run in sweep.runs_of(sweep.read_sweep(folder / "pretraining.toml"), BEFORE)}
    recipes = map(sweep.recipe_of, sweep.runs_of(sweep.read_sweep(folder / "finetuning.toml"), "out"))
    assert {Path(recipe.start["checkpoint"]) for recipe in recipes if recipe.start} == begins


def test_a_sweep_loads_its_data_once_and_makes_every_run_once(file, tmp_path, call, no_figures, monkeypatch):
    loads, models, load_data, allocate = [], [], sweep.load, trainer.Trainer._allocate
    monkeypatch.setattr(sweep, "load", lambda *a, **k: loads.append(a) or load_data(*a, **k))
    monkeypatch.setattr(trainer.Trainer, "_allocate", lambda self, *a: models.append(self.out) or allocate(self, *a))
    ended = call("sweep", file, "--out", tmp_path / "o", "--quiet")
    assert ended.status == 0, ended.err
    assert len(loads) == 1 and len(models) == 4 == len(set(models))


def test_rows_in_the_tables_of_the_groups(file):
    old = sweep.read_sweep(file)
    text = file.read_text().replace("[base.train]\nepochs = 1\n", "[base.schedule]\nepochs = 1\n[base.log]\n")
    file.write_text(text.replace("train.optimizer", "optimizer.optimizer").replace("train.lr", "optimizer.lr"))
    assert sweep.read_sweep(file) == old
