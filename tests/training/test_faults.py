"""Disks that fill up, fail, turn read-only, lie or lose power: the last checkpoint is whole, and the run goes on."""

import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from faulty_disk import CODES, Disk, PowerCut
from image_folders import make_images
from small_runs import HARD, MODEL, STEPS, Crash, assert_same_run, before_step, crash, resumed, trainer, whole

from minivit.base.errors import InputError
from minivit.commands import cli
from minivit.data import load
from minivit.data.source import dataset_of, fingerprint
from minivit.data.walk import LeftOut, class_folders
from minivit.training.engines import cut
from minivit.training.folder import BEST, LAST, METRICS, PREVIOUS, last_checkpoint
from minivit.weights import checkpoint

pytestmark = pytest.mark.usefixtures("no_figures")

SMALL = {"model": replace(MODEL, depth=1)}
# a checkpoint after every step: 4 steps, and two tests
CONFIG = replace(HARD, epochs=2, accumulate=4, optimizer="sgd", ema_decay=0.0, checkpoint_seconds=0.0)


def whole_run(folder):
    """The folder of a run on a disk that works, and what happened there."""
    if not folder.exists():
        folder.mkdir()
        with Disk(folder) as disk:
            trainer(folder, CONFIG, **SMALL).run()
        folder.with_suffix(".json").write_text(json.dumps(disk.counts))
    return folder, json.loads(folder.with_suffix(".json").read_text())


@pytest.fixture(scope="module")
def uncut(tmp_path_factory):
    """A run on a disk that works, and how often what happened there."""
    with pytest.MonkeyPatch.context() as patch:
        from minivit import figures

        for name in ("save_curves", "save_predictions"):
            patch.setattr(figures, name, lambda path, *arguments, **keywords: Path(path).write_bytes(b""))
        return whole_run(tmp_path_factory.mktemp("uncut") / "run")


def go_on(folder):
    """Go on with a run where it stopped, or begin it if it had not begun."""
    begun = (folder / LAST).exists()
    return (resumed if begun else trainer)(folder, CONFIG, **SMALL).run()


def survives(folder, kind, at, uncut):
    """A run on a disk that fails: one line, the last checkpoint whole, and as if nothing had been after going on."""
    saved = [-1]
    run = trainer(folder, CONFIG, **SMALL)
    save = run.save

    def note(name=LAST):
        save(name)
        saved.append(run.state.step)

    run.save = note
    folder.mkdir()
    with Disk(folder, kind, at) as disk, pytest.raises(OSError) as raised:
        run.run()
    assert raised.value.errno == CODES[kind] and Path(raised.value.filename).parent == folder, raised.value
    assert "\n" not in cli.describe_os_error(raised.value) and disk.counts[kind] >= at
    if (folder / LAST).exists():
        assert checkpoint.load(folder / LAST)[1]["progress"]["step"] >= saved[-1]
    else:
        assert saved == [-1]
    assert not list(folder.glob(".*")), "a temporary file is left"
    go_on(folder)
    assert_same_run(folder, uncut[0])


