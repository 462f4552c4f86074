"""Mixup and CutMix: images and labels mixed by the same share."""

import numpy as np
import pytest

from minivit.data.mixing import cutmix, mix, mixup
from minivit.layers.loss import one_hot

B, H, W, K = 16, 6, 9, 5


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (B, H, W, 3), dtype=np.uint8), rng.integers(0, K, B)


class Given:
    """A Generator with a lambda and a centre of our choice; the partner is the image before."""

    def __init__(self, share, centre=None):
        self.share, self.centre = share, centre

    def beta(self, a, b):
        assert a == b == 0.7
        return self.share

    def permutation(self, n):
        return np.arange(n) - 1

    def integers(self, low, high):
        assert low == 0 and tuple(high) == (H, W)
        return np.array(self.centre)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.998, 1.0])
def test_mixup_blends_images_and_labels_alike(batch, share):
    images, labels = batch
    before = images.copy()
    targets = one_hot(labels, K)
    mixed, soft = mixup(images, targets, Given(share), 0.7)
    share = round(256 * share) / 256
    exact = share * images + (1 - share) * np.roll(images, 1, axis=0).astype(float)
    assert mixed.dtype == np.uint8 and np.abs(mixed - exact).max() <= 0.5
    assert soft.dtype == np.float32
    np.testing.assert_array_equal(soft, share * targets + (1 - share) * np.roll(targets, 1, axis=0))
    np.testing.assert_array_equal(images, before)


@pytest.mark.parametrize("share", [0.0, 0.4, 0.75, 1.0])
@pytest.mark.parametrize("centre", [(3, 4), (0, 0), (5, 8)])
def test_cutmix_counts_the_pixels_that_stay(share, centre):
    labels = np.arange(B) % K
    images = np.broadcast_to(np.arange(B, dtype=np.uint8)[:, None, None, None], (B, H, W, 1)).copy()
    before = images.copy()
    mixed, soft = cutmix(images, one_hot(labels, K), Given(share, centre), 0.7)
    own = mixed == images
    assert ((mixed == np.roll(images, 1, axis=0)) | own).all()
    assert (own == own[:1]).all()  # one box for the whole batch
    cut = np.argwhere(~own[0, ..., 0])
    extent = tuple(np.ptp(cut, axis=0) + 1) if len(cut) else (0, 0)
    assert extent[0] * extent[1] == len(cut)  # it is a rectangle
    side = np.sqrt(1 - share)
    if centre == (3, 4):  # nothing of it is cut off
        assert extent == (min(int(H * side) // 2 * 2, H), int(W * side) // 2 * 2)
    stays = own[0].mean()
    expected = stays * one_hot(labels, K) + (1 - stays) * one_hot(np.roll(labels, 1), K)
    np.testing.assert_allclose(soft, expected, atol=1e-6)
    assert soft.dtype == np.float32 and mixed.dtype == np.uint8
    np.testing.assert_array_equal(images, before)


def test_shares_and_boxes_are_spread_as_they_should(batch):
    images, labels = batch
    rng = np.random.default_rng(0)

    def shares(alpha):  # some images are their own partners
        return np.array(
            [mixup(images, np.eye(B, dtype=np.float32), rng, alpha)[1].diagonal().min() for _ in range(2000)]
        )

    uniform = shares(1.0)
    assert abs(np.mean(uniform) - 0.5) < 0.03 and abs(np.quantile(uniform, 0.1) - 0.1) < 0.03
    extreme = shares(0.1)
    assert (np.minimum(extreme, 1 - extreme) < 0.05).mean() > 0.6  # a small alpha hardly mixes
    black, white = np.zeros((1, 8, 8, 1), np.uint8), np.full((1, 8, 8, 1), 255, np.uint8)
    pairs = np.eye(2, dtype=np.float32)
    cut = [cutmix(np.concatenate([black, white]), pairs, rng, 1.0)[0][0, ..., 0] == 255 for _ in range(2000)]
    assert np.mean(cut, axis=0).min() > 0.02  # every pixel is cut sometimes


@pytest.mark.parametrize("alphas", [{"mixup_alpha": 0.2}, {"cutmix_alpha": 1.0}, {"mixup_alpha": 1, "cutmix_alpha": 1}])
@pytest.mark.parametrize("probability", [0.0, 0.4, 1.0])
def test_the_share_of_mixed_batches(batch, alphas, probability, monkeypatch):
    from minivit.data import mixing

    images, labels = batch
    seen = []
    for name in ("mixup", "cutmix"):

        def noted(images, targets, rng, alpha, name=name):
            assert alpha == alphas[f"{name}_alpha"] and targets.shape == (B, K)
            seen.append(name)
            return images, targets

        monkeypatch.setattr(mixing, name, noted)
    rng = np.random.default_rng(1)
    for _ in range(2000):
        _, targets = mix(images, labels, rng, num_classes=K, probability=probability, **alphas)
        assert targets.shape == (B, K) and targets.dtype == np.float32
    for name in ("mixup", "cutmix"):
        expected = probability / len(alphas) if f"{name}_alpha" in alphas else 0.0
        assert seen.count(name) / 2000 == pytest.approx(expected, abs=0.04)


def test_a_batch_that_is_not_mixed_has_targets_all_the_same(batch):
    images, labels = batch
    same, targets = mix(images, labels, np.random.default_rng(0), num_classes=K, mixup_alpha=1.0, probability=0.0)
    assert same is images
    np.testing.assert_array_equal(targets, np.eye(K)[labels])


def test_targets_are_probabilities(batch):
    rng = np.random.default_rng(2)
    for _ in range(100):
        _, targets = mix(*batch, rng, num_classes=K, mixup_alpha=0.8, cutmix_alpha=1.0)
        np.testing.assert_allclose(targets.sum(axis=1), 1.0, atol=1e-6)
        assert targets.min() >= 0
