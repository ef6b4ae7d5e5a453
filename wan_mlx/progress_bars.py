"""Progress: on a terminal one live display, drawn by rich; in a notebook a bar; elsewhere a line now and then."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

from .errors import duration, size
from .events import Decoded, Eta, Event, Listener, Progress, StageEnded, StageStarted, Stepped, unheard

LINE_EVERY = 30.0  # seconds, where there is no terminal
DRAWN_EVERY = 0.1
BAR_WIDTH = 32


def progress_of(wanted: bool | Listener) -> Listener:
    """What hears of progress: a listener is its own, True shows it, False does not."""
    return wanted if callable(wanted) else ProgressBars() if wanted else unheard


class Told:
    """What is known of a piece of work from its events, in words."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, goal: str = ""):
        self._clock, self._goal = clock, goal
        self.ticked: list[str] = []
        self.begin("")

    def begin(self, stage: str) -> None:
        self.stage, self.began = stage, self._clock()
        self.work: Progress | None = None
        self._work_began = self.began
        self._first = 0
        self.step: Stepped | None = None
        self.frames: Decoded | None = None
        self.eta: Eta | None = None
        self._eta_at = 0.0

    def hear(self, event: Event) -> None:
        if isinstance(event, StageStarted):
            eta, at = self.eta, self._eta_at
            self.begin(event.name)
            self.eta, self._eta_at = eta, at
        elif isinstance(event, StageEnded):
            if not event.left:
                self.ticked.append(f"✓ {event.name} {duration(event.seconds)}")
            self.stage, self.work, self.step = "", None, None
        elif isinstance(event, Progress):
            if self.work is None or event.name != self.work.name or event.done < self.work.done:
                self._first, self._work_began = event.done, self._clock()
            self.work = event
        elif isinstance(event, Stepped):
            self.step = event
        elif isinstance(event, Decoded):
            self.frames = event
        elif isinstance(event, Eta):
            self.eta, self._eta_at = event, self._clock()

    @property
    def label(self) -> str:
        return self.stage or (self.work.name if self.work else "")

    @property
    def what(self) -> str:
        """How far the work at hand is: "step 5 of 12, 1.2 s a step"."""
        work = self.work
        if work is None:
            return ""
        of = "" if work.total is None else f" of {work.total:,}"
        if work.unit == "B":
            return self._bytes(work)
        if work.name == "denoising":
            step = self.step.step.seconds if self.step else 0
            return f"step {min(work.done + 1, work.total or work.done + 1)}{of}" + f", {step:.3g} s a step" * (step > 0)
        if self.frames is not None:
            return f"{self.frames.done:,} of {self.frames.total:,} frames"
        name = "" if work.name == self.label else f"{work.name} "
        return f"{name}{work.done:,}{of}"

    def _bytes(self, work: Progress) -> str:
        spent, fresh = self._clock() - self._work_began, work.done - self._first
        said = f"{work.done / 1e9:.2f} of {(work.total or 0) / 1e9:.2f} GB"
        if spent < 1 or fresh <= 0:
            return said
        left = f", {duration((work.total - work.done) * spent / fresh)} left" if work.total else ""
        return f"{said}, {fresh / spent / 1e6:.3g} MB/s{left}"

    @property
    def whole(self) -> str:
        """The run as a whole: the time left, and memory."""
        if self.eta is None:
            return ""
        said = []
        if self.eta.seconds is not None:
            left = max(0.0, self.eta.seconds - (self._clock() - self._eta_at))
            said.append(f"{f'{left:.0f} s' if left < 100 else duration(left)} left{self._goal}")
        if self.eta.peak_bytes >= 2**20:
            said.append(f"memory {size(self.eta.active_bytes)}, peak {size(self.eta.peak_bytes)}")
        return " · ".join(said)


class ProgressBars:
    """A listener that shows how far the work is; nothing of it is left when it is over.

    Args:
        ticks: whether stages that are over stay in sight, with their seconds; the command line prints them itself.
    """

    def __init__(self, ticks: bool = True):
        self._told, self._ticks = self._nothing(ticks), ticks
        self._face: _Live | _Notebook | _Lines | None = None
        self.message = ""  # shown below the rest

    def __call__(self, event: Event) -> None:
        over = isinstance(event, StageEnded) and (event.left or event.name == "decode")
        self._told.hear(event)
        if isinstance(event, StageEnded):
            self.close(over)
            if over:
                self._told, self.message = self._nothing(self._ticks), ""  # the next run's
        elif self._told.label:
            self._face = self._face or self._new_face()
            self._face.show()
            work = self._told.work
            if not self._told.stage and work is not None and work.done == work.total:
                self._told.ticked = [f"✓ {self._told.label}"]
                self.close()
                self._told.ticked = []

    @staticmethod
    def _nothing(ticks: bool) -> Told:
        return Told(goal="" if ticks else " to the file")

    def close(self, over: bool = True) -> None:
        """Take it from the screen; a notebook's stays in place until the run is ``over``."""
        if self._face is not None:
            self._face.close()
            if over or not isinstance(self._face, _Notebook):
                self._face = None

    def lines(self) -> list[str]:
        ticked = "  ".join(self._told.ticked) if self._ticks else ""
        return [line for line in (ticked, self._told.whole, self.message) if line]

    def _new_face(self) -> _Live | _Notebook | _Lines:
        if shell := notebook():
            return _Notebook(self, self._told, shell)
        return _Live(self, self._told) if is_live(sys.stderr) else _Lines(self._told)


