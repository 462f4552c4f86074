"""The folder of a run: nothing is overwritten, half-written lines are dropped, one process writes."""

import json
from dataclasses import replace

import pytest
from small_runs import HARD, STEPS, assert_same_run, before_step, resumed, stop_at, trainer, whole

from minivit.base.errors import InputError
from minivit.training.folder import BEST, LAST, METRICS, PREVIOUS, SETTINGS, SUMMARY

pytestmark = pytest.mark.usefixtures("no_figures")


def test_metrics_with_a_half_written_line_and_foreign_ones(tmp_path):
    run = trainer(tmp_path)
    stop_at(run, 7)
    run.run()
    lines = (tmp_path / METRICS).read_bytes().splitlines(keepends=True)
    foreign = [b"\n", b"7\n", b'{"kind": "train"}\n', b'{"kind": "test", "step": "x", "epoch": 1}\n', b"\xff\xfe\0\0\n"]
    later = b'{"kind": "train", "step": 8, "epoch": 2, "lr": 1, "loss": 1}\n'  # of a step that will be made again
    (tmp_path / METRICS).write_bytes(b"".join([*lines[:2], *foreign, *lines[2:], later, lines[-1][:20]]))
    resumed(tmp_path).run()
    assert_same_run(tmp_path, whole())


def test_metrics_that_were_lost_are_no_reason_to_fail(tmp_path):
    run = trainer(tmp_path)
    stop_at(run, 7)
    run.run()
    (tmp_path / METRICS).unlink()
    assert resumed(tmp_path).run()["steps"] == STEPS


def test_a_finished_run_is_left_as_it_is(tmp_path):
    trainer(tmp_path).run()
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    again = resumed(tmp_path)
    assert again.finished
    summary = again.run()
    assert summary == json.loads(before[SUMMARY])
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert_same_run(tmp_path, whole())


def test_a_new_run_overwrites_nothing(tmp_path):
    for name in (LAST, BEST, PREVIOUS, METRICS, SUMMARY, SETTINGS, "curves.png", "predictions.png"):
        out = tmp_path / name.replace(".", "-")
        out.mkdir()
        (out / name).write_text("mine")
        with pytest.raises(InputError, match="already holds a run"):
            trainer(out).run()
        assert [(p.name, p.read_text()) for p in out.iterdir()] == [(name, "mine")]


def test_two_processes_cannot_train_into_one_folder(tmp_path):
    run = trainer(tmp_path, replace(HARD, checkpoint_seconds=0.0))
    refused = []

    def intrude():
        for other in (trainer(tmp_path), resumed(tmp_path)):
            with pytest.raises(InputError, match="another process is training into") as raised:
                other.run()
            refused.append(raised.value)

    before_step(run, 4, intrude)
    assert run.run()["steps"] == STEPS and len(refused) == 2
    assert resumed(tmp_path).run()["steps"] == STEPS  # the lock is gone


@pytest.mark.parametrize("error", [RuntimeError("no\nlatex"), ValueError(""), FileNotFoundError(2, "no font")])
def test_a_figure_that_fails_is_one_line_and_everything_else_is_there(tmp_path, capsys, error):
    """The summary is written before the figures are drawn."""
    run = trainer(tmp_path)

    def draw(run, outputs):
        assert (tmp_path / SUMMARY).exists()
        raise error

    run.draw = draw
    summary = run.run()
    assert summary["steps"] == STEPS and json.loads((tmp_path / SUMMARY).read_text())["steps"] == STEPS
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("warning: a figure could not be drawn (")
    assert resumed(tmp_path).finished
