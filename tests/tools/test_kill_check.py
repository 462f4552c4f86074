"""tools/kill_check.py: few kills end as no kill does, and what differs is told."""

import random
import shutil

import numpy as np
import pytest
from conftest import load_script

from minivit.training.folder import LAST, METRICS
from minivit.weights import checkpoint

TOOL = load_script("kill_check")


@pytest.mark.slow
@pytest.mark.parametrize("kind", TOOL.SETTINGS)
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_runs_end_as_others(tmp_path, kind, workers):
    TOOL.write_cifar(tmp_path)
    row = TOOL.check(kind, tmp_path, workers, 3, random.Random(0))
    print(TOOL.table([row]))
    assert row.same


def test_what_differs_is_told(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "a")
    shutil.copytree(trained, tmp_path / "b")
    assert TOOL.same_end(tmp_path / "a", tmp_path / "b")
    arrays, meta = checkpoint.load(tmp_path / "b" / LAST)
    arrays["params/head.bias"] = np.nextafter(arrays["params/head.bias"], np.float32(1))  # a bit of each
    checkpoint.save(tmp_path / "b" / LAST, arrays, meta)
    lines = (tmp_path / "b" / METRICS).read_text().splitlines()
    (tmp_path / "b" / METRICS).write_text("\n".join(lines[:-1]) + "\n")
    assert not TOOL.same_end(tmp_path / "a", tmp_path / "b")
    assert capsys.readouterr().out == "DIFFER: last.npz params/head.bias, metrics.jsonl\n"
    row = TOOL.Row("digits", 1, 100, 5, 1, 7, 3.4, False)
    assert TOOL.table([row]).splitlines()[-1] == "| digits | 1 | 100 | 5 | 1 | 7 | 3 | DIFFERS |"


def test_the_random_images_are_read(tmp_path):
    from minivit.data import load

    TOOL.write_cifar(tmp_path)
    data = load("cifar10", tmp_path)
    assert len(data.train_labels) == 5 * TOOL.RECORDS and len(data.test_labels) == TOOL.RECORDS


def test_bad_input(call):
    ended = call("kill_check", "--kills", "0")
    assert ended.status == 2 and ended.err == "error: --kills must be at least 1\n"
