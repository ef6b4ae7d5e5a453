"""TAEHV, the tiny autoencoder for the same latents: previews and drafts for a fraction of the VAE's work.

Follows the file ``taehv.py`` of github.com/madebyollin/taehv with its weights ``taew2_1`` (Wan 2.1 and Wan 2.2 14B).
Two-dimensional layers treat each frame alone; a `MemBlock` also sees the frame before it. So a video can be passed a
few frames at a time, with the same result. Layers map frames (n, H, W, C) to frames, and lists keep the numbering of
the reference's ``nn.Sequential``, with None where a layer has no parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .vae_layers import CausalCache

SPATIAL, TEMPORAL = 8, 4


@dataclass(frozen=True)
class TAEHVConfig:
    """Sizes of TAEHV; the defaults are those of ``taew2_1``.

    ``widths`` are the decoder's: three stages and the last layers. Each stage of the encoder turns a number of frames
    (``pools``) into one; each stage of the decoder turns one into ``grows``.
    """

    z_dim: int = 16
    encoder_width: int = 64
    widths: tuple[int, int, int, int] = (256, 128, 64, 64)
    pools: tuple[int, int, int] = (2, 2, 1)
    grows: tuple[int, int, int] = (1, 2, 2)


class Conv(nn.Module):
    """Convolution of each frame, the kernel's size odd; zero until loaded."""

    def __init__(self, in_dim: int, out_dim: int, kernel: int = 3, stride: int = 1, bias: bool = True):
        super().__init__()
        self.weight = mx.zeros((out_dim, kernel, kernel, in_dim))
        if bias:
            self.bias = mx.zeros((out_dim,))
        self._stride, self._padding = stride, kernel // 2

    def __call__(self, x: mx.array) -> mx.array:
        y = mx.conv2d(x, self.weight, stride=self._stride, padding=self._padding)
        return y + self.bias if "bias" in self else y


