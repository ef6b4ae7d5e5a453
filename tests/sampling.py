"""The sampling loop on tiny transformers, without torch: random conditioning, and every step of a walk."""

import numpy as np
from arrays import random_array

from wan_mlx.denoise import denoise
from wan_mlx.guidance import Guidance
from wan_mlx.models.execution import Execution
from wan_mlx.models.transformer import Transformer
from wan_mlx.schedulers import SOLVERS
from wan_mlx.types import Conditioning, Step

# Sizes of a transformer, but for its number of layers; and of its latents (B, T, H, W, C).
SIZES = dict(dim=32, ffn_dim=48, num_heads=2, freq_dim=16, text_dim=8, text_len=4)
GRID = (1, 1, 4, 4, 16)
SHIFT, SCALE = 5.0, 4.0


def conditioning() -> Conditioning:
    """Noise of `GRID` and two texts, always the same."""
    texts = (random_array(seed, 1, SIZES["text_len"], SIZES["text_dim"]) for seed in (2, 3))
    return Conditioning(random_array(1, *GRID), *texts)


def always(model, guidance: Guidance):
    """What `denoise` asks before each step, where one model serves all timesteps."""
    run = Execution(model) if isinstance(model, Transformer) else model
    return lambda timestep: (run, guidance)


def walk(model, cache=None, guidance: Guidance | None = None, *, steps: int, solver: str = "unipc") -> list[Step]:
    """Every step from `conditioning`'s noise on."""
    scheduler = SOLVERS[solver](steps, SHIFT)
    return list(denoise(always(model, guidance or Guidance(SCALE)), conditioning(), scheduler, cache))


def latents(*args, **options) -> np.ndarray:
    """Where a `walk` ends."""
    return np.array(walk(*args, **options)[-1].latents)
