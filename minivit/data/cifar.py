"""CIFAR-10 and CIFAR-100: find them on disk in any of their official forms, or download them.

A data set is looked for in this order: the binary folder, the Python folder, the binary archive, the Python
archive; ``data_dir`` may also be one of those itself. Archives are read as they lie, without unpacking.

Binary files are records of label bytes (CIFAR-10: one; CIFAR-100: coarse, fine) and 3 x 32 x 32 pixel bytes,
one plane per colour. Python files are pickles, and a pickle is a program: here it is read by an unpickler
that knows nothing but the stand-ins below, so the worst that a file from anywhere can do is be refused.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009,
https://www.cs.toronto.edu/~kriz/cifar.html.
"""

import gzip
import hashlib
import io
import os
import pickle
import pickletools
import shlex
import tarfile
import tempfile
import zlib
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import numpy as np
from tqdm import tqdm

from minivit.base.errors import InputError
from minivit.data.dataset import Dataset

_URL = "https://www.cs.toronto.edu/~kriz/"
_PIXELS = 3 * 32 * 32
# The official archives hold 185 MB each, in files of up to 156 MB. Anything far larger is no CIFAR, and is
# refused before it fills the memory.
_MAX_BYTES = 512 * 2**20
_OFFICIAL = "get the official file"  # the advice in many an error


class _Layout(NamedTuple):
    """The names of one official form of a data set."""

    binary: bool  # or else pickled
    folder: str
    archive: str
    train: tuple[str, ...]
    test: str
    class_names: str

    @property
    def pictures(self):
        return (*self.train, self.test)

    @property
    def files(self):
        return (*self.pictures, self.class_names)


class _Set(NamedTuple):
    """What the forms of one data set have in common."""

    layouts: tuple[_Layout, ...]
    md5: str  # of the first layout's archive
    label_bytes: int  # in a binary record; the last one is the label
    label_key: bytes  # in a pickled dictionary
    names_key: bytes
    class_names: str


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
_BINARY_BATCHES = tuple(f"{batch}.bin" for batch in _BATCHES)
_SETS = {
    "cifar10": _Set(
        layouts=(
            _Layout(
                True,
                "cifar-10-batches-bin",
                "cifar-10-binary.tar.gz",
                _BINARY_BATCHES,
                "test_batch.bin",
                "batches.meta.txt",
            ),
            _Layout(
                False,
                "cifar-10-batches-py",
                "cifar-10-python.tar.gz",
                _BATCHES,
                "test_batch",
                "batches.meta",
            ),
        ),
        md5="c32a1d4ab5d03f1284b67883e8d87530",
        label_bytes=1,
        label_key=b"labels",
        names_key=b"label_names",
        class_names="airplane automobile bird cat deer dog frog horse ship truck",
    ),
    "cifar100": _Set(
        layouts=(
            _Layout(
                True,
                "cifar-100-binary",
                "cifar-100-binary.tar.gz",
                ("train.bin",),
                "test.bin",
                "fine_label_names.txt",
            ),
            _Layout(False, "cifar-100-python", "cifar-100-python.tar.gz", ("train",), "test", "meta"),
        ),
        md5="03b5dce01913d631647c71ecec9e9cb8",
        label_bytes=2,
        label_key=b"fine_labels",
        names_key=b"fine_label_names",
        class_names="""
            apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
            butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch
            crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo
            keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse
            mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy
            porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper
            snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television
            tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
        """,
    ),
}


def load_cifar(name, data_dir):
    """Load ``"cifar10"`` or ``"cifar100"`` (its 100 fine classes) from wherever under ``data_dir`` it lies.

    The number of records comes from the files; labels are checked one by one.

    Shapes  pictures (n, 32, 32, 3) uint8, labels (n,) int64
    Raises  InputError: the data are missing (it says how to get them), incomplete, damaged, or not what they claim.
    """
    kind, data_dir = _SETS[name], Path(data_dir)
    path, layout = _find(name, kind, data_dir)
    if path.is_dir():
        read = _folder_reader(path)
    else:
        members = _read_archive(path, {file for each in kind.layouts for file in each.files})
        if layout is None:  # an archive of any name: what it holds tells its form
            layout = next((each for each in kind.layouts if each.test in members), kind.layouts[0])
        read = members.pop

    class_names = tuple(kind.class_names.split())
    stated = read(layout.class_names, None)
    if stated is not None:
        class_names = _parse_class_names(stated, kind, layout, path / layout.class_names)
    parse = _parse_binary if layout.binary else _parse_python
    splits = []
    for files in (layout.train, (layout.test,)):
        parts = []
        for file in files:
            data = read(file, None)
            if data is None:
                raise InputError(f"{path} has no {file}; move it away and fetch {name} again")
            pixels, labels = parse(data, kind, path / file)
            if len(labels) and labels.max() >= len(class_names):
                raise InputError(
                    f"{path / file}: record {labels.argmax()} has label {labels.max()}, but {name} has only"
                    f" {len(class_names)} classes; move {path} away and fetch {name} again"
                )
            parts.append((pixels, labels))
        splits += _joined(parts)
    source = f"{path}, {'binary' if layout.binary else 'Python'} version"
    return Dataset(name, *splits, class_names, source)


