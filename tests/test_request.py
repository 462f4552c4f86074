"""What a command line asks to be trained: whatever trains takes the same flags, and gets the same from them."""

from pathlib import Path

import pytest
from conftest import ROOT

from minivit.cli import Parser
from minivit.errors import InputError
from minivit.model import ViTConfig
from minivit.request import DATA_KEYS, add_request, load_requested, settings_of


def asked(*arguments, configs=ROOT / "configs"):
    parser = Parser()
    where = add_request(parser, configs)
    where.add_argument("--more", type=int)
    return parser.parse_args([str(a) for a in arguments])


def test_the_scripts_own_flags_stand_beside_them():
    namespace = asked("--more", 3, "--lr", 0.5)
    assert namespace.more == 3 and namespace.lr == 0.5 and not hasattr(namespace, "epochs")


def test_the_settings_file_is_that_of_the_data_asked_for(tmp_path):
    (tmp_path / "cifar10.toml").write_text("[train]\nlr = 7\n")
    assert settings_of(asked("--data", "cifar10", configs=tmp_path))[2] == {"lr": 7}
    assert settings_of(asked(configs=tmp_path)) == (DATA_KEYS, {}, {})  # the digits', which are not there
    assert settings_of(asked(configs=tmp_path), "cifar10")[2] == {"lr": 7}
    assert settings_of(asked("--config", tmp_path / "cifar10.toml", "--lr", 3, configs=Path("x")))[2] == {"lr": 3.0}


def test_the_model_is_fitted_to_the_data():
    dataset, model, describe = load_requested(DATA_KEYS, {"patch_size": 2, "width": 16, "num_heads": 2})
    assert model == ViTConfig(image_size=8, channels=1, num_classes=10, patch_size=2, width=16, num_heads=2)
    assert dataset.name == "digits" and describe == {"data": "digits", "data_dir": "data", "image_size": None}
    with pytest.raises(InputError, match="digits pictures are 8x8, not 9x9"):
        load_requested(DATA_KEYS | {"image_size": 9}, {})
