"""What reading a hostile file may do: take time and memory in proportion, and read. Nothing is run, written or sent."""

import contextlib
import os
import resource
import signal
import sys
import tracemalloc
from pathlib import Path

SECONDS = 10  # of the processor's time, for files of a few kilobytes
ROOM = 24 * 2**20  # bytes of memory that any reader may take
SHARE = 40  # bytes of memory for a byte of the file
ADDRESSES = 6 * 2**30  # bytes of address space for what tracemalloc does not see; nothing shall bring the machine down

FORBIDDEN = {
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.Popen", "pty.spawn",
    "socket.connect", "socket.bind", "socket.getaddrinfo", "urllib.Request", "pickle.find_class",
    "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
    "shutil.rmtree", "shutil.move", "shutil.copyfile", "webbrowser.open", "os.putenv",
}  # fmt: skip
_seen = None  # the list of what was done, while somebody watches


def _hook(event, arguments):
    if _seen is None:
        return
    if event in FORBIDDEN and not str(arguments[:1]).endswith((".pyc',)", "__pycache__',)")):
        _seen.append((event, _where(arguments)))
    elif event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        _seen.append((event, _where(arguments)))


def _where(arguments):
    """The whole path of the file that an event is about, or what it is about."""
    first = arguments[0] if arguments else ""
    return os.path.abspath(os.fspath(first)) if isinstance(first, (str, os.PathLike)) else str(arguments)[:200]


sys.addaudithook(_hook)  # for the life of the process: it does nothing while nobody watches


class Hang(BaseException):
    """Reading took too long."""


def _hang(*_):
    raise Hang


@contextlib.contextmanager
def watch(size, writes=None, room=ROOM):
    """Within it nothing may be run, sent or written (but below the folder ``writes``); ``size`` bytes are read.

    Raises  AssertionError: something was; MemoryError, Hang: or it takes too much.
    """
    global _seen
    before = signal.signal(signal.SIGPROF, _hang)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    addresses = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (addresses + ADDRESSES, limits[1]))
    traced = tracemalloc.is_tracing()
    if not traced:
        tracemalloc.start()
    tracemalloc.reset_peak()
    held = tracemalloc.get_traced_memory()[0]
    done = _seen = []
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        _seen = None
        peak = tracemalloc.get_traced_memory()[1] - held
        if not traced:
            tracemalloc.stop()
        resource.setrlimit(resource.RLIMIT_AS, limits)
    if writes is not None:
        done = [(event, text) for event, text in done if not text.startswith(str(writes))]
    assert not done, f"it did {done[0]}"
    assert peak <= room + SHARE * size, f"{size:,} bytes of files took {peak:,} bytes of memory"
