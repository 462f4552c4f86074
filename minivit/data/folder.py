"""Your own images: ``root/train/CLASS/*.png`` and ``root/test/CLASS/*.png`` (or jpg, bmp, gif, webp)."""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minivit.base.errors import InputError
from minivit.data.cut import cut_as
from minivit.data.dataset import Dataset
from minivit.data.size import check_size

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
# Pillow goes by a file's content, not its name, and some other formats start programs (EPS: Ghostscript).
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP")


def load_folder(data_dir, image_size=32, *, whole=False, preprocessing=None):
    """Load a folder of images; the classes are the names of the folders in ``train``, sorted.

    Hidden files and other endings are left out. Images are those of `read_image`; with ``whole`` nothing is cut off:
    they are scaled (bilinear) to a square, whatever their shape; with a `Preprocessing` they are cut as it says.

    Shapes  images (n, image_size, image_size, 3) uint8, in the order of classes and file names
    Raises  InputError: folders or images are missing, a test class has no training images, or an image is broken.
    """
    root = Path(data_dir)
    class_names = class_folders(root / "train")
    refuse_unknown_classes(root / "test", class_names, root / "train")
    splits, names = [], ()
    for split in ("train", "test"):
        paths = [_image_files(root / split / name) for name in class_names]
        for name, files in zip(class_names, paths, strict=True):
            if split == "train" and not files:
                raise InputError(f"{root / split / name} has no images ({', '.join(SUFFIXES)}); add some")
        labels = np.repeat(np.arange(len(paths)), [len(files) for files in paths])
        paths = list(chain.from_iterable(paths))
        cut = cut_as(preprocessing) if preprocessing else _squeeze if whole else _fit
        splits += [_read_all(paths, image_size, cut), labels]
        names = tuple(path.name for path in paths)
    return Dataset("folder", *splits, tuple(class_names), str(root), names)


def read_image(path, image_size, preprocessing=None):
    """Read one image as RGB, its short side scaled to ``image_size`` (bicubic), its centre cut out.

    It is turned upright as its camera says (EXIF). Of an animation the first frame is taken; transparency is ignored.

    With a `Preprocessing` it is scaled and cut as that says.

    Shapes  ->  (image_size, image_size, 3) uint8
    Raises  InputError: Pillow is missing, or the image cannot be read, is huge, or has more than 8 bits a channel.
    """
    with _pillow() as pillow:
        cut = cut_as(preprocessing) if preprocessing else _fit
        return read_upright(path, cut(image_size, *pillow), *pillow)


def pillow_modules():
    """Pillow's (Image, ImageOps).

    Raises  InputError: it is not installed.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise InputError('reading images needs Pillow; run: pip install "minivit[interop]"') from None
    return Image, ImageOps


@contextmanager
def _pillow():
    Image, ImageOps = pillow_modules()
    with warnings.catch_warnings():  # not in the threads below: the filters belong to the whole process
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield Image, ImageOps


def _fit(image_size, Image, ImageOps):
    return lambda image: ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)


def _squeeze(image_size, Image, _):
    return lambda image: image.resize((image_size, image_size), Image.Resampling.BILINEAR)


def read_upright(path, cut, Image, ImageOps):
    """Read one image, turn it upright, convert it to RGB, and return what ``cut`` makes of it, as an array.

    Raises  InputError: the image cannot be read, is huge, or has more than 8 bits a channel.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # of which Pillow itself may only warn
                raise ValueError(f"{image.width} x {image.height} pixels could be a decompression bomb")
            if image.mode.startswith(("I", "F")):
                raise ValueError("more than 8 bits a channel")  # Pillow would cut these off, not scale them
            ImageOps.exif_transpose(image, in_place=True)
            if "transparency" in image.info:  # Pillow warns of going to RGB at once
                image = image.convert("RGBA")
            return np.asarray(cut(image.convert("RGB")))
    except Exception as error:  # Pillow raises nearly anything for a broken file
        raise InputError(f"{path} cannot be read as an image ({error}); replace or remove it") from error


def _read_all(paths, image_size, cut):
    check_size(image_size)
    images = np.empty((len(paths), image_size, image_size, 3), np.uint8)
    # Pillow decodes and scales without holding the interpreter's lock.
    with _pillow() as pillow, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        stream = pool.map(lambda path: read_upright(path, cut(image_size, *pillow), *pillow), paths)
        for i, image in enumerate(tqdm(stream, "images", len(paths), disable=len(paths) <= 200)):
            images[i] = image
    return images


def _visible(folder):
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def class_folders(folder):
    """The names of the folders in a folder, sorted: the classes.

    Raises  InputError: there is no such folder, or there are none in it.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; put images in {folder / 'CLASS'}, one folder a class")
    names = [path.name for path in _visible(folder) if path.is_dir()]
    if not names:
        raise InputError(f"{folder} has no class folders; put images in {folder / 'CLASS'}")
    return names


def refuse_unknown_classes(folder, class_names, train):
    """Raises InputError if a folder's classes are not all among those of the training images, in ``train``."""
    unknown = sorted(set(class_folders(folder)) - set(class_names))
    if unknown:
        raise InputError(f"{folder / unknown[0]} has no folder of that name in {train}; add it")


def _image_files(folder):
    if not folder.is_dir():
        return []
    return [path for path in _visible(folder) if path.suffix.lower() in SUFFIXES and path.is_file()]
