"""scripts/gradcheck.py: passes as it stands, fails with status 1 when a gradient is wrong, and writes what it found."""

import io
import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from minivit import InputError, gradcheck_cases
from minivit.facts import FACTS
from minivit.mistakes import BY_NAME, planted

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


def test_all_checks_hold_to_their_limits(main, tmp_path, capsys):
    assert main(["--all", "--json", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"] and set(report["largest"]) == {"complex", "central", "adjoint", "symmetry", "facts"}
    assert report["limits"] == {"complex": 1e-12, "central": 1e-8, "adjoint": 1e-13, "symmetry": 1e-12, "facts": 1e-10}
    assert all(report["largest"][key] <= limit for key, limit in report["limits"].items())
    assert {row["name"] for row in report["results"]} >= {*gradcheck_cases.LAYERS, *gradcheck_cases.MODELS, *FACTS}
    assert "EXCEEDED" not in capsys.readouterr().out


def test_all_fails_with_a_mistake(main, capsys):
    with planted("layernorm-dropped-mean"):
        assert main(["layernorm", "--all"]) == 1
    assert "EXCEEDED" in capsys.readouterr().out


def test_a_gradient_that_is_nan_fails_wherever_it_stands(main, capsys, monkeypatch):
    right = gradcheck_cases.LAYERS["linear"]

    def wrong(rng):
        forward, backward, args, names = right(rng)
        return forward, lambda dy, c: (*backward(dy, c)[:2], np.nan * backward(dy, c)[2]), args, names

    monkeypatch.setitem(gradcheck_cases.LAYERS, "linear", wrong)
    assert main(["softmax", "linear", "--all"]) == 1
    assert capsys.readouterr().out.count("EXCEEDED") >= 3


def test_depth_finds_the_slopes_of_theory(main, tmp_path, capsys):
    arguments = ["layernorm", "--depth", "--out", str(tmp_path / "new"), "--json", str(tmp_path / "report.json")]
    assert main(arguments) == 0
    report = json.loads((tmp_path / "report.json").read_text())["layernorm"]
    assert list(report) == ["x", "w", "b"]
    found = {(r["method"], r["dtype"]): r for r in report["x"]}
    for method, order in (("forward", 1), ("central", 2), ("five-point", 4), ("complex", 2)):
        assert abs(found[method, "float64"]["slope"] - order) < 0.1
    for method in ("forward", "central", "five-point"):
        at, predicted = found[method, "float64"]["step"], found[method, "float64"]["predicted_step"]
        assert predicted / 20 < at < predicted * 20
        assert found[method, "float32"]["error"] > 1e3 * found[method, "float64"]["error"]
    assert found["complex", "float64"]["error"] < 1e-14
    assert (tmp_path / "new" / "v-curve-layernorm.png").read_bytes()[:4] == b"\x89PNG"
    assert "How to read it" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["softmax-square", "adam-frozen-step", "model-position-not-trained", "patch-not-transposed"]
)
def test_planting_shows_what_exposes_it(main, capsys, name):
    assert main(["--plant", name]) == 0
    printed = capsys.readouterr().out
    assert BY_NAME[name].about in printed and "exposed by\n" in printed and "\n  - " in printed and "\n  + " in printed
    assert main(["softmax", "loss", "--all"]) == 0  # nothing is left behind


def test_the_zoo_can_be_listed(main, capsys):
    assert main(["--plant", "list"]) == 0
    assert f"{len(BY_NAME)} mistakes" in capsys.readouterr().out


def test_the_hunt(main, capsys, monkeypatch):
    mistake = BY_NAME["attention-scale-twice"]
    monkeypatch.setattr("random.choice", lambda mistakes: mistake)
    monkeypatch.setattr("sys.stdin", io.StringIO("hint\nsoftmax_backward\nattention_backward\n"))
    assert main(["--plant", "random"]) == 0
    before, _, after = capsys.readouterr().out.partition("In which function")
    assert "attention dq" in before and mistake.about not in before and mistake.name not in before
    for part in (mistake.hint, "Not in softmax_backward.", "Yes.", mistake.about):
        assert part in after
        after = after.partition(part)[2]


@pytest.mark.parametrize(
    "arguments",
    [
        ["swish"],
        ["linear", "--seed", "-1"],
        ["--depth"],
        ["vit", "--depth"],
        ["--plant", "nonsense"],
    ],
)
def test_bad_input(main, arguments):
    with pytest.raises(InputError):
        main(arguments)
