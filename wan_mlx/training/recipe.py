"""How a LoRA is trained: the settings of a run, checked, and all its chance as functions of (seed, step).

Because nothing draws from a running generator, a run that goes on from a kept state is the same, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from ..errors import UsageError, nearest
from ..option import Limits
from ..presets import Preset
from .factors import TARGETS

# What chance is drawn for.
ORDER, NOISE, TIMESTEPS, CAPTIONS, DROPPED, HELD_OUT, PRESERVED, GIVEN, WORDS = range(9)
SCHEDULES: dict[str, Callable[[float], float]] = {  # share of the steps after the warm-up → share of the rate
    "constant": lambda share: 1.0,
    "linear": lambda share: 1.0 - share,
    "cosine": lambda share: 0.5 * (1 + math.cos(math.pi * share)),
}
OPTIMIZERS = ("adamw", "adam", "lion", "adafactor", "sgd")


def _uniform(u: np.ndarray, shift: float) -> np.ndarray:
    return u


def _sigmoid(u: np.ndarray, shift: float) -> np.ndarray:
    """Sigmoid of a normal number: the quantile function of the normal, by bisection of the error function."""
    return 1 / (1 + np.exp(-_normal_quantile(u)))


def _shifted(u: np.ndarray, shift: float) -> np.ndarray:
    sigma = _sigmoid(u, shift)
    return shift * sigma / (1 + (shift - 1) * sigma)


def _uniform_shifted(u: np.ndarray, shift: float) -> np.ndarray:
    return shift * u / (1 + (shift - 1) * u)


def _normal_quantile(u: np.ndarray) -> np.ndarray:
    low, high = np.full_like(u, -8.0), np.full_like(u, 8.0)
    erf = np.vectorize(math.erf, otypes=[np.float64])
    for _ in range(60):
        middle = (low + high) / 2
        below = (1 + erf(middle / math.sqrt(2))) / 2 < u
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2


def _share_below(sampling: Callable[[np.ndarray, float], np.ndarray], shift: float, level: float) -> float:
    """The share of drawn levels that are below one."""
    low, high = 0.0, 1.0
    for _ in range(60 if 0 < level < 1 else 0):
        middle = (low + high) / 2
        below = sampling(np.array([middle]).clip(1e-6, 1 - 1e-6), shift)[0] < level
        low, high = (middle, high) if below else (low, middle)
    return float(level >= 1) if not 0 < level < 1 else (low + high) / 2


# Names of other trainers: uniform numbers → noise levels sigma in (0, 1).
TIMESTEP_SAMPLING = {
    "uniform": _uniform, "sigmoid": _sigmoid, "shift": _shifted, "uniform-shift": _uniform_shifted,
}  # fmt: skip


SUPPORTED = ("t2v", "i2v", "flf2v", "ti2v")  # tasks of the models whose LoRAs are trained

# Where a model's defaults differ: nano learns in minutes on a CPU.
OF_MODELS: dict[str, dict[str, Any]] = {
    "nano": {
        "rank": 8, "steps": 1400, "learning_rate": 3e-3, "schedule": "cosine", "warmup": 10, "batch": 2,
        "timesteps": "uniform-shift", "save_every": 50, "caption_dropout": 0.0,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """The settings of a training run.

    Attributes:
        rank: of the factors.
        alpha: the layers add ``alpha / rank`` times their factors' product; None: the rank.
        targets: which layers (`factors.TARGETS`).
        steps: optimiser steps.
        learning_rate: after the warm-up, before ``schedule`` lowers it.
        schedule: "constant", "linear" or "cosine".
        warmup: steps in which the rate rises from 0.
        optimizer: one of `OPTIMIZERS`; moments are float32.
        weight_decay: of adamw, adafactor and lion.
        clip: the largest norm of all gradients together; 0: any.
        batch, accumulate: their product is the number of clips of a step.
        timesteps: how noise levels are drawn (`TIMESTEP_SAMPLING`); those of one step are spread evenly.
        shift: of "shift" and "uniform-shift".
        preserve: the share of clips that are trained to be, without the trigger in their caption, what the model made
            of them before; where it is not 0, clips without a caption are, too.
        preserve_words: words of the model's, with commas, of which one stands in the trigger's place in such a caption.
        given_frame: TI2V's: the share of clips whose first frame is given.
        caption_dropout: the share of clips that are trained without their caption.
        dropout: the share of a factor's ranks that a step leaves out.
        seed: of all chance.
        save_every: steps between kept states and checkpoints.
        sample_every: steps between sample videos.
    """

    rank: int = 32
    alpha: float | None = None
    targets: str = "all"
    steps: int = 1500
    learning_rate: float = 1e-4
    schedule: str = "constant"
    warmup: int = 20
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    clip: float = 1.0
    batch: int = 1
    accumulate: int = 1
    timesteps: str = "shift"
    shift: float = 3.0
    preserve: float = 0.0
    preserve_words: str = ""
    given_frame: float = 0.0
    caption_dropout: float = 0.05
    dropout: float = 0.0
    seed: int = 0
    save_every: int = 250
    sample_every: int = 250

    @classmethod
    def of(cls, preset: Preset, **given: Any) -> Recipe:
        """A model's own defaults, with what is given in their place."""
        return cls(**{**OF_MODELS.get(preset.name, {}), **given})

    # What may change when a run goes on: the rest would make it another run.
    FREE = ("steps", "save_every", "sample_every")

    def __post_init__(self):
        for name, limits in LIMITS.items():
            value = getattr(self, name)
            if name == "alpha" and value is None:
                continue
            if not isinstance(value, (int, float)):
                raise ValueError(f"{name.replace('_', ' ')} is {value!r}, expected a number")
            whole = isinstance(getattr(type(self), name), int)
            if isinstance(value, bool) or (whole and not isinstance(value, int)) or value not in limits:
                kind = "a whole number, " if whole else ""
                raise ValueError(f"{name.replace('_', ' ')} is {value!r}, expected {kind}{limits}")
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                shown = ", ".join(choices)
                raise ValueError(f"{name} is {value!r}, expected one of {shown}{nearest(str(value), choices)}")
        if not isinstance(self.preserve_words, str):
            raise ValueError(f"preserve words is {self.preserve_words!r}, expected text, such as 'red,blue'")
        if self.preserve_words and not self.preserve:
            raise ValueError(f"preserve words is {self.preserve_words!r}, but preserve is 0, so that no clip has them; "
                             "give --preserve 0.3, or leave them out")  # fmt: skip

    def check(self, preset: Preset, trigger: str, samples: bool = False) -> None:
        """Whether a model can be trained so; ``samples``: with prompts for sample videos.

        Raises:
            ValueError: the model is of a kind whose LoRAs are not trained here.
            UsageError: a setting has no effect, or cannot be.
        """
        if preset.task not in SUPPORTED:
            raise ValueError(f"{preset.name} is a {preset.task} model, whose LoRAs are not trained here; "
                             f"models for {', '.join(SUPPORTED)} are")  # fmt: skip
        if self.preserve and not trigger:
            raise UsageError(f"preserve is {self.preserve:g}, which is of captions without the trigger, but none was "
                             "given; give --trigger WORD")  # fmt: skip
        if self.given_frame and preset.task != "ti2v":
            raise UsageError(f"given frame is {self.given_frame:g}, which only TI2V is trained with; "
                             f"{preset.name} is a {preset.task} model: leave it out")  # fmt: skip
        if samples and preset.task in ("i2v", "flf2v"):
            raise UsageError(f"sample prompts were given, but {preset.name} makes no video of a prompt alone; leave "
                             "them out")  # fmt: skip

    @property
    def scale(self) -> float:
        return (self.rank if self.alpha is None else self.alpha) / self.rank

    @property
    def clips(self) -> int:
        """Clips of one step."""
        return self.batch * self.accumulate

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Lines about settings, of those that may not change, that another run's ``as_json`` has otherwise.

        One that it lacks, because it was started by an older version, had its default.
        """
        own, other = self.as_json(), {field.name: field.default for field in fields(self)} | other
        return [
            f"{name} is {value!r}, it was started with {other[name]!r}"
            for name, value in own.items()
            if name not in self.FREE and value != other[name]
        ]

    # Chance

    def chance(self, what: int, *place: int) -> np.random.Generator:
        """A generator for one purpose at one place, such as a step and the number of its clip."""
        return np.random.default_rng([self.seed, what, *place])

    def order(self, step: int, count: int) -> list[int]:
        """Numbers of the step's clips, of ``count``: all of them, in a drawn order, before one comes again."""
        places = range(step * self.clips, (step + 1) * self.clips)
        rounds = {place // count: None for place in places}
        shuffled = {one: self.chance(ORDER, one).permutation(count) for one in rounds}
        return [int(shuffled[place // count][place % count]) for place in places]

    def sigmas(self, step: int, low: float = 0.0, high: float = 1.0) -> list[float]:
        """Noise levels of the step's clips, spread evenly over those from ``low`` to ``high``, in drawn order."""
        chance, sampling = self.chance(TIMESTEPS, step), TIMESTEP_SAMPLING[self.timesteps]
        u = chance.permutation((np.arange(self.clips) + chance.uniform(size=self.clips)) / self.clips)
        first, last = (_share_below(sampling, self.shift, level) for level in (low, high))
        return sampling((first + u * (last - first)).clip(1e-6, 1 - 1e-6), self.shift).tolist()

    def without_caption(self, step: int) -> list[bool]:
        return (self.chance(CAPTIONS, step).uniform(size=self.clips) < self.caption_dropout).tolist()

    def preserved(self, step: int) -> list[bool]:
        """Which of the step's clips `preserve` takes: as evenly as can be, from a drawn one on."""
        places = self.chance(PRESERVED).uniform() + self.preserve * np.arange(
            step * self.clips, (step + 1) * self.clips + 1
        )
        return (np.diff(np.floor(places)) > 0).tolist()

    def words(self) -> list[str]:
        """Those of `preserve_words`; none is an empty one, which stands for no word."""
        return [word.strip() for word in self.preserve_words.split(",")]

    def word(self, step: int, number: int) -> str:
        """The word in the trigger's place in a preserved clip's caption."""
        return str(self.chance(WORDS, step, number).choice(self.words()))

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        share = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * SCHEDULES[self.schedule](min(1.0, share))


LIMITS = {
    "rank": Limits(1, 1024), "alpha": Limits(0, above=True), "steps": Limits(1, 1_000_000),
    "learning_rate": Limits(0, 1, above=True),
    "warmup": Limits(0, 1_000_000), "weight_decay": Limits(0, 1), "clip": Limits(0), "batch": Limits(1, 1024),
    "accumulate": Limits(1, 1024), "shift": Limits(0, 100, above=True), "caption_dropout": Limits(0, 1),
    "preserve": Limits(0, 1, below=True), "given_frame": Limits(0, 1),
    "dropout": Limits(0, 1, below=True), "seed": Limits(0, 2**63 - 1), "save_every": Limits(1),
    "sample_every": Limits(1),
}  # fmt: skip
CHOICES = {
    "schedule": tuple(SCHEDULES),
    "optimizer": OPTIMIZERS,
    "timesteps": tuple(TIMESTEP_SAMPLING),
    "targets": tuple(TARGETS),
}