class MemBlock(nn.Module):
    """Three convolutions of a frame and its predecessor, which is zero at the start, plus the frame."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv: list[Any] = [Conv(2 * dim, dim), None, Conv(dim, dim), None, Conv(dim, dim)]

    def __call__(self, x: mx.array, cache: CausalCache) -> mx.array:
        (before,) = cache.get(self) or (mx.zeros_like(x[:1]),)
        cache.keep(self, x[-1:])
        past = before if len(x) == 1 else mx.concatenate([before, x[:-1]])
        y = nn.relu(self.conv[0](mx.concatenate([x, past], axis=-1)))
        return nn.relu(self.conv[4](nn.relu(self.conv[2](y))) + x)


class TPool(nn.Module):
    """``stride`` frames become one."""

    def __init__(self, dim: int, stride: int):
        super().__init__()
        self.conv = Conv(dim * stride, dim, kernel=1, bias=False)
        self._stride = stride

    def __call__(self, x: mx.array) -> mx.array:
        frames = x.reshape(-1, self._stride, *x.shape[1:])  # channels of the frames one after the other
        return self.conv(mx.concatenate([frames[:, i] for i in range(self._stride)], axis=-1))


class TGrow(nn.Module):
    """One frame becomes ``stride``; with ``last``, only the last of them."""

    def __init__(self, dim: int, stride: int):
        super().__init__()
        self.conv = Conv(dim, dim * stride, kernel=1, bias=False)
        self._stride = stride

    def __call__(self, x: mx.array, last: bool = False) -> mx.array:
        dim = x.shape[-1]
        if last:
            return mx.conv2d(x, self.conv.weight[-dim:])
        n, height, width, _ = x.shape
        grown = self.conv(x).reshape(n, height, width, self._stride, dim)
        return mx.moveaxis(grown, 3, 1).reshape(n * self._stride, height, width, dim)


class TAEHV(nn.Module):
    """Video ↔ normalised latents, like `models.vae.VAE`. Computes in the dtype of its weights; results are float32."""

    def __init__(self, config: TAEHVConfig = TAEHVConfig()):  # noqa: B008 - frozen
        super().__init__()
        self.config = config
        width = config.encoder_width
        self.encoder: list[Any] = [Conv(3, width), None]
        for pool in config.pools:
            self.encoder += [TPool(width, pool), Conv(width, width, stride=2, bias=False)]
            self.encoder += [MemBlock(width) for _ in range(3)]
        self.encoder += [Conv(width, config.z_dim)]
        self.decoder: list[Any] = [None, Conv(config.z_dim, config.widths[0]), None]
        for dim, next_dim, grow in zip(config.widths, config.widths[1:], config.grows, strict=False):
            self.decoder += [MemBlock(dim) for _ in range(3)]
            self.decoder += [None, TGrow(dim, grow), Conv(dim, next_dim, bias=False)]
        self.decoder += [None, Conv(config.widths[-1], 3)]

    def encode(self, frames: mx.array, at_once: int = 1) -> mx.array:
        """Latents of a video.

        Args:
            frames: (1, T, H, W, 3) in [-1, 1]; H and W are multiples of 8. After T = 4n+1 frames (any other T is
                allowed) the last one is repeated until there are 4n+4.
            at_once: number of latent frames that are computed at a time.

        Returns:
            float32 (1, t, H/8, W/8, C), normalised as for the transformer.

        Raises:
            ValueError: ``frames`` has another shape.
        """
        if frames.ndim != 5 or frames.shape[0] != 1 or frames.shape[-1] != 3 or 0 in frames.shape:
            raise ValueError(f"frames have shape {frames.shape}, expected (1, T, H, W, 3), channels last")
        height, width = frames.shape[2:4]
        if height % SPATIAL or width % SPATIAL:
            raise ValueError(f"frames are {width}x{height}, expected multiples of {SPATIAL}")
        frames = frames[0]
        if left := -len(frames) % TEMPORAL:
            frames = mx.concatenate([frames, mx.repeat(frames[-1:], left, axis=0)])
        cache, latents = CausalCache(), []
        for start in range(0, len(frames), TEMPORAL * at_once):
            x = (frames[start : start + TEMPORAL * at_once].astype(mx.float32) + 1) / 2
            latents.append(self._encode(x.astype(self.encoder[0].weight.dtype), cache).astype(mx.float32))
        return mx.concatenate(latents)[None]

    def decode(self, latents: mx.array, at_once: int = 1, small: bool = False) -> Iterator[mx.array]:
        """Frames of a video, as they are decoded.

        Args:
            latents: (1, t, h, w, C), normalised as for the transformer.
            at_once: number of latent frames that are decoded at a time.
            small: one frame per latent frame, with the latents' height and width, for a quarter of the work: upsampling
                is left out, as the reference suggests for previews.

        Returns:
            An iterator over float32 (1, n, 8h, 8w, 3) in [-1, 1]: of the first latent frame n is 1, of
            every other 4. If ``small``, (1, n, h, w, 3), n as many as latent frames.

        Raises:
            ValueError: ``latents`` has another shape.
        """
        z_dim = self.config.z_dim
        if latents.ndim != 5 or latents.shape[0] != 1 or latents.shape[-1] != z_dim or 0 in latents.shape:
            raise ValueError(f"latents have shape {latents.shape}, expected (1, t, h, w, {z_dim}), channels last")
        return self._decode_chunks(latents[0], at_once, small)

    def _decode_chunks(self, latents: mx.array, at_once: int, small: bool) -> Iterator[mx.array]:
        cache = CausalCache()
        for start in range(0, len(latents), at_once):
            x = latents[start : start + at_once].astype(self.decoder[1].weight.dtype)
            frames = self._decode(x, cache, small)
            if start == 0 and not small:  # a lone first frame is the last of its four decoded frames
                frames = frames[TEMPORAL - 1 :]
            yield 2 * mx.clip(frames.astype(mx.float32), 0, 1)[None] - 1

    def _encode(self, x: mx.array, cache: CausalCache) -> mx.array:
        first, _, *middle, last = self.encoder
        return last(_through(middle, nn.relu(first(x)), cache))

    def _decode(self, x: mx.array, cache: CausalCache, small: bool) -> mx.array:
        _, first, _, *middle, _, last = self.decoder
        x = nn.relu(first(mx.tanh(x / 3) * 3))
        for layer in middle:
            if isinstance(layer, TGrow):
                x = layer(x, last=small)
            elif layer is not None:
                x = _through([layer], x, cache)
            elif not small:
                x = _double(x)
        return last(nn.relu(x))


def _through(layers: Sequence[Callable], x: mx.array, cache: CausalCache) -> mx.array:
    for layer in layers:
        x = layer(x, cache) if isinstance(layer, MemBlock) else layer(x)
    return x


def _double(x: mx.array) -> mx.array:
    """Every pixel twice in both directions: (n, H, W, C) → (n, 2H, 2W, C)."""
    n, height, width, dim = x.shape
    return mx.broadcast_to(x[:, :, None, :, None], (n, height, 2, width, 2, dim)).reshape(n, 2 * height, 2 * width, dim)


def decode_flop(config: TAEHVConfig, latent_shape: tuple[int, int, int], small: bool = False) -> float:
    """Floating-point operations of decoding latents (t, h, w); a multiply-add counts as two."""
    frames, height, width = latent_shape
    pixels = frames * height * width
    flop = pixels * 18 * config.z_dim * config.widths[0]
    for dim, next_dim, grow in zip(config.widths, config.widths[1:], config.grows, strict=False):
        flop += pixels * 3 * 18 * 4 * dim**2  # three blocks of convolutions 2d -> d, d -> d, d -> d
        pixels *= 1 if small else 4
        grow = 1 if small else grow
        flop += pixels * 2 * dim * dim * grow
        pixels *= grow
        flop += pixels * 18 * dim * next_dim
    return float(flop + pixels * 18 * config.widths[-1] * 3)
