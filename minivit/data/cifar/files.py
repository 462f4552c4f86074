"""Where CIFAR's files lie, and their bytes, out of a folder or of an archive that is not unpacked to disk."""

import bz2
import gzip
import lzma
import shlex
import struct
import tarfile
import zipfile
import zlib

from minivit.base.errors import InputError
from minivit.data.cifar import layouts


def find_files(name, data_dir):
    """The folder or archive of a data set, and its `Layout`; None for an archive of any name.

    Raises  InputError: there is none.
    """
    if data_dir.is_file():
        return data_dir, None
    forms = layouts.KINDS[name].layouts
    for layout in forms:
        folder = data_dir / layout.folder
        if folder.is_dir():  # some programs unpack into a folder of the archive's name
            inner = folder / layout.folder
            return (inner if inner.is_dir() and not _holds_any(folder, layout) else folder), layout
    for layout in forms:
        for archive in layout.archives:
            if (data_dir / archive).is_file():
                return data_dir / archive, layout
    for layout in forms:
        if _holds_any(data_dir, layout):
            return data_dir, layout
    command = f"minivit data fetch {name} --data-dir {shlex.quote(str(data_dir))}"
    url = layouts.URL + forms[0].archive
    raise InputError(f"{name} is not in {data_dir}: run `{command}`, or download {url} and put it there")


def _holds_any(folder, layout):
    return any((folder / file).is_file() for file in layout.image_files)


def read_file(path):
    """The bytes of a file, or None where there is none.

    Raises  InputError: it is far too large.
    """
    if not path.is_file():
        return None
    if path.stat().st_size > layouts.MAX_BYTES:
        raise InputError(f"{path} has {path.stat().st_size} bytes, far too many; {layouts.OFFICIAL}")
    return path.read_bytes()


class _Bounded:
    """A file that refuses to be read beyond a limit, and again and again at its end."""

    def __init__(self, file, path):
        self.file, self.path, self.left, self.ends = file, path, layouts.MAX_BYTES, 0

    def read(self, size):
        data = self.file.read(size)
        self.left -= len(data)
        self.ends += not data
        if self.ends > 100:  # tarfile looks for what follows a member that claims any length
            raise EOFError("it ends too soon")
        if self.left < 0:
            raise InputError(f"{self.path} unpacks to over {layouts.MAX_BYTES} bytes, far too many; {layouts.OFFICIAL}")
        return data


def read_archive(path, names):
    """The contents of an archive, {base name: bytes}: its regular members with one of these base names.

    It may be a .tar, plain or compressed (gzip, bzip2, xz), or a .zip; its first bytes tell which, not its name.
    Raises  InputError: it is damaged or far too large, or holds two files of one name that differ.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(8)
            file.seek(0)
            if head.startswith(b"PK"):
                return _read_zip(path, file, names)
            unpack = next((each for mark, each in _COMPRESSIONS.items() if head.startswith(mark)), None)
            with unpack(file) if unpack else file as stream:
                return _read_tar(path, _Bounded(stream, path), names)
    except _DAMAGED as error:
        raise InputError(
            f"{path} is not a whole archive, .tar.gz, .tar or .zip ({error}); remove it and get it again"
        ) from error


_COMPRESSIONS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_DAMAGED = (
    EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError,
    RuntimeError, UnicodeError, struct.error,
)  # fmt: skip


def _keep(contents, name, data, path):
    if contents.setdefault(name, data) != data:
        raise InputError(f"{path} holds two files {name} that differ; {layouts.OFFICIAL}")


def _read_tar(path, stream, names):
    contents = {}
    # As a stream ("r|"), every byte goes through _Bounded, those of headers and of other members too.
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            name = member.name.rpartition("/")[2]
            if name not in names or not member.isreg() or member.issparse():
                continue
            _check_size(path, name, member.size)
            _keep(contents, name, archive.extractfile(member).read(), path)
    while stream.read(2**16):
        pass  # only at its end does gzip check what it gave
    return contents


def _read_zip(path, file, names):
    contents, left = {}, layouts.MAX_BYTES
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            name = member.filename.rpartition("/")[2]
            if name not in names or member.is_dir():
                continue
            left -= member.file_size
            _check_size(path, name, member.file_size if left >= 0 else layouts.MAX_BYTES - left)
            with archive.open(member) as data:
                _keep(contents, name, data.read(member.file_size + 1), path)
    return contents


def _check_size(path, name, size):
    if size > layouts.MAX_BYTES:
        raise InputError(f"{path}: {name} claims {size} bytes, far too many; {layouts.OFFICIAL}")
