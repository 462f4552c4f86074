"""Flags, settings files and the one line that ends a script."""

import argparse
import dataclasses
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import load_script

from minivit import ViTConfig
from minivit.base.errors import InputError
from minivit.base.files import read_toml
from minivit.base.settings import field_names
from minivit.commands import NAMES, cli
from minivit.commands.cli import Parser, add_settings, given
from minivit.commands.training import recipe_of_flags
from minivit.data.source import DATA_KEYS
from minivit.training.config import TrainConfig
from minivit.training.recipes import CONFIGS, read_recipe
from minivit.weights.start import StartConfig

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
FIELDS = [(cls, f) for cls in (ViTConfig, TrainConfig) for f in dataclasses.fields(cls)]
SECTION = {ViTConfig: "model", TrainConfig: "train", StartConfig: "start"}
STARTS = {
    "--pos-resize": "bicubic",
    "--patch-resize": "bilinear",
    "--keep-head": True,
    "--from": "a.npz",
    "--pixels": "clip",
    "--heads": 3,
}


def another(field):
    """A value of the field's type that is not its default."""
    default = field.default
    return (not default) if type(default) is bool else default + "x" if type(default) is str else default * 2 + 3


def parsed(*arguments):
    return load_script("train").parse([str(a) for a in arguments])


def settings(*arguments, data="digits"):
    return recipe_of_flags(parsed(*arguments), data)


# ---- every setting is reachable --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "field"), FIELDS, ids=[f"{c.__name__}.{f.name}" for c, f in FIELDS])
def test_every_field_is_a_flag_and_a_key(tmp_path, cls, field):
    value, flag = another(field), "--" + field.name.replace("_", "-")
    if type(value) is bool:
        assert given(parsed(flag if value else "--no" + flag[1:]), cls) == {field.name: value}
        assert given(parsed("--no" + flag[1:]), cls) == {field.name: False}
    else:
        assert given(parsed(flag, value), cls) == {field.name: value}
    written = str(value).lower() if type(value) is bool else repr(value).replace("'", '"')
    (tmp_path / "x.toml").write_text(f"[{SECTION[cls]}]\n{field.name} = {written}\n")
    _, model, train, _ = settings("--config", tmp_path / "x.toml")
    found = {ViTConfig: model, TrainConfig: train}[cls]
    assert found == {field.name: value} and type(found[field.name]) is type(value)


@pytest.mark.parametrize("flag", STARTS)
def test_every_setting_of_a_start_is_a_flag_and_a_key(tmp_path, flag):
    value, key = STARTS[flag], {"--from": "checkpoint"}.get(flag, flag[2:].replace("-", "_"))
    assert given(parsed(flag) if value is True else parsed(flag, value), StartConfig) == {key: value}
    assert {f.name for f in dataclasses.fields(StartConfig)} >= {key} and len(STARTS) == 6
    (tmp_path / "x.toml").write_text(f"[start]\n{key} = {'true' if value is True else repr(value)}\n")
    assert settings("--config", tmp_path / "x.toml").start == {key: value}


def test_no_name_is_shared_by_two_settings():
    names = [f.name for _, f in FIELDS] + field_names(StartConfig)
    assert len(names) == len(set(names))


def test_every_field_has_a_help_text_that_reaches_the_help(capsys):
    with pytest.raises(SystemExit) as end:
        parsed("--help")
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for _, field in FIELDS:
        assert "--" + field.name.replace("_", "-") in shown
        assert field.metadata["help"] in shown and f"[{field.default}]" in shown


def test_flags_that_are_not_given_leave_no_trace():
    parser = Parser()
    add_settings(parser, ViTConfig, skip=("depth",))
    assert vars(parser.parse_args([])) == {}
    assert vars(parser.parse_args(["--width", "5"])) == {"width": 5}
    with pytest.raises(SystemExit):
        parser.parse_args(["--depth", "5"])


# ---- precedence ------------------------------------------------------------------------------------------------------


def test_defaults_then_file_then_preset_then_flags(tmp_path):
    file = tmp_path / "x.toml"
    file.write_text('[model]\npreset = "Nano/4"\nwidth = 96\n[train]\nlr = 0.5\nepochs = 7\n')
    _, model, train, _ = settings("--config", file, "--epochs", 9, "--depth", 2)
    assert model == {"patch_size": 4, "width": 96, "depth": 2, "num_heads": 4, "mlp_dim": 128}  # depth: a flag
    assert train == {"lr": 0.5, "epochs": 9}
    assert TrainConfig(**train).batch_size == TrainConfig.batch_size  # a default
    _, model, *_ = settings("--config", file, "--preset", "Micro/8", "--depth", 3)
    assert model == {"patch_size": 8, "width": 128, "depth": 3, "num_heads": 4, "mlp_dim": 256}  # what is typed wins
    _, model, *_ = settings("--preset", "Nano/8")  # over the data set's own file, too
    assert {key: model[key] for key in ("patch_size", "width", "depth")} == {"patch_size": 8, "width": 64, "depth": 4}


