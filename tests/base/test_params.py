"""Parameters: one buffer, named views, the official initialisers."""

import math

import numpy as np
import pytest

from minivit import ViTConfig
from minivit.base import params
from minivit.model import parameter_table

CONFIG = ViTConfig(image_size=32, patch_size=4, width=96, depth=2, num_heads=3, pre_logits=80)
TABLE = parameter_table(CONFIG)


@pytest.fixture(scope="module")
def named():
    return params.views(params.initialise(TABLE, seed=3, dtype=np.float64), TABLE)


def test_views_share_the_buffer_in_the_order_of_the_table():
    flat = np.arange(params.count(TABLE), dtype=float)
    named = params.views(flat, TABLE)
    assert list(named) == [spec.name for spec in TABLE]
    np.testing.assert_array_equal(np.concatenate([v.ravel() for v in named.values()]), flat)
    named["head.bias"][...] = -1.0
    assert (flat[-10:] == -1.0).all()


def test_a_buffer_of_another_length_is_refused():
    with pytest.raises(ValueError, match="parameter table"):
        params.views(np.zeros(7), TABLE)


def test_names_are_timms():
    assert {spec.name for spec in parameter_table(ViTConfig(depth=1))} == {
        "cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias",
        "blocks.0.norm1.weight", "blocks.0.norm1.bias", "blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias",
        "blocks.0.attn.proj.weight", "blocks.0.attn.proj.bias", "blocks.0.norm2.weight", "blocks.0.norm2.bias",
        "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc1.bias", "blocks.0.mlp.fc2.weight", "blocks.0.mlp.fc2.bias",
        "norm.weight", "norm.bias", "head.weight", "head.bias",
    }  # fmt: skip


