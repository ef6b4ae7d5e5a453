"""Recipes: how distilled models and LoRAs are sampled. A name stands for steps, sigmas, solver, shift and guidance."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import WanError
from .files.open import open_weights
from .schedulers import SOLVERS, Grid, Scheduler
from .types import Request

# LoRA files describe themselves in metadata, under one of many keys; longer values are training data.
LONGEST_HINT = 400


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


def suggest_recipe(path: str | Path, metadata: Mapping[str, Any] | None = None) -> Recipe | None:
    """Guess a checkpoint's or LoRA's recipe from its name, its folder's, or its safetensors metadata.

    Only for a hint to the user: never applied.
    """
    path = Path(path)
    said = [value for value in (metadata or {}).values() if isinstance(value, str) and len(value) <= LONGEST_HINT]
    text = re.sub(r"[-_.\s]+", "_", " ".join([path.parent.name, path.name, *said]).lower())
    return next((recipe for recipe in RECIPES.values() if re.search(recipe.hints, text)), None)


def recipe_notes(paths: Iterable[str | Path], chosen: str | None) -> list[str]:
    """A hint for each recipe that these checkpoints and LoRAs seem to need and that was not chosen."""
    notes, said = [], {chosen}
    for path in paths:
        recipe = suggest_recipe(path, _metadata(Path(path)))
        if recipe and recipe.name not in said:
            said.add(recipe.name)
            strength = f", LoRA strength {recipe.strength:g}" if recipe.strength != 1 else ""
            notes.append(
                f"{Path(path).name} looks distilled: --recipe {recipe.name} samples it as published ({recipe.steps} "
                f"steps, {recipe.solver}, shift {recipe.shift:g}, guidance off{strength})"
            )
    return notes


def _metadata(path: Path) -> Mapping[str, str]:
    """Metadata of a safetensors file; empty for other or unreadable files."""
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    try:
        return open_weights(path).metadata
    except WanError:  # reported when the file is loaded
        return {}
