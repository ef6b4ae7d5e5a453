"""A bench for hostile cases: each runs a command line in a folder of its own, and what came of it is judged.

High: something of the user's changed or is gone, a program was started, or something wrong is reported as a success.
Medium: a traceback, a hang, gigabytes, something left where nothing may be, control characters on the terminal.
Low: not one clear line, or an exit code that is none of ours.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import io
import logging
import os
import resource
import shutil
import signal
import socket
import sys
import time
import traceback
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from wan_mlx.cli.main import main
from wan_mlx.media.write import save_video

SECONDS, BYTES = 30, 1_500_000_000  # that one case may take; most take a hundredth
LONGEST = 3000  # letters of an error
SEVERITIES = ("high", "medium", "low")


class TooLong(BaseException):
    """A case took more than `SECONDS`."""


@dataclass
class Case:
    """A command line, and what may come of it.

    Attributes:
        name: what is hostile about it.
        arguments: of the command line, which runs in the folder ``work``.
        prepare: called with that folder before.
        writes: patterns of paths in that folder that may appear, change or go.
        keeps: patterns of those that may not, all the same.
        refused: a success would be wrong, and high; or "low".
        makes: file → bytes that it has after a success.
        offline: no name may be looked up in a network.
    """

    name: str
    arguments: list[str]
    prepare: Callable[[Path], object] = lambda work: None
    writes: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()
    refused: bool | str = False
    makes: dict[str, bytes] = field(default_factory=dict)
    offline: bool = False


@dataclass
class Outcome:
    code: int | None  # None for an exception that nobody caught
    out: str
    err: str
    seconds: float
    grown: int


@dataclass(frozen=True)
class Finding:
    severity: str
    said: str
    case: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        command = " ".join(f"{argument[:60]!r}" for argument in self.arguments)
        return f"{self.severity}: {self.said[:300]}: {self.case}: {command}"


class Bench:
    """Runs cases below ``folder``; within a ``with`` block the network is shut and programs are watched for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.template, self.marker = folder / "template", folder / "called"
        self.looked_up: list[str] = []
        self.kept: dict[str, str | None] = {}
        self._write_template()

    def _write_template(self) -> None:
        """What a user has: a thesis and a model in one folder, and pictures where the command runs."""
        user, work, bin = (self.template / name for name in ("user", "work", "bin"))
        for path in (user / "model", work / "m.partial", work / "m.old", bin):
            path.mkdir(parents=True)
        (user / "thesis.txt").write_text("three years of work")
        (user / "model" / "weights.safetensors").write_bytes(bytes(64))
        for name in ("m.partial/mine.txt", "m.old/mine.txt", "notes.txt"):
            (work / name).write_text("mine")
        frames = np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3), np.uint8)
        Image.fromarray(frames[0]).save(work / "cat.png")
        save_video(work / "clip.mp4", frames, 16, {"prompt": "x"})
        (work / "link.txt").symlink_to("../user/thesis.txt")
        (work / "dangling.mp4").symlink_to("../user/nothing.mp4")
        for name in ("gs", "inkscape", "sh-evil"):
            (bin / name).write_text(f"#!/bin/sh\ntouch '{self.marker}'\n")
            (bin / name).chmod(0o755)

    def __enter__(self) -> Bench:
        self._look_up, socket.getaddrinfo = socket.getaddrinfo, self._refuse
        for name, value in {
            "PATH": f"{self.template / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "WAN_MLX_CACHE": str(self.folder / "cache"),
            "HF_HOME": str(self.folder / "hub"),
            "NO_COLOR": "1",
        }.items():
            self.kept[name] = os.environ.get(name)
            os.environ[name] = value
        return self

    def __exit__(self, *error) -> None:
        socket.getaddrinfo = self._look_up
        for name, value in self.kept.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})

    def _refuse(self, host, *rest, **named):
        self.looked_up.append(str(host))
        raise socket.gaierror(socket.EAI_NONAME, "no network here")

    def judge(self, case: Case) -> list[Finding]:
        """Run a case; returns what is wrong with what came of it."""
        place = self.folder / "place"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.template, place, symlinks=True)
        work = place / "work"
        case.prepare(work)
        before = snapshot(place)
        self.looked_up.clear()
        outcome = self.call(case.arguments, work)
        findings = [
            *self._changes(case, before, snapshot(place)), *self._said(case, outcome), *self._made(case, outcome, work)
        ]  # fmt: skip
        return [Finding(severity, said, case.name, tuple(case.arguments)) for severity, said in findings]

    @staticmethod
    def call(arguments: Iterable[str], work: Path) -> Outcome:
        """The command line in this process, in the folder ``work``."""
        out, err, code, here = io.StringIO(), io.StringIO(), None, Path.cwd()
        grown, started = _most_memory(), time.monotonic()

        def too_long(*_):
            raise TooLong

        before = signal.signal(signal.SIGALRM, too_long)
        root = logging.getLogger()
        handlers, level = root.handlers[:], root.level  # --verbose sets others
        os.chdir(work)
        try:
            with (
                contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings(),
                bounded_memory(),
            ):  # fmt: skip
                warnings.simplefilter("default")
                signal.alarm(SECONDS)
                code = main(list(arguments))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except TooLong:
            code = -1
        except BaseException:
            err.write(traceback.format_exc())
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
            root.handlers[:] = handlers
            root.setLevel(level)
            os.chdir(here)
        return Outcome(code, out.getvalue(), err.getvalue(), time.monotonic() - started, _most_memory() - grown)

    def _changes(self, case: Case, before: dict[str, str], after: dict[str, str]) -> Iterable[tuple[str, str]]:
        def may(path: str) -> bool:
            inside = path.removeprefix("work/")
            return matches(inside, case.writes) and not matches(inside, case.keeps)

        for path in before:
            if before[path] != after.get(path) and not may(path):
                yield "high", f"{path} {'is gone' if path not in after else 'has changed'}"
        for path in after.keys() - before.keys():
            if not may(path):
                yield "medium", f"{path} was left"
        if self.marker.exists():
            self.marker.unlink()
            yield "high", "a program was started"
        if case.offline and self.looked_up:
            yield "high", f"{self.looked_up[0]} was looked up"

    @staticmethod
    def _made(case: Case, outcome: Outcome, work: Path) -> Iterable[tuple[str, str]]:
        if outcome.code == 0 and case.refused:
            yield "low" if case.refused == "low" else "high", "it is a success"
        for name, data in case.makes.items():
            if outcome.code == 0 and not ((work / name).is_file() and (work / name).read_bytes() == data):
                yield "high", f"{name} is not what it should be, but the exit code is 0"

    @staticmethod
    def _said(case: Case, outcome: Outcome) -> Iterable[tuple[str, str]]:
        text = outcome.out + outcome.err
        if outcome.code is None or "Traceback (most recent call last)" in text:
            yield "medium", f"a traceback ({text.strip().splitlines()[-1][:200]})"
            return
        if outcome.code == -1:
            yield "medium", f"no answer in {SECONDS} s"
            return
        if outcome.grown > BYTES:
            yield "medium", f"{outcome.grown / 1e9:.1f} GB of memory"
        if hostile := {c for c in text if unicodedata.category(c) == "Cc" and c not in "\n\t\r"}:
            yield "medium", f"control characters {hostile} are printed"
        if outcome.code not in (0, 1, 2, 3):
            yield "low", f"exit code {outcome.code}"
        errors = [line for line in outcome.err.splitlines() if line.startswith("error:")]
        # A plan that does not fit, or a file that is damaged, is a report on standard output.
        asked = "--json" in case.arguments or "which model?" in text or (outcome.out.strip() and not outcome.err)
        if outcome.code in (1, 2) and not asked:
            lines = [line for line in outcome.err.splitlines() if line.strip()]
            if len(errors) != 1 or lines[-1] != errors[0]:
                yield "low", f"{len(lines)} lines, {len(errors)} of errors: {outcome.err.strip()[:200]!r}"
            elif len(errors[0]) > LONGEST:
                yield "low", f"an error of {len(errors[0])} letters"
        if "--debug for the traceback" in text:
            yield "low", f"a bare exception: {text.strip().splitlines()[-1][:200]}"


