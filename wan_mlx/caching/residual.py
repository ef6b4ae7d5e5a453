"""The base of TeaCache and MagCache: skipped blocks are replaced by their last residual."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from ..models.transformer import ForwardPass
from .protocol import Branch, Forward, StepCache


class ResidualCache(StepCache):
    """Stores ``tokens after the blocks - tokens before`` for each pass: (1, L, D) in the transformer's dtype.

    Attributes:
        threshold: accumulated error at which a forward is computed again; 0 never skips, and stores nothing.
    """

    large = True

    def __init__(self, steps: int, threshold: float):
        super().__init__(steps)
        self.threshold = threshold

    def velocity(self, branch: int, forward: Forward) -> mx.array:
        def through(x: mx.array, this_pass: ForwardPass, run_blocks: Callable[[mx.array], mx.array]) -> mx.array:
            own = self.branches[branch]
            if self.skips(branch, own, this_pass) and "residual" in own.arrays:
                return x + own.arrays["residual"]
            self.computed_again(own)
            own.computed += 1
            own.arrays.pop("residual", None)  # freed before the new one is made
            after = run_blocks(x)
            if self.threshold > 0:  # threshold 0 stores none, so nothing is skipped (TeaCache's error may be < 0)
                own.arrays["residual"] = after - x
                mx.eval(own.arrays["residual"])
            return after

        return forward(through=through)

    def skips(self, branch: int, own: Branch, this_pass: ForwardPass) -> bool:
        """Whether to skip the blocks; called exactly once for each pass."""
        raise NotImplementedError

    def computed_again(self, own: Branch) -> None:
        """Resets the error, because the blocks run."""
        raise NotImplementedError
