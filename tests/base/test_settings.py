"""Settings: types are checked, names are known, and the package says one version."""

import configparser
from dataclasses import dataclass
from pathlib import Path

import pytest

import minivit
from minivit import InputError
from minivit.base.settings import (
    check_choice,
    check_range,
    check_types,
    defaults_of,
    field_names,
    refuse_unknown,
    setting,
    settings_of,
)


@dataclass(frozen=True)
class Example:
    count: int = setting(1, "how many")
    rate: float = setting(0.5, "how quickly")
    name: str = setting("a", "which")
    on: bool = setting(False, "whether")

    def __post_init__(self):
        check_types(self)
        check_range(self, 0, 3, "count")
        check_range(self, 0.0, 1.0, "rate", open_high=True)
        check_choice(self, "name", ("a", "b"))


def test_good_values_pass_and_whole_numbers_become_floats():
    example = Example(count=3, rate=0, name="b", on=True)
    assert isinstance(example.rate, float) and example.rate == 0.0
    assert field_names(Example) == ["count", "rate", "name", "on"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 1.0}, "count must be a whole number, got 1.0"),
        ({"count": True}, "count must be a whole number, got True"),
        ({"count": "1"}, "count must be a whole number, got '1'"),
        ({"count": -1}, "count must be at least 0 and at most 3, got -1"),
        ({"count": 4}, "count must be at least 0 and at most 3, got 4"),
        ({"rate": 1.0}, "rate must be at least 0.0 and below 1.0, got 1.0"),
        ({"rate": float("inf")}, "rate must be a finite number, got inf"),
        ({"rate": float("nan")}, "rate must be a finite number, got nan"),
        ({"name": "c"}, "name must be one of a, b; got 'c'"),
        ({"name": 3}, "name must be a text, got 3"),
        ({"on": 1}, "on must be true or false, got 1"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(InputError) as caught:
        Example(**values)
    assert str(caught.value) == message


def test_unknown_names_get_a_suggestion():
    with pytest.raises(InputError, match="unknown setting 'cuont' in file.toml; did you mean 'count'"):
        refuse_unknown(["name", "cuont"], ["count", "name"], "file.toml")
    with pytest.raises(InputError, match="known: count, name"):
        refuse_unknown(["zzz"], ["count", "name"], "file.toml")
    refuse_unknown(["count"], ["count", "name"], "file.toml")


def test_one_version():
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parent.parent.parent / "setup.cfg")
    assert setup["metadata"]["version"] == minivit.__version__


def test_settings_from_a_file_name_it_in_their_errors():
    assert settings_of(Example, {"count": 2}, "file.json") == Example(count=2)
    with pytest.raises(InputError) as error:
        settings_of(Example, {"count": 4}, "file.json")
    assert str(error.value) == "file.json: count must be at least 0 and at most 3, got 4"
    with pytest.raises(InputError, match="unknown setting 'cuont' in file.json; did you mean 'count'"):
        settings_of(Example, {"cuont": 2}, "file.json")


def test_defaults_are_those_of_the_fields():
    assert defaults_of(Example) == {"count": 1, "rate": 0.5, "name": "a", "on": False}


def test_an_error_is_one_line_whatever_it_quotes():
    assert str(InputError("a\nb\r\nc")) == "a b c"
