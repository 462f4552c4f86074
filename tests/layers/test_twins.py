"""The twins of `minivit.kernels.cpu` beside the book: the same numbers, layer by layer and in whole models."""

import numpy as np
import pytest

from minivit import ViT, ViTConfig, softmax_cross_entropy_backward, softmax_cross_entropy_forward
from minivit.base.backend import plain
from minivit.kernels import cpu
from minivit.laboratory.cases import LAYERS, MODEL_BATCH, MODELS, TWINS
from minivit.layers.attention import attention_forward
from minivit.layers.softmax import softmax_forward


def build(name, seed=0):
    return LAYERS[name](np.random.default_rng(seed))


def call_backward(backward, dy, cache):
    gradients = backward(dy, cache)
    return list(gradients) if isinstance(gradients, tuple) else [gradients]


def reaches_a_twin(cache):
    """Whether a cache, or one within it, is a twin's."""
    if type(cache).__module__ == cpu.__name__:
        return True
    return isinstance(cache, tuple) and any(map(reaches_a_twin, cache))


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize(("dtype", "limit"), [(np.float32, 3e-6), (np.float64, 1e-14)])
def test_a_twin_gives_the_numbers_of_the_book(name, dtype, limit):
    """Forward and every gradient, to rounding."""
    book, twin = build(name), build(f"{name}-twin")
    args = [a.astype(dtype) for a in book[2]]
    (y, cache), (expected, book_cache) = twin[0](*args), book[0](*args)
    assert reaches_a_twin(cache) and not reaches_a_twin(book_cache)
    dy = np.random.default_rng(1).standard_normal(np.shape(y)).astype(dtype)
    twins = [y, *call_backward(twin[1], dy, cache)]
    wanted = [expected, *call_backward(book[1], dy, book_cache)]
    largest = max(np.abs(b).max() for b in wanted)
    for a, b in zip(twins, wanted, strict=True):
        assert a.dtype == dtype and np.abs(a - b).max() <= limit * max(np.abs(b).max(), 0.1 * largest) * 10


@pytest.mark.parametrize("name", TWINS)
def test_twins_stand_in_unless_they_are_switched_off(name):
    forward, _, args, _ = build(f"{name}-twin")
    assert reaches_a_twin(forward(*args)[1])
    with plain():
        assert not reaches_a_twin(forward(*args)[1])
    assert not reaches_a_twin(build(name)[0](*args)[1])


def test_every_twin_is_checked_beside_the_book():
    """Each forward of `minivit.kernels.cpu` has a case of its name, or stands in the block of the first tokens."""
    forwards = {name.removesuffix("_forward") for name, f in vars(cpu).items() if name.endswith("_forward")
                if f.__module__ == cpu.__name__}  # fmt: skip
    assert forwards - {"first_tokens"} == {name.partition("-")[0] for name in TWINS}
    cache = build("block-first-twin")[0](*build("block-first-twin")[2])[1]
    assert type(cache.cache) is cpu.BlockCache


def loss_and_gradient(config, flat, images, labels):
    model = ViT(config, flat=flat)
    logits, cache = model.forward(images, rng=np.random.default_rng(5))
    loss, loss_cache = softmax_cross_entropy_forward(logits, labels, label_smoothing=0.1)
    flat, grads = model.gradient_buffer()
    model.backward(softmax_cross_entropy_backward(1.0, loss_cache), cache, grads)
    return loss, flat, cache


@pytest.mark.parametrize(("dtype", "limit"), [(np.float32, 2e-5), (np.float64, 1e-13)])
@pytest.mark.parametrize("name", MODELS)
def test_a_whole_step_is_that_of_the_book(name, dtype, limit):
    """The loss of bytes and the gradient of every parameter, dropout included, with twins and with none."""
    if name == "vit-erf":
        pytest.importorskip("scipy")
    config, rng = ViTConfig(**MODELS[name]), np.random.default_rng(0)
    flat = ViT(config, dtype=np.float64).flat
    flat = (flat + 0.3 * rng.standard_normal(flat.shape)).astype(dtype)
    size = config.image_size
    images = rng.integers(0, 256, (MODEL_BATCH, size, size, config.channels), dtype=np.uint8)
    labels = rng.integers(0, config.num_classes, MODEL_BATCH)
    loss, gradient, cache = loss_and_gradient(config, flat, images, labels)
    with plain():
        expected_loss, expected, book_cache = loss_and_gradient(config, flat, images, labels)
    assert reaches_a_twin(cache) and not reaches_a_twin(book_cache)
    assert loss.dtype == gradient.dtype == dtype
    assert abs(loss - expected_loss) <= limit * abs(expected_loss)
    assert np.abs(gradient - expected).max() <= limit * np.abs(expected).max()


