"""MagCache (arXiv 2506.09045): skips while the known magnitude of the residual has drifted little."""

from __future__ import annotations

import numpy as np

from ..models.transformer import ForwardPass
from .constants import MAGCACHE
from .protocol import Branch
from .residual import ResidualCache


class MagCache(ResidualCache):
    """Follows Zehong-Ma's ``MagCache4Wan2.1``. Skips depend on the number of steps, not on the video.

    Args:
        steps: number of sampling steps.
        threshold: 0 never skips.
        most_skips: steps in a row that may be skipped.
        retention: share of the run, at its start, that is always computed, in [0, 1].
        ratios: see `MagCacheConstants`; for another number of steps the nearest ones are taken.
        left_out: steps skipped before the first; the ratios cover them too.
    """

    def __init__(
        self,
        steps: int,
        threshold: float,
        most_skips: int,
        retention: float,
        ratios: tuple[float, ...],
        left_out: int = 0,
    ):
        super().__init__(steps, threshold)
        self.most_skips = most_skips
        self.first = int(2 * steps * retention)  # counted in forwards, two a step
        of_pass = [np.array([1.0, *ratios[branch::2]]) for branch in range(2)]
        self.ratios = [stretched(values, left_out + steps)[left_out:] for values in of_pass]

    @classmethod
    def of(
        cls, model: str, steps: int, threshold: float, most_skips: int, retention: float, left_out: int = 0
    ) -> MagCache:
        """MagCache with a preset's constants."""
        return cls(steps, threshold, most_skips, retention, MAGCACHE[model].ratios, left_out)

    def planned(self, passes: int) -> int:
        """Number of forwards that will be computed in a run with guidance at all steps (2 passes) or none (1)."""
        computed = 0
        for branch in range(passes):
            own = Branch()
            for index in range(self.steps):
                self.index = index
                if not self.skips(branch, own, None) or index == 0:
                    self.computed_again(own)
                    computed += 1
        return computed

    def skips(self, branch: int, own: Branch, this_pass: ForwardPass | None) -> bool:
        if 2 * self.index + branch < self.first:
            return False
        ratio = own.numbers.get("ratio", 1.0) * float(self.ratios[branch][self.index])
        own.numbers["ratio"] = ratio
        own.numbers["skips"] = own.numbers.get("skips", 0.0) + 1
        own.numbers["error"] = own.numbers.get("error", 0.0) + abs(1 - ratio)
        return own.numbers["error"] < self.threshold and own.numbers["skips"] <= self.most_skips

    def computed_again(self, own: Branch) -> None:
        own.numbers.update(ratio=1.0, skips=0.0, error=0.0)


def stretched(values: np.ndarray, count: int) -> np.ndarray:
    """``count`` of the values, evenly spaced from the first to the last, each the nearest (halves to even)."""
    if count == 1:
        return values[-1:]
    scale = (len(values) - 1) / (count - 1)
    return values[np.round(np.arange(count) * scale).astype(int)]
