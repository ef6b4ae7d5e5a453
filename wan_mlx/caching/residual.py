"""What TeaCache and MagCache share: where blocks are skipped, their last residual is added in their place."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from ..models.transformer import ForwardPass
from .protocol import Branch, Forward, StepCache


class ResidualCache(StepCache):
    """Keeps ``tokens after the blocks - tokens before`` of each pass: (1, L, D) in the transformer's dtype.

    Attributes:
        threshold: error allowed before a forward is computed again; 0 never skips, and keeps nothing.
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
            own.arrays.pop("residual", None)  # not beside the new one
            after = run_blocks(x)
            if self.threshold > 0:  # without a residual nothing is skipped, whatever the error (TeaCache's may be < 0)
                own.arrays["residual"] = after - x
                mx.eval(own.arrays["residual"])
            return after

        return forward(through=through)

    def skips(self, branch: int, own: Branch, this_pass: ForwardPass) -> bool:
        """Whether the blocks need not run; called once for each pass, whatever comes of it."""
        raise NotImplementedError

    def computed_again(self, own: Branch) -> None:
        """The blocks run: the error starts from nothing."""
        raise NotImplementedError
