"""Reads files directly into GPU memory.

Arrays that MLX's CPU side makes or inspects lie in managed memory on CUDA: its pages move to the GPU one by one when a
kernel first touches them, and copying there is slow while kernels run. Also, waiting for the CPU side means waiting
for a signalling kernel, which runs only when those before it leave room. So a `StagingBuffer` is pure GPU memory,
allocated by MLX's GPU side and touched by nothing else. Files are read into it past MLX: threads read pieces into
page-locked memory, which they reuse, and the GPU's copy engine takes them from there.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from itertools import accumulate

import mlx.core as mx

from ..errors import WeightsError
from ..files.base import ByteRange

MOST_THREADS = 8
# Bytes that a thread reads and copies at once.
PIECE = 8 * 2**20
ALIGNMENT = 256  # of every tensor

_PORTABLE = 1  # page-locked for every context
_OWN_STREAM = ctypes.c_void_p(2)  # CU_STREAM_PER_THREAD


@lru_cache
def driver() -> Driver | None:
    """CUDA's driver, if there is one with a GPU."""
    try:
        return Driver(ctypes.CDLL("libcuda.so.1"))
    except (OSError, AttributeError, RuntimeError):
        return None


class Driver:
    """The needed functions of the driver, and MLX's own context, the device's primary one."""

    def __init__(self, library):
        self.library = library
        self.threads = threading.local()
        device, self.context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), device)

    def call(self, name: str, *arguments) -> None:
        """Call a function; raises RuntimeError with its return code on failure."""
        if code := getattr(self.library, name)(*arguments):
            raise RuntimeError(f"CUDA: {name} failed ({code})")

    def staging(self) -> memoryview:
        """This thread's page-locked memory of `PIECE` bytes; the same at every call."""
        if not hasattr(self.threads, "staging"):
            address = ctypes.c_void_p()
            self.call("cuCtxSetCurrent", self.context)
            self.call("cuMemHostAlloc", ctypes.byref(address), ctypes.c_size_t(PIECE), _PORTABLE)
            self.threads.staging = memoryview((ctypes.c_char * PIECE).from_address(address.value or 0)).cast("B")
        return self.threads.staging

    def copy(self, source: memoryview, target: int) -> None:
        """Copy the contents of `staging` to an address on the GPU; returns when it is done."""
        there = ctypes.c_uint64(ctypes.addressof(ctypes.c_char.from_buffer(source)))
        self.call("cuMemcpyAsync", ctypes.c_uint64(target), there, ctypes.c_size_t(len(source)), _OWN_STREAM)
        self.call("cuStreamSynchronize", _OWN_STREAM)


def address_of(array: mx.array) -> int:
    """The GPU address of a whole array. A kernel reports it, because CPU access would move it to managed memory."""
    return _address_kernel()(
        inputs=[array], output_shapes=[(1,)], output_dtypes=[mx.int64], grid=(1, 1, 1), threadgroup=(1, 1, 1)
    )[0].item()


@lru_cache
def _address_kernel():
    return mx.fast.cuda_kernel(
        name="tell_address", input_names=["x"], output_names=["out"], source="out[0] = (long long)x;"
    )


class StagingBuffer:
    """A piece of GPU memory that tensors are read into, again and again."""

    def __init__(self, nbytes: int):
        self.memory = mx.zeros((nbytes,), mx.uint8)
        mx.eval(self.memory)

    def address(self) -> int:
        """The address; asked before each `fill`, because CPU access to an array of this memory moves it."""
        return address_of(self.memory)

    def fill(self, address: int, ranges: Mapping[str, ByteRange], stopped: threading.Event) -> None:
        """Read tensors, one behind the other; ends early when ``stopped`` is set.

        Raises:
            WeightsError: a file has changed, ends early or cannot be read.
        """
        files = {id(place.file): place.file for place in ranges.values()}.values()
        for file in files:
            file.check_unchanged()
        pieces = [
            _threads().submit(_read_piece, place, at, min(PIECE, place.nbytes - at), address + start + at, stopped)
            for place, start in zip(ranges.values(), starts(ranges), strict=True)
            for at in range(0, place.nbytes, PIECE)
        ]
        wait(pieces)
        for piece in pieces:
            piece.result()
        for file in files:
            file.check_unchanged()  # each piece opened the file anew

    def arrays(self, ranges: Mapping[str, ByteRange]) -> dict[str, mx.array]:
        """The tensors of the last `fill`, as arrays, without a copy; valid until the next `fill`."""
        return {
            key: self.memory[start : start + place.nbytes].view(place.dtype).reshape(place.shape)
            for (key, place), start in zip(ranges.items(), starts(ranges), strict=True)
        }


class StagingBuffers:
    """Two buffers for blocks, used in turn: one is filled while the block in the other computes."""

    def __init__(self):
        self.idle: StagingBuffer | None = None
        self.busy: StagingBuffer | None = None

    def next(self, ranges: Mapping[str, ByteRange], stays_idle: bool = False) -> StagingBuffer:
        """An idle buffer for these tensors; ``stays_idle``: no computation will use its arrays directly."""
        nbytes = sum(map(_padded, ranges.values()))
        if self.idle is None or self.idle.memory.size < nbytes:
            self.idle = None
            self.idle = StagingBuffer(nbytes)
        buffer = self.idle
        if not stays_idle:
            self.idle, self.busy = self.busy, self.idle
        return buffer

    @staticmethod
    def one_serves(changed: int, whole: int) -> bool:
        """Whether one buffer is enough for all blocks: if most of their bytes are only the source of other tensors."""
        return 2 * changed > whole


def starts(ranges: Mapping[str, ByteRange]) -> list[int]:
    """Offset of each tensor in a `StagingBuffer`."""
    return list(accumulate(map(_padded, ranges.values()), initial=0))[:-1]


def _padded(place: ByteRange) -> int:
    return -(-place.nbytes // ALIGNMENT) * ALIGNMENT


def _read_piece(place: ByteRange, at: int, length: int, target: int, stopped: threading.Event) -> None:
    if stopped.is_set():
        return
    cuda = driver()
    assert cuda is not None, "buffers are there only where the driver is"
    piece = cuda.staging()[:length]
    try:
        with open(place.file.path, "rb", buffering=0) as file:
            place.file.fill(piece, file, place.start + at)
    except OSError as error:
        raise WeightsError(f"{place.file.path}: cannot be read ({error.strerror or error})") from None
    cuda.copy(piece, target)


@lru_cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1), "wan_mlx-staging")
