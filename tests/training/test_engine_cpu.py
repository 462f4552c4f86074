"""The engine: micro-batches and threads change neither the gradient nor, for the same settings, a single bit."""

import ctypes
import os
import platform
import threading
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import close_calls
from threadpoolctl import threadpool_info, threadpool_limits

from minivit import ViT, ViTConfig, softmax_cross_entropy_backward, softmax_cross_entropy_forward
from minivit.training.engines import cpu, cut
from minivit.training.engines.cpu import Engine
from minivit.training.engines.cut import available_cores
from minivit.training.task import correct_count, cross_entropy

SETTINGS = {"image_size": 8, "patch_size": 2, "channels": 2, "num_classes": 5, "width": 12, "depth": 2, "num_heads": 3}


def model_of(dtype=np.float64, **changes):
    model = ViT(ViTConfig(**SETTINGS, **changes), dtype=dtype)
    model.flat += (0.2 * np.random.default_rng(0).standard_normal(model.flat.shape)).astype(dtype)
    return model


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (23, 8, 8, 2), dtype=np.uint8), rng.integers(0, 5, 23)


def whole_batch(model, images, labels, **settings):
    logits, cache = model.forward(images)
    assert not close_calls(logits)
    loss, loss_cache = softmax_cross_entropy_forward(logits, labels, **settings)
    flat, grads = model.gradient_buffer()
    model.backward(softmax_cross_entropy_backward(1.0, loss_cache), cache, grads)
    return loss, flat, (logits.argmax(axis=1) == labels).sum()


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [1, 4, 23, 50])
def test_micro_batches_add_up_to_the_batch(data, workers, micro_batch):
    model = model_of()
    loss, flat, correct = whole_batch(model, *data, label_smoothing=0.1)
    with Engine(model, partial(cross_entropy, label_smoothing=0.1), workers=workers, micro_batch=micro_batch) as engine:
        for _ in range(2):  # the second call must not add to the first
            result = engine.gradient(*data)
        assert np.isclose(result.loss, loss, rtol=1e-12)
        assert result.correct == correct
        np.testing.assert_allclose(engine.grad, flat, rtol=1e-9, atol=1e-14)


def test_soft_targets_and_their_count(data):
    model, (images, labels) = model_of(), data
    with Engine(model, workers=2, micro_batch=4) as engine:
        hard = engine.gradient(images, labels)
        gradient = engine.grad.copy()
        soft = engine.gradient(images, np.eye(5)[labels])
        np.testing.assert_allclose(engine.grad, gradient, rtol=1e-12, atol=1e-16)
    assert soft.correct == hard.correct == correct_count(model.predict(images), labels)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_same_settings_give_the_same_bits(data, workers):
    """With dropout, in float32; threads against the same work done one after the other in one thread."""
    model = model_of(np.float32, dropout=0.2, attention_dropout=0.2, drop_path=0.2)

    class OneByOne:
        def map(self, work, items):
            return [work(w) for w in reversed(list(items))][::-1]  # in the opposite order, too

        def shutdown(self):
            pass

    gradients = []
    for serial in (False, False, True):
        with Engine(model, workers=workers, micro_batch=3, seed=7) as engine:
            if serial:
                engine._pool.shutdown()
                engine._pool = OneByOne()
            for step in range(3):
                result = engine.gradient(*data, step=step)
            gradients.append((engine.grad.tobytes(), float(result.loss)))
    assert gradients[0] == gradients[1] == gradients[2]


def test_dropout_differs_by_step_seed_and_micro_batch(data):
    images, labels = data
    model = model_of(dropout=0.3)
    same = np.repeat(images[:1], 4, axis=0), np.repeat(labels[:1], 4)
    with Engine(model, workers=1, micro_batch=2, seed=7) as engine:
        engine.gradient(*same, step=0)
        first = engine.grad.copy()
        engine.gradient(*same, step=0)
        np.testing.assert_array_equal(engine.grad, first)
        engine.gradient(*same, step=1)
        assert not np.array_equal(engine.grad, first)
        engine.gradient(same[0][:2], same[1][:2], step=0)
        assert not np.allclose(engine.grad, first, rtol=1e-6)  # else both micro-batches had the same masks
    with Engine(model, workers=1, micro_batch=2, seed=8) as engine:
        engine.gradient(*same, step=0)
        assert not np.array_equal(engine.grad, first)


@pytest.mark.parametrize("workers", [1, 2])
def test_accumulated_batches_are_one_batch(data, workers):
    images, labels = data
    model = model_of()
    loss, flat, _ = whole_batch(model, images, labels)
    with Engine(model, workers=workers, micro_batch=4) as engine:
        total = 0.0
        for k, part in enumerate((slice(0, 10), slice(10, 20), slice(20, 23))):
            total += engine.gradient(images[part], labels[part], denominator=23, accumulate=k > 0).loss
        np.testing.assert_allclose(engine.grad, flat, rtol=1e-9, atol=1e-14)
        assert np.isclose(total, loss, rtol=1e-12)


