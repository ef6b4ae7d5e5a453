"""Prefetching: a thread loads the next block's weights while the current one computes.

On Apple silicon and on a CPU it evaluates lazy arrays on a CPU stream of its own: MLX reads a file where an array is
evaluated, into memory that computing shares, and no GPU work may wait on a file. A file that gives no lazy arrays is
read tensor by tensor, each cast and reordered when it is there. Where there are staging buffers (`wan_mlx.cuda`), files
are read into those, and casting and reordering are left to whoever computes: in between, each would have to wait until
the running kernels make room for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache, partial
from typing import Any

import mlx.core as mx

from .. import cuda
from ..cuda.read import StagingBuffer
from ..files.base import ByteRange

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


class Prefetch:
    """Tensors that the thread is loading.

    Args:
        load: called in the thread; the event it is given says to give up.
        finish: called with its result by whoever asks for the tensors; returns them.
        resident: whether nothing is left to evaluate in the result. Otherwise it must be evaluated before the buffer it
            lies in is filled again.
    """

    def __init__(
        self,
        load: Callable[[threading.Event], Any],
        finish: Callable[[Any], Started] = lambda loaded: loaded,
        resident: bool = True,
    ):
        self.resident, self._finish, self._stopped = resident, finish, threading.Event()
        self._future = _reader().thread.submit(load, self._stopped)

    def result(self) -> Started:
        """All of it, in the order of the names; raises what went wrong in the thread."""
        return self._finish(self._future.result())

    def stop(self) -> None:
        """Give up; returns when nothing is read any more."""
        self._stopped.set()
        wait([self._future])


def prefetch_lazy(
    start: Callable[[Sequence[str]], Started], nbytes: dict[str, int], changed: set[str]
) -> Prefetch:
    """Have lazy arrays evaluated.

    Args:
        start: names → lazy arrays of each, on the current stream.
        nbytes: name → bytes in the file.
        changed: names of the tensors that are cast or reordered on the way, and so take memory twice.
    """
    reader = _reader()
    with reader.turn, mx.stream(reader.stream):  # some files are read at once
        started = start(list(nbytes))

    return Prefetch(partial(_evaluate, reader, started, nbytes, changed))


def _evaluate(
    reader: Reader, started: Started, nbytes: dict[str, int], changed: set[str], stopped: threading.Event
) -> Started:
    for group in batches(nbytes, changed):
        if not stopped.is_set():
            with reader.turn:
                mx.eval([started[name] for name in group])
    return started


def prefetch_in_turn(start: Callable[[Sequence[str], bool], Started], names: Sequence[str]) -> Prefetch:
    """Have tensors of a file that gives no lazy arrays read and changed, one after the other.

    Args:
        start: names, and that they are to be read at once → arrays of each, on the current stream.
        names: of the tensors.
    """

    def read(stopped: threading.Event) -> Started:
        found: Started = {}
        for name in names:
            if not stopped.is_set():
                found |= start([name], True)
                mx.eval(found[name])
        return found

    return Prefetch(read)


def prefetch_staged(
    buffer: StagingBuffer, ranges: Mapping[str, ByteRange], start: Callable[[dict], Started], resident: bool
) -> Prefetch:
    """Have tensors read into a staging buffer; ``start`` makes arrays by their keys in the file `Started`."""
    fill = partial(buffer.fill, buffer.address(), ranges)
    return Prefetch(fill, lambda _: start(buffer.arrays(ranges)), resident)


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


def most_in_flight(changed: list[int], packed: int, stored: int, kept: int, made: int) -> int:
    """The most bytes that reading a block takes beside it.

    Args:
        changed: bytes in the file of each tensor that is cast or reordered on the way.
        packed: bytes in the file of all that are merged or packed when the block is there.
        stored: bytes of the block in the file.
        kept: bytes of the loaded block.
        made: bytes of what is made from ``changed`` and ``packed``.
    """
    staged = cuda.staged_bytes(stored, kept, sum(changed) + packed, made)
    if staged is not None:
        return staged
    return packed + (min(sum(changed), max(IN_FLIGHT, *changed)) if changed else 0)
