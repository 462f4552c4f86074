"""Folders of images: what is found, how it is scaled, and what is refused."""

import io
import os
import struct
import sys
import unicodedata
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from minivit.base.errors import InputError
from minivit.data import load, read_image
from minivit.data.folder import find_images

COLOURS = {"apple": (200, 10, 20), "Banana": (240, 220, 30), "cherry": (90, 0, 40)}


def save(path, colour=(1, 2, 3), size=(8, 8), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path, **options)
    return path


@pytest.fixture
def root(tmp_path):
    for split, count in (("train", 3), ("test", 1)):
        for name, colour in COLOURS.items():
            for i in range(count):
                save(tmp_path / split / name / f"{i}.png", (*colour[:2], colour[2] + i))
    return tmp_path


def refused(pattern, root, **settings):
    with pytest.raises(InputError, match=pattern) as caught:
        load("folder", root, **settings)
    assert "\n" not in str(caught.value)


def test_classes_labels_and_order(root):
    dataset = load("folder", root)
    assert dataset.name == "folder" and dataset.source == str(root)
    assert dataset.class_names == ("Banana", "apple", "cherry")
    assert dataset.train_images.shape == (9, 32, 32, 3) and dataset.train_images.dtype == np.uint8
    assert dataset.train_labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert dataset.test_labels.tolist() == [0, 1, 2]
    for i, image in enumerate(dataset.train_images):
        red, green, blue = COLOURS[dataset.class_names[i // 3]]
        assert (image == (red, green, blue + i % 3)).all()


def test_every_format_and_ending(tmp_path):
    endings = ("png", "jpg", "jpeg", "jpe", "jfif", "bmp", "dib", "gif", "webp", "tif", "tiff", "ppm", "pgm", "jp2")
    for ending in (*endings, "tga", "pcx", "PNG", "Jpg"):
        save(tmp_path / "train" / ending / f"a.{ending}", (130, 130, 130))
    save(tmp_path / "test" / "png" / "a.png")
    dataset = load("folder", tmp_path, image_size=4)
    assert len(dataset.class_names) == len(dataset.train_labels) == 18
    assert abs(dataset.train_images.astype(int) - 130).max() <= 2


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = save(tmp_path / "a", (255, 255, 255), mode=mode, format="JPEG" if mode == "CMYK" else "PNG")
    image = read_image(path, 4)
    assert image.shape == (4, 4, 3) and image.dtype == np.uint8 and (image == 255).all()


@pytest.mark.parametrize("transparency", [0, bytes([0, 128])])
def test_transparent_palettes_warn_of_nothing(tmp_path, transparency):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 9, 8, 7])
    image.save(tmp_path / "a.png", transparency=transparency)
    expected = (9, 8, 7) if transparency == 0 else (132, 131, 131)  # half of it and half of white
    assert (read_image(tmp_path / "a.png", 4) == expected).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_black_ink_on_transparency_is_black_on_white(tmp_path, mode, capsys):
    """In every way that a file has of saying what is transparent."""
    ink = np.zeros((8, 8), bool)
    ink[2:6, 2:6] = True
    if mode in ("RGBA", "LA"):
        Image.fromarray(np.where(ink, 255, 0).astype(np.uint8)).save(tmp_path / "alpha.png")
        alpha = Image.open(tmp_path / "alpha.png")
        image = Image.new("RGBA", (8, 8))
        image.putalpha(alpha)
        image.convert(mode).save(tmp_path / "a.png")
    else:  # one colour, or one of a palette, is transparent
        grey = Image.fromarray(np.where(ink, 0, 77).astype(np.uint8))
        image = grey.convert(mode)
        image.save(tmp_path / "a.png", transparency={"P": 77, "L": 77, "RGB": (77, 77, 77)}[mode])
    image = read_image(tmp_path / "a.png", 8)
    assert (image[ink] == 0).all() and (image[~ink] == 255).all()
    said = capsys.readouterr().err
    assert said.startswith("note: transparent parts are put on white, in 1 image") and said.count("\n") == 1


def test_transparency_is_said_once_and_only_where_there_is_some(root, capsys):
    save(root / "train" / "apple" / "1.png", (9, 9, 9, 255), mode="RGBA")
    load("folder", root)
    assert capsys.readouterr().err == ""
    for i in (1, 2):
        Image.new("RGBA", (8, 8), (9, 9, 9, 0)).save(root / "train" / "apple" / f"{i}.png")
    assert (load("folder", root).train_images[4:6] == 255).all()
    said = capsys.readouterr().err
    assert "in 2 images of" in said and "apple/1.png" in said and said.count("\n") == 1


