"""Recipes: how distilled models and LoRAs are sampled. A name stands for steps, sigmas, solver, shift and guidance.

The recipes are rows of `RECIPES`, each with the files that it is for and the source that its numbers are of.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .phases import Phase, phase_at, read_phases
from .presets import Preset
from .schedulers import SOLVERS, Grid, Scheduler
from .types import Request


@dataclass(frozen=True)
class Recipe:
    """How to sample one kind of distilled model.

    Attributes:
        models: names of the presets that it is for.
        steps: default number.
        other_steps: other allowed numbers.
        grid: number of steps → noise levels; None for the solver's own.
        phases: as `phases.read_phases` takes them; "" for one with ``guidance_scale``.
        strengths: of the LoRA, or of each expert's, if the distillation comes as one: (most steps, strength) for rising
            numbers of steps.
        hints: pattern for names of files that need this recipe, which are written with _ for -, . and blanks.
        about: its purpose, for the command line.
        files: where they are published, as ``--model`` or ``--lora`` takes them, or their repository.
        source: what the numbers are of.
    """

    name: str
    about: str
    models: tuple[str, ...]
    solver: str
    steps: int
    shift: float
    grid: Callable[[int], Grid] | None
    hints: str
    files: tuple[str, ...]
    source: str
    other_steps: tuple[int, ...] = ()
    guidance_scale: float = 1.0
    phases: str = ""
    strengths: tuple[tuple[int, float], ...] = ((1000, 1.0),)

    def fill(self, **given: Any) -> dict[str, Any]:
        """Steps, shift, solver, guidance_scale and phases as ``given``; the recipe's values where None.

        Raises:
            ValueError: a value is not allowed by the recipe.
        """
        filled = {}
        for name, value in given.items():
            ours = getattr(self, name)
            allowed = (ours, *self.other_steps) if name == "steps" else (ours,)
            filled[name] = ours if value is None else value
            if filled[name] not in allowed:
                made_for = " or ".join(map(str, sorted(allowed))) or "one phase"
                raise ValueError(f"{name} is {value}, but the recipe {self.name} is made for {made_for}; "
                                 "leave one of the two out")  # fmt: skip
        return filled

    def strength(self, steps: int) -> float:
        """The LoRA's, in so many steps."""
        return next(strength for most, strength in self.strengths if steps <= most)

    def suits(self, preset: Preset) -> bool:
        """Whether it is for a model. Those that come with the package are no distilled ones, and may try any."""
        return not preset.repo or preset.name in self.models

    def check_model(self, preset: Preset) -> None:
        """Raise ValueError, which names the model's recipes, if it is for other models."""
        if not self.suits(preset):
            others = [recipe.name for recipe in RECIPES.values() if preset.name in recipe.models]
            hint = f"recipes for it: {', '.join(others)}" if others else "there is no recipe for it"
            raise ValueError(f"the recipe {self.name} is for {', '.join(self.models)}, not for {preset.name}; {hint}")


def evenly_to_1(steps: int, shift: float) -> Grid:
    """Wan2GP's Euler grid: timesteps evenly spaced from 1000 to 1, then shifted; after the last one comes 0."""
    return Grid.shifted([1000 - 999 * index / max(1, steps - 1) for index in range(steps)], shift)


# Angles of the second, third and fourth step; the first is the arc tangent of the greatest sigma.
RCM_ANGLES = (1.5, 1.4, 1.0)
# Which CausVid was trained at; the shift has no part in them.
CAUSVID_TIMESTEPS = (1000, 934, 862, 756, 603, 410, 250, 140, 74)

