"""The order of an epoch and its batches, as pure functions of (seed, epoch, batch index).

Nothing carries over from one batch to the next: training that resumes in the middle of an epoch sees exactly the images
that it would have seen without the break.
"""

from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from minivit.base.backend import accelerated, array_module
from minivit.data.augment import augment
from minivit.data.dataset import is_lazy
from minivit.data.imagefolder import ATTEMPTS
from minivit.data.mixing import mix

# Each use of the seed draws from a stream of its own; the numbers are part of what "the same seed" means.
_SHUFFLE, _AUGMENT, _MIX, _CROP = 1, 2, 4, 7  # 3 is dropout's


def _generator(seed, *key):
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def epoch_order(n, *, seed, epoch):
    """The order in which an epoch visits n images, the same for the same arguments.

    Shapes  ->  (n,) int64, a permutation of 0 .. n - 1
    """
    return _generator(seed, _SHUFFLE, epoch).permutation(n)


def is_epoch_order(order, n):
    """Whether an array could be the order of an epoch, a permutation of 0 .. n - 1."""
    if order.dtype.kind not in "iu" or order.shape != (n,):
        return False
    return np.array_equal(np.sort(order), np.arange(n))


def halve(images):
    """Images at half the height and width: each pixel is the mean of four, rounded up at a half.

    Shapes  images (B, H, W, C) uint8  ->  (B, H/2, W/2, C) uint8
    """
    xp = array_module(images)
    total = images[:, ::2, ::2].astype(xp.uint16)
    for part in (images[:, 1::2, ::2], images[:, ::2, 1::2], images[:, 1::2, 1::2]):
        total += part
    return ((total + 2) // 4).astype(xp.uint8)


@accelerated
def augment_rows(images, rows, rng, **augmentation):
    """Augment some of the images (n, H, W, C), those of the rows (B,); see `augment`."""
    return augment(images[rows], rng, **augmentation)


def batches(
    images, labels, order, batch_size, *, seed, epoch, start=0, prefetch=2, drop_last=False, half_size=False,
    crop_area=0.0, mixing=None, **augmentation,
):  # fmt: skip
    """Yield ``(index, images, labels)`` for batch ``start``, ``start + 1``, ... of an epoch.

    Batch i takes ``order[i * batch_size : (i + 1) * batch_size]``, and its augmentation is drawn from a Generator of
    its own, so that a pass from any ``start`` continues a full pass exactly.

    Shapes  images (n, H, W, C) uint8, labels (n,) int64, order (m,) int64: the rows to visit, as from `epoch_order`
            ->  index, images (B, H, W, C) uint8, labels (B,) int64, or (B, K) float32 with ``mixing``: copies
    ``augmentation`` are keyword settings of `augment`; ``mixing`` is a dict of those of `mix`, or None; ``half_size``
    halves height and width at the end (see `halve`). Images that are files (`minivit.data.imagefolder`) are read here;
    a ``crop_area`` above 0 makes Inception crops of them, of at least that share of the area.
    One background thread prepares ``prefetch`` batches ahead; with 0 each is prepared when it is needed: the batches
    are the same. An error in the thread is raised here; closing the generator ends the thread. ``drop_last`` leaves out
    a last batch that is smaller than ``batch_size``.
    Raises  ValueError: batch_size is below 1.  InputError: an image's file cannot be read.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")

    xp = array_module(labels)

    def prepare(index):
        numbers = order[index * batch_size : (index + 1) * batch_size]
        source, rows = images, xp.asarray(numbers)
        if is_lazy(images):
            draws = _generator(seed, _CROP, epoch, index).random((len(numbers), ATTEMPTS, 4)) if crop_area else None
            source, rows = xp.asarray(images.read(numbers, draws=draws, smallest=crop_area)), xp.arange(len(numbers))
        rng = _generator(seed, _AUGMENT, epoch, index)
        batch = augment_rows(source, rows, rng, **augmentation), labels[xp.asarray(numbers)]
        if mixing:
            batch = mix(*batch, _generator(seed, _MIX, epoch, index), **mixing)
        return index, halve(batch[0]) if half_size else batch[0], batch[1]

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
