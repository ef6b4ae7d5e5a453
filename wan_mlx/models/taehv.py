"""TAEHV, the tiny autoencoder for the same latents: previews and drafts for a fraction of the VAE's work.

Follows the file ``taehv.py`` of github.com/madebyollin/taehv with its weights ``taew2_1`` (Wan 2.1 and Wan 2.2 A14B)
and ``taew2_2`` (Wan 2.2 TI2V-5B), which treats patches of 2x2 pixels as one.
Two-dimensional layers treat each frame alone; a `MemBlock` also sees the frame before it. So a video can be passed a
few frames at a time, with the same result. Layers map frames (n, H, W, C) to frames, and lists keep the numbering of
the reference's ``nn.Sequential``, with None where a layer has no parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..geometry import Geometry
from .vae_layers import CausalCache, check_frames, check_latents


@dataclass(frozen=True)
class TAEHVConfig:
    """Sizes of TAEHV; the defaults are those of ``taew2_1``. ``taew2_2`` has ``z_dim`` 48 and ``patch`` 2.

    ``widths`` are the decoder's: three stages and the last layers. Each stage of the encoder turns a number of frames
    (``pools``) into one; each stage of the decoder turns one into ``grows``.
    """

    z_dim: int = 16
    encoder_width: int = 64
    widths: tuple[int, int, int, int] = (256, 128, 64, 64)
    pools: tuple[int, int, int] = (2, 2, 1)
    grows: tuple[int, int, int] = (1, 2, 2)
    patch: int = 1

    @property
    def geometry(self) -> Geometry:
        return Geometry(math.prod(self.pools), self.patch * 2 ** len(self.pools), patch=(1, 1, 1))


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
        n, height, width, dim = x.shape
        if last:
            return mx.conv2d(x, self.conv.weight[-dim:])
        grown = self.conv(x).reshape(n, height, width, self._stride, dim)
        return mx.moveaxis(grown, 3, 1).reshape(n * self._stride, height, width, dim)


class TAEHV(nn.Module):
    """Video ↔ normalised latents, like `models.vae.VAE`. Computes in the dtype of its weights; results are float32."""

    def __init__(self, config: TAEHVConfig = TAEHVConfig()):  # noqa: B008 - frozen
        super().__init__()
        self.config = config
        width = config.encoder_width
        self.encoder: list[Any] = [Conv(3 * config.patch**2, width), None]
        for pool in config.pools:
            self.encoder += [TPool(width, pool), Conv(width, width, stride=2, bias=False)]
            self.encoder += [MemBlock(width) for _ in range(3)]
        self.encoder += [Conv(width, config.z_dim)]
        self.decoder: list[Any] = [None, Conv(config.z_dim, config.widths[0]), None]
        for dim, next_dim, grow in zip(config.widths, config.widths[1:], config.grows, strict=False):
            self.decoder += [MemBlock(dim) for _ in range(3)]
            self.decoder += [None, TGrow(dim, grow), Conv(dim, next_dim, bias=False)]
        self.decoder += [None, Conv(config.widths[-1], 3 * config.patch**2)]

    def encode(self, frames: mx.array) -> mx.array:
        """Latents of a video.

        Args:
            frames: (1, T, H, W, 3) in [-1, 1]; H and W are multiples of 8, of ``taew2_2`` 16. After T = 4n+1
                frames (any other T is allowed) the last one is repeated until there are 4n+4.

        Returns:
            float32 (1, t, H/8, W/8, C), normalised as for the transformer.

        Raises:
            ValueError: ``frames`` has another shape.
        """
        check_frames(frames, self.config.geometry)
        frames, step, cache = frames[0], self.config.geometry.temporal, CausalCache()
        if left := -len(frames) % step:
            frames = mx.concatenate([frames, mx.repeat(frames[-1:], left, axis=0)])
        first, _, *middle, last = self.encoder
        latents = []
        for start in range(0, len(frames), step):
            x = _patchify((frames[start : start + step].astype(mx.float32) + 1) / 2, self.config.patch)
            x = nn.relu(first(x.astype(first.weight.dtype)))
            for layer in middle:
                x = layer(x, cache) if isinstance(layer, MemBlock) else layer(x)
            latents.append(last(x).astype(mx.float32))
        return mx.concatenate(latents)[None]

    def decode(self, latents: mx.array, small: bool = False) -> Iterator[mx.array]:
        """Frames of a video, as they are decoded.

        Args:
            latents: (1, t, h, w, C), normalised as for the transformer.
            small: one frame per latent frame, with the latents' height and width (``taew2_2``: twice those), for a
                quarter of the work: upsampling is left out, as the reference suggests for previews.

        Returns:
            An iterator over float32 (1, n, 8h, 8w, 3) in [-1, 1]: of the first latent frame n is 1, of
            every other 4. If ``small``, (1, 1, h, w, 3) of each.

        Raises:
            ValueError: ``latents`` has another shape.
        """
        check_latents(latents, self.config.z_dim)
        return self._decode(latents[0], small)

    def _decode(self, latents: mx.array, small: bool) -> Iterator[mx.array]:
        _, first, _, *middle, _, last = self.decoder
        cache = CausalCache()
        for index in range(len(latents)):
            x = latents[index : index + 1].astype(first.weight.dtype)
            x = nn.relu(first(mx.tanh(x / 3) * 3))
            for layer in middle:
                if isinstance(layer, TGrow):
                    x = layer(x, last=small)
                elif layer is None:
                    x = x if small else _double(x)
                else:
                    x = layer(x, cache) if isinstance(layer, MemBlock) else layer(x)
            frames = _unpatchify(last(nn.relu(x)), self.config.patch)
            if index == 0 and not small:  # a lone first frame is the last of its four decoded frames
                frames = frames[-1:]
            yield 2 * mx.clip(frames.astype(mx.float32), 0, 1)[None] - 1


def _patchify(frames: mx.array, side: int) -> mx.array:
    """(n, H, W, C) → (n, H/side, W/side, C * side²), as PyTorch's ``pixel_unshuffle``: unlike in the VAE's patches,
    the place along the height is the slower."""
    n, height, width, dim = frames.shape
    patches = frames.reshape(n, height // side, side, width // side, side, dim)
    return patches.transpose(0, 1, 3, 5, 2, 4).reshape(n, height // side, width // side, -1)


def _unpatchify(patches: mx.array, side: int) -> mx.array:
    """The inverse of `_patchify`."""
    n, height, width, dim = patches.shape
    frames = patches.reshape(n, height, width, dim // side**2, side, side)
    return frames.transpose(0, 1, 4, 2, 5, 3).reshape(n, height * side, width * side, -1)


def _double(x: mx.array) -> mx.array:
    """Every pixel twice in both directions: (n, H, W, C) → (n, 2H, 2W, C)."""
    n, height, width, dim = x.shape
    return mx.broadcast_to(x[:, :, None, :, None], (n, height, 2, width, 2, dim)).reshape(n, 2 * height, 2 * width, dim)
