"""Exact facts: what is true of a right implementation whatever its parameters, checked without any derivative.

A gradient check compares a backward with its own forward; it cannot see a forward that computes the wrong thing, an
optimiser, a schedule or the summing of micro-batches. Each fact here is a function that returns how far the code is
from the truth, as a relative number; rounding in float64 stays below `TOLERANCE`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import numpy as np

from minivit.base.backend import plain
from minivit.layers.attention import attention_backward, attention_forward
from minivit.layers.block import block_forward
from minivit.layers.layernorm import layernorm_backward, layernorm_forward
from minivit.layers.loss import soft_targets, softmax_cross_entropy_backward, softmax_cross_entropy_forward
from minivit.layers.softmax import softmax_forward
from minivit.model import ViT, ViTConfig, attention_map, intermediates
from minivit.optim import EMA, SGD, Adam, AdamW, clip_by_global_norm, learning_rate
from minivit.options.flash_attention import flash_attention_backward, flash_attention_forward
from minivit.options.relative_attention import relative_attention_forward
from minivit.options.stem.conv2d import conv2d_forward
from minivit.options.stem.groupnorm import groupnorm_forward
from minivit.options.stem.max_pool import max_pool_backward, max_pool_forward
from minivit.options.stem.weight_standardization import weight_standardization_forward
from minivit.training.engines.cpu import Engine

TOLERANCE = 1e-10


def _error(actual, expected):
    """Largest difference, relative to the largest expected number; infinite if anything is not finite."""
    actual, expected = np.asarray(actual, float), np.asarray(expected, float)
    if not np.isfinite(actual).all():
        return math.inf
    return float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-300))


def softmax_is_normalised_exponentials():
    """softmax(x)_i = exp(x_i) / sum exp(x_j), for arrays of any rank."""
    x = np.random.default_rng(0).standard_normal((2, 3, 5, 4))
    return _error(softmax_forward(x)[0], np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True))


def attention_is_equations_6_and_7():
    """attention(q, k, v) by a loop over images, heads and tokens."""
    q, k, v = np.random.default_rng(1).standard_normal((3, 2, 3, 5, 4))
    expected = np.zeros_like(q)
    for place in np.ndindex(2, 3, 5):
        weights = np.exp(k[place[:2]] @ q[place] / math.sqrt(4))
        expected[place] = weights @ v[place[:2]] / weights.sum()
    return _error(attention_forward(q, k, v)[0], expected)


def flash_attention_is_attention():
    """Keys taken two or three at a time give attention's results and gradients."""
    rng = np.random.default_rng(1)
    q, k, v, dy = (3.0 * rng.standard_normal((2, 3, 5, 4)) for _ in range(4))
    y, cache = attention_forward(q, k, v)
    expected = (y, *attention_backward(dy, cache))
    errors = []
    for keys in (2, 3, 5):
        y, cache = flash_attention_forward(q, k, v, keys=keys)
        errors += [_error(*pair) for pair in zip((y, *flash_attention_backward(dy, cache)), expected, strict=True)]
    return max(errors)


def relative_attention_is_its_definition():
    """Relative attention by a loop over images, heads, queries and keys; row N - 1 - t of the table is r(t)."""
    rng = np.random.default_rng(1)
    q, k, v = rng.standard_normal((3, 2, 3, 5, 4))
    r, N = rng.standard_normal((1, 9, 4)), 5
    errors = []
    for Q in (5, 3, 1):
        expected = np.zeros((2, 3, Q, 4))
        for b, h, i in np.ndindex(2, 3, Q):
            keys = [k[b, h, j] + r[0, N - 1 - (i - j)] for j in range(N)]
            weights = np.exp([q[b, h, i] @ key / math.sqrt(4) for key in keys])
            expected[b, h, i] = weights @ v[b, h] / weights.sum()
        errors.append(_error(relative_attention_forward(q[:, :, :Q], k, v, r)[0], expected))
    return max(errors)


