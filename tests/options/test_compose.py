"""Options compose: what a pair does not say of itself, no kernel takes for granted."""

import numpy as np
import pytest

from minivit.base.backend import plain
from minivit.base.pairs import Pair, chain
from minivit.layers.attention import ATTENTION, attention_backward, attention_forward
from minivit.layers.gelu import GELU
from minivit.layers.mlp import mlp_forward
from minivit.layers.msa import msa_forward
from minivit.model import ViT, ViTConfig, compose, parameter_table
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


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"pooling": "mean"}, {"pooling": "seq", "pre_logits": 5}, {"qk_norm": True, "layer_scale": 0.1},
        {"pos_embed": "relative", "pos_at": "shared"}, {"pos_embed": "relative", "pos_at": "every"},
        {"pos_embed": "learned2d", "pos_at": "every", "registers": 2}, {"pos_at": "shared"}, {"mlp": "swiglu"},
        {"attention": "axial", "pooling": "avg"}, {"stem": "1", "stem_width": 4, "stem_groups": 2, "image_size": 8,
                                                   "patch_size": 1},
    ],
)  # fmt: skip
def test_the_table_and_the_steps_name_the_same_parameters(changes):
    config = ViTConfig(**SMALL | changes)
    steps = ViT(config).steps
    named = {*steps.embedding.names, *steps.head.names}
    named |= {compose.full_name(i, name) for i, block in enumerate(steps.blocks) for name in block.names}
    assert named - {*compose.constants(config)} == {row.name for row in parameter_table(config)}
