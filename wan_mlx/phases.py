"""Phases of a run: guidance, strengths of LoRAs, and the expert, each for a range of timesteps.

They are written as ``965:3.5:0:high,800:1:1:high,0:1:1:low``: down to which timestep a phase goes, its guidance, what
it multiplies the strengths of LoRAs by, and which expert serves it. All but the first may be left out, or empty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

FORM = "FROM:GUIDANCE:LORA:EXPERT, of which the last three may be left out, such as 965:3.5:0:high"
EXPERT_NAMES = {"high": "high_noise", "low": "low_noise"}
TOP = 1000  # the first timestep


@dataclass(frozen=True)
class Phase:
    """One phase.

    Attributes:
        down_to: the lowest timestep that it serves; those above are an earlier phase's.
        guidance: its scale; None for the request's.
        loras: factors of the strengths of LoRAs: one for all, or one for each in the order of `factors`.
        expert: "high_noise" or "low_noise"; "" for the one that the model's boundary says.
    """

    down_to: float
    guidance: float | None = None
    loras: tuple[float, ...] = (1.0,)
    expert: str = ""

    def __str__(self) -> str:
        expert = next((word for word, name in EXPERT_NAMES.items() if name == self.expert), "")
        guidance = "" if self.guidance is None else f"{self.guidance:g}"
        words = [f"{self.down_to:g}", guidance, "/".join(f"{factor:g}" for factor in self.loras), expert]
        return ":".join(words).rstrip(":")

    def factors(self, own: int, of_all: int) -> list[float]:
        """Of a transformer's LoRAs: those that all transformers have, then its ``own``.

        One factor is for the LoRAs that are an expert's own or, where it has none, for all; a LoRA of both experts
        beside their own is no accelerator, and stays.

        Raises:
            ValueError: there are several factors, but not as many as LoRAs.
        """
        if len(self.loras) == 1:
            return [1.0 if own else self.loras[0]] * of_all + [self.loras[0]] * own
        if len(self.loras) != own + of_all:
            raise ValueError(f"the phase {self} has {len(self.loras)} strengths of LoRAs, expected one, or "
                             f"{own + of_all}: one for each LoRA of its transformer")  # fmt: skip
        return list(self.loras)


@lru_cache
def read_phases(text: str | None) -> tuple[Phase, ...]:
    """The phases that ``text`` stands for; none of None.

    Raises:
        ValueError: another form, or phases that do not go down from 1000 to 0 one after the other.
    """
    if not text:
        return ()
    phases = tuple(_phase(word.strip(), text) for word in text.split(","))
    above = math.inf
    for phase in phases:
        if not 0 <= phase.down_to < min(above, TOP):
            limit = f"below {above:g}, where the phase before it ends" if above < TOP else f"0 to below {TOP}"
            raise ValueError(f"phases {text!r}: the phase {phase} goes down to {phase.down_to:g}, expected {limit}")
        above = phase.down_to
    if above:
        raise ValueError(f"phases {text!r}: the last one ends at {above:g}, expected 0: {phases[-1]} → "
                         f"{str(phases[-1]).replace(f'{above:g}', '0', 1)}")  # fmt: skip
    experts = [phase.expert for phase in phases]
    if any(experts) and not all(experts):
        raise ValueError(f"phases {text!r}: the expert is named for some, expected for all or for none")
    if sorted(experts) != experts:  # "high_noise" is before "low_noise" in the alphabet, too
        raise ValueError(f"phases {text!r}: the high-noise expert comes after the low-noise one, expected before it")
    return phases


def _phase(word: str, text: str) -> Phase:
    parts = [part.strip() for part in word.split(":")]
    try:
        if len(parts) > 4:
            raise ValueError
        down_to, guidance, loras, expert = [*parts, "", "", ""][:4]
        numbers = tuple(float(number) for number in loras.split("/")) if loras else (1.0,)
        name = EXPERT_NAMES[expert] if expert else ""
        found = Phase(float(down_to), float(guidance) if guidance else None, numbers, name)
        if not all(map(math.isfinite, (found.down_to, found.guidance or 0.0, *numbers))):
            raise ValueError
    except (ValueError, KeyError):
        raise ValueError(f"phases {text!r}: {word!r} is no phase; expected {FORM}") from None
    return found


def phase_at(phases: Sequence[Phase], timestep: float) -> Phase | None:
    """The phase that serves a timestep; None if there are none."""
    return next((phase for phase in phases if timestep >= phase.down_to), None)


def check_steps(phases: Sequence[Phase], timesteps: Sequence[float]) -> None:
    """Raise ValueError if a phase serves none of a run's timesteps."""
    for phase in phases:
        if all(phase_at(phases, timestep) is not phase for timestep in timesteps):
            said = ", ".join(f"{timestep:.5g}" for timestep in timesteps)
            raise ValueError(f"the phase {phase} holds none of the {len(timesteps)} steps, whose timesteps are {said}; "
                             "move where it ends, or leave it out")  # fmt: skip