def layernorm_rows_have_mean_0_and_variance_1():
    """After LayerNorm with w = 1, b = 0 and eps = 0: mean 0, mean square 1."""
    y, _ = layernorm_forward(np.random.default_rng(2).standard_normal((3, 4, 7)), np.ones(7), np.zeros(7), eps=0.0)
    return max(float(np.abs(y.mean(axis=-1)).max()), _error((y * y).mean(axis=-1), np.ones((3, 4))))


def layernorm_gradient_ignores_a_common_shift():
    """Each row of LayerNorm's dx sums to 0: adding a number to a whole row changes nothing."""
    dx = _layernorm_gradient()[0]
    return float(np.abs(dx.sum(axis=-1)).max() / np.abs(dx).max())


def layernorm_gradient_ignores_a_common_scale():
    """Each row of LayerNorm's dx is orthogonal to xhat (with eps = 0): scaling a whole row changes nothing."""
    dx, xhat = _layernorm_gradient()
    return float(np.abs((dx * xhat).sum(axis=-1)).max() / np.abs(dx).max())


def _layernorm_gradient():
    rng = np.random.default_rng(3)
    _, cache = layernorm_forward(rng.standard_normal((3, 4, 7)), rng.standard_normal(7), np.zeros(7), eps=0.0)
    return layernorm_backward(rng.standard_normal((3, 4, 7)), cache)[0], cache.xhat.reshape(3, 4, 7)


def _loss_and_gradients(config, flat):
    """Loss, and {parameter: gradient}, of a batch of random images and labels, the same for every model."""
    rng = np.random.default_rng(6)
    model, (H, C) = ViT(config, flat=flat), (config.image_size, config.channels)
    logits, cache = model.forward(rng.standard_normal((3, H, H, C)))
    loss, loss_cache = softmax_cross_entropy_forward(logits, rng.integers(0, config.num_classes, 3))
    _, grads = model.gradient_buffer()
    model.backward(softmax_cross_entropy_backward(1.0, loss_cache), cache, grads)
    return loss, grads


def _joined(named):
    return np.concatenate([value.ravel() for value in named.values()])


_SMALL = ViTConfig(image_size=4, patch_size=2, channels=1, num_classes=3, width=8, depth=2, num_heads=2, mlp_dim=5)


def _random_model(config):
    """A float64 model away from the zeros of its initialisation; parameters of one name are alike in all of them."""
    model = ViT(config, dtype=np.float64)
    for name, value in model.params.items():
        value += 0.3 * np.random.default_rng(list(name.encode())).standard_normal(value.shape)
    return model


def layer_scale_of_ones_is_none():
    """A model whose LayerScale is 1 has the loss and the gradients of the one without it."""
    bare, scaled = _random_model(_SMALL), _random_model(replace(_SMALL, layer_scale=0.1))
    for name, value in scaled.params.items():
        value[...] = bare.params.get(name, 1.0)
    (loss, grads), (expected_loss, expected) = (_loss_and_gradients(m.config, m.flat) for m in (scaled, bare))
    shared = {name: grads[name] for name in expected}
    return max(_error(loss, expected_loss), _error(_joined(shared), _joined(expected)))


def qk_norm_ignores_the_scale_of_queries_and_keys():
    """With QK-norm, five times the queries and a third of the keys give the same loss and gradients (eps next to 0)."""
    config = replace(_SMALL, qk_norm=True, layernorm_eps=1e-20)
    model, D = _random_model(config), config.width
    expected_loss, expected = _loss_and_gradients(config, model.flat)
    factors = np.repeat([5.0, 1 / 3, 1.0], D)
    for name, value in model.params.items():
        if ".qkv." in name:
            value *= factors
    loss, grads = _loss_and_gradients(config, model.flat)
    unscaled = {name: g * factors if ".qkv." in name else g for name, g in grads.items()}
    return max(_error(loss, expected_loss), _error(_joined(unscaled), _joined(expected)))


def sequence_pooling_of_equal_scores_is_the_mean():
    """With w = 0, sequence pooling has the loss and the gradients of mean pooling, whatever its bias."""
    mean, seq = (_random_model(replace(_SMALL, pooling=pooling)) for pooling in ("mean", "seq"))
    seq.params["attention_pool.weight"][...] = 0.0
    (loss, grads), (expected_loss, expected) = (_loss_and_gradients(m.config, m.flat) for m in (seq, mean))
    shared = {name: grads[name] for name in expected}
    return max(_error(loss, expected_loss), _error(_joined(shared), _joined(expected)))


