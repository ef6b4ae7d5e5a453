"""``wan-mlx recipes``: how distilled models and LoRAs are sampled."""

from __future__ import annotations

from ..recipes import RECIPES
from .flags import Parser
from .terminal import write


def build_parser() -> Parser:
    return Parser(prog="wan-mlx recipes", description="How distilled models and LoRAs are sampled: names for --recipe.")


def main(argv: list[str]) -> int:
    """Print a table of the recipes, and what each is for."""
    build_parser().parse_args(argv)
    write(f"{'--recipe':<18}{'steps':<13}{'solver':<8}{'shift':>5}{'guidance':>10}{'LoRA at':>9}  made for")
    for recipe in RECIPES.values():
        allowed = sorted((recipe.steps, *recipe.other_steps))
        steps = f"{recipe.steps}" + f" ({allowed[0]} to {allowed[-1]})" * (len(allowed) > 1)
        guidance = "off" if recipe.guidance_scale == 1 else f"{recipe.guidance_scale:g}"
        write(f"{recipe.name:<18}{steps:<13}{recipe.solver:<8}{recipe.shift:>5g}{guidance:>10}{recipe.strength:>9g}  "
              f"{recipe.about}")  # fmt: skip
    return 0
