"""The model: parameter counts of the official models, validation, whole-model gradients, and the exact identities."""

import dataclasses
import math
from contextlib import nullcontext

import numpy as np
import pytest

from minivit import PRESETS, InputError, ViT, ViTConfig, softmax_cross_entropy_backward, softmax_cross_entropy_forward
from minivit.base import params
from minivit.base.backend import plain
from minivit.laboratory import gradcheck
from minivit.laboratory.cases import MODEL_BATCH, MODELS
from minivit.layers.head import HEAD_NAMES, head_forward
from minivit.layers.patch_embed import patchify, unpatchify
from minivit.model import ATTENTIONS, POSITIONS, STEM, intermediates, parameter_table, pixels
from minivit.options import flash_attention
from minivit.options.dropping import drop_path_rate
from minivit.options.pooling import POOLINGS

TINY = MODELS["vit"]


def random_model(seed=0, dtype=np.float64, **changes):
    config = ViTConfig(**{**TINY, **changes})
    model = ViT(config, dtype=dtype)
    model.flat += 0.3 * np.random.default_rng(seed).standard_normal(model.flat.shape)
    return model


def batch(model, count=MODEL_BATCH, seed=1):
    rng, c = np.random.default_rng(seed), model.config
    images = rng.standard_normal((count, c.image_size, c.image_size, c.channels))
    return images, rng.integers(0, c.num_classes, count)


def gradient(model, images, labels, **settings):
    logits, cache = model.forward(images)
    loss, loss_cache = softmax_cross_entropy_forward(logits, labels, **settings)
    flat, grads = model.gradient_buffer()
    model.backward(softmax_cross_entropy_backward(1.0, loss_cache), cache, grads)
    return loss, flat, grads


@pytest.mark.parametrize(
    ("name", "with_head", "without_head"),
    [
        ("Ti/16", 5_717_416, 5_524_416),
        ("S/16", 22_050_664, 21_665_664),
        ("B/16", 86_567_656, 85_798_656),
        ("B/32", 88_224_232, 87_455_232),
        ("L/16", 304_326_632, 303_301_632),
        ("L/32", 306_535_400, 305_510_400),
        ("H/14", 632_045_800, 630_764_800),
        ("R+Ti/16", 6_337_704, 6_144_704),
        ("R26+S/32", 36_431_912, 36_046_912),
        ("R50+B/16", 98_659_112, 97_890_112),
        ("R50+B/32", 110_945_832, 110_176_832),
        ("R50+L/16", 316_483_624, 315_458_624),
        ("R50+L/32", 328_994_856, 327_969_856),
    ],
)
def test_parameter_counts_of_the_official_models(name, with_head, without_head):
    table = parameter_table(ViTConfig.preset(name))
    assert params.count(table) == with_head
    assert params.count([spec for spec in table if not spec.name.startswith("head.")]) == without_head


def test_parameter_count_with_pre_logits():
    config = ViTConfig.preset("B/16", num_classes=21843, pre_logits=768)
    assert params.count(parameter_table(config)) == 103_186_515


