"""Files: written so that no crash costs what they held, JSON and TOML."""

import json
import os

import pytest

from minivit.base.errors import InputError
from minivit.base.files import check_tables, read_toml, write_atomically, write_json


def test_the_content_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    order = []
    real_fsync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (order.append("fsync"), real_fsync(number)))
    monkeypatch.setattr(os, "replace", lambda *names: (order.append("replace"), real_replace(*names)))
    write_atomically(tmp_path / "x", lambda file: file.write(b"x"))
    assert order == ["fsync", "replace", "fsync"]


def test_an_error_names_the_file_that_was_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        write_atomically(tmp_path / "no" / "x.npz", lambda file: None)
    assert raised.value.filename == str(tmp_path / "no" / "x.npz")


def test_an_interrupted_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})

    def write(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, write)
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_tables_of_a_settings_file(tmp_path):
    path, tables = tmp_path / "x.toml", {"one": ("a", "b"), "two": ("c",)}
    path.write_text("[one]\na = 3\n")
    assert read_toml(path, tables) == {"one": {"a": 3}, "two": {}}
    for content, message in (
        ({"three": {}}, "unknown setting 'three' in x"),
        ({"one": {"d": 1}}, r"unknown setting 'd' in x \[one\]"),
        ({"two": 5}, r"x: two must be a table, written \[two\]"),
    ):
        with pytest.raises(InputError, match=message):
            check_tables(content, tables, "x")
