"""Your own images: ``root/train/CLASS/*.png`` and ``root/test/CLASS/*.png``, or ``root/CLASS/*.png``, to be split.

The endings are those of `minivit.data.walk`: png, jpg, tif, webp, ... Images of a class may lie in folders below it.
"""

import io
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from minivit.base.errors import InputError
from minivit.base.words import counted, note
from minivit.data.cut import cut_as
from minivit.data.dataset import Dataset
from minivit.data.size import check_size
from minivit.data.walk import LeftOut, class_folders, folder_named, images_below, is_image, split_files

# Pixels that any file may hold, and so many for each of its bytes: flat areas of a PNG come to 340.
FEW_PIXELS, PIXELS_A_BYTE = 2**22, 1000
# Pillow goes by a file's content, not its name. Of what it opens, these are read by its own code and its libraries;
# others start programs (EPS: Ghostscript), ask the system (WMF), or are more than images.
_FORMATS = (
    "PNG", "JPEG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA", "PCX", "QOI", "SGI",
    "DDS", "PSD",
)  # fmt: skip


def load_folder(data_dir, image_size=32, *, whole=False, test_share=None, split_seed=0, preprocessing=None):
    """Load a folder of images; the classes are the names of the folders in ``train``, sorted.

    What is left out, hidden files and other endings, is told in a line. Images are those of `read_image`; with
    ``whole`` nothing is cut off: they are scaled (bilinear) to a square, whatever their shape; with a `Preprocessing`
    they are cut as it says. ``test_share``: see `find_images`.

    Shapes  images (n, image_size, image_size, 3) uint8, in the order of classes and file names
    Raises  InputError: folders or images are missing, a test class has no training images, or an image is broken.
    """
    check_size(image_size)
    found = find_images(data_dir, ("test", "val"), test_share=test_share, split_seed=split_seed)
    cut = cut_as(preprocessing) if preprocessing else _squeeze if whole else _fit
    train, test = (
        _read_all(found.root, [found.root / path for path, _ in files], image_size, cut)
        for files in (found.train, found.test)
    )
    return Dataset(
        "folder", train, found.train_labels, test, found.test_labels, found.classes, found.source, names_of(found.test)
    )


class Found(NamedTuple):
    """The images of a folder, as (path from the root, length in bytes), and their labels."""

    root: Path
    classes: tuple  # names, in composed form
    train: list
    train_labels: np.ndarray  # (n,) int64
    test: list
    test_labels: np.ndarray  # (m,) int64
    source: str  # one line: where they came from


def names_of(files):
    """The names of images, without their folders."""
    return tuple(os.path.basename(path) for path, _ in files)


def _joined(split):
    """(images, labels (n,)) of a list of images for each class."""
    return list(chain.from_iterable(split)), np.repeat(np.arange(len(split)), [len(files) for files in split])


def find_images(data_dir, tested, *, test_share=None, split_seed=0, listed=None):
    """Find the images in folders, and tell what is left out: `Found`.

    ``tested`` are names of the folder of test images; the first that is there counts. With ``test_share`` there is
    none: that share of the images of each class, in ROOT/CLASS or ROOT/train/CLASS, is for testing, drawn by
    ``split_seed`` (see `split_files`). ``listed(root, folder, classes, left_out)`` reads a folder of test images whose
    classes are in a list: (images, labels), or None where it is none such; with it a folder train may be missing.

    Raises  InputError: folders or images are missing, or a class is not among those of the training images.
    """
    root, left_out = Path(data_dir), LeftOut()
    train, source = folder_named(root, "train"), str(root)
    test = next((folder for name in tested if (folder := folder_named(root, name))), None)
    if test_share is not None:
        if test:
            raise InputError(f"test_share {test_share:g} has no effect: {test} holds the test images; leave it out")
        classes = class_folders(train or root, left_out)
        files = [images_below(root, folder, left_out) for folder in classes.values()]
        split = map(_joined, split_files(files, classes, test_share, split_seed))
        source += f"; {test_share:g} of each class for testing, drawn by seed {split_seed}"
    else:
        alone = listed and not train
        place = root / "test" if alone or train else root / "train"  # which is missing, if one is
        classes = class_folders(test if alone and test else train or place, left_out, hint=_hint(root, train, test))
        files = [[] if alone else images_below(root, folder, left_out) for folder in classes.values()]
        from_list = listed(root, test, list(classes), left_out) if listed and test else None
        split = _joined(files), from_list or _tested(root, test or root / "test", classes, alone, left_out)
    split = [part for files in split for part in files]
    counts = np.bincount(split[1], minlength=len(classes))
    if split[0] and not counts.all():
        raise InputError(f"{list(classes.values())[counts.argmin()]} has no images (.png, .jpg, .tif, ...); add some")
    if left_out:
        note(left_out.note(root))
    return Found(root, tuple(classes), *split, source)