@pytest.mark.parametrize(("name", "argument"), [
    ("linear", 0), ("linear", 1), ("linear", 2), ("layernorm", 0), ("layernorm", 1), ("layernorm", 2), ("attention", 0),
    ("attention", 1), ("attention", 2), ("msa", 0), ("msa", 1), ("patch_embed-bytes", 0), ("patch_embed-bytes", 1),
    ("patch_embed-bytes", 2), ("patch_embed-bytes", 3),
])  # fmt: skip
def test_arrays_of_two_types_go_to_the_book(name, argument):
    """NumPy's promotion says what becomes of them; a twin would write into an array of the wrong type."""
    forward, _, args, _ = build(f"{name}-twin")
    args = [a.astype(np.float32 if k == argument else np.float64) for k, a in enumerate(args)]
    cache = forward(*args)[1]
    assert type(cache).__module__ != cpu.__name__


@pytest.mark.parametrize("name", ["linear", "layernorm", "gelu", "softmax", "attention", "msa", "block"])
def test_complex_numbers_go_to_the_book(name):
    forward, _, args, _ = build(f"{name}-twin")
    assert reaches_a_twin(forward(*args)[1])
    assert not reaches_a_twin(forward(*[a.astype(complex) for a in args])[1])


@pytest.mark.parametrize("high", [1e3, 1e4])
def test_scores_of_any_size_do_not_overflow(high):
    """The maximum of each row is subtracted: exp(1000) is infinite."""
    x = np.array([[high, 0.0, high], [-high, 0.0, -2.0 * high]])
    with np.errstate(all="raise", under="ignore"):
        y, cache = softmax_forward(x)
        mixed, attention_cache = attention_forward(x[:, :1], np.array([[1.0], [0.0]]), np.array([[3.0], [5.0]]))
    assert reaches_a_twin(cache) and reaches_a_twin(attention_cache)
    np.testing.assert_allclose(y, [[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]], atol=1e-15)
    np.testing.assert_allclose(mixed, [[3.0], [5.0]], atol=1e-15)


def test_vectors_of_ones_are_shared_and_cannot_be_written_to():
    ones = cpu.ones(5, np.dtype(np.float32))
    assert ones is cpu.ones(5, np.dtype(np.float32)) and np.array_equal(ones, np.ones(5, np.float32))
    with pytest.raises(ValueError, match="read-only"):
        ones[0] = 2.0


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_layernorms_eps_reaches_the_twins(pooling):
    config = ViTConfig(**MODELS["vit"] | {"layernorm_eps": 0.5, "pooling": pooling})
    rng = np.random.default_rng(0)
    flat = ViT(config, dtype=np.float64).flat
    flat += 0.3 * rng.standard_normal(flat.shape)
    images = rng.integers(0, 256, (2, config.image_size, config.image_size, config.channels), dtype=np.uint8)
    logits, cache = ViT(config, flat=flat).forward(images)
    with plain():
        expected, _ = ViT(config, flat=flat).forward(images)
    assert all(type(each).__module__ == cpu.__name__ for each in cache.blocks)
    np.testing.assert_allclose(logits, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("changes", [
    {"qk_norm": True}, {"gelu": "erf"}, {"mlp": "swiglu", "mlp_dim": 14},
    {"layer_scale": 0.1}, {"pos_embed": "relative", "pos_at": "every"},
], ids=lambda changes: next(iter(changes)))  # fmt: skip
def test_a_block_with_an_option_is_not_computed_as_the_plain_one(changes):
    """The twin of the block is for the plain block; those of its layers do their part."""
    if changes.get("gelu") == "erf":
        pytest.importorskip("scipy")
    config = ViTConfig(**MODELS["vit"] | changes)
    images = np.zeros((2, config.image_size, config.image_size, config.channels), np.uint8)
    _, cache = ViT(config).forward(images)
    assert not any(type(each).__module__ == cpu.__name__ for each in cache.blocks)
