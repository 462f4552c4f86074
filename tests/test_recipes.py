"""Recipes: whatever trains takes the same flags and files, and gets the same from them."""

import pytest

from minivit import recipes
from minivit.cli import Parser
from minivit.errors import InputError
from minivit.masked import MaskedConfig
from minivit.model import ViTConfig
from minivit.recipes import DATA_KEYS, Recipe, add_recipe, find_config, prepare, read_recipe, recipe_of_flags
from minivit.settings import field_names


def asked(*arguments):
    parser = Parser()
    where = add_recipe(parser)
    where.add_argument("--more", type=int)
    return parser.parse_args([str(a) for a in arguments])


def test_the_scripts_own_flags_stand_beside_them():
    namespace = asked("--more", 3, "--lr", 0.5)
    assert namespace.more == 3 and namespace.lr == 0.5 and not hasattr(namespace, "epochs")


def test_the_settings_file_is_that_of_the_data_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "CONFIGS", tmp_path)
    (tmp_path / "cifar10.toml").write_text("[train]\nlr = 7\n")
    assert recipe_of_flags(asked("--data", "cifar10")).train == {"lr": 7}
    assert recipe_of_flags(asked()) == (DATA_KEYS, {}, {})  # the digits', which are not there
    assert recipe_of_flags(asked(), "cifar10").train == {"lr": 7}
    assert recipe_of_flags(asked("--config", tmp_path / "cifar10.toml", "--lr", 3)).train == {"lr": 3.0}
    assert recipe_of_flags(asked("--config", "cifar10")).train == {"lr": 7}


def test_the_model_is_fitted_to_the_data():
    recipe = Recipe(DATA_KEYS, {"patch_size": 2, "width": 16, "num_heads": 2}, {"lr": 0.5})
    dataset, model, config, describe = prepare(recipe)
    assert model == ViTConfig(image_size=8, channels=1, num_classes=10, patch_size=2, width=16, num_heads=2)
    assert config.lr == 0.5
    assert dataset.name == "digits" and describe == {"data": "digits", "data_dir": "data", "image_size": None}
    with pytest.raises(InputError, match="digits pictures are 8x8, not 9x9"):
        prepare(recipe._replace(data=DATA_KEYS | {"image_size": 9}))


def test_settings_files_are_known_by_name(tmp_path):
    assert find_config("digits").name == "digits.toml"
    assert find_config(tmp_path / "x.toml") == tmp_path / "x.toml"
    with pytest.raises(InputError, match="there is no settings file cifar; .* cifar10, .*digits"):
        find_config("cifar")
    assert read_recipe(None).train == {} and read_recipe(None, train={"lr": 1.0}).train == {"lr": 1.0}


def test_the_recipes_that_come_with_minivit_are_possible():
    """Every settings file makes a model and a training."""
    for path in recipes.CONFIGS.glob("*.toml"):
        of_pretraining = path.stem.startswith("pretrain-")
        sections = recipes.SECTIONS | {"pretraining": field_names(MaskedConfig)} if of_pretraining else recipes.SECTIONS
        recipe = read_recipe(path, sections=sections)
        assert of_pretraining or path.stem.startswith(recipe.data["data"])
        recipes.TrainConfig(**recipe.train)
        ViTConfig(**{"image_size": 8 if recipe.data["data"] == "digits" else 32} | recipe.model)