@pytest.mark.parametrize("workers", [1, 2])
def test_frozen_parameters_have_no_gradient_and_the_others_the_same(data, workers):
    images, labels = data
    model = model_of()
    trained = np.random.default_rng(2).integers(0, 2, model.flat.size).astype(float)
    grads = []
    for mask in (None, trained):
        with Engine(model, workers=workers, micro_batch=4, trained=mask) as engine:
            for k, part in enumerate((slice(0, 10), slice(10, 23))):
                engine.gradient(images[part], labels[part], denominator=23, accumulate=k > 0)
            grads.append(engine.grad.copy())
    np.testing.assert_array_equal(grads[1], grads[0] * trained)
    assert 0 < np.count_nonzero(grads[1]) < np.count_nonzero(grads[0])


def test_predict_streams_every_image(data):
    model = model_of()
    expected = model.predict(data[0])
    other = model_of()
    other.flat += 1.0
    with Engine(model, workers=2, micro_batch=4) as engine:
        np.testing.assert_allclose(engine.predict(data[0]), expected, rtol=1e-10)
        np.testing.assert_allclose(engine.predict(data[0], other), other.predict(data[0]), rtol=1e-10)


def test_features_are_streamed_too(data):
    model = model_of(pre_logits=7)
    with Engine(model, workers=3, micro_batch=5) as engine:
        features = engine.predict(data[0], features=True)
    assert features.shape == (23, 7)
    np.testing.assert_allclose(features, model.features(data[0]), rtol=1e-10)


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 23, 24, 25])
def test_predict_cuts_by_the_micro_batch_alone_and_does_each_part_once(monkeypatch, workers, count):
    model, found = model_of(), []
    images = np.zeros((count, 8, 8, 2), np.uint8)
    images[:, 0, 0, 0] = np.arange(count)
    predict = model.predict
    monkeypatch.setattr(model, "predict", lambda part: found.append(part[:, 0, 0, 0].tolist()) or predict(part))
    with Engine(model, workers=workers, micro_batch=4) as engine:
        assert engine.predict(images).shape == (count, 5)
    assert sorted(found) == [list(range(count))[i : i + 4] for i in range(0, count, 4)]


def test_blas_has_one_thread_inside_and_the_callers_setting_after():
    def threads():
        return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

    with threadpool_limits(2, user_api="blas"):
        before = threads()
        assert 2 in before
        with Engine(model_of(), workers=2):
            assert set(threads()) == {1}
        assert threads() == before


def test_an_error_in_a_worker_reaches_the_caller_and_threads_end(data):
    images, labels = data
    with pytest.raises(ValueError, match="labels must lie in"), Engine(model_of(), workers=2, micro_batch=4) as engine:
        engine.gradient(images, labels + 5)
    assert not [t for t in threading.enumerate() if t.name.startswith("minivit")]


def test_dropout_draws_from_the_stream_of_seed_step_and_micro_batch(data):
    """[seed, 3, step, micro-batch], written out: another order would change every run that was ever made."""
    images, labels = data[0][:6], data[1][:6]
    model = model_of(dropout=0.3)
    for settings, call, seed, step in (({}, {}, 0, 0), ({"seed": 7}, {"step": 5}, 7, 5)):
        expected, grads = model.gradient_buffer()
        for m, part in enumerate((slice(0, 3), slice(3, 6))):
            logits, cache = model.forward(images[part], rng=np.random.default_rng([seed, 3, step, m]))
            _, loss_cache = softmax_cross_entropy_forward(logits, labels[part], denominator=6)
            model.backward(softmax_cross_entropy_backward(1.0, loss_cache), cache, grads)
        with Engine(model, workers=2, micro_batch=4, **settings) as engine:
            engine.gradient(images, labels, **call)
            np.testing.assert_allclose(engine.grad, expected, rtol=1e-9, atol=1e-14)


