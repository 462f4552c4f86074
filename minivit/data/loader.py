"""The order of an epoch and its batches, as pure functions of (seed, epoch, batch index).

Nothing carries over from one batch to the next, so training that resumes in the middle of an epoch sees
exactly the pictures it would have seen without the break.
"""

from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from minivit.backend import accelerated, array_module
from minivit.data.augment import augment
from minivit.data.mixing import mix

# Each use of the seed draws from a stream of its own; the numbers are part of what "the same seed" means.
_SHUFFLE, _AUGMENT, _MIX = 1, 2, 4  # 3 is dropout's


def _generator(seed, *key):
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def epoch_order(n, *, seed, epoch):
    """The order in which an epoch visits n pictures, the same for the same arguments.

    Shapes  ->  (n,) int64, a permutation of 0 .. n - 1
    """
    return _generator(seed, _SHUFFLE, epoch).permutation(n)


@accelerated
def augmented(images, rows, rng, **augmentation):
    """The pictures (n, H, W, C) of some rows (B,), augmented; see ``augment``."""
    return augment(images[rows], rng, **augmentation)


def batches(
    images, labels, order, batch_size, *, seed, epoch, start=0, prefetch=2, drop_last=False, mixing=None, **augmentation
):
    """Yield ``(index, images, labels)`` for batch ``start``, ``start + 1``, ... of an epoch.

    Batch i takes ``order[i * batch_size : (i + 1) * batch_size]``, and its augmentation is drawn from a
    Generator of its own, so a pass from any ``start`` continues a full pass exactly.

    Shapes  images (n, H, W, C) uint8, labels (n,) int64, order (m,) int64: the rows to visit, as from `epoch_order`
            ->  index, images (B, H, W, C) uint8, labels (B,) int64, or (B, K) float32 with ``mixing``: copies
    ``augmentation`` are keyword settings of `augment`; ``mixing`` is a dict of those of `mix`, or None. One background
    thread prepares ``prefetch`` batches ahead; with 0 each is prepared when asked for: the same batches. An error there
    is raised here; closing the generator ends the thread. ``drop_last`` leaves out a last batch that is smaller than
    ``batch_size``.
    Raises  ValueError: batch_size is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")

    xp = array_module(labels)

    def prepare(index):
        rows = xp.asarray(order[index * batch_size : (index + 1) * batch_size])
        rng = _generator(seed, _AUGMENT, epoch, index)
        batch = augmented(images, rows, rng, **augmentation), labels[rows]
        if mixing:
            batch = mix(*batch, _generator(seed, _MIX, epoch, index), **mixing)
        return index, *batch

    stop = len(order) // batch_size if drop_last else -(-len(order) // batch_size)
    indices = range(start, stop)
    if prefetch == 0:
        yield from map(prepare, indices)
        return
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="minivit-batches")
    try:
        ahead = deque()
        for index in indices:
            ahead.append(pool.submit(prepare, index))
            if len(ahead) > prefetch:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:  # also when the consumer breaks off: at most the batch in hand is still prepared
        pool.shutdown(cancel_futures=True)