class _Live:
    """Two or three lines at the end of a terminal's text, drawn anew while work goes on."""

    def __init__(self, bars: ProgressBars, told: Told):
        self._bars, self._told = bars, told
        self._live: Any = None
        self._drawn_at = 0.0
        self._start()
        _shown.append(self)

    def _start(self) -> None:
        from rich.console import Console
        from rich.live import Live

        # A new one each time: it draws over as many lines as it drew before.
        self._live = Live(
            get_renderable=self._drawn, console=Console(file=sys.stderr, highlight=False), transient=True,
            auto_refresh=bool(self._told.stage), refresh_per_second=4, redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip
        self._live.start(refresh=True)

    def show(self) -> None:
        if time.monotonic() >= self._drawn_at + DRAWN_EVERY and self._live.is_started:
            self._drawn_at = time.monotonic()
            self._live.refresh()

    def close(self) -> None:
        with _lock:
            if self in _shown:
                _shown.remove(self)
            self._live.stop()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within this block lines may be printed; it is drawn below them again."""
        self._live.stop()
        try:
            yield
        finally:
            self._start()

    def ask(self, message: str) -> None:
        """Show ``message`` soon; a signal's handler may call this, which must draw nothing."""
        self._bars.message = message

    def _drawn(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        told, work = self._told, self._told.work
        row = Table.grid(padding=(0, 2))
        row.add_column(no_wrap=True)
        row.add_column(no_wrap=True)
        row.add_column(no_wrap=True, overflow="ellipsis")
        known = work is not None and work.total
        bar = ProgressBar(
            total=work.total if work and known else None, completed=work.done if work else 0, width=BAR_WIDTH,
            pulse=not known,
        )  # fmt: skip
        row.add_row(Text(told.label, style="bold"), bar, Text(told.what))
        rest = [Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in self._bars.lines()]
        return Group(row, *rest)


class _Notebook:
    """A bar below the cell; when a run is over, its ticked stages stay there."""

    def __init__(self, bars: ProgressBars, told: Told, shell: Any):
        self._bars, self._told, self._shell = bars, told, shell
        self._name = f"wan_mlx-{id(self)}-{time.monotonic_ns()}"
        self._at = 0.0
        self._begun = False

    def show(self) -> None:
        if time.monotonic() < self._at + 0.25:
            return
        self._at = time.monotonic()
        work = self._told.work
        value = f'value="{work.done}" max="{work.total}"' if work and work.total else ""
        lines = [f"{self._told.label} <progress {value}></progress> {escape(self._told.what)}"]
        self._publish("<br>".join(lines + [escape(line) for line in self._bars.lines()]), self._told.label)

    def close(self) -> None:
        if self._begun:
            ticked = "  ".join(self._told.ticked)
            self._publish(escape(ticked), ticked)

    def _publish(self, html: str, plain: str) -> None:
        data = {"text/html": f"<small>{html}</small>", "text/plain": plain}
        self._shell.display_pub.publish(data, transient={"display_id": self._name}, update=self._begun)
        self._begun = True


class _Lines:
    """A line now and then, for logs."""

    def __init__(self, told: Told):
        self._told, self._at = told, time.monotonic()

    def show(self) -> None:
        if time.monotonic() >= self._at + LINE_EVERY and self._told.what:
            self._at = time.monotonic()
            said = ", ".join(filter(None, (self._told.what, self._told.whole)))
            print(f"{self._told.label}: {said}", file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


_shown: list[_Live] = []  # at most one is on the terminal
_lock = threading.RLock()


@contextmanager
def aside() -> Iterator[None]:
    """Within this block the terminal is free for lines, whoever prints them."""
    with _lock:
        if _shown:
            with _shown[-1].aside():
                yield
        else:
            yield


def ask(message: str) -> bool:
    """Whether a live display is there, which then shows ``message``."""
    for shown in _shown[-1:]:
        shown.ask(message)
        return True
    return False


def show_cursor() -> None:
    """Where a live display hid it; a signal's handler may call this."""
    if _shown:
        os.write(2, b"\n\x1b[?25h")


@atexit.register
def close_all() -> None:
    """Take whatever is shown from the terminal, whose cursor comes back."""
    while _shown:
        _shown[-1].close()


def is_live(stream: Any) -> bool:
    """Whether lines of ``stream`` may be drawn anew: it is a terminal that can, and colours are not unwanted."""
    dumb = os.environ.get("TERM", "") in ("dumb", "unknown") or "NO_COLOR" in os.environ
    return stream is not None and stream.isatty() and not dumb


def notebook() -> Any:
    """IPython's shell if it is a notebook's, which shows HTML; None elsewhere."""
    ipython = sys.modules.get("IPython")  # a notebook has it
    shell = ipython.get_ipython() if ipython else None
    return shell if shell is not None and hasattr(shell, "kernel") else None
