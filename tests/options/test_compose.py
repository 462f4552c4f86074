"""Options compose: what a pair does not say of itself, no kernel takes for granted."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from minivit.base.backend import plain
from minivit.base.pairs import Pair, chain
from minivit.laboratory.cases import MODELS
from minivit.layers.attention import ATTENTION, attention_backward, attention_forward
from minivit.layers.gelu import GELU
from minivit.layers.mlp import mlp_forward
from minivit.layers.msa import msa_forward
from minivit.model import POSITIONS, ViT, ViTConfig, compose, parameter_table
from minivit.options.option import Option

SMALL = {
    "image_size": 4, "patch_size": 2, "channels": 1, "width": 8, "depth": 2, "num_heads": 2, "mlp_dim": 6,
    "num_classes": 3,
}  # fmt: skip


def double_forward(x):
    return 2.0 * x, None


def double_backward(dy, cache):
    return 2.0 * dy


DOUBLE = Pair(double_forward, double_backward)


def test_a_pair_that_says_nothing_of_itself_is_not_taken_for_the_plain_one():
    """An attention of twice the values, and a branch that is doubled, with twins on and off."""
    rng = np.random.default_rng(0)
    x, *args = (rng.standard_normal(shape) for shape in ((2, 3, 8), (8, 24), (24,), (8, 8), (8,)))

    def twice(q, k, v):
        y, cache = attention_forward(q, k, 2.0 * v)
        return y, cache

    y, _ = msa_forward(x, *args, num_heads=2, attend=Pair(twice, attention_backward))
    with plain():
        expected, _ = msa_forward(x, *args, num_heads=2, attend=Pair(twice, attention_backward))
        other, _ = msa_forward(x, *args, num_heads=2)
    np.testing.assert_allclose(y, expected, rtol=1e-12)
    assert np.abs(y - other).max() > 0.1
    args = [rng.standard_normal(shape) for shape in ((8, 6), (6,), (6, 8), (8,))]
    doubled = chain(GELU, DOUBLE, "double")
    assert doubled.about != GELU.about and chain(ATTENTION, DOUBLE, "double").about != ATTENTION.about
    y, _ = mlp_forward(x, *args, activation=doubled)
    with plain():
        np.testing.assert_allclose(y, mlp_forward(x, *args, activation=doubled)[0], rtol=1e-12)


def test_an_option_is_its_own_file_and_one_line_of_compose(monkeypatch):
    """A made-up option that doubles branches, listed and nothing else: the model has it, twins and all."""
    images = np.random.default_rng(1).integers(0, 256, (2, 4, 4, 1), dtype=np.uint8)
    config = ViTConfig(**SMALL)
    flat = 0.3 * np.random.default_rng(2).standard_normal(ViT(config).flat.size)
    before = ViT(config, flat=flat).predict(images)

    def branch(pair, config, place):
        return chain(pair, DOUBLE, "double")

    class Settings:
        pass

    monkeypatch.setattr(compose, "OPTIONS", (*compose.OPTIONS, Option(Settings, branch=branch)))
    model = ViT(config, flat=flat)
    after = model.predict(images)
    with plain():
        np.testing.assert_allclose(after, model.predict(images), rtol=1e-10)
    assert np.abs(after - before).max() > 0.01


EXPECTED = Path(__file__).parents[1] / "data" / "first_version" / "expected" / "models.json"
SWEEP = [case["config"] for case in json.loads(EXPECTED.read_text())]  # every pooling, position and attention
LATER = [{"mlp": "swiglu"}, {"mlp": "swiglu", "qk_norm": True, "layer_scale": 0.1, "registers": 2}]  # since then


@pytest.mark.parametrize("fields", [SMALL, *SWEEP, *(SMALL | changes for changes in LATER)])
def test_the_table_and_the_steps_name_the_same_parameters(fields):
    config = ViTConfig(**fields)
    steps = ViT(config).parts
    names = [*steps.embedding.names, *steps.head.names]
    names += [compose.full_name(i, name) for i, block in enumerate(steps.blocks) for name in block.names]
    assert {*names} - {*compose.constants(config)} == {row.name for row in parameter_table(config)}


def test_every_option_is_on_in_some_model_that_is_checked():
    """A new option needs a line in `minivit.laboratory.cases.MODELS`."""
    chosen = {field for fields in MODELS.values() for field, value in fields.items()}
    for option in compose.OPTIONS:
        fields = {field.name for field in dataclasses.fields(option.settings)}
        assert fields <= chosen or not fields, fields - chosen
    values = {fields.get("pos_embed") for fields in MODELS.values()} - {None} | {"learned"}
    assert values == set(POSITIONS)
