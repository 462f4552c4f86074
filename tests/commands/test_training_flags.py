"""The flags of what trains: they are the settings, and win over the settings file."""

from minivit.commands.cli import Parser
from minivit.commands.training import add_recipe, recipe_of_flags
from minivit.data.source import DATA_KEYS
from minivit.training import recipes


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


def test_runs_that_begin_with_a_model_read_the_file_for_fine_tuning(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "CONFIGS", tmp_path)
    (tmp_path / "cifar10.toml").write_text("[train]\nlr = 7\n")
    (tmp_path / "finetune.toml").write_text('[train]\nlr = 8\n[start]\npos_resize = "bicubic"\n')
    recipe = recipe_of_flags(asked("--data", "cifar10", "--classes", "0-4", "--from", "x.npz"))
    assert recipe.train == {"lr": 8} and recipe.start == {"checkpoint": "x.npz", "pos_resize": "bicubic"}
    assert recipe.data == DATA_KEYS | {"data": "cifar10", "classes": "0-4"}
    recipe = recipe_of_flags(asked("--from", "x.npz", "--config", "cifar10", "--pos-resize", "bilinear"))
    assert recipe.train == {"lr": 7} and recipe.start == {"checkpoint": "x.npz", "pos_resize": "bilinear"}


def test_a_share_of_the_training_images_is_a_flag():
    recipe = recipe_of_flags(asked("--train-share", "0.5", "--data", "cifar10"))
    assert recipe.data == DATA_KEYS | {"data": "cifar10", "train_share": 0.5}


def test_help_has_the_groups_of_settings_files():
    """Each setting stands once, under the table that it has in a file."""
    parser = Parser()
    add_recipe(parser)
    flags = {group.title: {a.dest for a in group._group_actions} for group in parser._action_groups}
    groups = recipes.OF_GROUPS | {"data and output": recipes.OF_GROUPS["data"]}
    for table, names in groups.items():
        assert table == "data" or set(names) <= flags[table], table
