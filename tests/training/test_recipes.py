"""Recipes: whatever trains takes the same flags and files, and gets the same from them."""

import re
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from minivit.base import params as parameters
from minivit.base.errors import InputError
from minivit.base.settings import field_names
from minivit.data import load
from minivit.data.source import DATA_KEYS
from minivit.masked import MaskedConfig
from minivit.model import ViTConfig, parameter_table
from minivit.training import recipes, sweep
from minivit.training.config import TrainConfig
from minivit.training.recipes import CONFIGS, Recipe, find_config, prepare, read_recipe


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


def test_a_share_of_the_training_images(tmp_path):
    """The shares are nested and keep their labels; the test images stay; impossible ones are refused in a line."""
    whole = load("digits")
    known = {image.tobytes(): int(k) for image, k in zip(whole.train_images, whole.train_labels, strict=True)}
    kept = []
    for share, count in ((0.25, 359), (0.5, 718), (1.0, 1437)):
        dataset, *_, begins = prepare(read_recipe(None, data={"train_share": share}))
        assert len(dataset.train_images) == len(dataset.train_labels) == count
        assert begins["describe"]["train_share"] == share and f"{count:,} of 1,437 training" in dataset.source
        assert all(known[i.tobytes()] == k for i, k in zip(dataset.train_images, dataset.train_labels, strict=True))
        np.testing.assert_array_equal(dataset.test_images, whole.test_images)
        kept.append({image.tobytes() for image in dataset.train_images})
    assert kept[0] < kept[1] < kept[2] and len(set(dataset.train_labels.tolist())) == 10
    for bad in (0.0, -0.5, 1.5, "half", 1):
        with pytest.raises(InputError, match="train_share must be a number above 0 and at most 1, got"):
            read_recipe(None, data={"train_share": bad})
    with pytest.raises(InputError, match="keeps none"):
        load("digits", train_share=1e-5)


def test_classes_are_a_text(tmp_path):
    file = tmp_path / "x.toml"
    file.write_text("[data]\nclasses = [0, 1]\n")
    with pytest.raises(InputError, match=r"x.toml: classes must be a text, got \[0, 1\]"):
        read_recipe(file)
    file.write_text('[data]\nclasses = "0-4"\n[start]\nhead = true\n')
    with pytest.raises(InputError, match=r"unknown setting 'head' in .*x.toml \[start\]"):
        read_recipe(file)


def test_settings_files_are_known_by_name(tmp_path):
    assert find_config("digits").name == "digits.toml"
    assert find_config(tmp_path / "x.toml") == tmp_path / "x.toml"
    with pytest.raises(InputError, match="there is no settings file cifar; .* cifar10, .*digits"):
        find_config("cifar")
    assert find_config("digits", "sweeps") == CONFIGS / "sweeps" / "digits.toml"
    with pytest.raises(InputError, match="there is no sweep cifar10; .* cifar10-10min, .*digits"):
        find_config("cifar10", "sweeps", "sweep")


