"""Batches: pure functions of seed, epoch and index, the same ahead of time or not."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import numpy as np
import pytest

from minivit.data import batches, epoch_order, is_epoch_order

N = 43


@pytest.fixture
def data():
    images = np.random.default_rng(0).integers(0, 256, (N, 8, 8, 3), dtype=np.uint8)
    return images, np.arange(N, dtype=np.int64)


def loaded(data, **settings):
    defaults = {"seed": 3, "epoch": 2, "crop_padding": 2, "flip": True}
    settings = defaults | settings
    order = epoch_order(N, seed=settings["seed"], epoch=settings["epoch"])
    return list(batches(*data, order, 8, **settings))


def assert_same(left, right):
    assert len(left) == len(right) > 0
    for (i, images, labels), (j, other_images, other_labels) in zip(left, right, strict=True):
        assert i == j
        np.testing.assert_array_equal(images, other_images)
        np.testing.assert_array_equal(labels, other_labels)


def worker_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("minivit-batches")]


def test_order_is_a_permutation_of_its_own_for_each_seed_and_epoch():
    orders = [epoch_order(N, seed=seed, epoch=epoch) for seed in (0, 1, 2**40) for epoch in (0, 1)]
    for order in orders:
        assert order.dtype == np.int64
        np.testing.assert_array_equal(np.sort(order), np.arange(N))
    assert len({order.tobytes() for order in orders}) == len(orders)
    np.testing.assert_array_equal(orders[0], epoch_order(N, seed=0, epoch=0))


def test_order_is_the_one_of_earlier_versions():
    assert epoch_order(8, seed=0, epoch=0).tolist() == [3, 1, 6, 5, 7, 2, 0, 4]


def test_what_is_the_order_of_an_epoch():
    assert is_epoch_order(np.array([4, 0, 3, 1, 2]), 5) and is_epoch_order(epoch_order(N, seed=3, epoch=1), N)
    for order in (
        [4, 0, 3, 1, 1], [5, 0, 3, 1, 2], [-1, 0, 3, 1, 2], [4, 0, 3, 1], [4, 0, 3, 1, 2, 5], [4.0, 0.0, 3.0, 1.0, 2.0],
        [[4, 0, 3, 1, 2]], ["4", "0", "3", "1", "2"],
    ):  # fmt: skip
        assert not is_epoch_order(np.array(order), 5), order
    assert is_epoch_order(np.array([1, 0]), 2) and not is_epoch_order(np.array([True, False]), 2)


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_batches_cover_the_order(data):
    images, labels = data
    order = epoch_order(N, seed=0, epoch=0)
    result = list(batches(images, labels, order, 8, seed=0, epoch=0))
    assert [index for index, _, _ in result] == list(range(6))
    np.testing.assert_array_equal(np.concatenate([part for _, part, _ in result]), images[order])
    np.testing.assert_array_equal(np.concatenate([part for _, _, part in result]), order)


def test_drop_last(data):
    assert [len(labels) for _, _, labels in loaded(data)] == [8, 8, 8, 8, 8, 3]
    assert [len(labels) for _, _, labels in loaded(data, drop_last=True)] == [8] * 5


def test_prefetching_changes_nothing(data):
    inline = loaded(data, prefetch=0)
    for prefetch in (1, 2, 20):
        assert_same(loaded(data, prefetch=prefetch), inline)


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("start", [1, 3, 5])
def test_starting_in_the_middle_continues_a_full_pass(data, start, prefetch):
    assert_same(loaded(data, start=start, prefetch=prefetch), loaded(data)[start:])


def test_starting_at_the_end_yields_nothing(data):
    assert loaded(data, start=6) == loaded(data, start=9) == []


def test_augmentation_differs_between_batches_epochs_and_seeds():
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    images, labels = np.repeat(image, 2, axis=0), np.zeros(2, np.int64)
    seen = set()
    for seed in (0, 1):
        for epoch in (0, 1):
            for _, batch, _ in batches(images, labels, np.arange(2), 1, seed=seed, epoch=epoch, crop_padding=16):
                seen.add(batch.tobytes())
    assert len(seen) == 8


MIXING = {"num_classes": N, "mixup_alpha": 0.5, "cutmix_alpha": 1.0, "probability": 0.7}
ALL = {"policy": "trivial", "erasing": 0.4, "mixing": MIXING}


@pytest.mark.parametrize("prefetch", [0, 2])
def test_mixed_batches_continue_exactly_too(data, prefetch):
    assert_same(loaded(data, start=2, prefetch=prefetch, **ALL), loaded(data, **ALL)[2:])


def test_mixing_gives_targets_to_every_batch(data):
    plain, mixed = loaded(data), loaded(data, mixing=MIXING)
    changed = 0
    for (_, images, labels), (_, others, targets) in zip(plain, mixed, strict=True):
        assert targets.shape == (len(labels), N) and targets.dtype == np.float32
        same = (targets == np.eye(N)[labels]).all()
        assert same == (others == images).all()  # what is not mixed is the batch without mixing
        assert (targets[np.arange(len(labels)), labels] > 0).any()
        changed += not same
    assert 0 < changed


def test_each_batch_of_each_epoch_mixes_in_its_own_way(data):
    order = np.tile(np.arange(8), 4)  # the same images again and again: only the mixing can differ
    targets = [
        batch[2]
        for epoch in (0, 1)
        for batch in batches(*data, order, 8, seed=0, epoch=epoch, mixing=MIXING | {"probability": 1.0})
    ]
    assert len(targets) == 8
    assert not any(np.array_equal(a, b) for a, b in combinations(targets, 2))


def test_the_data_are_left_alone(data):
    before = data[0].copy()
    for _, images, labels in batches(*data, np.arange(N), 8, seed=0, epoch=0):
        images[:] = 0
        labels[:] = 0
    np.testing.assert_array_equal(data[0], before)
    np.testing.assert_array_equal(data[1], np.arange(N))


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_reaches_the_consumer_in_its_place(data, prefetch):
    order = np.arange(N)
    order[20] = N  # in batch 2
    generator = batches(*data, order, 8, seed=0, epoch=0, prefetch=prefetch)
    assert next(generator)[0] == 0
    assert next(generator)[0] == 1
    with pytest.raises(IndexError):
        next(generator)
    assert not worker_threads()


def test_breaking_off_ends_the_thread_and_the_work(data, monkeypatch):
    begun, resume, calls = threading.Semaphore(0), threading.Event(), []

    class Slow:
        def __getitem__(self, rows):
            calls.append(rows)
            begun.release()
            if rows[0] == 1:
                resume.wait(timeout=60)
            return data[0][rows]

    generator = batches(Slow(), data[1], np.arange(N), 1, seed=0, epoch=0, prefetch=3)
    next(generator)
    assert begun.acquire(timeout=60) and begun.acquire(timeout=60)
    assert len(worker_threads()) == 1
    shutdown = ThreadPoolExecutor.shutdown

    def noticed(pool, **settings):  # the batch in hand is finished when those behind it have been cancelled
        shutdown(pool, **settings | {"wait": False})
        resume.set()
        shutdown(pool, **settings)

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", noticed)
    generator.close()
    assert not worker_threads()
    assert len(calls) == 2  # the batch in hand was finished, the two behind it were not begun


def test_a_broken_loop_leaves_no_thread(data):
    for _ in batches(*data, np.arange(N), 1, seed=0, epoch=0, prefetch=3):
        break
    assert not worker_threads()


def test_work_ahead_is_bounded_and_in_another_thread(data):
    started, names = threading.Semaphore(0), []

    class Noting:
        def __getitem__(self, rows):
            names.append(threading.current_thread().name)
            started.release()
            return data[0][rows]

    generator = batches(Noting(), data[1], np.arange(N), 1, seed=0, epoch=0, prefetch=3)
    next(generator)
    for _ in range(4):  # the one in hand and three ahead
        assert started.acquire(timeout=60)
    assert not started.acquire(timeout=0.05)
    generator.close()
    assert all(name.startswith("minivit-batches") for name in names)


def test_a_generator_left_open_does_not_keep_the_program_alive():
    program = (
        "import numpy as np; from minivit.data import batches\n"
        "x = np.zeros((9, 2, 2, 1), np.uint8)\n"
        "g = batches(x, np.zeros(9, np.int64), np.arange(9), 1, seed=0, epoch=0)\n"
        "next(g)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=600)


def test_batch_size_must_be_positive(data):
    with pytest.raises(ValueError, match="batch_size"):
        next(batches(*data, np.arange(N), 0, seed=0, epoch=0))


def test_images_of_half_the_size():
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (10, 8, 6, 3), dtype=np.uint8), np.arange(10)
    images[0] = 255
    settings = {"seed": 1, "epoch": 2, "prefetch": 0, "crop_padding": 1, "flip": True}
    whole = list(batches(images, labels, np.arange(10), 4, **settings))
    half = list(batches(images, labels, np.arange(10), 4, half_size=True, **settings))
    for (i, large, classes), (j, small, others) in zip(whole, half, strict=True):
        assert i == j and small.dtype == np.uint8
        mean = large.reshape(len(large), 4, 2, 3, 2, 3).astype(float).mean(axis=(2, 4))
        np.testing.assert_array_equal(small, np.floor(mean + 0.5))
        np.testing.assert_array_equal(classes, others)