def test_every_preset_is_a_model():
    for name in PRESETS:
        if name.endswith("/14") or "/" not in name:
            continue
        assert ViTConfig.preset(name).grid_size >= 1
    assert ViTConfig.preset("H/14").grid_size == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 30}, "image_size 30 is not a multiple of patch_size 4"),
        ({"width": 190}, "width 190 is not a multiple of num_heads 3"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"width": 191.5}, "width must be a whole number, got 191.5"),
        ({"channels": True}, "channels must be a whole number, got True"),
        ({"dropout": 1.0}, "dropout must be at least 0.0 and below 1.0, got 1.0"),
        ({"drop_path": -0.1}, "drop_path must be at least"),
        ({"attention_dropout": float("nan")}, "attention_dropout must be a finite number"),
        ({"pos_at": "blocks"}, "pos_at must be one of input, every, shared; got 'blocks'"),
        ({"attention": "local"}, "attention must be one of full, axial; got 'local'"),
        ({"pos_embed": "relative"}, 'with pos_embed "relative", pos_at must be "every" or "shared", got "input"'),
        ({"pos_embed": "none", "pos_at": "every"}, 'with pos_embed "none", pos_at must be "input", got "every"'),
        ({"pos_embed": "sincos2d", "pos_at": "every"}, 'pos_at must be "input" or "shared", got "every"'),
        ({"pos_embed": "relative", "pos_at": "every", "registers": 1}, "registers have no place: take 0 of them"),
        ({"pos_embed": "learned2d", "width": 9}, '"learned2d" halves the width, which must be even, got 9'),
        ({"attention": "axial"}, 'set pooling to "mean", "avg" or "seq", and registers to 0'),
        ({"attention": "axial", "pooling": "mean", "registers": 2}, "and registers to 0"),
        ({"pooling": "max"}, r"one of cls, mean, avg, seq, cls\+mean, cls\+register; got 'max'"),
        ({"pooling": "cls+register"}, "registers must be at least 1"),
        ({"pos_embed": "rope"}, "pos_embed must be one of"),
        ({"gelu": "relu"}, "gelu must be one of"),
        ({"width": 66, "pos_embed": "sincos2d"}, "multiple of 4"),
        ({"pre_logits": -1}, "pre_logits must be at least 0"),
        ({"layernorm_eps": 0.0}, "layernorm_eps must be at least"),
        ({"layer_scale": -0.1}, "layer_scale must be at least 0.0 and at most 1.0, got -0.1"),
        ({"registers": -1}, "registers must be at least 0, got -1"),
        ({"registers": 0.5}, "registers must be a whole number, got 0.5"),
        ({"qk_norm": 1}, "qk_norm must be true or false, got 1"),
        ({"qk_norm": True, "width": 6, "num_heads": 6}, "qk_norm needs heads of more than one dimension"),
        ({"layer_scale": float("inf")}, "layer_scale must be a finite number"),
        ({"stem": "resnet"}, "stem must be .root., or how many units each stage has, such as .3,4,9.; got 'resnet'"),
        ({"stem": "3,0"}, "how many units each stage has"),
        ({"stem": "3,,4"}, "how many units each stage has"),
        ({"stem": "3,²"}, "how many units each stage has"),
        ({"stem": 3}, "stem must be a text, got 3"),
        ({"stem": "root", "stem_width": 40}, "stem_width 40 is not a multiple of stem_groups 32"),
        ({"stem": "root", "stem_width": 0}, "stem_width must be at least 1, got 0"),
        ({"stem_groups": 0}, "stem_groups must be at least 1, got 0"),
        ({"stem": "root", "patch_size": 3}, "image_size 32 is not a multiple of 12: stem 'root' makes maps of 1/4"),
        (
            {"stem": "2,2,2,2", "patch_size": 2},
            "32 is not a multiple of 64: stem '2,2,2,2' makes maps of 1/32 the size",
        ),
        ({"mlp": "swiglu", "mlp_dim": 9}, "halves mlp_dim, which must be even, got 9"),
        ({"mlp": "swiglu", "mlp_dim": 8, "gelu": "erf"}, 'has no GELU, so gelu "erf" would do nothing'),
        ({"mlp": "gated"}, "mlp must be one of"),
    ],
)
def test_impossible_settings_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        ViTConfig(**changes)


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(InputError, match="Ti/16"):
        ViTConfig.preset("XXL/3")


def test_mlp_width_follows_the_width():
    assert ViTConfig(width=96).mlp_dim == 384
    assert ViTConfig(width=96, mlp_dim=100).mlp_dim == 100
    with pytest.raises(dataclasses.FrozenInstanceError):
        ViTConfig().width = 3


# Along random directions all of them are checked quickly, in tests/laboratory; minivit gradcheck takes central
# differences of every element of all of them, in a minute.
QUICK_MODELS = ("vit", "vit-mean", "vit-every")


@pytest.mark.parametrize(
    ("name", "method"),
    [*(pytest.param(name, "complex", marks=[pytest.mark.slow] if name not in QUICK_MODELS else []) for name in MODELS),
     ("vit", "central")],
)  # fmt: skip
def test_every_gradient_of_the_model_element_by_element(name, method):
    model = random_model(**MODELS[name])
    images, labels = batch(model)
    results = gradcheck.check_model(
        lambda flat: ViT(model.config, flat=flat),
        images,
        labels,
        model.flat,
        method=method,
        elementwise=True,
        label_smoothing=0.1,
    )
    assert [r.argument for r in results] == [*model.params, "images"]
    for result in results:
        assert result.passed, result


# With dropout a constant added to all features of a token is no constant any more: else every LayerNorm would hide it.
FIXED_POSITIONS = {**MODELS["vit-dropout"], "pos_embed": "sincos2d"}