def test_the_short_side_is_scaled_and_the_centre_kept(tmp_path):
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = (10, 200, 30)  # the middle third, square
    pixels[:, 40:] = 255
    for name, array in (("wide", pixels), ("tall", pixels.transpose(1, 0, 2))):
        Image.fromarray(array).save(tmp_path / f"{name}.png")
        for size in (5, 20, 40):
            image = read_image(tmp_path / f"{name}.png", size)
            assert image.shape == (size, size, 3)
            middle = image[size // 4 : -size // 4, size // 4 : -size // 4].astype(int)
            assert abs(middle - (10, 200, 30)).max() <= 5  # bicubic overshoots a little at the edges
    assert (read_image(tmp_path / "wide.png", 20) == (10, 200, 30)).all()


def test_scaling_down_averages(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 200
    Image.fromarray(stripes).save(tmp_path / "a.png")
    assert abs(read_image(tmp_path / "a.png", 8)[:, 2:-2].astype(int) - 100).max() < 5


def test_a_photograph_is_turned_upright(tmp_path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: the top row goes to the right
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    image = read_image(tmp_path / "a.png", 8)
    assert (image[:, -1] == 255).all() and (image[:, :-1] == 0).all()


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (read_image(tmp_path / "a.gif", 4) == (255, 0, 0)).all()


def test_other_and_hidden_files_are_left_out(root, capsys):
    before = load("folder", root)
    (root / "train" / "apple" / "notes.txt").write_text("x")
    (root / "train" / "apple" / ".hidden.png").write_text("x")
    (root / "train" / ".cache").mkdir()
    (root / "train" / "list.png").write_text("x")
    (root / "train" / "apple" / "folder.png").mkdir()
    after = load("folder", root)
    assert after.class_names == before.class_names
    np.testing.assert_array_equal(after.train_images, before.train_images)
    said = capsys.readouterr().err
    assert said == (
        f"note: left out of {root}: 2 hidden entries (train/.cache, train/apple/.hidden.png), 1 image outside of the "
        "class folders (train/list.png), 1 file without an image's ending (train/apple/notes.txt), 1 folder without "
        "images (train/apple/folder.png)\n"
    )


def test_images_below_a_class_are_walked_as_torchvision_does(root, capsys):
    """Its own first, then those of its folders, sorted as paths; links are followed, but not round."""
    apple = root / "train" / "apple"
    for path in ("b/2.png", "b-c/1.png", "b/a/3.png", "B/4.png"):
        save(apple / path)
    before = load("folder", root).test_images
    (apple / "link").symlink_to(root / "train" / "cherry")
    (apple / "round").symlink_to(apple)
    (apple / "b" / "a" / "round").symlink_to(apple / "b")
    (apple / "gone.png").symlink_to(root / "nowhere.png")
    found = find_images(root, ("test",))
    expected = []
    for folder, _, names in sorted(os.walk(apple)):  # torchvision's make_dataset, but for the links
        expected += [os.path.relpath(os.path.join(folder, name), root) for name in sorted(names) if name != "gone.png"]
    own = [path for path, _ in found.train if path.startswith("train/apple/") and "link" not in path]
    assert own == expected and len(own) == 7
    assert sum("apple/link/" in path for path, _ in found.train) == 3
    said = capsys.readouterr().err
    assert "2 links round to a folder above them (train/apple/b/a/round, train/apple/round)" in said
    assert "1 broken link (train/apple/gone.png)" in said and said.count("\n") == 1
    np.testing.assert_array_equal(load("folder", root).test_images, before)


def test_names_are_compared_composed(root):
    """macOS writes an umlaut as two characters; two folders of one name are refused."""
    (root / "train" / "apple").rename(root / "train" / unicodedata.normalize("NFC", "K\u00e4se"))
    (root / "test" / "apple").rename(root / "test" / unicodedata.normalize("NFD", "K\u00e4se"))
    dataset = load("folder", root)
    assert dataset.class_names == ("Banana", "K\u00e4se", "cherry") and dataset.test_labels.tolist() == [0, 1, 2]
    save(root / "train" / unicodedata.normalize("NFD", "K\u00e4se") / "a.png")
    refused("have one name, K\u00e4se: put them together", root)


def test_the_case_of_a_folder_does_not_matter_where_it_is_clear(root):
    before = load("folder", root)
    (root / "train").rename(root / "Train")
    (root / "test" / "apple").rename(root / "test" / "Apple")
    after = load("folder", root)
    assert after.class_names == before.class_names and after.test_labels.tolist() == before.test_labels.tolist()
    save(root / "test" / "APPLE" / "a.png")
    refused("are of one class, apple: put them together", root)


def test_a_folder_that_is_not_split(tmp_path, root):
    """Stratified, by seed, the same each time; what one class draws does not depend on the others."""
    for name, count in (("a", 10), ("b", 5), ("c", 2)):
        for i in range(count):
            save(tmp_path / "all" / name / f"{i}.png", (i, 0, 0))
    refused("there is no folder .*all/train; .* split their images with --test-share 0.2", tmp_path / "all")
    split = load("folder", tmp_path / "all", test_share=0.2)
    assert np.bincount(split.test_labels).tolist() == [2, 1, 1] and np.bincount(split.train_labels).tolist() == [
        8,
        4,
        1,
    ]
    for k, count in enumerate((10, 5, 2)):
        both = (split.train_images[split.train_labels == k], split.test_images[split.test_labels == k])
        assert sorted(int(image[0, 0, 0]) for images in both for image in images) == list(range(count))
    again = load("folder", tmp_path / "all", test_share=0.2)
    np.testing.assert_array_equal(split.test_images, again.test_images)
    others = [load("folder", tmp_path / "all", test_share=0.2, split_seed=seed).test_images for seed in range(1, 5)]
    assert any(not np.array_equal(split.test_images, other) for other in others)
    lazy = load("imagefolder", tmp_path / "all", test_share=0.2)
    assert lazy.test_names == split.test_names
    save(tmp_path / "all" / "0" / "a.png")
    refused("the class 0 has 1 image: to split", tmp_path / "all", test_share=0.2)
    save(tmp_path / "all" / "0" / "b.png")
    more = load("folder", tmp_path / "all", test_share=0.2)
    np.testing.assert_array_equal(more.test_images[1:], split.test_images)
    refused("test_share 0.2 has no effect: .*test holds the test images", root, test_share=0.2)
    for path in sorted((root / "test").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (root / "test").rmdir()
    refused("there is no folder .*test; .*split the images of .*train with --test-share 0.2", root)
    assert load("folder", root, test_share=0.4).test_labels.tolist() == [0, 1, 2]


def test_many_images_come_in_order_with_a_bar(tmp_path, capsys):
    for i in range(201):
        save(tmp_path / "train" / "a" / f"{i:03}.bmp", (i, 0, 0), size=(2, 2))
    save(tmp_path / "test" / "a" / "a.bmp")
    dataset = load("folder", tmp_path, image_size=2)
    assert dataset.train_images[:, 0, 0, 0].tolist() == list(range(201))
    assert "201/201" in capsys.readouterr().err


def test_a_missing_folder(tmp_path, root):
    refused("there is no folder .*nowhere/train; put images in", root / "nowhere")
    for path in (root / "test").rglob("*.png"):
        path.unlink()
    refused("the test split is empty", root)
    for path in (root / "test").iterdir():
        path.rmdir()
    refused("test has no class folders", root)
    (root / "test").rmdir()
    refused("there is no folder .*test", root)


def test_a_class_without_images(root):
    (root / "train" / "durian").mkdir()
    refused("durian has no images", root)


def test_a_test_class_that_is_not_trained(root):
    save(root / "test" / "durian" / "a.png")
    refused("test/durian has no folder of that name in .*train", root)


def test_a_test_class_may_be_missing(root):
    (root / "test" / "apple" / "0.png").unlink()
    (root / "test" / "apple").rmdir()
    assert load("folder", root).test_labels.tolist() == [0, 2]


@pytest.mark.parametrize("image_size", [0, -1, 5000])
def test_an_image_size_out_of_range(root, image_size):
    refused("image size .* choose 1 to 4096", root, image_size=image_size)


def broken_images():
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    png = buffer.getvalue()
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    jpeg = buffer.getvalue()
    yield "empty", b""
    yield "text", b"hello\nworld"
    yield "cut png", png[: len(png) // 2]
    yield "cut jpeg", jpeg[: len(jpeg) // 2]
    yield "damaged png", png[:200] + b"xxxx" + png[204:]
    bits = b"#define a_width 8\n#define a_height 1\nstatic char a_bits[] = {\n0x00};\n"
    yield "whole, but of another format", bits
    yield "postscript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("data", [pytest.param(data, id=what) for what, data in broken_images()])
def test_a_broken_image_is_named(root, data):
    (root / "train" / "apple" / "1.png").write_bytes(data)
    refused(r"apple/1\.png cannot be read as an image \(.*\); replace or remove it", root)


def test_sixteen_bits_are_not_cut_off(root):
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(root / "train" / "apple" / "1.png")
    refused("more than 8 bits a channel", root)


@pytest.mark.parametrize("side", [10_000, 50_000])  # where Pillow warns, and where it refuses by itself
def test_a_decompression_bomb_is_refused(root, side):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path = root / "train" / "apple" / "1.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as a user may have it
        refused("decompression bomb", root)
        with pytest.raises(InputError, match="decompression bomb"):
            read_image(path, 8)


def test_without_pillow(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    refused(r'pip install "minivit\[interop\]"', root)
