"""The order of an epoch and its batches, as pure functions of (seed, epoch, batch index).

Nothing carries over from one batch to the next, so training that resumes in the middle of an epoch sees
exactly the pictures it would have seen without the break.
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


def epoch_order(n, *, seed, epoch, repeats=1):
    """The order in which an epoch visits n pictures, the same for the same arguments.

    With ``repeats`` R > 1 (repeated augmentation) a picture comes R times in succession, each time to be augmented
    anew, so that a batch of a multiple of R holds a R-th of different ones. An epoch is as long as ever and takes q =
    ceil(n / R) pictures, and R epochs in succession, a round, take all of them.

    Math    round g = floor(epoch / R) has a permutation p_g of 0 .. n - 1, drawn for (seed, g); its k-th epoch, k =
            epoch mod R, takes p_g((k q + j) mod n) for j = 0 .. q - 1, each R times, and the first n of them all:
            where R does not divide n, its last picture comes fewer times, and the round's last epochs take some of its
            first pictures once more
    Shapes  ->  (n,) int64; with R = 1 a permutation of 0 .. n - 1
    Source  Hoffer et al., "Augment your batch", arXiv:1901.09335; Berman et al., "MultiGrain", arXiv:1902.05509.
    """
    group, k = divmod(epoch, repeats)
    permutation = _generator(seed, _SHUFFLE, group).permutation(n)
    q = -(-n // repeats)
    chosen = permutation.take(np.arange(k * q, (k + 1) * q), mode="wrap")
    return np.repeat(chosen, repeats)[:n]


def is_epoch_order(order, n, *, repeats=1):
    """Whether an array could be the order of an epoch: each picture ``repeats`` times in succession, none again later.

    Where ``repeats`` does not divide n, the last picture comes fewer times.
    """
    if order.dtype.kind not in "iu" or order.shape != (n,):
        return False
    chosen = order[::repeats]
    in_range = chosen.min() >= 0 and chosen.max() < n
    return in_range and len(np.unique(chosen)) == len(chosen) and np.array_equal(np.repeat(chosen, repeats)[:n], order)


def halved(images):
    """Pictures of half the height and width: each pixel is the mean of four, rounded up at a half.

    Shapes  images (B, H, W, C) uint8  ->  (B, H/2, W/2, C) uint8
    """
    xp = array_module(images)
    total = images[:, ::2, ::2].astype(xp.uint16)
    for part in (images[:, 1::2, ::2], images[:, ::2, 1::2], images[:, 1::2, 1::2]):
        total += part
    return ((total + 2) // 4).astype(xp.uint8)


@accelerated
def augmented(images, rows, rng, **augmentation):
    """The pictures (n, H, W, C) of some rows (B,), augmented; see ``augment``."""
    return augment(images[rows], rng, **augmentation)


def batches(
    images, labels, order, batch_size, *, seed, epoch, start=0, prefetch=2, drop_last=False, half_size=False,
    crop_area=0.0, mixing=None, **augmentation,
):  # fmt: skip
    """Yield ``(index, images, labels)`` for batch ``start``, ``start + 1``, ... of an epoch.

    Batch i takes ``order[i * batch_size : (i + 1) * batch_size]``, and its augmentation is drawn from a
    Generator of its own, so a pass from any ``start`` continues a full pass exactly.

    Shapes  images (n, H, W, C) uint8, labels (n,) int64, order (m,) int64: the rows to visit, as from `epoch_order`
            ->  index, images (B, H, W, C) uint8, labels (B,) int64, or (B, K) float32 with ``mixing``: copies
    Pictures that are files (`minivit.data.imagefolder`) are read, with a ``crop_area`` as Inception crops of at least
    that share of the area, seeded as the augmentation is. ``augmentation`` are keyword settings of `augment`;
    ``mixing`` is a dict of those of `mix`, or None; with ``half_size`` the pictures that come of it are made half as
    high and wide (see `halved`). One background thread prepares ``prefetch`` batches ahead; with 0 each is prepared
    when asked for: the same batches. An error there is raised here; closing the generator ends the thread.
    ``drop_last`` leaves out a last batch that is smaller than ``batch_size``.
    Raises  ValueError: batch_size is below 1.  InputError: a picture's file cannot be read.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")

    xp = array_module(labels)

    def prepare(index):
        chosen = order[index * batch_size : (index + 1) * batch_size]
        source, rows = images, xp.asarray(chosen)
        if is_lazy(images):
            draws = _generator(seed, _CROP, epoch, index).random((len(chosen), ATTEMPTS, 4)) if crop_area else None
            source, rows = xp.asarray(images.read(chosen, draws=draws, smallest=crop_area)), xp.arange(len(chosen))
        rng = _generator(seed, _AUGMENT, epoch, index)
        batch = augmented(source, rows, rng, **augmentation), labels[xp.asarray(chosen)]
        if mixing:
            batch = mix(*batch, _generator(seed, _MIX, epoch, index), **mixing)
        return index, halved(batch[0]) if half_size else batch[0], batch[1]

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
