"""TeaCache (arXiv 2411.19108): skips while the time embedding has changed little."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..models.transformer import ForwardPass
from .constants import TEACACHE
from .protocol import Branch
from .residual import ResidualCache

RET_HEAD = 5


class TeaCache(ResidualCache):
    """Sums a polynomial of the signal's relative change over the steps; computes when the sum reaches the threshold.
    Follows ali-vilab's ``TeaCache4Wan2.1``.

    Args:
        steps: number of sampling steps.
        threshold: 0 never skips.
        mode: "plain" or "ret", see `TeaCacheConstants`.
        coefficients: of the polynomial, highest power first.
    """

    def __init__(self, steps: int, threshold: float, mode: str, coefficients: tuple[float, ...]):
        super().__init__(steps, threshold)
        self.mode, self.coefficients = mode, coefficients
        self.always = range(RET_HEAD) if mode == "ret" else (0, steps - 1)

    @classmethod
    def of(cls, model: str, steps: int, threshold: float, mode: str) -> TeaCache:
        """TeaCache with a preset's constants."""
        return cls(steps, threshold, mode, getattr(TEACACHE[model], mode))

    def skips(self, branch: int, own: Branch, this_pass: ForwardPass) -> bool:
        signal = this_pass.modulation if self.mode == "ret" else this_pass.time
        before, own.arrays["signal"] = own.arrays.get("signal"), signal
        mx.eval(signal)
        if before is None or self.index in self.always:
            return False
        change = (mx.abs(signal - before).mean() / mx.abs(before).mean()).item()
        own.numbers["error"] = own.numbers.get("error", 0.0) + float(np.polyval(self.coefficients, change))
        return own.numbers["error"] < self.threshold

    def computed_again(self, own: Branch) -> None:
        own.numbers["error"] = 0.0
