"""Other machines that make the queue's videos, each its own: workers at the other end of a command, such as ssh.

What a worker says and hears goes through that command's standard input and output, and so do the files: sources there,
the finished video and its previews back, in pieces. So nothing but the command has to be set up.
"""

from __future__ import annotations

import base64
import os
import re
import shlex
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import options
from ..errors import UsageError, WanError
from ..option import REQUEST
from ..runs.queue import Queue, Queued
from .child import Child
from .foreman import Foreman, Told, Watch

SSH = "WAN_MLX_SSH"  # of the environment: the command that runs others elsewhere
DEFAULT_SSH = "ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=4"
PIECE = 1 << 19  # bytes of a file in a line
SOURCES = "sources"  # the folder there
AGAIN = 30.0  # seconds after which a machine that was not reached is tried again
NAMES = re.compile(r"(?P<host>\w[\w@.:-]*)(?:=(?P<program>[\w./~+-]+))?")


@dataclass(frozen=True)
class Machine:
    """A machine, and ``wan-mlx`` on it."""

    host: str
    program: str = "wan-mlx"

    @property
    def command(self) -> list[str]:
        return [*shlex.split(os.environ.get(SSH, DEFAULT_SSH)), self.host, self.program, "serve", "--worker"]


def parse_machines(text: str | None) -> list[Machine]:
    """"mac2,me@mac3=/opt/wan/bin/wan-mlx": what ssh calls them, and where wan-mlx is if it is not on their PATH.

    Raises:
        UsageError: an entry is none, or there twice.
    """
    found = []
    for word in filter(None, (text or "").split(",")):
        match = NAMES.fullmatch(word.strip())
        if not match:
            raise UsageError(f"--machines has {word!r}, expected what ssh calls a machine, such as mac2 or me@mac2, or "
                             "mac2=/path/of/wan-mlx")  # fmt: skip
        found.append(Machine(match["host"], match["program"] or "wan-mlx"))
    hosts = [machine.host for machine in found]
    if twice := next((host for host in hosts if hosts.count(host) > 1), None):
        raise UsageError(f"--machines has {twice} twice; leave one out")
    return found


def pieces(path: Path, name: str) -> Iterator[dict[str, Any]]:
    """The lines that carry a file."""
    with path.open("rb") as file:
        data = file.read(PIECE)
        while True:
            more = file.read(PIECE)
            yield {"file": name, "data": base64.b64encode(data).decode(), "more": bool(more)}
            if not more:
                return
            data = more


def add_piece(line: Mapping[str, Any], path: Path) -> bool:
    """Write a piece of a file that arrives; returns whether it is whole, and there from now on."""
    part = path.with_name(f".{path.name}.part")
    with part.open("ab") as file:
        file.write(base64.b64decode(line["data"]))
    if not line["more"]:
        os.replace(part, path)
    return not line["more"]


