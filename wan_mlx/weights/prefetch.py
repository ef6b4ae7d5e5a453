"""Prefetching: a thread loads the next block's weights while the current one computes.

On Apple silicon and on a CPU it evaluates lazy arrays on its own CPU stream: MLX reads a file when an array is
evaluated, into shared memory, and no GPU work may wait on a file. Files without lazy arrays are read tensor by tensor,
each cast and reordered when it is read. With staging buffers (`wan_mlx.cuda`), files are read into those, and the
consumer casts and reorders: in the thread, each of these would wait until the running kernels leave room.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache, partial
from typing import Any

import mlx.core as mx

from .. import cuda

# Bytes of the file in flight at once, for tensors that are cast or reordered; a single one may be larger.
IN_FLIGHT = 64 * 2**20

Started = dict[str, dict[str, mx.array]]


class Reader:
    """A thread, and its CPU stream; code that holds ``turn`` may make lazy arrays for it in other threads.

    The thread itself cannot make them: `mx.stream` sets the default device of the whole process.
    """

    def __init__(self):
        self.turn = threading.Lock()
        self.stream = mx.new_thread_unsafe_stream(mx.cpu)
        self.thread = ThreadPoolExecutor(1, "wan_mlx-reader")


@lru_cache
def _reader() -> Reader:
    """Created once: a stream is a system thread that MLX never ends."""
    return Reader()


class Prefetch:
    """Tensors that a thread is loading: by ``load``, whose argument is an event that asks it to stop.

    ``finish`` makes the tensors of its result when they are requested. Unless they are ``resident``, they must be
    evaluated before their buffer is filled again.
    """

    def __init__(
        self, load: Callable[[threading.Event], Any], finish: Callable[[Any], Started] | None = None, resident=True
    ):
        self.resident, self._finish, self._stopped = resident, finish, threading.Event()
        self._future = _reader().thread.submit(load, self._stopped)

    def result(self) -> Started:
        """All tensors, in the order of the names; raises the thread's error."""
        loaded = self._future.result()
        return self._finish(loaded) if self._finish else loaded

    def stop(self) -> None:
        """Stop; returns when no read is running."""
        self._stopped.set()
        wait([self._future])


def prefetch_lazy(start: Callable[[Sequence[str]], Started], in_flight: Mapping[str, int]) -> Prefetch:
    """Evaluate lazy arrays, which ``start`` makes on the current stream, in the thread.

    ``in_flight``: name → bytes in the file, 0 for a tensor that is not cast or reordered, and so takes no memory twice.
    """
    reader = _reader()
    with reader.turn, mx.stream(reader.stream):  # some files are read immediately
        started = start(list(in_flight))
    return Prefetch(partial(_evaluate, reader, started, in_flight))


def _evaluate(reader: Reader, started: Started, in_flight: Mapping[str, int], stopped: threading.Event) -> Started:
    for group in batches(in_flight, in_flight.__getitem__):
        if not stopped.is_set():
            with reader.turn:
                mx.eval([started[name] for name in group])
    return started


def prefetch_in_turn(start: Callable[[str], Started], names: Sequence[str]) -> Prefetch:
    """Read and change tensors of a file without lazy arrays, one after the other, in the thread."""

    def read(stopped: threading.Event) -> Started:
        found: Started = {}
        for name in names:
            if not stopped.is_set():
                found |= start(name)
                mx.eval(found[name])
        return found

    return Prefetch(read)


def batches(names: Iterable[str], size_of: Callable[[str], int]) -> Iterator[list[str]]:
    """The names in groups of at most `IN_FLIGHT` bytes by ``size_of``, or a single one."""
    batch: list[str] = []
    size = 0
    for name in names:
        more = size_of(name)
        if batch and size and more and size + more > IN_FLIGHT:
            yield batch
            batch, size = [], 0
        batch.append(name)
        size += more
    if batch:
        yield batch


def most_in_flight(changed: list[int], packed: int, stored: int, kept: int, made: int) -> int:
    """Most extra bytes while reading a block that has ``stored`` bytes in the file, and ``kept`` when it is loaded.

    Bytes in the file: of each tensor that is cast or reordered (``changed``), and of all that are merged or quantised
    when the block is read (``packed``); ``made``: bytes of the results of both.
    """
    staged = cuda.staged_bytes(stored, kept, sum(changed) + packed, made)
    if staged is not None:
        return staged
    return packed + (min(sum(changed), max(IN_FLIGHT, *changed)) if changed else 0)