class Table:
    """Counts of an area, and its findings."""

    def __init__(self):
        self.cases: Counter[str] = Counter()
        self.findings: dict[str, list[Finding]] = {}

    def run(self, area: str, bench: Bench, cases: Iterable[Case], tell: Callable[[str], object] | None = None) -> None:
        for case in cases:
            found = bench.judge(case)
            self.cases[area] += 1
            self.findings.setdefault(area, []).extend(found)
            for finding in found:
                if tell:
                    tell(str(finding))

    def worst(self, area: str) -> list[str]:
        """What may not be."""
        return [str(finding) for finding in self.findings.get(area, []) if finding.severity != "low"]

    def __str__(self) -> str:
        rows = ["| area | cases | high | medium | low |", "|---|---|---|---|---|"]
        counts = {}
        for area, cases in self.cases.items():
            kinds = Counter(finding.severity for finding in self.findings[area])
            counts[area] = [cases, *(kinds[severity] for severity in SEVERITIES)]
        counts["**sum**"] = [sum(column) for column in zip(*counts.values(), strict=True)]
        return "\n".join([*rows, *(f"| {area} | {' | '.join(map(str, row))} |" for area, row in counts.items())])


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether a path, or a folder that it is in, has a name like one of the patterns."""
    parts = Path(path).parts
    whole = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatch.fnmatchcase(part, pattern) for part in whole for pattern in patterns)


def snapshot(place: Path) -> dict[str, str]:
    """Path below ``place`` → what it is: a digest of a file, a link's text, or a folder."""
    found = {}
    for folder, folders, files in os.walk(place):
        for name in (*folders, *files):
            path = Path(folder, name)
            key = str(path.relative_to(place))
            if path.is_symlink():
                found[key] = f"link to {os.readlink(path)}"
            elif path.is_dir():
                found[key] = "folder"
            elif path.is_file():
                found[key] = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                found[key] = "special"
    return found


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """No more than twice `BYTES` of new memory, where the system tells how much there is."""
    if not sys.platform.startswith("linux"):
        yield
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2 * BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _most_memory() -> int:
    """Bytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
