"""Threads that compute, and last as long as the process.

MLX gives every thread that computes a worker of its own, and may abort the process at its end if the thread has ended
before. So nothing computes in threads of the caller's, of which nobody knows when they end: work that is asked for
there is done by one that lasts. The main thread is one.
"""

from __future__ import annotations

import atexit
import ctypes
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import wraps
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class LastingThread:
    """A daemon thread that is never ended, and does what it is given, one after the other."""

    def __init__(self):
        self._jobs: SimpleQueue = SimpleQueue()
        self._at_work: Future | None = None
        self._thread = threading.Thread(target=self._work, name="wan_mlx-lasting", daemon=True)
        self._thread.start()
        _ours[self._thread] = self

    def start(self, function: Callable[[], T]) -> Future[T]:
        """Have it called there."""
        future: Future[T] = Future()
        self._jobs.put((future, function))
        return future

    def call(self, function: Callable[[], T]) -> T:
        """Its result; it is waited for even if an exception arrives here meanwhile."""
        if threading.current_thread() is self._thread:  # which throws a generator of its own away
            return function()
        future = self.start(function)
        try:
            return future.result()
        finally:
            wait([future])

    def _work(self) -> None:
        while True:
            try:
                self._do_next()
            except SystemExit:  # it came when the work was done
                pass

    def _do_next(self) -> None:
        future, function = self._jobs.get()
        self._at_work = future
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)
        finally:
            self._at_work = None  # otherwise the idle thread would keep the model alive

    def interrupt(self) -> Future | None:
        """End the work at hand, as Ctrl-C does, by SystemExit at the next line of Python; returns its future."""
        future = self._at_work
        if future is not None and self._thread.ident is not None:
            there = ctypes.c_ulong(self._thread.ident)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(there, ctypes.py_object(SystemExit))
        return future


PATIENCE = 60.0  # seconds for which the end of the process waits
_ours: dict[threading.Thread, LastingThread] = {}
_idle: list[LastingThread] = []


@contextmanager
def lasting_thread() -> Iterator[LastingThread]:
    """A lasting thread for this block alone: an idle one, or one more."""
    try:
        thread = _idle.pop()
    except IndexError:
        thread = LastingThread()
    try:
        yield thread
    finally:
        _idle.append(thread)


def lasts() -> bool:
    """Whether the current thread may compute."""
    current = threading.current_thread()
    return current is threading.main_thread() or current in _ours


def computes(function: Callable[P, T]) -> Callable[P, T]:
    """Decorates a function that computes: it is called in a thread that lasts, with all that it calls."""

    @wraps(function)
    def called(*args: P.args, **options: P.kwargs) -> T:
        if lasts():
            return function(*args, **options)
        with lasting_thread() as thread:
            return thread.call(lambda: function(*args, **options))

    return called


def yields_computed(function: Callable[P, Generator[T, Any, None]]) -> Callable[P, Generator[T, None, None]]:
    """Decorates a generator that computes: it runs in one thread that lasts, whoever asks for its next item."""

    @wraps(function)
    def iterated(*args: P.args, **options: P.kwargs) -> Generator[T, None, None]:
        if lasts():
            yield from function(*args, **options)
            return
        with lasting_thread() as thread:
            items = function(*args, **options)
            try:
                while (item := thread.call(lambda: next(items, _end))) is not _end:
                    yield item
            finally:
                thread.call(items.close)

    return iterated


_end: Any = object()


@atexit.register
def _end_work() -> None:
    """A thread that computes while the process ends would abort it."""
    interrupted = [thread.interrupt() for thread in _ours.values()]
    wait([future for future in interrupted if future is not None], PATIENCE)