def test_a_folder_is_no_settings_file(tmp_path, monkeypatch):
    """In runs/, where the folders of runs have the names of their data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10").mkdir()
    assert find_config("cifar10") == CONFIGS / "cifar10.toml"
    (tmp_path / "digits").write_text("[data]")
    assert find_config("digits") == Path("digits")


def test_the_settings_files_that_commands_name_in_their_examples_are_there():
    named = re.findall(r'config = "([^"]+)"', sweep.__doc__)
    for path in (ROOT / "minivit" / "commands").glob("*.py"):
        named += re.findall(r"^ +minivit .* --config (\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(named) > 3
    for name in named:
        assert find_config(name).suffix == ".toml" and (name == "my.toml" or find_config(name).is_file()), name
    assert read_recipe(None).train == {} and read_recipe(None, train={"lr": 1.0}).train == {"lr": 1.0}


def test_the_recipes_that_come_with_minivit_are_possible():
    """Every settings file makes a model and a training."""
    for path in recipes.CONFIGS.glob("*.toml"):
        of_pretraining = path.stem.startswith("pretrain-")
        more = {"pretraining": field_names(MaskedConfig)} if of_pretraining else {}
        recipe = read_recipe(path, tables=recipes.TABLES | more)
        sizes = {"digits": 8, "folder": 224}
        others = ("paper", "pretrain-", recipes.FINETUNE)
        assert path.stem.startswith(recipe.data["data"]) or path.stem.startswith(others)
        recipes.TrainConfig(**recipe.train)
        ViTConfig(**{"image_size": recipe.data["image_size"] or sizes.get(recipe.data["data"], 32)} | recipe.model)


FINE_TUNING = {  # Table 4: steps, learning rates tried
    "cifar10": (10_000, (0.001, 0.003, 0.01, 0.03)), "cifar100": (10_000, (0.001, 0.003, 0.01, 0.03)),
    "pets": (500, (0.001, 0.003, 0.01, 0.03)), "flowers": (500, (0.001, 0.003, 0.01, 0.03)),
    "imagenet": (20_000, (0.003, 0.01, 0.03, 0.06)), "vtab": (2_500, (0.01,)),
}  # fmt: skip


@pytest.mark.parametrize("name", FINE_TUNING)
def test_fine_tuning_as_in_the_paper(name):
    data, _, train, _ = read_recipe(find_config(f"paper-finetune-{name}"))
    steps, rates = FINE_TUNING[name]
    assert data["image_size"] == 384 and data["data"] in (name, "folder", "imagefolder")
    assert train.get("crop_area", 0.0) == (0.05 if data["data"] == "imagefolder" else 0.0)  # else it is refused
    assert train["steps"] == steps and train["lr"] in rates
    expected = {"optimizer": "sgd", "momentum": 0.9, "schedule": "cosine", "batch_size": 512, "weight_decay": 0.0}
    assert expected | {"clip_norm": 1.0} == {key: train[key] for key in [*expected, "clip_norm"]}


PRE_TRAINING = {  # Table 3: epochs, base learning rate, its decay, weight decay, dropout; and parameters, without head
    "jft-b16": (7, 8e-4, "linear", 0.1, 0.0, 85_798_656), "jft-b32": (7, 8e-4, "linear", 0.1, 0.0, 87_455_232),
    "jft-l32": (7, 6e-4, "linear", 0.1, 0.0, 305_510_400), "jft-l16": (14, 4e-4, "linear", 0.1, 0.0, 303_301_632),
    "jft-h14": (14, 3e-4, "linear", 0.1, 0.0, 630_764_800),
    "jft-r50-b16": (7, 8e-4, "linear", 0.1, 0.0, 97_890_112), "jft-r50-b32": (7, 8e-4, "linear", 0.1, 0.0, 110_176_832),
    "jft-r50-l32": (7, 2e-4, "linear", 0.1, 0.0, 327_969_856),
    "jft-r50-l16": (14, 4e-4, "linear", 0.1, 0.0, 315_458_624),
    "imagenet21k-b16": (90, 1e-3, "linear", 0.03, 0.1, 85_798_656),
    "imagenet21k-b32": (90, 1e-3, "linear", 0.03, 0.1, 87_455_232),
    "imagenet21k-l16": (90, 1e-3, "linear", 0.03, 0.1, 303_301_632),
    "imagenet21k-l32": (90, 1e-3, "linear", 0.03, 0.1, 305_510_400),
    "imagenet-b16": (300, 3e-3, "cosine", 0.3, 0.1, 85_798_656),
    "imagenet-b32": (300, 3e-3, "cosine", 0.3, 0.1, 87_455_232),
    "imagenet-l16": (300, 3e-3, "cosine", 0.3, 0.1, 303_301_632),
    "imagenet-l32": (300, 3e-3, "cosine", 0.3, 0.1, 305_510_400),
}  # fmt: skip


def test_the_tables_of_the_paper_are_whole():
    """Every file is checked against its row, and every row has a file."""
    for kind, rows in (("finetune", FINE_TUNING), ("pretrain", PRE_TRAINING)):
        assert {path.stem for path in recipes.CONFIGS.glob(f"paper-{kind}-*")} == {f"paper-{kind}-{n}" for n in rows}


@pytest.mark.parametrize("name", PRE_TRAINING)
def test_pre_training_as_in_the_paper(name):
    data, model, train, _ = read_recipe(find_config(f"paper-pretrain-{name}"))
    config = TrainConfig(**train)
    assert data["data"] == "imagefolder" and config.crop_area == 0.05  # no memory holds so many images
    made = ViTConfig(**model, image_size=data["image_size"], num_classes=1000)
    found = (config.epochs, config.lr, config.schedule, config.weight_decay, made.dropout)
    *expected, count = PRE_TRAINING[name]
    assert found == tuple(expected) and made.pre_logits == made.width
    data_set, *hybrid, size = name.split("-")
    preset = f"{'R50+' * len(hybrid)}{size[0].upper()}/{size[1:]}"
    assert made == ViTConfig.preset(preset, pre_logits=made.width, dropout=made.dropout)
    assert data["data_dir"] == f"data/{data_set}" and data["image_size"] == 224
    own = [spec for spec in parameter_table(made) if not spec.name.startswith(("pre_logits", "head"))]
    assert parameters.count(own) == count
    assert (config.batch_size, config.beta1, config.beta2, config.warmup_steps) == (4096, 0.9, 0.999, 10_000)
    assert config.clip_norm == (1.0 if name.startswith("imagenet-") else 0.0)


GROUPED = """
[data]
data = "digits"
batch_size = 7
[model]
patch_size = 2
whiten = true
[augmentation]
flip = true
[optimizer]
optimizer = "sgd"
[schedule]
epochs = 3
[machine]
workers = 1
[log]
log_every = 2
[start]
pos_resize = "bilinear"
"""


def test_settings_in_the_tables_of_their_groups(tmp_path):
    """They mean what they meant in one table, as in files of earlier versions, and each has one table only."""
    (tmp_path / "new.toml").write_text(GROUPED)
    (tmp_path / "old.toml").write_text(
        '[data]\ndata = "digits"\n[model]\npatch_size = 2\n[train]\nbatch_size = 7\nwhiten = true\nflip = true\n'
        'optimizer = "sgd"\nepochs = 3\nworkers = 1\nlog_every = 2\nsam = 0\nrepeats = 1\ncutout = 0\n'
        '[start]\npos_resize = "bilinear"\n'
    )
    new, old = (read_recipe(tmp_path / name) for name in ("new.toml", "old.toml"))
    assert new == old and new.data == DATA_KEYS and new.model == {"patch_size": 2}
    assert set(new.train) == {"batch_size", "whiten", "flip", "optimizer", "epochs", "workers", "log_every"}
    assert sorted(name for names in recipes.OF_GROUPS.values() for name in names) == sorted(field_names(TrainConfig))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("[log]\nepochs = 3\n", r"epochs stands in \[log\], it belongs in \[schedule\]"),
        ("[optimizer]\nlr = 1.0\n[train]\nlr = 2.0\n", r"lr stands in \[train\] and in another table"),
        ("[optimizer]\nmomentun = 1.0\n", "did you mean 'momentum'"),
        ("[optimiser]\nlr = 1.0\n", "did you mean 'optimizer'"),
        ("[train]\nsam = 0.05\n", "sam 0.05 was a setting of an earlier version and is removed; leave it out, or at 0"),
        ("[train]\nrepeats = 2\n", "repeats 2 was a setting of an earlier version"),
        ("[train]\ncutout = true\n", "cutout True was a setting of an earlier version"),
        ("[augmentation]\ncutout = 0\n", "unknown setting 'cutout'"),
    ],
)
def test_tables_with_mistakes(tmp_path, change, said):
    (tmp_path / "x.toml").write_text(change)
    with pytest.raises(InputError, match=said) as caught:
        read_recipe(tmp_path / "x.toml")
    assert "x.toml" in str(caught.value)
