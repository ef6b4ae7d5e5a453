"""CFG-Zero* and guidance ranges against Diffusers."""

import mlx.core as mx
import numpy as np
import pytest
from arrays import random_array
from oracles import torch
from sampling import SCALE

from wan_mlx.caching import COND, UNCOND
from wan_mlx.guidance import Guidance


@pytest.mark.parametrize("steps, span", [(10, (0.0, 1.0)), (10, (0.3, 0.7)), (50, (0.1, 0.57)), (7, (0.2, 0.9))])
@pytest.mark.parametrize("zero_steps", [0, 1, 3])
def test_cfg_zero_and_range_against_diffusers(steps, span, zero_steps):
    """Which of the two velocities count at each step, and how they are combined, for a batch of two samples."""
    from diffusers.guiders import ClassifierFreeZeroStarGuidance

    guider = ClassifierFreeZeroStarGuidance(
        guidance_scale=SCALE, zero_init_steps=zero_steps, start=span[0], stop=span[1]
    )
    guidance = Guidance(SCALE, range=span, cfg_zero=zero_steps)
    for index in range(steps):
        cond, uncond = (np.array(random_array(seed + index, 2, 3, 4, 5, 16)) for seed in (10, 500))
        guider.set_state(step=index, num_inference_steps=steps, timestep=torch.tensor(0))
        want = guider.forward(torch.from_numpy(cond), torch.from_numpy(uncond)).pred.numpy()
        passes = guidance.passes(index, steps)
        if passes == (COND, UNCOND):
            got = np.array(guidance.combine(mx.array(cond), mx.array(uncond)))
        else:
            got = cond if passes == (COND,) else np.zeros_like(cond)
        assert np.abs(got - want).max() < 1e-5 * np.abs(cond).max()