class RemoteForeman(Foreman):
    """Has jobs made on another machine; as long as it cannot be reached, the others make them."""

    def __init__(
        self, machine: Machine, queue: Queue, told: Told, make_child: Callable[..., Child] = Child,
        until_empty: bool = False,
    ):  # fmt: skip
        super().__init__(queue, told, make_child, until_empty)
        self.machine, self.host = machine, machine.host
        self.is_reached, self.is_busy, self._answers = True, False, False

    def _work(self) -> None:
        try:
            self._take_jobs()
        except Exception as error:
            self.error, self.is_reached = error, False
            self._say("died", str(error))
        finally:
            self._end_worker()

    def _take_jobs(self) -> None:
        self._say("idle")
        while not self._ending.is_set():
            self.is_busy = True
            job = self.queue.take(self.accepts) if self.is_reached else None
            if job is not None:
                self._tell_state(job.id)
                self.queue.note(job.id, about={**job.about, "machine": self.host})
                self._make(replace(job, about={**job.about, "machine": self.host}))
            self.is_busy = False
            if not self.is_reached:
                self._ending.wait(AGAIN)
                self.is_reached = True
            elif job is None:
                self._asked.wait(1.0)
                self._asked.clear()

    def accepts(self, job: Queued) -> bool:
        """Whether it can be made there: it was not begun elsewhere, and names no weights of this machine."""
        begun_here = (self.queue.library / f"{job.output}.wan").is_dir()
        at = job.about.get("machine")
        return not begun_here and at in (None, self.host) and not any(
            str(one).startswith(("/", "~"))
            for option in options.OPTIONS if option.place == "name"
            for one in as_list(job.options.get(option.key))
        )  # fmt: skip

    def _child(self) -> Child:
        self._answers = False
        return self._make_child("", [], self._hear, self._heard.put, self.machine.command)

    def _hear(self, line: dict[str, Any]) -> None:
        """What it says, in the thread that reads it; files are written at once."""
        self._answers = True
        if "file" not in line:
            return self._heard.put(line)
        name = Path(str(line["file"])).name  # nothing is written elsewhere
        folder = self.queue.library
        if str(line["file"]).startswith("previews/"):
            folder = self.queue.folder / "previews"
        add_piece(line, folder / name)

    def _order(self, job: Queued) -> dict[str, Any]:
        """The order, after the sources, which are sent."""
        assert self._worker is not None
        given = dict(job.options)
        for option in options.of(REQUEST):
            if option.place != "file" or not given.get(option.key):
                continue
            names = []
            for number, source in enumerate(as_list(given[option.key])):
                path = self.queue.library / str(source)
                name = f"{SOURCES}/{job.id}-{option.key}-{number}{path.suffix}"
                for piece in pieces(path, name):
                    self._worker.send(piece)
                names.append(name)
            given[option.key] = names if isinstance(given[option.key], list | tuple) else names[0]
        order = super()._order(job)
        return {**order, "options": given, **({"preview": f"previews/{job.id}.webp"} if "preview" in order else {})}

    def _died(self, watch: Watch, how: str) -> None:
        if self._answers:
            return super()._died(watch, how)
        self._worker, self.is_reached = None, False
        self._say("died", f"{self.host} cannot be reached ({how}); others make its videos, and it is tried again")
        about = {name: value for name, value in watch.job.about.items() if name != "machine"}
        self.queue.note(watch.job.id, about=about)
        self.queue.put_back(watch.job.id)
        self._tell_state(watch.job.id)

    @property
    def worker(self) -> dict[str, Any]:
        return {**super().worker, "machine": self.host}


class Crew(Foreman):
    """The foreman of this machine's worker, and those of other machines'."""

    def __init__(self, queue: Queue, told: Told, machines: list[Machine], make_child: Callable[..., Child] = Child,
                 until_empty: bool = False):  # fmt: skip
        super().__init__(queue, told, make_child, until_empty)
        self.machines, self.others = machines, list[RemoteForeman]()

    def accepts(self, job: Queued) -> bool:
        at = job.about.get("machine")
        return not any(other.host == at and other.is_reached for other in self.others)

    def look(self) -> None:
        super().look()
        for other in self.others:
            other.look()

    def _take_jobs(self) -> None:
        hired = (self.queue, self._told, self._make_child, self.until_empty)
        self.others = [RemoteForeman(machine, *hired) for machine in self.machines]
        for other in self.others:
            other.live = self.live
            other.start()
        try:
            super()._take_jobs()
        finally:
            threads = [threading.Thread(target=other.end) for other in self.others]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    def _is_over(self) -> bool:
        return not any(other.is_busy and other.is_reached for other in self.others) and self.queue.next() is None

    @property
    def worker(self) -> dict[str, Any]:
        return {**super().worker, "machines": [other.worker for other in self.others]}


def as_list(value: Any) -> list[Any]:
    """The values of an option that may have several."""
    return [] if value is None else [*value] if isinstance(value, list | tuple) else [value]


def work_off(queue: Queue, told: Told, machines: list[Machine]) -> None:
    """Make everything that waits, and return.

    Raises:
        BusyError: another process works on the queue.
        WanError: the queue failed.
    """
    foreman = Crew(queue, told, machines, until_empty=True)
    foreman.start()
    try:
        foreman.join()
    except BaseException:
        foreman.end()
        raise
    if foreman.error is not None:
        raise foreman.error if isinstance(foreman.error, WanError) else WanError(str(foreman.error))
