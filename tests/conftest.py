"""What several test files share: commands and tools called in this process, and one small run on the digits."""

import importlib
import os
import shutil
from pathlib import Path
from typing import NamedTuple

# Arrays of tests are small, and pytest -n has a worker for each core: more threads would wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pytest

from minivit import figures
from minivit.commands import NAMES, cli

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--config", str(ROOT / "tests" / "tiny.toml"), "--quiet"]  # flags of a training that takes a moment


class Ended(NamedTuple):
    """How a command ended, and what it printed."""

    status: int
    out: str
    err: str


def load_script(name):
    """The module of a command, or of one of tools/."""
    return importlib.import_module(f"minivit.commands.{name}" if name in NAMES else name)


def close_calls(logits, within=1e-4):
    """How many rows (the last axis) have a second largest logit that is no smaller than the largest but for ``within``.

    Sums of float32 come out differently on every processor, by some 1e-6 of the logits here: which of two such
    classes is the larger is for a rounding to decide. Counts of right guesses are compared where there are none.
    """
    largest = np.sort(logits, axis=-1)[..., -2:]
    return int((largest[..., 1] - largest[..., 0] <= within).sum())


def assert_same_guesses(found, expected, rtol=1e-5):
    """Two ``"top"`` of scripts/predict.py name the same classes with the same probabilities, but for rounding.

    An image's logits differ in their last bits where it stands in another row of a batch, or in another batch.
    Two classes that are as likely as each other may change places; one may be the last that is named, or the next.
    """
    found, expected = ({top["name"]: top["probability"] for top in each} for each in (found, expected))
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=rtol)
    assert len(found.keys() ^ expected.keys()) <= 2
    for name in found.keys() & expected.keys():
        assert found[name] == pytest.approx(expected[name], rel=rtol), name


@pytest.fixture
def call(capsys):
    """``call("train", "--epochs", 1, ...)`` runs a command's ``main`` as its script does: an `Ended`."""

    def run(name, *arguments):
        main = load_script(name).main
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.run(lambda: main([str(argument) for argument in arguments]))
        captured = capsys.readouterr()
        return Ended(end.value.code or 0, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a small finished run on the digits, with a moving average. Read it; `run_copy` is for writing."""
    out = tmp_path_factory.mktemp("trained") / "digits"
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: load_script("train").main([*TINY, "--epochs", "3", "--out", str(out)]))
    assert not end.value.code
    return out


@pytest.fixture
def no_figures(monkeypatch):
    """Training writes empty figures: drawing them takes most of a small run's time."""
    for name in ("save_curves", "save_predictions", "save_masked_curves", "save_contact_sheet"):
        monkeypatch.setattr(figures, name, lambda path, *arguments, **keywords: Path(path).write_bytes(b""))


@pytest.fixture
def run_copy(trained, tmp_path):
    """A copy of the small finished run, to be changed at will."""
    return Path(shutil.copytree(trained, tmp_path / "run"))
