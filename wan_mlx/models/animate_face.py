"""A face's expression for Wan2.2 Animate: a video of the face → a few tokens for each latent frame.

Follows the official ``wan/modules/animate/motion_encoder.py`` (LIA's, arXiv 2203.09043: a picture's motion is a sum of
orthogonal directions) and ``face_blocks.py``. Parameter names are the official checkpoint's, but that kernels of blurs,
which are constants, have none. All is float32: it is a small part of the work, done once for a video.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .configs import TransformerConfig
from .layers import Conv1d, Linear, chain

FACE = ("motion_encoder.", "face_encoder.")  # beginnings of the names of their parameters
FACES_AT_ONCE = 1
# Arrays as large as a picture at the first resolution that are alive at once, measured on an H200, whose convolutions
# take room to work in, and on a CPU, where MLX unfolds what they read.
FACES_ALIVE, FACES_ALIVE_CPU = 49.6, 29.0
LINEARS = 5  # between the features of a picture and its motion
NORM_EPS = 1e-6


class Conv2d(nn.Module):
    """A convolution without bias, whose weight is scaled to its number of inputs; zero until loaded."""

    def __init__(self, into: int, out: int, kernel: int, stride: int = 1, padding: int = 0):
        super().__init__()
        self.weight = mx.zeros((out, kernel, kernel, into))
        self.stride, self.padding = stride, padding

    def __call__(self, x: mx.array) -> mx.array:
        """(N, H, W, into) → (N, h, w, out)."""
        weight = self.weight / math.sqrt(math.prod(self.weight.shape[1:]))
        return mx.conv2d(x, weight, self.stride, self.padding)


class ScaledLinear(Linear):
    """A linear layer whose weight is scaled to its number of inputs."""

    def __call__(self, x: mx.array) -> mx.array:
        return x @ (self.weight / math.sqrt(self.weight.shape[1])).T + self.bias


class Activation(nn.Module):
    """A bias, and a leaky ReLU that keeps the variance."""

    def __init__(self, dim: int):
        super().__init__()
        self.bias = mx.zeros((dim,))

    def __call__(self, x: mx.array) -> mx.array:
        return nn.leaky_relu(x + self.bias, 0.2) * math.sqrt(2)


class Blur:
    """Each pixel becomes a mean of 4x4, with weights 1, 3, 3, 1 along both axes and zeros around the picture."""

    def __init__(self, padding: int):
        self.padding = padding

    def __call__(self, x: mx.array) -> mx.array:
        """(N, H, W, C) → (N, H + 2 * padding - 3, W + 2 * padding - 3, C)."""
        x = mx.pad(x, [(0, 0), (self.padding,) * 2, (self.padding,) * 2, (0, 0)])
        for axis in (1, 2):
            taps = [mx.take(x, mx.arange(tap, x.shape[axis] - 3 + tap), axis) for tap in range(4)]
            x = (taps[0] + 3 * taps[1] + 3 * taps[2] + taps[3]) / 8
        return x


class ResBlock(nn.Module):
    """Two convolutions, the second of which halves height and width, beside a skip that does, too."""

    def __init__(self, into: int, out: int):
        super().__init__()
        self.conv1: list[Any] = [Conv2d(into, into, 3, padding=1), Activation(into)]
        self.conv2: list[Any] = [Blur(2), Conv2d(into, out, 3, stride=2), Activation(out)]
        self.skip: list[Any] = [Blur(1), Conv2d(into, out, 1, stride=2)]

    def __call__(self, x: mx.array) -> mx.array:
        """(N, H, W, into) → (N, H / 2, W / 2, out)."""
        return (chain(chain(x, self.conv1), self.conv2) + chain(x, self.skip)) / math.sqrt(2)


class Directions(nn.Module):
    """The directions of motion: the columns of a matrix, made orthogonal."""

    def __init__(self, dim: int, count: int):
        super().__init__()
        self.weight = mx.zeros((dim, count))

    def __call__(self, amounts: mx.array) -> mx.array:
        """How far along each direction (N, count) → the motion (N, dim)."""
        # LAPACK's signs, by Householder's reflections, are those it was trained with. MLX has it on the CPU.
        orthogonal, _ = mx.linalg.qr(self.weight + 1e-8, stream=mx.cpu)
        return amounts @ orthogonal.T


class MotionEncoder(nn.Module):
    """Pictures of a face → how it moves."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        widths, (features, count, dim) = config.motion_widths, config.motion_dims
        blocks = [ResBlock(into, out) for into, out in zip(widths, widths[1:], strict=False)]
        first: list[Any] = [Conv2d(3, widths[0], 1), Activation(widths[0])]
        linears = [ScaledLinear(features, features) for _ in range(LINEARS - 1)]
        self.enc: dict[str, Any] = {
            "net_app": {"convs": [first, *blocks, Conv2d(widths[-1], features, 4)]},
            "fc": [*linears, ScaledLinear(features, count)],
        }
        self.dec = {"direction": Directions(dim, count)}

    def __call__(self, pictures: mx.array) -> mx.array:
        """(N, side, side, 3) in [-1, 1] → (N, dim), where the config has the ``face_side``."""
        first, *rest = self.enc["net_app"]["convs"]
        features = chain(chain(pictures, first), rest)[:, 0, 0]
        return self.dec["direction"](chain(features, self.enc["fc"]))


