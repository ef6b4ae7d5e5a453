"""Ctrl-C, once and twice."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import Stopped
from ..progress_bars import ask, show_cursor

if TYPE_CHECKING:
    from ..runs.job import Job

SAYING = b"\nstopping as soon as this step is done; Ctrl-C again stops at once\n"


def say_stopping() -> None:
    """Say that the first Ctrl-C was heard; print() may be at work where this cuts in."""
    if not ask(SAYING.decode().strip()):
        os.write(2, SAYING)


class Interrupts:
    """Within a ``with`` block Ctrl-C does not cut through whatever runs.

    Where the job that is `stopping` stops soon, the first one only asks it to. A second one, or the first elsewhere,
    raises `Stopped` at once, and so do SIGTERM and SIGHUP; one more ends the process there and then. In a thread other
    than the main one nothing is changed, as Python wants it.
    """

    def __init__(self):
        self.asked = False
        self._job: Job | None = None
        self._raised = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup, or a shell's background job
                    self._before[signum] = signal.signal(signum, self._arrived)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    @contextmanager
    def stopping(self, job: Job) -> Iterator[None]:
        """Within this block Ctrl-C stops ``job``; nothing is begun where the one before ended before it stopped."""
        if self.asked:
            raise Stopped()
        self._job = job
        try:
            yield
        finally:
            self._job = None

    def _arrived(self, signum: int, frame) -> None:
        if self._raised:
            show_cursor()
            os._exit(128 + signum)
        if signum == signal.SIGINT and not self.asked and self._job is not None and self._job.stops_soon:
            self.asked = True
            self._job.stop()
            say_stopping()
            return
        self._raised = True
        raise Stopped(signum)
