"""RIFE, which makes a frame between two: the network IFNet of Practical-RIFE 4.25.

Follows ``IFNet_HDv3.py`` and ``inference_video.py`` of github.com/hzwer/Practical-RIFE, version 4.25 (4.26 has the same
layers), after the paper "Real-Time Intermediate Flow Estimation for Video Frame Interpolation" (arXiv 2011.06294).
From coarse to fine each block sees both frames, moved by the flow found so far, and changes that flow: where each
pixel of the frame between comes from in either. The last block's mask says how much of each it takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .taehv import Conv

FEATURES, STATE = 4, 8  # channels of a frame's features, and of what a block tells the next one
FLOW, MASK = 4, 1  # x and y into the first frame, x and y into the second; the first one's share
SLOPE = 0.2  # of the leaky ReLU
ALIGNED = 128  # frames are padded to multiples, with zeros at the right and the bottom, as the author's script does
MOST_VALUES = 2**31  # of one array
# For plans: channels of the padded frames' size, in float32, that are alive at once where arrays are evaluated as they
# are settled. Measured on an H200 (231 at 832x480, 224 at 1280x704), and on a CPU, which unfolds convolutions.
CHANNELS_ALIVE, CHANNELS_ALIVE_CPU = 232, 357


@dataclass(frozen=True)
class RIFEConfig:
    """Sizes of the network; the defaults are those of 4.25. There is a block for each of ``widths``, coarse to fine:
    the last works at the frames' size, each before it at half the size of the next."""

    widths: tuple[int, ...] = (192, 128, 96, 64, 32)
    head: int = 16
    depth: int = 8

    @property
    def scales(self) -> tuple[int, ...]:
        return tuple(2**place for place in reversed(range(len(self.widths))))

    def inputs(self, block: int) -> int:
        """Channels that a block sees: frames, features and the time; of later blocks also mask, state and flow."""
        return 2 * (3 + FEATURES) + 1 + (MASK + STATE + FLOW) * (block > 0)


class Doubling(nn.Module):
    """Transposed convolution 4x4 of stride 2: (n, H, W, C) → (n, 2H, 2W, O); zero until loaded.

    Each result sees two by two inputs. Of every two results along an axis the first sees the input before and its own
    through taps 3 and 1, the second its own and the next one through taps 2 and 0. So it is one plain convolution 2x2
    to four results, which is quick on every backend.
    """

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.weight = mx.zeros((out_dim, 4, 4, in_dim))
        self.bias = mx.zeros((out_dim,))

    def __call__(self, x: mx.array) -> mx.array:
        (n, height, width, _), out = x.shape, len(self.bias)
        taps = mx.array([[3, 1], [2, 0]])
        weight = self.weight[:, taps][:, :, :, taps]  # (O, row's parity, its tap, column's parity, its tap, C)
        weight = weight.transpose(1, 3, 0, 2, 4, 5).reshape(4 * out, 2, 2, -1)
        y = mx.conv2d(x, weight, padding=1).reshape(n, height + 1, width + 1, 2, 2, out)
        rows = [
            mx.stack([y[:, row : row + height, side : side + width, row, side] for side in (0, 1)], axis=3)
            for row in (0, 1)
        ]
        return mx.stack(rows, axis=2).reshape(n, 2 * height, 2 * width, out) + self.bias


class Head(nn.Module):
    """Features of a frame: (n, H, W, 3) → (n, H, W, 4)."""

    def __init__(self, width: int):
        super().__init__()
        self.cnn0, self.cnn1, self.cnn2 = Conv(3, width, stride=2), Conv(width, width), Conv(width, width)
        self.cnn3 = Doubling(width, FEATURES)

    def __call__(self, x: mx.array) -> mx.array:
        for layer in (self.cnn0, self.cnn1, self.cnn2):
            x = nn.leaky_relu(layer(x), SLOPE)
        return self.cnn3(x)


