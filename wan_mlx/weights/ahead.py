"""Reading ahead: a thread that makes resident what a block consists of while the block before it computes.

On Apple silicon and on a CPU it evaluates lazy arrays on a CPU stream of its own: MLX reads a file where an array is
evaluated, into memory that computing shares, and no GPU work may wait on a file. On CUDA it reads tensor by tensor into
the GPU's own memory (`direct`, `cuda`). Casting and reordering are left to whoever computes with them: each would have
to wait there, on a stream of its own, until what runs makes room for it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from typing import TYPE_CHECKING

import mlx.core as mx

from . import cuda

if TYPE_CHECKING:
    from .parameters import Parameters

# Bytes of the file that are in flight at a time, of tensors that are changed on the way; one may be larger.
IN_FLIGHT = 64 * 2**20

Started = dict[str, dict[str, mx.array]]


class Reader:
    """A thread, and a CPU stream on which it evaluates; who holds ``turn`` may make lazy arrays for it elsewhere.

    Making them in the thread would not do: `mx.stream` sets the default device of the whole process.
    """

    def __init__(self):
        self.turn = threading.Lock()
        self.stream = mx.new_thread_unsafe_stream(mx.cpu)
        self.thread = ThreadPoolExecutor(1, "wan_mlx-reader")


@lru_cache
def _reader() -> Reader:
    """Made once: a stream is a thread of the system's that MLX never ends."""
    return Reader()


class Ahead:
    """Tensors that are being read.

    Args:
        parameters: where they come from.
        nbytes: name → bytes in the file.
        changed: names of the tensors that are cast or reordered on the way, and so take memory twice.
    """

    def __init__(self, parameters: Parameters, nbytes: dict[str, int], changed: set[str]):
        self.stopped = threading.Event()
        self.changed_later = parameters.changed if cuda.in_use() else None
        reader = _reader()
        if self.changed_later:
            self.future = reader.thread.submit(_read_at_once, parameters, list(nbytes), self.stopped)
            return
        with reader.turn, mx.stream(reader.stream):  # some files are read at once
            started = parameters.start(list(nbytes))
        self.future = reader.thread.submit(_evaluate, reader, started, nbytes, changed, self.stopped)

    def result(self) -> Started:
        """All of it, in the order of the names, resident but for changes; raises what went wrong in the thread."""
        found = self.future.result()
        return self.changed_later(found) if self.changed_later else found

    def stop(self) -> None:
        """Give up; returns when nothing is read any more."""
        self.stopped.set()
        wait([self.future])


def _evaluate(
    reader: Reader, started: Started, nbytes: dict[str, int], changed: set[str], stopped: threading.Event
) -> Started:
    for group in batches(nbytes, changed):
        if not stopped.is_set():
            with reader.turn:
                mx.eval([started[name] for name in group])
    return started


def _read_at_once(parameters: Parameters, names: Sequence[str], stopped: threading.Event) -> Started:
    found: Started = {}
    for name in names:
        if not stopped.is_set():
            found |= parameters.read([name], now=True)
    mx.eval(list(found.values()))  # the small ones, which are lazy still
    return found


def batches(nbytes: dict[str, int], changed: set[str]) -> Iterator[list[str]]:
    """The names in groups of at most `IN_FLIGHT` bytes of changed tensors, or of a single one."""
    batch: list[str] = []
    size = 0
    for name in nbytes:
        more = nbytes[name] if name in changed else 0
        if batch and size and more and size + more > IN_FLIGHT:
            yield batch
            batch, size = [], 0
        batch.append(name)
        size += more
    if batch:
        yield batch


def most_in_flight(changed: list[tuple[int, int]]) -> int:
    """The most bytes that a block's changed tensors take beside the block, each (bytes in the file, bytes kept)."""
    if cuda.in_use():
        return sum(max(0, stored - kept) for stored, kept in changed)
    stored = [stored for stored, _ in changed]
    return min(sum(stored), max(IN_FLIGHT, *stored)) if stored else 0
