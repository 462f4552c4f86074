"""Ctrl-C and SIGTERM stop a run after the step under way, with a checkpoint."""

from __future__ import annotations

import signal
import threading


class StopOnSignals:
    """While active, Ctrl-C and SIGTERM stop the run after its step; a second Ctrl-C interrupts at once."""

    def __init__(self, run):
        self.run = run

    def _handle(self, number, frame):
        if self.run.stopped:
            raise KeyboardInterrupt
        self.run.stop(number)

    def __enter__(self):
        self._previous = {}
        if threading.current_thread() is threading.main_thread():  # signals can be set nowhere else
            self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *exception):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
