"""How the VAE runs on this machine: a few frames at a time, waiting for large work, with weights laid out once.

`VAEExecution` calls the VAE's own layers with the same results; in float32 on a CPU, the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn

from ..cuda.forward import DeferredFrees
from .pieces import Pacer
from .vae import VAE, AttentionBlock, Downsample, ResidualBlock, Upsample, flow
from .vae22 import Branched
from .vae_layers import CausalCache, CausalConv, TemporalConv, check_latents, convolve

T = TypeVar("T")

# The one attention head is 384 wide, too wide for fused kernels: this many scores at a time (64 MB in float32).
SCORES_AT_ONCE = 1 << 24
# Small frames are computed several at a time, which is faster on a GPU; up to this many values, since several
# temporaries of this size are alive at once.
VALUES_AT_ONCE = 20_000_000
# Larger arrays, each of one convolution, are waited for before more work is submitted.
BYTES_AHEAD = 12_000_000
# Most cached frames whose copies wait for `PacedCache.pace`.
MOST_NOT_MADE = 4
# Bytes of deferred frees: in tiles, which save memory, and elsewhere.
DEFERRED, DEFERRED_AHEAD = 100_000_000, 400_000_000
# For `wan_mlx.planning.peak_memory`: frames of a stage alive at once beside its caches, for each frame of a piece; and
# once more for pieces of several frames, which are joined to the two before them while new cache frames are made
# beside the old ones. Measured on an H200, without deferred frees. Of a stage's frames two are as wide as those it is
# given: Wan2.2's decoder narrows after it resamples.
DECODE_FRAMES, ENCODE_FRAMES, JOINED_FRAMES, GIVEN_FRAMES = 6.0, 8.0, 9.0, 2.0
# More where convolutions are matmuls over unfolded neighbourhoods, for three taps: on the CPU.
UNFOLDED_DECODE, UNFOLDED_ENCODE = 29.4, 27.0


class PacedCache(CausalCache):
    """A causal cache that evaluates its pass piece by piece.

    Args:
        ahead: whether to submit work to a GPU before the last submission is done. Takes more memory.
    """

    def __init__(self, ahead: bool = False):
        super().__init__()
        self._not_made: list[mx.array] = []  # copies of frames, not yet submitted
        self._derived: dict[int, Any] = {}  # of a layer, from its weights
        self._ahead = ahead and mx.default_device() == mx.gpu
        self._pacer = Pacer()
        self._frees = DeferredFrees(DEFERRED_AHEAD if self._ahead else DEFERRED)

    def pace(self, y: mx.array, x: mx.array | None = None) -> mx.array:
        """Evaluate and return ``y``; at once if it, or its source ``x``, is large.

        All submitted work is alive at once, so large pieces take turns. Small pieces would leave a GPU idle in between,
        so they are submitted ahead, if allowed.
        """
        self._pacer(y, *self._not_made)
        self._not_made = []
        if not self._ahead or max(y.nbytes, 0 if x is None else x.nbytes) > BYTES_AHEAD:
            self._pacer.finish()
        self._frees.limit()
        return y

    def derived(self, layer: nn.Module, make: Callable[[], T]) -> T:
        """``make()``, from the layer's weights: made once in this pass."""
        if id(layer) not in self._derived:
            self._derived[id(layer)] = make()
        return self._derived[id(layer)]

    def keep(self, layer: nn.Module, *frames: mx.array) -> None:
        super().keep(layer, *frames)
        # A pending copy keeps its source alive, but every submission costs a GPU time, so `pace` submits them together.
        self._not_made += self.get(layer)
        if len(self._not_made) > MOST_NOT_MADE:
            mx.async_eval(*self._not_made)
            self._not_made = []


