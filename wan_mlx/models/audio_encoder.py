"""Sound → features: wav2vec 2.0 in its large form, with layer norms before attention (XLSR), all its hidden states.

Follows transformers' ``Wav2Vec2Model`` (``do_stable_layer_norm``, ``feat_extract_norm`` "layer"), which the official
``wan/modules/s2v/audio_encoder.py`` calls. Parameter names are the published file's, without ``wav2vec2.``.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .attention import attention, split_heads
from .configs import AudioEncoderConfig
from .layers import AffineNorm, Conv1d, Linear

SAMPLE_RATE = 16_000  # of the sound that it reads
# Samples between two frames, and those that make one; of every released wav2vec 2.0.
HOP, REACH = 320, 400
FRAMES_AT_ONCE = 512  # of sound's features, which are independent of each other: ten seconds
# Attention scores that are there at once: all of 40 seconds, some rows of ten minutes'.
SCORES_AT_ONCE = 1 << 26


def frames_heard(samples: int) -> int:
    """How many frames of states, 50 a second, a sound has."""
    return max(0, (samples - REACH) // HOP + 1)


class FeatureLayer(nn.Module):
    """A convolution in time, normed over channels: (B, T, channels) → (B, fewer, channels)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, eps: float):
        super().__init__()
        self.conv = Conv1d(inputs, outputs, kernel, stride)
        self.layer_norm = AffineNorm(outputs, eps)

    def __call__(self, x: mx.array) -> mx.array:
        return nn.gelu(self.layer_norm(self.conv(x)))


class FeatureExtractor(nn.Module):
    """Sound (B, samples) → features (B, frames, channels), 50 a second."""

    def __init__(self, config: AudioEncoderConfig):
        super().__init__()
        widths = (1, *config.conv_dim)
        self.hop, self.reach = math.prod(config.conv_stride), 1
        for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
            self.reach = (self.reach - 1) * stride + kernel  # samples that make one frame
        self.conv_layers = [
            FeatureLayer(*sizes, config.eps)
            for sizes in zip(widths, widths[1:], config.conv_kernel, config.conv_stride, strict=False)
        ]

    def __call__(self, sound: mx.array) -> mx.array:
        frames, parts = (sound.shape[1] - self.reach) // self.hop + 1, []
        for first in range(0, frames, FRAMES_AT_ONCE):
            last = min(frames, first + FRAMES_AT_ONCE) - 1
            x = sound[:, first * self.hop : last * self.hop + self.reach, None]
            for layer in self.conv_layers:
                x = layer(x)
            mx.eval(x)
            parts.append(x)
        return mx.concatenate(parts, axis=1)


class FeatureProjection(nn.Module):
    """Normed features with the transformer's width."""

    def __init__(self, config: AudioEncoderConfig):
        super().__init__()
        self.layer_norm = AffineNorm(config.conv_dim[-1], config.eps)
        self.projection = Linear(config.conv_dim[-1], config.dim)

    def __call__(self, x: mx.array) -> mx.array:
        return self.projection(self.layer_norm(x))


