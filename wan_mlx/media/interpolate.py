"""Frames between frames, as a video streams by: two of its frames are in memory, and RIFE makes what lies between.

Over a scene cut nothing is blended: the frame before it stays until the cut's own time. Cuts are found as the author's
``inference_video.py`` finds them, by the structural similarity of both frames at 32x32 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from functools import lru_cache
from itertools import count
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from ..models.rife import RIFE
from .write import MAX_FPS, to_uint8

# (n, share): of the time from frame n to the next one this share has passed.
Moment = tuple[int, float]
CUT = 0.2  # a similarity below it is a cut
THUMBNAIL = 32  # pixels
WINDOW, DEVIATION = 11, 1.5  # of the similarity's Gaussian, which reaches over the three colours, too
STABILISERS = 0.01**2, 0.03**2
CLOSE = 0.01  # of the time to the next frame: nearer to a frame than this it is that frame
ON_RATE = 0.05  # of a frame's time: how far each may be from its place for the rate to be even


def even_moments(rate: Fraction, fps: Fraction) -> Iterator[Moment]:
    """Where the frames of a video at ``fps`` lie in one at ``rate``; without end."""
    for number in count():
        place = number * rate / fps
        yield place.numerator // place.denominator, float(place % 1)


def moments_of(times: np.ndarray, fps: Fraction) -> Iterator[Moment]:
    """Likewise in a video whose frames begin at any ``times`` (seconds), up to the last of them."""
    times = times.astype(np.float64) - float(times[0])
    for number in count():
        now = float(number / fps)
        if now > times[-1] + CLOSE / float(fps):
            return
        index = int(np.searchsorted(times, now, side="right")) - 1
        if index == len(times) - 1:
            yield index, 0.0
            continue
        share = (now - times[index]) / (times[index + 1] - times[index])
        if share > 1 - CLOSE:
            index, share = index + 1, 0.0
        yield index, share if share >= CLOSE else 0.0


def frames_at(count: int, rate: Fraction, fps: Fraction) -> int:
    """How many frames a video of ``count`` frames at ``rate`` has at ``fps``: from its first to its last one."""
    return int((count - 1) * fps / rate) + 1


def even_rate(times: np.ndarray) -> Fraction | None:
    """The rate of frames that begin at ``times`` (seconds); None if they do not come evenly."""
    if len(times) < 2 or times[-1] <= times[0]:
        return None
    times = times.astype(np.float64) - float(times[0])
    measured = (len(times) - 1) / times[-1]
    for rate in (*_usual(measured), Fraction(measured).limit_denominator(10_000)):
        if np.abs(times * float(rate) - np.arange(len(times))).max() <= ON_RATE:
            return rate
    return None


def near_rate(fps: float) -> Fraction:
    """The rate that is meant by a rounded number: 29.97 is 30000/1001, 24 is 24, 15.0001 is 15."""
    close = (rate for rate in _usual(fps) if abs(float(rate) / fps - 1) < 2e-4)
    return next(close, Fraction(fps).limit_denominator(10_000))


def _usual(fps: float) -> list[Fraction]:
    """The rates that cameras and films have next to a number, nearest first."""
    rates = [Fraction(round(fps)), Fraction(1000 * round(fps), 1001)]
    return sorted((rate for rate in rates if rate), key=lambda rate: abs(float(rate) - fps))


def asked_fps(rate: Fraction, fps: float | None, times: int | None, name: str) -> Fraction:
    """The rate that a video at ``rate`` is to have: ``fps``, so many ``times`` its own, or twice its own.

    Raises:
        ValueError: both are given; it is not above the video's own, or too high. ``name`` is the video's.
    """
    if fps is not None and times is not None:
        raise ValueError("fps and times are both given; leave out one of the two")
    if times is not None and (times < 2 or times != int(times)):
        raise ValueError(f"times is {times}, expected a whole number from 2 on; nearest: {max(2, round(times))}")
    if fps is not None and not math.isfinite(fps):
        raise ValueError(f"fps is {fps}, expected a number above {float(rate):.4g}; nearest: {float(2 * rate):.4g}")
    asked = rate * int(times or 2) if fps is None else near_rate(fps) if fps > 0 else Fraction(0)
    if asked <= rate:
        raise ValueError(f"fps is {fps:g}, and {name} has {float(rate):.4g} already: frames are only added; nearest: "
                         f"{float(2 * rate):.4g}")  # fmt: skip
    if asked > MAX_FPS:
        raise ValueError(f"fps is {float(asked):.4g}, expected at most {MAX_FPS}; nearest: {MAX_FPS}")
    return asked


def told_in(settings: Mapping[str, Any], fps: Fraction, weights: str) -> dict[str, Any]:
    """The settings of a smoothed video, which tell of it: those that it had, its rate, and what made the frames."""
    rate = int(fps) if fps.denominator == 1 else round(float(fps), 3)
    return {**settings, "fps": rate, "interpolate": weights}


def interpolate(
    chunks: Iterable[np.ndarray],
    moments: Iterator[Moment],
    between: Callable[[np.ndarray, np.ndarray, float], np.ndarray],
) -> Iterator[np.ndarray]:
    """The frames at ``moments``, a chunk for each chunk that is given, as far as that reaches.

    Args:
        chunks: frames uint8 (n, H, W, 3), in order.
        moments: in order; those after the last frame are left out.
        between: two frames (H, W, 3) and the share → one.
    """
    moment = next(moments, None)
    before: np.ndarray | None = None
    number = 0
    for chunk in chunks:
        made = []
        for frame in chunk:
            while moment is not None and (moment[0] < number or moment == (number, 0.0)):
                made.append(frame if moment[0] == number or before is None else between(before, frame, moment[1]))
                moment = next(moments, None)
            before, number = frame, number + 1
        if made:
            yield np.stack(made)


class Between:
    """RIFE's frame between two uint8 ones; over a cut the first of them."""

    def __init__(self, model: RIFE):
        self._model = model
        self._pair: tuple[np.ndarray, np.ndarray] | None = None
        self._is_cut = False
        self.cuts = 0

    def __call__(self, first: np.ndarray, second: np.ndarray, share: float) -> np.ndarray:
        """Frames uint8 (H, W, 3) and where between them → uint8 (H, W, 3), rounded to the nearest level."""
        if self._pair is None or self._pair[0] is not first or self._pair[1] is not second:
            self._pair, self._is_cut = (first, second), is_cut(first, second)
            self.cuts += self._is_cut
        if self._is_cut or share == 0:
            return first
        before, after = (mx.array(frame)[None].astype(mx.float32) / 255 for frame in (first, second))
        made = self._model(before, after, share, settle=mx.eval)
        frame = to_uint8(made[0] * 2 - 1, rounding=True)
        mx.synchronize()  # only now a failed command buffer is sure to show
        return frame