@pytest.mark.parametrize("settings", [*MODELS.values(), FIXED_POSITIONS], ids=[*MODELS, "fixed positions"])
def test_backward_is_the_transpose_of_the_complex_step(settings):
    """<J v, u> = <v, J^T u>, with J v from a forward pass at x + i h v."""
    model = random_model(**settings)
    images, _ = batch(model)
    logits, cache = model.forward(images, rng=np.random.default_rng(1))
    rng = np.random.default_rng(2)
    imagesdot, flatdot, u = (rng.standard_normal(shape) for shape in (images.shape, model.flat.shape, logits.shape))
    logitsdot = along(model, images, imagesdot, flatdot, 1)
    flat, grads = model.gradient_buffer()
    dimages = model.backward(u, cache, grads)
    difference = (u * logitsdot).sum() - (flat @ flatdot + (dimages * imagesdot).sum())
    assert abs(difference) < 1e-12 * np.linalg.norm(u) * np.linalg.norm(logitsdot)


def along(model, images, imagesdot, flatdot, seed):
    """How the logits move when images and parameters do, by the complex step."""
    moved = ViT(model.config, flat=model.flat + 1e-30j * flatdot)
    logits, _ = moved.forward(images + 1e-30j * imagesdot, rng=np.random.default_rng(seed))
    return logits.imag / 1e-30


def test_a_zero_head_costs_ln_k_and_gives_the_body_no_gradient():
    model = ViT(ViTConfig(**TINY), dtype=np.float64)
    images, labels = batch(model)
    loss, _, grads = gradient(model, images, labels)
    assert math.isclose(loss, math.log(model.config.num_classes), rel_tol=1e-15)
    for name, value in grads.items():
        assert value.any() == name.startswith("head."), name


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_a_gradient_at_random_values(name):
    model = random_model(**MODELS[name])
    _, _, grads = gradient(model, *batch(model))
    D = model.config.width
    nothing = 1e-13 * max(np.abs(value).max() for value in grads.values())  # but for rounding: 1e-16 of what is summed
    for parameter, value in grads.items():
        if parameter.endswith("k_norm.bias"):
            assert np.abs(value).max() < nothing, "nor, with QK-norm, that of their LayerNorm"
            continue
        if parameter == "attention_pool.bias":
            assert np.abs(value).max() < nothing, "nor that of the scores of sequence pooling"
            continue
        if parameter.endswith("qkv.bias") and not model.config.qk_norm:
            assert np.abs(value[D : 2 * D]).max() < nothing, "the bias of the keys cannot matter"
            value = np.delete(value, np.s_[D : 2 * D])
        if model.config.stem and parameter.startswith("patch_embed."):
            assert value.any(), parameter  # ReLU lets nothing through of some channels
            continue
        assert (value != 0).all(), parameter


def test_backward_adds():
    model = random_model()
    images, labels = batch(model)
    logits, cache = model.forward(images)
    _, once, grads = gradient(model, images, labels)
    dlogits = softmax_cross_entropy_backward(1.0, softmax_cross_entropy_forward(logits, labels)[1])
    first = once.copy()
    model.backward(dlogits, cache, grads)
    np.testing.assert_allclose(once, 2 * first, rtol=1e-15)


def test_bytes_have_no_gradient_and_numbers_have():
    """The twin of the patch embedding saves the work for bytes; the book gives the gradient by the scaled pixels."""
    model = random_model()
    images, _ = batch(model)
    some_bytes = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
    for inputs, kernels, expected in (
        (images, nullcontext, True),
        (some_bytes, nullcontext, False),
        (some_bytes, plain, True),
    ):
        with kernels():
            logits, cache = model.forward(inputs)
            dimages = model.backward(logits, cache, model.gradient_buffer()[1])
        assert (dimages is not None and dimages.shape == images.shape) == expected


@pytest.mark.parametrize("name", MODELS)
def test_predict_and_intermediates_are_the_forward_without_dropout(name):
    model = random_model(**MODELS[name])
    images, _ = batch(model)
    logits, _ = model.forward(images)
    np.testing.assert_array_equal(model.predict(images), logits)
    seen = intermediates(model, images)
    np.testing.assert_allclose(seen.logits, logits, rtol=1e-12, atol=1e-14)  # its last block makes every token
    c, N = model.config, model.config.num_tokens
    assert [a.shape for a in seen.attention] == [(MODEL_BATCH, c.num_heads, N, N)] * c.depth
    assert [f.shape for f in seen.features] == [(MODEL_BATCH, N, c.width)] * (c.depth + 1)
    np.testing.assert_allclose(seen.attention[0].sum(axis=-1), 1.0)


