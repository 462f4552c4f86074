"""Masked patches: what is hidden, what is to be predicted, and the two models, against slow code and derivatives."""

from dataclasses import replace

import numpy as np
import pytest

from minivit import InputError, ViT, ViTConfig
from minivit.base import params as parameters
from minivit.layers.block import block_forward
from minivit.layers.layernorm import layernorm_forward
from minivit.masked import (
    MaskedConfig,
    MaskedViT,
    class_colours,
    colour_classes,
    draw_plan,
    masked_table,
    painted,
    patch_loss,
    patch_loss_gradient,
    patch_targets,
    shown,
)
from minivit.model import intermediates, parameter_table

TINY = ViTConfig(image_size=6, patch_size=2, num_classes=5, width=12, depth=2, num_heads=3, mlp_dim=7)  # 9 patches
MPP = MaskedConfig()
MAE = MaskedConfig(method="mae", decoder_width=8, decoder_heads=2)
FULL = replace(
    TINY, channels=1, registers=2, qk_norm=True, layer_scale=0.5, dropout=0.2, attention_dropout=0.2, drop_path=0.3
)
CASES = {
    "mpp": (TINY, MPP),
    "mpp-options": (FULL, MPP),
    "mpp-seq": (replace(TINY, channels=2, pooling="seq", pre_logits=4, pos_embed="sincos2d"), MPP),
    "mpp-downsized": (ViTConfig(image_size=12, channels=1, width=8, depth=1, num_heads=2, mlp_dim=6),
                      MaskedConfig(target="downsized", ratio=0.3)),
    "mpp-pixels": (replace(TINY, pos_embed="none", pooling="mean"), MaskedConfig(target="pixels")),
    "mae": (TINY, MAE),
    "mae-options": (FULL, replace(MAE, target="pixels", decoder_depth=1)),
    "mae-mean": (replace(TINY, pooling="mean", pos_embed="sincos2d"), MAE),
}  # fmt: skip


def problem(config, masked, *, count=3, seed=0):
    """A model in float64 away from its initial zeros, images and their plan."""
    rng = np.random.default_rng(seed)
    model = MaskedViT(config, masked, seed=seed, dtype=np.float64)
    model.flat += 0.3 * rng.standard_normal(model.flat.shape)
    size = config.image_size
    images = rng.integers(0, 256, (count, size, size, config.channels), dtype=np.uint8)
    return model, images, draw_plan(config, masked, count, rng)


def loss_and_gradient(model, images, plan, *, seed=1, recompute=False):
    rng = None if seed is None else np.random.default_rng(seed)
    prediction, cache = model.forward(images, plan, rng=rng, recompute=recompute)
    loss, right, loss_cache = patch_loss(prediction, model.targets(images, plan), model.classes)
    flat, grads = model.gradient_buffer()
    model.backward(patch_loss_gradient(1.0, loss_cache), cache, grads)
    return loss, flat


# ---- what is hidden --------------------------------------------------------------------------------------------------


def test_half_of_the_patches_are_corrupted_in_the_shares_of_the_paper():
    config, count = ViTConfig(image_size=32), 4000
    N, n = 64, 32
    plan = draw_plan(config, MPP, count, np.random.default_rng(0))
    assert plan.shape == (count, 2, N)
    order, source = plan[:, 0], plan[:, 1]
    assert (np.sort(order, axis=1) == np.arange(N)).all()
    at = np.take_along_axis(source, order, axis=1)  # what each place shows, in the random order
    assert (at[:, n:] == order[:, n:]).all()  # nothing is done to the others
    chosen = at[:, :n]
    kinds = [(chosen == N).mean(), ((chosen != N) & (chosen != order[:, :n])).mean(), (chosen == order[:, :n]).mean()]
    np.testing.assert_allclose(kinds, [0.8, 0.1, 0.1], atol=4 * 0.4 / np.sqrt(count * n))
    # each patch equally often, and each other patch in its place
    assert abs(np.bincount(order[:, :n].ravel()) - count / 2).max() < 4 * np.sqrt(count / 4)
    copies = np.bincount((chosen - order[:, :n])[(chosen != N) & (chosen != order[:, :n])] % N, minlength=N)
    assert copies[0] == 0 and abs(copies[1:] / copies.sum() - 1 / 63).max() < 4 * np.sqrt(1 / 63 / copies.sum())


