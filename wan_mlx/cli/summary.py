"""The summary of a run, in lines for the terminal, before it starts."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import options
from ..caching import make_cache
from ..errors import WanError, some
from ..files.open import open_weights
from ..hub.names import expert_named
from ..hub.resolve import Places
from ..mac import can_stay_awake
from ..media.preview import PreviewFiles
from ..opened import OpenedModel
from ..option_texts import guidance_text
from ..other_models import of_name
from ..phases import phase_at, read_phases
from ..presets import BUNDLED, EXPERTS, GIVEN_APART, Preset, of_same_shapes
from ..recipes import RECIPES, Recipe, recipes_of, timesteps_of
from ..types import Request
from ..weights.checkpoint import check_here
from ..weights.lora import lora_lists
from .terminal import Terminal

# LoRA files describe themselves in metadata, under one of many keys; longer values are training data.
LONGEST_HINT = 400


def tell_no_effect(args: argparse.Namespace, say: Terminal) -> None:
    """Say why official flags that were given do nothing here."""
    for option in options.flags():
        if option.no_effect and getattr(args, option.key) is not None:
            say.note(f"{option.flags[0]} has no effect here: {option.no_effect}")
    if args.stop_below is not None and sys.platform != "darwin":
        say.note("--stop-below has no effect here: only macOS is asked for its battery")
    if args.prompt_extend_method == "dashscope":
        say.note("--prompt_extend_method dashscope has no effect here: prompts never leave this machine, a model here "
                 "writes them out")  # fmt: skip


def tell_downloads(model: Mapping[str, Any], say: Terminal) -> bool:
    """Print which files must be fetched before the model can be opened, and their size; returns whether there are any.

    ``model``: keywords for `WanPipeline.from_pretrained`.
    """
    parts = {part: model[part] for part in GIVEN_APART if model.get(part) is not None}
    places = Places(model["model"], parts, [lora for loras in lora_lists(model).values() for lora in loras])
    check_here(*places.here())
    missing = [download for download in places.downloads(model["source"]) if download.missing]
    for download in missing:
        say.note(f"download  {download}")
    return bool(missing)


def describe(pipe: OpenedModel, request: Request, say: Terminal, outputs: Mapping[Path, int]) -> None:
    """``outputs``: each file → its seed."""
    guidance = "off" if request.passes == 1 else guidance_text(request.guidance_scale)
    packed = "".join(f", {component.replace('_', ' ')} {mode}" for component, mode in pipe.quantized.items())
    path, name, defaults = pipe.checkpoint.path, pipe.preset.name, f"{pipe.preset.name} defaults"
    bundled = "bundled" if path.name == name else f"bundled, {defaults}"
    whose = f"{path.name} ({bundled}" if path in BUNDLED.values() else f"{path} ({defaults}"
    say.note(f"model     {whose}, {pipe.dtype}{packed})")
    for line in origins(pipe):
        say.note(f"          {line}")
    for owner, loras in loras_of(pipe).items():
        for path, strength in loras:
            say.note(f"lora      {path} at {strength:g}{f', {owner}' * (owner != '')}")
    say.note(f"prompt    {request.prompt}")
    say.note(f"video     {request.width}x{request.height}, {request.num_frames} frames at {request.model_fps} fps")
    if request.interpolate:
        made = request.frames_written
        say.note(f"smooth    {made} frames at {request.fps} fps, those between by {request.interpolate}")
    say.note(f"sampling  {request.solver}, {request.steps} steps, shift {request.shift:g}, guidance {guidance}, "
             f"seed{'s' * (len(outputs) > 1)} {some([*map(str, outputs.values())])}")  # fmt: skip
    if request.draft_of:
        width, height, steps = request.draft_of
        say.note(f"draft     of {width}x{height} in {steps} steps; --from-draft FILE makes that")
    for line in extras(request, pipe.preset.name, pipe.switch(request)):
        say.note(line)
    if request.video is not None:
        strength, made = f"{request.strength:g}", request.steps_made
        say.note(f"start     {request.video}, strength {strength}: the last {made} of the steps")
    if request.video is not None and request.src_mask is not None:
        say.note(f"mask      {request.src_mask}: what is black in it stays")
    for output in outputs:
        say.note(f"output    {output}")
    tell_awake(pipe.caffeinate, say)


def loras_of(pipe: OpenedModel) -> dict[str, list[tuple[Path, float]]]:
    """Expert, or "" for every transformer → its LoRAs."""
    return {"": pipe.loras} | {part.label: [*part.loras] for part in pipe.checkpoint.of_kind("transformer")}


def names_differ(pipe: OpenedModel) -> Iterator[str]:
    """Lines about transformers and LoRAs that by their names are not what they were given as."""
    for part in pipe.checkpoint.of_kind("transformer"):
        name, expert = part.file.name, expert_named(part.file)
        if expert is not None and part.name not in EXPERTS:
            yield (f"by its name {name} is the {_words(expert)} expert of a model of two; alone it runs as "
                   f"{pipe.preset.name} does; --high-noise and --low-noise take two")  # fmt: skip
        elif expert not in (None, part.name):
            yield f"by its name {part.file} is the {_words(expert)} expert, and it is used as the {part.label} one"
        elif expert is None and (other := of_name(name, known=True)):
            yield f"by its name {name} is {other.name}; it runs as {pipe.preset.name} does"
    for owner, loras in loras_of(pipe).items():
        for path, _ in loras:
            expert = expert_named(path.name)
            if expert is not None and _words(expert) != owner:
                given_to = f"the {owner} one" if owner else "every transformer"
                yield f"by its name {path.name} is for the {_words(expert)} expert, and it was given to {given_to}"


def _words(expert: str) -> str:
    return expert.replace("_", " ")


def tell_awake(caffeinate: bool, say: Terminal) -> None:
    """Say that a Mac is kept from falling asleep, if it is."""
    if caffeinate and can_stay_awake():
        say.note("awake     this Mac stays awake while the run goes on and its lid is open (--no-caffeinate: not)")


def tell_notes(pipe: OpenedModel, request: Request, say: Terminal) -> None:
    """Say beforehand the notes of a run."""
    for line in pipe.notes(request):
        say.note(line, important=True)


def tell_watching(pipe: OpenedModel, previews: PreviewFiles | None, say: Terminal) -> None:
    if previews:
        often = f"every {previews.every} steps" if previews.every > 1 else "every step"
        say.note(f"preview   {previews.path}, {previews.sheet}, after {often}{' by TAEHV' if pipe.taehv else ''}")
    if pipe.tiny_vae and pipe.taehv:
        say.note(f"decoding  by {pipe.taehv.name} instead of the VAE")


def origins(pipe: OpenedModel) -> list[str]:
    """Parts that were given apart, and which other defaults would suit the same weights."""
    base, package = pipe.checkpoint.path, BUNDLED["nano"].parent
    lines = [
        f"{part.replace('_', ' ')} from {file}"
        for part, file in pipe.checkpoint.files.items()
        if file != base and base not in file.parents and package not in file.parents
    ]
    if pipe.guessed_preset:
        for other in of_same_shapes(pipe.preset):
            lines.append(f"{other.name} has weights of the same shapes; --task {other.name} takes its defaults")
    return lines


def extras(request: Request, model: str, switch: int | None = None) -> list[str]:
    """Lines about guidance other than the plain one, and about left-out forwards."""
    lines = []
    if request.recipe:
        lines.append(f"          by the recipe {request.recipe}")
    lines += [f"          {line}" for line in phase_lines(request)]
    if request.cache != "none":
        start = request.begin, switch, request.image is not None
        cache = make_cache(request.cache, request.steps_made, model, *start)
        planned = cache.planned(request.passes)
        plain = request.guidance_range == (0.0, 1.0) and request.cfg_zero is None
        known = f", {planned} of {request.passes * request.steps_made} forwards" if planned and plain else ""
        lines.append(f"cache     {request.cache}{known}")
    if request.guidance_range != (0.0, 1.0):
        lines.append("          guidance only from {:g} to {:g} of the steps".format(*request.guidance_range))
    if request.cfg_zero is not None:
        lines.append(f"          CFG-Zero*, {request.cfg_zero} first steps without motion")
    if request.skip_layers:
        layers = ", ".join(map(str, request.skip_layers))
        lines.append("          layers {} skipped from {:g} to {:g} of the steps".format(layers, *request.skip_range))
    return lines


def phase_lines(request: Request) -> Iterator[str]:
    """A line for each phase."""
    above, phases = 1000.0, read_phases(request.phases)
    for phase in phases:
        steps = [timestep for timestep in timesteps_of(request) if phase_at(phases, timestep) is phase]
        guidance = "" if phase.guidance is None else f", guidance {phase.guidance:g}" if phase.guidance != 1 else \
            ", guidance off"  # fmt: skip
        factors = "/".join(f"{factor:g}" for factor in phase.loras)
        loras = "" if factors == "1" else ", without LoRAs" if factors == "0" else f", LoRAs times {factors}"
        expert = f", the {_words(phase.expert)} expert" if phase.expert else ""
        yield f"timesteps {above:g} to {phase.down_to:g}: {len(steps)} steps{guidance}{loras}{expert}"
        above = phase.down_to


def suggest_recipe(
    path: str | Path, metadata: Mapping[str, Any] | None = None, preset: Preset | None = None
) -> Recipe | None:
    """Guess a checkpoint's or LoRA's recipe from its name, its folder's, or its safetensors metadata.

    Only for a hint to the user: never applied. ``preset``: the model that it is used with.
    """
    path = Path(path)
    said = [value for value in (metadata or {}).values() if isinstance(value, str) and len(value) <= LONGEST_HINT]
    text = re.sub(r"[-_.\s]+", "_", " ".join([path.parent.name, path.name, *said]).lower())
    return next(iter(recipes_of(text, preset)), None)


def recipe_notes(
    paths: Iterable[str | Path], chosen: str | None, preset: Preset | None = None, steps: int | None = None
) -> list[str]:
    """A hint for each recipe that these checkpoints and LoRAs seem to need and that was not chosen."""
    notes, said = [], set[str]()
    for path in paths:
        recipe = suggest_recipe(path, _metadata(Path(path)), preset)
        # lightx2v-8step is for the files of lightx2v-4step, too.
        if recipe is None or recipe.name in said or (chosen and chosen.split("-")[0] == recipe.name.split("-")[0]):
            continue
        said.add(recipe.name)
        at = recipe.strength(steps or recipe.steps)
        notes.append(
            f"{Path(path).name} looks distilled: --recipe {recipe.name} samples it as published ({recipe.steps} "
            f"steps, {recipe.solver}, shift {recipe.shift:g}, guidance off{f', LoRA strength {at:g}' * (at != 1)})"
        )
    return notes


def strength_notes(loras: Iterable[tuple[Path, float]], request: Request, preset: Preset) -> Iterator[str]:
    """A line for each LoRA of the recipe that is used, and is given at another strength than published."""
    if request.recipe is None:
        return
    recipe = RECIPES[request.recipe]
    published = recipe.strength(request.steps)
    for path, strength in loras:
        found = suggest_recipe(path, _metadata(path), preset)
        if found and found.name == recipe.name and strength != published:
            yield f"{path.name} is given at {strength:g}; {recipe.source}: {published:g} in {request.steps} steps"


def _metadata(path: Path) -> Mapping[str, str]:
    """Metadata of a safetensors file; empty for other or unreadable files."""
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    try:
        return open_weights(path).metadata
    except WanError:  # reported when the file is loaded
        return {}