OPTIONS = {  # setting -> the parameters that it adds, with timm's names, and their shapes
    "layer_scale": (0.1, {"blocks.0.ls1.gamma": (48,), "blocks.0.ls2.gamma": (48,)}),
    "registers": (2, {"reg_token": (1, 2, 48)}),
    "pooling": ("seq", {"attention_pool.weight": (48, 1), "attention_pool.bias": (1,)}),
    "qk_norm": (True, {f"blocks.0.attn.{x}_norm.{kind}": (16,) for x in "qk" for kind in ("weight", "bias")}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_adds_its_parameters_and_changes_no_other(name):
    value, added = OPTIONS[name]
    plain = parameter_table(ViTConfig(width=48, depth=1, pooling="mean"))
    table = parameter_table(ViTConfig(**{"width": 48, "depth": 1, "pooling": "mean", name: value}))
    assert {spec.name: spec.shape for spec in table if spec.name in added} == added
    without = [spec for spec in table if spec.name not in added]
    assert [spec[:2] for spec in without] == [spec[:2] for spec in plain]
    named = params.views(params.initialise(table, seed=3), table)
    flat = np.concatenate([named[spec.name].ravel() for spec in without])
    assert np.array_equal(flat, params.initialise(plain, seed=3))


def test_the_stem_has_timms_names_decays_its_kernels_and_comes_before_the_blocks():
    config = ViTConfig(depth=1, patch_size=1, stem="1", stem_width=8, stem_groups=4)
    table = [spec for spec in parameter_table(config) if spec.name.startswith("patch_embed.backbone.")]
    shapes = {spec.name.removeprefix("patch_embed.backbone."): spec.shape for spec in table}
    unit = "stages.0.blocks.0."
    assert shapes == {
        "stem.conv.weight": (7, 7, 3, 8), "stem.norm.weight": (8,), "stem.norm.bias": (8,),
        unit + "conv1.weight": (1, 1, 8, 8), unit + "norm1.weight": (8,), unit + "norm1.bias": (8,),
        unit + "conv2.weight": (3, 3, 8, 8), unit + "norm2.weight": (8,), unit + "norm2.bias": (8,),
        unit + "conv3.weight": (1, 1, 8, 32), unit + "norm3.weight": (32,), unit + "norm3.bias": (32,),
        unit + "downsample.conv.weight": (1, 1, 8, 32), unit + "downsample.norm.weight": (32,),
        unit + "downsample.norm.bias": (32,),
    }  # fmt: skip
    assert {spec.name for spec in table if spec.decay} == {s.name for s in table if "conv" in s.name}
    root = parameter_table(ViTConfig(depth=1, stem="root", patch_size=2))
    assert "patch_embed.backbone.conv.weight" in {spec.name for spec in root}  # alone, timm's root has no prefix
    scales = params.views(params.layer_scale(parameter_table(config), 0.5), parameter_table(config))
    assert all((scales[spec.name] == 0.25).all() for spec in table)


def test_initial_values_and_decay_of_the_options():
    table = parameter_table(ViTConfig(width=768, depth=1, layer_scale=0.25, qk_norm=True, pooling="seq", registers=4))
    named, decay = params.views(params.initialise(table), table), {spec.name: spec.decay for spec in table}
    assert (named["blocks.0.ls1.gamma"] == 0.25).all() and (named["blocks.0.ls2.gamma"] == 0.25).all()
    for x in ("q", "k"):
        assert (named[f"blocks.0.attn.{x}_norm.weight"] == 1.0).all()
        assert not named[f"blocks.0.attn.{x}_norm.bias"].any()
    assert 0.018 < named["attention_pool.weight"].std() < 0.022 and decay["attention_pool.weight"]
    assert not named["attention_pool.bias"].any() and not decay["attention_pool.bias"]
    assert 0.9e-6 < named["reg_token"].std() < 1.1e-6 and not decay["reg_token"]
    assert not any(decay[name] for name in decay if ".ls" in name or "_norm" in name)


def uniform_limit(name):
    D, M = 96, 384
    fan = D + M if ".mlp." in name else 2 * D  # q, k and v count as three D x D matrices
    return math.sqrt(6 / fan)


def test_initial_values(named):
    for name, value in named.items():
        if name in ("cls_token", "head.weight") or (name.endswith("bias") and ".mlp." not in name):
            assert not value.any(), name
        elif "norm" in name:
            assert (value == 1.0).all(), name
        elif name.endswith("bias"):
            assert 0.8e-6 < value.std() < 1.2e-6, name
        elif name == "pos_embed":
            assert 0.0195 < value.std() < 0.0205 and np.abs(value).max() > 0.05  # not truncated
        elif name.startswith("blocks"):
            limit = uniform_limit(name)
            assert 0.99 * limit < np.abs(value).max() <= limit, name
            assert abs(value.std() - limit / math.sqrt(3)) < 0.02 * limit, name
        else:  # LeCun normal, cut at two standard deviations of the uncut normal
            std = math.sqrt(1 / value.shape[0])
            assert name in ("patch_embed.proj.weight", "pre_logits.weight")
            assert abs(value.std() - std) < 0.03 * std, name
            assert 2.1 * std < np.abs(value).max() <= 2.0 * std / 0.8796, name


def test_the_seed_decides_and_streams_are_apart(named):
    again = params.views(params.initialise(TABLE, seed=3, dtype=np.float64), TABLE)
    other = params.views(params.initialise(TABLE, seed=4, dtype=np.float64), TABLE)
    assert all(np.array_equal(named[name], again[name]) for name in named)
    random = [name for name in named if "weight" in name and named[name].std() > 0]
    assert len(random) == 10
    for name in random:
        assert not np.array_equal(named[name], other[name])
    block0, block1 = named["blocks.0.mlp.fc1.weight"], named["blocks.1.mlp.fc1.weight"]
    assert abs(np.corrcoef(block0.ravel(), block1.ravel())[0, 1]) < 0.02


def test_a_deeper_model_keeps_the_shared_parameters():
    deeper = parameter_table(ViTConfig(image_size=32, patch_size=4, width=96, depth=3, num_heads=3, pre_logits=80))
    named = params.views(params.initialise(deeper, seed=3), deeper)
    shallow = params.views(params.initialise(TABLE, seed=3), TABLE)
    assert all(np.array_equal(named[name], shallow[name]) for name in shallow)


def test_decay_falls_on_the_matrices_alone():
    mask = params.views(params.decay_mask(TABLE), TABLE)
    for name, value in mask.items():
        expected = name.endswith("weight") and "norm" not in name
        assert (value == expected).all(), name