def convolution_and_pooling_are_their_definitions():
    """Window by window, with an odd border row and column after the map, zeros or -infinity."""
    rng, errors = np.random.default_rng(0), []
    x, w = rng.standard_normal((2, 4, 6, 3)) - 2.0, rng.standard_normal((3, 3, 3, 4))
    conv, pool = conv2d_forward(x, w, stride=2)[0], max_pool_forward(x)[0]
    for r, c in np.ndindex(2, 3):
        window = x[:, 2 * r : 2 * r + 3, 2 * c : 2 * c + 3]  # what lies beyond the map is cut off
        seen = w[: window.shape[1], : window.shape[2]]
        errors.append(conv[:, r, c] - np.tensordot(window, seen, 3))
        errors.append(pool[:, r, c] - window.max(axis=(1, 2)))
    return max(np.abs(error).max() for error in errors)


def of_equal_numbers_the_first_is_pooled():
    """The gradient of a map of equal numbers goes to the first pixel of each window."""
    dx = max_pool_backward(np.ones((1, 2, 2, 1)), max_pool_forward(np.zeros((1, 4, 4, 1)))[1])
    return np.abs(dx[0, :, :, 0] - np.outer([1, 0, 1, 0], [1, 0, 1, 0])).max()


def groupnorm_is_layernorm_of_each_group_of_neighbours():
    """The numbers of a group, all positions of neighbouring channels, are one row of a LayerNorm."""
    x = np.random.default_rng(0).standard_normal((2, 5, 3, 6)) * np.arange(1, 7)
    rows = x.reshape(2, 15, 3, 2).swapaxes(1, 2).reshape(2, 3, 30)  # (B, groups, numbers)
    expected = layernorm_forward(rows, np.ones(30), np.zeros(30))[0].reshape(2, 3, 15, 2).swapaxes(1, 2)
    return np.abs(groupnorm_forward(x, np.ones(6), np.zeros(6), groups=3)[0] - expected.reshape(x.shape)).max()


def kernels_are_standardised():
    """Mean 0 and deviation s / (s + 1e-5), whatever the scale s."""
    w = np.random.default_rng(0).standard_normal((3, 3, 4, 5)) * [1e-6, 1e-5, 1e-3, 1.0, 1e3] + 0.5
    what, s = weight_standardization_forward(w)[0], w.std(axis=(0, 1, 2))
    return max(np.abs(what.mean(axis=(0, 1, 2))).max(), np.abs(what.std(axis=(0, 1, 2)) - s / (s + 1e-5)).max())


def registers_are_a_set():
    """Registers in another order give the same loss, and the same gradients in that order."""
    model = _random_model(replace(_SMALL, registers=3))
    expected_loss, expected = _loss_and_gradients(model.config, model.flat)
    order = [2, 0, 1]
    model.params["reg_token"][...] = model.params["reg_token"][:, order]
    loss, grads = _loss_and_gradients(model.config, model.flat)
    moved = expected | {"reg_token": expected["reg_token"][:, order]}
    return max(_error(loss, expected_loss), _error(_joined(grads), _joined(moved)))


def registers_that_nobody_heeds_change_nothing():
    """Where the blocks answer with nothing (values and MLPs of 0), a model with registers is the one without."""
    errors = []
    for pooling in ("cls", "mean", "avg", "seq", "cls+mean"):
        for positions in ("learned", "sincos2d"):
            found = []
            for registers in (0, 2):
                model = _random_model(replace(_SMALL, registers=registers, pooling=pooling, pos_embed=positions))
                for name, value in model.params.items():
                    if ".proj." in name and "blocks" in name or ".fc2." in name:
                        value[...] = 0.0
                found.append(_loss_and_gradients(model.config, model.flat))
            (expected_loss, expected), (loss, grads) = found
            shared = {name: grads[name] for name in expected if not name.startswith("blocks.")}
            expected = {name: expected[name] for name in shared}
            errors += [_error(loss, expected_loss), _error(_joined(shared), _joined(expected))]
    return max(errors)


