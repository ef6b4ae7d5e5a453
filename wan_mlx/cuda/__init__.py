"""The door to everything specific to NVIDIA GPUs. Elsewhere each function has a trivial result.

Weight files are read into staging buffers in the GPU's own memory; `read` says why and how.
"""

from __future__ import annotations

import mlx.core as mx

from .read import StagingBuffers, driver


def available() -> bool:
    """Whether MLX computes on NVIDIA GPUs, unless it is told to compute on the CPU."""
    return mx.cuda.is_available()


def in_use() -> bool:
    """Whether the current device is an NVIDIA GPU with a CUDA driver."""
    return mx.default_device().type == mx.DeviceType.gpu and not mx.metal.is_available() and driver() is not None


def staging_buffers() -> StagingBuffers | None:
    """Two staging buffers in GPU memory for a network's weights; None where MLX reads the files."""
    return StagingBuffers() if in_use() else None


def device_of_new_weights() -> mx.Device:
    """A device where weights can be inspected right after reading, without waiting for the GPU's work."""
    return mx.Device(mx.gpu if in_use() else mx.cpu)


def staged_bytes(stored: int, kept: int, changed: int, made: int) -> int | None:
    """Peak extra bytes while reading blocks with staging buffers; None without them.

    Bytes of a block ``stored`` in its file, and ``kept`` when loaded; of tensors that are cast, reordered or quantised
    (``changed``) in the file, and of their results (``made``).
    """
    if not in_use():
        return None
    beside = stored - kept if StagingBuffers.one_serves(changed, stored) else 2 * (stored - kept) + made
    return max(0, beside)
