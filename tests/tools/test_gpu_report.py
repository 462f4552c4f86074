"""The report of a GPU, without one: its commands are recorded instead of run; each is one that its program knows."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, load_script

from minivit.benchmark.bandwidth import signatures
from minivit.kernels import cuda

SCRIPT = ROOT / "tools" / "gpu_report.sh"
BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(not (BASH and shutil.which("timeout")), reason="needs bash and coreutils")
RECORDER = """#!{python}
import json, os, pathlib, sys
arguments = sys.argv[1:]
with open({diary!r}, "a") as diary:
    diary.write(json.dumps([pathlib.Path(sys.argv[0]).name, *arguments]) + "\\n")
print("some words")
for name, value in json.loads(os.environ.get("ACTS", "{{}}")).items():
    if name in " ".join([sys.argv[0], *arguments]):
        if value <= 9:
            sys.exit(value)
        clock = pathlib.Path({diary!r}).with_name("clock")
        clock.write_text(str(int(clock.read_text()) + value))
"""
# Programs that stand for those of coreutils, where a file has the time: no test waits, and none is late.
DATE = """#!{python}
import pathlib, sys
assert sys.argv[1:] == ["+%s"]
print(pathlib.Path({clock!r}).read_text())
"""
TIMEOUT = """#!{python}
import pathlib, subprocess, sys
option, grace, limit, *command = sys.argv[1:]
assert (option, grace) == ("-k", "2") and int(limit) > 0
clock = pathlib.Path({clock!r})
before = int(clock.read_text())
status = subprocess.run(command).returncode
if int(clock.read_text()) >= before + int(limit):
    clock.write_text(str(before + int(limit)))
    status = 124
