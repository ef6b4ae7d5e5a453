"""The door to all that only an NVIDIA GPU needs. Elsewhere memory is shared, and each function answers trivially.

On CUDA, weight files are read into staging buffers in the GPU's own memory; `read` says why and how.
"""

from __future__ import annotations

import mlx.core as mx

from .read import StagingBuffers, driver


def in_use() -> bool:
    """Whether the current device is an NVIDIA GPU whose driver can be asked."""
    return mx.default_device().type == mx.DeviceType.gpu and not mx.metal.is_available() and driver() is not None


def staging_buffers() -> StagingBuffers | None:
    """Two buffers in the GPU's memory to read a network's weights into; None where files are read by MLX."""
    return StagingBuffers() if in_use() else None


def device_of_new_weights() -> mx.Device:
    """Where weights can be looked into as soon as they are read, without waiting for what the GPU computes."""
    return mx.Device(mx.gpu if in_use() else mx.cpu)


def staged_bytes(stored: int, kept: int, changed: int, made: int) -> int | None:
    """The most bytes that reading blocks takes beside them here; None where no staging buffers are used.

    Args:
        stored: bytes of a block in its file.
        kept: bytes of the loaded block.
        changed: bytes in the file of the tensors that others are made from, by casting, reordering or packing.
        made: bytes of those others.
    """
    if not in_use():
        return None
    beside = stored - kept if StagingBuffers.one_serves(changed, stored) else 2 * (stored - kept) + made
    return max(0, beside)
