"""Folders of images: what is found, how it is scaled, and what is refused."""

import io
import struct
import sys
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from minivit.base.errors import InputError
from minivit.data import load, read_image

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
    for ending in ("png", "jpg", "jpeg", "bmp", "gif", "webp", "PNG", "Jpg"):
        save(tmp_path / "train" / ending / f"a.{ending}", (130, 130, 130))
    save(tmp_path / "test" / "png" / "a.png")
    dataset = load("folder", tmp_path, image_size=4)
    assert len(dataset.class_names) == len(dataset.train_labels) == 8
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
    assert (read_image(tmp_path / "a.png", 4) == (9, 8, 7)).all()


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


def test_other_and_hidden_files_are_left_out(root):
    before = load("folder", root)
    (root / "train" / "apple" / "notes.txt").write_text("x")
    (root / "train" / "apple" / ".hidden.png").write_text("x")
    (root / "train" / ".cache").mkdir()
    (root / "train" / "list.png").write_text("x")
    (root / "train" / "apple" / "folder.png").mkdir()
    after = load("folder", root)
    assert after.class_names == before.class_names
    np.testing.assert_array_equal(after.train_images, before.train_images)


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
    yield "whole, but of another format", b"P6 1 1 255\n\x00\x00\x00"
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
