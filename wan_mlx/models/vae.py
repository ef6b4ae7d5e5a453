"""The causal 3D VAE of Wan2.1: video ↔ latents.

Follows the official ``wan/modules/vae.py``, but with any number of frames at a time, which causality makes equal:
layers map consecutive frames (n, H, W, C), and a `CausalCache` holds the frames they look back to. Parameter names
are the official checkpoint's, so lists keep the numbering of its ``nn.Sequential``, with None where a layer has no
parameters. `wan_mlx.models.vae_execution` decides how it runs on a machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .configs import VAEConfig
from .vae_layers import CausalCache, CausalConv, Conv, PointConv, TimeConv, check_frames, check_latents


class RMSNorm(nn.Module):
    """``x / |x| * sqrt(C) * gamma`` over the channels; zero stays zero. Statistics are float32."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = mx.ones((dim,))

    def __call__(self, x: mx.array, cache: CausalCache | None = None) -> mx.array:
        # The official norm divides by at least 1e-12; the fused one adds its eps to the mean square instead.
        return mx.fast.rms_norm(x, self.gamma.astype(x.dtype), 1e-24 / x.shape[-1])


@partial(mx.compile, shapeless=True)
def silu(x: mx.array) -> mx.array:
    """SiLU computed in float32, in x's dtype."""
    y = x.astype(mx.float32)
    return (y * mx.sigmoid(y)).astype(x.dtype)


class ResidualBlock(nn.Module):
    """Twice norm, SiLU, causal convolution; the shortcut is projected where the width changes."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        conv1, conv2 = CausalConv(in_dim, out_dim), CausalConv(out_dim, out_dim)
        self.residual: list[Any] = [RMSNorm(in_dim), None, conv1, RMSNorm(out_dim), None, None, conv2]
        if in_dim != out_dim:
            self.shortcut = PointConv(in_dim, out_dim)

    def __call__(self, x: mx.array, cache: CausalCache) -> mx.array:
        return self.second(self.first(x, cache), x, cache)

    def first(self, x: mx.array, cache: CausalCache) -> mx.array:
        norm, _, conv, *_ = self.residual
        return conv(silu(norm(x)), cache)

    def second(self, y: mx.array, x: mx.array, cache: CausalCache) -> mx.array:
        *_, norm, _, _, conv = self.residual
        return conv(silu(norm(y)), cache, self.shortcut(x) if "shortcut" in self else x)


class AttentionBlock(nn.Module):
    """Self-attention with one head among the pixels of each frame."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = RMSNorm(dim)
        self.to_qkv = PointConv(dim, 3 * dim, rank=2)
        self.proj = PointConv(dim, dim, rank=2)

    def __call__(self, x: mx.array, cache: CausalCache) -> mx.array:
        q, k, v = self.queries_keys_values(x)
        attended = mx.fast.scaled_dot_product_attention(q, k, v, scale=x.shape[-1] ** -0.5)
        return x + self.proj(attended.reshape(x.shape))

    def queries_keys_values(self, x: mx.array) -> Sequence[mx.array]:
        """Frames (n, H, W, C) → queries, keys and values (n, 1, H * W, C)."""
        n, h, w, c = x.shape
        return self.to_qkv(self.norm(x)).reshape(n, 1, h * w, 3 * c).split(3, axis=-1)


