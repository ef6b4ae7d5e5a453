"""EasyCache (arXiv 2507.02860): skips while the velocity is expected to change little. Needs no constants."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from .protocol import COND, Forward, StepCache


class EasyCache(StepCache):
    """Follows H-EmbodVis's ``EasyCache4Wan2.1``: the pass with the prompt decides for both. The ratio of the velocity's
    change to the latents' change, when last computed, predicts the velocity's next change. A skipped step adds the
    last ``velocity - latents`` to the latents.

    Args:
        steps: number of sampling steps.
        threshold: 0 never skips.
        first: steps at the start that are always computed; the last is too.
        switch: as of every `StepCache`.
    """

    def __init__(self, steps: int, threshold: float, first: int, switch: int | None = None):
        super().__init__(steps, switch)
        self.threshold, self.first = threshold, first

    def kept_bytes(self, passes: int, latents: int, tokens: int) -> int:
        return (passes + 3) * latents  # an offset for each pass; three more for that with the prompt

    def begin_step(self, index: int, latents: mx.array, passes: Sequence[int]) -> None:
        super().begin_step(index, latents, passes)
        # Decided before the passes, because they may run at once.
        known = all("offset" in self.branches[branch].arrays for branch in passes)
        self.skipping = COND in passes and self._expected_to_hold(index, latents) and known
        if COND in passes:
            own = self.branches[COND]
            own.arrays["latents"] = latents
            if not self.skipping:
                own.numbers["error"] = 0.0

    def _expected_to_hold(self, index: int, latents: mx.array) -> bool:
        own = self.branches[COND]
        if not self.first <= index < self.steps - 1 or "rate" not in own.numbers:
            return False
        moved = _size(latents - own.arrays["latents"]) / _size(own.arrays["velocity"])
        own.numbers["error"] += own.numbers["rate"] * moved
        return own.numbers["error"] < self.threshold

    def velocity(self, branch: int, forward: Forward) -> mx.array:
        own = self.branches[branch]
        if self.skipping:
            return self.latents + own.arrays["offset"]
        own.computed += 1
        velocity = forward()
        if branch == COND:
            if "velocity" in own.arrays:
                moved = _size(self.latents - own.arrays["computed_at"])
                own.numbers["rate"] = _size(velocity - own.arrays["velocity"]) / moved if moved else float("inf")
            own.arrays.update(velocity=velocity, computed_at=self.latents)
        own.arrays["offset"] = velocity - self.latents
        mx.eval(list(own.arrays.values()))
        return velocity


def _size(array: mx.array) -> float:
    return float(mx.abs(array).mean())
