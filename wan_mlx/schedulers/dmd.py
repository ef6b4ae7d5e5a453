"""DMD: estimates the clean sample, then adds fresh noise of the next level."""

from __future__ import annotations

import mlx.core as mx

from ..noise import latent_noise
from .schedule import Scheduler


class DMD(Scheduler):
    """Sampling of models distilled by distribution matching: ``(1 - sigma_next) * clean + sigma_next * noise``.

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
        noise = latent_noise((frames, height, width), channels, self.seed, earlier=index + 1)
        return (1 - sigma) * x0 + sigma * noise
