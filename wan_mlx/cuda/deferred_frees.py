"""A bound on memory that a GPU has released and MLX has not yet freed; on Metal and on a CPU there is none."""

from __future__ import annotations

import mlx.core as mx


class DeferredFrees:
    """Bounds the memory that waits to be freed to ``most`` bytes.

    On CUDA a thread of MLX's frees memory, and falls behind where much is submitted in small pieces: without a bound,
    by gigabytes. `mx.synchronize` waits for that thread, so it is called when memory has grown since the last call.
    """

    def __init__(self, most: int):
        self.most = most
        self.least = mx.get_active_memory()

    def limit(self) -> None:
        """Wait, if more than ``most`` bytes may be left to free."""
        if mx.cuda.is_available() and mx.get_active_memory() > self.least + self.most:
            mx.synchronize()
            self.least = mx.get_active_memory()
