"""A contender at work in a process of its own."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import minivit
from minivit.base.errors import InputError
from minivit.benchmark.contenders import CONTENDERS

IMPORTED_FROM = Path(minivit.__file__).resolve().parent.parent  # what holds the package


class Child:
    """A contender at work in a process of its own; ``at`` tells it from the same one at another job.

    Raises  InputError: it cannot do the job; the message is its last word.
    """

    def __init__(self, contender, job, at=""):
        self.name = contender + at
        *who, environment = CONTENDERS[contender]
        path = os.pathsep.join(filter(None, [str(IMPORTED_FROM), os.environ.get("PYTHONPATH")]))
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "minivit.benchmark.contenders"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.errors, env={**os.environ, **environment, "PYTHONPATH": path},
        )  # fmt: skip
        try:
            about = self.ask(who, job)
        except BaseException:
            self.close()
            raise
        self.start_memory, self.settings = about["start_memory"], about["settings"]

    def ask(self, *request):
        """Send a request (first of all: who it is, and its job) and wait for what comes back."""
        try:
            pickle.dump(request, self.process.stdin)
            self.process.stdin.flush()
            kind, value = pickle.load(self.process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(60)  # its last words may come after its pipe is closed
            self.errors.seek(0)
            lines = self.errors.read().decode(errors="replace").split("\n")
            word = next((line.strip() for line in reversed(lines) if line.strip()), "it was killed, perhaps for memory")
            raise InputError(f"the process of {self.name} ended: {word}") from None
        if kind == "failed":
            raise InputError(f"{self.name} failed: {value}")
        return value

    def close(self):
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.errors.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()
