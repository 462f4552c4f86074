"""Images that stay files until a batch asks for them: what is found, how it is cut out, and runs that resume."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
from conftest import TINY
from PIL import Image
from strict_cupy import installed, ndarray

from minivit import ViTConfig
from minivit.base.backend import plain, to_host
from minivit.base.errors import InputError
from minivit.data import LazyImages, load, mirror, take
from minivit.data import loader as loader_module
from minivit.data.imagefolder import inception_box
from minivit.data.loader import batches
from minivit.data.source import fingerprint
from minivit.evaluation.inference import predict_all
from minivit.figures.runs import draw_masked
from minivit.masked import MaskedConfig, MaskedViT
from minivit.masked.pretrain import MaskedPrediction, chance_of, masked_loss, measure, plan_of_test
from minivit.model import ViT
from minivit.training.budget import seconds_of_training
from minivit.training.config import TrainConfig
from minivit.training.engines.cpu import Engine
from minivit.training.engines.gpu import CudaEngine
from minivit.training.folder import LAST, RECONSTRUCTIONS, stored_run
from minivit.training.recipes import read_recipe, trainer_of
from minivit.training.trainer import Trainer
from minivit.weights.checkpoint import load as load_checkpoint

CLASSES = ("n01440764", "n01443537", "n02102040")
SIZES = ((40, 28), (25, 25), (20, 50), (33, 31))  # width, height


def noise(seed, size):
    """Smooth noise, so that every part of it looks different: (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def save(path, seed=0, size=(25, 25)):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise(seed, size).save(path, "PNG")
    return path


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Four training and two validation images of each of three classes. Read it; `root` is for writing."""
    folder = tmp_path_factory.mktemp("imagenet")
    number = 0
    for k, name in enumerate(CLASSES):
        for i, size in enumerate(SIZES):
            save(folder / "train" / name / f"{name}_{i}.JPEG", 10 * k + i, size)
        for i in range(2):
            number += 1
            save(folder / "val" / name / f"ILSVRC2012_val_{number:08d}.JPEG", 100 + 10 * k + i, SIZES[i])
    return folder


@pytest.fixture
def root(tmp_path, shared):
    return shutil.copytree(shared, tmp_path / "imagenet")


def refused(pattern, root):
    with pytest.raises(InputError, match=pattern) as caught:
        load("imagefolder", root)
    assert "\n" not in str(caught.value)


# ---- what is found ---------------------------------------------------------------------------------------------------


def test_classes_labels_and_names(shared):
    data = load("imagefolder", shared, image_size=14)
    assert data.name == "imagefolder" and data.class_names == CLASSES and data.source == str(shared)
    assert data.train_images.shape == (12, 14, 14, 3) and data.test_images.shape == (6, 14, 14, 3)
    assert data.train_images.dtype == np.uint8 and data.train_images.ndim == 4
    assert data.train_labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and data.test_labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.train_labels.dtype == data.test_labels.dtype == np.int64
    assert data.test_names == tuple(f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 7))
    assert load("imagefolder", shared).train_images.shape == (12, 224, 224, 3)


def test_a_folder_called_test_will_do(root):
    (root / "val").rename(root / "test")
    assert load("imagefolder", root).test_labels.tolist() == [0, 0, 1, 1, 2, 2]


def flat(root):
    """The validation images in one folder, as they come; their classes are those of `shared`, by name."""
    for path in sorted(root.glob("val/*/*.JPEG")):
        path.rename(root / "val" / path.name)
    for path in (root / "val").iterdir():
        if path.is_dir():
            path.rmdir()
    return sorted(path.name for path in (root / "val").iterdir())


@pytest.mark.parametrize("form", ["names", "numbers", "kaggle", "synsets"])
def test_validation_images_in_one_folder(root, form):
    expected = load("imagefolder", root, image_size=14).test_images[:]
    names = flat(root)
    labels = [0, 0, 1, 1, 2, 2]
    lines = {
        "names": [f"{name} {CLASSES[k]}" for name, k in zip(names, labels, strict=True)],
        "numbers": [f"{name} {k}" for name, k in zip(names, labels, strict=True)],
        "kaggle": ["ImageId,PredictionString"]
        + [f"{name[:-5]},{CLASSES[k]} 1 2 30 40 {CLASSES[0]} 5 6 7 8" for name, k in zip(names, labels, strict=True)],
        "synsets": [CLASSES[k] for k in labels],
    }[form]
    if form != "synsets":
        lines = lines[:1] + lines[:0:-1]  # in any order
    (root / "val.txt").write_text("\n".join(lines) + "\n")
    data = load("imagefolder", root, image_size=14)
    assert data.test_labels.tolist() == labels and list(data.test_names) == names
    np.testing.assert_array_equal(data.test_images[:], expected)


@pytest.mark.parametrize("text, message", [
    (None, "there is no .*val.txt; the images of .*val lie in no class folders"),
    ("ILSVRC2012_val_00000001.JPEG 0", "does not list ILSVRC2012_val_00000002.JPEG"),
    ("ILSVRC2012_val_00000001.JPEG 3", "the class of ILSVRC2012_val_00000001.JPEG is '3', which is no folder"),
    ("a.JPEG n01440764\nILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000001.JPEG is '', which is no folder"),
    ("n01440764\n" * 5, "lists 5 classes for 6 images"),
    ("490\n" * 6, "'490' is no folder of train; .* development kit count them in another order"),
    (b"\xff\xfe\x00", "is not a text file"),
])  # fmt: skip
def test_a_list_that_does_not_fit(root, text, message):
    flat(root)
    if text is not None:
        (root / "val.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(message, root)


def test_what_is_missing(root, tmp_path):
    refused("there is no folder .*nowhere/test", tmp_path / "nowhere")
    (root / "train" / "n09999999").mkdir()
    refused("n09999999 has no images", root)
    (root / "train" / "n09999999").rmdir()
    save(root / "val" / "n09999999" / "a.JPEG")
    refused("val/n09999999 has no folder of that name in .*train", root)
    for path in (root / "val").rglob("*.JPEG"):
        path.unlink()
    for path in (root / "val").iterdir():
        path.rmdir()
    refused("val has no class folders", root)
    (root / "val").rmdir()
    refused("there is no folder .*test", root)


def test_other_and_hidden_files_are_left_out(root):
    before = load("imagefolder", root)
    (root / "train" / CLASSES[0] / "notes.txt").write_text("x")
    (root / "train" / CLASSES[0] / ".hidden.png").write_text("x")
    (root / "train" / CLASSES[0] / "folder.png").mkdir()
    assert fingerprint(load("imagefolder", root)) == fingerprint(before)


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_indices_are_numpys(shared):
    lazy = load("imagefolder", shared, image_size=14).train_images
    whole = lazy[:]
    assert whole.shape == (12, 14, 14, 3) and whole.dtype == np.uint8
    for rows in (
        slice(2, 9, 3),
        slice(None, None, -1),
        np.array([5, 0, 5]),
        [1, -1],
        7,
        -2,
        np.int64(3),
        whole[:, 0, 0, 0] > 90,
    ):
        np.testing.assert_array_equal(lazy[rows], whole[rows])
    np.testing.assert_array_equal(mirror(lazy)[3:5], whole[3:5, :, ::-1])
    np.testing.assert_array_equal(mirror(mirror(lazy))[3:5], whole[3:5])
    few = take(lazy, slice(5))
    assert isinstance(few, LazyImages) and len(few) == 5
    np.testing.assert_array_equal(few[:], whole[:5])
    for wrong in (12, [12], "a", (slice(None), 0)):
        with pytest.raises(IndexError):
            lazy[wrong]
    with pytest.raises(TypeError, match="take some of them"):
        np.asarray(lazy)
    with pytest.raises(TypeError):
        list(lazy)


@pytest.mark.parametrize("size", [(400, 256), (256, 256), (300, 500)])
def test_the_centre_is_that_of_256_and_224(tmp_path, size):
    """An image whose short side is 256 is not scaled at all: the middle 224 x 224 pixels are left."""
    (root := tmp_path / "a").mkdir()
    image = noise(0, size)
    image.save(root / "a.png")
    seen = LazyImages(root, ["a.png"], [1], 224)[0]
    if min(size) != 256:
        image = image.resize((256, round(size[1] * 256 / size[0])), Image.Resampling.BICUBIC)
    whole = np.asarray(image)
    top, left = (whole.shape[0] - 224) // 2, (whole.shape[1] - 224) // 2
    np.testing.assert_array_equal(seen, whole[top : top + 224, left : left + 224])


def test_a_training_crop_is_its_box_scaled(shared):
    lazy = load("imagefolder", shared, image_size=14).train_images
    draws = np.random.default_rng(0).random((3, 10, 4))
    seen = lazy.read(np.array([0, 2, 0]), draws=draws, smallest=0.3)
    for image, row, numbers in zip(seen, (0, 2, 0), draws, strict=True):
        whole = noise(row, SIZES[row])
        left, top, right, bottom = inception_box(*whole.size, numbers, 0.3)
        part = Image.fromarray(np.asarray(whole)[top:bottom, left:right])
        np.testing.assert_array_equal(image, np.asarray(part.resize((14, 14), Image.Resampling.BICUBIC)))
    assert not np.array_equal(seen[0], seen[2])


def test_boxes_have_the_area_and_the_shape_that_was_asked_for():
    """Over many draws: inside the image, of the areas and shapes allowed but for whole pixels, everywhere."""
    rng, W, H = np.random.default_rng(0), 500, 375
    shares, ratios, places = [], [], []
    for _ in range(3000):
        left, top, right, bottom = inception_box(W, H, rng.random((10, 4)), 0.08)
        assert 0 <= left < right <= W and 0 <= top < bottom <= H
        shares.append((right - left) * (bottom - top) / (W * H))
        ratios.append((right - left) / (bottom - top))
        places.append((left / max(1, W - right + left), top / max(1, H - bottom + top)))
    assert 0.078 < min(shares) < 0.085 and max(shares) > 0.97
    assert 0.745 < min(ratios) < 0.76 and 1.32 < max(ratios) < 1.345
    np.testing.assert_allclose(np.mean(places, axis=0), 0.5, atol=0.03)
    share = np.array(shares)
    assert abs(np.mean(share[share < 0.5]) - 0.29) < 0.01  # uniform between 0.08 and 0.5
    assert inception_box(W, H, np.array([[0.5, 0.5, 0.0, 0.0]]), 0.08)[:2] == (0, 0)


def test_boxes_of_known_numbers():
    """A quarter of 400 x 300 pixels: square at r = 1/2, 200 x 150 at r = 1, 150 x 200 at r = 0; u is across, v down."""
    for r, size in ((0.5, (173, 173)), (1.0, (200, 150)), (0.0, (150, 200)), (0.75, (186, 161))):
        left, top, right, bottom = inception_box(400, 300, np.array([[0.0, r, 0.75, 0.25]]), 0.25)
        assert (right - left, bottom - top) == size
        assert (left, top) == (int(0.25 * (401 - size[0])), int(0.75 * (301 - size[1])))


def test_a_box_that_never_fits_is_the_largest_at_the_centre():
    full = np.tile([0.999, 0.5, 0.5, 0.5], (10, 1))  # nearly all of the area, and square
    assert inception_box(100, 20, full, 0.08) == (36, 0, 63, 20)  # 4 : 3, as high as the image
    assert inception_box(20, 100, full, 0.08) == (0, 36, 20, 63)
    assert inception_box(40, 40, full, 0.08) == (0, 0, 40, 40)
    late = full.copy()
    late[9] = [0.0, 0.5, 0.0, 0.0]  # the tenth attempt fits
    left, top, right, bottom = inception_box(100, 20, late, 0.08)
    assert (left, top) == (0, 0) and (right - left) * (bottom - top) == pytest.approx(0.08 * 2000, rel=0.1)


def test_threads_change_nothing(shared):
    data = load("imagefolder", shared, image_size=14)
    source = data.train_images
    order = np.random.default_rng(0).permutation(12)
    streams = []
    for threads in (1, 5):
        lazy = LazyImages(source.root, source.names, source.sizes, 14, threads=threads)
        stream = batches(lazy, data.train_labels, order, 5, seed=3, epoch=2, crop_area=0.2, flip=True)
        streams.append(list(stream))
    for (i, one, labels), (j, other, same) in zip(*streams, strict=True):
        assert i == j
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(labels, same)


def test_batches_are_functions_of_seed_epoch_and_index(shared):
    data = load("imagefolder", shared, image_size=14)
    order = np.arange(12)[::-1]

    def stream(**changes):
        settings = {"seed": 3, "epoch": 2, "crop_area": 0.2} | changes
        return {
            index: images for index, images, _ in batches(data.train_images, data.train_labels, order, 4, **settings)
        }

    base, later = stream(), stream(start=1, prefetch=0)
    assert list(later) == [1, 2]
    for index, images in later.items():
        np.testing.assert_array_equal(images, base[index])
    for changes in ({"seed": 4}, {"epoch": 3}, {"crop_area": 0.6}):
        assert all(not np.array_equal(images, base[index]) for index, images in stream(**changes).items())
    centre = stream(crop_area=0.0)
    np.testing.assert_array_equal(centre[0], data.train_images[order[:4]])
    labels = [labels for _, _, labels in batches(data.train_images, data.train_labels, order, 4, seed=0, epoch=0)]
    np.testing.assert_array_equal(np.concatenate(labels), data.train_labels[::-1])


def test_an_image_is_cut_anew_each_time(shared):
    """Twice in a batch, and once more in the next batch."""
    data = load("imagefolder", shared, image_size=14)
    order = np.array([3, 3, 3])
    stream = batches(data.train_images, data.train_labels, order, 2, seed=0, epoch=0, crop_area=0.1)
    (first_, second), (third,) = (images for _, images, _ in stream)
    assert not np.array_equal(first_, second) and not np.array_equal(first_, third)


def test_crops_have_a_stream_of_their_own():
    streams = [getattr(loader_module, name) for name in ("_SHUFFLE", "_AUGMENT", "_MIX", "_CROP")]
    assert len({*streams, 3}) == 5


def test_a_broken_image_is_named_when_it_is_met(root):
    path = root / "train" / CLASSES[1] / f"{CLASSES[1]}_2.JPEG"
    path.write_bytes(path.read_bytes()[:100])
    data = load("imagefolder", root, image_size=14)  # nothing is read yet
    with pytest.raises(InputError, match=rf"{path.name} cannot be read as an image \(.*\); replace or remove it"):
        list(batches(data.train_images, data.train_labels, np.arange(12), 4, seed=0, epoch=0))
    assert data.train_images[:6].shape == (6, 14, 14, 3)


def test_the_fingerprint_reads_no_image(root, monkeypatch):
    before = fingerprint(load("imagefolder", root))
    path = root / "train" / CLASSES[0] / f"{CLASSES[0]}_0.JPEG"
    content = path.read_bytes()
    monkeypatch.setattr(LazyImages, "read", lambda *arguments, **keywords: pytest.fail("an image was read"))
    path.write_bytes(content[::-1])
    assert fingerprint(load("imagefolder", root)) == before
    path.write_bytes(content + b"x")
    longer = fingerprint(load("imagefolder", root))
    path.write_bytes(content)
    path.rename(path.with_name("other.JPEG"))
    assert len({before, longer, fingerprint(load("imagefolder", root))}) == 3


@pytest.mark.parametrize("image_size", [0, 5000])
def test_an_image_size_out_of_range(shared, image_size):
    with pytest.raises(InputError, match="choose 1 to 4096"):
        load("imagefolder", shared, image_size=image_size)


# ---- in use ----------------------------------------------------------------------------------------------------------

MODEL = ViTConfig(image_size=8, patch_size=4, width=8, depth=1, num_heads=2, num_classes=3)
TRAIN = TrainConfig(
    epochs=3, batch_size=5, crop_area=0.3, flip=True, test_flip=True, workers=2, checkpoint_seconds=0.0,
    log_every=1, mixup=0.5,
)  # fmt: skip


def test_a_resumed_run_is_the_uninterrupted_one(shared, tmp_path, no_figures):
    """Stopped in the middle of an epoch, with crops and mixing: the same bits at the end."""
    data = load("imagefolder", shared, image_size=8)
    assert Trainer(data, MODEL, TRAIN, tmp_path / "whole", progress=False).run()
    broken = Trainer(data, MODEL, TRAIN, tmp_path / "broken", progress=False)
    save = broken.save
    broken.save = lambda *names: (save(*names), broken.state.step == 4 and broken.stop("half way"))
    assert broken.run() is None and broken.state.step == 5 and broken.state.batch == 2
    data = load("imagefolder", shared, image_size=8)
    again = Trainer(
        data, MODEL, TRAIN, tmp_path / "broken", resume=stored_run(tmp_path / "broken"), progress=False
    )  # fmt: skip
    assert again.run()
    (one, meta), (other, same) = (load_checkpoint(tmp_path / name / LAST) for name in ("whole", "broken"))
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])
    assert meta["progress"]["running"] == same["progress"]["running"] and meta["data"] == same["data"]


def test_predictions_are_those_of_the_same_images_in_memory(shared):
    model = ViT(MODEL)
    model.flat += 0.3 * np.random.default_rng(0).standard_normal(model.flat.shape).astype(np.float32)
    lazy = load("imagefolder", shared, image_size=8).test_images
    for settings in ({}, {"flip": True}, {"features": True}):
        lazily, held = (predict_all(model, images, workers=2, micro_batch=2, **settings) for images in (lazy, lazy[:]))
        np.testing.assert_array_equal(lazily, held)


def test_images_that_are_files_are_read_on_the_host(shared):
    """Their batches arrive on the device, cut and augmented as on the host; predictions take them in parts."""
    lazy = take(load("imagefolder", shared, image_size=8).train_images, slice(5))
    labels, order = np.arange(5), np.array([4, 0, 3, 1, 2])
    settings = {"seed": 0, "epoch": 1, "prefetch": 0, "crop_area": 0.3, "flip": True, "crop_padding": 1}
    with installed() as cupy, plain():
        found = list(batches(lazy, cupy.asarray(labels), order, 2, **settings))
        model = ViT(MODEL, flat=cupy.asarray(ViT(MODEL).flat))
        features = CudaEngine(model, micro_batch=2).predict(lazy, features=True)
    for (_, images, truth), (_, ours, own) in zip(found, batches(lazy, labels, order, 2, **settings), strict=True):
        assert type(images) is type(truth) is ndarray
        np.testing.assert_array_equal(to_host(images), ours)
        np.testing.assert_array_equal(to_host(truth), own)
    assert type(features) is ndarray and features.shape == (5, 8)
    np.testing.assert_allclose(to_host(features), ViT(MODEL).features(lazy[:]), rtol=1e-4, atol=1e-5)


def test_a_budget_reads_the_files_too(shared, monkeypatch):
    data = load("imagefolder", shared, image_size=8)
    read, seen = LazyImages.read, []

    def counted(self, rows, **settings):
        if settings.get("draws") is not None:
            seen.append(len(rows))
        return read(self, rows, **settings)

    monkeypatch.setattr(LazyImages, "read", counted)
    assert seconds_of_training(data, MODEL, TRAIN, 2) > 0.0
    assert seen == [5, 5]


def test_the_scripts(root, tmp_path, call, no_figures):
    flags = [
        "--data",
        "imagefolder",
        "--data-dir",
        root,
        "--config",
        "tests/tiny.toml",
        "--quiet",
        "--out",
        tmp_path / "run",
    ]
    ended = call("train", *flags, "--epochs", 2, "--image-size", 8, "--crop-padding", 0, "--crop-area", 0.2)
    assert ended.status == 0 and "12 training and 6 test images of 8x8x3, 3 classes" in ended.out, ended.err
    ended = call("evaluate", tmp_path / "run" / LAST, "--json", tmp_path / "e.json")
    assert ended.status == 0 and ended.err == "", ended.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert json.loads((tmp_path / "e.json").read_text())["accuracy"] == summary["test_accuracy"]
    file = root / "val" / CLASSES[0] / "ILSVRC2012_val_00000001.JPEG"
    ended = call("predict", tmp_path / "run" / LAST, file, "--test", 0, "--json", tmp_path / "p.json")
    from_file, from_set = json.loads((tmp_path / "p.json").read_text())["predictions"]
    assert ended.status == 0 and from_file["top"] == from_set["top"]
    assert call("transfer", tmp_path / "run" / LAST, "--shots", 1, "--pixels").status == 0
    ended = call("data", "info", "imagefolder", "--data-dir", root, "--image-size", 8, "--json", tmp_path / "i.json")
    facts = json.loads((tmp_path / "i.json").read_text())
    whole = load("imagefolder", root, image_size=8).train_images[:] / 255
    np.testing.assert_allclose(facts["channel_mean"], whole.mean(axis=(0, 1, 2)), rtol=1e-9)
    assert facts["image_shape"] == [8, 8, 3] and facts["classes"][1] == {"name": CLASSES[1], "train": 4, "test": 2}
    path = root / "train" / CLASSES[2] / f"{CLASSES[2]}_3.JPEG"
    path.write_bytes(b"x" * len(path.read_bytes()))
    ended = call("train", "--resume", "--out", tmp_path / "run")
    assert ended.status == 0  # it had ended; a new one meets the image
    flags[-1] = tmp_path / "new"
    ended = call("train", *flags, "--epochs", 1, "--image-size", 8, "--crop-padding", 0)
    assert ended.status == 2 and ended.err.count("\n") == 1 and f"{path.name} cannot be read" in ended.err


def test_validation_images_alone_are_there_to_be_tested_on(root, tmp_path, call, no_figures):
    flags = ["--data", "imagefolder", "--data-dir", root, "--config", "tests/tiny.toml", "--quiet", "--epochs", 1]
    flags += ["--image-size", 8, "--crop-padding", 0]
    assert call("train", *flags, "--out", tmp_path / "run").status == 0
    both = load("imagefolder", root, image_size=8)
    for path in sorted((root / "train").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    refused("train has no class folders", root)
    (root / "train").rmdir()
    alone = load("imagefolder", root, image_size=8)
    assert len(alone.train_images) == 0 and alone.class_names == CLASSES
    np.testing.assert_array_equal(alone.test_images[:], both.test_images[:])
    ended = call("evaluate", tmp_path / "run" / LAST, "--json", tmp_path / "e.json")
    assert ended.status == 0 and "not the images of its training run" in ended.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert json.loads((tmp_path / "e.json").read_text())["accuracy"] == summary["test_accuracy"]
    for script, *more in (("train", *flags), ("transfer", tmp_path / "run" / LAST), ("data", "info", *flags[1:4])):
        ended = call(script, *more, *([] if script == "data" else ["--out", tmp_path / "new"]))
        assert ended.status == 2 and "no training images" in ended.err and ended.err.count("\n") == 1, ended.err
    assert not (tmp_path / "new").exists()


def test_crops_are_refused_where_images_have_their_size(tmp_path, call):
    for words in (("train",), ("pretrain", *TINY, "--label-smoothing", 0), ("visualize", "lr")):
        ended = call(*words, "--crop-area", 0.08, "--data", "digits", "--out", tmp_path / words[0])
        assert ended.status == 2 and ended.err.startswith("error: crop_area cuts parts out of images as their files")
        assert "imagefolder alone; those of digits are in memory" in ended.err and ended.err.count("\n") == 1
        assert not list(tmp_path.glob("*/*"))
    assert not (tmp_path / "run").exists()
    assert call("train", "--crop-area", 1.5, "--out", tmp_path / "run").status == 2


@pytest.mark.parametrize("masked", [MaskedConfig(), MaskedConfig(method="mae", decoder_width=8, decoder_heads=2)])
def test_pre_training_reads_them_as_they_are_needed(tmp_path, shared, monkeypatch, masked):
    monkeypatch.setattr("minivit.masked.pretrain.CHUNK", 4)  # of 6 test images
    lazy = load("imagefolder", shared, image_size=8)
    held = lazy._replace(train_images=lazy.train_images[:], test_images=lazy.test_images[:])
    model = ViTConfig(image_size=8, patch_size=2, num_classes=3, width=8, depth=1, num_heads=1, mlp_dim=8)
    config = TrainConfig(steps=2, batch_size=4, workers=1)
    task = partial(MaskedPrediction, masked=masked)
    settings = {"task": task, "draw": draw_masked, "describe": {"data": "imagefolder"}, "progress": False}
    runs = [
        Trainer(data, model, config, tmp_path / name, **settings) for name, data in (("lazy", lazy), ("held", held))
    ]
    assert runs[0].task.chance == runs[1].task.chance and runs[0].task.chance[1] > 0
    monkeypatch.setattr("minivit.masked.pretrain.CHUNK", 500)
    plan = plan_of_test(model, masked, 6)
    np.testing.assert_allclose(chance_of(held.test_images, model, masked, plan), runs[0].task.chance)
    a, b = (run.run() for run in runs)
    assert a["test_loss"] == b["test_loss"] and (tmp_path / "lazy" / RECONSTRUCTIONS).exists()
    with Engine(runs[0].model, masked_loss, workers=1) as engine:
        here = measure(engine, runs[0].model, held.test_images, plan)
    with installed() as cupy, plain():
        there = MaskedViT(model, masked, flat=cupy.asarray(runs[0].model.flat))
        result = measure(CudaEngine(there, masked_loss), there, lazy.test_images, cupy.asarray(plan))
        assert isinstance(result.loss, ndarray)
    np.testing.assert_allclose(float(to_host(result.loss)), float(here.loss), rtol=1e-5)


@pytest.mark.parametrize("name", ["imagefolder", "folder"])
def test_a_run_that_begins_with_a_model_takes_its_size(tmp_path, root, name):
    (root / "val").rename(root / "test")
    for path in root.rglob("*.JPEG"):
        path.rename(path.with_suffix(".png"))
    flags = {"data": name, "data_dir": str(root)}
    sizes = {"image_size": 16, "patch_size": 8, "width": 8, "depth": 1, "num_heads": 1}
    train = {"steps": 1, "batch_size": 4, "workers": 1, "warmup_epochs": 0.0}
    trainer_of(read_recipe(None, data=flags, model=sizes, train=train), tmp_path / "a", progress=False).run()
    start = {"checkpoint": str(tmp_path / "a" / LAST)}
    run = trainer_of(read_recipe(None, data=flags, train=train, start=start), tmp_path / "b", progress=False)
    assert run.model.config.image_size == 16 and run.describe["image_size"] == 16
    larger = read_recipe(None, data=flags, model={"image_size": 24}, train=train, start=start)
    assert trainer_of(larger, tmp_path / "c", progress=False).model.config.image_size == 24
