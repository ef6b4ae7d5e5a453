"""Reading ahead: a thread that makes resident what a block consists of while the block before it computes.

On Apple silicon and on a CPU it evaluates lazy arrays on a CPU stream of its own: MLX reads a file where an array is
evaluated, into memory that computing shares, and no GPU work may wait on a file. A file that gives no lazy arrays it
reads tensor by tensor (`direct`), and changes each when it is there. On CUDA it has files read into the GPU's memory
(`cuda`). Casting and reordering are left there to whoever computes with them: in between, each would have
to wait until what runs makes room for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import lru_cache

import mlx.core as mx

from ..cuda import read as cuda
from ..files.base import Spot

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
    """Tensors that are being read; ``resident``: whether nothing is left to evaluate in the result."""

    resident = True

    def __init__(self):
        self.stopped = threading.Event()
        self.future: Future | None = None

    def result(self) -> Started:
        """All of it, in the order of the names; raises what went wrong in the thread."""
        raise NotImplementedError

    def stop(self) -> None:
        """Give up; returns when nothing is read any more."""
        self.stopped.set()
        wait([self.future])


class EvaluatedAhead(Ahead):
    """Lazy arrays that the thread evaluates.

    Args:
        start: names → lazy arrays of each, on the current stream.
        nbytes: name → bytes in the file.
        changed: names of the tensors that are cast or reordered on the way, and so take memory twice.
    """

    def __init__(self, start: Callable[[Sequence[str]], Started], nbytes: dict[str, int], changed: set[str]):
        super().__init__()
        reader = _reader()
        with reader.turn, mx.stream(reader.stream):  # some files are read at once
            started = start(list(nbytes))
        self.future = reader.thread.submit(_evaluate, reader, started, nbytes, changed, self.stopped)

    def result(self) -> Started:
        return self.future.result()


def _evaluate(
    reader: Reader, started: Started, nbytes: dict[str, int], changed: set[str], stopped: threading.Event
) -> Started:
    for group in batches(nbytes, changed):
        if not stopped.is_set():
            with reader.turn:
                mx.eval([started[name] for name in group])
    return started


class ReadAhead(Ahead):
    """Tensors of a file that gives no lazy arrays, read and changed in the thread, one after the other.

    Args:
        start: names, and that they are to be read at once → arrays of each, on the current stream.
        names: of the tensors.
    """

    def __init__(self, start: Callable[[Sequence[str], bool], Started], names: Sequence[str]):
        super().__init__()
        self.future = _reader().thread.submit(_read_at_once, start, names, self.stopped)

    def result(self) -> Started:
        return self.future.result()


def _read_at_once(
    start: Callable[[Sequence[str], bool], Started], names: Sequence[str], stopped: threading.Event
) -> Started:
    found: Started = {}
    for name in names:
        if not stopped.is_set():
            found |= start([name], True)
            mx.eval(found[name])
    return found


class LandedAhead(Ahead):
    """Tensors that the thread has read into the GPU's memory; casting and reordering are left.

    Args:
        landing: where to; its arrays stand until it is filled again.
        spots: key in the file → where it lies.
        start: arrays by their keys in the file → `Started`, not evaluated.
        resident: whether the result must be evaluated before more is read, as nothing in it lies in the landing.
    """

    def __init__(
        self, landing: cuda.Landing, spots: Mapping[str, Spot], start: Callable[[dict], Started], resident: bool
    ):
        super().__init__()
        self.landing, self.spots, self.start, self.resident = landing, spots, start, resident
        self.future = _reader().thread.submit(landing.fill, cuda.address_of(landing.memory), spots, self.stopped)

    def result(self) -> Started:
        self.future.result()
        return self.start(self.landing.arrays(self.spots))


class Landings:
    """Memory for two blocks, taken in turn: one is read while the one before it computes."""

    def __init__(self):
        self.free: cuda.Landing | None = None
        self.in_use: cuda.Landing | None = None

    def next(self, nbytes: int, stays_free: bool) -> cuda.Landing:
        """The one that nothing computes with, at least so large; ``stays_free``: nor will anything."""
        if self.free is None or self.free.memory.size < nbytes:
            self.free = None
            self.free = cuda.Landing(nbytes)
        landing = self.free
        if not stays_free:
            self.free, self.in_use = self.in_use, self.free
        return landing


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


def most_in_flight(changed: list[int], worked: int) -> int:
    """The most bytes that reading a block takes beside it.

    Args:
        changed: bytes in the file of each tensor that is cast or reordered on the way.
        worked: of all that are merged or packed when the block is there.
    """
    return worked + (min(sum(changed), max(IN_FLIGHT, *changed)) if changed else 0)