def rows_and_columns_are_positions():
    """Learned rows and columns have the loss of a learned position for each patch that is made of them."""
    errors = []
    for pos_at in ("input", "shared", "every"):
        config = replace(_SMALL, image_size=6, registers=1, pos_at=pos_at)
        both = _random_model(replace(config, pos_embed="learned2d"))
        each = _random_model(config)
        for name, value in each.params.items():
            if "pos_embed" in name:  # (1, 1 + 9, D), the class token's first
                X, Y = both.params[f"{name}_x"][0], both.params[f"{name}_y"][0]
                patches = [np.concatenate([X[b], Y[a]]) for a in range(3) for b in range(3)]
                value[...] = np.concatenate([np.zeros((1, 8)), patches])
            else:
                value[...] = both.params[name]
        (loss, grads), (expected_loss, expected) = (_loss_and_gradients(m.config, m.flat) for m in (both, each))
        errors.append(_error(loss, expected_loss))
        for name in (name for name in expected if "pos_embed" in name):
            grid = expected[name][0, 1:].reshape(3, 3, 8)  # rows, columns
            errors.append(_error(grads[f"{name}_x"][0], grid[..., :4].sum(axis=0)))
            errors.append(_error(grads[f"{name}_y"][0], grid[..., 4:].sum(axis=1)))
    return max(errors)


def a_shared_position_has_the_sum_of_the_gradients():
    """Positions of each block that are all the same give the loss of the shared one, whose gradient is their sum."""
    errors = []
    for kind in ("learned", "learned2d", "relative"):
        for axial in ({}, {"attention": "axial", "pooling": "mean"}):
            config = replace(_SMALL, image_size=6, depth=3, pos_embed=kind, pos_at="shared", **axial)
            shared, every = _random_model(config), _random_model(replace(config, pos_at="every"))
            source = {name: "rel_pos" if "rel_pos" in name else name.rpartition(".")[2] for name in every.params}
            for name, value in every.params.items():
                value[...] = shared.params[source[name] if "pos" in name else name]
            (loss, grads), (expected_loss, expected) = (_loss_and_gradients(m.config, m.flat) for m in (shared, every))
            errors.append(_error(loss, expected_loss))
            for name in (name for name in grads if "pos" in name):
                own = [gradient for other, gradient in expected.items() if "pos" in other and source[other] == name]
                errors.append(_error(grads[name], sum(own)) if len(own) == 3 else math.inf)
    return max(errors)


def axial_blocks_take_rows_and_columns_alone():
    """Each block of an axial model is the ordinary one of one row, or column, after the other; its maps say so."""
    config = replace(_SMALL, image_size=6, attention="axial", pooling="mean", pos_embed="none", depth=3)
    model = _random_model(config)
    seen = intermediates(model, np.random.default_rng(0).standard_normal((2, 6, 6, 1)))
    tokens, errors = np.arange(9).reshape(3, 3), []
    for i, (z, after, maps) in enumerate(zip(seen.features, seen.features[1:], seen.attention, strict=False)):
        outside = np.ones((9, 9), bool)
        for line in tokens.T if i % 2 else tokens:
            params = {name.removeprefix(f"blocks.{i}."): p for name, p in model.params.items()}
            with plain():  # twins keep no maps
                expected, cache = block_forward(z[:, line], params, num_heads=2)
            errors.append(_error(after[:, line], expected))
            errors.append(_error(maps[:, :, line[:, None], line], attention_map(cache)))
            outside[line[:, None], line] = False
        errors.append(float(np.abs(maps[:, :, outside]).max()))
    return max(errors)


def equal_logits_cost_ln_k():
    """Cross-entropy of equal logits is ln K, smoothed or not."""
    losses = [
        softmax_cross_entropy_forward(np.zeros((3, 7)), np.array([0, 3, 6]), label_smoothing=s)[0] for s in (0, 0.3)
    ]
    return _error(losses, [math.log(7)] * 2)


