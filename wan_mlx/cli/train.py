"""``wan-mlx train DATA``: a LoRA trained from pictures and videos with captions."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from ..errors import Stopped, UsageError, duration, size
from ..events import Listener, unheard
from ..geometry import Geometry
from ..hub.resolve import preset_of
from ..option_texts import parse_mode, parse_size
from ..options import named
from ..pipeline import WanPipeline
from ..planning.machine import available_memory, parse_memory
from ..planning.sizes import Networks, sizes_of
from ..presets import BUNDLED, PRESETS, Preset
from ..progress_bars import ProgressBars, is_live
from ..storage import DRAWN, parse_json
from ..training import NAMED, clips_of, sides_of, trainings, with_progress
from ..training.dataset import DataSet, TrainingClip
from ..training.estimate import TrainingPlan, plan_training
from ..training.factors import TARGETS
from ..training.loop import RECIPE, SIDES, Training, TrainStep
from ..training.recipe import OF_MODELS, OPTIMIZERS, SCHEDULES, TIMESTEP_SAMPLING, Recipe
from ..training.timing import with_seconds
from ..weights.load import parameters_of
from ..weights.parameters import Parameters
from .config_file import read_text
from .flags import Parser
from .interrupt import Interrupts
from .terminal import write

DESCRIPTION = "Train a LoRA from pictures and videos with captions."
EPILOG = """\
Captions lie beside: a.mp4, a.txt. OUT gets OUT.safetensors, state/, log.jsonl.
examples:
  wan-mlx train clips -o zorb --trigger zorb
  wan-mlx train clips -m t2v-1.3B -o style --size 480x272 --frames 33"""
OURS = {"cache", *SIDES}  # of a run that was killed before its settings were written
EXAMPLE = "wan-mlx train clips -o zorb"
LINE_EVERY = 10.0  # seconds, between lines about steps
ABOUT = {
    "rank": "of the LoRA",
    "alpha": "the LoRA counts alpha / rank times (the rank)",
    "targets": f"layers: {', '.join(TARGETS)}",
    "steps": "optimiser steps",
    "learning_rate": "after the warm-up",
    "schedule": ", ".join(SCHEDULES),
    "warmup": "steps in which the rate rises",
    "optimizer": ", ".join(OPTIMIZERS),
    "weight_decay": "of adamw, lion and adafactor",
    "clip": "largest norm of the gradients; 0: any",
    "batch": "clips of a step",
    "accumulate": "times as many clips of a step",
    "timesteps": ", ".join(TIMESTEP_SAMPLING),
    "shift": "of the noise levels",
    "preserve": "share kept as it was, without the trigger",
    "preserve_words": "in the trigger's place there: red,blue",
    "given_frame": "share of TI2V's clips with a first frame",
    "caption_dropout": "share of clips without caption",
    "dropout": "share of ranks that a step leaves out",
    "seed": "of all chance",
    "save_every": "steps between kept states",
    "sample_every": "steps between sample videos",
}
# Names that users of other trainers type.
ALSO = {
    "rank": ["--network_dim"],
    "alpha": ["--network_alpha"],
    "learning_rate": ["--learning_rate", "--lr"],
    "steps": ["--max_train_steps"],
    "clip": ["--max_grad_norm"],
    "timesteps": ["--timestep_sampling"],
    "shift": ["--discrete_flow_shift"],
    "save_every": ["--save_every_n_steps"],
    "sample_every": ["--sample_every_n_steps"],
}


def build_parser() -> Parser:
    parser = Parser(
        prog="wan-mlx train", usage="wan-mlx train DATA --output OUT [flags]", description=DESCRIPTION, epilog=EPILOG,
        example=EXAMPLE,
    )  # fmt: skip
    parser.add_argument("data", metavar="DATA", type=Path, help="folder of files and captions, or a .toml file")
    parser.add_argument("-m", "--model", metavar="NAME", default="nano", help="what --model of a video takes (nano)")
    parser.add_argument("-o", "--output", metavar="OUT", type=Path, help="new folder for the LoRA")
    parser.add_argument("--size", metavar="WxH", type=parse_size, help="area of the clips (the model's own size)")
    parser.add_argument("--frames", metavar="N", type=int, help="longest length of the clips (the model's own)")
    parser.add_argument(
        "--expert", metavar="NAME", default="both", help="of a model of two experts: high, low, or both"
    )
    parser.add_argument("--trigger", metavar="WORD", default="", help="put in front of captions that lack it")
    parser.add_argument(
        "--validate", metavar="SHARE", type=_share, default=0.0, help="share of files held out, such as 10%%"
    )
    for field in fields(Recipe):
        kind = float if field.name == "alpha" else type(field.default)
        of_nano = OF_MODELS["nano"].get(field.name)
        others = "" if of_nano is None else f"; nano {of_nano}"
        default = "" if field.default in (None, "") else f" ({field.default}{others})"
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, *ALSO.get(field.name, ()), dest=field.name, type=kind,
                            metavar="NAME" if kind is str else "N", help=ABOUT[field.name] + default)  # fmt: skip
    parser.add_argument(
        "-q", "--quantize", metavar="MODE", type=parse_mode, help="of the model that is trained beside: q8, q4, ..."
    )
    parser.add_argument("--dtype", metavar="NAME", default="bfloat16", help="bfloat16, float16 or float32 (bfloat16)")
    parser.add_argument("--memory", metavar="SIZE", help="what MLX may hold, such as 8GB (what is free)")
    parser.add_argument(
        "--sample-prompts", metavar="FILE", type=Path, help="a prompt a line, of each a video now and then"
    )
    parser.add_argument("--plan", action="store_true", help="say what it would need, and stop")
    parser.add_argument("--dry-run", action="store_true", help="check the data, and stop")
    parser.add_argument("--resume", action="store_true", help="go on with the run in OUT")
    parser.add_argument("--source", metavar="HUB", help=named("source").described)
    parser.add_argument("--quiet", action="store_true", help="print only the LoRA's file and errors")
    parser.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
    return parser


def _share(text: str) -> float:
    try:
        share = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share; expected 10%, or 0.1")
    return share


def main(argv: list[str]) -> int:
    """Train, or say what it would need."""
    parser = build_parser()
    args = parser.parse_args(argv)
    looks = args.plan or args.dry_run
    if args.output is None and not looks:
        parser.error("the following arguments are required: -o/--output")
    given = {field.name: value for field in fields(Recipe) if (value := getattr(args, field.name)) is not None}
    Recipe(**given)  # what is wrong is said before anything is opened
    memory = parse_memory(args.memory)
    data = DataSet.open(args.data)
    prompts = _prompts(args.sample_prompts)
    if not looks:
        _check_output(args.output, args.resume)
    listener: Listener = unheard if args.quiet else ProgressBars()
    preset = PRESETS.get(args.model) or preset_of(args.model)
    if preset is not None:  # before anything is downloaded
        recipe = Recipe.of(preset, **given)
        recipe.check(preset, args.trigger, bool(prompts))
        sides_of(preset.experts > 1, args.expert)
        if looks and preset.name not in BUNDLED:
            nets = sizes_of(preset, args.dtype, args.quantize)
            return _look(args, data, recipe, preset, preset.geometry, nets)
    pipe = WanPipeline.from_pretrained(
        args.model, dtype=args.dtype, quantize=args.quantize, memory=args.memory, source=args.source, progress=listener  # type: ignore[arg-type]
    )  # fmt: skip
    nets, recipe = pipe.sizes(args.quantize), Recipe.of(pipe.preset, **given)
    if looks:
        recipe.check(pipe.preset, args.trigger, bool(prompts))
        sides_of(pipe.checkpoint.has_experts, args.expert)
        parameters = parameters_of(pipe.checkpoint.of_kind("transformer")[0], nets.dtype, args.quantize)
        return _look(args, data, recipe, pipe.preset, pipe.geometry, nets, parameters)
    trained, held_out = _divided(args, data, recipe, pipe.preset, pipe.geometry)
    plan = plan_training(nets, [*trained, *held_out], recipe, memory or available_memory())
    found = trainings(pipe, trained, recipe, args.output, held_out, args.trigger, listener, args.expert)
    speaks = found[0].ranks.is_first
    if speaks and not args.quiet:
        _tell(data, trained, held_out, plan, recipe, len(found), NAMED)
    plan.check()
    for training in found:
        training.stream, training.encode_tile, training.sample_prompts = plan.stream, plan.encode_tile, prompts
        if len(found) > 1 and not args.quiet:
            write(f"the expert for {training.expert} noise:")
        if code := _train(training, args, listener, is_last=training is found[-1]):
            return code
    if speaks:
        write(found[-1].path if args.quiet else f"{found[-1].path}: use it with {_flags(found)}")
    return 0


def _look(
    args: argparse.Namespace,
    data: DataSet,
    recipe: Recipe,
    preset: Preset,
    geometry: Geometry,
    nets: Networks,
    parameters: Parameters | None = None,
) -> int:
    """``--plan`` and ``--dry-run``; ``parameters``: the transformer's, if its weights are here."""
    trained, held_out = _divided(args, data, recipe, preset, geometry)
    plan = plan_training(nets, [*trained, *held_out], recipe, parse_memory(args.memory) or available_memory())
    if args.plan and plan.fits:
        plan = with_seconds(plan, nets, recipe, parameters)
    _tell(data, trained, held_out, plan, recipe, len(sides_of(preset.experts > 1, args.expert)))
    return 0 if plan.fits else 1


