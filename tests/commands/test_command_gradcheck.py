"""minivit gradcheck: passes as it stands, fails with status 1 when a gradient is wrong, and writes what it found."""

import io
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import load_script

import minivit
from minivit import InputError
from minivit.laboratory import cases as gradcheck_cases
from minivit.laboratory import checks as laboratory
from minivit.laboratory.facts import FACTS
from minivit.laboratory.hunt import changed_lines, level_of
from minivit.laboratory.mistakes import BY_NAME, MISTAKES, planted


@pytest.fixture(scope="module")
def main():
    return load_script("gradcheck").main


@pytest.fixture
def few(monkeypatch):
    """A mistake is exposed by the checks of three layers alone: those of all are run where nothing is typed."""
    layers = {name: gradcheck_cases.LAYERS[name] for name in ("linear", "softmax", "attention")}
    monkeypatch.setattr(laboratory, "LAYERS", layers)
    monkeypatch.setattr(laboratory, "MODELS", {})


def test_it_passes_and_reports(main, tmp_path, capsys, monkeypatch):
    tiny = {"image_size": 4, "patch_size": 2, "width": 4, "depth": 1, "num_heads": 2, "mlp_dim": 6, "num_classes": 3}
    monkeypatch.setitem(gradcheck_cases.MODELS, "vit-mean", {"pooling": "mean", **tiny})
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
    assert report["passed"] and set(report["largest"]) == set(report["limits"])
    assert report["limits"] == {
        "complex": 1e-12, "central": 1e-8, "symmetry": 1e-12, "hessian": 1e-8, "facts": 1e-10
    }  # fmt: skip
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
        for dtype in ("float64", "float32"):
            for what, luck in (("step", 1), ("error", 10)):  # the least of many errors, each of which may cancel
                at, predicted = found[method, dtype][what], found[method, dtype][f"predicted_{what}"]
                assert predicted / 10 / luck < at < predicted * 10, (method, dtype, what)
        assert found[method, "float32"]["error"] > 1e3 * found[method, "float64"]["error"]
    assert found["complex", "float64"]["error"] < 1e-14
    assert all(r["predicted_step"] is None and r["slope"] is None for r in report["w"])  # linear: no truncation
    assert (tmp_path / "new" / "v-curve-layernorm.png").read_bytes()[:4] == b"\x89PNG"
    assert "How to read it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("softmax-square", "softmax"), ("adam-frozen-step", "linear"),  # that one is seen by a fact
        ("model-position-not-trained", "vit"), ("patch-not-transposed", "patch_embed"),
    ],
)  # fmt: skip
def test_planting_shows_what_exposes_it(main, capsys, name, case):
    assert main(["--plant", name]) == 0
    printed = capsys.readouterr().out
    assert BY_NAME[name].about in printed and "exposed by\n" in printed and "\n  - " in printed and "\n  + " in printed
    with planted(name):
        assert main([case, "--all"]) == 1
    assert main([case, "--all"]) == 0  # nothing is left behind


def test_the_zoo_can_be_listed(main, capsys):
    assert main(["--plant", "list"]) == 0
    assert f"{len(BY_NAME)} mistakes" in capsys.readouterr().out


def hiding(name):
    """A seed with which --plant random hides this mistake."""
    return next(str(n) for n in range(10**6) if random.Random(n).choice(list(BY_NAME)) == name)


def hunt(main, monkeypatch, capsys, typed, *arguments):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*typed, ""])))
    assert main(["--plant", "random", *arguments]) == 0
    return capsys.readouterr().out


def test_the_hunt(main, few, capsys, monkeypatch):
    """File, function, line: each is told to be right, and the answer comes with the line."""
    mistake = BY_NAME["attention-scale-twice"]
    typed = ["hint", "softmax_backward", "gelu.py", "layers/attention.py", "attention_backward", "dv =", "99999"]
    typed += ["dq = dscores  @ k"]
    printed = hunt(main, monkeypatch, capsys, typed, "--seed", hiding(mistake.name))
    before, _, after = printed.partition("In which file")
    assert "attention dq" in before and mistake.about not in before and mistake.name not in before
    parts = (mistake.hint, "Not in softmax_backward.", "Not in gelu.py.", "Yes, in that file.", "Yes. In which line?")
    for part in (*parts, "Not that line.", "Not that line.", "Found; guesses: 7, checks: 0, hints: 1.", mistake.about):
        assert part in after
        after = after.partition(part)[2]


@pytest.mark.parametrize(("name", "file", "line"), [
    ("attention-scale-twice", "attention", "number"), ("softmax-square", "minivit.layers.softmax", "text"),
    ("adam-eps-inside", "optim/adam.py", "number"),
])  # fmt: skip
def test_files_and_lines_are_named_in_any_way(main, few, capsys, monkeypatch, name, file, line):
    number, text = next(iter(changed_lines(BY_NAME[name]).items()))
    path = Path(minivit.__file__).parent.parent / (BY_NAME[name].module.replace(".", "/") + ".py")
    assert path.read_text(encoding="utf-8").splitlines()[number - 1] == " " * (
        len(path.read_text(encoding="utf-8").splitlines()[number - 1]) - len(text)
    ) + text  # fmt: skip
    typed = [file, BY_NAME[name].function, str(number) if line == "number" else text]
    printed = hunt(main, monkeypatch, capsys, typed, "--seed", hiding(name))
    assert "Yes, in that file." in printed and "Found; guesses: 3," in printed and BY_NAME[name].about in printed