class Downsample(nn.Module):
    """Half the height and width and, if ``temporal``, half the frames after the first."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample: list[Any] = [None, Conv(dim, dim, 3, 3)]
        if temporal:
            self.time_conv = TimeConv(dim, dim)

    def __call__(self, x: mx.array, cache: CausalCache) -> Iterator[mx.array]:
        """(n, H, W, C) → (m, H/2, W/2, C): as many frames; if temporal, one for the first and for each two after."""
        return self.in_time(self.in_space(x), cache)

    def in_space(self, x: mx.array) -> mx.array:
        """(n, H, W, C) → (n, H/2, W/2, C)."""
        conv = self.resample[1]
        # Padded only below and on the right.
        return mx.conv_general(x, conv.weight, stride=2, padding=([0, 0], [1, 1])) + conv.bias

    def in_time(self, x: mx.array, cache: CausalCache) -> Iterator[mx.array]:
        """Frames (n, H, W, C) → half as many, if temporal."""
        if "time_conv" not in self:
            yield x
            return
        frames = [*cache.get(self), *mx.split(x, len(x))]
        if not cache.get(self):  # the first frame has no partner
            yield frames[0]
        # Pairs: each sees the frame before it. A frame that waits for its partner is kept.
        pairs = (len(frames) - 1) // 2
        cache.keep(self, *frames[2 * pairs :])
        if pairs:
            taps = (frames[k : k + 2 * pairs : 2] for k in range(3))
            yield self.time_conv(*(mx.concatenate(tap) if pairs > 1 else tap[0] for tap in taps))


# (phase, pixel, tap): of the two pixels under an upper or lower (left or right) result, the one that each tap of a
# 3-wide kernel over doubled pixels reads.
PHASES = (((1.0, 0.0, 0.0), (0.0, 1.0, 1.0)), ((1.0, 1.0, 0.0), (0.0, 0.0, 1.0)))


class Upsample(nn.Module):
    """Twice the height and width, other channels and, if ``temporal``, twice the frames after the first."""

    def __init__(self, dim: int, out_dim: int, temporal: bool):
        super().__init__()
        self.resample: list[Any] = [None, Conv(dim, out_dim, 3, 3)]
        if temporal:
            self.time_conv = TimeConv(dim, 2 * dim)

    def __call__(self, x: mx.array, cache: CausalCache) -> Iterator[mx.array]:
        """(n, H, W, C) → (m, 2H, 2W, out_dim)."""
        yield self.in_space(self.in_time(x, cache), self.phase_weights())

    def in_space(self, x: mx.array, phase_weights: mx.array) -> mx.array:
        """(n, H, W, C) → (n, 2H, 2W, out_dim): pixels doubled, then a 3x3 convolution, at once and in half the work.

        Among doubled pixels, four neighbours are one pixel of ``x``, so each of the four results at a pixel needs 2x2
        pixels of ``x`` with sums of kernel values (`phase_weights`), and the doubled frame is never stored.
        """
        conv, (n, h, w, _) = self.resample[1], x.shape
        # (n, H+1, W+1, 4 * width): at (i, j) the sums over pixels i-1, i and j-1, j, for phases (a, b).
        seen = mx.conv2d(x, phase_weights, padding=1)
        # The result at (2i + a, 2j + b) is phase (a, b) at (i + a, j + b).
        width = len(conv.bias)
        column, row = 4 * width, 4 * width * (w + 1)
        strides = ((h + 1) * row, row, row + 2 * width, column, column + width, 1)
        y = mx.as_strided(seen, (n, h, 2, w, 2, width), strides) + conv.bias
        return y.reshape(n, 2 * h, 2 * w, width)

    def phase_weights(self) -> mx.array:
        """The convolution's weight as 2x2 kernels for the original pixels, (4 * width, 2, 2, C)."""
        weight, phases = self.resample[1].weight, mx.array(PHASES)
        sums = mx.einsum("aru,bsv,ouvc->aborsc", phases, phases, weight.astype(mx.float32))
        return sums.reshape(-1, *sums.shape[3:]).astype(weight.dtype)

    def in_time(self, x: mx.array, cache: CausalCache) -> mx.array:
        """Frames (n, H, W, C) → twice as many, if temporal."""
        if "time_conv" not in self:
            return x
        if not cache.get(self):
            # The first frame is not doubled, and the second sees zeros before it instead of the first.
            cache.keep(self, *(mx.zeros_like(x[:1]),) * 2)
            return x[:1] if len(x) == 1 else mx.concatenate([x[:1], self.in_time(x[1:], cache)])
        y = self.time_conv(*cache.look_back(self, x))
        n, h, w, c = x.shape
        return y.reshape(n, h, w, 2, c).transpose(0, 3, 1, 2, 4).reshape(2 * n, h, w, c)


def residual_blocks(in_dim: int, out_dim: int, count: int) -> list[nn.Module]:
    return [ResidualBlock(in_dim, out_dim), *(ResidualBlock(out_dim, out_dim) for _ in range(count - 1))]


def middle_blocks(dim: int) -> list[nn.Module]:
    return [ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim)]


