"""scripts/gradcheck.py: passes as it stands, fails with status 1 when a gradient is wrong, and writes what it found."""

import json
import runpy
from pathlib import Path

import pytest

from minivit import InputError, gradcheck_cases

SCRIPT = Path(__file__).parent.parent / "scripts" / "gradcheck.py"


@pytest.fixture(scope="module")
def main():
    return runpy.run_path(str(SCRIPT), run_name="gradcheck_script")["main"]


def test_it_passes_and_reports(main, tmp_path, capsys):
    names = ["layernorm", "gelu-erf", "loss-soft", "vit-mean"]
    assert main([*names, "--json", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"] and 0 < report["max_relative_error"] < 1e-6
    assert report["max_relative_error_by_method"]["complex"] < 1e-10
    assert {row["name"] for row in report["results"]} == set(names)
    assert {row["method"] for row in report["results"]} == {"central", "complex"}
    printed = capsys.readouterr().out
    assert "layernorm" in printed and "largest relative error" in printed and "WRONG" not in printed


def test_a_wrong_gradient_is_status_1(main, tmp_path, capsys, monkeypatch):
    right = gradcheck_cases.LAYERS["linear"]

    def wrong(rng):
        forward, backward, args, names = right(rng)

        def dropped_bias(dy, cache):
            dx, dW, db = backward(dy, cache)
            return dx, dW, 0 * db

        return forward, dropped_bias, args, names

    monkeypatch.setitem(gradcheck_cases.LAYERS, "linear", wrong)
    assert main(["linear", "softmax", "--json", str(tmp_path / "report.json")]) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["passed"]
    assert {(r["name"], r["argument"]) for r in report["results"] if not r["passed"]} == {("linear", "b")}
    assert "WRONG: linear db" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["swish"], ["linear", "--seed", "-1"]])
def test_bad_input(main, arguments):
    with pytest.raises(InputError):
        main(arguments)