class Residual(nn.Module):
    """A convolution, weighed by channel, plus its input."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = Conv(dim, dim)
        self.beta = mx.ones((dim,))

    def __call__(self, x: mx.array) -> mx.array:
        return nn.leaky_relu(self.conv(x) * self.beta + x, SLOPE)


class FlowBlock(nn.Module):
    """One estimate: a change of the flow, the mask, and what the next block is told."""

    def __init__(self, in_dim: int, width: int, depth: int):
        super().__init__()
        self.conv0 = [[Conv(in_dim, width // 2, stride=2)], [Conv(width // 2, width, stride=2)]]
        self.convblock = [Residual(width) for _ in range(depth)]
        self.lastconv = [Doubling(width, 4 * (FLOW + MASK + STATE))]

    def __call__(self, x: mx.array, flow: mx.array | None, scale: int) -> tuple[mx.array, mx.array, mx.array]:
        """x (n, H, W, C) and the flow so far (n, H, W, 4), in pixels → its change, mask logits (n, H, W, 1), and state
        (n, H, W, 8); computed at a ``scale``-th of the size."""
        x = shrink(x, scale)
        if flow is not None:
            x = mx.concatenate([x, shrink(flow, scale) / scale], axis=-1)
        for (layer,) in self.conv0:
            x = nn.leaky_relu(layer(x), SLOPE)
        for residual in self.convblock:
            x = residual(x)
        found = enlarge(pixel_shuffle(self.lastconv[0](x)), scale)
        change, mask, state = mx.split(found, [FLOW, FLOW + MASK], axis=-1)
        return change * scale, mask, state


class RIFE(nn.Module):
    """The frame between two. Computes in the dtype of its weights, which is best float32: the flow adds up in pixels.
    """

    def __init__(self, config: RIFEConfig = RIFEConfig()):  # noqa: B008 - frozen
        super().__init__()
        self.config = config
        self.encode = Head(config.head)
        for place, width in enumerate(config.widths):
            self[f"block{place}"] = FlowBlock(config.inputs(place), width, config.depth)

    def __call__(
        self,
        first: mx.array,
        second: mx.array,
        timestep: float = 0.5,
        settle: Callable[..., Any] = lambda *arrays: None,
    ) -> mx.array:
        """A frame between two.

        Args:
            first, second: (1, H, W, 3) in [0, 1].
            timestep: where between them, 0 the first and 1 the second.
            settle: called with arrays that all later work needs; who runs the network may evaluate them there.

        Returns:
            (1, H, W, 3), in [0, 1] but for rounding.

        Raises:
            ValueError: the frames have other shapes, or are too large.
        """
        check_pair(first, second)
        height, width = first.shape[1:3]
        below, right = padded(height) - height, padded(width) - width
        dtype = self.encode.cnn0.weight.dtype
        pair = [mx.pad(frame.astype(dtype), [(0, 0), (0, below), (0, right), (0, 0)]) for frame in (first, second)]
        sources = [mx.concatenate([frame, self.encode(frame)], axis=-1) for frame in pair]
        settle(*sources)
        time = mx.full((*pair[0].shape[:3], 1), timestep, dtype)
        moved, flow, told = sources, None, list[mx.array]()
        for place, scale in enumerate(self.config.scales):
            frames, features = ([part[..., side] for part in moved] for side in (slice(3), slice(3, None)))
            x = mx.concatenate([*frames, *features, time, *told], axis=-1)
            change, mask, state = self[f"block{place}"](x, flow, scale)
            flow, told = change if flow is None else flow + change, [mask, state]
            settle(flow, *told)
            moved = []
            for source, side in zip(sources, (0, 2), strict=True):
                moved.append(warp(source, flow[..., side : side + 2]))
                settle(moved[-1])
        share = mx.sigmoid(mask)
        made = moved[0][..., :3] * share + moved[1][..., :3] * (1 - share)
        return made[:, :height, :width]


def padded(side: int) -> int:
    """A frame's side in pixels, as the network sees it."""
    return side + -side % ALIGNED


