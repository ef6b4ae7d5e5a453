"""The errors of the package, and words for messages. A wrong argument is a ``ValueError``, the rest a `WanError`."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Collection, Iterable


class WanError(Exception):
    """Base of the errors that are not a wrong argument (those are ``ValueError``)."""


class WeightsError(WanError):
    """A weight file that cannot be used: missing, truncated, hostile, or of the wrong keys or shapes."""


class UnsupportedModel(WeightsError):
    """A file or folder of a model that is known by name, and not supported."""


class MemoryPlanError(WanError):
    """Nothing fits into the memory there is; names changes that would help."""


class SamplingError(WanError):
    """Sampling went wrong: the latents stopped being finite."""


class UsageError(WanError):
    """Raised by the parser instead of exiting, so that every usage error is one line."""


class BusyError(WanError):
    """Another process is making this output."""


class Stopped(KeyboardInterrupt):
    """The run was stopped from outside, by signal ``signum``.

    ``go_on`` says how to go on with it, where there is something to go on with.
    """

    def __init__(self, signum: int = signal.SIGINT, go_on: str = ""):
        super().__init__(signum)
        self.signum = signum
        self.go_on = go_on

    @property
    def code(self) -> int:
        """The exit code that shells expect: 130 for Ctrl-C."""
        return 128 + self.signum


def is_out_of_memory(error: BaseException) -> bool:
    """Whether MLX's error says that memory could not be had; there is no class of its own for it."""
    text = str(error).lower()
    words = ("out of memory", "unable to allocate", "attempting to allocate", "insufficient memory", "outofmemory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(word in text for word in words))


def printable(text: object) -> str:
    """As one line that cannot steer a terminal: whatever is not printable, line ends too, is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def some(names: Collection[str], most: int = 5) -> str:
    """The first names of many, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join([*names][:most]) or "none") + more


def closest(given: object, choices: Iterable[str], count: int = 1) -> str:
    """The choices whose spelling is closest to what was given."""
    return ", ".join(difflib.get_close_matches(str(given), list(choices), n=count, cutoff=0.0)) or "none"