def large_logits_are_no_trouble():
    """Cross-entropy of logits of 10,000, one right and one wrong."""
    with np.errstate(all="ignore"):
        loss, _ = softmax_cross_entropy_forward(np.array([[1e4, 0.0], [1e4, 0.0]]), np.array([0, 1]))
    return _error(loss, 5e3)


def targets_are_probabilities():
    """Smoothed targets of a row sum to 1."""
    return _error(soft_targets(np.array([0, 2]), 4, 0.2, np.float64).sum(axis=1), np.ones(2))


def _two_steps(kind, **settings):
    theta, mask = np.array([1.0, -2.0, 3.0]), np.array([1.0, 1.0, 0.0])
    optimizer = kind(theta, mask, **settings)
    for g in (np.array([0.5, 1.0, -1.0]), np.array([-1.0, 0.25, 2.0])):
        optimizer.step(theta, g, 0.1)
    return theta


def sgd_by_scalars():
    """Two steps of SGD with momentum and masked decay, one number at a time."""
    expected = []
    for theta, c, gradients in ((1.0, 1, (0.5, -1.0)), (-2.0, 1, (1.0, 0.25)), (3.0, 0, (-1.0, 2.0))):
        m = 0.0
        for g in gradients:
            m = 0.9 * m + g + 0.2 * c * theta
            theta -= 0.1 * m
        expected.append(theta)
    return _error(_two_steps(SGD, momentum=0.9, weight_decay=0.2), expected)


def _adam_by_scalars(kind, decoupled):
    expected = []
    for theta, c, gradients in ((1.0, 1, (0.5, -1.0)), (-2.0, 1, (1.0, 0.25)), (3.0, 0, (-1.0, 2.0))):
        m = v = 0.0
        for t, g in enumerate(gradients, start=1):
            if decoupled:
                theta -= 0.1 * 0.2 * c * theta
            else:
                g += 0.2 * c * theta
            m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
            theta -= 0.1 * (m / (1 - 0.8**t)) / (math.sqrt(v / (1 - 0.95**t)) + 1e-2)
        expected.append(theta)
    return _error(_two_steps(kind, betas=(0.8, 0.95), eps=1e-2, weight_decay=0.2), expected)


def adam_by_scalars():
    """Two steps of Adam with L2 decay, one number at a time."""
    return _adam_by_scalars(Adam, decoupled=False)


def adamw_by_scalars():
    """Two steps of AdamW, one number at a time."""
    return _adam_by_scalars(AdamW, decoupled=True)


def _adam_after_two_steps(**settings):
    theta = np.array([1.0, -2.0])
    adam = Adam(theta, np.zeros(2), betas=(0.8, 0.95), eps=1e-2, **settings)
    for g in (np.array([0.5, 1.0]), np.array([-1.0, 0.25])):
        adam.step(theta, g, 0.1)
    return adam


def adam_first_moment_by_its_formula():
    """Adam's m after two steps: b1 (1 - b1) g_1 + (1 - b1) g_2."""
    return _error(_adam_after_two_steps().state["m"], 0.8 * 0.2 * np.array([0.5, 1]) + 0.2 * np.array([-1, 0.25]))


def adam_second_moment_by_its_formula():
    """Adam's v after two steps: b2 (1 - b2) g_1^2 + (1 - b2) g_2^2."""
    g1, g2 = np.array([0.5, 1.0]), np.array([-1.0, 0.25])
    return _error(_adam_after_two_steps().state["v"], 0.95 * 0.05 * g1**2 + 0.05 * g2**2)


def adam_first_step_has_length_lr():
    """Adam's first step is lr in each coordinate, whatever the gradient's size (eps = 0)."""
    theta = np.zeros(3)
    Adam(theta, np.zeros(3), eps=0.0).step(theta, np.array([1e-3, -2.0, 1e3]), 0.1)
    return _error(theta, [-0.1, 0.1, -0.1])


def decay_spares_what_the_mask_spares():
    """With zero gradients and decay, all optimisers move the masked entry and leave the other alone."""
    errors = []
    for kind in (SGD, Adam, AdamW):
        theta = np.array([1.0, 1.0])
        kind(theta, np.array([1.0, 0.0]), weight_decay=0.5).step(theta, np.zeros(2), 0.1)
        errors += [abs(theta[1] - 1.0), 0.0 if theta[0] < 1.0 else 1.0]
    return max(errors)


