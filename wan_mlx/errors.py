"""The errors of the package, and words for messages. A wrong argument is a ``ValueError``, the rest a `WanError`."""

from __future__ import annotations

import difflib
import re
import shlex
import signal
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path, PurePath


class WanError(Exception):
    """Base of the errors that are not a wrong argument (those are ``ValueError``)."""


class WeightsError(WanError):
    """A weight file that cannot be used: missing, truncated, hostile, or of the wrong keys or shapes."""


class NoFile(WeightsError, ValueError):
    """A weight file that is not there: its name is a wrong argument."""


class UnsupportedModel(WeightsError):
    """A file or folder of a model that is known by name, and not supported."""


class MemoryPlanError(WanError):
    """Nothing fits into the memory there is; names changes that would help."""


class SamplingError(WanError):
    """Sampling went wrong: the latents stopped being finite."""


class GPUError(WanError):
    """The GPU's work failed, or macOS ended it; says what to do."""


class UsageError(WanError):
    """Raised by the parser instead of exiting, so that every usage error is one line."""


class Differing(WanError):
    """Machines that make one video differ in what must be the same; all of them raise it."""


class Unshareable(Differing, ValueError):
    """Machines cannot share a video in the way that was asked for."""


class BusyError(WanError):
    """Another process is making this output."""


class Stopped(KeyboardInterrupt):
    """The run was stopped from outside, by signal ``signum`` or as if by it.

    ``go_on`` says how to go on with it, where there is something to go on with; ``why`` it was stopped; ``agreed``
    whether all machines of the run stop after the same step.
    """

    def __init__(self, signum: int = signal.SIGINT, go_on: str = "", why: str = "interrupted", agreed: bool = False):
        super().__init__(signum)
        self.signum = signum
        self.go_on, self.why, self.agreed = go_on, why, agreed

    @property
    def code(self) -> int:
        """The exit code that shells expect: 130 for Ctrl-C."""
        return 128 + self.signum


LESS_MEMORY = "try --memory with less than this machine has, --quantize q8 or q4, a smaller --size or fewer --frames"
# Pattern of Metal's reason for the failure of a command buffer → the cause, and a way out.
METAL_FAILURES = {
    "Impacting ?Interactivity|Timeout|GPU Hang": "macOS ended the GPU's work because it took too long or kept the "
    "display waiting; set AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1 in the environment, let the display sleep or log in by ssh, "
    "and run `wan-mlx doctor`, whose rates limit pieces of work",
    "Insufficient Memory|OutOfMemory": f"out of memory; close other programs, or {LESS_MEMORY}, or a smaller "
    "--vae-tiling",
    "": "the GPU's work failed; `wan-mlx doctor` looks for the cause",
}


def resume_command(output: object) -> str:
    """The command that goes on with the run of a file."""
    return f"wan-mlx resume {shlex.quote(str(output))}"


def install_command(*words: str) -> str:
    """The command that installs packages, with pip's options, into the environment that this copy runs in.

    pipx names its environments; those that uv makes have no pip; neither needs the archive that wan_mlx came from.
    """
    install, python, environment = shlex.join(["install", *words]), shlex.quote(sys.executable), Path(sys.prefix)
    if (environment / "pipx_metadata.json").exists():  # `pipx inject` would leave alone what is there already
        return f"pipx runpip {shlex.quote(environment.name)} {install}"
    return f"{python} -m pip {install}" if find_spec("pip") else f"uv pip {install} --python {python}"


def gpu_failure(error: BaseException) -> GPUError | None:
    """MLX's error of a failed command buffer of Metal's, in words for the user; None of any other error."""
    said = re.search(r"command buffer.*?failed:? *([^(\n]*)", str(error), re.IGNORECASE)
    if not isinstance(error, RuntimeError) or said is None:
        return None
    reason = said[1].strip(" .")
    to_do = next(words for known, words in METAL_FAILURES.items() if re.search(known, str(error)))
    return GPUError(f"{reason or 'Metal'}: {to_do}; a run with finished steps goes on with `{resume_command('FILE')}`")


@contextmanager
def gpu_failures_told() -> Iterator[None]:
    """Within this block failures of Metal's are raised as `GPUError`."""
    try:
        yield
    except RuntimeError as error:
        if failure := gpu_failure(error):
            raise failure from error
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Whether MLX's error says that memory could not be had; there is no class of its own for it."""
    text = str(error).lower()
    words = ("out of memory", "unable to allocate", "attempting to allocate", "insufficient memory", "outofmemory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(word in text for word in words))


NEAR = 0.65  # of difflib's ratios, from which on two spellings look alike


def printable(text: object) -> str:
    """As one line that cannot steer a terminal: whatever is not printable, line ends too, is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def duration(seconds: float) -> str:
    """For people: "8.1 s", "12 min 5 s", "3 h 20 min", "12 days", "about 10 years"."""
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    days = seconds / 86_400
    if days < 60:
        return f"{days:.0f} days"
    return f"about {days / 30.4:.0f} months" if days < 2 * 365 else f"about {days / 365.25:,.0f} years"


def size(count: float) -> str:
    """Bytes of memory for people: "0 MiB", "412 MiB", "5.81 GiB"."""
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"


def some(names: Collection[str], most: int = 5) -> str:
    """The first names of many, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join([*names][:most]) or "none") + more


def closest(given: object, choices: Iterable[str], count: int = 1, stems: bool = False) -> str:
    """The choices that are spelled nearly as what was given, nearest first; "" where none is.

    Neither case, dashes nor underscores count; with ``stems`` no ending of a file's name either. Those that begin so
    come, up to three, before what is only spelled alike.
    """

    def bare(text: object) -> str:
        name = PurePath(str(text)).stem if stems else str(text)
        return re.sub("[-_]", "", name.lower())

    wanted, choices = bare(given), list(choices)
    names = list(dict.fromkeys(map(bare, choices)))
    near = difflib.get_close_matches(wanted, names, n=count, cutoff=NEAR)
    begun = [name for name in names if name.startswith(wanted)] if len(wanted) > 2 and wanted not in names else []
    found = [choice for name in dict.fromkeys([*begun, *near]) for choice in choices if bare(choice) == name]
    return ", ".join(found[: max(count, min(3, len(begun)))])


def nearest(given: object, choices: Iterable[str], count: int = 1, stems: bool = False) -> str:
    """The end of a message: "; nearest: ", and what is `closest`; "" where nothing is."""
    near = closest(given, choices, count, stems)
    return f"; nearest: {near}" if near else ""
