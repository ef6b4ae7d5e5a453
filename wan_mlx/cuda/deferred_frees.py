"""Bounds deferred frees: memory that a GPU has released and MLX has not yet freed; not needed on Metal and the CPU."""

from __future__ import annotations

import mlx.core as mx


class DeferredFrees:
    """Bounds deferred frees to ``most`` bytes.

    On CUDA MLX frees memory in a thread, which falls behind by gigabytes when many small pieces are submitted.
    `mx.synchronize` waits for that thread, so it is called when memory has grown since the last call.
    """

    def __init__(self, most: int):
        self.most = most
        self.least = mx.get_active_memory()

    def limit(self) -> None:
        """Wait, if more than ``most`` bytes may be pending."""
        if mx.cuda.is_available() and mx.get_active_memory() > self.least + self.most:
            mx.synchronize()
            self.least = mx.get_active_memory()
