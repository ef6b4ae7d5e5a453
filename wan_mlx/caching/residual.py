"""TeaCache and MagCache: skipped blocks are replaced by their last residual. Both have constants for each model.

The published constants are rows of ``assets/step_caches.json``. TeaCache's are ali-vilab's (``TeaCache4Wan2.1``),
MagCache's Zehong-Ma's (``MagCache4Wan2.1``, ``MagCache4Wan2.2``). VACE 1.3B and 14B have TeaCache's of the
text-to-video models, because VACE's blocks accompany one that was not trained further: the signal is the same.
TI2V-5B has two lists of MagCache's, the second for runs that start from an image.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..models.transformer import ForwardPass
from .protocol import Branch, Forward, StepCache

RET_HEAD = 5


# Model → the settings that are its authors' choice, in the order in which the class takes them, then the constants.
_ROWS = json.loads((Path(__file__).parent.parent / "assets" / "step_caches.json").read_text(encoding="utf-8"))
TEACACHE: dict[str, dict[str, Any]] = _ROWS["teacache"]
MAGCACHE: dict[str, dict[str, Any]] = _ROWS["magcache"]


class ResidualCache(StepCache):
    """Stores ``tokens after the blocks - tokens before`` for each pass: (1, L, D) in the transformer's dtype.

    Attributes:
        threshold: accumulated error at which a forward is computed again; 0 never skips, and stores nothing.
    """

    large = True

    def __init__(self, steps: int, threshold: float, switch: int | None = None):
        super().__init__(steps, switch)
        self.threshold = threshold

    def kept_bytes(self, passes: int, latents: int, tokens: int) -> int:
        return (passes + 1) * tokens  # a residual for each pass, and the tokens that it is added to

    def holds_tokens(self, key: str) -> bool:
        return key.endswith(".residual")

    def velocity(self, branch: int, forward: Forward) -> mx.array:
        def through(x: mx.array, this_pass: ForwardPass, run_blocks: Callable[[mx.array], mx.array]) -> mx.array:
            own = self.branches[branch]
            if self.skips(branch, own, this_pass) and "residual" in own.arrays:
                return x + own.arrays["residual"]
            own.numbers.clear()  # the errors start afresh, because the blocks run
            own.computed += 1
            own.arrays.pop("residual", None)  # freed before the new one is made
            after = run_blocks(x)
            if self.threshold > 0:  # threshold 0 stores none, so nothing is skipped (TeaCache's error may be < 0)
                own.arrays["residual"] = after - x
                mx.eval(own.arrays["residual"])
            return after

        return forward(through=through)

    def skips(self, branch: int, own: Branch, this_pass: ForwardPass) -> bool:
        """Whether to skip the blocks; called exactly once for each pass. ``own.numbers`` are cleared if not."""
        raise NotImplementedError


class TeaCache(ResidualCache):
    """TeaCache (arXiv 2411.19108): sums a polynomial of the signal's relative change over the steps, and computes when
    the sum reaches the threshold.

    Args:
        steps: number of sampling steps.
        threshold: 0 never skips; the published one about halves the time.
        mode: "plain" takes the time embedding, and computes the first and the last step; "ret" takes the time
            projection, and computes the first five. The published one is the better in the authors' measurements.
        coefficients: of the mode's polynomial, from the change of the signal to that of the blocks' output, highest
            power first.
        switch: as of every `StepCache`.
    """

    def __init__(
        self, steps: int, threshold: float, mode: str, coefficients: Sequence[float], switch: int | None = None
    ):
        super().__init__(steps, threshold, switch)
        self.mode, self.coefficients = mode, coefficients
        self.always = range(RET_HEAD) if mode == "ret" else (0, steps - 1)

    def skips(self, branch: int, own: Branch, this_pass: ForwardPass) -> bool:
        signal = this_pass.modulation if self.mode == "ret" else this_pass.time
        before, own.arrays["signal"] = own.arrays.get("signal"), signal
        mx.eval(signal)
        if before is None or self.index in self.always:
            return False
        change = (mx.abs(signal - before).mean() / mx.abs(before).mean()).item()
        own.numbers["error"] = own.numbers.get("error", 0.0) + float(np.polyval(self.coefficients, change))
        return own.numbers["error"] < self.threshold


class MagCache(ResidualCache):
    """MagCache (arXiv 2506.09045): skips while the known magnitude of the residual has drifted little. Skips depend on
    the number of steps, not on the video.

    Args:
        steps: number of sampling steps.
        threshold: 0 never skips.
        most_skips: steps in a row that may be skipped.
        retention: share of the run, at its start, that is always computed, in [0, 1]; of two experts, of each one's.
        ratios: change of the residual's mean magnitude from step to step, from the second step, cond and uncond in
            turn; for another number of steps the nearest ones are taken.
        left_out: steps skipped before the first; the ratios cover them too.
        switch: as of every `StepCache`.
        whole_first: whether the first expert's steps are all computed.
    """

    def __init__(
        self,
        steps: int,
        threshold: float,
        most_skips: int,
        retention: float,
        ratios: Sequence[float],
        left_out: int = 0,
        switch: int | None = None,
        whole_first: bool = False,
    ):
        super().__init__(steps, threshold, switch)
        self.most_skips = most_skips
        self.retained = retained(2 * steps, retention, None if switch is None else 2 * switch, whole_first)
        of_pass = [np.array([1.0, *ratios[branch::2]]) for branch in range(2)]
        self.ratios = [stretched(values, left_out + steps)[left_out:] for values in of_pass]

    def planned(self, passes: int) -> int:
        computed = 0
        for branch in range(passes):
            own = Branch()
            for index in range(self.steps):
                self.index = index
                if self.starts_at(index):
                    own.numbers.clear()
                if not self.skips(branch, own, None) or self.starts_at(index):
                    own.numbers.clear()
                    computed += 1
        return computed

    def skips(self, branch: int, own: Branch, this_pass: ForwardPass | None) -> bool:
        if 2 * self.index + branch in self.retained:
            return False
        ratio = own.numbers.get("ratio", 1.0) * float(self.ratios[branch][self.index])
        own.numbers["ratio"] = ratio
        own.numbers["skips"] = own.numbers.get("skips", 0.0) + 1
        own.numbers["error"] = own.numbers.get("error", 0.0) + abs(1 - ratio)
        return own.numbers["error"] < self.threshold and own.numbers["skips"] <= self.most_skips


def retained(total: int, share: float, switch: int | None, whole_first: bool) -> set[int]:
    """The numbers, of ``total`` forwards, of those that are always computed; counted as ``MagCache4Wan2.2`` does.

    ``switch``: the first forward of the second of two experts.
    """
    if switch is None:
        return {*range(int(total * share))}
    if whole_first:
        return {*range(int(switch + (total - switch) * share))}
    return {*range(int(switch * share)), *range(switch, int(switch + (total - switch) * share) + 1)}


def stretched(values: np.ndarray, count: int) -> np.ndarray:
    """``count`` of the values, evenly spaced from the first to the last, each the nearest (halves to even)."""
    if count == 1:
        return values[-1:]
    scale = (len(values) - 1) / (count - 1)
    return values[np.round(np.arange(count) * scale).astype(int)]
