"""Where CIFAR's files lie, and their bytes, out of a folder or of an archive that is not unpacked to disk."""

import gzip
import shlex
import tarfile
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
        if (data_dir / layout.folder).is_dir():
            return data_dir / layout.folder, layout
    for layout in forms:
        if (data_dir / layout.archive).is_file():
            return data_dir / layout.archive, layout
    for layout in forms:
        if any((data_dir / file).is_file() for file in layout.image_files):
            return data_dir, layout
    command = f"minivit data fetch {name} --data-dir {shlex.quote(str(data_dir))}"
    url = layouts.URL + forms[0].archive
    raise InputError(f"{name} is not in {data_dir}: run `{command}`, or download {url} and put it there")


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
    """The contents of a .tar.gz, {base name: bytes}: its regular members with one of these base names.

    Raises  InputError: it is damaged or far too large.
    """
    contents = {}
    try:
        with gzip.open(path) as file:
            # As a stream ("r|"), every byte goes through _Bounded, those of headers and of other members too.
            stream = _Bounded(file, path)
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    name = member.name.rpartition("/")[2]
                    if name not in names or not member.isreg() or member.issparse():
                        continue
                    if member.size > layouts.MAX_BYTES:
                        raise InputError(f"{path}: {name} claims {member.size} bytes, far too many; {layouts.OFFICIAL}")
                    contents[name] = archive.extractfile(member).read()
            while stream.read(2**16):
                pass  # only at its end does gzip check what it gave
    except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError) as error:
        raise InputError(f"{path} is not a whole .tar.gz archive ({error}); remove it and fetch it again") from error
    return contents
