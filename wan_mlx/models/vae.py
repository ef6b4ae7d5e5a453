"""The causal 3D VAE of Wan2.1: video ↔ latents.

Follows the official ``wan/modules/vae.py``, but a few frames at a time, which causality makes equal: layers take and
give consecutive frames (n, H, W, C), and a `CausalCache` holds the frames they look back to. Parameter names are the
official checkpoint's, so lists keep the numbering of its ``nn.Sequential``, with None where a layer has no parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from .configs import VAEConfig
from .vae_layers import CausalCache, CausalConv, Conv, PointConv, TimeConv

# The one attention head is 384 wide, which no fused kernel takes: this many scores at a time (64 MB in float32).
SCORES_AT_ONCE = 1 << 24
# Small frames are computed several at a time, which the GPU does faster; up to so many values, since several
# temporaries of this size live at once.
VALUES_AT_ONCE = 20_000_000


class RMSNorm(nn.Module):
    """``x / |x| * sqrt(C) * gamma`` over the channels; zero stays zero. Statistics are float32."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = mx.ones((dim,))

    def __call__(self, x: mx.array) -> mx.array:
        # The official norm divides by at least 1e-12; the fused one adds its eps to the mean square instead.
        return mx.fast.rms_norm(x, self.gamma.astype(x.dtype), 1e-24 / x.shape[-1])


@partial(mx.compile, shapeless=True)
def silu(x: mx.array) -> mx.array:
    """SiLU computed in float32, in x's dtype."""
    y = x.astype(mx.float32)
    return (y * mx.sigmoid(y)).astype(x.dtype)


