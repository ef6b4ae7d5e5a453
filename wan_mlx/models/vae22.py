"""The causal 3D VAE of Wan2.2 TI2V-5B: 48 channels for each 4x16x16 pixels.

Follows the official ``wan/modules/vae2_2.py``. It is the VAE of Wan2.1 (`vae`) over patches of 2x2 pixels, with a wider
decoder, and with a shortcut around each stage, which has no parameters: it averages or repeats pixels and channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from .vae import VAE, Decoder, Downsample, Encoder, Upsample, flow, residual_blocks
from .vae_layers import CausalCache

# (start, end) → those frames of a shortcut's result, (end - start, H, W, C).
Beside = Callable[[int, int], mx.array]


def run_plainly(layer: Callable, x: mx.array, cache: CausalCache) -> mx.array | Iterable[mx.array]:
    return layer(x, cache)


def unchanged(x: mx.array, cache: CausalCache) -> mx.array:
    return x


def phases_of(factors: Sequence[int], count: int) -> tuple[list[int], list[int]]:
    """Of ``factors`` (time, height, width), the first ones up to a product of ``count``, and what is left of each."""
    told = []
    for factor in factors:
        told.append(min(factor, count))
        count //= told[-1]
    return told, [factor // part for factor, part in zip(factors, told, strict=True)]


class AvgDown(nn.Module):
    """The shortcut of an encoder's stage: (n, H, W, in_dim) → (m, H/2, W/2, out_dim), the mean of groups of values.

    All values of a 1x2x2 or 2x2x2 box in the order (channel, time, height, width), so many in a row as there are more
    of them than results. Before the first frame stands one of zeros.
    """

    def __init__(self, in_dim: int, out_dim: int, temporal: bool | None):
        super().__init__()
        self._out_dim = out_dim
        self._factors = (1, 1, 1) if temporal is None else (1 + temporal, 2, 2)
        self._apart, self._averaged = phases_of(self._factors, out_dim // in_dim)

    def __call__(self, x: mx.array, cache: CausalCache, first: bool) -> Beside:
        if self._factors[0] > 1:
            before = [mx.zeros_like(x[:1])] if first else cache.get(self)
            x = mx.concatenate([*before, x])
            waiting = len(x) % 2  # for the frame that it makes a pair with
            cache.keep(self, *mx.split(x[len(x) - waiting :], waiting) if waiting else ())
        times = self._factors[0]
        return lambda start, end: self._average(x[start * times : end * times])

    def _average(self, x: mx.array) -> mx.array:
        n, h, w, c = x.shape
        (t, a, b), (ft, fy, fx) = self._apart, self._averaged
        boxes = x.reshape(n // (t * ft), t, ft, h // (a * fy), a, fy, w // (b * fx), b, fx, c)
        means = boxes.mean((2, 5, 8)).transpose(0, 2, 4, 6, 1, 3, 5)
        return means.reshape(*means.shape[:3], self._out_dim, -1).mean(-1)


class DupUp(nn.Module):
    """The shortcut of a decoder's stage: (n, H, W, in_dim) → (m, 2H, 2W, out_dim), values repeated.

    The inverse of `AvgDown`. Of the first frame's two the first is left out.
    """

    def __init__(self, in_dim: int, out_dim: int, temporal: bool):
        super().__init__()
        self._out_dim, self._factors = out_dim, (1 + temporal, 2, 2)
        self._repeats = max(1, out_dim // in_dim)
        self._apart, self._repeated = phases_of(self._factors, in_dim // out_dim)

    def __call__(self, x: mx.array, cache: CausalCache, first: bool) -> Beside:
        times, skipped = self._factors[0], self._factors[0] - 1 if first else 0

        def frames(start: int, end: int) -> mx.array:
            start, end = start + skipped, end + skipped
            source = start // times
            return self._repeat(x[source : -(-end // times)])[start - source * times : end - source * times]

        return frames

    def _repeat(self, x: mx.array) -> mx.array:
        n, h, w, _ = x.shape
        (t, a, b), (ft, fy, fx) = self._apart, self._repeated
        x = mx.repeat(x, self._repeats, axis=-1) if self._repeats > 1 else x
        x = x.reshape(n, h, w, self._out_dim, t, a, b).transpose(0, 4, 1, 5, 2, 6, 3)
        shape = n, t, ft, h, a, fy, w, b, fx, self._out_dim
        x = mx.broadcast_to(x[:, :, None, :, :, None, :, :, None], shape)
        return x.reshape(n * t * ft, h * a * fy, w * b * fx, self._out_dim)


@dataclass(frozen=True)
class Branched:
    """Residual blocks, perhaps a resampling, and a shortcut from their input to their result, as one layer.

    ``cut``, of a tile, cuts frames to what is right in them before they are resampled.
    """

    layers: Sequence[nn.Module]
    shortcut: AvgDown | DupUp
    cut: Callable[[mx.array, CausalCache], mx.array] = unchanged

    def __call__(self, x: mx.array, cache: CausalCache, run: Callable = run_plainly) -> Iterator[mx.array]:
        """Frames (n, H, W, C) → pieces of the result."""
        first = not cache.get(self.layers[0].residual[2])  # nothing has passed its convolution yet
        beside, done = self.shortcut(self.cut(x, cache), cache, first), 0
        *before, last = self.layers
        for y in flow([*before, self.cut, last], [x], cache, run):
            yield y + beside(done, done + len(y))
            done += len(y)


class DownBlock(nn.Module):
    """A stage of the encoder."""

    def __init__(self, in_dim: int, out_dim: int, blocks: int, temporal: bool | None):
        super().__init__()
        self.downsamples = residual_blocks(in_dim, out_dim, blocks)
        if temporal is not None:
            self.downsamples.append(Downsample(out_dim, temporal))
        self.avg_shortcut = AvgDown(in_dim, out_dim, temporal)


class UpBlock(nn.Module):
    """A stage of the decoder; the last has no shortcut."""

    def __init__(self, in_dim: int, out_dim: int, blocks: int, temporal: bool | None):
        super().__init__()
        self.upsamples = residual_blocks(in_dim, out_dim, blocks)
        if temporal is not None:
            self.upsamples.append(Upsample(out_dim, out_dim, temporal))
            self.avg_shortcut = DupUp(in_dim, out_dim, temporal)


class Encoder22(Encoder):
    """Patches (n, H/2, W/2, 12) → latent frames (m, h, w, 2 * z_dim), like `Encoder`."""

    @staticmethod
    def stage(in_dim: int, out_dim: int, blocks: int, temporal: bool | None) -> list[nn.Module]:
        return [DownBlock(in_dim, out_dim, blocks, temporal)]

    @property
    def local(self) -> list[Callable | None]:
        return [self.conv1, *(Branched(block.downsamples, block.avg_shortcut) for block in self.downsamples)]


class Decoder22(Decoder):
    """Latent frames (n, h, w, z_dim) → patches (m, H/2, W/2, 12), like `Decoder`."""

    @staticmethod
    def stage(in_dim: int, out_dim: int, blocks: int, temporal: bool | None) -> list[nn.Module]:
        return [UpBlock(in_dim, out_dim, blocks, temporal)]

    @property
    def local(self) -> list[Callable | None]:
        *stages, last = self.upsamples
        return [*(Branched(block.upsamples, block.avg_shortcut) for block in stages), *last.upsamples, *self.head]


class VAE22(VAE):
    """Video ↔ normalised latents, like `VAE`."""

    coders = Encoder22, Decoder22

    def enter(self, chunk: mx.array) -> mx.array:
        return patchify(super().enter(chunk), self.config.patch)

    def to_frames(self, decoded: Iterable[mx.array]) -> mx.array:
        return super().to_frames(unpatchify(patches, self.config.patch) for patches in decoded)


def patchify(frames: mx.array, side: int) -> mx.array:
    """(n, H, W, C) → (n, H/side, W/side, C * side²); of a patch's channels the place along the width is the slower."""
    n, h, w, c = frames.shape
    patches = frames.reshape(n, h // side, side, w // side, side, c)
    return patches.transpose(0, 1, 3, 5, 4, 2).reshape(n, h // side, w // side, -1)


def unpatchify(patches: mx.array, side: int) -> mx.array:
    """The inverse of `patchify`."""
    n, h, w, c = patches.shape
    frames = patches.reshape(n, h, w, c // side**2, side, side)
    return frames.transpose(0, 1, 5, 2, 4, 3).reshape(n, h * side, w * side, -1)