def check_pair(first: mx.array, second: mx.array) -> None:
    """Raise ValueError unless both are frames of one size, (1, H, W, 3), that one array can hold in every layer."""
    if first.ndim != 4 or first.shape[0] != 1 or first.shape[-1] != 3 or first.shape != second.shape:
        raise ValueError(f"frames have shapes {first.shape} and {second.shape}, expected twice (1, H, W, 3)")
    height, width = map(padded, first.shape[1:3])
    if height * width * RIFEConfig().inputs(1) >= MOST_VALUES:
        raise ValueError(f"frames are {first.shape[2]}x{first.shape[1]}, too large for RIFE; nearest: 8192x8192")


def warp(image: mx.array, flow: mx.array) -> mx.array:
    """Each pixel from where the flow points: image (1, H, W, C), flow (1, H, W, 2) as (x, y) in pixels → (1, H, W, C).

    Bilinear between pixels, the edge beyond it: PyTorch's ``grid_sample`` with ``padding_mode="border"`` and
    ``align_corners=True``.
    """
    _, height, width, channels = image.shape
    flow = mx.nan_to_num(flow)  # of weights that are broken: a number that is none has no pixel
    x = mx.clip(flow[0, ..., 0] + mx.arange(width), 0, width - 1)
    y = mx.clip(flow[0, ..., 1] + mx.arange(height)[:, None], 0, height - 1)
    left, top = mx.floor(x), mx.floor(y)
    x, y = (x - left)[..., None], (y - top)[..., None]
    left, top = left.astype(mx.int32), top.astype(mx.int32)
    right, below = mx.minimum(left + 1, width - 1), mx.minimum(top + 1, height - 1)
    pixels = image.reshape(height * width, channels)

    def row(number: mx.array) -> mx.array:
        at_left, at_right = (mx.take(pixels, number * width + column, axis=0) for column in (left, right))
        return at_left * (1 - x) + at_right * x

    return (row(top) * (1 - y) + row(below) * y)[None].astype(image.dtype)


def shrink(x: mx.array, scale: int) -> mx.array:
    """(n, H, W, C) → (n, H/scale, W/scale, C), bilinear as PyTorch's ``interpolate`` without antialiasing: of each
    square of ``scale`` pixels the mean of the four in its middle. ``scale`` is 1 or even."""
    if scale == 1:
        return x
    before, after = scale // 2 - 1, scale // 2
    x = (x[:, before::scale] + x[:, after::scale]) / 2
    return (x[:, :, before::scale] + x[:, :, after::scale]) / 2


def enlarge(x: mx.array, scale: int) -> mx.array:
    """(n, H, W, C) → (n, scale * H, scale * W, C), bilinear as PyTorch's ``interpolate``, corners not aligned."""
    return x if scale == 1 else _enlarge_axis(_enlarge_axis(x, 1, scale), 2, scale)


def _enlarge_axis(x: mx.array, axis: int, scale: int) -> mx.array:
    """Results lie at (p + 0.5) / scale - 0.5 from the input that they replace: before it, or behind."""
    length = x.shape[axis]
    first, last = mx.split(x, [1], axis)[0], mx.split(x, [length - 1], axis)[1]
    before = mx.concatenate([first, mx.split(x, [length - 1], axis)[0]], axis)
    behind = mx.concatenate([mx.split(x, [1], axis)[1], last], axis)
    shape = [1] * (x.ndim + 1)
    shape[axis + 1] = scale
    offset = ((mx.arange(scale) + 0.5) / scale - 0.5).reshape(shape).astype(x.dtype)
    x, before, behind = (mx.expand_dims(part, axis + 1) for part in (x, before, behind))
    near = mx.where(offset < 0, before, behind)
    result = x + (near - x) * mx.abs(offset)
    return mx.flatten(result, axis, axis + 1)


def pixel_shuffle(x: mx.array) -> mx.array:
    """(n, H, W, 4C) → (n, 2H, 2W, C): four channels after each other are one, of two rows by two columns."""
    n, height, width, channels = x.shape
    x = x.reshape(n, height, width, channels // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(n, 2 * height, 2 * width, channels // 4)
