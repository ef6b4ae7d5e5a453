"""Recipes: how distilled models and LoRAs are sampled. A name stands for steps, sigmas, solver, shift and guidance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .schedulers import SOLVERS, Grid, Scheduler
from .types import Request


@dataclass(frozen=True)
class Recipe:
    """How to sample one kind of distilled model.

    Attributes:
        steps: default number.
        other_steps: other allowed numbers.
        grid: number of steps → noise levels; None for the solver's own.
        strength: of the LoRA, if the distillation comes as one.
        hints: pattern for names of files that need this recipe.
        about: its purpose, for the command line.
    """

    name: str
    about: str
    solver: str
    steps: int
    shift: float
    grid: Callable[[int], Grid] | None
    hints: str
    other_steps: tuple[int, ...] = ()
    guidance_scale: float = 1.0
    strength: float = 1.0

    def fill(self, **given: Any) -> dict[str, Any]:
        """Steps, shift, solver and guidance_scale as ``given``; the recipe's values where None.

        Raises:
            ValueError: a value is not allowed by the recipe.
        """
        filled = {}
        for name, value in given.items():
            ours = getattr(self, name)
            allowed = (ours, *self.other_steps) if name == "steps" else (ours,)
            filled[name] = ours if value is None else value
            if filled[name] not in allowed:
                raise ValueError(f"{name} is {value}, but the recipe {self.name} is made for "
                                 f"{' or '.join(map(str, sorted(allowed)))}; leave one of the two out")  # fmt: skip
        return filled


# Angles of the second, third and fourth step; the first is arctan(80).
RCM_ANGLES = (math.atan(80), 1.5, 1.4, 1.0)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        # LightX2V, models/schedulers/wan/step_distill/scheduler.py and configs/distill/wan21.
        Recipe(
            "lightx2v-4step", "lightx2v's step- and guidance-distilled 14B models and LoRAs",
            solver="euler", steps=4, shift=5.0, grid=lambda steps: Grid.shifted((1000, 750, 500, 250), 5.0),
            hints=r"lightx2v|step_?distill|cfg_?distill",
        ),
        # FastVideo, configs/pipelines/wan.py (FastWan2_1_T2V_480P_Config) and pipelines/stages/denoising.py.
        Recipe(
            "fastwan-3step", "FastVideo's DMD-distilled FastWan2.1, made for 832x448 and 61 frames",
            solver="dmd", steps=3, shift=8.0, grid=lambda steps: Grid.nearest((1000, 757, 522), 8.0),
            hints=r"(?<![a-z])fast_?wan",
        ),
        # LightX2V, configs/causvid; strength and steps as in Kijai's LoRA: 0.5 with 4 to 9, 0.3 with about 12.
        Recipe(
            "causvid", "the CausVid LoRA on a 1.3B or 14B model, at strength 0.5, or 0.3 with 12 steps",
            solver="unipc", steps=9, shift=8.0, grid=None, strength=0.5,
            hints=r"causvid", other_steps=(4, 5, 6, 7, 8, 10, 11, 12),
        ),
        # NVlabs/rcm, rcm/inference/wan2pt1_t2v_rcm_infer.py. The angles replace a shift.
        Recipe(
            "rcm", "NVIDIA's rCM-distilled Wan2.1, in 1 to 4 steps",
            solver="dmd", steps=4, shift=1.0, grid=lambda steps: Grid.trigonometric(RCM_ANGLES[:steps]),
            hints=r"(?<![a-z0-9])rcm(?![a-z0-9])", other_steps=(1, 2, 3),
        ),
    )
}  # fmt: skip


def scheduler_for(request: Request) -> Scheduler:
    """The solver of a request, on its sigma grid."""
    steps, grid = request.steps, RECIPES[request.recipe].grid if request.recipe else None
    return SOLVERS[request.solver](steps, request.shift, grid and grid(steps), request.seed, request.begin)
