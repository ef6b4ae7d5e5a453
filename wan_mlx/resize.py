"""Resizing, bicubic and bilinear, equal to PyTorch's on a CPU, which the official code uses for its images."""

from __future__ import annotations

import numpy as np

SHARPNESS = -0.75  # of Keys' cubic: PyTorch's and OpenCV's choice; Pillow's is -0.5


def resize_bicubic(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize as ``torch.nn.functional.interpolate(mode="bicubic")``: corners not aligned, no antialiasing.

    Args:
        frames: (..., H, W, 3) float32, numpy or MLX; any range.
        height, width: of the result, in pixels.

    Returns:
        numpy float32 (..., height, width, 3); overshoots the range of ``frames`` at sharp edges, as every cubic does.
    """
    frames = np.asarray(frames, dtype=np.float32)
    return _resize_axis(_resize_axis(frames, -2, width), -3, height)


def resize_bilinear(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """The same with ``mode="bilinear"``: (..., H, W, 3) of any dtype → float32 (..., height, width, 3)."""
    frames = np.asarray(frames, dtype=np.float32)
    for axis, size in ((-2, width), (-3, height)):
        positions = np.maximum(_positions(frames.shape[axis], size), 0)
        before = positions.astype(int)
        after = np.minimum(before + 1, frames.shape[axis] - 1)
        weight = (positions - before.astype(np.float32)).reshape(-1, *[1] * (-axis - 1))
        frames = frames.take(before, axis) * (1 - weight) + frames.take(after, axis) * weight
    return frames


def _resize_axis(frames: np.ndarray, axis: int, size: int) -> np.ndarray:
    indices, weights = _taps(frames.shape[axis], size)
    weights = weights.reshape(4, size, *(1,) * (-axis - 1))
    return sum(np.take(frames, i, axis=axis) * w for i, w in zip(indices, weights, strict=True))


def _taps(length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The four source pixels of each of ``size`` pixels and their weights: int (4, size), float32 (4, size)."""
    positions = _positions(length, size)
    left = np.floor(positions)
    distances = np.abs(positions - left - np.arange(-1, 3, dtype=np.float32)[:, None])
    indices = np.clip(left.astype(np.int64) + np.arange(-1, 3)[:, None], 0, length - 1)
    return indices, np.where(distances < 1, _near(distances), _far(distances)).astype(np.float32)


def _positions(length: int, size: int) -> np.ndarray:
    """Where each of ``size`` pixels lies among those of the source, float32."""
    # PyTorch's are from one fused multiply-add. At a thousand pixels another rounding moves them by 1e-4 of a pixel,
    # which shows; in float64 the product is exact, so one rounding at the end gives the same.
    scale = np.float64(np.float32(length) / np.float32(size))
    return (scale * (np.arange(size) + 0.5) - 0.5).astype(np.float32)


def _near(x: np.ndarray) -> np.ndarray:
    """Keys' cubic at distances 0 to 1."""
    return ((SHARPNESS + 2) * x - (SHARPNESS + 3)) * x * x + 1


def _far(x: np.ndarray) -> np.ndarray:
    """Keys' cubic at distances 1 to 2."""
    return ((SHARPNESS * x - 5 * SHARPNESS) * x + 8 * SHARPNESS) * x - 4 * SHARPNESS
