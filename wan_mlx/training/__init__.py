"""LoRA training: the data set, the loss and its gradients block by block, the loop, and the file that it writes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import UsageError, nearest
from ..events import Eta, Listener, Progress, StageEnded, unheard
from ..geometry import Geometry
from ..lasting import computes
from ..pipeline import WanPipeline
from ..planning.machine import available_memory, parse_memory
from ..presets import Preset
from .dataset import DataSet, TrainingClip, hold_out
from .estimate import plan_training
from .loop import SIDES, Training, TrainingError, TrainStep
from .recipe import HELD_OUT, Recipe

log = logging.getLogger(__name__)
NAMED = 5  # notes of a kind that are told

__all__ = ["DataSet", "Recipe", "TrainStep", "Training", "TrainingError", "clips_of", "train", "trainings"]


@computes
def train(
    data: str | Path,
    model: str | Path | WanPipeline = "nano",
    output: str | Path = "lora",
    *,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
    trigger: str = "",
    validate: float = 0.0,
    resume: bool = False,
    callback: Callable[[TrainStep], Any] | None = None,
    memory: str | None = None,
    dtype: str = "bfloat16",
    quantize: str | None = None,
    sample_prompts: str | Sequence[str] = (),
    expert: str = "both",
    **recipe: Any,
) -> Path | dict[str, Path]:
    """Train a LoRA and return its file: the newest checkpoint, if training was stopped before its end. Of a model of
    two experts the files of both by name, as ``loras`` of `WanPipeline.from_pretrained` takes them.

    Args:
        data: a folder of pictures and videos with captions, or a .toml file (`DataSet.open`).
        model: a pipeline, or what `WanPipeline.from_pretrained` takes.
        output: a new folder (`Training`), which gets the LoRA under its own name.
        size, frames: (width, height) whose area the clips have, and their longest length; None: the model's own.
        trigger: a word that is put in front of captions that lack it.
        validate: the share of files that are held out, for the validation's loss.
        resume: go on with the run in ``output``, bit for bit.
        callback: called with each `TrainStep`; if it returns False, training stops there, and can be resumed.
        memory: as for a pipeline: where the model's blocks do not fit in it, they are streamed from disk.
        dtype, quantize: as for a pipeline, where ``model`` is none.
        sample_prompts: prompts of which each gets a video in ``output/samples`` every ``sample_every`` steps.
        expert: of a model of two experts "high" (noise), "low", or "both", one after the other.
        recipe: fields of `Recipe`, such as ``rank=16, steps=500, learning_rate=2e-4``.

    Raises:
        UsageError, ValueError: an argument or the data set is wrong, or memory does not suffice.
        TrainingError: a loss is not finite; what was kept is whole.
    """
    known = [field.name for field in fields(Recipe)]
    for name in recipe.keys() - known:
        raise TypeError(f"a training has no option {name!r}{nearest(name, known)}")
    Recipe(**recipe)  # what is wrong is said before anything is opened
    prompts = [sample_prompts] if isinstance(sample_prompts, str) else list(sample_prompts)
    if not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise UsageError(f"sample_prompts is {sample_prompts!r}, expected prompts, such as ['a cat']")
    opened = DataSet.open(data)
    pipe = model
    if not isinstance(pipe, WanPipeline):
        pipe = WanPipeline.from_pretrained(pipe, dtype=dtype, quantize=quantize, memory=memory)
    chosen = Recipe.of(pipe.preset, **recipe)
    trained, held_out = clips_of(opened, chosen, pipe.preset, pipe.geometry, size, frames, trigger, validate)
    budget = parse_memory(pipe.memory if memory is None else memory) or available_memory()
    plan = plan_training(pipe.sizes(pipe.quantize), [*trained, *held_out], chosen, budget)
    plan.check()
    for note in opened.told(NAMED):
        log.warning("%s", note)
    files, stopped = {}, False
    for training in trainings(pipe, trained, chosen, output, held_out, trigger, pipe.listener, expert):
        training.stream, training.encode_tile = plan.stream, plan.encode_tile
        training.sample_prompts = prompts
        for step in with_progress(training.run(resume), pipe.listener):
            if callback is not None and callback(step) is False:
                training.stop()
                stopped = True
        files[training.expert] = training.newest or training.path
        if stopped:
            break
    return files.get("") or files


def trainings(
    pipe: WanPipeline,
    trained: Sequence[TrainingClip],
    recipe: Recipe,
    output: str | Path,
    held_out: Sequence[TrainingClip] = (),
    trigger: str = "",
    listener: Listener = unheard,
    expert: str = "both",
) -> list[Training]:
    """The trainings of a model: one, or of a model of two experts those that ``expert`` names; arguments as of `train`.

    Raises:
        ValueError: the model's LoRAs are not trained here, or ``expert`` names none of it.
    """
    sides = sides_of(pipe.checkpoint.has_experts, expert)
    return [Training(pipe, trained, recipe, output, held_out, trigger, listener, side) for side in sides]


def sides_of(has_experts: bool, expert: str = "both") -> tuple[str, ...]:
    """The experts that ``expert`` names, of a model of two; "" stands for the transformer of a model of one.

    Raises:
        UsageError: it names none of the model's.
    """
    choices = ("both", *SIDES)
    if expert not in choices:
        raise UsageError(f"expert is {expert!r}, expected one of {', '.join(choices)}{nearest(expert, choices)}")
    if expert != "both" and not has_experts:
        raise UsageError(f"expert is {expert!r}, but the model has one transformer; leave it out")
    return (expert,) if expert != "both" else SIDES if has_experts else ("",)


def with_progress(steps: Iterable[TrainStep], listener: Listener) -> Iterator[TrainStep]:
    """The steps of a training, of which a listener hears how far they are, and the time left."""
    began = time.monotonic()
    try:
        for step in steps:
            listener(Progress("training", step.step, step.total))
            listener(Eta(step.left, mx.get_active_memory(), mx.get_peak_memory()))
            yield step
    finally:
        listener(StageEnded("training", time.monotonic() - began, mx.get_peak_memory(), left=True))


def clips_of(
    data: DataSet,
    recipe: Recipe,
    preset: Preset,
    geometry: Geometry,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
    trigger: str = "",
    validate: float = 0.0,
) -> tuple[list[TrainingClip], list[TrainingClip]]:
    """The clips to train, and those to hold out; arguments as of `train`.

    Raises:
        ValueError: the model makes no such size or length.
        UsageError: no clip is left.
    """
    pair = preset.size if size is None else size
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(type(side) is int for side in pair)):
        raise UsageError(f"size is {size!r}, expected (width, height) in pixels, such as {preset.size}")
    length = preset.num_frames if frames is None else frames
    if type(length) is not int:
        raise UsageError(f"frames is {frames!r}, expected a whole number, such as {preset.num_frames}")
    width, height = pair
    geometry.check_size(width, height)
    geometry.check_frames(length)
    if not (isinstance(validate, (int, float)) and 0 <= validate < 1):
        raise UsageError(f"validate is {validate!r}, expected a share from 0 to below 1, such as 0.1")
    clips = data.clips(geometry, preset.fps, (width, height), length, trigger)
    if preset.task == "flf2v":
        short = [clip for clip in clips if len(clip.frames) == 1]
        data.notes += [f"left out: {clip.path.name} has no last frame beside the first" for clip in short]
        clips = [clip for clip in clips if len(clip.frames) > 1]
        if not clips:
            raise UsageError(f"{preset.name} needs a first and a last frame, and no clip has both; give longer videos")
    return hold_out(clips, validate, recipe.chance(HELD_OUT))
