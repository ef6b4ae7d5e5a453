"""The training loop: a data set and a recipe → a LoRA, as an iteration over its steps."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from ..errors import UsageError, WanError
from ..events import Listener, counted, unheard
from ..lasting import yields_computed
from ..mac import awake
from ..models.execution import Execution
from ..pipeline import WanPipeline
from ..storage import DRAWN, append, locked, parse_json, whole_file
from ..weights.load import load_transformer
from ..weights.set_loras import set_loras
from .backward import Sample, loss, loss_and_gradients
from .dataset import TrainingClip
from .encoded import Encoded
from .factors import Factors, layer_shapes, new_factors
from .lora_file import write_lora
from .optimizer import gradient_norm, make_optimizer, update
from .plot import plot_losses
from .recipe import NOISE, RANKS, Recipe
from .states import newest_state, save_state

SUPPORTED = ("t2v", "i2v", "flf2v", "ti2v")
VALIDATION_SIGMAS = (0.2, 0.5, 0.8)
VALIDATION = 2**31  # in the place of a step, for the noise of held-out clips
RECIPE, LOG = "recipe.json", "log.jsonl"


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


class Training:
    """One LoRA in training, in a folder of its own.

    ``folder`` gets ``NAME.safetensors`` (the LoRA, NAME being the folder's), ``checkpoints/``, ``state/``, ``cache/``,
    ``samples/``, ``log.jsonl``, ``losses.png`` and ``recipe.json``.

    Attributes:
        stream: read the model's blocks from disk in each pass, forward and backward.
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
    ):
        """Args:
            clips: what is trained, and ``held_out`` what the validation's loss is of.
            trigger: the word by which the LoRA is called, for the file's metadata.

        Raises:
            ValueError: the model is of a kind whose LoRAs are not trained here.
        """
        if opened.preset.task not in SUPPORTED or opened.checkpoint.has_experts:
            kind = "a model of two experts" if opened.checkpoint.has_experts else f"a {opened.preset.task} model"
            raise ValueError(f"{opened.preset.name} is {kind}, whose LoRAs are not trained here; models of one "
                             f"transformer for {', '.join(SUPPORTED)} are")  # fmt: skip
        self.opened, self.recipe, self.folder, self.trigger = opened, recipe, Path(folder), trigger
        self.clips = [clip for clip in clips for _ in range(clip.repeats)]
        self.held_out, self.listener = list(held_out), listener
        self.shapes = layer_shapes(opened.config, recipe.targets)
        self._data = self._data_sum()
        self.factors: Factors = {}
        self.losses: list[float] = []
        self.validations: list[tuple[int, float]] = []
        self.stream = False
        self.sample_prompts: list[str] = []
        self.newest: Path | None = None
        self.stepping = False
        self._asked_to_stop, self._kept_at = False, 0

    @property
    def path(self) -> Path:
        """The LoRA's file."""
        return self.folder / f"{self.folder.resolve().name}.safetensors"

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
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"{self.folder} is a file; give a new folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder) as alone, awake(self.opened.caffeinate):
            if not alone:
                raise UsageError(f"another process trains in {self.folder}; wait until it ends, or give a new folder")
            yield from self._steps(resume)

    def _steps(self, resume: bool) -> Generator[TrainStep, None, None]:
        begun = self._begin(resume)
        encoded = Encoded(self.opened, self.folder / "cache")
        captions = ["", *(clip.caption for clip in (*self.clips, *self.held_out))]
        encoded.prepare([*self.clips, *self.held_out], captions, self.listener)
        if self.sample_prompts:
            encoded.prepare([], [*self.sample_prompts, self.opened.preset.negative_prompt], self.listener)
        (part,) = self.opened.checkpoint.of_kind("transformer")
        model = load_transformer(
            part, self.opened.dtype, counted(self.listener, "loading transformer"),
            part.quantize or self.opened.quantize, stream=self.stream, loras=[*self.opened.loras, *part.loras],
            merge=not self.sample_prompts,
        )  # fmt: skip
        model = model if isinstance(model, Execution) else Execution(model)
        optimizer = make_optimizer(self.recipe)
        step, self.factors, moments = begun or (0, new_factors(self.shapes, self.recipe.rank, self.recipe.seed), None)
        optimizer.init(self.factors)
        if moments:
            optimizer.state.update(moments)
        self._kept_at = step
        self._read_log(step)
        if step == 0 and self.held_out:
            self.validations.append((0, self._validate(model, encoded)))
        self.stepping = True
        while step < self.recipe.steps and not self._asked_to_stop:
            started = time.perf_counter()
            samples, names = self._samples(encoded, step)
            kept_ranks = self._with_ranks(step)
            losses, gradients = loss_and_gradients(model, kept_ranks(self.factors), samples, self.recipe.scale)
            gradients = nn.average_gradients(kept_ranks(gradients))
            norm = gradient_norm(gradients)
            self._check(step, losses, norm, names, samples)
            optimizer.learning_rate = mx.array(self.recipe.rate(step))
            update(optimizer, gradients, self.factors, norm, self.recipe.clip)
            step += 1
            value = float(np.mean(losses))
            self.losses.append(value)
            yield self._ended(step, value, norm, time.perf_counter() - started, model, encoded, optimizer)
        if step > self._kept_at:  # asked to stop while the step's event was heard
            self._keep(step, optimizer)
        elif step == self.recipe.steps and self.newest is None:  # nothing was left to train
            self._write(step)

    def _begin(self, resume: bool) -> Any:
        """The state to go on from; None for a new run, whose recipe is written."""
        machines = mx.distributed.init().size()
        if self.recipe.clips % machines:
            raise UsageError(
                f"a step has {self.recipe.clips} clips (batch x accumulate), which {machines} machines cannot share "
                f"evenly; nearest: {max(1, round(self.recipe.clips / machines)) * machines}"
            )
        if self.sample_prompts and self.opened.preset.task in ("i2v", "flf2v"):
            raise UsageError(f"sample prompts were given, but {self.opened.preset.name} makes no video of a prompt "
                             "alone; leave them out")  # fmt: skip
        told = {
            "recipe": self.recipe.as_json(), "model": self.opened.preset.name, "data": self._data,
            "dtype": self.opened.dtype, "quantize": self.opened.quantize,
        }  # fmt: skip
        path = self.folder / RECIPE
        if path.exists():
            before = parse_json(path.read_text())
            if not resume:
                raise UsageError(
                    f"{self.folder} holds a training run; --resume goes on with it, --output names another folder"
                )
            lines = self.recipe.differences(before["recipe"])
            others = told.keys() - {"recipe"}
            lines += [f"the {name} is another one" for name in sorted(others) if before.get(name) != told[name]]
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
        """A hash of the clips and captions."""
        rows = [
            (clip.path.name, clip.path.stat().st_size, clip.caption, clip.frames, clip.width, clip.height)
            for clip in (*self.clips, *self.held_out)
        ]
        return sha256(json.dumps(rows).encode()).hexdigest()[:16]

    def _samples(self, encoded: Encoded, step: int) -> tuple[list[Sample], list[str]]:
        """The clips of a step, with noise; of several machines this one's."""
        group = mx.distributed.init()
        order, sigmas = self.recipe.order(step, len(self.clips)), self.recipe.sigmas(step)
        bare = self.recipe.without_caption(step)
        chosen = range(group.rank(), self.recipe.clips, group.size())
        clips = [self.clips[order[number]] for number in chosen]
        samples = [
            self._sample(
                encoded,
                clip,
                sigmas[number],
                "" if bare[number] else clip.caption,
                self.recipe.chance(NOISE, step, number),
            )
            for number, clip in zip(chosen, clips, strict=True)
        ]
        return samples, [clip.path.name for clip in clips]

    def _sample(
        self, encoded: Encoded, clip: TrainingClip, sigma: float, caption: str, chance: np.random.Generator
    ) -> Sample:
        latents, conditions = encoded.clip(clip)
        noise = mx.array(chance.standard_normal(latents.shape, np.float32))
        noisy = (1 - sigma) * latents + sigma * noise
        return Sample(noisy, 1000 * sigma, encoded.text(caption), noise - latents, conditions)

    def _with_ranks(self, step: int) -> Callable[[Factors], Factors]:
        """Leaves some ranks of every factor out of this step; what is left is made larger in turn."""
        share, rank = self.recipe.dropout, self.recipe.rank
        if not share:
            return lambda arrays: arrays
        stay = self.recipe.chance(RANKS, step).uniform(size=rank) >= share
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
            f"{samples[number].timestep / 1000:.3f}); the last kept state is whole. Try a lower --learning-rate"
        )

    def _validate(self, model: Execution, encoded: Encoded) -> float:
        """The mean loss of the held-out clips, at fixed noise and levels."""
        found = []
        for place, clip in enumerate(self.held_out):
            samples = [
                self._sample(encoded, clip, sigma, clip.caption, self.recipe.chance(NOISE, VALIDATION, place, i))
                for i, sigma in enumerate(VALIDATION_SIGMAS)
            ]
            found += loss(model, self.factors, samples, self.recipe.scale)
        return float(np.mean(found))

    def _ended(self, step, value, norm, seconds, model, encoded, optimizer) -> TrainStep:
        """What happens after a step: the log, and where it is time the state, the file and the validation."""
        recipe, is_last = self.recipe, step == self.recipe.steps
        done = TrainStep(step, recipe.steps, value, norm, recipe.rate(step - 1), seconds)
        samples = bool(self.sample_prompts) and (is_last or step % recipe.sample_every == 0)
        keeps = is_last or self._asked_to_stop or samples or step % recipe.save_every == 0
        if keeps and self.held_out:
            held_out = self._validate(model, encoded)
            self.validations.append((step, held_out))
            done = replace(done, validation=held_out)
        row = {
            "step": step,
            "loss": round(value, 6),
            "norm": round(norm, 6),
            "rate": done.rate,
            "seconds": round(seconds, 3),
        }
        if done.validation is not None:
            row["validation"] = round(done.validation, 6)
        append(self.folder / LOG, (json.dumps(row) + "\n").encode())
        if keeps:
            done = replace(done, kept=self._keep(step, optimizer))
        if samples:
            self._show(step, model)
        return done

    def _keep(self, step: int, optimizer: optim.Optimizer) -> Path:
        """Write LoRA, picture of the losses and state: the last, so that a run that goes on from it has all before."""
        path = self._write(step)
        plot_losses(self.folder / "losses.png", self.losses, self.validations)
        save_state(self.folder / "state", step, self.factors, optimizer.state)
        self._kept_at = step
        return path

    def _show(self, step: int, model: Execution) -> None:
        """Make a video of every sample prompt with the LoRA as it is, by the model that is trained."""
        (part,), folder = self.opened.checkpoint.of_kind("transformer"), self.folder / "samples"
        folder.mkdir(exist_ok=True)
        assert self.newest is not None, "it was kept just now"
        own, trained = self.opened.loras, (self.newest, 1.0)
        set_loras(model, [*own, trained, *part.loras])
        self.opened.loras = [*own, trained]  # where the video's plan streams otherwise, the model is loaded again
        try:
            with self.opened.keeping(part, model):
                for number, prompt in enumerate(self.sample_prompts, start=1):
                    video = self.opened(prompt, seed=self.recipe.seed)
                    video.save(folder / f"step-{step:06d}-{number}.mp4")
        finally:
            self.opened.loras = own
            set_loras(model, [*own, *part.loras])

    def _write(self, step: int) -> Path:
        is_last = step == self.recipe.steps
        if is_last and not any(mx.any(array).item() for name, array in self.factors.items() if name.endswith(".up")):
            raise TrainingError(
                "the LoRA changes nothing: its factors are still zero; give more steps or a higher rate"
            )
        path = self.path if is_last else self.folder / "checkpoints" / f"{self.path.stem}-{step:06d}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        recipe = self.recipe
        about = {
            "ss_network_dim": str(recipe.rank), "ss_network_alpha": str(recipe.rank), "ss_steps": str(step),
            "ss_seed": str(recipe.seed), "ss_base_model_version": self.opened.preset.name,
            "modelspec.architecture": f"{self.opened.preset.name}/lora", "modelspec.title": self.path.stem,
            "modelspec.trigger_phrase": self.trigger,
            "modelspec.usage_hint": self.trigger and f"write {self.trigger} in the prompt",
            "wan_mlx.recipe": json.dumps(recipe.as_json()), "wan_mlx.data": self._data,
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
        rows = [row for row in rows if row["step"] <= step]
        self.losses = [row["loss"] for row in rows]
        self.validations = [(row["step"], row["validation"]) for row in rows if "validation" in row]
        with whole_file(path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
