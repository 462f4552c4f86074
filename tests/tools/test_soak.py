"""tools/soak.py: what grows is seen, and what moves to and fro is not."""

import json

import pytest
from conftest import load_script

TOOL = load_script("soak")


def samples(**growth):
    """200 samples in which some figures grow by so much over the run, and all start high while buffers are made."""
    first = {"memory": 100.0, "files": 9, "threads": 4, "step": 10.0}
    made = []
    for i in range(200):
        warm = 2.0 if i < 15 else 1.0
        made.append({"at": 10 * (i + 1)} | {k: warm * v + growth.get(k, 0) * i / 199 for k, v in first.items()})
    return made


@pytest.mark.parametrize("name", TOOL.NAMES)
def test_what_grows_is_seen(name, tmp_path):
    found = TOOL.verdict(samples(**{name: 8.0}))
    assert [key for key, each in found.items() if not each["flat"]] == [name]
    TOOL.draw(tmp_path / "soak.png", samples(**{name: 8.0}), found, "a test")
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_flat_is_flat():
    assert all(each["flat"] for each in TOOL.verdict(samples(memory=1.0, step=0.5)).values())


def test_a_short_soak(call, tmp_path):
    ended = call("soak", "--steps", "100", "--out", tmp_path)
    assert ended.status in (0, 1) and "soak.png" in ended.out and "resident memory" in ended.out, ended.err
    content = json.loads((tmp_path / "soak.json").read_text())
    assert len(content["samples"]) >= 99 and {"memory", "files", "threads", "step"} <= content["samples"][0].keys()
    assert content["verdict"]["files"]["flat"]
    assert call("soak", "--steps", "3").err == "error: --steps must be at least 100, for ten samples\n"
