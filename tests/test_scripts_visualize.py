"""scripts/visualize.py: the curvature of a run, measured while it is made again."""

import json

import numpy as np
import pytest

from minivit.train import METRICS, read_metrics


def test_curvature_of_a_run(call, trained, tmp_path):
    ended = call(
        "visualize", "curvature", trained / "last.npz", "--every", 2, "--pictures", 16, "--points", 5, "--out", tmp_path
    )
    assert ended.status == 0, ended.err
    assert (tmp_path / "curvature.png").read_bytes()[:4] == b"\x89PNG"
    report = json.loads((tmp_path / "curvature.json").read_text())
    assert [r["epoch"] for r in report["records"]] == [2, 3]
    for record in report["records"]:
        assert record["eigenvalues"][0] >= record["eigenvalues"][1] > 0 and record["converged"] == [True, True]
        assert max(record["residuals"]) < 1e-2 * record["eigenvalues"][0]
        assert record["preconditioned"]["eigenvalues"][0] > 0
        assert record["edge"] == pytest.approx(38 / record["lr"])
    # the training that was made again is that of the checkpoint: its last learning rate, and its end's curvature
    rates = [r["lr"] for r in read_metrics(trained / METRICS) if r["kind"] == "train"]
    assert report["records"][-1]["lr"] == pytest.approx(rates[-1])
    assert report["records"][-1]["eigenvalues"][0] == pytest.approx(report["at_end"]["eigenvalues"][0], rel=1e-2)
    assert report["ends_at_checkpoint"] and "at the end, which is the checkpoint" in ended.out


def test_another_optimizer(call, trained, tmp_path):
    few = ["--pictures", 8, "--points", 2, "--epochs", 1, "--out", tmp_path, "--json", tmp_path / "x.json"]
    ended = call("visualize", "curvature", trained / "last.npz", "--optimizer", "sgd", "--lr", 0.1, *few)
    assert ended.status == 0, ended.err
    report = json.loads((tmp_path / "x.json").read_text())
    (record,) = report["records"]
    assert "preconditioned" not in record and record["edge"] == pytest.approx(3.8 / record["lr"])
    # every panel is of the training that was asked for: the surface is at its end, not at the checkpoint
    assert not report["ends_at_checkpoint"] and "not at the checkpoint" in ended.out
    assert report["at_end"]["eigenvalues"][0] == pytest.approx(record["eigenvalues"][0], rel=1e-2)


def test_an_eigenvalue_that_is_not_found_is_marked(call, trained, tmp_path):
    few = ["--pictures", 8, "--points", 2, "--epochs", 1, "--steps", 2, "--out", tmp_path]
    ended = call("visualize", "curvature", trained / "last.npz", *few)
    assert ended.status == 0, ended.err
    (record,) = json.loads((tmp_path / "curvature.json").read_text())["records"]
    assert record["converged"] == [False, False] and record["preconditioned"]["converged"] == [False]
    assert record["residuals"][0] > 1e-3 * record["eigenvalues"][0] and ended.out.count(" +- ") == 2


@pytest.mark.parametrize(
    "arguments",
    [["--every", 0], ["--pictures", 0], ["--count", -1], ["--optimizer", "lbfgs"], ["--lr", -1], ["--epochs", "x"]],
)
def test_bad_settings(call, trained, tmp_path, arguments):
    ended = call("visualize", "curvature", trained / "last.npz", "--out", tmp_path, *arguments)
    assert ended.status == 2 and ended.err.startswith("error: ") and ended.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_bad_checkpoints(call, tmp_path):
    np.savez(tmp_path / "other.npz", x=np.zeros(2))
    for name in ("missing.npz", "other.npz"):
        ended = call("visualize", "curvature", tmp_path / name)
        assert ended.status == 2 and ended.err.startswith("error: ") and ended.err.count("\n") == 1
