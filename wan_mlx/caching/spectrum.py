"""Spectrum (arXiv 2603.01623): forecasts what the transformer would give, by polynomials fitted to the steps before.

It needs no constants of a model. Follows hanjq17's ``Spectrum``: what it forecasts, when it computes, and its settings
(``scripts/run_mp_video.sh``). The forecast is linear in the steps before, so that only its weights are computed, in
float64. The authors count time in 50 steps whatever their number; here it is counted in those of the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from ..models.transformer import ForwardPass
from .protocol import Branch, Forward, StepCache

DEGREE = 4  # of the Chebyshev polynomials
RIDGE = 0.1  # what keeps their coefficients small
BLEND = 0.5  # share of the fit; the rest is the line through the last two steps
WARM_UP = 5  # steps that are always computed
OUTPUTS, HIDDEN = "outputs", "hidden"


def forecast_weights(points: Sequence[int], step: int, steps: int) -> np.ndarray:
    """How much of each of the steps ``points`` is in the forecast of ``step``, of ``steps`` in all: float64."""
    places = (2 * np.array([*points, step], dtype=np.float64) - steps) / steps
    design = np.polynomial.chebyshev.chebvander(places, DEGREE)
    known, wanted = design[:-1], design[-1]
    fit = wanted @ np.linalg.solve(known.T @ known + RIDGE * np.eye(DEGREE + 1), known.T)
    line = np.zeros(len(points))
    line[-1] = 1.0
    if len(points) > 1:
        ahead = (step - points[-1]) / (points[-1] - points[-2])
        line[-2:] = -ahead, 1 + ahead
    return BLEND * fit + (1 - BLEND) * line


class Spectrum(StepCache):
    """Each pass for itself: after the first steps one is computed when the window, which grows by then, is full.

    Args:
        steps: number of sampling steps.
        window: at first every so many-th step is computed; 0 computes all, and stores nothing.
        growth: what is added to the window with each step that is computed after the first ones.
        place: `OUTPUTS` forecasts velocities, `HIDDEN` the tokens after the blocks, as the authors do; the head is then
            always computed.
        switch: as of every `StepCache`.
    """

    def __init__(self, steps: int, window: float, growth: float, place: str, switch: int | None = None):
        super().__init__(steps, switch)
        self.window, self.growth, self.place = window, growth, place
        self.large = place == HIDDEN

    def planned(self, passes: int) -> int:
        own, computed = Branch(), 0
        for index in range(self.steps):
            if self.starts_at(index):
                own = Branch()
            computed += self._computes(own)
        return passes * computed

    def kept_bytes(self, passes: int, latents: int, tokens: int) -> int:
        each = latents if self.place == OUTPUTS else tokens
        return self.planned(passes) * each if self.window else 0

    def holds_tokens(self, key: str) -> bool:
        return self.large and ".array." in key

    def _computes(self, own: Branch) -> bool:
        """Whether the next step is computed; called exactly once for each pass."""
        made, cached = own.numbers.get("made", 0.0), own.numbers.get("cached", 0.0)
        window = own.numbers.get("window", self.window)
        computes = made < WARM_UP or (cached + 1) % math.floor(max(1.0, window)) == 0
        if made >= WARM_UP and computes:
            window = round(window + self.growth, 3)
        own.numbers = {"made": made + 1, "cached": 0.0 if computes else cached + 1, "window": window}
        return computes or not self.window

    def velocity(self, branch: int, forward: Forward) -> mx.array:
        own = self.branches[branch]
        if self.place == OUTPUTS:
            return self._next(own, forward)

        def through(x: mx.array, this_pass: ForwardPass, run_blocks: Callable[[mx.array], mx.array]) -> mx.array:
            return self._next(own, lambda: run_blocks(x)).astype(x.dtype)

        return forward(through=through)

    def _next(self, own: Branch, compute: Callable[[], mx.array]) -> mx.array:
        """What ``compute`` returns, or the forecast of it."""
        if not self._computes(own):
            return self._forecast(own)
        own.computed += 1
        result = compute()
        if self.window:
            own.arrays[f"{self.index:04d}"] = result
            mx.eval(result)
        return result

    def _forecast(self, own: Branch) -> mx.array:
        names = sorted(own.arrays)
        weights = forecast_weights([int(name) for name in names], self.index, self.steps)
        found = mx.array(0.0)
        for name, weight in zip(names, weights.tolist(), strict=True):
            found = found + weight * own.arrays[name].astype(mx.float32)
            mx.eval(found)  # one by one, or each would be held in float32
        return found
