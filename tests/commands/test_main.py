"""``minivit COMMAND``: the list of commands, help, the version, and names that are not there."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

import minivit
from minivit.commands import COMMANDS, NAMES
from minivit.commands.main import main


@pytest.fixture
def start(capsys):
    """``start(*words)`` runs ``minivit`` with these words: (status, stdout, stderr)."""

    def run(*words):
        with pytest.raises(SystemExit) as end:
            main(list(words))
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    return run


@pytest.mark.parametrize("words", [[], ["help"], ["--help"], ["-h"]])
def test_the_commands_are_listed_by_what_people_want_to_do(start, words):
    status, shown, _ = start(*words)
    assert status == 0 and shown.startswith("usage: minivit COMMAND")
    lines = shown.splitlines()
    for title, group in COMMANDS.items():
        first = lines.index(f"{title}:") + 1
        assert [line.split()[0] for line in lines[first : first + len(group)]] == list(group)
    assert max(map(len, lines)) <= 100


def test_every_module_of_a_command_is_listed():
    files = {path.stem for path in (ROOT / "minivit" / "commands").glob("*.py")}
    files -= {"__init__", "cli", "flags", "gradient_tables", "main", "training"}
    assert sorted(files) == sorted(NAMES) and len(set(NAMES)) == len(NAMES)


def test_the_version(start):
    assert start("--version") == (0, f"minivit {minivit.__version__}\n", "")


def test_help_of_a_command(start):
    shown = start("help", "data")
    assert shown == start("data", "--help") and shown[1].startswith("usage: minivit data")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "there is no command 'trian'; did you mean train or "),
        (["evaluat"], "there is no command 'evaluat'; did you mean evaluate?"),
        (["help", "swep"], "there is no command 'swep'; did you mean sweep?"),
        (["--epochs", "3"], "there is no command '--epochs'; minivit alone lists the commands"),
        (["data", "info", "mnist"], "invalid choice: 'mnist'"),
    ],
)
def test_bad_input_is_one_line(start, words, said):
    status, shown, error = start(*words)
    assert status == 2 and shown == "" and error.startswith("error: ") and said in error and error.count("\n") == 1


def test_as_a_module(tmp_path):
    """From another folder; the status is the command's."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-m", "minivit", "data", "info", "digits"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") and "1,437 training" in done.stdout
    done = subprocess.run(
        [*command, "--image-size", "0"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error: image size 0")
