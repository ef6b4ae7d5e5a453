"""From a file straight into the GPU's memory, on CUDA; elsewhere memory is shared, and none of this is used.

On CUDA, arrays of MLX's CPU side lie in managed memory. Their pages move to the GPU when a kernel first touches them,
and back when the CPU writes there again, one by one and in the way of what computes. So nothing is written there by the
CPU: a thread reads a piece of the file into page-locked memory of its own, over and over the same, and has the GPU's
copy engine take it from there, through the CUDA driver that MLX runs on.
"""

from __future__ import annotations

import ctypes
import threading
from functools import lru_cache

import mlx.core as mx

_PORTABLE = 1  # page-locked for every context
_OWN_STREAM = ctypes.c_void_p(2)  # CU_STREAM_PER_THREAD


def in_use() -> bool:
    """Whether the current device is a GPU of CUDA's whose driver can be asked."""
    return mx.default_device().type == mx.DeviceType.gpu and not mx.metal.is_available() and driver() is not None


@lru_cache
def driver() -> Driver | None:
    """CUDA's driver, if there is one with a GPU."""
    try:
        return Driver(ctypes.CDLL("libcuda.so.1"))
    except (OSError, AttributeError, RuntimeError):
        return None


class Driver:
    """The few functions that are needed, and MLX's own context, the device's primary one."""

    def __init__(self, library):
        self.library = library
        self.threads = threading.local()
        device, self.context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), device)

    def call(self, name: str, *arguments) -> None:
        """Call a function; raises RuntimeError with what it returns if that is not success."""
        if code := getattr(self.library, name)(*arguments):
            raise RuntimeError(f"CUDA: {name} failed ({code})")

    def staging(self, nbytes: int) -> memoryview:
        """Page-locked memory of this thread's, at least so large; the same at every call."""
        if not hasattr(self.threads, "staging") or len(self.threads.staging) < nbytes:
            address = ctypes.c_void_p()
            self.call("cuCtxSetCurrent", self.context)
            self.call("cuMemHostAlloc", ctypes.byref(address), ctypes.c_size_t(nbytes), _PORTABLE)
            self.threads.staging = memoryview((ctypes.c_char * nbytes).from_address(address.value)).cast("B")
        return self.threads.staging

    def copy(self, source: memoryview, target: memoryview) -> None:
        """Copy what `staging` holds to memory that the GPU has, or gets so; returns when it is there."""
        to, there = (ctypes.c_uint64(_address(view)) for view in (target, source))
        self.call("cuMemcpyAsync", to, there, ctypes.c_size_t(len(source)), _OWN_STREAM)
        self.call("cuStreamSynchronize", _OWN_STREAM)


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