@pytest.mark.parametrize("level", [1, 2, 3])
def test_levels_hide_other_mistakes_and_tell_less(main, few, capsys, monkeypatch, level):
    names = [m.name for m in MISTAKES if level_of(m) == level]
    assert len(names) >= 10
    drawn = []
    real = random.Random.choice
    monkeypatch.setattr(
        random.Random, "choice", lambda self, each: drawn.append([m.name for m in each]) or real(self, each)
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("quit\n"))
    main(["--plant", "random", "--seed", "1", "--level", str(level)])  # the few checks do not see all of them
    printed = capsys.readouterr().out
    assert drawn[0] == names and f"Level {level}: " in printed and f"--level {level} --seed 1 hides the same" in printed
    assert ("This is what the checks say" in printed) == (level == 1) and ("Checks fail in" in printed) == (level == 2)


def test_the_hunt_can_be_repeated(main, few, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(random, "randrange", lambda n: drawn.append(n) or int(hiding("attention-scale-twice")))
    first = hunt(main, monkeypatch, capsys, ["answer"])
    (seed,) = re.findall(r"--seed (\d+) hides the same again", first)
    assert drawn == [10**6] and seed == hiding("attention-scale-twice")
    again = hunt(main, monkeypatch, capsys, ["answer"], "--seed", seed)
    assert first.partition("In which file")[2] == again.partition("In which file")[2]


@pytest.mark.parametrize("typed", [[], ["softmax_backward"], ["quit"]])
def test_the_answer_is_not_shown_unasked(main, few, capsys, monkeypatch, typed):
    mistake = BY_NAME["attention-scale-twice"]
    printed = hunt(main, monkeypatch, capsys, typed, "--seed", hiding(mistake.name))
    assert mistake.about not in printed and mistake.name not in printed
    assert printed.splitlines()[-1].startswith(f"Not found. --plant random --seed {hiding(mistake.name)} hides")
    assert "type answer to see it" in printed


def test_the_columns_stand_below_their_heads(main, capsys):
    longest = max(gradcheck_cases.LAYERS, key=len)
    assert main([longest, "--all"]) == 0
    head, first, *_ = capsys.readouterr().out.splitlines()
    assert head.index("argument") == first.index("q") == len(longest) + 2
    assert main([longest, "--method", "complex"]) == 0
    head, first, *_ = capsys.readouterr().out.splitlines()
    assert head.index("argument") == first.index("q ") and len(head) == len(first)


def test_what_is_too_small_to_tell_is_marked(main, capsys, monkeypatch):
    def tiny(rng):
        return lambda x: (x**3, x), lambda dy, x: 2 * x * x * dy, [1e-8 * rng.standard_normal(5)], ("x",)

    monkeypatch.setitem(gradcheck_cases.LAYERS, "linear", tiny)
    assert main(["linear"]) == 0
    assert capsys.readouterr().out.count("too small to tell") == 2


def test_the_hunter_can_go_on_checking_with_the_mistake_in_place(main, few, capsys, monkeypatch, tmp_path):
    typed = ["check attention softmax", "along attention", "facts", "depth attention", "depth vit", "check", "quit"]
    printed = hunt(
        main, monkeypatch, capsys, typed, "--seed", hiding("attention-scale-forward"), "--out", str(tmp_path)
    )
    _, after = printed.split("hint, answer, quit")
    assert "WRONG: attention dq" in after and "WRONG: softmax" not in after
    assert re.search(r"complex +\S+ +allowed 1e-12  EXCEEDED", after)
    assert re.search(r"facts +\S+ +allowed 1e-10  EXCEEDED", after)
    assert (tmp_path / "v-curve-attention.png").exists()
    assert "depth needs the name of one of these: linear" in after and "check needs the name of one of these" in after
    assert main(["attention", "--all"]) == 0


def test_a_check_that_breaks_down_does_not_end_the_hunt(main, few, capsys, monkeypatch):
    mistake = BY_NAME["linear-input-abs-weight"]
    printed = hunt(
        main, monkeypatch, capsys, ["along nonsense", "along linear", "hint", "answer"],
        "--seed", hiding(mistake.name),
    )  # fmt: skip
    assert "along needs the name of one of these" in printed
    assert mistake.hint in printed and mistake.about in printed


@pytest.mark.parametrize(
    "arguments",
    [
        ["swish"],
        ["linear", "--seed", "-1"],
        ["--depth"],
        ["vit", "--depth"],
        ["--plant", "nonsense"],
        ["linear", "--level", "1"],
        ["--plant", "softmax-square", "--level", "2"],
        ["--plant", ""],
        ["linear", "--plant", "softmax-square"],
        ["--plant", "softmax-square", "--json", "x.json"],
        ["--plant", "softmax-square", "--method", "central"],
        ["--plant", "softmax-square", "--out", "."],
        ["--plant", "", "--device", "cpu", "--json", "x.json"],
        ["linear", "--depth", "--method", "central"],
        ["linear", "--all", "--method", "both"],
        ["vit", "--against", "torch", "--method", "complex"],
        ["linear", "--out", "."],
        ["linear", "--all", "--out", "."],
    ],
)
def test_bad_input(main, arguments):
    with pytest.raises(InputError) as caught:
        main(arguments)
    assert "\n" not in str(caught.value)
