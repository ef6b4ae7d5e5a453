"""The training loop: a data set and a recipe → a LoRA, as an iteration over its steps."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from ..errors import UsageError, WanError, nearest
from ..events import Listener, counted, unheard
from ..lasting import yields_computed
from ..mac import awake
from ..models.execution import Execution
from ..pipeline import WanPipeline
from ..storage import DRAWN, append, fingerprint, locked, parse_json, whole_file
from ..weights.load import load_transformer
from ..weights.lora import file_of
from ..weights.parts import Checkpoint, Part
from ..weights.set_loras import set_loras
from .backward import Sample, loss, loss_and_gradients
from .batches import Batches, levels_of
from .dataset import TrainingClip
from .encoded import Encoded
from .factors import Factors, layer_shapes, new_factors
from .lora_file import write_lora
from .optimizer import gradient_norm, make_optimizer, update
from .plot import plot_losses
from .ranks import Ranks
from .recipe import DROPPED, Recipe
from .states import State, newest_state, save_state

NOTHING = 1e-9  # of a factor: no weight is changed by it
RECIPE, LOG = "recipe.json", "log.jsonl"
SIDES = ("high", "low")  # the experts of a model of two, in the order in which they serve


class TrainingError(WanError):
    """Training cannot go on; what was kept is whole."""


@dataclass(frozen=True)
class TrainStep:
    """One step of training.

    Attributes:
        step: its number, from 1; ``total``: of all.
        loss: mean squared error of the velocity, over the step's clips.
        norm: of all gradients together, before they are clipped.
        rate: the learning rate.
        seconds: that it took.
        left: seconds to the end, by the mean of the run's steps with all that happens between them.
        validation: the loss of held-out clips after it, where it was measured.
        kept: the LoRA's file, where it was written.
    """

    step: int
    total: int
    loss: float
    norm: float
    rate: float
    seconds: float
    validation: float | None = None
    kept: Path | None = None
    left: float = 0.0


class Training:
    """One LoRA in training, in a folder of its own.

    ``folder`` gets ``NAME.safetensors`` (the LoRA, NAME being the folder's), ``checkpoints/``, ``state/``, ``cache/``,
    ``samples/``, ``log.jsonl``, ``losses.png`` and ``recipe.json``. A model of two experts has a LoRA for each, which
    are trained one after the other, in folders of the experts' names within ``folder``.

    Of several processes that train together the first writes; the others read the same folder, or on other machines
    one that has nothing but ``cache/``.

    Attributes:
        stream: read the model's blocks from disk in each pass, forward and backward.
        encode_tile: (width, height) in pixels of the tiles in which the VAE encodes clips; None: as the model does.
        sample_prompts: prompts of which each gets a video in ``samples/`` every ``sample_every`` steps.
        newest: the newest file of the LoRA that this run wrote.
        stepping: whether its steps are under way: data are encoded, the model is loaded.
    """

    def __init__(
        self,
        opened: WanPipeline,
        clips: Sequence[TrainingClip],
        recipe: Recipe,
        folder: str | Path,
        held_out: Sequence[TrainingClip] = (),
        trigger: str = "",
        listener: Listener = unheard,
        expert: str = "",
    ):
        """Args:
            clips: what is trained, and ``held_out`` what the validation's loss is of.
            trigger: the word by which the LoRA is called, for the file's metadata.
            expert: of a model of two experts which one: "high" or "low".

        Raises:
            ValueError: the model is of a kind whose LoRAs are not trained here, or has no such expert.
        """
        recipe.check(opened.preset, trigger)
        self.part, self.expert = part_of(opened.checkpoint, expert), expert
        self.opened, self.recipe, self.folder, self.trigger = opened, recipe, Path(folder), trigger
        self.cache = self.folder / "cache"
        if expert:
            self.folder /= expert
        self.clips = [clip for clip in clips for _ in range(clip.repeats)]
        self.held_out, self.listener = list(held_out), listener
        self.ranks = Ranks()
        self.shapes = layer_shapes(opened.config, recipe.targets)
        self._data, self._base = self._data_sum(), self._base_sum()
        self.factors: Factors = {}
        self.losses: list[float] = []
        self.validations: list[tuple[int, float]] = []
        self.stream = False
        self.encode_tile: tuple[int, int] | None = None
        self.sample_prompts: list[str] = []
        self.newest: Path | None = None
        self.stepping = False
        self._asked_to_stop, self._kept_at = False, 0

    @property
    def path(self) -> Path:
        """The LoRA's file."""
        name = self.folder.resolve()
        return self.folder / f"{f'{name.parent.name}-{name.name}' if self.expert else name.name}.safetensors"

    def stop(self) -> None:
        """End after the step that is under way; its state is kept."""
        self._asked_to_stop = True

    @yields_computed
    def run(self, resume: bool = False) -> Generator[TrainStep, None, None]:
        """Train; with ``resume`` go on from the newest state in the folder, bit for bit, or begin if there is none.

        Raises:
            UsageError: the folder has a run and ``resume`` is False, or another recipe.
            TrainingError: a loss or gradient is not finite.
        """
        with ExitStack() as held:
            held.enter_context(awake(self.opened.caffeinate))
            state = self.ranks.first_does(lambda: self._open(held, resume))
            is_done = state is not None and state[0] == self.recipe.steps and self.path.exists()
            if not self.ranks.any_asks(is_done):
                yield from self._steps(state)

    def _open(self, held: ExitStack, resume: bool) -> State | None:
        """Lock the folder, and read the state to go on from."""
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"{self.folder} is a file; give a new folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        if not held.enter_context(locked(self.folder)):
            raise UsageError(f"another process trains in {self.folder}; wait until it ends, or give a new folder")
        state = self._begin(resume)
        own = () if self.expert else (self.cache,)  # of two experts both may be encoding
        for folder in (self.folder, *own, *(self.folder / name for name in ("checkpoints", "state", "samples"))):
            for path in folder.glob(f"{DRAWN}*"):
                path.unlink()  # left by a kill while it was written
        return state

    def _steps(self, state: State | None) -> Generator[TrainStep, None, None]:
        recipe, ranks = self.recipe, self.ranks
        batches = self._encode()
        with ranks.meeting():
            model = load_transformer(
                self.part, self.opened.dtype, counted(self.listener, f"loading {self.part.label}"),
                self.part.quantize or self.opened.quantize, stream=self.stream,
                loras=self._own_loras, merge=not self.sample_prompts,
            )  # fmt: skip
            model = model if isinstance(model, Execution) else Execution(model)
        step, optimizer = self._set_out(state)
        self._kept_at = step
        ranks.first_does(lambda: self._read_log(step))
        if step == 0:
            ranks.first_does(lambda: self._validate(0, model, batches))
        self.stepping, first, begun = True, step, time.perf_counter()
        while step < recipe.steps and not ranks.any_asks(self._asked_to_stop):
            started = time.perf_counter()
            kept_ranks = self._with_ranks(step)
            with ranks.meeting():
                samples, names = batches.of_step(step, ranks.rank, ranks.size)
                losses, gradients = loss_and_gradients(model, kept_ranks(self.factors), samples, recipe.scale)
            # In one order, in which sums over all of them are taken: a file's is another than that of new factors.
            gradients = ranks.mean_gradients(kept_ranks(dict(sorted(gradients.items()))))
            norm = gradient_norm(gradients)
            self._check(step, losses, norm, names, samples)
            optimizer.learning_rate = mx.array(recipe.rate(step))
            update(optimizer, gradients, self.factors, norm, recipe.clip)
            step += 1
            now = time.perf_counter()
            left = (now - begun) / (step - first) * (recipe.steps - step)
            done = TrainStep(step, recipe.steps, ranks.mean(float(np.mean(losses))), norm, recipe.rate(step - 1),
                             now - started, left=left)  # fmt: skip
            with ranks.meeting():
                yield self._ended(done, model, batches, optimizer) if ranks.is_first else done
        if not ranks.is_first:
            return
        if step > self._kept_at:  # asked to stop while the step's event was heard
            self._keep(step, optimizer)
        elif step == recipe.steps and self.newest is None:  # nothing was left to train
            self._write(step)

    def _encode(self) -> Batches:
        """Put latents and texts on disk: the first process does, and others where they see another disk."""
        encoded = Encoded(self.opened, self.cache)
        batches = Batches(encoded, self.recipe, self.clips, self.held_out, self.trigger, levels_of(self.part.timesteps),
                          may_be_given=self.opened.preset.task == "ti2v")  # fmt: skip
        texts = batches.captions()
        if self.sample_prompts:
            texts += [*self.sample_prompts, self.opened.preset.negative_prompt]

        def prepare() -> None:
            opened, tiling = self.opened, self.opened.vae_tiling
            opened.vae_tiling = self.encode_tile or tiling
            try:
                encoded.prepare([*self.clips, *self.held_out], texts, self.listener)
            finally:
                opened.vae_tiling = tiling

        self.ranks.first_does(prepare)
        if not self.ranks.is_first:
            prepare()
        return batches

    def _set_out(self, state: State | None) -> tuple[int, optim.Optimizer]:
        """The step to go on from and the optimiser, in all processes as in the first."""
        optimizer = make_optimizer(self.recipe)
        step, self.factors, moments = state or (0, new_factors(self.shapes, self.recipe.rank, self.recipe.seed), None)
        optimizer.init(self.factors)
        if moments:
            optimizer.state.update(moments)
        self.factors, optimizer.state = self.ranks.of_first(self.factors), self.ranks.of_first(optimizer.state)
        return int(self.ranks.of_first(mx.array(step)).item()), optimizer

    def _begin(self, resume: bool) -> State | None:
        """The state to go on from; None for a new run, whose recipe is written."""
        machines = self.ranks.size
        if self.recipe.clips % machines:
            raise UsageError(
                f"a step has {self.recipe.clips} clips (batch x accumulate), which {machines} processes cannot share "
                f"evenly; nearest: {max(1, round(self.recipe.clips / machines)) * machines}"
            )
        self.recipe.check(self.opened.preset, self.trigger, bool(self.sample_prompts))
        told = {
            "recipe": self.recipe.as_json(), "model": self.opened.preset.name, "data": self._data,
            "trigger": self.trigger, "dtype": self.opened.dtype, "quantize": self.opened.quantize, "base": self._base,
        }  # fmt: skip
        path = self.folder / RECIPE
        if path.exists():
            before = parse_json(path.read_text())
            if not resume:
                raise UsageError(
                    f"{self.folder} holds a training run; --resume goes on with it, --output names another folder"
                )
            lines = self.recipe.differences(before["recipe"])
            for name in ("model", "trigger", "dtype", "quantize"):
                if before.get(name) != told[name]:
                    lines.append(f"{name} is {told[name]!r}, it was started with {before.get(name)!r}")
            if before.get("base", self._base) != self._base:  # older versions did not note it
                lines.append("the base is another one: the transformer's file, or a LoRA that it has")
            if before.get("data") != self._data:
                lines.append("the clips are others: a file, a caption, --size, --frames or --validate has changed")
            if lines:
                raise UsageError(f"{self.folder} was begun otherwise: {'; '.join(lines)}")
        elif self.folder.is_dir() and any(
            one.name != "cache" and not one.name.startswith(DRAWN) for one in self.folder.iterdir()
        ):
            raise UsageError(f"{self.folder} exists and holds no training run; give a new folder")
        state = newest_state(self.folder / "state")
        if state and state[0] > self.recipe.steps:
            raise UsageError(
                f"steps is {self.recipe.steps}, but {self.folder} has {state[0]} already; nearest: {state[0]}"
            )
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(told, indent=2))
        return state

    def _data_sum(self) -> str:
        """A hash of the clips, by what their files hold, and captions."""
        clips = [*self.clips, *self.held_out]
        held = {path: fingerprint(path)["sha256"] for path in {clip.path for clip in clips}}
        rows = [
            (clip.path.name, held[clip.path], clip.caption, clip.frames, clip.width, clip.height) for clip in clips
        ]
        return sha256(json.dumps(rows).encode()).hexdigest()[:16]

    def _base_sum(self) -> str:
        """A hash of the transformer's file, and of the LoRAs that it has."""
        loras = [(fingerprint(file_of(path))["sha256"], strength) for path, strength in self._own_loras]
        told = [fingerprint(self.part.file)["sha256"], loras]
        return sha256(json.dumps(told).encode()).hexdigest()[:16]

    @property
    def _own_loras(self) -> list[tuple[Path, float]]:
        return [*self.opened.loras, *self.part.loras]

    def _with_ranks(self, step: int) -> Callable[[Factors], Factors]:
        """Leaves some ranks of every factor out of this step; what is left is made larger in turn."""
        share, rank = self.recipe.dropout, self.recipe.rank
        if not share:
            return lambda arrays: arrays
        stay = self.recipe.chance(DROPPED, step).uniform(size=rank) >= share
        mask = mx.array(stay / (1 - share), mx.float32)[:, None]
        return lambda arrays: {
            name: array * mask if name.endswith(".down") else array for name, array in arrays.items()
        }

    def _check(
        self, step: int, losses: Sequence[float], norm: float, names: Sequence[str], samples: Sequence[Sample]
    ) -> None:
        if all(map(math.isfinite, losses)) and math.isfinite(norm):
            return
        number = next((i for i, one in enumerate(losses) if not math.isfinite(one)), 0)
        what = "loss" if not all(map(math.isfinite, losses)) else "gradient"
        raise TrainingError(
            f"the {what} is not finite at step {step + 1} (clip {names[number]}, sigma "
            f"{samples[number].timestep / 1000:.3f}); {self._last_kept()}. Try a lower --learning-rate"
        )

    def _last_kept(self) -> str:
        if not self._kept_at:
            return "no state was kept before"
        return f"the state of step {self._kept_at} is whole"

    def _validate(self, step: int, model: Execution, batches: Batches) -> float | None:
        """The mean loss of the held-out clips, at fixed noise and levels."""
        if not self.held_out:
            return None
        losses = [loss(model, self.factors, samples, self.recipe.scale) for samples in batches.of_validation()]
        found = float(np.mean(losses))
        if not math.isfinite(found):
            clip = self.held_out[next(i for i, row in enumerate(losses) if not np.isfinite(row).all())]
            raise TrainingError(f"the loss of {clip.path.name}, held out, is not finite after step {step}; "
                                f"{self._last_kept()}. Try a lower --learning-rate")  # fmt: skip
        self.validations.append((step, found))
        if step == 0:
            self._log({"step": 0, "validation": round(found, 6)})
        return found

    def _ended(self, done: TrainStep, model: Execution, batches: Batches, optimizer: optim.Optimizer) -> TrainStep:
        """What happens after a step: the log, and where it is time the state, the file and the validation."""
        recipe, step = self.recipe, done.step
        is_last = step == recipe.steps
        self.losses.append(done.loss)
        samples = bool(self.sample_prompts) and (is_last or step % recipe.sample_every == 0)
        keeps = is_last or self._asked_to_stop or samples or step % recipe.save_every == 0
        if keeps:
            done = replace(done, validation=self._validate(step, model, batches))
        row = {
            "step": step, "loss": round(done.loss, 6), "norm": round(done.norm, 6), "rate": done.rate,
            "seconds": round(done.seconds, 3),
        }  # fmt: skip
        if done.validation is not None:
            row["validation"] = round(done.validation, 6)
        self._log(row)
        if keeps:
            done = replace(done, kept=self._keep(step, optimizer))
        if samples:
            self._show(step, model)
        return done

    def _log(self, row: dict[str, Any]) -> None:
        append(self.folder / LOG, (json.dumps(row) + "\n").encode())

    def _keep(self, step: int, optimizer: optim.Optimizer) -> Path:
        """Write LoRA, picture of the losses and state: the last, so that a run that goes on from it has all before."""
        path = self._write(step)
        plot_losses(self.folder / "losses.png", self.losses, self.validations)
        save_state(self.folder / "state", step, self.factors, optimizer.state)
        self._kept_at = step
        return path

    def _show(self, step: int, model: Execution) -> None:
        """Make a video of every sample prompt with the LoRA as it is, by the model that is trained."""
        opened, part, folder = self.opened, self.part, self.folder / "samples"
        folder.mkdir(exist_ok=True)
        assert self.newest is not None, "it was kept just now"
        # Not by a recipe of few steps without guidance, which shows less of a LoRA.
        how: dict[str, Any] = {"steps": opened.preset.sampling.steps} if opened.preset.recipe else {}
        before, trained = (opened.loras, opened.checkpoint), (self.newest, 1.0)
        set_loras(model, [*opened.loras, *part.loras, trained])
        # Where a video's plan streams otherwise, the model is loaded again, with what stands here.
        if self.expert:
            own = [part_of(opened.checkpoint, side).loras for side in SIDES]
            own[SIDES.index(self.expert)] += (trained,)
            opened.checkpoint = opened.checkpoint.with_experts(loras=(own[0], own[1]))
        else:
            opened.loras = [*opened.loras, trained]
        try:
            with opened.keeping(part, model):
                for number, prompt in enumerate(self.sample_prompts, start=1):
                    video = opened(prompt, seed=self.recipe.seed, **how)
                    video.save(folder / f"step-{step:06d}-{number}.mp4")
        finally:
            opened.loras, opened.checkpoint = before
            set_loras(model, [*opened.loras, *part.loras])

    def _write(self, step: int) -> Path:
        is_last = step == self.recipe.steps
        ups = [array for name, array in self.factors.items() if name.endswith(".up")]
        if is_last and not any(mx.any(mx.abs(array) > NOTHING).item() for array in ups):
            raise TrainingError(f"the LoRA changes nothing: its factors are still zero, to {NOTHING:g}; give more "
                                "steps or a higher rate")  # fmt: skip
        path = self.path if is_last else self.folder / "checkpoints" / f"{self.path.stem}-{step:06d}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        recipe = self.recipe
        about = {
            "ss_network_dim": str(recipe.rank), "ss_network_alpha": str(recipe.rank), "ss_steps": str(step),
            "ss_seed": str(recipe.seed), "wan_mlx.expert": self.expert,
            "ss_base_model_version": self.opened.preset.name,
            "modelspec.architecture": f"{self.opened.preset.name}/lora", "modelspec.title": self.path.stem,
            "modelspec.trigger_phrase": self.trigger,
            "modelspec.usage_hint": self.trigger and f"write {self.trigger} in the prompt",
            "wan_mlx.recipe": json.dumps(recipe.as_json()), "wan_mlx.data": self._data,
            "wan_mlx.base": self._base,
        }  # fmt: skip
        self.newest = path
        write_lora(
            path, self.factors, recipe.scale, self.opened.config, {name: text for name, text in about.items() if text}
        )
        return path

    def _read_log(self, step: int) -> None:
        """Losses of the steps before; lines of steps that were not kept are cut."""
        path = self.folder / LOG
        if not path.exists():
            return
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        rows = [row for row in rows if row["step"] <= step and (step or "loss" in row)]
        self.losses = [row["loss"] for row in rows if "loss" in row]
        self.validations = [(row["step"], row["validation"]) for row in rows if "validation" in row]
        with whole_file(path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))


def part_of(checkpoint: Checkpoint, expert: str) -> Part:
    """The transformer that is trained.

    Raises:
        UsageError: a model of two has no such expert, or one of one was asked for one.
    """
    parts = checkpoint.of_kind("transformer")
    if not checkpoint.has_experts:
        if expert:
            raise UsageError(f"expert is {expert!r}, but the model has one transformer; leave it out")
        return parts[0]
    if expert not in SIDES:
        raise UsageError(f"expert is {expert!r}, expected one of {', '.join(SIDES)}{nearest(expert, SIDES)}")
    return next(part for part in parts if part.name == f"{expert}_noise")
