"""The parts of a model: which file holds each network, what is said of it, and how it is to be loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Part:
    """One network of a model, or its tokenizer.

    Attributes:
        name: tells it from the model's other parts. The only one of a kind is called like the kind.
        kind: "transformer", "text_encoder", "vae", "image_encoder" or "tokenizer".
        file: where it is; the index of shards.
        config: entries of config.json that its weights' shapes cannot tell.
        recorded: the quantisation that config.json says its file has; None if it says nothing.
        quantize: the quantisation to load it in, where that is not the one chosen for the whole model.
        loras: path and strength of each LoRA to use with it, beside those of the whole model.
        timesteps: (a, b), where a transformer is an expert for the timesteps a <= t < b.
    """

    name: str
    kind: str
    file: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    recorded: str | None = None
    quantize: str | None = None
    loras: tuple[tuple[Path, float], ...] = ()
    timesteps: tuple[float, float] = (0.0, math.inf)

    @property
    def label(self) -> str:
        """Its name as people read it."""
        return self.name.replace("_", " ")

    def serves(self, timestep: float) -> bool:
        """Whether it is this expert's timestep."""
        first, end = self.timesteps
        return first <= timestep < end