class ResidualBlock(nn.Module):
    """Two times norm, SiLU, causal convolution; the shortcut is projected where the width changes."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        conv1, conv2 = CausalConv(in_dim, out_dim), CausalConv(out_dim, out_dim)
        self.residual = [RMSNorm(in_dim), None, conv1, RMSNorm(out_dim), None, None, conv2]
        if in_dim != out_dim:
            self.shortcut = PointConv(in_dim, out_dim)

    def __call__(self, x: mx.array, cache: CausalCache) -> mx.array:
        norm1, _, conv1, norm2, _, _, conv2 = self.residual
        y = cache.pace(conv1(silu(norm1(x)), cache))
        return cache.pace(conv2(silu(norm2(y)), cache, residual=self.shortcut(x) if "shortcut" in self else x))


class AttentionBlock(nn.Module):
    """Self-attention with one head among the pixels of each frame."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = RMSNorm(dim)
        self.to_qkv = PointConv(dim, 3 * dim, rank=2)
        self.proj = PointConv(dim, dim, rank=2)

    def __call__(self, x: mx.array, cache: CausalCache) -> mx.array:
        n, h, w, c = x.shape
        q, k, v = self.to_qkv(self.norm(x)).reshape(n, 1, h * w, 3 * c).split(3, axis=-1)
        rows = max(1, SCORES_AT_ONCE // (n * h * w))
        parts = []
        for row in range(0, h * w, rows):
            parts.append(mx.fast.scaled_dot_product_attention(q[:, :, row : row + rows], k, v, scale=c**-0.5))
            mx.eval(parts[-1])  # without it the scores of all parts would be alive at once
        return x + self.proj(mx.concatenate(parts, axis=2).reshape(x.shape))


class Downsample(nn.Module):
    """Half the height and width and, if ``temporal``, half the frames after the first."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = [None, Conv(dim, dim, 3, 3)]
        if temporal:
            self.time_conv = TimeConv(dim, dim)

    def __call__(self, x: mx.array, cache: CausalCache) -> Iterator[mx.array]:
        """(n, H, W, C) → (m, H/2, W/2, C): as many frames or, in time, one for the first frame and each two after."""
        conv = self.resample[1]
        # Padded below and on the right only.
        x = cache.pace(mx.conv_general(x, conv.weight, stride=2, padding=([0, 0], [1, 1])) + conv.bias)
        if "time_conv" not in self:
            yield x
            return
        frames = [*cache.get(self), *mx.split(x, len(x))]
        if not cache.get(self):  # the first frame stands for itself
            yield frames[0]
        # Pairs: each is seen with the frame before it. What waits for its second frame is kept.
        pairs = (len(frames) - 1) // 2
        cache.keep(self, *frames[2 * pairs :])
        if pairs:
            taps = (frames[k : k + 2 * pairs : 2] for k in range(3))
            yield self.time_conv(*(mx.concatenate(tap) if pairs > 1 else tap[0] for tap in taps))


# (phase, pixel, tap): on which of the two pixels that an upper or lower (left or right) result sees each tap of a
# 3-wide kernel over doubled pixels falls.
PHASES = (((1.0, 0.0, 0.0), (0.0, 1.0, 1.0)), ((1.0, 1.0, 0.0), (0.0, 0.0, 1.0)))


class Upsample(nn.Module):
    """Twice the height and width, half the channels and, if ``temporal``, twice the frames after the first."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self._phases: tuple[mx.array | None, mx.array | None] = (None, None)
        self.resample = [None, Conv(dim, dim // 2, 3, 3)]
        if temporal:
            self.time_conv = TimeConv(dim, 2 * dim)

    def __call__(self, x: mx.array, cache: CausalCache) -> Iterator[mx.array]:
        """(n, H, W, C) → (m, 2H, 2W, C/2), a few frames at a time."""
        for frames in in_batches(self._in_time(x, cache), scale=2):  # four times the pixels, half as wide
            yield self._in_space(frames, cache)  # not held here: it is as large as the frames that follow from it

    def _in_space(self, x, cache):
        """(n, H, W, C) → (n, 2H, 2W, C/2): every pixel doubled, then a 3x3 convolution, in one step at half the work.

        Four neighbours among the doubled pixels are one pixel of ``x``, so each of the four results at a pixel sees 2x2
        pixels of ``x`` with sums of the kernel's values, and the doubled frame is never made.
        """
        conv, (n, h, w, _) = self.resample[1], x.shape
        # (n, H+1, W+1, 4 * width): at (i, j) what is seen of pixels i-1, i and j-1, j, for phases (a, b).
        seen = mx.conv2d(x, self._phase_weights(), padding=1)
        # The result at (2i + a, 2j + b) is phase (a, b) at (i + a, j + b).
        width = len(conv.bias)
        column, row = 4 * width, 4 * width * (w + 1)
        strides = ((h + 1) * row, row, row + 2 * width, column, column + width, 1)
        y = mx.as_strided(seen, (n, h, 2, w, 2, width), strides) + conv.bias
        return cache.pace(y.reshape(n, 2 * h, 2 * w, width))

    def _phase_weights(self) -> mx.array:
        """(4 * width, 2, 2, C), made once."""
        made_from, weight = self._phases
        conv = self.resample[1]
        if made_from is not conv.weight:
            phases = mx.array(PHASES)
            weight = mx.einsum("aru,bsv,ouvc->aborsc", phases, phases, conv.weight.astype(mx.float32))
            weight = weight.reshape(-1, *weight.shape[3:]).astype(conv.weight.dtype)
            self._phases = conv.weight, weight
        return weight

    def _in_time(self, x, cache):
        if "time_conv" not in self:
            return x
        if not cache.get(self):
            # The first frame is not doubled, and the second finds zeros before it instead of the first.
            cache.keep(self, *(mx.zeros_like(x[:1]),) * 2)
            return x[:1] if len(x) == 1 else mx.concatenate([x[:1], self._in_time(x[1:], cache)])
        y = self.time_conv(*cache.look_back(self, x))
        n, h, w, c = x.shape
        return y.reshape(n, h, w, 2, c).transpose(0, 3, 1, 2, 4).reshape(2 * n, h, w, c)


def in_batches(x: mx.array, scale: int = 1) -> Iterator[mx.array]:
    """Frames (n, H, W, C) in pieces of at most ``VALUES_AT_ONCE`` values when they have grown ``scale`` times."""
    count = max(1, VALUES_AT_ONCE // (scale * x[0].size))
    for start in range(0, len(x), count):
        yield x[start : start + count]


def middle_blocks(dim: int) -> list[nn.Module]:
    return [ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim)]


def apply_head(head: Sequence, x: mx.array, cache: CausalCache) -> mx.array:
    """Norm, SiLU, causal convolution."""
    norm, _, conv = head
    return cache.pace(conv(silu(norm(x)), cache), x)


def flow(layers: Sequence[Callable], frames: Iterable[mx.array], cache: CausalCache) -> Iterator[mx.array]:
    """Send ``frames``, pieces (n, H, W, C) of a video, through ``layers``; resampling changes how many there are.

    Each piece goes all the way before the next one starts, so that few large frames exist at a time.
    """
    for x in frames:
        for i, layer in enumerate(layers):
            if isinstance(layer, (Downsample, Upsample)):
                yield from flow(layers[i + 1 :], layer(x, cache), cache)
                break
            x = layer(x, cache)
        else:
            yield x


class Encoder(nn.Module):
    """Frames (n, H, W, 3) → latent frames (m, h, w, 2 * z_dim), before the last 1x1x1 convolution."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.dim * m for m in (1, *config.dim_mult)]
        self.conv1 = CausalConv(3, widths[0])
        self.downsamples = []
        for i, (in_dim, out_dim) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            self.downsamples.append(ResidualBlock(in_dim, out_dim))
            self.downsamples += [ResidualBlock(out_dim, out_dim) for _ in range(config.num_res_blocks - 1)]
            if i < len(config.temporal_downsample):
                self.downsamples.append(Downsample(out_dim, config.temporal_downsample[i]))
        self.middle = middle_blocks(widths[-1])
        self.head = [RMSNorm(widths[-1]), None, CausalConv(widths[-1], 2 * config.z_dim)]

    @property
    def local(self) -> list[Callable]:
        """The first layers, of which every pixel sees only its neighbourhood."""
        return [self.conv1, *self.downsamples]

    @property
    def whole(self) -> list[Callable]:
        """The layers after them, which see whole frames."""
        return [*self.middle, partial(apply_head, self.head)]

    def batches(self, x: mx.array) -> Iterator[mx.array]:
        """As many frames at a time as the first layers should get."""
        # The first layer makes frames of 3 channels `dim` channels wide.
        return in_batches(x, scale=len(self.conv1.bias) // 3)

    def __call__(self, x: mx.array, cache: CausalCache) -> Iterator[mx.array]:
        """Encode the next frames: a latent frame comes out after frames 1, 5, 9, ..."""
        return flow([*self.local, *self.whole], self.batches(x), cache)


class Decoder(nn.Module):
    """Latent frames (n, h, w, z_dim), after the first 1x1x1 convolution → frames (m, H, W, 3)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.dim * m for m in (config.dim_mult[-1], *config.dim_mult[::-1])]
        self.conv1 = CausalConv(config.z_dim, widths[0])
        self.middle = middle_blocks(widths[0])
        self.upsamples = []
        temporal = config.temporal_downsample[::-1]
        for i, (in_dim, out_dim) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            # The convolution that doubles the resolution has halved the width.
            self.upsamples.append(ResidualBlock(in_dim // 2 if i else in_dim, out_dim))
            self.upsamples += [ResidualBlock(out_dim, out_dim) for _ in range(config.num_res_blocks)]
            if i < len(temporal):
                self.upsamples.append(Upsample(out_dim, temporal[i]))
        self.head = [RMSNorm(widths[-1]), None, CausalConv(widths[-1], 3)]

    @property
    def whole(self) -> list[Callable]:
        """The first layers, which see whole frames."""
        return [self.conv1, *self.middle]

    @property
    def local(self) -> list[Callable]:
        """The layers after them, of which every pixel sees only its neighbourhood."""
        return [*self.upsamples, partial(apply_head, self.head)]

    def __call__(self, x: mx.array, cache: CausalCache) -> Iterator[mx.array]:
        """Decode the next latent frames: the first gives one frame, every other four."""
        return flow([*self.whole, *self.local], [x], cache)


class VAE(nn.Module):
    """Video ↔ normalised latents. Computes in the dtype of its weights; results are float32.

    Raises:
        ValueError: the lengths in ``config`` do not agree.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        if len(config.mean) != config.z_dim or len(config.std) != config.z_dim:
            raise ValueError(
                f"mean and std have {len(config.mean)} and {len(config.std)} values, expected z_dim = {config.z_dim}"
            )
        if len(config.temporal_downsample) != len(config.dim_mult) - 1:
            raise ValueError(f"temporal_downsample has {len(config.temporal_downsample)} values, expected "
                             f"{len(config.dim_mult) - 1}, one fewer than dim_mult")  # fmt: skip
        self.config = config
        self.encoder = Encoder(config)
        self.conv1 = PointConv(2 * config.z_dim, 2 * config.z_dim)
        self.conv2 = PointConv(config.z_dim, config.z_dim)
        self.decoder = Decoder(config)

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent along height and width; 8 for Wan2.1."""
        return self.config.spatial_factor

    @property
    def temporal_factor(self) -> int:
        """Frames per latent frame after the first, which stands for one frame; 4 for Wan2.1."""
        return self.config.temporal_factor

    def encode(self, frames: mx.array) -> mx.array:
        """Mean of the latents of a video that is in memory as a whole.

        Args:
            frames: (1, T, H, W, 3) in [-1, 1]; T is 4n+1, H and W are multiples of 8.

        Returns:
            float32 (1, (T-1)/4+1, H/8, W/8, C), normalised per channel: ``(mean - config.mean) / config.std``.

        Raises:
            ValueError: ``frames`` has another shape.
        """
        self._check_frames(frames)
        num_frames, step = frames.shape[1], self.temporal_factor
        if num_frames % step != 1 % step:
            nearest = max(0, round((num_frames - 1) / step)) * step + 1
            raise ValueError(f"{num_frames} frames given, expected {step}n+1; nearest is {nearest}")
        starts = range(1, num_frames, step)
        return self.encode_chunks([frames[:, :1], *(frames[:, i : i + step] for i in starts)])

    def encode_chunks(self, chunks: Iterable[mx.array]) -> mx.array:
        """Like ``encode`` for a video that arrives in chunks: (1, 1, H, W, 3), then (1, 4, H, W, 3) each.

        Raises:
            ValueError: a chunk has another shape, or there is none.
        """
        cache = CausalCache(ahead=True)
        latents = [self._encode_chunk(chunk, cache) for chunk in self.checked_chunks(chunks)]
        return mx.stack(latents, axis=1)

    def checked_chunks(self, chunks: Iterable[mx.array]) -> Iterator[mx.array]:
        """The same chunks; raises ValueError as `encode_chunks` does."""
        count = 0
        for chunk in chunks:
            self._check_frames(chunk)
            expected = self.temporal_factor if count else 1
            if chunk.shape[1] != expected:
                raise ValueError(f"chunk {count} has {chunk.shape[1]} frames, expected {expected}")
            yield chunk
            count += 1
        if not count:
            raise ValueError("no chunk of frames given, expected at least one")

    def decode(self, latents: mx.array) -> Iterator[mx.array]:
        """Frames of a video, as they are decoded.

        Args:
            latents: float32 (1, t, h, w, C), normalised as ``encode`` returns them.

        Returns:
            An iterator over float32 (1, n, 8h, 8w, 3), evaluated and clipped to [-1, 1]: n is 1 for the first latent
            frame, then 4.

        Raises:
            ValueError: ``latents`` has another shape.
        """
        z_dim = self.config.z_dim
        if latents.ndim != 5 or latents.shape[0] != 1 or latents.shape[-1] != z_dim or 0 in latents.shape:
            raise ValueError(f"latents have shape {latents.shape}, expected (1, t, h, w, {z_dim}), channels last")
        return self._decode_frames(latents)

    def _encode_chunk(self, chunk, cache):
        (moments,) = self.encoder(chunk[0].astype(self.encoder.conv1.weight.dtype), cache)
        return self.pack(moments)

    def pack(self, moments: mx.array) -> mx.array:
        """What the encoder gives (1, h, w, 2C) → a frame of latents float32 (1, h, w, C), normalised."""
        mean = self.conv1(moments).astype(mx.float32)[..., : self.config.z_dim]
        latents = (mean - mx.array(self.config.mean)) / mx.array(self.config.std)
        mx.eval(latents)
        return latents

    def unpack(self, latents: mx.array) -> Iterator[mx.array]:
        """Normalised latents float32 (1, t, h, w, C) → the frames (1, h, w, C) that the decoder takes."""
        for i in range(latents.shape[1]):
            z = latents[:, i].astype(mx.float32) * mx.array(self.config.std) + mx.array(self.config.mean)
            yield self.conv2(z.astype(self.conv2.weight.dtype))

    def to_frames(self, decoded: Iterable[mx.array]) -> mx.array:
        """Frames (n, H, W, 3) from the decoder, in pieces → float32 (1, n, H, W, 3), clipped to [-1, 1]."""
        frames = mx.concatenate(list(decoded))[None]
        frames = mx.clip(frames.astype(mx.float32), -1.0, 1.0)
        mx.eval(frames)
        return frames

    def _decode_frames(self, latents):
        cache = CausalCache(ahead=True)
        for z in self.unpack(latents):
            yield self.to_frames(self.decoder(z, cache))

    def _check_frames(self, frames):
        if frames.ndim != 5 or frames.shape[0] != 1 or frames.shape[-1] != 3 or 0 in frames.shape:
            raise ValueError(f"frames have shape {frames.shape}, expected (1, T, H, W, 3), channels last")
        height, width = frames.shape[2:4]
        factor = self.spatial_factor
        if height % factor or width % factor:
            nearest = [max(1, round(n / factor)) * factor for n in (height, width)]
            raise ValueError(f"frames are {width}x{height}, expected multiples of {factor}; "
                             f"nearest is {nearest[1]}x{nearest[0]}")  # fmt: skip