def test_the_data_sets_own_file_is_read():
    data, model, train, _ = settings()
    file = read_recipe(CONFIGS / "digits.toml")
    assert (data["data"], model, train) == ("digits", file.model, file.train) and len(train) > 5
    data, _, train, _ = settings("--data", "cifar10", data="cifar10")
    assert data["data"] == "cifar10" and train["flip"] is True
    data, model, train, _ = settings("--data", "folder", "--data-dir", "there", data="folder")
    file = read_recipe(CONFIGS / "folder.toml")
    assert (data, model, train) == (DATA_KEYS | {"data": "folder", "data_dir": "there"}, file.model, file.train)


def test_data_settings_come_from_flag_over_file(tmp_path):
    (tmp_path / "x.toml").write_text('[data]\ndata = "folder"\ndata_dir = "here"\nimage_size = 48\n')
    data, *_ = settings("--config", tmp_path / "x.toml")
    assert data == DATA_KEYS | {"data": "folder", "data_dir": "here", "image_size": 48}
    data, *_ = settings("--config", tmp_path / "x.toml", "--data-dir", "there")
    assert data["data_dir"] == "there"


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    (tmp_path / "x.toml").write_bytes(b"\xef\xbb\xbf[train]\nepochs = 3\n")
    assert read_toml(tmp_path / "x.toml", {"train": ["epochs"]}) == {"train": {"epochs": 3}}


# ---- mistakes --------------------------------------------------------------------------------------------------------

FILES = {
    "unknown key": ("[train]\nlearning_rate = 1\nepoch = 3\n", "unknown setting 'learning_rate' in"),
    "near key": ("[train]\nepoch = 3\n", "did you mean 'epochs'"),
    "near key of the model": ("[model]\nwidht = 3\n", "did you mean 'width'"),
    "near table": ("[trian]\nepochs = 3\n", "did you mean 'train'"),
    "key outside": ("epochs = 3\n", "unknown setting 'epochs'"),
    "no table": ("train = 3\n", r"train must be a table, written \[train\]"),
    "no TOML": ("epochs: 3\n", "is not a TOML file"),
    "twice": ("[train]\nlr = 1\nlr = 2\n", "is not a TOML file"),
    "deep": ("[train]\nlr = " + "[" * 5000, "is not a TOML file"),
    "binary": (b"\xff\xfe\x00[train]", "is not a TOML file"),
}


@pytest.mark.parametrize(("text", "said"), FILES.values(), ids=FILES.keys())
def test_a_settings_file_with_a_mistake(tmp_path, text, said):
    path = tmp_path / "x.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=said) as raised:
        settings("--config", path)
    assert str(path) in str(raised.value)


def test_a_settings_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="there is no settings file"):
        settings("--config", tmp_path / "x.toml")
    with pytest.raises(InputError, match="is a folder"):
        settings("--config", tmp_path)


def test_flags_are_not_abbreviated(capsys):
    with pytest.raises(SystemExit) as end:
        parsed("--epoch", 3)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: unrecognized arguments: --epoch 3") and error.count("\n") == 1


# ---- the end of a script ---------------------------------------------------------------------------------------------


def raising(error):
    def main():
        raise error

    return main


ENDS = {
    "input": (InputError("bad\nthing"), 2, "error: bad thing\n"),
    "memory": (
        MemoryError(),
        2,
        "error: not enough memory; use a smaller --batch-size, --micro-batch (on a GPU: --gpu-micro-batch)",
    ),
    "library": (ImportError('needs SciPy: pip install "x"'), 2, 'error: needs SciPy: pip install "x"\n'),
    "full": (OSError(errno.ENOSPC, "No space left on device", "a/b"), 2, "error: a/b: No space left on device; free"),
    "read-only": (OSError(errno.EROFS, "Read-only file system", "a/b"), 2, "error: a/b: Read-only file system; choose"),
    "denied": (PermissionError(errno.EACCES, "Permission denied", "a"), 2, "error: a: Permission denied; check"),
    "there": (FileExistsError(errno.EEXIST, "File exists", "a"), 2, "error: a: File exists; choose another place\n"),
    "not there": (FileNotFoundError(errno.ENOENT, "No such file", "a"), 2, "error: a: No such file; check the name\n"),
    "nameless": (OSError("it broke"), 2, "error: it broke\n"),
    "ctrl-c": (KeyboardInterrupt(), 130, "interrupted\n"),
}


