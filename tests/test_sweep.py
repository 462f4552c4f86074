"""Sweeps: their files, their runs, their tables."""

import json
import math
import shutil
from pathlib import Path

import pytest

from minivit import sweep
from minivit.errors import InputError
from minivit.model import ViTConfig
from minivit.recipes import CONFIGS
from minivit.start import StartConfig
from minivit.train import TrainConfig

BEFORE = "runs/sweep-pretraining"  # where scripts/sweep.py writes the sweep of that name

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

    from minivit.train import Trainer

    end_epoch = Trainer._end_epoch

    def stop_after_the_second(self, *arguments):
        end_epoch(self, *arguments)
        if self.epoch == 2:
            self.stop(15)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_end_epoch", stop_after_the_second)
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
    "[base.train]\nepochs = 1\ncheckpoint_seconds = 1000.0@base = 3": "[base] must have the tables data, model, train",
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
    """Every row makes a model of CIFAR-10 pictures, or of the digits, and a training; no two rows are the same."""
    rows = sweep.read_sweep(path).rows
    size = 8 if path.stem == "digits" else 32
    for row in rows:
        ViTConfig(**{"image_size": size} | row.recipe.model)
        TrainConfig(**row.recipe.train)
        StartConfig(**row.recipe.start)
    assert len({str(row.recipe) for row in rows}) == len(rows)


def test_fine_tuning_begins_with_the_runs_that_pre_training_writes():
    folder = CONFIGS / "sweeps"
    begins = {run.folder / "last.npz" for run in sweep.runs_of(sweep.read_sweep(folder / "pretraining.toml"), BEFORE)}
    recipes = map(sweep.recipe_of, sweep.runs_of(sweep.read_sweep(folder / "finetuning.toml"), "out"))
    assert {Path(recipe.start["checkpoint"]) for recipe in recipes if recipe.start} == begins
