"""Reading ahead: threads that evaluate what a block consists of while the block before it computes.

A lazy array is bound to the stream it was made on, and MLX reads a file where the array is evaluated. On Apple silicon
and on a CPU one thread reads on a CPU stream, into memory that computing shares. On CUDA a CPU stream's results lie in
managed memory, which moves to the GPU page by page when a kernel first touches them and back when they are overwritten,
both slowly and in the way of computing. There, tensors are read on GPU streams: MLX reads into host memory, in the
thread that evaluates, and copies from there to the GPU's own. A thread does one or the other, so there are several.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import lru_cache

import mlx.core as mx

# Threads that read, on CUDA.
CUDA_READERS = 4
# Bytes of the file that a thread has in flight at a time, of tensors that are changed on the way; one may be larger.
IN_FLIGHT = 64 * 2**20

Started = dict[str, dict[str, mx.array]]


def reading_device() -> mx.DeviceType:
    """Where tensors are read: on CUDA the GPU. On Apple silicon never, since GPU work must not wait on a file."""
    on_cuda = mx.default_device().type == mx.DeviceType.gpu and not mx.metal.is_available()
    return mx.DeviceType.gpu if on_cuda else mx.DeviceType.cpu


def reader_count() -> int:
    """How many threads read."""
    return CUDA_READERS if reading_device() == mx.DeviceType.gpu else 1


class Reader:
    """A thread, and a stream on which it evaluates; anybody may make lazy arrays for it, and who holds ``turn`` others.

    Making them in the thread would not do: `mx.stream` sets the default device of the whole process.
    """

    def __init__(self, device: mx.DeviceType):
        self.turn = threading.Lock()
        self.stream = mx.new_thread_unsafe_stream(device)
        self.thread = ThreadPoolExecutor(1, "wan_mlx-reader")


@lru_cache
def _readers(device: mx.DeviceType, count: int) -> list[Reader]:
    """Made once: a stream is a thread of the system's that MLX never ends."""
    return [Reader(device) for _ in range(count)]


class Ahead:
    """Tensors that are being read.

    Args:
        start: names → lazy arrays of each, on the current stream.
        nbytes: name → bytes in the file.
        changed: names of the tensors that are cast or reordered on the way, and so take memory twice.
    """

    def __init__(
        self,
        start: Callable[[Sequence[str]], Started],
        nbytes: dict[str, int],
        changed: set[str],
    ):
        self.stopped = threading.Event()
        self.names = list(nbytes)
        self.started: list[Started] = []
        self.futures: list[Future] = []
        readers = _readers(reading_device(), reader_count())
        try:
            for reader, share in zip(readers, shares(nbytes, len(readers)), strict=True):
                with reader.turn, mx.stream(reader.stream):  # some files are read at once
                    started = start(share)
                self.started.append(started)
                groups = [[started[name] for name in group] for group in batches(share, nbytes, changed)]
                self.futures.append(reader.thread.submit(_evaluate, reader, groups, self.stopped))
        except BaseException:
            self.stop()
            raise

    def result(self) -> Started:
        """All of it, resident, in the order of the names; raises what went wrong in a thread."""
        for future in self.futures:
            future.result()
        found = {name: arrays for started in self.started for name, arrays in started.items()}
        self.started.clear()
        return {name: found[name] for name in self.names}

    def stop(self) -> None:
        """Give up; returns when no thread reads any more."""
        self.stopped.set()
        wait(self.futures)


def _evaluate(reader: Reader, groups: list[list[dict[str, mx.array]]], stopped: threading.Event) -> None:
    for group in groups:
        if stopped.is_set():
            return
        with reader.turn:
            mx.eval(group)


def shares(nbytes: dict[str, int], count: int) -> list[list[str]]:
    """The names in ``count`` lists of about as many bytes, the same at every call."""
    lists: list[list[str]] = [[] for _ in range(count)]
    sizes = [0] * count
    for name in nbytes if count == 1 else sorted(nbytes, key=nbytes.get, reverse=True):
        least = sizes.index(min(sizes))
        lists[least].append(name)
        sizes[least] += nbytes[name]
    return lists


def batches(names: Sequence[str], nbytes: dict[str, int], changed: set[str]) -> Iterator[list[str]]:
    """The names in groups of at most `IN_FLIGHT` bytes of changed tensors, or of a single one."""
    batch: list[str] = []
    size = 0
    for name in names:
        more = nbytes[name] if name in changed else 0
        if batch and size and more and size + more > IN_FLIGHT:
            yield batch
            batch, size = [], 0
        batch.append(name)
        size += more
    if batch:
        yield batch


def most_in_flight(nbytes: Collection[int], readers: int) -> int:
    """The most bytes that a block's changed tensors, of so many bytes in the file, take while they are changed."""
    return min(sum(nbytes), readers * max(IN_FLIGHT, *nbytes)) if nbytes else 0
