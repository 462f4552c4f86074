"""A disk that fails, in one process: the k-th write, opening, rename or flush, and every one after it, is an error."""

import builtins
import errno
import io
import os
import stat
from collections import Counter
from pathlib import Path

CODES = {"write": errno.ENOSPC, "open": errno.EROFS, "replace": errno.EACCES, "fsync": errno.EIO, "link": errno.EPERM}


class _Raw(io.FileIO):
    """A file whose writes are counted."""

    def write(self, data):
        self.disk.happens("write")
        return super().write(data)


class Disk:
    """While active (``with``), counts what happens to files below a folder, and fails as it is told.

    ``watch(event, *arguments)`` is called after each that did not fail: "write", "open", "replace" (from, to), "link"
    (from, to), "create" (file, file), of those that are appended to, "fsync" (file descriptor).
    """

    def __init__(self, folder, kind=None, at=1, watch=None):
        self.folder, self.kind, self.at, self.watch = str(folder), kind, at, watch or (lambda *_: None)
        self.counts = Counter()

    def happens(self, kind):
        """Count it, or fail."""
        self.counts[kind] += 1
        readonly = self.kind == "open" and kind in ("replace", "link")  # of a folder that can be read alone
        if (kind == self.kind and self.counts[kind] >= self.at) or (readonly and self.counts["open"] >= self.at):
            code = CODES[self.kind]
            raise OSError(code, os.strerror(code))

    def __enter__(self):
        real = self.real = {"open": builtins.open, "replace": os.replace, "fsync": os.fsync, "link": os.link}

        def open_(file, mode="r", buffering=-1, **keywords):
            own = isinstance(file, (str, os.PathLike)) and str(file).startswith(self.folder)
            if not own or mode not in ("wb", "ab"):
                return real["open"](file, mode, buffering, **keywords)
            self.happens("open")
            new = mode == "ab" and not os.path.exists(file)
            raw = _Raw(file, mode[0])
            raw.disk = self
            if new:
                self.watch("create", file, file)
            return raw if buffering == 0 else io.BufferedWriter(raw)

        def call(name):
            def function(*arguments, **keywords):
                if name != "fsync" and not str(arguments[0]).startswith(self.folder):
                    return real[name](*arguments, **keywords)
                self.happens(name)
                result = real[name](*arguments, **keywords)
                self.watch(name, *arguments)
                return result

            return function

        builtins.open = open_
        os.replace, os.fsync, os.link = call("replace"), call("fsync"), call("link")
        return self

    def __exit__(self, *_):
        builtins.open = self.real["open"]
        os.replace, os.fsync, os.link = (self.real[name] for name in ("replace", "fsync", "link"))


class PowerCut:
    """What a disk may hold after a power cut: `after` lists every possibility, as {name: bytes}.

    A file's content is safe once it is flushed (`Disk` tells of it), its name once its folder is: until then any of the
    first renames may have reached the disk. A disk that ``lies`` has written what a flush should only by the next.
    """

    def __init__(self, folder, *, lies=False):
        self.folder, self.lies = Path(folder), lies
        self.contents, self.late = {}, {}  # of files, by their numbers in the file system
        self.names, self.pending = {}, []  # name -> number of a file
        self.moments = 0

    def __call__(self, event, *arguments):
        self.moments += 1
        if event != "fsync":
            name = Path(arguments[1]).name
            self.pending.append((name, os.stat(arguments[1]).st_ino))
        elif stat.S_ISDIR(os.fstat(arguments[0]).st_mode):
            self.names |= dict(self.pending)
            self.pending = []
        else:
            number = os.fstat(arguments[0]).st_ino
            path = next(p for p in self.folder.iterdir() if p.stat().st_ino == number)
            content = path.read_bytes()
            if path.name.startswith("."):  # a new file, which may have the number of one that was removed
                self.contents.pop(number, None)
            if self.lies:
                self.contents |= self.late
                self.late = {number: content}
            else:
                self.contents[number] = content

    def after(self):
        """Every possibility."""
        for count in range(len(self.pending) + 1):
            names = self.names | dict(self.pending[:count])
            yield {name: self.contents.get(number, b"") for name, number in names.items()}