@pytest.mark.parametrize("kind", ["write", "open", "replace", "fsync"])
def test_a_run_survives_a_disk_that_fails(tmp_path, kind, uncut):
    """At the first of each kind, at the last, and at some between."""
    count = uncut[1][kind]
    assert count >= 8
    for at in sorted({1, 2, 3, *range(4, count, max(1, count // 6)), count}):
        survives(tmp_path / str(at), kind, at, uncut)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["write", "open", "replace", "fsync"])
def test_a_run_survives_a_disk_that_fails_at_any_moment(tmp_path, kind, uncut):
    for at in range(1, uncut[1][kind] + 1):
        survives(tmp_path / str(at), kind, at, uncut)
    print(f"{kind}: failed at each of {uncut[1][kind]}")


def test_a_file_system_without_hard_links_keeps_no_previous_checkpoint(tmp_path, uncut):
    with Disk(tmp_path, "link"):
        trainer(tmp_path, CONFIG, **SMALL).run()
    assert not (tmp_path / PREVIOUS).exists() and (uncut[0] / PREVIOUS).exists()
    assert_same_run(tmp_path, uncut[0])


# ---- power cuts ------------------------------------------------------------------------------------------------------


def is_whole(data):
    """The step of a checkpoint's bytes, None where they are none."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            return json.loads(str(file["meta"]))["progress"]["step"]
    except Exception:
        return None


def test_the_order_of_writing_a_checkpoint(tmp_path):
    """Metrics and content are flushed before the rename, the folder after it."""
    order = []

    def watch(event, *arguments):
        if event == "fsync":
            number = os.fstat(arguments[0]).st_ino
            name = next((p.name for p in tmp_path.iterdir() if p.stat().st_ino == number), "folder")
            order.append(f"flush {name}")
        else:
            order.append(f"{event} {Path(arguments[1]).name}")

    run = trainer(tmp_path, CONFIG, **SMALL)
    before_step(run, 2, crash)
    with Disk(tmp_path, watch=watch), pytest.raises(Crash):
        run.run()
    assert order[-6:] == [
        f"flush {METRICS}", f"link .{PREVIOUS}.partial", f"replace {PREVIOUS}", f"flush .{LAST}.partial",
        f"replace {LAST}", "flush folder",
    ]  # fmt: skip


@pytest.mark.parametrize("lies", [False, True], ids=["an honest disk", "a disk that lies about flushes"])
def test_a_power_cut_at_any_moment(tmp_path, lies, uncut):
    """Whatever reached the disk, a checkpoint is there: the last one, or on a disk that lies the one before."""
    (tmp_path / "run").mkdir()
    cut_, seen = PowerCut(tmp_path / "run", lies=lies), []
    run = trainer(tmp_path / "run", CONFIG, **SMALL)
    save, saved = run.save, []

    def note(name=LAST):
        save(name)
        saved.append(run.state.step)

    run.save = note

    def watch(*event):
        cut_(*event)
        for files in cut_.after():
            steps = [is_whole(files[name]) for name in (LAST, PREVIOUS, BEST) if name in files]
            if not lies and saved:
                assert steps[0] is not None and steps[0] >= saved[-1], event
                metrics = [json.loads(line) for line in files.get(METRICS, b"").splitlines()]
                assert sum(line["kind"] == "train" for line in metrics) >= steps[0]
            if lies and len(saved) > 1:
                assert max(step for step in steps if step is not None) >= saved[-2] - 1, event
            seen.append((files, steps))

    with Disk(tmp_path / "run", watch=watch):
        run.run()
    assert cut_.moments > 30
    damaged = [files for files, steps in seen if LAST in files and steps[0] is None and any(steps[1:])]
    assert bool(damaged) == lies
    for number, files in enumerate(damaged[:: max(1, len(damaged) // 4)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        shutil.copy(tmp_path / "run" / METRICS, folder)
        go_on(folder)
        assert_same_run(folder, uncut[0])


def test_a_damaged_last_checkpoint(tmp_path, capsys):
    config = replace(HARD, checkpoint_seconds=0.0)
    run = trainer(tmp_path, config)
    before_step(run, 8, crash)
    with pytest.raises(Crash):
        run.run()
    step = checkpoint.load(tmp_path / PREVIOUS)[1]["progress"]["step"]
    data = (tmp_path / LAST).read_bytes()
    (tmp_path / LAST).write_bytes(data[: len(data) // 2])
    again = resumed(tmp_path, config)
    assert again.state.step == step == 6
    err = capsys.readouterr().err
    assert err.startswith("note: ") and err.endswith("the run goes on from previous.npz\n") and err.count("\n") == 1
    before_step(again, step + 1, crash)  # no other checkpoint is written: last.npz must be whole again
    with pytest.raises(Crash):
        again.run()
    assert checkpoint.load(tmp_path / LAST)[1]["progress"]["step"] == 6
    resumed(tmp_path, config).run()
    assert_same_run(tmp_path, whole())


def test_where_two_checkpoints_are_damaged_the_best_is_taken(tmp_path):
    shutil.copytree(whole(), tmp_path / "run")
    for name in (LAST, PREVIOUS):
        (tmp_path / "run" / name).write_bytes(b"")
    best = (tmp_path / "run" / BEST).read_bytes()
    run = resumed(tmp_path / "run")
    assert run.state.step == is_whole(best) and run.run()["steps"] == STEPS
    assert_same_run(tmp_path / "run", whole())
    for name in (LAST, PREVIOUS, BEST):
        (tmp_path / "run" / name).write_bytes(b"")
    with pytest.raises(InputError, match=r"last\.npz is not a minivit checkpoint"):
        last_checkpoint(tmp_path / "run")


# ---- elsewhere -------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_at_another_path_and_with_another_number_of_cores(tmp_path, monkeypatch):
    config = replace(HARD, workers=0, micro_batch=0)
    trainer(tmp_path / "whole", config).run()
    run = trainer(tmp_path / "here", config)
    before_step(run, 6, crash)
    run.config, plan = replace(run.config, checkpoint_seconds=0.0), run.plan
    with pytest.raises(Crash):
        run.run()
    there = tmp_path / "elsewhere" / "naïve run"
    there.parent.mkdir()
    shutil.move(tmp_path / "here", there)
    monkeypatch.setattr(cut, "available_cores", lambda: 64)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.chdir(tmp_path)
    again = resumed(Path("elsewhere") / "naïve run", config)
    assert again.plan == plan and again.state.step >= 4
    again.run()
    assert_same_run(there, tmp_path / "whole")


def test_a_folder_of_images_has_the_same_names_on_every_system(tmp_path):
    make_images(tmp_path)
    here = load("imagefolder", tmp_path, image_size=8)
    assert here.train_images.identity.startswith(b"train/n01440764/n01440764_0.JPEG ")


def test_classes_are_in_the_order_of_their_names_on_every_system(tmp_path):
    """Not in that of Windows, which sorts paths without regard to case."""
    for name in ("b", "C", "a", ".hidden", "B2"):
        (tmp_path / name).mkdir()
    assert list(class_folders(tmp_path, LeftOut())) == ["B2", "C", "a", "b"]


def test_a_run_from_windows_finds_its_data(tmp_path, monkeypatch):
    make_images(tmp_path / "my" / "images")
    monkeypatch.chdir(tmp_path)
    data = load("imagefolder", "my/images", image_size=8)
    record = checkpoint.Record(
        "last.npz", replace(MODEL, image_size=8), list(data.class_names),
        data={"data": "imagefolder", "data_dir": "my\\images", "image_size": 8},
    )  # fmt: skip
    assert fingerprint(dataset_of(record)) == fingerprint(data)
    shutil.move(tmp_path / "my" / "images", tmp_path / "my\\images")  # a name that only looks like one of Windows
    assert dataset_of(record).source == "my\\images"