def _joined(parts):
    labels = np.concatenate([labels for _, labels in parts])
    images = np.empty((len(labels), 32, 32, 3), np.uint8)
    end = 0
    for pixels, _ in parts:
        start, end = end, end + len(pixels)
        planes = pixels.reshape(-1, 3, 32, 32)  # (n, 3072) -> (n, 3, 32, 32)
        for channel in range(3):  # nine times as fast as one transposed copy
            images[start:end, :, :, channel] = planes[:, channel]
    return images, labels


# --- Finding and reading the files ---


def _find(name, kind, data_dir):
    if data_dir.is_file():
        return data_dir, None
    for layout in kind.layouts:
        if (data_dir / layout.folder).is_dir():
            return data_dir / layout.folder, layout
    for layout in kind.layouts:
        if (data_dir / layout.archive).is_file():
            return data_dir / layout.archive, layout
    for layout in kind.layouts:
        if any((data_dir / file).is_file() for file in layout.pictures):
            return data_dir, layout
    command = f"minivit data fetch {name} --data-dir {shlex.quote(str(data_dir))}"
    url = _URL + kind.layouts[0].archive
    raise InputError(f"{name} is not in {data_dir}: run `{command}`, or download {url} and put it there")


def _folder_reader(folder):
    def read(file, default):
        path = folder / file
        if not path.is_file():
            return default
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{path} has {path.stat().st_size} bytes, far too many; {_OFFICIAL}")
        return path.read_bytes()

    return read


class _Bounded:
    """A file that refuses to be read beyond a limit."""

    def __init__(self, file, path):
        self.file, self.path, self.left = file, path, _MAX_BYTES

    def read(self, size):
        data = self.file.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise InputError(f"{self.path} unpacks to over {_MAX_BYTES} bytes, far too many; {_OFFICIAL}")
        return data


def _read_archive(path, wanted):
    """Return {base name: bytes} of the regular members of a .tar.gz whose base names are wanted."""
    found = {}
    try:
        with gzip.open(path) as file:
            # As a stream ("r|"), every byte goes through _Bounded, those of headers and unwanted members too.
            unpacked = _Bounded(file, path)
            with tarfile.open(fileobj=unpacked, mode="r|") as archive:
                for member in archive:
                    file = member.name.rpartition("/")[2]
                    if file not in wanted or not member.isreg() or member.issparse():
                        continue
                    if member.size > _MAX_BYTES:
                        raise InputError(f"{path}: {file} claims {member.size} bytes, far too many; {_OFFICIAL}")
                    found[file] = archive.extractfile(member).read()
            while unpacked.read(2**16):
                pass  # only at its end does gzip check what it gave
    except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError) as error:
        raise InputError(f"{path} is not a whole .tar.gz archive ({error}); remove it and fetch it again") from error
    return found


# --- The binary version ---


def _parse_binary(data, kind, path):
    record = kind.label_bytes + _PIXELS
    if len(data) % record:
        raise InputError(f"{path} has {len(data)} bytes, no multiple of the {record} of a record; {_OFFICIAL}")
    records = np.frombuffer(data, np.uint8).reshape(-1, record)
    return records[:, kind.label_bytes :], records[:, kind.label_bytes - 1].astype(np.int64)


def _parse_class_names(data, kind, layout, path):
    if layout.binary:
        lines = data.splitlines()
    else:
        lines = _unpickled(data, path).get(kind.names_key)
        if type(lines) is not list or not all(type(line) is bytes for line in lines):
            raise InputError(f"{path} has no list of class names; {_OFFICIAL}")
    names = tuple(line.decode(errors="replace").strip() for line in lines if line.strip())
    expected = len(kind.class_names.split())
    if len(names) != expected:
        raise InputError(f"{path} names {len(names)} classes, not {expected}; {_OFFICIAL}")
    return names


# --- The Python version ---


class _Array:
    """Stands in for numpy.ndarray and its constructor: keeps the pickled state, and interprets none of it."""

    def __init__(self, *_):
        self.state = None

    def __setstate__(self, state):
        self.state = state


class _Dtype:
    """Stands in for numpy.dtype: keeps the type code."""

    def __init__(self, code, *_):
        self.code = code

    def __setstate__(self, state):
        pass  # the byte order, which one-byte numbers do not have


# Nothing here can be changed from within a pickle, as a plain function could (its defaults, for one).
_STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): str.encode,  # Python 3 writes bytes into old pickles as latin-1 text
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _STAND_INS[module, name]


