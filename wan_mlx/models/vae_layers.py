"""Convolutions that look back in time a few frames at a time, and the cache of the frames they look back to."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from .layers import LateFrees, Pacer

# Work on larger arrays is waited for, each a convolution, before more is submitted.
BYTES_AHEAD = 12_000_000
# Frames kept, of layers that nothing else paces.
MOST_NOT_MADE = 4
# Bytes that may wait to be freed, in tiles, which are there to save memory, and elsewhere.
LATE, LATE_AHEAD = 100_000_000, 400_000_000


class CausalCache:
    """The last input frames (1, H, W, C) of each layer that looks back in time, during one pass over a video.

    Frames are kept as they are, each an array of its own, so nothing larger stays alive with them.

    Args:
        ahead: whether work may be submitted to a GPU before what was submitted last is done. It takes more memory.
    """

    def __init__(self, ahead: bool = False):
        self.frames: dict[int, tuple[mx.array, ...]] = {}
        self._not_made: list[mx.array] = []  # of the frames, copies not yet submitted
        self._ahead = ahead and mx.default_device() == mx.gpu
        self._pacer = Pacer()
        self._late = LateFrees(LATE_AHEAD if self._ahead else LATE)

    def pace(self, y: mx.array, x: mx.array | None = None) -> mx.array:
        """Have ``y`` computed and return it: at once if it, or ``x`` which it comes from, is large.

        Everything that is submitted at once is alive at once, so large ones take turns. Between small ones a GPU would
        wait for the next, so those are submitted ahead, if that is allowed.
        """
        self._pacer(y, *self._not_made)
        self._not_made = []
        if not self._ahead or max(y.nbytes, 0 if x is None else x.nbytes) > BYTES_AHEAD:
            self._pacer.finish()
        self._late.limit()
        return y

    def get(self, layer: nn.Module) -> tuple[mx.array, ...]:
        """Frames kept by ``layer``, oldest first; empty before its first frame."""
        return self.frames.get(id(layer), ())

    def keep(self, layer: nn.Module, *frames: mx.array) -> None:
        """Replace the frames kept by ``layer``, each copied if it is a part of something larger."""
        self.frames[id(layer)] = tuple(mx.contiguous(frame) for frame in frames)
        # A copy not yet made keeps alive what it is a copy of, but every submission costs a GPU time: `pace` does it.
        self._not_made += self.frames[id(layer)]
        if len(self._not_made) > MOST_NOT_MADE:
            mx.async_eval(*self._not_made)
            self._not_made = []

    def look_back(self, layer: nn.Module, x: mx.array) -> list[mx.array]:
        """The next frames x (n, H, W, C) as a layer that sees each with the two before it needs them.

        Returns three arrays (n, H, W, C): frame by frame two before, one before, and ``x`` itself. Zeros stand before
        the first frame. The last two frames are kept.
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
    """A convolution in time too, computed tap by tap: one product for each frame that a result sees."""

    def __init__(self, in_dim: int, out_dim: int, *kernel: int):
        super().__init__(in_dim, out_dim, *kernel)
        self._ordered: mx.array | None = None

    def taps(self) -> list[mx.array]:
        """The weight's three parts (O, height, width, I), which lie one behind the other, so that none is copied."""
        if self._ordered is not self.weight:
            self.weight = self._ordered = mx.moveaxis(mx.contiguous(mx.moveaxis(self.weight, 1, 0)), 0, 1)
        return [self.weight[:, tap] for tap in range(3)]


class CausalConv(TemporalConv):
    """3x3x3 over each frame and the two before it, which are zero at the start of the video."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__(in_dim, out_dim, 3, 3, 3)

    def __call__(self, x: mx.array, cache: CausalCache, residual: mx.array | None = None) -> mx.array:
        """Frames (n, H, W, C) → (n, H, W, out_dim), plus ``residual`` of that shape if there is one."""
        frames, weights, bias = cache.look_back(self, x), self.taps(), self.bias
        width = len(bias)
        if width % 8 and mx.default_device() == mx.gpu:
            # cuDNN computes channels in eights; what it does not take MLX unfolds, which is nine times the frame.
            *weights, bias = (mx.pad(a, [(0, -width % 8)] + [(0, 0)] * (a.ndim - 1)) for a in (*weights, bias))
        # One 2D convolution per tap, summed: what Metal makes of such a 3D convolution anyway, without the copy of
        # three frames into one array, and a quarter faster than cuDNN's 3D convolution.
        terms = [mx.conv2d(frame, weight, padding=1) for frame, weight in zip(frames, weights, strict=True)]
        return (add(*terms, bias) if residual is None else add(*terms, bias, residual))[..., :width]


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
            y = mx.addmm(y, frame, weight.squeeze((1, 2)).T)
        return y