def _divided(
    args: argparse.Namespace, data: DataSet, recipe: Recipe, preset: Preset, geometry: Geometry
) -> tuple[list[TrainingClip], list[TrainingClip]]:
    """The clips to train, and those to hold out."""
    given = geometry.named_size(args.size, preset.size) if isinstance(args.size, str) else args.size
    return clips_of(data, recipe, preset, geometry, given, args.frames, args.trigger, args.validate)


def _train(training: Training, args: argparse.Namespace, listener: Listener, is_last: bool) -> int:
    shows, losses, said_at = not args.quiet and training.ranks.is_first, list[float](), -math.inf
    if not (shows and is_live(sys.stderr)):
        listener = unheard  # lines tell it
    with Interrupts() as interrupts, interrupts.stopping(_Stoppable(training)):  # type: ignore[arg-type]
        try:
            for done in with_progress(training.run(resume=args.resume), listener):
                losses.append(done.loss)
                if shows and (done.kept or interrupts.asked or time.monotonic() >= said_at + LINE_EVERY):
                    write(_line(done, losses))
                    losses, said_at = [], time.monotonic()
        except Stopped as stopped:
            raise Stopped(stopped.signum, go_on="; to go on: the same command with --resume") from None
    if interrupts.asked and not (is_last and training.newest == training.path):
        so_far = f" The LoRA as it is: {training.newest}" if training.newest else ""
        if training.ranks.is_first:
            write(f"stopped; to go on: the same command with --resume.{so_far}")
        return 130
    return 0


