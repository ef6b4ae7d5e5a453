"""The one stream of events: everything that happens in a run is one small dataclass, which can say itself as JSON.

A `wan_mlx.run.Run` tells its events to listeners, functions of one event, the moment they happen, and yields them to
whoever iterates over it. Terminal, ``--json`` and notebooks only listen. Arrays are in the events, not in their JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import numpy as np

    from .types import Conditioning, Step
    from .types import StageReport as Report


@dataclass(frozen=True)
class Event:
    """Base of the events; ``kind`` is their name in JSON."""

    kind: ClassVar[str]

    def as_json(self) -> dict[str, Any]:
        """The event as JSON takes it: its kind under "event", and its fields."""
        return {"event": self.kind, **self.fields()}

    def fields(self) -> dict[str, Any]:
        """The fields as JSON takes them; those that hold arrays say something else of themselves."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in vars(self).items()}


Listener = Callable[[Event], Any]


@dataclass(frozen=True)
class Started(Event):
    """A run that makes a file begins or goes on; ``settings`` are those embedded in the file."""

    kind = "start"
    output: Path
    settings: dict[str, Any]


@dataclass(frozen=True)
class StageStarted(Event):
    """A stage begins: conditioning, load transformer, denoise, or decode."""

    kind = "stage_started"
    name: str


@dataclass(frozen=True)
class StageEnded(Event):
    """A stage is over, or was left; its ``report`` has its name, seconds and peak memory."""

    kind = "stage"
    report: Report

    def fields(self) -> dict[str, Any]:
        report = self.report
        return {"name": report.name, "seconds": round(report.seconds, 3), "peak_bytes": report.peak_bytes}


@dataclass(frozen=True)
class Progress(Event):
    """``done`` of ``total`` (None: unknown) of a piece of work, such as "loading transformer"; ``unit`` "B" is bytes.

    Only listeners hear it: it happens within the work between two of the events that a run yields.
    """

    kind = "progress"
    name: str
    done: int
    total: int | None = None
    unit: str = "it"


@dataclass(frozen=True)
class Conditioned(Event):
    """Texts, images and sources are encoded."""

    kind = "conditioning"
    conditioning: Conditioning

    def fields(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Stepped(Event):
    """A sampling step is done; of a run that goes on, the step reached is told once more."""

    kind = "step"
    step: Step

    def fields(self) -> dict[str, Any]:
        step = self.step
        seconds, sigma = round(step.seconds, 3), step.sigma
        return dict(index=step.index, total=step.total, seconds=seconds, sigma=sigma, forwards=step.forwards)


@dataclass(frozen=True)
class Decoded(Event):
    """More frames, uint8 (n, H, W, 3), are decoded: ``done`` of ``total`` so far, these included."""

    kind = "frames"
    frames: np.ndarray
    done: int
    total: int

    def fields(self) -> dict[str, Any]:
        return {"done": self.done, "total": self.total}


@dataclass(frozen=True)
class Previewed(Event):
    """The preview's files show step ``step`` (from 0) now; making them took ``seconds`` of the stage."""

    kind = "preview"
    animation: Path
    sheet: Path
    step: int
    seconds: float

    def fields(self) -> dict[str, Any]:
        return {"animation": str(self.animation), "sheet": str(self.sheet), "step": self.step}


@dataclass(frozen=True)
class Note(Event):
    """A line for people; an ``important`` one is said even to who wants quiet."""

    kind = "note"
    text: str
    important: bool = False

    def fields(self) -> dict[str, Any]:
        return {"text": self.text.strip()}


@dataclass(frozen=True)
class Finished(Event):
    """A file is made: in ``seconds`` of this process; ``complaint`` if it looks wrong.

    ``reports`` and ``forwards`` are those of the run; there are none where all was done before.
    """

    kind = "result"
    output: Path
    seconds: float = 0.0
    complaint: str | None = None
    reports: Sequence[Report] = ()
    forwards: tuple[int, int] | None = None

    @property
    def peak_gib(self) -> float:
        """The most that MLX held."""
        return round(max((report.peak_bytes for report in self.reports), default=0) / 2**30, 2)

    def fields(self) -> dict[str, Any]:
        return {
            "output": str(self.output),
            "seconds": round(self.seconds, 3),
            "complaint": self.complaint,
            "peak_gib": self.peak_gib,
        }


@dataclass(frozen=True)
class Failed(Event):
    """It went wrong; ``code`` is the exit code that says how."""

    kind = "error"
    message: str
    code: int


def unheard(event: Event) -> None:
    """The listener of a run that nobody listens to."""


def counted(listener: Listener, name: str) -> Callable[..., Generator]:
    """Wraps an iteration so that its `Progress` is told: (items, total=None, initial=0) → items."""

    def count(items: Iterable, total: int | None = None, initial: int = 0) -> Generator:
        if total is None and isinstance(items, Sized):
            total = len(items)
        listener(Progress(name, initial, total))
        for done, item in enumerate(items, start=initial + 1):
            yield item
            listener(Progress(name, done, total))

    return count