class NormedConv(nn.Module):
    """The weights of a convolution in groups: directions ``weight_v``, and lengths ``weight_g`` for each tap."""

    def __init__(self, dim: int, kernel: int, groups: int):
        super().__init__()
        self.groups = groups
        self.weight_g = mx.ones((1, kernel, 1))
        self.weight_v = mx.zeros((dim, kernel, dim // groups))
        self.bias = mx.zeros((dim,))

    def __call__(self, x: mx.array) -> mx.array:
        length = mx.sqrt((self.weight_v * self.weight_v).sum(axis=(0, 2), keepdims=True))
        weights = mx.split(self.weight_v * (self.weight_g / length), self.groups)
        parts = mx.split(x, self.groups, axis=-1)
        padding = self.weight_g.shape[1] // 2
        # One group at a time: not every backend convolves groups.
        done = [mx.conv1d(part, weight, padding=padding) for part, weight in zip(parts, weights, strict=True)]
        return mx.concatenate(done, axis=-1) + self.bias


class Positions(nn.Module):
    """The position of each frame, by a convolution over its surroundings."""

    def __init__(self, config: AudioEncoderConfig):
        super().__init__()
        self.conv = NormedConv(config.dim, config.pos_kernel, config.pos_groups)

    def __call__(self, x: mx.array) -> mx.array:
        return nn.gelu(self.conv(x)[:, : x.shape[1]])  # an even kernel makes one frame too many


class Attention(nn.Module):
    """Attention among all frames."""

    def __init__(self, config: AudioEncoderConfig):
        super().__init__()
        self.heads = config.num_heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, Linear(config.dim, config.dim))

    def __call__(self, x: mx.array) -> mx.array:
        q, k, v = (split_heads(layer(x), self.heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
        rows, parts = max(1, SCORES_AT_ONCE // (self.heads * x.shape[1])), []
        for row in range(0, x.shape[1], rows):
            parts.append(attention(q[:, row : row + rows], k, v))
            mx.eval(parts[-1])  # otherwise the scores of all parts would be alive at once
        return self.out_proj(mx.concatenate(parts, axis=1))


class FeedForward(nn.Module):
    """Two linear layers."""

    def __init__(self, config: AudioEncoderConfig):
        super().__init__()
        self.intermediate_dense = Linear(config.dim, config.ffn_dim)
        self.output_dense = Linear(config.ffn_dim, config.dim)

    def __call__(self, x: mx.array) -> mx.array:
        return self.output_dense(nn.gelu(self.intermediate_dense(x)))


class Layer(nn.Module):
    """Attention and feed-forward, each normed before: (B, T, dim) → (B, T, dim)."""

    def __init__(self, config: AudioEncoderConfig):
        super().__init__()
        self.layer_norm = AffineNorm(config.dim, config.eps)
        self.attention = Attention(config)
        self.final_layer_norm = AffineNorm(config.dim, config.eps)
        self.feed_forward = FeedForward(config)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.attention(self.layer_norm(x))
        return x + self.feed_forward(self.final_layer_norm(x))


class Layers(nn.Module):
    """All layers after the positions, and the last norm."""

    def __init__(self, config: AudioEncoderConfig):
        super().__init__()
        self.pos_conv_embed = Positions(config)
        self.layers = [Layer(config) for _ in range(config.num_layers)]
        self.layer_norm = AffineNorm(config.dim, config.eps)


class AudioEncoder(nn.Module):
    """wav2vec 2.0 without the head that writes letters."""

    def __init__(self, config: AudioEncoderConfig):
        super().__init__()
        self.config = config
        self.feature_extractor = FeatureExtractor(config)
        self.feature_projection = FeatureProjection(config)
        self.encoder: Any = Layers(config)

    def __call__(self, sound: mx.array) -> mx.array:
        """Sound float32 (samples,), mono, 16,000 a second → all hidden states, float32 (num_layers + 1, frames, dim),
        50 frames a second: before the first layer, and after each; the last one is normed.

        Raises:
            ValueError: it is too short for a frame.
        """
        if (least := self.feature_extractor.reach) > sound.size:
            raise ValueError(f"the sound has {sound.size} samples, expected at least {least}: {least / SAMPLE_RATE} s")
        centred = sound - sound.mean()
        x = self.feature_extractor((centred / mx.sqrt((centred * centred).mean() + 1e-7))[None])
        x = self.feature_projection(x)
        x = x + self.encoder.pos_conv_embed(x)
        states = [x]
        for layer in self.encoder.layers:
            states.append(layer(states[-1]))
            mx.eval(states[-1])
        # transformers from 5.0 on gives the last state before its norm; the official code asks for an older one.
        states[-1] = self.encoder.layer_norm(states[-1])
        return mx.concatenate(states)
