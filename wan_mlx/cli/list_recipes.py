"""``wan-mlx recipes``: how distilled models and LoRAs are sampled."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from ..recipes import RECIPES, Recipe
from .flags import Parser
from .terminal import write

WIDTH, INDENT = 100, " " * 4


def build_parser() -> Parser:
    return Parser(prog="wan-mlx recipes", description="How distilled models and LoRAs are sampled: names for --recipe.")


def main(argv: list[str]) -> int:
    """Print the recipes: numbers, models, files and sources of each."""
    build_parser().parse_args(argv)
    for recipe in RECIPES.values():
        write(f"{recipe.name}: {recipe.about}")
        for name, text in rows(recipe):
            first = f"{INDENT}{name:<10}"
            lines = textwrap.wrap(text, WIDTH - len(first), break_long_words=False, break_on_hyphens=False)
            for number, line in enumerate(lines):
                write((" " * len(first) if number else first) + line)
        write("")
    return 0


def rows(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(name, text) of what a recipe says."""
    others = f" (or {', '.join(map(str, recipe.other_steps))})" * bool(recipe.other_steps)
    guidance = "by phases" if recipe.phases else "off" if recipe.guidance_scale == 1 else f"{recipe.guidance_scale:g}"
    yield "sampling", f"{recipe.steps} steps{others}, {recipe.solver}, shift {recipe.shift:g}, guidance {guidance}"
    if recipe.grid:
        timesteps = recipe.grid(recipe.steps).timesteps
        yield "timesteps", ", ".join(f"{timestep:.5g}" for timestep in timesteps)
    if recipe.phases:
        yield "phases", recipe.phases
    up_to = [f"{strength:g}" + f" up to {most} steps" * (most < 1000) for most, strength in recipe.strengths]
    yield "LoRA at", ", ".join(up_to)
    yield "models", ", ".join(recipe.models)
    for file in recipe.files:
        yield "file", file
    yield "source", recipe.source
