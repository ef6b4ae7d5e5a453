"""Parts of a model: the file of each network, its configuration, and options for loading it."""

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
        name: unique in the model. The only part of a kind has the kind's name.
        kind: "transformer", "text_encoder", "vae", "image_encoder" or "tokenizer".
        file: its path; for shards, of the index.
        config: entries of config.json that its weights' shapes cannot show.
        recorded: the file's quantisation according to config.json; None if it has no entry.
        quantize: the quantisation to load it in, if different from the whole model's.
        loras: path and strength of each LoRA for this part, in addition to the whole model's.
        timesteps: (a, b): a transformer that is the expert for the timesteps a <= t < b.
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
        """Its name for people."""
        return self.name.replace("_", " ")

    def serves(self, timestep: float) -> bool:
        """Whether this expert serves a timestep."""
        first, end = self.timesteps
        return first <= timestep < end
