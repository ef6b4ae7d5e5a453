"""Reads part of a file directly into the memory of an MLX array, with several threads.

``mx.array(values)`` copies numpy's data, in one thread, into memory that the system must first clear page by page: for
a large file that takes several times as long as reading. `mx.load` reads into an array's own memory, and accepts file
objects: it is given a safetensors file with one tensor, whose data several threads read.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from typing import BinaryIO, cast

import mlx.core as mx

# More threads do not read faster from the system's cache.
MOST_THREADS = 8
# Bytes that a thread reads at once.
PIECE = 4 * 2**20


def read_tensor(
    open_file: Callable[[], BinaryIO], start: int, dtype: str, shape: tuple[int, ...], nbytes: int
) -> mx.array:
    """A tensor from a file, resident, on the current stream; on Apple silicon always read by the CPU.

    Args:
        open_file: opens the file, unbuffered; called by several threads.
        start: position of the tensor's first byte.
        dtype: safetensors' name of a dtype that MLX has.
        shape: its sizes; the last axis is contiguous.
        nbytes: of the tensor.

    Raises:
        EOFError: the file ends early; its argument is the number of missing bytes.
        OSError: from opening or reading.
    """
    file = _OneTensor(open_file, start, dtype, shape, nbytes)
    loaded = mx.load(cast(BinaryIO, file), format="safetensors")
    array = cast(dict[str, mx.array], loaded)["tensor"]
    # Errors must not pass through MLX, where some threads would end the process.
    if file.error is not None:
        raise file.error
    return array


class _OneTensor(io.RawIOBase):
    """Acts as a safetensors file of one tensor, whose data are ``nbytes`` of another file from ``start``."""

    def __init__(self, open_file, start: int, dtype: str, shape: tuple[int, ...], nbytes: int):
        entry = {"tensor": {"dtype": dtype, "shape": shape, "data_offsets": [0, nbytes]}}
        header = json.dumps(entry).encode()
        self.header = len(header).to_bytes(8, "little") + header
        self.open_file, self.start, self.nbytes = open_file, start, nbytes
        self.position = 0
        self.error: BaseException | None = None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + (0, self.position, len(self.header) + self.nbytes)[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, target) -> int:
        """Fill all of ``target``, which MLX expects; an error is kept in ``error``."""
        view = memoryview(target).cast("B")
        at = self.position
        self.position += len(view)
        if at < len(self.header):
            view[:] = self.header[at : at + len(view)]
        else:
            try:
                self._read(view, self.start + at - len(self.header))
            except BaseException as error:
                self.error = error
        return len(view)

    def _read(self, view: memoryview, start: int) -> None:
        spans = range(0, len(view), PIECE)
        if len(spans) <= 1:
            return self._read_piece(view, start)
        pieces = [_threads().submit(self._read_piece, view[at : at + PIECE], start + at) for at in spans]
        try:
            wait(pieces)
        finally:
            wait(pieces)  # after an interruption too: the memory is MLX's
        for piece in pieces:
            piece.result()

    def _read_piece(self, view: memoryview, start: int) -> None:
        with self.open_file() as file:
            file.seek(start)
            while view:
                count = file.readinto(view)
                if not count:
                    raise EOFError(len(view))
                view = view[count:]


@lru_cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1), "wan_mlx-file")
