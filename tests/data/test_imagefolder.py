"""Images that stay files until a batch asks for them: what is found, how it is cut out, and runs that resume."""

import shutil

import numpy as np
import pytest
from image_folders import CLASSES, SIZES, make_images, noise, refused, save
from PIL import Image

from minivit.base.errors import InputError
from minivit.data import LazyImages, load, mirror, take
from minivit.data import loader as loader_module
from minivit.data.imagefolder import inception_box
from minivit.data.loader import batches
from minivit.data.source import fingerprint


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The images of `make_images`. Read them; those of `root` are for writing."""
    return make_images(tmp_path_factory.mktemp("imagenet"))


@pytest.fixture
def root(tmp_path, shared):
    return shutil.copytree(shared, tmp_path / "imagenet")


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


def test_where_a_list_lies(root):
    """val.csv will do, two lists will not, nor one beside class folders, where it would have no effect."""
    (root / "val.txt").write_text("x\n")
    refused("has class folders, so that .*val.txt has no effect", root)
    (root / "val.txt").unlink()
    names = flat(root)
    lines = [f"{name},{CLASSES[k]}" for name, k in zip(names, (0, 0, 1, 1, 2, 2), strict=True)]
    (root / "val.csv").write_text("\n".join(["image,class", *lines]))
    assert load("imagefolder", root, image_size=14).test_labels.tolist() == [0, 0, 1, 1, 2, 2]
    (root / "LOC_val_solution.csv").write_text("x\n")
    refused("val.csv and .*LOC_val_solution.csv both list the images", root)


def test_transparency_is_told_once(root, capsys):
    for i in (0, 1):
        path = root / "train" / CLASSES[0] / f"{CLASSES[0]}_{i}.JPEG"
        Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(path, "PNG")
    images = load("imagefolder", root, image_size=14).train_images
    assert capsys.readouterr().err == "" and (images[:2] == 255).all()
    images[1], mirror(images)[0]
    said = capsys.readouterr().err
    assert said.startswith("note: transparent parts of images are put on white, first in") and said.count("\n") == 1


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