def _unpickled(data, path):
    """Return the dictionary that a CIFAR pickle holds, having run nothing but the stand-ins."""
    try:
        # The unpickler sets aside room for whatever memo number and length a file names, so read them first:
        # genops checks the lengths, and an honest pickle numbers its memo in order.
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if "PUT" in opcode.name and argument > count:
                raise pickle.UnpicklingError("memo out of order")
        result = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # damaged bytes may raise anything
        raise InputError(f"{path} is not a CIFAR pickle ({error}); {_OFFICIAL}") from error
    if type(result) is not dict:
        raise InputError(f"{path} holds a {type(result).__name__}, not a dictionary; {_OFFICIAL}")
    return result


def _parse_python(data, kind, path):
    content = _unpickled(data, path)
    labels = content.get(kind.label_key)
    if type(labels) is not list or not all(type(label) is int and 0 <= label < 256 for label in labels):
        raise InputError(f"{path} has no list of {kind.label_key.decode()}; {_OFFICIAL}")
    match content.get(b"data"):
        case _Array(state=(1, (int(n), 3072), _Dtype(code=b"u1" | "u1"), bool(fortran), bytes(raw))) if (
            n == len(labels) and len(raw) == n * _PIXELS
        ):
            pixels = np.frombuffer(raw, np.uint8).reshape((n, _PIXELS), order="F" if fortran else "C")
            return pixels, np.array(labels, np.int64)
    raise InputError(f"{path} has no uint8 data of shape ({len(labels)}, {_PIXELS}); {_OFFICIAL}")


# --- Download ---


def fetch(name, data_dir="data", *, url=None, progress=True):
    """Download, verify and unpack the official binary archive of a data set, as far as not done before.

    A download that breaks off leaves a ``.part`` file, from which the next call goes on.

    ``data_dir`` is made if it is not there; nothing that was there before is overwritten. ``url`` is another place to
    download the same archive from; the checksum stays the official one.

    Returns  Path of the folder with the data
    Raises   InputError: there is no such data set or no way to it, or what came is not the official archive.
    """
    if name not in _SETS:
        raise InputError(f"there is nothing to fetch for {name!r}; choose one of {', '.join(_SETS)}")
    layout, md5 = _SETS[name].layouts[0], _SETS[name].md5
    data_dir = Path(data_dir)
    folder, archive = data_dir / layout.folder, data_dir / layout.archive
    if folder.exists():
        for file in layout.pictures:
            if not (folder / file).is_file():
                raise InputError(f"{folder} is there but has no {file}; move it away and fetch again")
        return folder
    data_dir.mkdir(parents=True, exist_ok=True)
    if archive.exists():
        _verify(archive, md5, "move it away and fetch again")
    else:
        part = archive.with_name(archive.name + ".part")
        _download(url or _URL + layout.archive, part, data_dir, progress)
        try:
            _verify(part, md5, "it was removed; fetch again")
        except InputError:
            part.unlink()
            raise
        os.replace(part, archive)
    # The folder appears under its name only when it is complete.
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=data_dir) as temporary:
        whole = Path(temporary) / layout.folder
        whole.mkdir()
        for file, data in _read_archive(archive, set(layout.files)).items():
            (whole / file).write_bytes(data)
        whole.rename(folder)
    return folder


def _verify(path, md5, advice):
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != md5:
        raise InputError(f"{path} has the MD5 {found}, not the official {md5}; {advice}")


def _download(url, part, data_dir, progress):
    """Bring the file ``part`` to its full length."""
    have = part.stat().st_size if part.exists() else 0
    request = Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urlopen(request, timeout=60) as response:
            # A server may also send the whole file again (200), or a range of its own choice.
            resumed = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            have = have if response.status == 206 and resumed else 0
            if response.status == 206 and not resumed:
                raise InputError(f"{url} answered with the wrong part; remove {part} and fetch again")
            left = response.headers.get("Content-Length")
            total = None if left is None else have + int(left)
            with (
                open(part, "ab" if have else "wb") as file,
                tqdm(
                    desc=url.rpartition("/")[2],
                    initial=have,
                    total=total,
                    unit="B",
                    unit_scale=True,
                    disable=not progress,
                ) as bar,
            ):
                while have <= _MAX_BYTES and (chunk := response.read(2**18)):
                    file.write(chunk)
                    bar.update(len(chunk))
                    have += len(chunk)
    except HTTPError as error:
        error.close()
        if error.code == 416:  # nothing left to send: the checksum will tell whether it is all there
            return
        reason = error
    except (URLError, HTTPException, ConnectionError, TimeoutError) as error:
        reason = getattr(error, "reason", error)
    else:
        if total is None or have >= total:
            return
        reason = f"the connection broke off after {have} of {total} bytes"
    raise InputError(
        f"could not download {url} ({reason}); fetch again to go on, or get it by other means and put it in {data_dir}"
    )
