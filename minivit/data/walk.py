"""What lies in folders of images: classes, the images below each, and what is left out.

Images below a class are walked as torchvision's ImageFolder walks them: the folder's own files first, then those of its
folders, sorted; links are followed, but never round. Names are compared in Unicode's composed form (NFC), in which
"ä" is one character: macOS writes it as two.
"""

import os
import unicodedata
from pathlib import Path

import numpy as np

from minivit.base.errors import InputError
from minivit.base.words import counted

SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
    ".pnm", ".avif", ".avifs", ".jp2", ".j2k", ".jpx", ".jpf", ".ico", ".tga", ".pcx", ".qoi", ".sgi", ".dds", ".psd",
)  # fmt: skip
OTHER, HIDDEN, EMPTY = "file without an image's ending", "hidden entry", "folder without images"
BROKEN, ROUND, STRAY = "broken link", "link round to a folder above it", "image outside of the class folders"
PLURALS = {
    OTHER: "files without an image's ending", HIDDEN: "hidden entries", EMPTY: "folders without images",
    BROKEN: "broken links", ROUND: "links round to a folder above them", STRAY: "images outside of the class folders",
}  # fmt: skip
NAMED = 3  # how many of a kind a note names


def composed(name):
    """A name in Unicode's composed form."""
    return unicodedata.normalize("NFC", name)


def folder_named(parent, name):
    """The folder of a name in a folder, or None: of the same letters, or else of the same but for their case.

    Raises  InputError: two folders have the name.
    """
    if not Path(parent).is_dir():
        return None
    folders = [path for path in Path(parent).iterdir() if path.is_dir()]
    for key in (str, composed, lambda text: composed(text).casefold()):
        found = sorted(path for path in folders if key(path.name) == key(name))
        if len(found) > 1:
            raise InputError(f"{found[0]} and {found[1]} have one name, {composed(name)}: put them together")
        if found:
            return found[0]
    return None


def is_hidden(name):
    """Is an entry of a folder hidden, or a Mac's archive of what is?"""
    return name.startswith(".") or name == "__MACOSX"


def is_image(name):
    """Does a file's name end as an image's does?"""
    return name.lower().endswith(SUFFIXES)


class LeftOut(dict):
    """What was left out, {kind: [paths]}, of which `note` makes a line."""

    def add(self, kind, path):
        """Add one entry."""
        self.setdefault(kind, []).append(str(path))

    def note(self, root):
        """All of it in one line, or "" where nothing was left out."""
        parts = []
        for kind, paths in self.items():
            few = ", ".join(sorted(paths)[:NAMED]) + (", ..." if len(paths) > NAMED else "")
            parts.append(f"{counted(len(paths), kind, PLURALS[kind])} ({few})")
        return f"left out of {root}: {', '.join(parts)}" if parts else ""


def class_folders(folder, left_out=None, *, hint=""):
    """The class folders in a folder, {class: folder}, sorted by the classes' names in composed form.

    Raises  InputError: there is no such folder, none in it, or two of one name; ``hint`` is added to the first.
    """
    folder, left_out = Path(folder), LeftOut() if left_out is None else left_out
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; put images in {folder / 'CLASS'}, one folder a class{hint}")
    classes = {}
    for path in sorted(folder.iterdir()):
        name, place = composed(path.name), f"{folder.name}/{path.name}"
        if is_hidden(path.name):
            left_out.add(HIDDEN, place)
        elif not path.is_dir():
            left_out.add(STRAY if is_image(path.name) else OTHER, place)
        elif name in classes:
            raise InputError(f"{classes[name]} and {path} have one name, {name}: put them together")
        else:
            classes[name] = path
    if not classes:
        raise InputError(f"{folder} has no class folders; put images in {folder / 'CLASS'}")
    return dict(sorted(classes.items()))


def images_below(root, folder, left_out):
    """(path from the root, length in bytes) of every image in a folder and in those below it.

    Order   the folder's own, sorted, then those of its folders, sorted, as torchvision's ImageFolder has them
    """
    found = {}
    waiting = [(Path(os.path.relpath(folder, root)).as_posix(), ())]
    while waiting:
        place, above = waiting.pop()
        own = os.stat(f"{root}/{place}")
        if (own.st_dev, own.st_ino) in above:
            left_out.add(ROUND, place)
            continue
        above += ((own.st_dev, own.st_ino),)
        files, folders = [], 0
        with os.scandir(f"{root}/{place}") as entries:
            for entry in entries:
                path = f"{place}/{entry.name}"  # on Windows too: the names are part of the identity
                if is_hidden(entry.name):
                    left_out.add(HIDDEN, path)
                elif entry.is_dir():
                    folders += 1
                    waiting.append((path, above))
                elif not entry.is_file():
                    left_out.add(BROKEN if entry.is_symlink() else OTHER, path)
                elif not is_image(entry.name):
                    left_out.add(OTHER, path)
                else:
                    files.append((path, entry.stat().st_size))
        if not files and not folders:
            left_out.add(EMPTY, place)
        found[place] = sorted(files)
    return [file for place in sorted(found) for file in found[place]]


def split_files(files, classes, share, seed):
    """A split of each class's files for training and testing, drawn at random: two lists of one list for each class.

    Of n files of a class, ``share`` n are for testing, rounded, at least one and at most n - 1. What is drawn for a
    class depends on its name, its files and the seed alone.

    Raises  InputError: a class of fewer than two images.
    """
    train, test = [], []
    for name, own in zip(classes, files, strict=True):
        n = len(own)
        if n < 2:
            raise InputError(
                f"the class {name} has {counted(n, 'image')}: to split, it takes at least one for training and one "
                "for testing"
            )
        count = min(max(round(share * n), 1), n - 1)
        chosen = np.random.default_rng([seed, *name.encode()]).permutation(n)[:count]
        tested = np.isin(np.arange(n), chosen)
        train.append([file for file, is_tested in zip(own, tested, strict=True) if not is_tested])
        test.append([file for file, is_tested in zip(own, tested, strict=True) if is_tested])
    return train, test
