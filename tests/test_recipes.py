"""Recipes: whatever trains takes the same flags and files, and gets the same from them."""

import pytest

from minivit import recipes
from minivit.cli import Parser
from minivit.errors import InputError
from minivit.model import ViTConfig
from minivit.recipes import DATA_KEYS, Recipe, add_recipe, find_config, prepare, read_recipe, recipe_of_flags


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
    assert recipe_of_flags(asked()) == (DATA_KEYS, {}, {}, {})  # the digits', which are not there
    assert recipe_of_flags(asked(), "cifar10").train == {"lr": 7}
    assert recipe_of_flags(asked("--config", tmp_path / "cifar10.toml", "--lr", 3)).train == {"lr": 3.0}
    assert recipe_of_flags(asked("--config", "cifar10")).train == {"lr": 7}


def test_the_model_is_fitted_to_the_data():
    recipe = Recipe(DATA_KEYS, {"patch_size": 2, "width": 16, "num_heads": 2}, {"lr": 0.5})
    dataset, model, config, begins = prepare(recipe)
    assert model == ViTConfig(image_size=8, channels=1, num_classes=10, patch_size=2, width=16, num_heads=2)
    assert config.lr == 0.5
    assert dataset.name == "digits" and begins == {"describe": DATA_KEYS, "start": None}
    some = DATA_KEYS | {"image_size": 6, "classes": "1,7"}
    dataset, model, _, begins = prepare(recipe._replace(data=some))
    assert dataset.train_images.shape[1:] == (6, 6, 1) and dataset.class_names == ("1", "7")
    assert model.image_size == 6 and model.num_classes == 2 and begins["describe"] == some
    # what the model is asked for counts more: it is the flag
    _, model, _, begins = prepare(recipe._replace(data=some, model=recipe.model | {"image_size": 10}))
    assert model.image_size == 10 and begins["describe"] == some | {"image_size": 10}
    with pytest.raises(InputError, match="image_size 9 is not a multiple of patch_size 2"):
        prepare(recipe._replace(data=DATA_KEYS | {"image_size": 9}))


def test_epochs_that_are_asked_for_win_over_the_steps_of_a_file(tmp_path):
    file = tmp_path / "x.toml"
    file.write_text("[train]\nsteps = 500\nlr = 1.0\n")
    assert read_recipe(file).train == {"steps": 500, "lr": 1.0}
    assert read_recipe(file, train={"epochs": 3}).train == {"epochs": 3, "lr": 1.0}
    assert read_recipe(file, train={"epochs": 3, "steps": 7}).train == {"epochs": 3, "steps": 7, "lr": 1.0}


def test_settings_files_are_known_by_name(tmp_path):
    assert find_config("digits").name == "digits.toml"
    assert find_config(tmp_path / "x.toml") == tmp_path / "x.toml"
    with pytest.raises(InputError, match="there is no settings file cifar; .* cifar10, .*digits"):
        find_config("cifar")
    assert read_recipe(None).train == {} and read_recipe(None, train={"lr": 1.0}).train == {"lr": 1.0}


def test_the_recipes_that_come_with_minivit_are_possible():
    """Every settings file makes a model and a training."""
    for path in recipes.CONFIGS.glob("*.toml"):
        recipe = read_recipe(path)
        assert path.stem.startswith(recipe.data["data"])
        recipes.TrainConfig(**recipe.train)
        ViTConfig(**{"image_size": 8 if recipe.data["data"] == "digits" else 32} | recipe.model)
