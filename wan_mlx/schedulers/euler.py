"""Euler: a straight line along the velocity."""

from __future__ import annotations

import mlx.core as mx

from .schedule import Scheduler


class Euler(Scheduler):
    """First order, no history: ``x + (sigma_next - sigma) * velocity``.

    The official code has no Euler solver; this one uses its dpm++ grid, with integer timesteps.
    """

    def _advance(self, index: int, velocity: mx.array, sample: mx.array, x0: mx.array) -> mx.array:
        return sample + float(self.sigmas[index + 1] - self.sigmas[index]) * velocity