def _flags(found: list[Training]) -> str:
    """The flags that give the LoRAs to a video."""
    return " ".join(f"--lora{training.expert and '-'}{training.expert} {training.path}" for training in found)


class _Stoppable:
    """A training as `Interrupts` stops it: after the step that is under way, and before the first at once."""

    def __init__(self, training: Training):
        self._training, self.stop = training, training.stop

    @property
    def stops_soon(self) -> bool:
        return self._training.stepping


def _line(done: TrainStep, losses: Sequence[float]) -> str:
    """A step, with the mean of the losses since the last such line."""
    of = f" (mean of {len(losses)})" if len(losses) > 1 else ""
    words = [f"step {done.step} of {done.total}", f"loss {sum(losses) / len(losses):.4f}{of}", f"{done.seconds:.1f} s"]
    if done.validation is not None:
        words.append(f"held out {done.validation:.4f}")
    if done.step < done.total:
        words.append(f"about {duration(done.left)} left")
    return ", ".join(words)


def _check_output(out: Path, resume: bool) -> None:
    """Raise UsageError where a run would be overwritten; before anything is read."""
    there = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not there.is_dir():
        raise UsageError(f"{there} is a file; give a new folder")
    if not os.access(there, os.W_OK):
        raise UsageError(f"{there} may not be written to; give a folder elsewhere")
    found = [folder for folder in (out, *(out / side for side in SIDES)) if (folder / RECIPE).exists()]
    if found and not resume:
        told = parse_json((found[0] / RECIPE).read_text()).get("model")
        raise UsageError(
            f"{out} holds a training run of {told}; --resume goes on with it, another --output begins a new one"
        )
    names = sorted(one.name for one in out.iterdir()) if out.is_dir() and not found else []
    if others := [name for name in names if name not in OURS and not name.startswith(DRAWN)]:
        raise UsageError(f"{out} exists and holds no training run, but {', '.join(others[:3])}; give a new folder")
    if resume and not found:
        write(f"{out} holds no training run yet: it begins", "note: ")


def _prompts(path: Path | None) -> list[str]:
    if path is None:
        return []
    found = [line.strip() for line in read_text(path, "--sample-prompts").splitlines() if line.strip()]
    if not found:
        raise UsageError(f"--sample-prompts {path} is empty, expected a prompt a line")
    return found


def _tell(
    data: DataSet,
    trained: list[TrainingClip],
    held_out: list[TrainingClip],
    plan: TrainingPlan,
    recipe: Recipe,
    loras: int,
    named: int | None = None,
) -> None:
    """Notes, of each kind at most ``named``; the clips by size; and what ``loras``, one after the other, need."""
    for note in data.told(named):
        write(note, "note: ")
    sizes = Counter((clip.width, clip.height, len(clip.frames)) for clip in trained)
    shown = [f"{count} of {width}x{height}, {frames} frame{'s' * (frames > 1)}"
             for (width, height, frames), count in sorted(sizes.items())]  # fmt: skip
    shown[4:] = [f"{len(shown) - 4} more sizes"] * (len(shown) > 4)
    with_repeats = sum(clip.repeats for clip in trained)
    repeats = f" ({with_repeats} with repeats)" * (with_repeats != len(trained))
    write(f"{len(trained)} clips to train{repeats}, {len(held_out)} held out: {'; '.join(shown)}")
    how = "blocks streamed from disk" if plan.stream else "blocks resident"
    if plan.encoding > plan.steps:
        how = f"while the clips are encoded; then {size(plan.steps)}, {how}"
    fits = "" if plan.fits else f", more than the {size(plan.budget)} that are free to use"
    each = "s" * (recipe.steps > 1) + f" for each of {loras} LoRAs" * (loras > 1)
    write(f"{plan.trained / 1e6:.1f} million numbers trained; about {size(plan.peak)} ({how}; an estimate){fits}; "
          f"{plan.flop / 1e12:.3g} TFLOP a step, {recipe.steps} step{each}")  # fmt: skip
    if plan.seconds is not None:
        whole = duration(plan.seconds * recipe.steps * loras)
        write(f"about {duration(plan.seconds)} a step here, {whole} in all, without encoding the clips")