class CausalConv1d(nn.Module):
    """A convolution in time that looks back two steps; before the first step it sees that again."""

    def __init__(self, into: int, out: int, stride: int = 1):
        super().__init__()
        self.conv = Conv1d(into, out, 3, stride)

    def __call__(self, x: mx.array) -> mx.array:
        """(B, T, into) → (B, ceil(T / stride), out)."""
        return self.conv(mx.concatenate([x[:, :1], x[:, :1], x], axis=1))


class FaceEncoder(nn.Module):
    """Motion of each frame → tokens of each latent frame, each from channels of its own, and one learnt token more."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        width, self.heads = config.face_dims
        self.conv1_local = CausalConv1d(config.motion_dims[-1], width * self.heads)
        self.conv2 = CausalConv1d(width, width, stride=2)
        self.conv3 = CausalConv1d(width, width, stride=2)
        self.out_proj = Linear(width, config.dim)
        self.padding_tokens = mx.zeros((1, 1, 1, config.dim))

    def __call__(self, motion: mx.array) -> mx.array:
        """(1, T, dim) → (1, (T + 3) // 4, heads + 1, D)."""
        x = self.conv1_local(motion)
        x = x.reshape(x.shape[1], self.heads, -1).swapaxes(0, 1)
        x = self.conv3(_normed(self.conv2(_normed(x))))
        tokens = self.out_proj(_normed(x)).swapaxes(0, 1)[None]
        padding = mx.broadcast_to(self.padding_tokens, (1, tokens.shape[1], 1, tokens.shape[3]))
        return mx.concatenate([tokens, padding], axis=2)


def _normed(x: mx.array) -> mx.array:
    return nn.silu(mx.fast.layer_norm(x, None, None, NORM_EPS))


class Face(nn.Module):
    """Both encoders, of a transformer of Animate."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.motion_encoder = MotionEncoder(config)
        self.face_encoder = FaceEncoder(config)

    def __call__(self, pictures: mx.array) -> mx.array:
        """A video of a face (n, side, side, 3) in [-1, 1] → tokens float32 (1, t, tokens, D)."""
        return self.face_encoder(self.motion(pictures)[None])

    def motion(self, pictures: mx.array) -> mx.array:
        """Of each picture; ValueError: another shape."""
        side = self.config.face_side
        if pictures.shape[1:] != (side, side, 3):
            raise ValueError(f"the face has shape {pictures.shape}, expected (n, {side}, {side}, 3)")
        return self.motion_encoder(pictures)

    def blank(self, frames: int) -> mx.array:
        """The same of so many frames that show no face: all pixels are -1."""
        side = self.config.face_side
        motion = self.motion_encoder(-mx.ones((1, side, side, 3)))
        return self.face_encoder(mx.repeat(motion, frames, axis=0)[None])
