"""The parts of a model, as values, and whether they belong together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import WeightsError
from ..models.configs import NUM_TRAIN_TIMESTEPS
from ..presets import EXPERTS, MODULE, NETWORKS, OPTIONAL, PARTS
from ..storage import fingerprint
from .component import ComponentWeights, open_component
from .configs import network_config

# Kind of part → its size and the transformer's that must be the same, and words for it.
FITS = {
    "text_encoder": ("dim", "text_dim", "a text encoder {} wide"),
    "vae": ("z_dim", "out_dim", "a VAE of {} latent channels"),
    "image_encoder": ("dim", "image_dim", "an image encoder {} wide"),
    "audio_encoder": ("dim", "audio_dim", "an audio encoder {} wide"),
}
# Kinds of transformers that are released in pairs alone.
HALVES = {("i2v", False, 16): "an image-to-video model (I2V-A14B)", ("control", False, 16): "Fun-A14B-Control"}


@dataclass(frozen=True)
class Part:
    """One network of a model, or its tokenizer.

    Attributes:
        name: unique in the model. The only part of a kind has the kind's name.
        kind: "transformer", "text_encoder", "vae", "image_encoder", "audio_encoder" or "tokenizer".
        file: its path; for shards, of the index.
        config: entries of config.json that its weights' shapes cannot show.
        quantize: the quantisation to load it in, if different from the whole model's.
        loras: path and strength of each LoRA for this part, in addition to the whole model's.
        metadata: of the file, told by the config.json beside it.
        module: a file of tensors that this transformer has besides, VACE's.
        timesteps: (a, b): a transformer that is the expert for the timesteps a <= t < b.
    """

    name: str
    kind: str
    file: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    quantize: str | None = None
    loras: tuple[tuple[Path, float], ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    module: Path | None = None
    timesteps: tuple[float, float] = (0.0, math.inf)

    def open(self) -> ComponentWeights:
        """Its weights; WeightsError if the file holds no such network."""
        return open_component(self.file, self.kind, self.module, self.metadata)

    @property
    def label(self) -> str:
        """Its name for people."""
        return self.name.replace("_", " ")

    def serves(self, timestep: float) -> bool:
        """Whether this expert serves a timestep."""
        first, end = self.timesteps
        return first <= timestep < end


@dataclass(frozen=True)
class Checkpoint:
    """A local model: its parts.

    ``parts`` has all kinds in `PARTS`, but those in `OPTIONAL` only if the model reads images, or hears.
    ``model`` is the preset's name, and ``boundary`` as of a `Preset`, if the folder records it. ``others``: what was
    said of files of other models.
    """

    path: Path
    parts: tuple[Part, ...] = ()
    model: str | None = None
    layout: str = "single files"
    others: tuple[str, ...] = ()
    boundary: float | None = None

    @property
    def has_experts(self) -> bool:
        return any(part.name in EXPERTS for part in self.parts)

    def with_experts(self, **fields: tuple[Any, Any]) -> Checkpoint:
        """The model with fields of its experts changed: the high-noise one's, then the low-noise one's.

        Raises:
            ValueError: it has one transformer.
        """
        if not self.has_experts:
            of_two = " and ".join(f"{name}_high or {name}_low" for name in fields)
            raise ValueError(f"{self.path} has one transformer, and {of_two} was given, which is for one of two "
                             f"experts; give {' and '.join(fields)}")  # fmt: skip
        changed = [
            replace(part, **{name: values[EXPERTS.index(part.name)] for name, values in fields.items()})
            if part.name in EXPERTS else part
            for part in self.parts
        ]  # fmt: skip
        return replace(self, parts=tuple(changed))

    def divided(self, boundary: float) -> Checkpoint:
        """The model with its experts at a boundary, as of a `Preset`; ValueError if it has one transformer."""
        if not self.has_experts:
            raise ValueError(f"boundary is {boundary:g}, but {self.path} has one transformer, which serves all "
                             "timesteps; leave it out")  # fmt: skip
        at = boundary * NUM_TRAIN_TIMESTEPS
        return replace(self.with_experts(timesteps=((at, math.inf), (0.0, at))), boundary=boundary)

    def of_kind(self, kind: str) -> list[Part]:
        """The parts of one kind, in order."""
        return [part for part in self.parts if part.kind == kind]

    def part(self, kind: str) -> Part:
        """The first part of a kind; WeightsError if there is none."""
        for part in self.of_kind(kind):
            return part
        raise WeightsError(f"{self.path} holds no {kind}, only {', '.join(self.files)}")

    @property
    def files(self) -> dict[str, Path]:
        """A part's name → its file."""
        files = [(part.name, part.file) for part in self.parts]
        return dict(files + [(MODULE, part.module) for part in self.parts if part.module])

    def missing(self) -> list[str]:
        """The kinds of parts that are missing."""
        names = {part.name for part in self.parts}
        one_expert = sum(name in EXPERTS for name in names) == 1
        lacking = [name for name in EXPERTS if one_expert and name not in names]
        lacking += [kind for kind in PARTS if not self.of_kind(kind)]
        reads = {"image_encoder": self._reads_images, "audio_encoder": self._hears}
        return [kind for kind in lacking if kind not in OPTIONAL or any(map(reads[kind], self.parts))]

    def _reads_images(self, part: Part) -> bool:
        if part.kind != "transformer":
            return False
        if self.layout == "diffusers":  # config.json has the width of the image features, or None
            return part.config.get("image_dim") is not None
        if "model_type" in part.config and part.name not in EXPERTS:  # Wan2.2's is i2v, and reads none
            has_clip = part.config.get("image_dim", 0) is not None  # None in a folder of ours alone
            return part.config["model_type"] in ("i2v", "flf2v") and has_clip
        return "img_emb.proj.1.weight" in part.open().shapes

    def _hears(self, part: Part) -> bool:
        if part.kind != "transformer":
            return False
        if "model_type" in part.config:
            return part.config["model_type"] == "s2v"
        return self.layout != "diffusers" and "casual_audio_encoder.weights" in part.open().shapes


