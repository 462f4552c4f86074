"""Images cut as other programs cut them, pixel for pixel: tools/make_reference.py asked transformers and timm."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from minivit import InputError
from minivit.data import LazyImages, load, read_image
from minivit.data.cut import byte_weights, cut_as
from minivit.weights.layouts.processors import of_timm, of_transformers
from minivit.weights.preprocessing import Preprocessing, own

with np.load(Path(__file__).with_name("outside_pixels.npz")) as file:
    ARRAYS = dict(file)
CASES = json.loads(str(ARRAYS.pop("settings")))
READERS = {"hf": of_transformers, "timm": of_timm}


@pytest.mark.parametrize(("kind", "n"), [(kind, n) for kind in READERS for n in range(len(CASES[kind]))])
def test_every_pixel_is_that_of_the_other_program(tmp_path, kind, n):
    preprocessing, _ = READERS[kind](CASES[kind][n], "x")
    for k in range(3):
        Image.fromarray(ARRAYS[f"image/{k}"]).save(tmp_path / f"{k}.png")
        np.testing.assert_array_equal(read_image(tmp_path / f"{k}.png", 16, preprocessing), ARRAYS[f"{kind}/{n}/{k}"])
    lazy = LazyImages(tmp_path, ["1.png", "0.png"], [0, 0], 16, preprocessing=preprocessing)
    np.testing.assert_array_equal(lazy[1], ARRAYS[f"{kind}/{n}/0"])
    np.testing.assert_array_equal(lazy.take([0]).mirror()[0], ARRAYS[f"{kind}/{n}/1"][:, ::-1])


def test_a_folder_is_cut_so_too(tmp_path):
    preprocessing, _ = of_transformers(CASES["hf"][0], "x")
    for split in ("train", "test"):
        for k, name in enumerate("ab"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(ARRAYS[f"image/{k}"]).save(tmp_path / split / name / "0.png")
    for kind in ("folder", "imagefolder"):
        data = load(kind, tmp_path, image_size=16, preprocessing=preprocessing)
        for k in range(2):
            np.testing.assert_array_equal(data.test_images[k], ARRAYS[f"hf/0/{k}"])
    plain = load("folder", tmp_path, image_size=16)
    assert np.abs(plain.test_images[0].astype(int) - ARRAYS["hf/0/0"]).max() > 50  # a centre is not the whole


def test_weights_of_bytes_have_fifteen_bits_and_add_up():
    for n, o, kind in ((16, 37, "bilinear"), (224, 23, "bicubic"), (5, 300, "lanczos")):
        M, places = byte_weights(n, o, kind)
        assert M.shape == (n, o) and 2**14 <= M.max() < 2**15 and (M == np.rint(M)).all()
        np.testing.assert_allclose(M.sum(axis=1), 2.0**places, rtol=1e-3)


def test_what_cannot_come_to_the_models_size_is_refused(tmp_path):
    Image.fromarray(ARRAYS["image/0"]).save(tmp_path / "0.png")
    with pytest.raises(InputError, match="it has 37 x 61 pixels and its model's program resizes none"):
        read_image(tmp_path / "0.png", 16, Preprocessing("torchvision"))
    Image.new("RGB", (1, 20_000)).save(tmp_path / "thin.png")
    with pytest.raises(InputError, match="it would be resized to 224 x 4480000 pixels"):
        read_image(tmp_path / "thin.png", 224, own(224))


def test_minivits_own_way_in_the_words_of_others():
    """The short side to the model's size and the centre: what is left is less than a pixel's place."""
    image = Image.fromarray(ARRAYS["image/0"])
    theirs = cut_as(own(16))(16, Image, ImageOps)(image)
    ours = np.asarray(ImageOps.fit(image, (16, 16), Image.Resampling.BICUBIC))
    assert np.abs(theirs.astype(int) - ours).mean() < 8