def is_cut(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether another scene begins with the second of two frames uint8 (H, W, 3)."""
    return similarity(_thumbnail(first), _thumbnail(second)) < CUT


def _thumbnail(frame: np.ndarray) -> np.ndarray:
    """float64 (32, 32, 3) in [0, 1]."""
    size = THUMBNAIL, THUMBNAIL
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR, reducing_gap=None)) / 255.0


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Mean structural similarity of two pictures (H, W, 3) in [0, 1]: 1 if they are equal."""
    mean_a, mean_b = _blurred(a), _blurred(b)
    spread = _blurred(a * a) - mean_a**2 + _blurred(b * b) - mean_b**2
    shared = _blurred(a * b) - mean_a * mean_b
    c1, c2 = STABILISERS
    light = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return float(np.mean(light * (2 * shared + c2) / (spread + c2)))


def _blurred(volume: np.ndarray) -> np.ndarray:
    """By a Gaussian along all three axes; beyond an edge is what is at it."""
    for axis in range(3):
        volume = np.moveaxis(np.tensordot(_blur(volume.shape[axis]), volume, axes=([1], [axis])), 0, axis)
    return volume


@lru_cache
def _blur(length: int) -> np.ndarray:
    """The blur of an axis as a matrix (length, length)."""
    reach = WINDOW // 2
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * DEVIATION**2))
    matrix = np.zeros((length, length))
    for place in range(length):
        seen = np.clip(np.arange(place - reach, place + reach + 1), 0, length - 1)
        np.add.at(matrix[place], seen, weights / weights.sum())
    return matrix