@pytest.mark.parametrize("pooling", ["cls", "mean", "seq"])
@pytest.mark.parametrize("pre_logits", [0, 7])
def test_features_are_what_the_head_reads(pooling, pre_logits):
    """By hand from the tokens of the last block, in float64; and the head's product with them is the logits."""
    config = ViTConfig(
        image_size=8, patch_size=4, width=12, depth=2, num_heads=3, num_classes=5, pooling=pooling, registers=2,
        pre_logits=pre_logits, dropout=0.3,
    )  # fmt: skip
    model = ViT(config, dtype=np.float64)
    rng = np.random.default_rng(0)
    model.flat += 0.3 * rng.standard_normal(model.flat.shape)
    images = rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    features, p = model.features(images), model.params
    assert features.shape == (6, config.num_features) == (6, pre_logits or 12)
    np.testing.assert_allclose(
        features @ p["head.weight"] + p["head.bias"], model.predict(images), rtol=1e-12, atol=1e-12
    )
    z = intermediates(model, images).features[-1]
    z = (z - z.mean(axis=-1, keepdims=True)) / np.sqrt(z.var(axis=-1, keepdims=True) + config.layernorm_eps)
    z = z * p["norm.weight"] + p["norm.bias"]
    if pooling == "cls":
        y = z[:, 0]
    else:
        patches = z[:, 2:]
        scores = 0.0 if pooling == "mean" else patches @ p["attention_pool.weight"]
        weights = np.exp(scores) * np.ones((6, 4, 1))
        y = (weights / weights.sum(axis=1, keepdims=True) * patches).sum(axis=1)
    if pre_logits:
        y = np.tanh(y @ p["pre_logits.weight"] + p["pre_logits.bias"])
    np.testing.assert_allclose(features, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pos_embed", ["learned", "sincos2d", "none"])
@pytest.mark.parametrize("pooling", ["cls", "mean", "avg", "seq"])
def test_registers_stand_behind_the_class_token_and_have_no_position(pooling, pos_embed):
    model = random_model(pooling=pooling, pos_embed=pos_embed, registers=3)
    bare = random_model(pooling=pooling, pos_embed=pos_embed)
    assert model.config.num_tokens == bare.config.num_tokens + 3
    for name, value in bare.params.items():
        value[...] = model.params[name]  # of the same shape: the positions are those of the others
    images, _ = batch(model)
    first = int(pooling == "cls")
    tokens = intermediates(model, images).features[0]
    expected = np.broadcast_to(model.params["reg_token"], (MODEL_BATCH, 3, 12))
    np.testing.assert_array_equal(tokens[:, first : first + 3], expected)
    others = np.delete(tokens, np.s_[first : first + 3], axis=1)
    np.testing.assert_array_equal(others, intermediates(bare, images).features[0])
    # the head reads none of them, but the other tokens did in the blocks
    changed = tokens.copy()
    changed[:, first : first + 3] += 1.0
    head = model.parts.head.forward
    np.testing.assert_array_equal(head(changed, model.inputs)[0], head(tokens, model.inputs)[0])
    assert not np.allclose(model.predict(images), bare.predict(images), rtol=1e-3)
    cache = model.forward(images)[1]
    assert cache.blocks[-1].gelu.x.shape[1] == (1 if pooling == "cls" else 7)


PLACES = [(kind, place) for kind, places in POSITIONS.items() for place in places]
WHOLE = [
    (*place, pooling, attention)
    for place in PLACES
    for pooling in POOLINGS
    for attention in ATTENTIONS
    if not (pooling.startswith("cls") and attention == "axial")  # refused, as are registers and relative positions
    and (place[0], pooling) != ("relative", "cls+register")
]


@pytest.mark.parametrize("pre_logits", [0, 5])
@pytest.mark.parametrize(("pos_embed", "pos_at", "pooling", "attention"), WHOLE)
def test_every_position_with_every_head(pos_embed, pos_at, pooling, attention, pre_logits):
    """Right gradients, the same bits with recomputation, the transpose of the complex step, the right logits."""
    changes = {"registers": 2} if pos_embed != "relative" and attention == "full" else {}
    model = random_model(
        pos_embed=pos_embed, pos_at=pos_at, pooling=pooling, pre_logits=pre_logits, attention=attention, depth=3,
        image_size=6, dropout=0.1, attention_dropout=0.1, drop_path=0.2, **changes,
    )  # fmt: skip
    images, labels = batch(model, 3)
    model_of = lambda flat: ViT(model.config, flat=flat)  # noqa: E731
    for result in gradcheck.check_model(model_of, images, labels, model.flat, method="complex"):
        assert result.passed, result
    found = []
    for recompute in (False, True):
        logits, cache = model.forward(images, rng=np.random.default_rng(5), recompute=recompute)
        flat, grads = model.gradient_buffer()
        dimages = model.backward(logits, cache, grads)
        found.append((logits.tobytes(), flat.tobytes(), dimages.tobytes()))
    assert found[0] == found[1]
    logits, cache = model.forward(images, rng=np.random.default_rng(5))
    rng = np.random.default_rng(2)
    imagesdot, flatdot = rng.standard_normal(images.shape), rng.standard_normal(model.flat.shape)
    moved = along(model, images, imagesdot, flatdot, 5)
    difference = (logits * moved).sum() - (flat @ flatdot + (dimages * imagesdot).sum())
    assert abs(difference) < 1e-11
    np.testing.assert_array_equal(model.predict(images), model.forward(images)[0])


@pytest.mark.parametrize("pos_embed", ["learned", "learned2d"])
def test_with_one_block_a_position_is_the_same_everywhere(pos_embed):
    models = [random_model(pos_embed=pos_embed, pos_at=pos_at, depth=1) for pos_at in ("input", "every", "shared")]
    for name, value in models[1].params.items():
        value[...] = models[0].params[name.removeprefix("blocks.0.") if "pos_embed" in name else name]
    images, labels = batch(models[0])
    losses = {gradient(model, images, labels)[0] for model in models}
    assert len(losses) == 1


def test_a_row_of_the_table_of_relative_positions_has_no_gradient_where_its_offset_does_not_occur():
    """In the last block the class token, the first of the sequence, asks alone: every key stands behind it."""
    model = random_model(pos_embed="relative", pos_at="every")
    _, _, grads = gradient(model, *batch(model))
    first, last = (grads[f"blocks.{i}.attn.rel_pos"] for i in (0, 1))
    assert first.shape == (1, 9, 4) and (first != 0).all() and not last[:, :4].any() and (last[:, 4:] != 0).all()


@pytest.mark.parametrize("kind", ["learned", "learned2d", "relative"])
def test_positions_do_not_decay_and_learn_at_the_rate_of_their_block(kind):
    config = ViTConfig(**{**TINY, "pos_embed": kind, "pos_at": "every"})
    table = parameter_table(config)
    assert not any(spec.decay for spec in table if "pos" in spec.name)
    assert all(len(spec.shape) == 3 for spec in table if "pos" in spec.name), "Muon takes matrices, of two axes"
    rates = params.views(params.layer_scale(table, 0.5, np.float64), table)
    positions = [name for name in rates if "pos" in name]
    assert len({name.split(".")[1] for name in positions}) == config.depth
    for name in positions:
        assert (rates[name] == rates[f"blocks.{name.split('.')[1]}.norm1.bias"][0]).all()
    if kind != "relative":
        table = parameter_table(dataclasses.replace(config, pos_at="shared"))
        rates = params.views(params.layer_scale(table, 0.5, np.float64), table)
        assert all((rate == 0.5**3).all() for name, rate in rates.items() if "pos" in name)


def test_axial_attention_sees_all_in_two_blocks():
    """One changed pixel changes its row of patches in the first block, and every patch in the second."""
    model = random_model(attention="axial", pooling="mean", image_size=6, pos_embed="none")
    images, _ = batch(model, 1)
    changed = images.copy()
    changed[0, 2, 5] += 1.0  # of the patch in row 1 and column 2
    before, after = (intermediates(model, x).features for x in (images, changed))
    moved = [np.abs(b - a)[0].max(axis=-1).reshape(3, 3) > 1e-9 for b, a in zip(before, after, strict=True)]
    rows = np.zeros((3, 3), bool)
    rows[1] = True
    assert moved[0].sum() == 1 and moved[0][1, 2]
    np.testing.assert_array_equal(moved[1], rows)
    assert moved[2].all()


@pytest.mark.parametrize(
    ("name", "tokens", "stride", "channels"),
    [
        ("R+Ti/16", 50, 4, 64), ("R26+S/32", 50, 32, 2048), ("R50+B/16", 197, 16, 1024), ("R50+B/32", 50, 32, 2048),
        ("R50+L/16", 197, 16, 1024), ("R50+L/32", 50, 32, 2048),
    ],
)  # fmt: skip
def test_hybrids_have_the_tokens_of_the_official_models(name, tokens, stride, channels):
    config = ViTConfig.preset(name)
    assert (config.num_tokens, config.stem_stride, config.patch_channels) == (tokens, stride, channels)
    assert ViTConfig.preset(name, image_size=384, stem=config.stem.replace(",", " , ")).stem == config.stem


def test_a_stem_at_half_size_is_the_same_stem():
    model = random_model(**MODELS["vit-stem"] | {"image_size": 16, "pos_embed": "sincos2d", "pooling": "mean"})
    small = model.at_half_size()
    assert small.flat is model.flat and (model.config.num_tokens, small.config.num_tokens) == (16, 4)
    images, labels = batch(small)
    for result in gradcheck.check_model(
        lambda flat: ViT(model.config, flat=flat).at_half_size(), images, labels, model.flat, method="complex"
    ):
        assert result.passed, result


def test_a_stem_gives_the_gradient_of_images_that_are_numbers():
    model = random_model(**MODELS["vit-stem"])
    images, _ = batch(model)
    some_bytes = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
    flats = []
    for inputs in (some_bytes, pixels(some_bytes, np.float64)):
        logits, cache = model.forward(inputs)
        flat, grads = model.gradient_buffer()
        dimages = model.backward(np.ones_like(logits), cache, grads)
        assert (dimages is None) == (inputs is some_bytes)
        flats.append(flat)
    assert np.array_equal(*flats) and dimages.shape == images.shape


def test_a_stem_starts_as_the_official_one():
    named = ViT(ViTConfig(stem="1,1", patch_size=1, width=24, depth=1), seed=2).params
    for name, value in named.items():
        if not name.startswith(STEM):
            continue
        if value.ndim == 4:
            expected = math.prod(value.shape[:3]) ** -0.5
            assert abs(value.std() / expected - 1) < 0.03 and np.abs(value).max() < 2.28 * expected, name
        else:
            assert (value == (name.endswith("weight") and "norm3" not in name)).all(), name


OPTIONS = {"layer_scale": 0.5, "qk_norm": True, "registers": 2, "pooling": "seq"}


def test_all_options_together():
    model = random_model(**OPTIONS, dropout=0.2, drop_path=0.3)
    images, labels = batch(model)
    model_of = lambda flat: ViT(model.config, flat=flat)  # noqa: E731
    for result in gradcheck.check_model(model_of, images, labels, model.flat, method="complex"):
        assert result.passed, result
    found = []
    for recompute in (False, True):
        logits, cache = model.forward(images, rng=np.random.default_rng(5), recompute=recompute)
        dlogits = softmax_cross_entropy_backward(1.0, softmax_cross_entropy_forward(logits, labels)[1])
        flat, grads = model.gradient_buffer()
        model.backward(dlogits, cache, grads)
        found.append((logits.tobytes(), flat.tobytes()))
    assert found[0] == found[1]


def test_an_option_that_is_off_adds_nothing():
    off = {"layer_scale": 0.0, "qk_norm": False, "registers": 0, "pooling": "cls", "stem": ""}
    assert ViTConfig(**TINY, **off) == ViTConfig(**TINY)
    assert not {
        name for name in random_model().params if any(x in name for x in ("ls1", "_norm.", "reg_", "pool", "stem"))
    }


def test_the_last_block_works_for_the_class_token_alone():
    for pooling, tokens in (("cls", 1), ("mean", 4)):
        model = random_model(pooling=pooling)
        cache = model.forward(batch(model)[0])[1]
        assert [block.gelu.x.shape[1] for block in cache.blocks] == [model.config.num_tokens, tokens]
        assert [block.msa.attention.q.shape[2] for block in cache.blocks] == [model.config.num_tokens, tokens]


def test_long_sequences_change_no_number(monkeypatch):
    model = random_model()
    images, labels = batch(model)
    loss, flat, _ = gradient(model, images, labels)
    seen = intermediates(model, images)
    monkeypatch.setattr(flash_attention, "LONG", 5)
    long_loss, long_flat, _ = gradient(model, images, labels)
    long_seen = intermediates(model, images)
    assert math.isclose(long_loss, loss, rel_tol=1e-12)
    np.testing.assert_allclose(long_flat, flat, rtol=1e-9, atol=1e-13)
    for a, b in zip(long_seen.attention, seen.attention, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11)


@pytest.mark.parametrize("name", MODELS)
def test_recomputed_blocks_give_the_same_bits(name):
    model = random_model(**MODELS[name])
    images, labels = batch(model)
    found = []
    for recompute in (False, True):
        logits, cache = model.forward(images, rng=np.random.default_rng(5), recompute=recompute)
        dlogits = softmax_cross_entropy_backward(1.0, softmax_cross_entropy_forward(logits, labels)[1])
        for _ in range(2):  # a backward leaves the cache as it was
            flat, grads = model.gradient_buffer()
            dimages = model.backward(dlogits, cache, grads)
            found.append((logits.tobytes(), flat.tobytes(), dimages.tobytes()))
    assert found[0] == found[1] == found[2] == found[3]
    assert [type(block).__name__ for block in cache.blocks] == ["RecomputeCache"] * 2


def test_dropout_is_drawn_from_the_generator_alone():
    model = random_model(dropout=0.3, attention_dropout=0.3, drop_path=0.3)
    images, _ = batch(model)
    first, _ = model.forward(images, rng=np.random.default_rng(5))
    again, _ = model.forward(images, rng=np.random.default_rng(5))
    other, _ = model.forward(images, rng=np.random.default_rng(6))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_drop_path_rises_linearly_with_depth():
    config = random_model(depth=5, drop_path=0.4).config
    assert [drop_path_rate(config, i) for i in range(5)] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


class Recorder:
    """A Generator that remembers the shapes of its draws, and keeps every entry (``drop=False``) or none."""

    def __init__(self, *, drop):
        self.shapes, self.value = [], 0.0 if drop else 0.999

    def random(self, shape, dtype):
        self.shapes.append(tuple(shape))
        return np.full(shape, self.value, dtype)


@pytest.mark.parametrize(
    ("rate", "embedding", "block"),
    [
        ("dropout", [(8, 5, 12)], [(8, 5, 12), (8, 5, 7), (8, 5, 12)]),  # projection, GELU, second dense layer
        ("attention_dropout", [], [(8, 3, 5, 5)]),
        ("drop_path", [], [(8, 1, 1), (8, 1, 1)]),
    ],
)
def test_the_dropout_sites_of_the_official_code(rate, embedding, block):
    model = random_model(**{rate: 0.25})
    images, _ = batch(model)
    keep = Recorder(drop=False)
    kept, _ = model.forward(images, rng=keep)
    blocks = 1 if rate == "drop_path" else 2  # stochastic depth rises from 0 in the first block
    expected = embedding + blocks * block
    if rate != "drop_path":  # the last block goes on with the class token alone: 1 of its 5 tokens asks
        expected[-len(block) :] = [(*shape[:-2], 1, shape[-1]) for shape in block]
    assert keep.shapes == expected
    # nothing dropped, but what is kept is scaled by 1 / (1 - rate)
    assert not np.allclose(kept, model.predict(images), rtol=1e-3)
    dropped, _ = model.forward(images, rng=Recorder(drop=True))
    assert not np.allclose(dropped, kept, rtol=1e-3)
    np.testing.assert_array_equal(model.forward(images)[0], model.predict(images))


def test_every_mask_acts_where_it_is_drawn():
    """Each dropout site alone set to drop everything changes the logits: none of the masks is drawn in vain."""
    model = random_model(dropout=0.25, attention_dropout=0.25, drop_path=0.25)
    images, _ = batch(model)
    reference = Recorder(drop=False)
    kept, _ = model.forward(images, rng=reference)
    assert len(reference.shapes) == 1 + 2 * 4 + 2
    for site in range(len(reference.shapes)):

        class One(Recorder):
            def random(self, shape, dtype, site=site):
                self.value = 0.0 if len(self.shapes) == site else 0.999
                return super().random(shape, dtype)

        changed, _ = model.forward(images, rng=One(drop=False))
        assert not np.allclose(changed, kept, rtol=1e-6), f"site {site}"


def test_the_layernorm_epsilon_reaches_every_layernorm():
    images, _ = batch(random_model())
    usual, large = random_model(), random_model(layernorm_eps=0.5)
    a, b = intermediates(usual, images), intermediates(large, images)
    for i in (1, 2):
        assert not np.allclose(a.features[i], b.features[i], rtol=1e-3)
    tokens = a.features[-1]
    found = large.parts.head.forward(tokens, large.inputs)[0]
    assert np.array_equal(found, head_forward(tokens, *[large.params[name] for name in HEAD_NAMES], eps=0.5)[0])
    assert not np.allclose(found, usual.parts.head.forward(tokens, usual.inputs)[0], rtol=1e-3)


def test_stochastic_depth_of_a_single_block():
    assert drop_path_rate(random_model(depth=1, drop_path=0.4).config, 0) == 0.4


def test_without_positions_patches_are_a_set():
    model = random_model(pos_embed="none")
    images, _ = batch(model)
    shuffled = unpatchify(patchify(images, 2)[:, [2, 0, 3, 1]], images.shape, 2)
    np.testing.assert_allclose(model.predict(shuffled), model.predict(images), rtol=1e-10)
    with_positions = random_model()
    assert not np.allclose(with_positions.predict(shuffled), with_positions.predict(images), rtol=1e-3)


def test_a_batch_is_its_images():
    model = random_model()
    images, labels = batch(model, count=5)
    loss, flat, _ = gradient(model, images, labels)
    parts = [gradient(model, images[i : i + 1], labels[i : i + 1], denominator=5) for i in range(5)]
    assert math.isclose(loss, sum(p[0] for p in parts), rel_tol=1e-13)
    np.testing.assert_allclose(sum(p[1] for p in parts), flat, rtol=1e-9, atol=1e-15)


def test_bytes_are_scaled_to_minus_one_and_one():
    images = np.array([0, 255, 51], np.uint8).reshape(1, 1, 3, 1)
    np.testing.assert_allclose(pixels(images, np.float32).ravel(), [-1, 1, -0.6], rtol=1e-6)
    model = random_model(dtype=np.float32)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    np.testing.assert_array_equal(model.predict(images), model.predict((images.astype(np.float32) - 127.5) / 127.5))


def test_float32_stays_float32():
    model = random_model(dtype=np.float32)
    images, labels = batch(model)
    logits, cache = model.forward(images)
    assert logits.dtype == np.float32
    flat, grads = model.gradient_buffer()
    dlogits = softmax_cross_entropy_backward(1.0, softmax_cross_entropy_forward(logits, labels)[1])
    dimages = model.backward(dlogits, cache, grads)
    assert dlogits.dtype == flat.dtype == dimages.dtype == np.float32
    reference = ViT(model.config, flat=model.flat.astype(np.float64))
    _, expected, _ = gradient(reference, images, labels)
    assert np.abs(flat - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 4, 4, 2)), r"takes images of shape \(B, 4, 4, 3\), got \(2, 4, 4, 2\)"),
        (np.zeros((4, 4, 3)), "takes images"),
        (np.full((2, 4, 4, 3), np.nan), "image 0 .* NaN"),
        (np.zeros((2, 4, 4, 3), int), "images are int64; give them as uint8"),
        (np.zeros((2, 4, 4, 3), bool), "images are bool; give them as uint8"),
    ],
)
def test_images_that_do_not_fit_are_refused(images, message):
    with pytest.raises(InputError, match=message):
        random_model().forward(images)


