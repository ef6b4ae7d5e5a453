"""Sanity checks on latents and frames: NaN, black, flat, saturated; and on free disk space. All thresholds are here."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import WanError
from ..storage import free_space
from ..types import Request

# Luma is BT.601 on [0, 255]. A plain background with a small moving shape has a deviation of 5 and more.
BLACK_LUMA = 4.0  # brightest pixel of a black video, at most
FLAT_DEVIATION = 1.0  # standard deviation within every frame of a flat video, at most
# Normalised latents of a video deviate by about 1; nano's, on a white background, by 2.1.
LATENTS_DEVIATION = (0.05, 8.0)
# A share of pixels with one channel at 0 and another at 255 says nothing: pure colours are valid. Latents that blew up
# push nearly every channel to a limit, on both sides, from one pixel to the next.
SATURATED_SHARE = 0.9  # of all channel values at 0 or 255, at least
SATURATED_EDGES = 0.2  # of all neighbouring values that jump from one limit to the other, at least
DISK_RESERVE = 64 << 20  # bytes to leave free


class FrameStatistics:
    """Luma and saturation of a video, updated frame by frame."""

    def __init__(self):
        self.brightest = 0.0
        self.deviation = 0.0
        self.limits = self.jumps = self.values = self.pairs = 0

    def add(self, frames: np.ndarray) -> None:
        """Add frames, uint8 (n, H, W, 3)."""
        for frame in frames:
            luma = frame @ np.array([0.299, 0.587, 0.114], np.float32)
            self.brightest = max(self.brightest, float(luma.max()))
            self.deviation = max(self.deviation, float(luma.std()))
            at_limit = (frame == 0) | (frame == 255)
            jumps = np.abs(np.diff(frame.astype(np.int16), axis=1)) == 255
            self.limits, self.values = self.limits + int(at_limit.sum()), self.values + frame.size
            self.jumps, self.pairs = self.jumps + int(jumps.sum()), self.pairs + jumps.size

    def complaint(self) -> str | None:
        """A warning for the user about the video; None if it looks right."""
        if self.brightest <= BLACK_LUMA:
            return f"the video is black (no luma above {self.brightest:.1f} of 255)"
        if self.deviation <= FLAT_DEVIATION:
            return f"the video is flat (luma deviates by at most {self.deviation:.2f} of 255 within a frame)"
        share, edges = self.limits / self.values, self.jumps / max(1, self.pairs)
        if share >= SATURATED_SHARE and edges >= SATURATED_EDGES:
            return f"the video is saturated noise ({share:.0%} of its values are 0 or 255)"
        return None


def latents_complaint(latents: np.ndarray) -> str | None:
    """A warning that finished latents, normalised, collapsed or blew up; None if they look right."""
    low, high = LATENTS_DEVIATION
    deviation = float(latents.std())
    if low <= deviation <= high:
        return None
    what = "collapsed" if deviation < low else "grew out of proportion"
    return f"the latents {what} (they deviate by {deviation:.3g}, expected about 1)"


WHAT_TO_TRY = (
    "try --dtype float32, check that the weights are whole and of this model, and run `wan-mlx doctor`"
)


def disk_needed(request: Request, latent_channels: int) -> int:
    """Most bytes that a run needs on disk, its output included."""
    t, h, w = request.latent_shape
    latents = 4 * t * h * w * latent_channels
    frames = request.frames_written * request.height * request.width * 3
    # Three steps of five arrays (two stored, one being written), conditioning of up to eight, frames, and the file.
    return (15 + 8) * latents + 2 * frames


def check_disk(folder: Path, needed: int) -> None:
    """Raise WanError before the run if the disk has no space for its files."""
    free, needed = free_space(folder), needed + DISK_RESERVE
    if free < needed:
        raise WanError(
            f"the disk of {folder.absolute()} has {free / 1e9:.2f} GB free, the run needs about {needed / 1e9:.2f} GB; "
            "free some, or choose an --output on another disk"
        )