def check_fit(parts: Iterable[Part]) -> None:
    """Raise WeightsError if one is no whole network of Wan, or makes what a transformer among them cannot take, or is
    one of two experts without the other."""
    check_sizes([(part, network_config(part.open(), part.config)) for part in parts if part.kind in NETWORKS])


def check_sizes(sizes: Sequence[tuple[Part, Any]]) -> None:
    """`check_fit` of parts with their sizes."""
    for transformer, config in sizes:
        if transformer.kind != "transformer":
            continue
        if transformer.name not in EXPERTS and config.kind in HALVES:
            raise WeightsError(
                f"{transformer.file} is one of the two experts of {HALVES[config.kind]}; give both, as "
                f"{flag_of(EXPERTS[0])} FILE and {flag_of(EXPERTS[1])} FILE"
            )
        for part, other in sizes:
            reads = {"image_encoder": config.has_image_branch, "audio_encoder": config.hears}
            if part.kind not in FITS or not reads.get(part.kind, True):
                continue
            made, taken, words = FITS[part.kind]
            if (width := getattr(other, made)) != (wanted := getattr(config, taken)):
                raise WeightsError(
                    f"{part.file}: {words.format(width)}, where the transformer {transformer.file} takes {wanted}; "
                    f"give the one of its model as {flag_of(part.kind)}"
                )


def check_experts(parts: Iterable[Part]) -> None:
    """Raise WeightsError, before weights are read, if two experts are not those of one model."""
    experts = [part for part in parts if part.name in EXPERTS]
    if len(experts) < 2:
        return
    first, second = experts
    if first.file.resolve() == second.file.resolve():
        raise WeightsError(f"both experts are {first.file}; a model of two has two files: give the other one, too")
    sizes, others = (vars(network_config(part.open(), part.config)) for part in experts)
    if differing := [name for name, value in sizes.items() if value != others[name]]:
        what = ", ".join(f"{name} {sizes[name]} and {others[name]}" for name in differing)
        raise WeightsError(f"{first.file} and {second.file} are not the two experts of one model: their sizes differ, "
                           f"{what}")  # fmt: skip
    if _are_equal(first, second):
        raise WeightsError(f"{first.file} and {second.file} are equal; a model of two experts has two that differ: one "
                           "of them is a copy of the other")  # fmt: skip


def _are_equal(first: Part, second: Part) -> bool:
    """Whether two files are copies, by samples: of their bytes, and if those are equal the first row of each matrix."""
    if any(fingerprint(first.file)[key] != fingerprint(second.file)[key] for key in ("size", "sha256")):
        return False
    one, other = first.open(), second.open()
    matrices = (name for name, shape in one.shapes.items() if len(shape) == 2 and len(one.sources[name]) == 1)
    row = np.zeros(1, int)
    return all(mx.array_equal(one.rows(name, row), other.rows(name, row)).item() for name in matrices)


def flag_of(part: str) -> str:
    """The flag that gives a part apart."""
    return "--" + part.replace("_", "-")
