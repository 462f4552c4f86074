"""scripts/visualize.py: the curvature of a run, measured while it is made again; the sheet of augmentations."""

import json

import numpy as np
import pytest

from minivit import plots
from minivit.data.operations import OPERATIONS
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
    more = call("visualize", "curvature", trained / "last.npz", *few, "--count", 3)
    assert more.status == 0 and "of the 3 eigenvalues asked for only 2 were found: --steps 2 products" in more.out
    ended = call("visualize", "curvature", trained / "last.npz", *few)
    assert ended.status == 0 and "asked for" not in ended.out, ended.err
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


def test_sheet_of_augmentations(call, tmp_path, monkeypatch):
    sheets = []
    monkeypatch.setattr(plots, "save_contact_sheet", lambda path, rows, *, title: sheets.append((path, rows)))
    for seed in (0, 0, 1):
        ended = call("visualize", "augment", "--columns", 9, "--seed", seed, "--out", tmp_path / "new")
        assert ended.status == 0, ended.err
        assert "augment-digits.png" in ended.out
    (path, first), (_, again), (_, other) = sheets
    assert path == tmp_path / "new" / "augment-digits.png"
    assert set(OPERATIONS[1:]) < set(first) and {"crop", "flip", "affine", "erasing"} < set(first)
    same = {name for name, pictures in first.items() if np.array_equal(pictures, first["as they are"])}
    # digits have no colours, but white and black and too few pixels to spread evenly
    assert same == {"as they are", "color", "autocontrast", "equalize"}
    for name, pictures in first.items():
        assert pictures.shape == (9, 8, 8, 1) and pictures.dtype == np.uint8
        np.testing.assert_array_equal(pictures, again[name])
    assert not np.array_equal(first["as they are"], other["as they are"])


def test_sheet_is_drawn(call, tmp_path):
    assert call("visualize", "augment", "--out", tmp_path).status == 0
    assert (tmp_path / "augment-digits.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "arguments", [["--columns", 1], ["--seed", -1], ["--data", "x"], ["--data", "cifar10", "--data-dir", "x"]]
)
def test_bad_settings_of_a_sheet(call, tmp_path, arguments):
    ended = call("visualize", "augment", "--out", tmp_path / "new", *arguments)
    assert ended.status == 2 and ended.err.startswith("error: ") and ended.err.count("\n") == 1
    assert not (tmp_path / "new").exists()