OF_14B = ("t2v-14B", "i2v-14B-480P", "i2v-14B-720P", "flf2v-14B-720P", "vace-14B")
OF_A14B = ("t2v-A14B", "i2v-A14B")
LIGHTX2V_22 = "lightx2v/Wan2.2-Distill-Loras:wan2.2_{}_A14b_{}_noise_lora_rank64_lightx2v_4step_{}.safetensors"
KIJAI = "Kijai/WanVideo_comfy:{}.safetensors"
WAN2GP_LORAS = "DeepBeepMeep/Wan2.1:loras_accelerators/{}.safetensors"

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "lightx2v-4step", "lightx2v's step- and guidance-distilled 14B models and LoRAs; of two experts each takes "
            "two steps",
            models=(*OF_14B, *OF_A14B, "s2v-14B", "animate-14B"),
            solver="euler", steps=4, shift=5.0, grid=lambda steps: Grid.shifted((1000, 750, 500, 250), 5.0),
            hints=r"lightx2v|lightning|seko|step_?distill|cfg_?distill",
            files=(
                *(LIGHTX2V_22.format(*of) for of in (("t2v", "high", 1217), ("t2v", "low", 1217),
                                                     ("i2v", "high", 1022), ("i2v", "low", 1022))),
                "lightx2v/Wan2.2-Distill-Models (whole, also i2v at 720p, 260412)",
                "lightx2v/Wan2.2-Lightning",
                KIJAI.format("Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32"),
                KIJAI.format("Lightx2v/lightx2v_I2V_14B_480p_cfg_step_distill_rank64_bf16"),
            ),
            source="LightX2V, configs/distill/wan21 and wan22, models/schedulers/wan/step_distill/scheduler.py",
        ),
        Recipe(
            "lightx2v-8step", "the same in 8 steps, for which they were not trained; where experts change is not "
            "published, and is at the model's boundary",
            models=(*OF_14B, *OF_A14B, "animate-14B"),
            solver="euler", steps=8, shift=5.0,
            grid=lambda steps: Grid.shifted((1000, 875, 750, 625, 500, 375, 250, 125), 5.0),
            hints=r"(?!)", files=("those of lightx2v-4step",),
            source="X-niper in ModelTC/LightX2V-Wan2.2-Lightning, issue 3",
        ),
        Recipe(
            "lightx2v-3phase", "the same against slow motion: first a step with guidance and without the LoRA, then "
            "with each expert's; of I2V for Seko V1's LoRAs",
            models=OF_A14B,
            solver="euler", steps=8, shift=3.0, grid=lambda steps: evenly_to_1(steps, 3.0), guidance_scale=3.5,
            phases="965:3.5:0:high,800:1:1:high,0:1:1:low",
            hints=r"(?!)", files=("the LoRAs of lightx2v-4step, with --lora-high and --lora-low",),
            source="Wan2GP, profiles/wan_2_2/Lightning ... 3 Phases - 8 Steps.json",
        ),
        Recipe(
            "lightx2v-3phase-i2v", "the same for I2V's later LoRAs (1014, 1022)",
            models=("i2v-A14B",),
            solver="euler", steps=8, shift=5.0, grid=lambda steps: evenly_to_1(steps, 5.0), guidance_scale=3.5,
            phases="985:3.5:0:high,800:1:1:high,0:1:1:low",
            hints=r"(?!)", files=("the LoRAs of lightx2v-4step for I2V, with --lora-high and --lora-low",),
            source="Wan2GP, profiles/wan_2_2/Lightning i2v v2025-10-14 3 Phases - 8 Steps.json",
        ),
        # The timesteps are places on the shifted grid. FastVideo's pipeline for CUDA took them as they are, at shift 8,
        # which its later code calls a mistake.
        Recipe(
            "fastwan-5B", "FastVideo's DMD-distilled FastWan2.2 TI2V-5B, for 1280x704 and 121 frames",
            models=("ti2v-5B",),
            solver="dmd", steps=3, shift=5.0, grid=lambda steps: Grid.warped((1000, 757, 522), 5.0),
            hints=r"^(?=.*(?:5b|wan_?2_2)).*(?<![a-z])fast_?wan",
            files=("FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers",
                   "DeepBeepMeep/Wan2.2:loras_accelerators/Wan2_2_5B_FastWanFullAttn_lora_rank_128_bf16.safetensors"),
            source="FastVideo, mlx_runtime/wan22_sample.py",
        ),
        Recipe(
            "fastwan-3step", "FastVideo's DMD-distilled FastWan2.1, made for 832x448 and 61 frames",
            models=("t2v-1.3B", "t2v-14B"),
            solver="dmd", steps=3, shift=8.0, grid=lambda steps: Grid.nearest((1000, 757, 522), 8.0),
            hints=r"(?<![a-z])fast_?wan", files=("FastVideo/FastWan2.1-T2V-1.3B-Diffusers",),
            source="FastVideo, configs/pipelines/wan.py (FastWan2_1_T2V_480P_Config), pipelines/stages/denoising.py",
        ),
        Recipe(
            "causvid-1.3B", "the CausVid LoRA for 1.3B (bidirect2)",
            models=("t2v-1.3B", "vace-1.3B"),
            solver="euler", steps=8, shift=2.0, other_steps=(4, 5, 6, 7, 9),
            grid=lambda steps: Grid.of([t / 1000 for t in CAUSVID_TIMESTEPS[:steps]], CAUSVID_TIMESTEPS[:steps]),
            hints=r"causvid.*1_?3b",
            files=(KIJAI.format("Wan21_CausVid_bidirect2_T2V_1_3B_lora_rank32"),),
            source="Wan2GP, profiles/wan_1.3B/Causvid Rank32 - 8 Steps.json; its solver causvid in any2video.py",
        ),
        Recipe(
            "causvid", "the CausVid LoRA for 14B, the weaker the more steps",
            models=(*OF_14B, *OF_A14B),
            solver="unipc", steps=12, shift=7.0, grid=None, other_steps=(4, 5, 6, 7, 8, 9, 10, 11),
            strengths=((5, 0.9), (9, 0.5), (1000, 0.3)),
            hints=r"causvid", files=(WAN2GP_LORAS.format("Wan21_CausVid_14B_T2V_lora_rank32_v2"),),
            source="Wan2GP, docs/LORAS.md",
        ),
        Recipe(
            "accvid", "the AccVid LoRA for 14B, which saves the guidance, not steps",
            models=OF_14B,
            solver="unipc", steps=50, shift=5.0, grid=None, other_steps=(40,),
            hints=r"acc_?vid",
            files=(WAN2GP_LORAS.format("Wan21_AccVid_T2V_14B_lora_rank32_fp16"),
                   KIJAI.format("Wan21_AccVid_I2V_480P_14B_lora_rank32_fp16")),
            source="Wan2GP, docs/LORAS.md",
        ),
        Recipe(
            "fusionix", "FusioniX (FusionX), CausVid and AccVid with style LoRAs in one LoRA",
            models=(*OF_14B, *OF_A14B),
            solver="unipc", steps=10, shift=2.0, grid=None, other_steps=(8, 9),
            hints=r"fusioni?x",
            files=("vrgamedevgirl84/Wan14BT2VFusioniX:FusionX_LoRa/Wan2.1_T2V_14B_FusionX_LoRA.safetensors",
                   "vrgamedevgirl84/Wan14BT2VFusioniX:FusionX_LoRa/Wan2.1_I2V_14B_FusionX_LoRA.safetensors"),
            source="Wan2GP, profiles/wan/FusioniX t2v - 10 Steps.json, docs/LORAS.md",
        ),
        # The angles replace a shift. The greatest sigma is 80, and 200 for I2V.
        Recipe(
            "turbowan-i2v", "TurboDiffusion's rCM-distilled Wan2.2 I2V-A14B, in 1 to 4 steps",
            models=("i2v-A14B",),
            solver="dmd", steps=4, shift=1.0, other_steps=(1, 2, 3),
            grid=lambda steps: Grid.trigonometric((math.atan(200), *RCM_ANGLES)[:steps]),
            hints=r"turbo_?wan_?2_2", files=("TurboDiffusion/TurboWan2.2-I2V-A14B-720P",),
            source="thu-ml/TurboDiffusion, inference/wan2.2_i2v_infer.py",
        ),
        Recipe(
            "rcm", "NVIDIA's rCM-distilled Wan2.1, and TurboDiffusion's, in 1 to 4 steps",
            models=("t2v-1.3B", "t2v-14B"),
            solver="dmd", steps=4, shift=1.0, other_steps=(1, 2, 3),
            grid=lambda steps: Grid.trigonometric((math.atan(80), *RCM_ANGLES)[:steps]),
            hints=r"(?<![a-z0-9])rcm(?![a-z0-9])|turbo_?wan",
            files=("worstcoder/rcm-Wan", "TurboDiffusion/TurboWan2.1-T2V-1.3B-480P"),
            source="NVlabs/rcm, rcm/inference/wan2pt1_t2v_rcm_infer.py; thu-ml/TurboDiffusion, inference/",
        ),
        # Reward LoRAs distil nothing: Wan2GP takes them so, their authors with guidance, all steps and strength 0.5.
        Recipe(
            "fun-reward", "reward LoRAs of Fun-A14B-InP (HPS2.1, MPS) without guidance, as Wan2GP takes them; their "
            "authors take them at 0.5 with guidance and all steps, which needs no recipe",
            models=("i2v-A14B", "fun-A14B-InP"),
            solver="unipc", steps=8, shift=3.0, grid=None, other_steps=(4,),
            phases="876:1:1:high,0:1:1:low",
            hints=r"fun_a14b_inp.*(?:hps|mps)|fun_reward", files=("alibaba-pai/Wan2.2-Fun-Reward-LoRAs",),
            source="Wan2GP, profiles/wan_2_2/Fun Inp ... Reward 2 Phases - 4 Steps.json",
        ),
        Recipe(
            "nano-4step", "nano's own LoRA; taken unless steps, guidance or the like are given",
            models=("nano",),
            solver="euler", steps=4, shift=3.0, grid=lambda steps: Grid.shifted((1000, 750, 500, 250), 3.0),
            hints=r"nano_4step",
            files=("four_steps.safetensors, beside nano's weights in the package",),
            source="examples/nano/train_distil.py",
        ),
    )
}  # fmt: skip


def scheduler_for(request: Request) -> Scheduler:
    """The solver of a request, on its sigma grid."""
    steps, grid = request.steps, RECIPES[request.recipe].grid if request.recipe else None
    solver = SOLVERS[request.solver]
    return solver(steps, request.shift, grid and grid(steps), request.seed, request.begin, request.noise_size)


def timesteps_of(request: Request) -> list[float]:
    """Those of a request's steps."""
    return [float(timestep) for timestep in scheduler_for(request).timesteps]


def phase_of(request: Request, timestep: float) -> Phase | None:
    """The phase of a request that serves a timestep, if it has phases."""
    return phase_at(read_phases(request.phases), timestep)


def recipes_of(text: str, preset: Preset | None = None) -> list[Recipe]:
    """The recipes whose hints are found in ``text``, the names of a file; of a model those that are for it, if any."""
    found = [recipe for recipe in RECIPES.values() if re.search(recipe.hints, text)]
    suited = [recipe for recipe in found if preset is not None and recipe.suits(preset)]
    return suited or found
