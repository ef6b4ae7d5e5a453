"""The VAE's causal convolutions, and the cache of the frames they look back to."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from ..geometry import Geometry


def check_frames(frames: mx.array, geometry: Geometry) -> None:
    """Raise ValueError unless frames are (1, T, H, W, 3) of a size that the geometry allows."""
    if frames.ndim != 5 or frames.shape[0] != 1 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"frames have shape {frames.shape}, expected (1, T, H, W, 3), channels last")
    geometry.check_size(frames.shape[3], frames.shape[2])


def check_latents(latents: mx.array, z_dim: int) -> None:
    """Raise ValueError unless latents are (1, t, h, w, z_dim)."""
    if latents.ndim != 5 or latents.shape[0] != 1 or latents.shape[-1] != z_dim or 0 in latents.shape:
        raise ValueError(f"latents have shape {latents.shape}, expected (1, t, h, w, {z_dim}), channels last")


# On a CPU, convolutions to at least so many channels are unfolded here, if that takes at most so many values.
UNFOLDED_FROM, UNFOLDED_VALUES = 8, 1 << 26


class CausalCache:
    """The last input frames (1, H, W, C) of each layer that looks back in time, during one pass over a video."""

    def __init__(self):
        self.frames: dict[int, tuple[mx.array, ...]] = {}

    def get(self, layer: nn.Module) -> tuple[mx.array, ...]:
        """Frames kept for ``layer``, oldest first; empty before its first frame."""
        return self.frames.get(id(layer), ())

    def keep(self, layer: nn.Module, *frames: mx.array) -> None:
        """Replace the frames kept for ``layer``; views are copied, so that no larger array stays alive."""
        self.frames[id(layer)] = tuple(mx.contiguous(frame) for frame in frames)

    def look_back(self, layer: nn.Module, x: mx.array) -> list[mx.array]:
        """Frames x (n, H, W, C) → for each the second before it, the one before it, and itself, (n, H, W, C) each.

        Zeros stand before the first frame. The last two frames are kept.
        """
        before = self.get(layer) or (mx.zeros_like(x[:1]),) * 2
        if len(x) == 1:
            self.keep(layer, before[1], x)
            return [*before, x]
        self.keep(layer, x[-2:-1], x[-1:])
        frames = mx.concatenate([*before, x])
        return [frames[k : k + len(x)] for k in range(3)]


class Conv(nn.Module):
    """Weight (O, *kernel, I) and bias (O,) of a convolution; zero until loaded."""

    def __init__(self, in_dim: int, out_dim: int, *kernel: int):
        super().__init__()
        self.weight = mx.zeros((out_dim, *kernel, in_dim))
        self.bias = mx.zeros((out_dim,))


class TemporalConv(Conv):
    """A convolution that includes time, computed tap by tap: one product for each frame that a result sees."""

    def taps(self) -> list[mx.array]:
        """The weight's three parts (O, height, width, I): second frame before, frame before, and the frame itself."""
        return [self.weight[:, tap] for tap in range(3)]


class CausalConv(TemporalConv):
    """3x3x3 over each frame and the two before it, which are zero at the start of the video."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__(in_dim, out_dim, 3, 3, 3)

    def __call__(self, x: mx.array, cache: CausalCache, *added: mx.array) -> mx.array:
        """Frames (n, H, W, C) → (n, H, W, out_dim), plus the ``added`` arrays of that shape."""
        return convolve(cache.look_back(self, x), self.taps(), self.bias, *added)


def convolve(frames: Sequence[mx.array], taps: Sequence[mx.array], *added: mx.array) -> mx.array:
    """Three frames (n, H, W, C), each with its tap (O, 3, 3, C) → their sum plus the ``added`` arrays, (n, H, W, O)."""
    small = 27 * frames[0].size <= UNFOLDED_VALUES and len(taps[0]) >= UNFOLDED_FROM
    if small and mx.default_device() == mx.cpu:
        return add(convolve_unfolded(frames, taps), *added)
    # One 2D convolution per tap, summed: Metal computes such a 3D convolution this way anyway, and this avoids joining
    # three frames in one array; it is a quarter faster than cuDNN's 3D convolution.
    return add(*(mx.conv2d(frame, weight, padding=1) for frame, weight in zip(frames, taps, strict=True)), *added)


def convolve_unfolded(frames: Sequence[mx.array], taps: Sequence[mx.array]) -> mx.array:
    """The sum as one product of all 27 neighbours of each pixel, (n, H, W, O).

    On a CPU in half the time: MLX's own product has the weights the wrong way round for its BLAS, and one per tap. It
    takes three times the memory, so that large frames are not convolved like this.
    """
    n, h, w, c = frames[0].shape
    c, width = 3 * c, len(taps[0])
    x = mx.pad(mx.concatenate(list(frames), axis=-1), [(0, 0), (1, 1), (1, 1), (0, 0)])
    row, frame = (w + 2) * c, (h + 2) * (w + 2) * c
    neighbours = mx.as_strided(x, (n, h, w, 3, 3 * c), (frame, row, c, row, 1))
    weight = mx.contiguous(mx.concatenate(list(taps), axis=-1).reshape(width, -1).T)
    return (neighbours.reshape(-1, 9 * c) @ weight).reshape(n, h, w, width)


@mx.compile
def add(*terms: mx.array) -> mx.array:
    """Sum in one pass."""
    return sum(terms[1:], terms[0])


class PointConv(Conv):
    """1x1 or 1x1x1 (``rank`` ones), as a matmul."""

    def __init__(self, in_dim: int, out_dim: int, rank: int = 3):
        super().__init__(in_dim, out_dim, *[1] * rank)

    def __call__(self, x: mx.array) -> mx.array:
        return mx.addmm(self.bias, x, self.weight.reshape(self.weight.shape[0], -1).T)


class TimeConv(TemporalConv):
    """3x1x1 over three frames, as one matmul per frame."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__(in_dim, out_dim, 3, 1, 1)

    def __call__(self, *frames: mx.array) -> mx.array:
        y = self.bias
        for frame, weight in zip(frames, self.taps(), strict=True):
            y = mx.addmm(y, frame, mx.contiguous(weight.squeeze((1, 2))).T)
        return y