def test_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0: {1, 4, 6}}[process], raising=False)
    assert available_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    for count, expected in ((5, 5), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        assert available_cores() == expected


def test_a_worker_for_every_core_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr(cpu, "available_cores", lambda: 5)
    model = model_of()
    default, told = Engine(model), Engine(model, workers=3, micro_batch=4)
    assert (default.workers, default.micro_batch, len(default._buffers)) == (5, 60, 5)  # of 17 tokens each
    assert (told.workers, told.micro_batch, len(told._buffers)) == (3, 4, 3)
    assert told.parts(12) == [slice(0, 4), slice(4, 8), slice(8, 12)]


def test_a_micro_batch_is_about_a_thousand_tokens():
    sizes = {"Mini/4": 16, "Mini/2": 4, "Ti/16": 5, "B/8": 1, "H/14": 4}
    assert {name: cut.default_micro_batch(ViTConfig.preset(name)) for name in sizes} == sizes
    assert cut.default_micro_batch(ViTConfig(patch_size=1, image_size=64)) == 1
    stems = {"R26+S/32": 5, "R50+L/32": 5, "R50+B/16": 5}  # of 50, 50 and 197 tokens
    assert {name: cut.default_micro_batch(ViTConfig.preset(name)) for name in stems} == stems
    assert cut.default_micro_batch(ViTConfig(stem="root", patch_size=2)) == 60
    assert cut.default_micro_batch(ViTConfig(patch_size=4, image_size=4, pooling="mean")) == 1024


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 23, 24, 25, 100])
def test_micro_batches_cover_the_batch_and_keep_every_worker_busy(workers, count):
    engine = Engine(model_of(), workers=workers, micro_batch=4)
    parts = engine.parts(count)
    sizes = [part.stop - part.start for part in parts]
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(count))
    assert all(0 < size <= 4 for size in sizes)
    totals = [sum(sizes[w::workers]) for w in range(workers)]
    rounds = -(-count // (4 * workers))
    assert len(parts) == min(rounds * workers, count) and max(totals) - min(totals) <= max(rounds, 1)


def test_the_callers_blas_setting_is_back_and_threads_have_a_name(data):
    with threadpool_limits(2, user_api="blas"):
        before = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
        with Engine(model_of(), workers=2, micro_batch=4) as engine:
            engine.gradient(*data)
            assert [t for t in threading.enumerate() if t.name.startswith("minivit")]
        assert [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"] == before


@pytest.mark.parametrize(
    ("library", "expected"), [("glibc", {"mmap": 32 << 20, "trim": 1 << 30, "top": 64 << 20}), ("musl", {}), ("", {})]
)
def test_what_malloc_is_told_and_whose(monkeypatch, library, expected):
    told = {}
    options = {-1: "trim", -2: "top", -3: "mmap"}  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD of <malloc.h>
    malloc = SimpleNamespace(mallopt=lambda option, value: told.update({options[option]: value}))
    monkeypatch.setattr(platform, "libc_ver", lambda: (library, "2.39"))
    monkeypatch.setattr(ctypes, "CDLL", {None: malloc}.__getitem__)
    cpu.keep_freed_memory()
    assert told == expected


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept_for_the_next_micro_batch():
    resource = pytest.importorskip("resource")

    def pages_fetched():
        def faults():
            return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt

        np.ones(1 << 21)  # 16 MiB, written and freed
        before = faults()
        for _ in range(4):
            np.ones(1 << 21)
        return faults() - before

    with Engine(model_of(), workers=1) as engine:
        assert engine._pool.submit(pages_fetched).result() < 100  # 16,000 if the blocks came fresh each time


def test_recomputing_changes_no_bit(data):
    model = model_of(np.float32, dropout=0.2, attention_dropout=0.2, drop_path=0.2)
    gradients = []
    for recompute in (False, True):
        with Engine(model, partial(cross_entropy, recompute=recompute), workers=2, micro_batch=3, seed=7) as engine:
            engine.gradient(*data, step=3)
            gradients.append(engine.grad.tobytes())
    assert gradients[0] == gradients[1]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [({}, "BlockCache"), ({"label_smoothing": 0.1}, "BlockCache"), ({"recompute": True}, "RecomputeCache")],
)
def test_of_a_block_its_cache_is_kept_or_when_recomputing_its_input_alone(data, monkeypatch, settings, kept):
    model, found = model_of(), []
    backward = model.backward

    def noting(dlogits, cache, grads):
        found.extend(type(block).__name__ for block in cache.blocks)
        backward(dlogits, cache, grads)

    monkeypatch.setattr(model, "backward", noting)
    with Engine(model, partial(cross_entropy, **settings), workers=1, micro_batch=23) as engine:
        engine.gradient(*data)
    assert found == [kept] * 2


def test_what_makes_no_sense_is_refused(data):
    for settings in ({"workers": -1}, {"micro_batch": -1}):
        with pytest.raises(
            ValueError, match=f"workers and micro_batch must be at least 0, got .*{min(settings.values())}"
        ):
            Engine(model_of(), **settings)
    with Engine(model_of(), workers=2) as engine, pytest.raises(ValueError, match="the batch has no image"):
        engine.gradient(data[0][:0], data[1][:0])


def test_there_are_no_more_threads_than_cores_and_the_bits_are_those_of_many(data, monkeypatch):
    model, gradients = model_of(np.float32, dropout=0.2), []
    for cores, threads in ((1, 1), (2, 2), (8, 3)):
        monkeypatch.setattr(cpu, "available_cores", lambda cores=cores: cores)
        with Engine(model, workers=3, micro_batch=4) as engine:
            for _ in range(5):
                engine.gradient(*data)
            assert len([t for t in threading.enumerate() if t.name.startswith("minivit")]) <= threads
            gradients.append(engine.grad.tobytes())
    assert gradients[0] == gradients[1] == gradients[2]