def flow(
    layers: Sequence[Callable | None],
    frames: Iterable[mx.array],
    cache: CausalCache,
    run: Callable = lambda layer, x, cache: layer(x, cache),
) -> Iterator[mx.array]:
    """Send ``frames``, pieces (n, H, W, C) of a video, through ``layers``, None for SiLU; resampling changes their
    number, so it returns pieces. Each passes all layers before the next one starts, so that few large frames exist at a
    time.
    """
    for x in frames:
        for i, layer in enumerate(layers):
            result = silu(x) if layer is None else run(layer, x, cache)
            if not isinstance(result, mx.array):
                yield from flow(layers[i + 1 :], result, cache, run)
                break
            x = result
        else:
            yield x


class Encoder(nn.Module):
    """Frames (n, H, W, 3) → latent frames (m, h, w, 2 * z_dim), before the last 1x1x1 convolution.

    A latent frame comes out after frames 1, 5, 9, ...
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.dim * m for m in (1, *config.dim_mult)]
        self.conv1 = CausalConv(3 * config.patch**2, widths[0])
        self.downsamples: list[Any] = []
        for into, out, temporal in zip(widths[:-1], widths[1:], (*config.temporal_downsample, None), strict=True):
            self.downsamples += self.stage(into, out, config.num_res_blocks, temporal)
        self.middle = middle_blocks(widths[-1])
        self.head: list[Any] = [RMSNorm(widths[-1]), None, CausalConv(widths[-1], 2 * config.z_dim)]

    @staticmethod
    def stage(in_dim: int, out_dim: int, blocks: int, temporal: bool | None) -> list[nn.Module]:
        """The layers of one resolution, and those to the next one, if there is one: ``temporal`` or not."""
        layers = residual_blocks(in_dim, out_dim, blocks)
        return layers if temporal is None else [*layers, Downsample(out_dim, temporal)]

    @property
    def local(self) -> list[Callable | None]:
        """The first layers, where every pixel sees only its neighbourhood."""
        return [self.conv1, *self.downsamples]

    @property
    def whole(self) -> list[Callable | None]:
        """The layers after them, which see whole frames."""
        return [*self.middle, *self.head]


class Decoder(nn.Module):
    """Latent frames (n, h, w, z_dim), after the first 1x1x1 convolution → frames (m, H, W, 3).

    The first latent frame gives one frame, every other four.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.decoder_dim * m for m in config.dim_mult[::-1]]
        given = [widths[0], *(width // config.narrowing for width in widths)]
        self.conv1 = CausalConv(config.z_dim, widths[0])
        self.middle = middle_blocks(widths[0])
        self.upsamples: list[Any] = []
        for into, out, temporal in zip(given, widths, (*config.temporal_downsample[::-1], None), strict=False):
            self.upsamples += self.stage(into, out, config.num_res_blocks + 1, temporal)
        self.head: list[Any] = [RMSNorm(widths[-1]), None, CausalConv(widths[-1], 3 * config.patch**2)]

    @staticmethod
    def stage(in_dim: int, out_dim: int, blocks: int, temporal: bool | None) -> list[nn.Module]:
        """The layers of one resolution, and those to the next one, if there is one: ``temporal`` or not."""
        layers = residual_blocks(in_dim, out_dim, blocks)
        return layers if temporal is None else [*layers, Upsample(out_dim, out_dim // 2, temporal)]

    @property
    def whole(self) -> list[Callable | None]:
        """The first layers, which see whole frames."""
        return [self.conv1, *self.middle]

    @property
    def local(self) -> list[Callable | None]:
        """The layers after them, where every pixel sees only its neighbourhood."""
        return [*self.upsamples, *self.head]


class VAE(nn.Module):
    """Video ↔ normalised latents. Computes in the dtype of its weights; results are float32.

    Raises:
        ValueError: the lengths in ``config`` do not agree.
    """

    coders: tuple[type[Encoder], type[Decoder]] = (Encoder, Decoder)

    def __init__(self, config: VAEConfig):
        super().__init__()
        lengths = {"mean": config.z_dim, "std": config.z_dim, "temporal_downsample": len(config.dim_mult) - 1}
        for name, expected in lengths.items():
            if len(values := getattr(config, name)) != expected:
                raise ValueError(f"{name} has {len(values)} values, expected {expected}")
        self.config = config
        self.geometry = config.geometry
        encoder, decoder = self.coders
        self.encoder = encoder(config)
        self.conv1 = PointConv(2 * config.z_dim, 2 * config.z_dim)
        self.conv2 = PointConv(config.z_dim, config.z_dim)
        self.decoder = decoder(config)

    def encode(self, frames: mx.array) -> mx.array:
        """Mean of the latents of a whole video in memory.

        Args:
            frames: (1, T, H, W, 3) in [-1, 1]; T is 4n+1, H and W are multiples of 8.

        Returns:
            float32 (1, (T-1)/4+1, H/8, W/8, C), normalised per channel: ``(mean - config.mean) / config.std``.

        Raises:
            ValueError: ``frames`` has another shape.
        """
        check_frames(frames, self.geometry)
        num_frames, step = frames.shape[1], self.geometry.temporal
        self.geometry.check_frames(num_frames)
        return self.encode_chunks([frames[:, :1], *(frames[:, i : i + step] for i in range(1, num_frames, step))])

    def encode_chunks(self, chunks: Iterable[mx.array]) -> mx.array:
        """Like ``encode`` for a video that arrives in chunks: (1, 1, H, W, 3), then (1, 4, H, W, 3) each.

        Raises:
            ValueError: a chunk has another shape, or there is none.
        """
        frames = (self.enter(chunk) for chunk in self.checked_chunks(chunks))
        moments = flow([*self.encoder.local, *self.encoder.whole], frames, CausalCache())
        return mx.stack([self.pack(frame) for frame in moments], axis=1)

    def checked_chunks(self, chunks: Iterable[mx.array]) -> Iterator[mx.array]:
        """The same chunks; raises ValueError as `encode_chunks` does."""
        count = 0
        for count, chunk in enumerate(chunks, 1):
            check_frames(chunk, self.geometry)
            expected = 1 if count == 1 else self.geometry.temporal
            if chunk.shape[1] != expected:
                raise ValueError(f"chunk {count} has {chunk.shape[1]} frames, expected {expected}")
            yield chunk
        if not count:
            raise ValueError("no chunk of frames given, expected at least one")

    def decode(self, latents: mx.array) -> Iterator[mx.array]:
        """Frames of a video, as they are decoded.

        Args:
            latents: float32 (1, t, h, w, C), normalised as ``encode`` returns them.

        Returns:
            An iterator over float32 (1, n, 8h, 8w, 3), clipped to [-1, 1]: n is 1 for the first latent frame, then 4.

        Raises:
            ValueError: ``latents`` has another shape.
        """
        check_latents(latents, self.config.z_dim)
        cache, layers = CausalCache(), [*self.decoder.whole, *self.decoder.local]
        return (self.to_frames(flow(layers, [z], cache)) for z in self.unpack(latents))

    def enter(self, chunk: mx.array) -> mx.array:
        """A chunk float32 (1, n, H, W, 3) → the encoder's input (n, H, W, 3)."""
        return chunk[0].astype(self.encoder.conv1.weight.dtype)

    def pack(self, moments: mx.array) -> mx.array:
        """The encoder's result (1, h, w, 2C) → a normalised latent frame, float32 (1, h, w, C)."""
        mean = self.conv1(moments).astype(mx.float32)[..., : self.config.z_dim]
        return (mean - mx.array(self.config.mean)) / mx.array(self.config.std)

    def unpack(self, latents: mx.array) -> Iterator[mx.array]:
        """Normalised latents float32 (1, t, h, w, C) → the decoder's input frames (1, h, w, C)."""
        for i in range(latents.shape[1]):
            z = latents[:, i].astype(mx.float32) * mx.array(self.config.std) + mx.array(self.config.mean)
            yield self.conv2(z.astype(self.conv2.weight.dtype))

    def to_frames(self, decoded: Iterable[mx.array]) -> mx.array:
        """Pieces of decoded frames (n, H, W, 3) → float32 (1, n, H, W, 3), clipped to [-1, 1]."""
        frames = mx.concatenate(list(decoded))[None]
        return mx.clip(frames.astype(mx.float32), -1.0, 1.0)
