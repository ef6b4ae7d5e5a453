"""Arrays to be computed in the order in which they came, two pieces at a time."""

from __future__ import annotations

import mlx.core as mx

from .. import cuda
from ..models.pieces import Pacer


class Pieces:
    """A piece waits until `run`, so that what comes after it can be prepared while the GPU is busy with what came
    before. MLX allocates a submitted piece's arrays at once and frees them when it is done: what is wide is a piece of
    its own.
    """

    def __init__(self):
        self._pace, self._waiting = Pacer(), list[tuple[mx.array, ...]]()

    def add(self, *arrays: mx.array) -> None:
        self._waiting.append(arrays)

    def run(self, *arrays: mx.array) -> None:
        """Submit all pieces, and these arrays as the last."""
        waiting, self._waiting = [*self._waiting, arrays][::-1], []
        while waiting:
            if piece := waiting.pop():
                self._pace(*piece)

    def finish(self) -> None:
        """Run all, and wait until their memory is free: on CUDA MLX frees it in a thread, which may be late."""
        self.run()
        self._pace.finish()
        if cuda.available():
            mx.synchronize()