def clipping_limits_the_norm_and_nothing_else():
    """A gradient of norm 5 is scaled to norm 2; one of norm 0.5 is left alone."""
    long, short = np.array([3.0, 4.0]), np.array([0.3, 0.4])
    clip_by_global_norm(long, 2.0)
    clip_by_global_norm(short, 2.0)
    return max(_error(long, [1.2, 1.6]), _error(short, [0.3, 0.4]))


def the_schedule_peaks_after_the_warm_up():
    """Full rate when the warm-up ends, half of it half way from there to the end."""
    rates = [learning_rate(step, 110, lr=1.0, warmup_steps=10) for step in (10, 60)]
    return _error(rates, [1.0, 0.5])


def the_average_by_its_formula():
    """Three updates of the moving average."""
    theta, expected = np.array([1.0]), 1.0
    ema = EMA(theta, 0.25)
    for t in (1, 2, 3):
        theta += 1.0
        ema.update(theta)
        d = min(0.25, (1 + t) / (10 + t))
        expected = d * expected + (1 - d) * theta[0]
    return _error(ema.flat, [expected])


def micro_batches_add_up_to_the_batch():
    """The engine's gradient with two workers and small parts is that of the whole batch, also the second time."""
    config = ViTConfig(image_size=4, patch_size=2, channels=1, num_classes=3, width=6, depth=2, num_heads=2, mlp_dim=5)
    rng = np.random.default_rng(5)
    model = ViT(config, dtype=np.float64)
    model.flat += 0.3 * rng.standard_normal(model.flat.shape)
    images, labels = rng.standard_normal((5, 4, 4, 1)), rng.integers(0, 3, 5)
    logits, cache = model.forward(images)
    _, loss_cache = softmax_cross_entropy_forward(logits, labels)
    expected, grads = model.gradient_buffer()
    model.backward(softmax_cross_entropy_backward(1.0, loss_cache), cache, grads)
    with Engine(model, workers=2, micro_batch=1) as engine:
        errors = []
        for _ in range(2):
            engine.gradient(images, labels)
            errors.append(_error(engine.grad, expected))
    return max(errors)


def by_the_book(fact):
    """The fact with twins switched off: facts are of the book."""

    @functools.wraps(fact)
    def of_the_book():
        with plain():
            return fact()

    return of_the_book


FACTS = {
    function.__name__: by_the_book(function)
    for function in (
        softmax_is_normalised_exponentials,
        attention_is_equations_6_and_7,
        flash_attention_is_attention,
        relative_attention_is_its_definition,
        layernorm_rows_have_mean_0_and_variance_1,
        layernorm_gradient_ignores_a_common_shift,
        layernorm_gradient_ignores_a_common_scale,
        layer_scale_of_ones_is_none,
        qk_norm_ignores_the_scale_of_queries_and_keys,
        sequence_pooling_of_equal_scores_is_the_mean,
        convolution_and_pooling_are_their_definitions,
        of_equal_numbers_the_first_is_pooled,
        groupnorm_is_layernorm_of_each_group_of_neighbours,
        kernels_are_standardised,
        registers_are_a_set,
        registers_that_nobody_heeds_change_nothing,
        rows_and_columns_are_positions,
        a_shared_position_has_the_sum_of_the_gradients,
        axial_blocks_take_rows_and_columns_alone,
        equal_logits_cost_ln_k,
        large_logits_are_no_trouble,
        targets_are_probabilities,
        sgd_by_scalars,
        adam_by_scalars,
        adamw_by_scalars,
        adam_first_moment_by_its_formula,
        adam_second_moment_by_its_formula,
        adam_first_step_has_length_lr,
        decay_spares_what_the_mask_spares,
        clipping_limits_the_norm_and_nothing_else,
        the_schedule_peaks_after_the_warm_up,
        the_average_by_its_formula,
        micro_batches_add_up_to_the_batch,
    )
}
