"""The solvers: how each goes from one noise level to the next, on the grid and the history of `Scheduler`."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..noise import latent_noise
from .schedule import Scheduler, log_snr


class Euler(Scheduler):
    """First order, no history: ``x + (sigma_next - sigma) * velocity``.

    The official code has no Euler solver; this one uses its dpm++ grid, with integer timesteps.
    """

    def _advance(self, index: int, velocity: mx.array, sample: mx.array, x0: mx.array) -> mx.array:
        return sample + float(self.sigmas[index + 1] - self.sigmas[index]) * velocity


class DMD(Scheduler):
    """Sampling of models distilled by distribution matching: estimates the clean sample, then adds fresh noise of the
    next level, ``(1 - sigma_next) * clean + sigma_next * noise``.

    Follows FastVideo's ``DmdDenoisingStage`` and NVlabs' ``wan2pt1_t2v_rcm_infer.py``. Samples are (1, t, h, w, C).
    The noise of step ``index`` is draw number ``index + 1`` of ``torch.randn`` (C, t, h, w) after the starting noise,
    from the same CPU generator. It depends only on seed and index, so a run can be resumed.
    """

    def start(self, noise: mx.array, source: mx.array | None = None) -> mx.array:
        if source is not None or self.sigmas[0] == 1:
            return super().start(noise, source)
        return float(self.sigmas[0]) * noise

    def _advance(self, index: int, velocity: mx.array, sample: mx.array, x0: mx.array) -> mx.array:
        sigma = float(self.sigmas[index + 1])
        if sigma == 0:
            return x0
        _, frames, height, width, channels = sample.shape
        noise = latent_noise((frames, height, width), channels, self.seed, index + 1, self.noise_size)
        return (1 - sigma) * x0 + sigma * noise


class DPMSolverPP(Scheduler):
    """DPM-Solver++(2M) (arXiv 2211.01095): second order, midpoint, on predictions of the clean sample.

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


class UniPC(Scheduler):
    """UniPC (arXiv 2302.04867), second order, B(h) = exp(h) - 1: predictor and corrector on predictions of the clean
    sample; one model call per step.

    Follows the official ``FlowUniPCMultistepScheduler`` as ``text2video`` sets it up: order 2, bh2, corrector at
    every step but the first, first order at the first and at the last step. The coefficients are float32, in the
    official order of operations, because their rounding changes the trajectory.
    """

    sigma_max = float(np.float32(0.999))  # the noisiest level of the training grid, rounded as the official code does
    # the clean estimates one and two steps back, and the corrected sample that the last step started from
    history_from = {"sample": 1, "x0_1": 1, "x0_2": 2}

    def _advance(self, index: int, velocity: mx.array, sample: mx.array, x0: mx.array) -> mx.array:
        if index > 0:
            sample = self._correct(index, x0)
        result = self._predict(index, x0, sample)
        self.history = {"sample": sample, "x0_1": x0} | ({"x0_2": self.history["x0_1"]} if index > 0 else {})
        return result

    def _predict(self, index: int, x0: mx.array, sample: mx.array) -> mx.array:
        """The sample at ``sigmas[index + 1]``, from the clean estimates up to ``index``."""
        result, gain, h = self._first_order(index, x0, sample)
        if 0 < index < len(self.timesteps) - 1:
            slope = (self.history["x0_1"] - x0) / float(self._ratio(index, h))
            result = result - float(gain) * (0.5 * slope)
        return result

    def _correct(self, index: int, x0: mx.array) -> mx.array:
        """The sample at ``sigmas[index]``, corrected with the clean estimate there."""
        last_x0 = self.history["x0_1"]
        result, gain, h = self._first_order(index - 1, last_x0, self.history["sample"])
        if index == 1:
            return result - float(gain) * (0.5 * (x0 - last_x0))
        ratio = self._ratio(index - 1, h)
        weight_before, weight_here = _corrector_weights(h, ratio)
        slope = (self.history["x0_2"] - last_x0) / float(ratio)
        return result - float(gain) * (float(weight_before) * slope + float(weight_here) * (x0 - last_x0))

    def _first_order(self, start: int, x0: mx.array, sample: mx.array) -> tuple[mx.array, np.float32, np.float32]:
        """From ``sigmas[start]`` to the next: the first-order result, alpha * B(h), and h."""
        sigma, sigma_next = self.sigmas[start], self.sigmas[start + 1]
        h = log_snr(sigma_next) - log_snr(sigma)
        gain = (np.float32(1) - sigma_next) * np.expm1(-h)
        return float(sigma_next / sigma) * sample - float(gain) * x0, gain, h

    def _ratio(self, start: int, h: np.float32) -> np.float32:
        """The step before ``start`` divided by the step after it; negative, because it points back."""
        return (log_snr(self.sigmas[start - 1]) - log_snr(self.sigmas[start])) / h


def _corrector_weights(h: np.float32, ratio: np.float32) -> tuple[np.float32, np.float32]:
    """Solve ``w0 + w1 = b1``, ``ratio * w0 + w1 = b2``: the weights of the previous and the current slope."""
    b_h = np.expm1(-h)
    phi_2 = b_h / -h - np.float32(1)
    phi_3 = phi_2 / -h - np.float32(0.5)
    b1, b2 = phi_2 / b_h, phi_3 * np.float32(2) / b_h
    before = (b1 - b2) / (np.float32(1) - ratio)
    return before, b1 - before