def test_the_model_wraps_a_buffer_without_copying():
    flat = np.zeros(params.count(parameter_table(ViTConfig(**TINY))))
    model = ViT(ViTConfig(**TINY), flat=flat)
    flat[-1] = 7.0
    assert model.params["head.bias"][-1] == 7.0
    with pytest.raises(ValueError, match="parameter table"):
        ViT(ViTConfig(**TINY), flat=flat[1:])


@pytest.mark.parametrize(("pooling", "attention"), [("cls", "full"), ("mean", "full"), ("mean", "axial")])
@pytest.mark.parametrize(("pos_embed", "pos_at"), [("sincos2d", "input"), ("sincos2d", "shared"), ("none", "input")])
def test_the_model_of_images_of_half_the_size(pooling, attention, pos_embed, pos_at):
    config = ViTConfig(image_size=16, patch_size=4, width=12, depth=2, num_heads=3, mlp_dim=20, pooling=pooling,
                       pos_embed=pos_embed, pos_at=pos_at, attention=attention)  # fmt: skip
    model = ViT(config, dtype=np.float64)
    small = model.at_half_size()
    assert small.flat is model.flat and small.config.image_size == 8
    assert [spec.name for spec in small.table] == [spec.name for spec in model.table]
    images = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3))
    logits, cache = small.forward(images)
    _, grads = model.gradient_buffer()
    small.backward(np.ones_like(logits), cache, grads)  # into the same names
    if pos_embed == "none":
        return
    prefix = pooling == "cls"
    position, halved = model.inputs["pos_embed"], small.inputs["pos_embed"]
    full, half = position[0, prefix:].reshape(4, 4, 12), halved[0, prefix:].reshape(2, 2, 12)
    np.testing.assert_allclose(half[1, 0], full[2:, :2].reshape(4, 12).mean(axis=0), rtol=1e-12)
    assert not prefix or not halved[0, 0].any()
    with plain():  # the second block has the same array, where all blocks share it
        cache = small.forward(images)[1].blocks[1]
    assert (type(cache).__name__ == "FollowCache") == (pos_at == "shared")


def test_what_cannot_be_halved_is_refused():
    for positions in ({}, {"pos_embed": "learned2d"}, {"pos_embed": "relative", "pos_at": "shared"}):
        with pytest.raises(InputError, match="need fixed positions"):
            ViT(ViTConfig(image_size=16, width=12, depth=1, **positions)).at_half_size()
    with pytest.raises(InputError, match="need an even number of patches on a side, not 3"):
        ViT(ViTConfig(image_size=12, width=12, depth=1, pos_embed="sincos2d")).at_half_size()
