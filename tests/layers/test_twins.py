"""The twins of `minivit.kernels.cpu` beside the book: the same numbers, layer by layer and in whole models."""

import numpy as np
import pytest

from minivit import ViT, ViTConfig, softmax_cross_entropy_backward, softmax_cross_entropy_forward
from minivit.base.backend import plain
from minivit.kernels import cpu
from minivit.laboratory.cases import LAYERS, MODEL_BATCH, MODELS, TWINS


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
