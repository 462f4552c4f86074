"""tools/mutate.py: the operators by their examples, a weak test-suite found out, the list of equivalent mutants."""

import ast
import json
import os
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT
from cosmic_ray.mutating import mutate_code
from mutation import operators, units

SAMPLE = '''
def sample_backward(dy, cache, *, scale=2.0):
    """Not a word of this is changed: 1 + 1."""
    x, W = cache
    if len(x) < 3:
        raise ValueError(f"{len(x)} rows, at least 3 are needed")
    dx = dy @ W.T
    dx *= scale
    db = dy[:, 1:].sum(axis=0) - x
    return dx, db
'''.lstrip()


def mutants_of_sample():
    return units.mutants_of(units.Unit("minivit/sample.py", "sample_backward", 1, SAMPLE, True))


# The gradient checks and facts of all layers, traced, take seconds: these are enough for softmax.
FEW = """
import runpy
import sys
from minivit.laboratory import facts
from minivit.laboratory import cases as gradcheck_cases
for table in (gradcheck_cases.LAYERS, facts.FACTS):
    for name in [name for name in table if name not in ("linear", "softmax", "softmax_is_normalised_exponentials")]:
        del table[name]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def script(*arguments):
    """The command in a process of its own, since it forks and runs pytest."""
    command = [sys.executable, "-c", FEW, ROOT / "tools" / "mutate.py", *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tools")])}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=600)


@pytest.mark.parametrize("operator", list(operators.Provider()))
def test_an_operator_by_its_examples(operator):
    operator = operators.Provider()[operator]
    assert operator.examples()
    for example in operator.examples():
        changed = mutate_code(example.pre_mutation_code, operator(), example.occurrence)
        if operator is not operators.OtherNumber:  # cosmic-ray's examples do not look at the spaces
            assert changed == example.post_mutation_code
        assert ast.dump(ast.parse(changed)) == ast.dump(ast.parse(example.post_mutation_code))


def test_the_sample_is_changed_in_every_way():
    changes = {(m.original, m.mutated) for m in mutants_of_sample()}
    for change in [
        ("x, W = cache", "W, x = cache"),
        ("x, W = cache", "pass"),
        ("if len(x) < 3:", "if len(x) <= 3:"),
        ("if len(x) < 3:", "if len(x) < 4:"),
        ("if len(x) < 3:", "if not len(x) < 3:"),
        ("if len(x) < 3:", "if False:"),
        ('raise ValueError(f"{len(x)} rows, at least 3 are needed")', "pass"),
        ("dx = dy @ W.T", "dx = dy @ W"),
        ("dx = dy @ W.T", "dx = W.T @ dy"),
        ("dx = dy @ W.T", "dx = dy.swapaxes(-1, -2) @ W.T"),
        ("dx = dy @ W.T", "dx = dy @ x.T"),
        ("dx *= scale", "dx /= scale"),
        ("dx *= scale", "pass"),
        ("db = dy[:, 1:].sum(axis=0) - x", "db = dy[:, 2:].sum(axis=0) - x"),
        ("db = dy[:, 1:].sum(axis=0) - x", "db = dy[:, 1:-1].sum(axis=0) - x"),
        ("db = dy[:, 1:].sum(axis=0) - x", "db = dy[:, 1:].sum(axis=1) - x"),
        ("db = dy[:, 1:].sum(axis=0) - x", "db = dy[:, 1:].mean(axis=0) - x"),
        ("db = dy[:, 1:].sum(axis=0) - x", "db = dy[:, 1:].sum() - x"),
        ("db = dy[:, 1:].sum(axis=0) - x", "db = dy[:, 1:].sum(axis=0) + x"),
        ("db = dy[:, 1:].sum(axis=0) - x", "db = x - dy[:, 1:].sum(axis=0)"),
        ("db = dy[:, 1:].sum(axis=0) - x", "db = dy[:, 1:].sum(axis=0)"),
        ("return dx, db", "return db, dx"),
        ("def sample_backward(dy, cache, *, scale=2.0):", "def sample_backward(dy, cache, *, scale=4.0):"),
    ]:
        assert change in changes, change


def test_every_mutant_is_a_program_of_its_own_and_messages_are_left_alone():
    mutants = mutants_of_sample()
    trees = {ast.dump(ast.parse(m.source)) for m in mutants}
    assert len(trees) == len(mutants) > 50 and ast.dump(ast.parse(SAMPLE)) not in trees
    assert all("Not a word of this is changed: 1 + 1." in m.source for m in mutants)
    assert {m.mutated for m in mutants if "rows" in m.original} == {"pass"}
    assert "-    dx *= scale\n+    dx /= scale" in next(m for m in mutants if m.mutated == "dx /= scale").diff()


def test_what_is_mutated():
    mutated = {(u.file.removeprefix("minivit/"), u.function) for u in units.all_units()}
    layers = {p.stem for p in (ROOT / "minivit" / "layers").glob("*.py")} - {"__init__", "loss"}
    for layer in layers:
        assert (f"layers/{layer}.py", f"{layer}_backward") in mutated
    assert ("layers/patch_embed.py", "unpatchify") in mutated  # called by a backward
    assert {("options/axial.py", name) for name in ("to_axis", "from_axis")} <= mutated  # their own backwards
    assert not {("layers/gelu.py", "gelu_forward"), ("model/vit.py", "ViT.forward")} & mutated
    for unit in (
        ("base/backend.py", "matmul"),
        ("layers/loss.py", "soft_targets"),
        ("model/vit.py", "ViT.backward"),
        ("model/vit.py", "ViT.gradient_buffer"),
        ("masked/loss.py", "patch_loss_gradient"),
        ("base/pairs.py", "chain"),
        ("kernels/cpu.py", "attention_backward"),
        ("options/recompute.py", "recomputed"),
        ("masked/model.py", "MaskedViT.backward"),
        ("options/stem/resnet.py", "resnet_backward"),
        ("training/engines/cpu.py", "Engine.predict"),
        ("training/step.py", "Step.__call__"),
    ):
        assert unit in mutated, unit
    for function in ("Adam.update", "Optimizer.step", "make_optimizer"):
        assert any(file.startswith("optim/") and name == function for file, name in mutated), function


BACKWARD = str(ROOT / "minivit" / "layers" / "softmax.py")
LINE = "dx = y * (dy - row_sum(dy * y))"  # of softmax_backward
CHANGED = "dx = y / (dy - row_sum(dy * y))"
WEAK = """
import numpy as np
from minivit.base.backend import plain
from minivit.layers.softmax import softmax_backward, softmax_forward

