"""Your own pictures: ``root/train/CLASS/*.png`` and ``root/test/CLASS/*.png`` (or jpg, bmp, gif, webp)."""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minivit.data.dataset import Dataset
from minivit.data.scaling import check_size
from minivit.errors import InputError

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
# Pillow goes by a file's content, not its name, and some other formats start programs (EPS: Ghostscript).
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP")


def load_folder(data_dir, image_size=32):
    """Load a folder of pictures; the classes are the names of the folders in ``train``, sorted.

    Hidden files and other endings are left out.

    Shapes  pictures (n, image_size, image_size, 3) uint8 from `read_image`, in the order of classes and file names
    Raises  InputError: folders or pictures are missing, a test class has no training pictures, or a picture is broken.
    """
    root = Path(data_dir)
    class_names = _classes(root / "train")
    unknown = sorted(set(_classes(root / "test")) - set(class_names))
    if unknown:
        raise InputError(f"{root / 'test' / unknown[0]} has no folder of that name in {root / 'train'}; add it")
    splits = []
    for split in ("train", "test"):
        paths = [_pictures(root / split / name) for name in class_names]
        for name, found in zip(class_names, paths, strict=True):
            if split == "train" and not found:
                raise InputError(f"{root / split / name} has no pictures ({', '.join(_SUFFIXES)}); add some")
        labels = np.repeat(np.arange(len(paths)), [len(found) for found in paths])
        splits += [_read_all(list(chain.from_iterable(paths)), image_size), labels]
    return Dataset("folder", *splits, tuple(class_names), str(root))


def read_image(path, image_size):
    """Read one picture as RGB, its short side scaled to ``image_size`` (bicubic), its centre cut out.

    Turned as its camera says (EXIF); of an animation the first frame; transparency is ignored.

    Shapes  ->  (image_size, image_size, 3) uint8
    Raises  InputError: Pillow is missing, or the picture cannot be read, is huge, or has more than 8 bits a channel.
    """
    with _pillow() as pillow:
        return _decoded(path, image_size, *pillow)


@contextmanager
def _pillow():
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise InputError('reading pictures needs Pillow; run: pip install "minivit[interop]"') from None
    with warnings.catch_warnings():  # not in the threads below: the filters belong to the whole process
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield Image, ImageOps


def _decoded(path, image_size, Image, ImageOps):
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError("more than 8 bits a channel")  # Pillow would cut these off, not scale them
            ImageOps.exif_transpose(image, in_place=True)
            if "transparency" in image.info:  # Pillow warns of going to RGB at once
                image = image.convert("RGBA")
            square = ImageOps.fit(image.convert("RGB"), (image_size, image_size), Image.Resampling.BICUBIC)
            return np.asarray(square)
    except Exception as error:  # Pillow raises nearly anything for a broken file
        raise InputError(f"{path} cannot be read as a picture ({error}); replace or remove it") from error


def _read_all(paths, image_size):
    check_size(image_size)
    images = np.empty((len(paths), image_size, image_size, 3), np.uint8)
    # Pillow decodes and scales without holding the interpreter's lock.
    with _pillow() as pillow, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        decoded = pool.map(lambda path: _decoded(path, image_size, *pillow), paths)
        for i, image in enumerate(tqdm(decoded, "pictures", len(paths), disable=len(paths) <= 200)):
            images[i] = image
    return images


def _visible(folder):
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _classes(folder):
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; put pictures in {folder / 'CLASS'}, one folder a class")
    names = [path.name for path in _visible(folder) if path.is_dir()]
    if not names:
        raise InputError(f"{folder} has no class folders; put pictures in {folder / 'CLASS'}")
    return names


def _pictures(folder):
    if not folder.is_dir():
        return []
    return [path for path in _visible(folder) if path.suffix.lower() in _SUFFIXES and path.is_file()]
