"""DPM-Solver++ (arXiv 2211.01095), second order, midpoint."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from .schedule import Scheduler, log_snr


class DPMSolverPP(Scheduler):
    """Multistep DPM-Solver++(2M) on predictions of the clean sample.

    Follows the official ``FlowDPMSolverMultistepScheduler`` as ``text2video`` sets it up: the grid of
    ``get_sampling_sigmas``, first order at the first and at the last step.
    """

    history_from = {"x0_1": 1}  # the clean estimate, one step back

    def _advance(self, index: int, velocity: mx.array, sample: mx.array, x0: mx.array) -> mx.array:
        sigma, sigma_next = self.sigmas[index], self.sigmas[index + 1]
        h = log_snr(sigma_next) - log_snr(sigma)
        gain = (np.float32(1) - sigma_next) * (np.exp(-h) - np.float32(1))
        result = float(sigma_next / sigma) * sample - float(gain) * x0
        if 0 < index < len(self.timesteps) - 1:
            h_last = log_snr(sigma) - log_snr(self.sigmas[index - 1])
            slope = float(np.float32(1) / (h_last / h)) * (x0 - self.history["x0_1"])
            result = result - float(np.float32(0.5) * gain) * slope
        self.history = {"x0_1": x0}
        return result