def _hint(root, train, test):
    """What else can be done where one of the two folders is missing."""
    if test or not root.is_dir():
        return ""
    if train:
        return f"; or split the images of {train} with --test-share 0.2"
    if any(_holds_images(folder) for folder in root.iterdir()):
        return f"; or, if {root} has a folder for each class, split their images with --test-share 0.2"
    return ""


def _tested(root, test, classes, alone, left_out):
    """(images, labels) of the class folders of test images; ``classes``: those in train, or ``alone`` their own."""
    hint = _hint(root, root / "train", test if test.is_dir() else None)
    own = classes if alone else class_folders(test, left_out, hint=hint)
    folders = {}
    for name, folder in own.items():
        alike = [name] if name in classes else [each for each in classes if each.casefold() == name.casefold()]
        if len(alike) != 1:
            raise InputError(f"{folder} has no folder of that name in {root / 'train'}; add it")
        if alike[0] in folders:
            raise InputError(f"{folders[alike[0]]} and {folder} are of one class, {alike[0]}: put them together")
        folders[alike[0]] = folder
    return _joined([images_below(root, folders[name], left_out) if name in folders else [] for name in classes])


def _holds_images(folder):
    return folder.is_dir() and any(is_image(path.name) for path in folder.iterdir())


def read_image(path, image_size, preprocessing=None):
    """Read one image as RGB, its short side scaled to ``image_size`` (bicubic), its centre cut out.

    It is turned upright as its camera says (EXIF). Of an animation the first frame is taken; what is transparent is put
    on white, and that is told in a line.

    With a `Preprocessing` it is scaled and cut as that says.

    Shapes  ->  (image_size, image_size, 3) uint8
    Raises  InputError: Pillow is missing, or the image cannot be read, is huge, or has more than 8 bits a channel.
    """
    with _pillow() as pillow:
        transparent = []
        cut = cut_as(preprocessing) if preprocessing else _fit
        image = read_upright(path, cut(image_size, *pillow), *pillow, transparent)
    tell_transparent(transparent)
    return image


def tell_transparent(paths, root=None):
    """Say in one line which images had transparent parts, if any."""
    if paths:
        where = f" of {root}" if root else ""
        note(f"transparent parts are put on white, in {counted(len(paths), 'image')}{where} (first {min(paths)})")


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


def read_upright(path, cut, Image, ImageOps, transparent=None):
    """Read one image, turn it upright, convert it to RGB, and return what ``cut`` makes of it, as an array.

    Parts that are transparent are put on white; the path is then added to the list ``transparent``.
    Raises  InputError: the image cannot be read, is huge, or has more than 8 bits a channel.
    """
    try:
        if not os.path.isfile(path) and os.path.exists(path):
            raise ValueError("it is not a file")
        data = Path(path).read_bytes()  # of a file Pillow would ask for as many bytes as a damaged length claims
        with Image.open(io.BytesIO(data), formats=_formats(Image)) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # of which Pillow itself may only warn
                raise ValueError(f"{image.width} x {image.height} pixels could be a decompression bomb")
            if image.width * image.height > max(FEW_PIXELS, PIXELS_A_BYTE * len(data)):
                raise ValueError(
                    f"{image.width} x {image.height} pixels in {len(data):,} bytes are a decompression bomb"
                )
            if image.mode.startswith(("I", "F")):  # Pillow would cut these off, not scale them
                raise ValueError(f"more than 8 bits a channel, Pillow's mode {image.mode}; save it with 8")
            ImageOps.exif_transpose(image, in_place=True)
            image, seen_through = _on_white(image, Image)
            if seen_through and transparent is not None:
                transparent.append(str(path))
            return np.asarray(cut(image))
    except Exception as error:  # Pillow raises nearly anything for a broken file
        raise InputError(f"{path} cannot be read as an image ({error}); replace or remove it") from error


def _formats(Image):
    """Those of the formats that this Pillow knows."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _on_white(image, Image):
    """(an image as RGB, what is transparent in it on white; whether anything was)."""
    if "transparency" not in image.info and not image.mode.endswith(("A", "a")):
        return image.convert("RGB"), False
    image = image.convert("LA") if image.mode == "La" else image
    image = image.convert("RGBA")
    if image.getchannel("A").getextrema()[0] == 255:
        return image.convert("RGB"), False
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB"), True


def _read_all(root, paths, image_size, cut):
    images = np.empty((len(paths), image_size, image_size, 3), np.uint8)
    transparent = []
    # Pillow decodes and scales without holding the interpreter's lock.
    with _pillow() as pillow, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        make = cut(image_size, *pillow)
        stream = pool.map(lambda path: read_upright(path, make, *pillow, transparent), paths)
        for i, image in enumerate(tqdm(stream, "images", len(paths), disable=len(paths) <= 200)):
            images[i] = image
    tell_transparent(transparent, root)
    return images