def test_a_masked_autoencoder_sees_a_quarter_and_nothing_is_exchanged():
    config = ViTConfig(image_size=32, registers=2)
    plan = draw_plan(config, MAE, 5, np.random.default_rng(0))
    assert (plan[:, 1] == np.arange(64)).all()
    model = MaskedViT(config, MAE)
    seen = model.seen(plan)
    assert model.predicted == 48 and seen.shape == (5, 3 + 16)
    assert (seen[:, :3] == [0, 1, 2]).all() and (seen[:, 3:] == plan[:, 0, 48:] + 3).all()


def test_shares_of_one_and_zero():
    all_masked = draw_plan(TINY, MaskedConfig(mask_share=1.0, random_share=0.0), 50, np.random.default_rng(1))
    assert (all_masked[:, 1] == 9).sum() == 50 * 4
    kept = draw_plan(TINY, MaskedConfig(mask_share=0.0, random_share=0.0), 50, np.random.default_rng(1))
    assert (kept[:, 1] == np.arange(9)).all()
    exchanged = draw_plan(TINY, MaskedConfig(mask_share=0.0, random_share=1.0), 50, np.random.default_rng(1))
    assert (exchanged[:, 1] != np.arange(9)).sum() == 50 * 4 and exchanged.max() == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "bert"}, "method must be one of mpp, mae"),
        ({"target": "normalised"}, "target must be one of colour, downsized, pixels"),
        ({"method": "mae", "target": "colour"}, "target must be one of normalised, pixels"),
        ({"ratio": 1.5}, "ratio must be at least 0.0 and at most 1.0"),
        ({"mask_share": 0.8, "random_share": 0.3}, "more than all patches"),
        ({"decoder_width": 10, "decoder_heads": 5}, "must be a multiple of decoder_heads 5 and of 4"),
        ({"decoder_depth": 0}, "decoder_depth must be at least 1"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(InputError, match=message):
        MaskedConfig(**settings)


@pytest.mark.parametrize(
    ("config", "masked", "message"),
    [
        (replace(TINY, image_size=2), MPP, "ratio 0.5 of 1 patches is none or all of them"),
        (TINY, MaskedConfig(ratio=1.0), "ratio 1.0 of 9 patches"),
        (TINY, MaskedConfig(target="downsized"), "patch_size that is a multiple of 4, not 2"),
        (replace(TINY, channels=4), MPP, "too many classes"),
        (replace(TINY, pos_at="shared"), MPP, "models without pos_at shared; leave it out"),
        (replace(TINY, pos_embed="learned2d"), MPP, 'not "learned2d"'),
    ],
)
def test_settings_that_do_not_fit_the_model(config, masked, message):
    with pytest.raises(InputError, match=message):
        MaskedViT(config, masked)


# ---- what was there --------------------------------------------------------------------------------------------------


def test_classes_are_three_bits_of_each_channel():
    colours = np.array([[0, 0, 0], [31, 31, 31.9], [32, 0, 0], [0, 32, 0], [0, 0, 32], [255, 255, 255], [96, 128, 224]])
    assert colour_classes(colours).tolist() == [0, 0, 64, 8, 1, 511, 3 * 64 + 4 * 8 + 7]
    assert colour_classes(np.array([[0], [200]])).tolist() == [0, 6]
    every = np.arange(512)
    assert (colour_classes(class_colours(every, 3)) == every).all()
    assert class_colours(np.array([511, 64]), 3).tolist() == [[240.0] * 3, [48.0, 16.0, 16.0]]


def hand_made():
    """Four patches of 4 x 4: red; white on the left and black on the right; rows of 33 and 31 in turn; all 31."""
    image = np.zeros((1, 8, 8, 3), np.uint8)
    image[0, :4, :4] = [255, 0, 0]
    image[0, :4, 4:6] = 255
    image[0, 4:, :4] = 31
    image[0, 4::2, :4] = 33
    image[0, 4:, 4:] = 31
    return image


def test_targets_of_an_image_made_by_hand():
    config = ViTConfig(image_size=8, patch_size=4)
    image = hand_made()
    found = patch_targets(image, config, MPP)
    assert found.dtype == np.int64
    assert found.tolist() == [[7 * 64, 3 * 73, 73, 0]]  # means 255 0 0; 127.5; 32; 31
    small = patch_targets(image, config, MaskedConfig(target="downsized"))  # a patch of 4 x 4 is its own downsized one
    assert small[0, 0].tolist() == [448] * 16
    assert small[0, 1].tolist() == [511, 511, 0, 0] * 4 and small[0, 2].tolist() == ([73] * 4 + [0] * 4) * 2
    large = image.repeat(2, axis=1).repeat(2, axis=2)
    of_large = patch_targets(large, replace(config, image_size=16, patch_size=8), MaskedConfig(target="downsized"))
    assert np.array_equal(of_large, small)
    scaled = (image.astype(np.float32) - 127.5) / 127.5  # floats mean the same
    assert np.array_equal(patch_targets(scaled, config, MPP)[:, [0, 1, 3]], found[:, [0, 1, 3]])  # 32 is on an edge


def test_pixels_as_targets_by_a_loop():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 6, 6, 3), dtype=np.uint8)
    pixels = patch_targets(images, TINY, MaskedConfig(target="pixels"), np.float64)
    normalised = patch_targets(images, TINY, MAE, np.float64)
    for b, row, column in np.ndindex(2, 3, 3):
        patch = images[b, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].astype(float).ravel() / 127.5 - 1.0
        np.testing.assert_allclose(pixels[b, 3 * row + column], patch, atol=1e-12)
        expected = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
        np.testing.assert_allclose(normalised[b, 3 * row + column], expected, rtol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_only_masked_patches_count_and_none_of_them_is_seen(name):
    config, masked = CASES[name]
    if masked.method == "mpp":
        masked = replace(masked, mask_share=1.0, random_share=0.0)
    model, images, plan = problem(config, masked)
    P, g = config.patch_size, config.grid_size
    hidden = np.zeros((len(images), g * g), bool)
    np.put_along_axis(hidden, plan[:, 0, : model.predicted], True, axis=1)
    hidden = hidden.reshape(-1, g, g).repeat(P, axis=1).repeat(P, axis=2)[..., None]
    others = np.where(hidden, images, 255 - images)  # other pixels where nothing is masked
    assert np.array_equal(model.targets(others, plan), model.targets(images, plan))
    under = np.where(hidden, 255 - images, images)  # and under the masks
    assert np.array_equal(model.forward(under, plan)[0], model.forward(images, plan)[0])
    assert not np.array_equal(model.targets(under, plan), model.targets(images, plan))


def test_images_of_what_is_seen_and_predicted():
    config, image = ViTConfig(image_size=8, patch_size=4), hand_made()
    plan = np.array([[[1, 0, 2, 3], [2, 4, 2, 3]]])  # patches 1 and 0: masked, and exchanged for patch 2
    seen = shown(image, plan, config, MPP)
    assert (seen[0, :4, 4:] == 127).all() and np.array_equal(seen[0, :4, :4], image[0, 4:, :4])
    assert np.array_equal(seen[0, 4:], image[0, 4:])
    kept = shown(image, np.array([[[1, 0, 2, 3], [0, 1, 2, 3]]]), config, replace(MAE, ratio=0.5))
    assert (kept[0, :4] == 127).all() and np.array_equal(kept[0, 4:], image[0, 4:])
    target = patch_targets(image, config, MPP)[:, [1, 0]]
    result = painted(image, plan, target, config, MPP)
    assert (result[0, :4, :4] == [240, 16, 16]).all() and (result[0, :4, 4:] == 112).all()
    assert np.array_equal(result[0, 4:], image[0, 4:])
    logits = np.zeros((1, 2, 512))
    logits[0, [0, 1], target[0]] = 1.0
    assert np.array_equal(painted(image, plan, logits, config, MPP), result)
    small = MaskedConfig(target="downsized")
    fine = patch_targets(image, config, small)[:, [1, 0]]
    assert np.abs(painted(image, plan, fine, config, small).astype(int) - image).max() <= 16
    for masked in (MaskedConfig(target="pixels"), replace(MAE, ratio=0.5)):
        perfect = patch_targets(image, config, masked, np.float64)[:, [1, 0]]
        assert np.array_equal(painted(image, plan, perfect, config, masked), image)


# ---- the models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_of_every_parameter(name):
    """By the complex step, along a random direction of each parameter; those that are not used have gradient 0."""
    config, masked = CASES[name]
    model, images, plan = problem(config, masked)
    _, gradient = loss_and_gradient(model, images, plan)
    targets, rng = model.targets(images, plan), np.random.default_rng(5)
    found = parameters.views(gradient, model.table)
    for spec in model.table:
        moved = model.flat.astype(complex)
        direction = rng.standard_normal(spec.shape)
        parameters.views(moved, model.table)[spec.name][...] += 1e-30j * direction
        other = MaskedViT(config, masked, flat=moved)
        prediction, _ = other.forward(images, plan, rng=np.random.default_rng(1))
        expected = patch_loss(prediction, targets, model.classes)[0].imag / 1e-30
        actual = (found[spec.name] * direction).sum()
        assert abs(actual - expected) <= 1e-11 * max(1e-3, abs(expected)), spec.name
        unused = spec.name.startswith(("head.", "pre_logits.", "attention_pool."))
        assert unused != found[spec.name].any() or "bias" in spec.name or spec.name.startswith("blocks"), spec.name


@pytest.mark.parametrize("name", CASES)
def test_the_backward_is_the_transpose_of_the_complex_step(name):
    """<J v, u> = <v, J^T u>, with J v from a forward pass at theta + i h v."""
    model, images, plan = problem(*CASES[name])
    rng = np.random.default_rng(2)
    prediction, cache = model.forward(images, plan, rng=np.random.default_rng(1))
    v, u = rng.standard_normal(model.flat.shape), rng.standard_normal(prediction.shape)
    gradient, grads = model.gradient_buffer()
    model.backward(u, cache, grads)
    moved = MaskedViT(model.config, model.masked, flat=model.flat + 1e-30j * v)
    forward = moved.forward(images, plan, rng=np.random.default_rng(1))[0].imag / 1e-30
    left, right = (forward * u).sum(), v @ gradient
    assert abs(left - right) < 1e-11 * max(abs(left), np.linalg.norm(gradient))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_where_nothing_is_corrupted_it_reads_the_representation_of_an_ordinary_model(pooling):
    config = replace(TINY, pooling=pooling, registers=2)
    masked = MaskedConfig(mask_share=0.0, random_share=0.0)
    model, images, plan = problem(config, masked)
    z = intermediates(ViT(config, flat=model.encoder.flat), images).features[-1]
    y, _ = layernorm_forward(z, model.params["norm.weight"], model.params["norm.bias"])
    rows = plan[:, 0, : model.predicted] + 2 + (pooling == "cls")
    expected = np.take_along_axis(y, rows[..., None], axis=1) @ model.params["mpp_head.weight"]
    expected += model.params["mpp_head.bias"]
    np.testing.assert_allclose(model.forward(images, plan)[0], expected, rtol=1e-10, atol=1e-12)


def test_the_autoencoder_with_all_tokens_in_their_places():
    """Mask tokens between what the encoder saw, and every token through every block of the decoder."""
    model, images, plan = problem(replace(TINY, registers=2), MAE)
    p, n, B, N, D = model.params, model.predicted, 3, 9, 8
    encoder = ViT(model.config, flat=model.encoder.flat)
    z, _ = encoder.parts.embedding.forward(images, encoder.inputs)
    seen = np.concatenate([np.tile([0, 1, 2], (B, 1)), plan[:, 0, n:] + 3], axis=1)
    z = np.take_along_axis(z, seen[..., None], axis=1)
    for i in range(2):
        params = {name.removeprefix(f"blocks.{i}."): p[name] for name in p if name.startswith(f"blocks.{i}.")}
        z, _ = block_forward(z, params, num_heads=3)
    y, _ = layernorm_forward(z, p["norm.weight"], p["norm.bias"])
    tokens = np.tile(p["mask_token"], (B, 3 + N, 1))
    np.put_along_axis(tokens, seen[..., None], y @ p["decoder_embed.weight"] + p["decoder_embed.bias"], axis=1)
    z = tokens + model._decoder_position
    assert not model._decoder_position[:3].any() and model._decoder_position.shape == (3 + N, D)
    for i in range(2):
        params = {name.split(f"_blocks.{i}.")[1]: p[name] for name in p if name.startswith(f"decoder_blocks.{i}.")}
        z, _ = block_forward(z, params, num_heads=2)
    y, _ = layernorm_forward(z, p["decoder_norm.weight"], p["decoder_norm.bias"])
    everything = y @ p["decoder_pred.weight"] + p["decoder_pred.bias"]
    expected = np.take_along_axis(everything, plan[:, 0, :n, None] + 3, axis=1)
    prediction, _ = model.forward(images, plan)
    np.testing.assert_allclose(prediction, expected, rtol=1e-10, atol=1e-12)
    # its loss, by the formula of the paper: the mean over the masked patches
    targets = patch_targets(images, model.config, MAE, np.float64)
    squares = ((everything[:, 3:] - targets) ** 2).mean(axis=-1)  # (B, N)
    mask = np.zeros((B, N))
    np.put_along_axis(mask, plan[:, 0, :n], 1.0, axis=1)
    loss, right, _ = patch_loss(prediction, model.targets(images, plan))
    assert right == 0
    np.testing.assert_allclose(loss, (squares * mask).sum() / mask.sum(), rtol=1e-12)


def test_a_zero_head_costs_ln_512_and_moves_nothing_but_itself():
    model = MaskedViT(TINY, MPP, dtype=np.float64)
    _, images, plan = problem(TINY, MPP)
    loss, gradient = loss_and_gradient(model, images, plan)
    np.testing.assert_allclose(loss, np.log(512), rtol=1e-14)
    moving = [name for name, g in parameters.views(gradient, model.table).items() if g.any()]
    assert moving == ["mpp_head.weight", "mpp_head.bias"]


@pytest.mark.parametrize("name", ["mpp-options", "mae-options", "mpp-downsized"])
def test_recomputed_activations_give_the_same_bits(name):
    model, images, plan = problem(*CASES[name])
    found = []
    for recompute in (False, True):
        prediction, cache = model.forward(images, plan, rng=np.random.default_rng(1), recompute=recompute)
        for _ in range(2):  # a backward leaves the cache as it was
            flat, grads = model.gradient_buffer()
            model.backward(np.sin(prediction), cache, grads)
            found.append((prediction.tobytes(), flat.tobytes()))
    assert found[0] == found[1] == found[2] == found[3]


@pytest.mark.parametrize("name", CASES)
def test_parts_of_a_batch_add_up_to_it(name):
    config, masked = CASES[name]
    model, images, plan = problem(replace(config, dropout=0.0, attention_dropout=0.0, drop_path=0.0), masked)
    loss, gradient = loss_and_gradient(model, images, plan, seed=None)
    flat, grads = model.gradient_buffer()
    total = 0.0
    for part in (slice(0, 1), slice(1, 3)):
        prediction, cache = model.forward(images[part], plan[part])
        targets = model.targets(images[part], plan[part])
        one, _, loss_cache = patch_loss(prediction, targets, model.classes, denominator=3)
        total += one
        model.backward(patch_loss_gradient(1.0, loss_cache), cache, grads)
    np.testing.assert_allclose(total, loss, rtol=1e-12)
    np.testing.assert_allclose(flat, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_the_encoder_is_an_ordinary_model_at_the_front_of_the_buffer(name):
    config, masked = CASES[name]
    table, own = masked_table(config, masked), parameter_table(config)
    assert [spec.name for spec in table[: len(own)]] == [spec.name for spec in own]
    model = MaskedViT(config, masked, seed=7)
    assert np.array_equal(model.encoder.flat, ViT(config, seed=7).flat)
    assert np.shares_memory(model.encoder.flat, model.flat)
    decayed = [spec.name for spec in table if spec.decay]
    assert all(name.endswith(".weight") and len(model.params[name].shape) == 2 for name in decayed)
    assert not any(name.startswith(("head", "pre_logits", "attention_pool")) for name in decayed)
    assert f"{'mpp_head' if masked.method == 'mpp' else 'decoder_pred'}.weight" in decayed
    assert "predicted" not in model.params and str(masked) in repr(model)


def test_a_right_guess_is_counted():
    prediction = np.zeros((2, 3, 8))
    targets = np.array([[1, 2, 3], [0, 0, 4]])
    prediction[0, 1, 2] = prediction[1, 2, 4] = prediction[0, 0, 5] = 1.0
    loss, right, _ = patch_loss(prediction, targets, 8)
    assert right == 4  # two raised, and the two of class 0 that argmax takes where all are equal
    cost = np.log(7 + np.e)
    np.testing.assert_allclose(loss, (2 * (cost - 1) + cost + 3 * np.log(8)) / 6)
    halves = patch_loss(np.zeros((1, 2, 16)), np.zeros((1, 2, 2), int), 8)  # two guesses of a patch
    np.testing.assert_allclose(halves[0], np.log(8))
    assert halves[1] == 4


def test_images_of_another_shape_are_refused():
    model, images, plan = problem(TINY, MPP)
    with pytest.raises(InputError, match=r"takes images of shape \(B, 6, 6, 3\), got \(3, 4, 6, 3\)"):
        model.forward(images[:, :4], plan)
