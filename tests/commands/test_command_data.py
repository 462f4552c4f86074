"""The command line ``minivit data``: what it prints, writes and refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minivit.data import load

ROOT = Path(__file__).resolve().parent.parent.parent


def run(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, "-W", "error", ROOT / "scripts" / "data.py", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def assert_fails(result, *parts):
    assert result.returncode == 2
    lines = result.stderr.splitlines()
    assert "error: " in lines[-1]
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in lines[-1]
    return lines


def test_info_of_the_digits(tmp_path):
    file = tmp_path / "facts.json"
    result = run("info", "digits", "--json", file, cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == ""
    facts = json.loads(file.read_text())
    dataset = load("digits")
    assert (facts["name"], facts["train"], facts["test"]) == ("digits", 1437, 360)
    assert facts["image_shape"] == [8, 8, 1] and facts["source"] == dataset.source
    scaled = dataset.train_images / 255
    np.testing.assert_allclose(facts["channel_mean"], [scaled.mean()], rtol=1e-10)
    np.testing.assert_allclose(facts["channel_std"], [scaled.std()], rtol=1e-10)
    assert [each["name"] for each in facts["classes"]] == list("0123456789")
    assert sum(each["train"] for each in facts["classes"]) == 1437
    assert facts["classes"][8] == {"name": "8", "train": 139, "test": 35}
    for shown in ("1,437 training and 360 test", "8 x 8 x 1", "0.3056", "10.24432/C50P49"):
        assert shown in result.stdout


def test_info_of_cifar_counts_each_channel(tmp_path):
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, n in (("train", 1003), ("test", 2)):
        records = rng.integers(0, 100, (n, 3074), dtype=np.uint8)
        records[:, 2 : 2 + 1024] //= 2
        records.tofile(folder / f"{name}.bin")
    result = run("info", "cifar100", "--data-dir", tmp_path, "--json", tmp_path / "facts.json")
    assert result.returncode == 0 and result.stderr == ""
    facts = json.loads((tmp_path / "facts.json").read_text())
    scaled = load("cifar100", tmp_path).train_images / 255
    np.testing.assert_allclose(facts["channel_mean"], scaled.mean(axis=(0, 1, 2)), rtol=1e-10)
    np.testing.assert_allclose(facts["channel_std"], scaled.std(axis=(0, 1, 2)), rtol=1e-10)
    assert facts["channel_mean"][0] < 0.6 * facts["channel_mean"][2]


def test_fetch_finds_what_is_there(tmp_path):
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    for name in ("train", "test"):
        (folder / f"{name}.bin").write_bytes(bytes(3074))
    result = run("fetch", "cifar100", "--data-dir", tmp_path)
    assert result.returncode == 0
    assert result.stdout == f"cifar100 is in {folder}\n"


@pytest.mark.parametrize("command", [[], ["fetch"], ["info"]])
def test_help(command):
    result = run(*command, "--help")
    assert result.returncode == 0 and "usage:" in result.stdout
    if not command:
        assert "python scripts/data.py fetch cifar10" in result.stdout


def test_missing_data(tmp_path):
    lines = assert_fails(run("info", "cifar10", "--data-dir", tmp_path), "minivit data fetch cifar10")
    assert len(lines) == 1


def test_a_size_that_does_not_fit():
    lines = assert_fails(run("info", "digits", "--image-size", "5000"), "image size 5000 is out of range")
    assert len(lines) == 1


def test_an_unknown_name():
    assert_fails(run("info", "mnist"), "mnist")
    assert_fails(run("fetch", "digits"), "digits")


def test_a_file_that_cannot_be_written(tmp_path):
    assert_fails(run("info", "digits", "--json", tmp_path / "no" / "facts.json"), "facts.json")


def test_a_data_dir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    assert_fails(run("fetch", "cifar10", "--data-dir", tmp_path / "file"), "file")