def test_weak():
    with plain():
        y, cache = softmax_forward(np.zeros((2, 3)))
        assert softmax_backward(np.ones((2, 3)), cache).shape == (2, 3)
"""


def test_a_weak_test_suite_leaves_survivors(tmp_path):
    (tmp_path / "test_weak.py").write_text(WEAK)
    nothing = tmp_path / "equivalent.toml"
    nothing.write_text("")
    figures = tmp_path / "figures.json"
    ended = script(BACKWARD, "--tests", tmp_path / "test_weak.py", "--only-tests", "--equivalent", nothing,
                   "--json", figures)  # fmt: skip
    assert ended.returncode == 1, ended.stderr
    assert "SURVIVED" in ended.stdout and f"- {LINE}\n  + {CHANGED}" in ended.stdout
    report = json.loads(figures.read_text())
    total = report["total"]
    assert total["survived"] == len(report["survivors"]) > 5
    assert report["killed"] == total["test"] > 5 and total["gradient"] == total["fact"] == total["equivalent"] == 0
    assert "| `softmax_backward` |" in figures.with_suffix(".md").read_text()


@pytest.mark.slow
def test_gradient_checks_kill_what_weak_tests_do_not(tmp_path):
    (tmp_path / "test_weak.py").write_text(WEAK)
    figures = tmp_path / "figures.json"
    ended = script(BACKWARD, "--tests", tmp_path / "test_weak.py", "--limit", "12", "--sample", "0", "--json",
                   figures)  # fmt: skip
    assert "12 mutants" in ended.stdout, ended.stderr
    assert CHANGED not in ended.stdout
    total = json.loads(figures.read_text())["total"]
    assert total["mutants"] == 12 and total["gradient"] > 5


def test_tests_that_fail_before_anything_is_changed_are_refused(tmp_path):
    (tmp_path / "test_wrong.py").write_text("def test_wrong():\n    assert 1 == 2\n")
    ended = script(BACKWARD, "--tests", tmp_path / "test_wrong.py", "--only-tests")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: test ") and "fails before anything is changed" in ended.stderr


ENTRY = f"""
[[equivalent]]
file = "minivit/layers/softmax.py"
function = "softmax_backward"
line = "{LINE}"
mutants = ["{{mutated}}"]
reason = "for this test"
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_backward"], "no function or file to mutate is called 'no_such_backward'"),
        (["softmax_backward", "--show", "9999"], "--show must be a number from 0 to"),
        (["--sample", "1"], "--sample takes a seed of at least 0, and needs --limit"),
        (["--workers", "0"], "--workers must be at least 1, got 0"),
        (["--tests", "nowhere.py"], "there are no tests at nowhere.py"),
        (["softmax_backward", "--list", "--equivalent", "nowhere.toml"], "nowhere.toml"),
        (["--json", "nowhere/figures.json"], "there is no folder nowhere"),
        (["--magic"], "unrecognized arguments: --magic"),
    ],
)
def test_bad_input_is_one_line(call, arguments, message):
    ended = call("mutate", *arguments)
    assert ended.status == 2
    assert ended.err.startswith("error: ") and message in ended.err and ended.err.count("\n") == 1


def test_an_entry_that_no_mutant_matches_is_an_error(call, tmp_path):
    path = tmp_path / "equivalent.toml"
    listing = ["mutate", BACKWARD, "--list", "--equivalent", path]
    path.write_text(ENTRY.format(mutated=CHANGED))
    ended = call(*listing)
    assert ended.status == 0 and f"+ {CHANGED}" in ended.out
    path.write_text(ENTRY.format(mutated="dx = 7 * y"))
    ended = call(*listing)
    assert ended.status == 2
    assert (
        f"no mutant of minivit/layers/softmax.py softmax_backward makes 'dx = 7 * y' of {LINE!r} any more" in ended.err
    )
    path.write_text(ENTRY.format(mutated=CHANGED).replace("softmax_backward", "softmax_sideways"))
    assert call(*listing).status == 2
    path.write_text("[[equivalent]]\nfile = 1\n")
    assert "an entry needs file, function, line, mutants and reason" in call(*listing).err


def test_the_projects_equivalent_mutants_are_of_lines_that_are_there():
    """Quick; that each is a mutant still, and still unnoticed, is checked by the command."""
    sources = {(u.file, u.function): u.source for u in units.all_units()}
    entries = tomllib.loads((ROOT / "tests" / "equivalent_mutants.toml").read_text())["equivalent"]
    for entry in entries:
        lines = sources[entry["file"], entry["function"]].splitlines()
        ones_and_twos = {units._one_line(lines[i : i + n]) for i in range(len(lines)) for n in (1, 2)}
        assert entry["line"] in ones_and_twos, entry
        assert len(entry["reason"]) > 20 and entry["mutants"]