@pytest.mark.parametrize(("error", "status", "said"), ENDS.values(), ids=ENDS.keys())
def test_what_the_user_can_mend_is_one_line(capsys, error, status, said):
    with pytest.raises(SystemExit) as end:
        cli.run(raising(error))
    captured = capsys.readouterr()
    assert end.value.code == status and captured.out == ""
    assert captured.err.startswith(said) and captured.err.count("\n") == 1


def test_a_defect_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        cli.run(raising(ZeroDivisionError()))


@pytest.mark.parametrize("status", [0, 1, 130])
def test_the_status_is_passed_on(status):
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: status)
    assert end.value.code == status


def test_subcommands_complain_in_the_same_way(capsys):
    parser = Parser(prog="x")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("go").add_argument("--n", type=int)
    assert isinstance(parser, argparse.ArgumentParser)
    for arguments in ([], ["come"], ["go", "--n", "x"], ["go", "--m"]):
        with pytest.raises(SystemExit) as end:
            parser.parse_args(arguments)
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1


def subprocess_of(script, *arguments, **keywords):
    return subprocess.run(
        [sys.executable, "-W", "error", script, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | keywords, capture_output=True, timeout=600, check=False,
    )  # fmt: skip


def test_a_reader_that_leaves_is_no_error():
    code = "from minivit.commands import cli\ncli.run(lambda: [print(i, flush=True) for i in range(10**6)] and 0)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(600) == 1
    process.stderr.close()


def test_names_in_any_script_can_be_printed():
    code = "from minivit.commands import cli\ncli.run(lambda: print('\\u732b \\udcff') or 0)"
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
        capture_output=True, check=False,
    )  # fmt: skip
    assert (result.returncode, result.stdout, result.stderr) == (0, b"\\u732b \\udcff\n", b"")


def help_of(name, capsys):
    with pytest.raises(SystemExit) as end:
        load_script(name).main(["--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("program", ["minivit", "script"])
def test_help_is_written_as_the_command_was_started(capsys, monkeypatch, name, program):
    """The example lines too, which are written for ``minivit NAME``."""
    started, usage, line, other = {
        "minivit": ("/usr/bin/minivit", f"usage: minivit {name}", f"  minivit {name}", "python scripts/"),
        "script": (f"scripts/{name}.py", f"usage: {name}.py", f"  python scripts/{name}.py", "  minivit "),
    }[program]
    monkeypatch.setattr(sys, "argv", [started, "--help"])
    shown = help_of(name, capsys)
    assert shown.startswith(usage) and "--help" in shown
    assert f"\n{line}" in shown.partition("examples:\n")[2] and other not in shown


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "tools").glob("*.py")))
def test_help_of_a_tool(capsys, name):
    shown = help_of(name, capsys)
    assert shown.startswith(f"usage: {name}.py") and "--help" in shown
    if name != "make_reference":  # has no options but for tests of itself
        assert f"python tools/{name}.py" in shown and "examples:" in shown


def test_a_script_for_every_command():
    assert [script.stem for script in SCRIPTS] == sorted(NAMES)


@pytest.mark.parametrize("script", SCRIPTS, ids=[s.stem for s in SCRIPTS])
def test_a_script_is_three_lines_over_its_command(script):
    name, text = script.stem, script.read_text(encoding="utf-8")
    assert text == f"from minivit.commands import {name}\nfrom minivit.commands.cli import run\n\nrun({name}.main)\n"


def test_help_of_a_script_as_a_process():
    result = subprocess_of(ROOT / "scripts" / "train.py", "--help")
    assert result.returncode == 0 and b"python scripts/train.py --resume" in result.stdout and result.stderr == b""


def test_the_fields_are_where_the_tests_look():
    assert {"width", "depth"} <= set(field_names(ViTConfig)) and {"lr", "seed"} <= set(field_names(TrainConfig))


def test_a_bad_choice_of_kernels_is_refused_before_any_work():
    result = subprocess.run(
        [sys.executable, "-c", "from minivit.commands import cli\ncli.run(lambda: print('began') or 0)"], cwd=ROOT,
        env={**os.environ, "MINIVIT_KERNELS": "fast"}, capture_output=True, text=True,
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: MINIVIT_KERNELS must be auto or plain, got 'fast'\n"