sys.exit(status)
"""


@pytest.fixture
def report(tmp_path):
    """``report(acts, **environment)`` runs the script: its status, the commands, what it wrote into gpu-report.txt.

    ``acts`` has commands with a word end with a status, or take so many seconds, of `stopped_clock`, if that is more
    than nine.
    """
    diary = tmp_path / "diary"
    for name in ("python", "compute-sanitizer"):
        (tmp_path / name).write_text(RECORDER.format(python=sys.executable, diary=str(diary)))
        (tmp_path / name).chmod(0o755)

    def run(acts=(), **environment):
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        environment |= {"PYTHON": str(tmp_path / "python"), "PATH": path, "ACTS": json.dumps(dict(acts))}
        done = subprocess.run(
            [BASH, str(SCRIPT), str(tmp_path / "o u t")], env={**os.environ, **environment}, capture_output=True,
            text=True, timeout=600,
        )  # fmt: skip
        assert done.stderr == ""
        commands = [json.loads(line) for line in diary.read_text().splitlines()] if diary.exists() else []
        return done.returncode, commands, (tmp_path / "o u t" / "gpu-report.txt").read_text().splitlines()

    return run


def test_every_command_is_one_that_its_program_takes(report, tmp_path):
    status, commands, lines = report()
    assert status == 0 and all(": status 0, after " in line for line in lines), lines
    parts = [line.partition(":")[0] for line in lines]
    assert len(parts) == len(set(parts)) == len(commands)
    assert all((tmp_path / "o u t" / f"{name}.txt").read_text() == "some words\n" for name in parts)
    parse = load_script("benchmark").parse
    seen, files = [], []
    for name, *arguments in commands:
        if name == "compute-sanitizer":
            assert arguments[:3] == ["--error-exitcode", "1", "--tool"]
            at = arguments.index(str(tmp_path / "python"))
            seen.append(arguments[3])
            name, arguments = "python", arguments[at + 1 :]
        if arguments[0] == "scripts/benchmark.py":
            found = parse(arguments[1:])
            assert found.device == "cuda" and found.quiet and Path(found.json).parent == tmp_path / "o u t"
            assert found.against == (["torch", "torch-compile"] if found.task == "step" else [])
            model = load_script("benchmark").config_of(found)
            seen.append((found.task, model.width, model.num_tokens, found.batch, found.precision))
            files += [found.json, found.png]
        else:
            assert arguments[:2] == ["-m", "pytest"] and arguments[arguments.index("-m", 1) + 1] == "gpu"
            assert (ROOT / "tests" / "kernels" / "test_cuda.py").samefile(
                ROOT / next(a for a in arguments if a.endswith(".py"))
            )
            seen.append("tests")
    cases = [(width, tokens, batch) for width, tokens, batch in ((192, 65, 128), (192, 65, 1024), (384, 197, 128))]
    expected = {
        (task, *case, precision) for task in ("step", "kernels") for case in cases for precision in ("tf32", "bf16")
    } | {("step", *case, "float32") for case in cases}
    assert {each for each in seen if type(each) is tuple} == expected
    assert len(files) == len(set(files)) == 2 * len(expected)
    first = {kind: min(i for i, each in enumerate(seen) if each[0] == kind) for kind in ("step", "kernels")}
    assert seen[0] == "tests" and first["step"] == 1 and first["kernels"] == 7 < seen.index("memcheck") == 13
    assert seen.index("racecheck") == 15 and [each[-1] for each in seen[17:]] == ["float32"] * 3


@pytest.mark.parametrize(
    ("word", "part"), [("racecheck", "gpu-racecheck"), ("-v", "gpu-tests"), ("gpu-s16-128-bf16", "gpu-s16-128-bf16")]
)
def test_a_part_that_fails_fails_the_report_and_no_other_part(report, word, part):
    status, _, lines = report({word: 3})
    bad = [line.partition(", ")[0] for line in lines if "status 0" not in line]
    assert status == 1 and bad == [f"{part}: status 3"]


@pytest.fixture
def stopped_clock(tmp_path):
    """The file with the time of the report, which stands still but for what commands take."""
    clock = tmp_path / "clock"
    clock.write_text("1000")
    for name, text in (("date", DATE), ("timeout", TIMEOUT)):
        (tmp_path / name).write_text(text.format(python=sys.executable, clock=str(clock)))
        (tmp_path / name).chmod(0o755)
    return clock


def test_it_ends_in_time_whatever_hangs(report, stopped_clock, tmp_path):
    status, _, lines = report({"-v": 60, "memcheck": 60}, LIMIT="5")
    assert status == 1 and int(stopped_clock.read_text()) == 1004  # 1 s and 3 s: parts get whole seconds
    said = dict(line.split(": status ") for line in lines)
    assert said["gpu-tests"] == "124, cut off, after 1 s" and said["gpu-memcheck"] == "124, cut off, after 3 s"
    assert said["gpu-cifar-128-tf32"].startswith("none, no time was left")
    assert said["gpu-kernels-cifar-1024-bf16"].startswith("0,")
    assert (tmp_path / "o u t" / "gpu-tests.txt").read_text() == "some words\n"


def test_the_limits_are_within_nine_minutes():
    text = SCRIPT.read_text()
    limit, grace = (int(re.search(given, text)[1]) for given in (r"LIMIT:-(\d+)}", r"timeout -k (\d+) "))
    assert limit + grace <= 540


REACHED = """
import sys
import pytest
from emulator import Emulator

found, launch = set(), Emulator.launch

def seen(self, name, grid, block, arguments, **settings):
    found.add((name, len(arguments)))
    return launch(self, name, grid, block, arguments, **settings)

Emulator.launch = seen
status = pytest.main(["-q", "-p", "no:cacheprovider", "tests/kernels/test_cuda.py", "-k", sys.argv[1]])
print("\\n" + repr(found))
sys.exit(status)
"""


@pytest.mark.slow
def test_what_the_sanitizer_sees_reaches_every_kernel(report):
    """Each form of each kernel, by the launches of the same tests on the emulator."""
    chosen = {c[c.index("-k") + 1] for _, *c in report()[1] if "-k" in c}
    assert len(chosen) == 1
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", REACHED, chosen.pop()], cwd=ROOT, env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    reached = ast.literal_eval(done.stdout.splitlines()[-1])
    forms = signatures(cuda.SOURCE.read_text()).items()
    assert {(name, len(parameters)) for name, each in forms for parameters in each} == reached