class VAEExecution:
    """Runs a VAE: `encode_chunks` and `decode` like the VAE's own, evaluated."""

    def __init__(self, vae: VAE):
        self.vae = vae
        for layer in vae.modules():
            if isinstance(layer, TemporalConv):  # contiguous taps, so that none is copied when used
                layer.weight = mx.moveaxis(mx.contiguous(mx.moveaxis(layer.weight, 1, 0)), 0, 1)

    def encode_chunks(self, chunks: Iterable[mx.array]) -> mx.array:
        """Same as `VAE.encode_chunks`: normalised latents float32 (1, t, h, w, C)."""
        encoder, cache = self.vae.encoder, PacedCache(ahead=True)
        latents = []
        for chunk in self.vae.checked_chunks(chunks):
            frames = self.first_batches(self.vae.enter(chunk))
            (moments,) = self.flow([*encoder.local, *encoder.whole], frames, cache)
            latents.append(self.vae.pack(moments))
            mx.eval(latents[-1])
        return mx.stack(latents, axis=1)

    def decode(self, latents: mx.array) -> Iterator[mx.array]:
        """Same as `VAE.decode`: frames float32 (1, n, 8h, 8w, 3) in [-1, 1] as they are decoded."""
        check_latents(latents, self.vae.config.z_dim)
        layers = [*self.vae.decoder.whole, *self.vae.decoder.local]
        return self.decode_frames(self.vae.unpack(latents), layers, PacedCache(ahead=True))

    def decode_frames(
        self, frames: Iterable[mx.array], layers: Sequence[Callable | None], cache: PacedCache
    ) -> Iterator[mx.array]:
        """Pieces of latent frames through the last layers of the decoder: float32 (1, n, H, W, 3) each."""
        for z in frames:
            decoded = self.vae.to_frames(self.flow(layers, [z], cache))
            mx.eval(decoded)
            yield decoded

    def flow(
        self, layers: Sequence[Callable | None], frames: Iterable[mx.array], cache: PacedCache
    ) -> Iterator[mx.array]:
        """Same as `vae.flow`, with the way to run each layer here."""
        return flow(layers, frames, cache, run_layer)

    def first_batches(self, x: mx.array) -> Iterator[mx.array]:
        """Frames (n, H, W, 3), as many at a time as suit the encoder's first layers."""
        return in_batches(x, channels=len(self.vae.encoder.conv1.bias))  # those of the first layer's results


def run_layer(layer: Callable, x: mx.array, cache: PacedCache) -> mx.array | Iterator[mx.array]:
    """Same as the layer's ``__call__``, waited for in between."""
    if isinstance(layer, ResidualBlock):
        return cache.pace(layer.second(cache.pace(layer.first(x, cache)), x, cache))
    if isinstance(layer, AttentionBlock):
        return attend_within_frames(layer, x)
    if isinstance(layer, Upsample):
        # Four times the pixels, other channels. No variable holds a result: it is as large as the frames made from it.
        phases = cache.derived(layer, layer.phase_weights)
        batches = in_batches(layer.in_time(x, cache), channels=4 * len(layer.resample[1].bias))
        return (cache.pace(layer.in_space(frames, phases)) for frames in batches)
    if isinstance(layer, Branched):
        return (cache.pace(y) for y in layer(x, cache, run_layer))
    if isinstance(layer, Downsample):
        return layer.in_time(cache.pace(layer.in_space(x)), cache)
    if isinstance(layer, CausalConv):
        return cache.pace(convolve_in_eights(layer, x, cache), x)
    return layer(x, cache)


def convolve_in_eights(conv: CausalConv, x: mx.array, cache: PacedCache) -> mx.array:
    """Same as `CausalConv.__call__`: frames (n, H, W, C) → (n, H, W, out_dim)."""
    width = len(conv.bias)
    # cuDNN computes channels in eights; MLX unfolds other widths, which takes nine times the frame.
    missing = -width % 8 if mx.default_device() == mx.gpu else 0
    if not missing:
        return conv(x, cache)

    def padded() -> list[mx.array]:
        return [mx.pad(a, [(0, missing)] + [(0, 0)] * (a.ndim - 1)) for a in (*conv.taps(), conv.bias)]

    *taps, bias = cache.derived(conv, padded)
    return convolve(cache.look_back(conv, x), taps, bias)[..., :width]


def attend_within_frames(block: AttentionBlock, x: mx.array) -> mx.array:
    """Same as `AttentionBlock.__call__`: frames (n, H, W, C) → (n, H, W, C), some rows of scores at a time."""
    q, k, v = block.queries_keys_values(x)
    n, _, pixels, c = q.shape
    rows, parts = max(1, SCORES_AT_ONCE // (n * pixels)), []
    for row in range(0, pixels, rows):
        parts.append(mx.fast.scaled_dot_product_attention(q[:, :, row : row + rows], k, v, scale=c**-0.5))
        mx.eval(parts[-1])  # otherwise the scores of all parts would be alive at once
    return x + block.proj(mx.concatenate(parts, axis=2).reshape(x.shape))


def in_batches(x: mx.array, channels: int) -> Iterator[mx.array]:
    """Frames (n, H, W, C) in pieces of at most ``VALUES_AT_ONCE`` values once each has ``channels``."""
    count = max(1, VALUES_AT_ONCE // (channels * math.prod(x.shape[1:3])))
    for start in range(0, len(x), count):
        yield x[start : start + count]
