"""The command line's output: lines for people on stderr, or for programs one JSON event a line on stdout (``--json``).

Each line of JSON is an event of `wan_mlx.events` under its kind. Colours are used on a terminal alone, and not where
``NO_COLOR`` is set.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from typing import TextIO

from ..errors import LESS_MEMORY, UsageError, WanError, duration, gpu_failure, is_out_of_memory, printable, size
from ..events import Eta, Event, Failed, Finished, Note, Previewed, Progress, StageEnded
from ..progress_bars import ProgressBars, aside, is_live

USAGE, FAILURE, SUSPECT, INTERRUPTED = 2, 1, 3, 130  # exit codes
RED, DIM, PLAIN = "\033[31m", "\033[2m", "\033[0m"
LABEL_WIDTH = 10  # of the lines about the run to come
PROGRESS_EVERY = 0.5  # seconds


def write(text: object, label: str = "", colour: str = "", to: str = "stdout") -> None:
    """Print a line, whatever is in it (`errors.printable`), behind a label in colour.

    A stream that is closed, full, or whose reader has gone is no reason for anything else to fail.
    """
    stream: TextIO | None = getattr(sys, to)
    if stream is None:
        return
    plain = not colour or "NO_COLOR" in os.environ or not stream.isatty()
    label = label if plain else f"{colour}{label}{PLAIN}"
    try:
        with aside():
            print(f"{label}{printable(text)}", file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # or Python would complain once more as it ends


class Terminal:
    """Listens to events, and says them; how far the work is shows a live display, where there is a terminal.

    Args:
        quiet: print only results, failures and important notes.
        as_json: for programs.
        details: say of each stage how long it took.
    """

    def __init__(self, quiet: bool = False, as_json: bool = False, details: bool = True):
        self.quiet, self.as_json, self.details = quiet, as_json, details
        self._bars = None if quiet or as_json else ProgressBars(ticks=False)
        self._previews: list[Previewed] = []
        self._told_at = {Progress: 0.0, Eta: 0.0}

    @classmethod
    def of(cls, args: argparse.Namespace) -> Terminal:
        """As the flags ``--quiet`` and ``--json`` ask for."""
        return cls(args.quiet and not args.dry_run, args.json)

    def __call__(self, event: Event) -> None:
        if self._bars is not None:
            self._bars(event)
            if isinstance(event, Failed | Finished):
                self._bars.close()
        if self.as_json:
            self._say_json(event)
        elif isinstance(event, StageEnded):
            self._say_stage(event)
        elif isinstance(event, Note):
            self._say_note(event)
        elif isinstance(event, Failed):
            stopped = event.code > 128  # by a signal: nothing went wrong
            write(event.message, "" if stopped else "error: ", RED, "stderr")
        elif isinstance(event, Previewed):
            self._previews.append(event)
        elif isinstance(event, Finished):
            if self.details:
                self._say_rest(event)
            write(event.output)

    def note(self, text: str, important: bool = False) -> None:
        """A line that helps and is not the result; an ``important`` one is said even to who wants quiet."""
        self(Note(text, important))

    def fail(self, message: str, code: int) -> int:
        """Print the failure in one line; returns the exit code."""
        self(Failed(message, code))
        return code

    def _say_json(self, event: Event) -> None:
        for kind, told_at in self._told_at.items():
            if isinstance(event, kind) and getattr(event, "done", 0) != getattr(event, "total", 1):
                if time.monotonic() < told_at + PROGRESS_EVERY:
                    return
                self._told_at[kind] = time.monotonic()
        write(json.dumps(event.as_json()))

    def _say_note(self, event: Note) -> None:
        if event.important or not self.quiet:
            text = event.text.removeprefix("\n")
            if text != event.text:
                write("", to="stderr")
            label, rest = text[:LABEL_WIDTH], text[LABEL_WIDTH:]
            is_label = bool(rest) and label.endswith(" ") and label.strip().isalpha()
            write(rest if is_label else text, label if is_label else "", DIM, "stderr")

    def _say_stage(self, stage: StageEnded) -> None:
        if self.details and not stage.left:
            tick = "✓ " if is_live(sys.stderr) and (sys.stderr.encoding or "").lower().startswith("utf") else ""
            self.note(f"{tick + stage.name:<20}{duration(stage.seconds):>12}   peak {size(stage.peak_bytes)}")

    def _say_rest(self, finished: Finished) -> None:
        if finished.forwards:
            self.note(f"{'forwards':<20}{finished.forwards[0]:>12} of {finished.forwards[1]}")
        if previews := self._previews:
            seconds = duration(sum(event.seconds for event in previews))
            self.note(f"{'previews':<20}{seconds:>12}   of denoise, {len(previews)} times")
        if seconds := finished.seconds:
            plain = f"   ({seconds:.0f} s)" * (seconds >= 100)  # as docs/times.md takes it
            self.note(f"{'total':<20}{duration(seconds):>12}{plain}")
        self._previews = []


def explain(error: Exception) -> tuple[str, int]:
    """One line for the user, and the exit code."""
    error = gpu_failure(error) or error
    if is_out_of_memory(error):
        return f"out of memory ({error}); {LESS_MEMORY}", FAILURE
    if isinstance(error, UsageError | ValueError):
        return shortened(str(error)), USAGE
    if isinstance(error, WanError | ImportError):
        return shortened(str(error)), FAILURE
    if isinstance(error, OSError) and error.strerror:
        return shortened(f"{error.filename or 'the system'}: {error.strerror}"), FAILURE
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # pathlib's
        return "a path begins with ~, but that home folder is not known", USAGE
    if "Failed to compile function" in str(error):  # MLX's on a CPU, of many lines
        said = str(error).partition("the output is: ")[2].split("\n")[0]
        return f"MLX cannot compile its functions ({said}); it needs a C++ compiler, and room in the temporary folder "\
               "(TMPDIR names another)", FAILURE  # fmt: skip
    if "temp_directory_path" in str(error):  # C++'s, in MLX
        return "the temporary folder does not exist, in which MLX compiles its functions; have TMPDIR name one", FAILURE
    # A bug, or the machine's own failure.
    return f"{type(error).__name__}: {error} (run again with --debug for the traceback)", FAILURE


def shortened(text: str, most: int = 1000) -> str:
    """Without the middle, if it is very long: some names are."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def say_logs(verbose: bool) -> None:
    """Print the package's log: warnings, or with ``--verbose`` everything, of other packages too."""
    if verbose:
        logging.basicConfig(handlers=[_Logged()], level=logging.INFO, force=True)
    logging.getLogger("wan_mlx").handlers = [] if verbose else [_Logged()]


class _Logged(logging.Handler):
    """Prints log records: a warning as it is, anything else behind the module's name."""

    def emit(self, record: logging.LogRecord) -> None:
        origin = "" if record.levelno >= logging.WARNING else f"{record.name}: "
        write(f"{origin}{record.getMessage()}", to="stderr")
