"""The README says what is so: its Python runs, its layer is the source's, its commands are CI's, its files exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_layer_shown_is_the_source():
    source = (ROOT / "minivit/layers/attention.py").read_text(encoding="utf-8").splitlines()
    position = 0
    shown = [line for line in PYTHON[0].splitlines() if line.strip()]
    assert len(shown) > 15
    for line in shown:
        assert line in source[position:], f"not in the source, or not in this order: {line}"
        position += source[position:].index(line) + 1


@pytest.mark.parametrize("index", range(1, len(PYTHON)))
def test_the_snippets_run(index, capsys):
    exec(compile(PYTHON[index], f"README snippet {index}", "exec"), {})
    printed = capsys.readouterr().out
    assert ("2.302" in printed and "(64, 10)" in printed) or "dx: WRONG, central differences at (" in printed


def test_ci_runs_the_readmes_test_command():
    assert re.search(r'^pip install -e "\.\[test\]" && python -m pytest -n auto +#', README, re.M)
    assert 'pip install -e ".[test]" && python -m pytest -n auto\n' in (ROOT / ".ci/run").read_text(encoding="utf-8")


def test_files_that_are_named_exist():
    links = re.findall(r"\]\(((?!http)[^)]+)\)", README)
    named = re.findall(r"`((?:tests|minivit|scripts|tools)/[\w./-]+)`", README) + [
        f"scripts/{name}" for name in re.findall(r"^\| `(\w+\.py)", README, re.M)
    ]
    assert len(links) > 10 and len(named) > 8
    for name in links + named:
        assert (ROOT / name).exists(), name


def test_every_script_is_listed():
    for script in (ROOT / "scripts").glob("*.py"):
        assert f"`{script.name}" in README, script.name
    for tool in (ROOT / "tools").glob("*.py"):
        assert f"`tools/{tool.name}" in README, tool.name


def test_no_placeholder_is_left():
    assert "@@" not in README
