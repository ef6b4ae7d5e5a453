"""The one stream of events: everything that happens in a run is one small dataclass, which can say itself as JSON.

A `runs.run.Run` tells its events to listeners, functions of one event, the moment they happen, and yields them to
whoever iterates over it. Terminal, ``--json`` and notebooks only listen. Arrays are in the events, not in their JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence, Sized
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import numpy as np

    from .types import Conditioning, Step


@dataclass(frozen=True)
class Event:
    """Base of the events; ``kind`` is their name in JSON, ``said`` the attributes that are in it."""

    kind: ClassVar[str]
    said: ClassVar[str] = ""

    def as_json(self) -> dict[str, Any]:
        """The event as JSON takes it: its kind under "event", and what is said of it."""
        found = {name.rpartition(".")[2]: attrgetter(name)(self) for name in self.said.split()}
        found |= {name: round(found[name], 3) for name in found if "seconds" in name and found[name] is not None}
        plain = {name: str(value).strip() for name, value in found.items() if isinstance(value, str | Path)}
        return {"event": self.kind, **found, **plain}


Listener = Callable[[Event], Any]


@dataclass(frozen=True)
class Started(Event):
    """A run that makes a file begins or goes on; ``settings`` are those embedded in the file."""

    kind, said = "start", "output settings"
    output: Path
    settings: dict[str, Any]


@dataclass(frozen=True)
class StageStarted(Event):
    """A stage begins: conditioning, load transformer, denoise, or decode."""

    kind, said = "stage_started", "name"
    name: str


@dataclass(frozen=True)
class StageEnded(Event):
    """A stage is over, or was ``left``: how long it took, and the most memory MLX held during it (bytes)."""

    kind, said = "stage", "name seconds peak_bytes"
    name: str
    seconds: float
    peak_bytes: int
    left: bool = False


@dataclass(frozen=True)
class Within(Event):
    """Base of what only listeners hear: it happens within the work between two of the events that a run yields."""


@dataclass(frozen=True)
class Progress(Within):
    """``done`` of ``total`` (None: unknown) of a piece of work, such as "loading transformer"; ``unit`` "B" is bytes.
    """

    kind, said = "progress", "name done total unit"
    name: str
    done: int
    total: int | None = None
    unit: str = "it"


@dataclass(frozen=True)
class Fetching(Progress):
    """So many bytes of a repository's needed files are here; the newest are of ``file``."""

    kind, said = "download", "repo file bytes total"
    repo: str = ""
    file: str = ""

    @property
    def bytes(self) -> int:
        return self.done


@dataclass(frozen=True)
class Loading(Within):
    """A part of the model begins to be loaded, or has been, in ``seconds``; a text encoder is read while it encodes."""

    kind, said = "load", "part state seconds"
    part: str
    seconds: float | None = None

    @property
    def state(self) -> str:
        return "begun" if self.seconds is None else "done"


@dataclass(frozen=True)
class Eta(Within):
    """How many seconds of a run are left, None if not known yet, and the memory that MLX holds: now, and at most since
    the stage began."""

    kind, said = "eta", "seconds active_bytes peak_bytes"
    seconds: float | None
    active_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Conditioned(Event):
    """Texts, images and sources are encoded."""

    kind = "conditioning"
    conditioning: Conditioning


@dataclass(frozen=True)
class ClipStarted(Event):
    """Of a video that is made in ``total`` clips, number ``index`` from 0 begins."""

    kind, said = "clip", "index total"
    index: int
    total: int


@dataclass(frozen=True)
class Stepped(Event):
    """A sampling step is done; of a run that goes on, the step reached is told once more."""

    kind, said = "step", "step.index step.total step.seconds step.sigma step.forwards"
    step: Step


@dataclass(frozen=True)
class Decoded(Event):
    """More frames, uint8 (n, H, W, 3), are decoded: ``done`` of ``total`` so far, these included."""

    kind, said = "frames", "done total"
    frames: np.ndarray
    done: int
    total: int


@dataclass(frozen=True)
class Previewed(Event):
    """The preview's files show step ``step`` (from 0) now; making them took ``seconds`` of the stage."""

    kind, said = "preview", "animation sheet step"
    animation: Path
    sheet: Path
    step: int
    seconds: float


@dataclass(frozen=True)
class Note(Event):
    """A line for people; an ``important`` one is said even to who wants quiet."""

    kind, said = "note", "text"
    text: str
    important: bool = False


@dataclass(frozen=True)
class Finished(Event):
    """A file is made: in ``seconds`` of this process; ``complaint`` if it looks wrong.

    ``reports`` and ``forwards`` are those of the run; there are none where all was done before.
    """

    kind, said = "result", "output seconds complaint peak_gib"
    output: Path
    seconds: float = 0.0
    complaint: str | None = None
    reports: Sequence[StageEnded] = ()
    forwards: tuple[int, int] | None = None

    @property
    def peak_gib(self) -> float:
        """The most that MLX held."""
        return round(max((report.peak_bytes for report in self.reports), default=0) / 2**30, 2)


@dataclass(frozen=True)
class Failed(Event):
    """It went wrong; ``code`` is the exit code that says how."""

    kind, said = "error", "message code"
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
