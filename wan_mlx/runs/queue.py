"""A queue of videos to make, which outlives processes and power cuts: SQLite, in a hidden folder of the library.

The library is the folder that the videos are made in. Any process may add, order and stop; one at a time does the work,
held apart by a lock (`Queue.working`). What a run has made is in its own folder (`runs.folder`) and not here, so that a
job which was running when the machine lost power is only put back, and goes on where its folder is.

Nothing here imports MLX.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import BusyError, WanError

FOLDER = ".wan_mlx-queue"  # in the library
PRIVATE = 0o700
VERSION = 1
MAX_SEED = 2**31  # of those that are drawn
PATIENCE = 10.0  # seconds for which another process's change is waited for

QUEUED, RUNNING, PAUSED, DONE, FAILED, STOPPED = STATES = ("queued", "running", "paused", "done", "failed", "stopped")
WAITING = (QUEUED, PAUSED)
# A wish → the states in which it is granted at once, and the state it leads to; a running job hears of it instead.
GRANTED = {
    "pause": ((QUEUED,), PAUSED),
    "stop": ((QUEUED, PAUSED), STOPPED),
    "resume": ((PAUSED, STOPPED, FAILED), QUEUED),
}
TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, place REAL NOT NULL, state TEXT NOT NULL, wish TEXT NOT NULL DEFAULT '',
    options TEXT NOT NULL, output TEXT NOT NULL UNIQUE, about TEXT NOT NULL, created REAL NOT NULL,
    started REAL, ended REAL, error TEXT, code TEXT, suspect TEXT, seconds REAL NOT NULL DEFAULT 0,
    peak INTEGER NOT NULL DEFAULT 0, resumed INTEGER NOT NULL DEFAULT 0,
    step_seconds REAL
)
"""


@dataclass(frozen=True)
class Queued:
    """A job of the queue.

    Attributes:
        id: "video_" and letters drawn at random.
        place: where it stands among the others.
        state: one of `STATES`.
        wish: what a running job is asked to do: "pause", "stop", "delete", or "".
        options: of the run, by their keywords, as JSON has them.
        output: the name of its file in the library.
        about: what is known of the video beforehand: model, size, frames.
        created, started, ended: seconds since 1970; None as long as it has not.
        error, code: why it failed, in a line, and in a word for programs.
        suspect: what is wrong with the video that was made, if it looks wrong.
        seconds, peak: spent in making it, over all goes; the most bytes that MLX held.
        resumed: how often it went on after its process had died.
        step_seconds: of a sampling step, on average.
    """

    id: str
    place: float
    state: str
    wish: str
    options: Mapping[str, Any]
    output: str
    about: Mapping[str, Any]
    created: float
    started: float | None = None
    ended: float | None = None
    error: str | None = None
    code: str | None = None
    suspect: str | None = None
    seconds: float = 0.0
    peak: int = 0
    resumed: int = 0
    step_seconds: float | None = None

    @property
    def is_over(self) -> bool:
        return self.state in (DONE, FAILED, STOPPED)


COLUMNS = tuple(column.name for column in fields(Queued))
AS_JSON = ("options", "about")


@dataclass
class Queue:
    """The queue of a library, which is made if it is not there; any thread may use it.

    Raises:
        WanError: it cannot be opened, is damaged, or is of a later version of wan_mlx.
    """

    library: Path
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    def __post_init__(self):
        self.library = Path(self.library).absolute()
        self.folder = self.library / FOLDER
        try:
            self.folder.mkdir(PRIVATE, parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                self.folder / "queue.db", PATIENCE, isolation_level=None, check_same_thread=False
            )
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version > VERSION:
                raise WanError(f"the queue of {self.library} is of a later version of wan_mlx; use that one")
            with self._change():
                self._db.execute(TABLE)
                self._db.execute(f"PRAGMA user_version={VERSION}")
        except (OSError, sqlite3.Error) as error:
            raise WanError(f"the queue of {self.library} cannot be opened ({error})") from error

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextmanager
    def _change(self) -> Iterator[None]:
        """A change that happens as a whole, after those of other processes."""
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield
                except BaseException:
                    self._db.execute("ROLLBACK")
                    raise
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                raise WanError(f"the queue of {self.library} cannot be changed ({error})") from error

    def _select(self, rest: str = "", values: Collection[Any] = ()) -> list[Queued]:
        with self._lock:
            try:
                rows = self._db.execute(f"SELECT {', '.join(COLUMNS)} FROM jobs {rest}", tuple(values)).fetchall()
            except sqlite3.Error as error:
                raise WanError(f"the queue of {self.library} cannot be read ({error})") from error
        named = (dict(zip(COLUMNS, row, strict=True)) for row in rows)
        return [Queued(**{**row, **{name: json.loads(row[name]) for name in AS_JSON}}) for row in named]

    # What is in it

    @property
    def version(self) -> int:
        """Another number after every change that another process or `Queue` has made."""
        with self._lock:
            return self._db.execute("PRAGMA data_version").fetchone()[0]

    def get(self, id: str) -> Queued:
        """The job of that id.

        Raises:
            KeyError: there is none.
        """
        found = self._select("WHERE id = ?", [id])
        if not found:
            raise KeyError(id)
        return found[0]

    def all(self, *states: str) -> list[Queued]:
        """The jobs in these states, or all: the oldest first."""
        marks = ", ".join("?" * len(states))
        return self._select(f"{f'WHERE state IN ({marks})' if states else ''} ORDER BY created, rowid", states)

    def in_order(self) -> list[Queued]:
        """Those that run, wait or are paused, in their order."""
        return self._select("WHERE state IN (?, ?, ?) ORDER BY state != 'running', place", (RUNNING, *WAITING))

    def of_output(self, name: str) -> Queued | None:
        """The job that makes or has made a file of the library."""
        return next(iter(self._select("WHERE output = ?", [name])), None)

    # Changes that anybody makes

    def add(self, options: Mapping[str, Any], output: str, about: Mapping[str, Any] | None = None) -> Queued:
        """Put a job at the end; a seed that is to be drawn is drawn here, so that the same video is made however often
        it is cut.

        Raises:
            ValueError: another one has this output.
        """
        seed = options.get("seed")
        options = {**options, "seed": secrets.randbelow(MAX_SEED) if seed is None or seed < 0 else seed}
        job = Queued(f"video_{secrets.token_hex(12)}", 0.0, QUEUED, "", options, output, about or {}, time.time())
        with self._change():
            if self.of_output(output):
                raise ValueError(f"output {output} is that of another job of the queue; choose another name")
            row = {**vars(job), "place": self._last() + 1}
            values = [json.dumps(row[name]) if name in AS_JSON else row[name] for name in COLUMNS]
            self._db.execute(f"INSERT INTO jobs ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})",
                             values)  # fmt: skip
        return self.get(job.id)

    def ask(self, id: str, wish: str) -> Queued:
        """Have a job paused, stopped or resumed; a running one does so after its step.

        Raises:
            KeyError: there is none of that id.
            ValueError: it is in a state in which that cannot be.
        """
        with self._change():
            job = self.get(id)
            states, state = GRANTED[wish]
            if job.state in states:
                place = self._last() + 1 if job.is_over else job.place
                self._set(id, state=state, place=place, ended=time.time() if state == STOPPED else None, error=None,
                          code="stopped" if state == STOPPED else None, wish="")  # fmt: skip
            elif job.state == RUNNING:
                self._set(id, wish="" if wish == "resume" else wish)
            elif job.state != state:
                raise ValueError(f"{id} is {job.state}, so it cannot be asked to {wish}")
        return self.get(id)

    def move(self, id: str, before: str | None = None) -> Queued:
        """Put a waiting job before another one, or to the end.

        Raises:
            KeyError: there is none of these ids.
            ValueError: one of them does not wait.
        """
        with self._change():
            for one in filter(None, (id, before)):
                if (state := self.get(one).state) not in WAITING:
                    raise ValueError(f"{one} is {state}, so it has no place among those that wait")
            order = [job.id for job in self._select("WHERE state IN (?, ?) ORDER BY place", WAITING) if job.id != id]
            order.insert(order.index(before) if before in order else len(order), id)
            for place, one in enumerate(order):
                self._set(one, place=place)
        return self.get(id)

    def delete(self, id: str) -> bool:
        """Take a job out of the queue; a running one is only asked to end, and is taken out then.

        Returns:
            whether it is out.
        """
        with self._change():
            if is_running := self.get(id).state == RUNNING:
                self._set(id, wish="delete")
            else:
                self._db.execute("DELETE FROM jobs WHERE id = ?", [id])
        return not is_running

    # Changes of the process that does the work

    @contextmanager
    def working(self, wait: bool = False) -> Iterator[None]:
        """Be the one that does the work, within this block; a job that was cut is put back, to go on first.

        Raises:
            BusyError: another process is.
        """
        import fcntl

        path = self.folder / "lock"
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise BusyError(f"another process works on the queue of {self.library}") from None
            with self._change():
                self._db.execute("UPDATE jobs SET state = ?, resumed = resumed + 1 WHERE state = ?", (QUEUED, RUNNING))
            yield
        finally:
            os.close(file)

    def take(self, accepts: Callable[[Queued], bool] = lambda job: True) -> Queued | None:
        """The next job that is accepted, which is running from now on; None if none waits."""
        with self._change():
            job = next(filter(accepts, self._select("WHERE state = ? ORDER BY place", [QUEUED])), None)
            if job is None:
                return None
            self._set(job.id, state=RUNNING, wish="", started=job.started or time.time(), ended=None)
        return self.get(job.id)

    def next(self) -> Queued | None:
        """The job that `take` would take."""
        return next(iter(self._select("WHERE state = ? ORDER BY place LIMIT 1", [QUEUED])), None)

    def put_back(self, id: str) -> None:
        """A running job waits again, at its place, because its process has died."""
        with self._change():
            self._set(id, state=QUEUED, resumed=self.get(id).resumed + 1)

    def end(self, id: str, state: str, **changes: Any) -> None:
        """A running job has come to its end, or is paused."""
        ended = None if state == PAUSED else time.time()
        with self._change():
            self._set(id, state=state, wish="", ended=ended, **changes)

    def note(self, id: str, **changes: Any) -> None:
        """Keep more of a job."""
        with self._change():
            self._set(id, **changes)

    def _set(self, id: str, **changes: Any) -> None:
        names = ", ".join(f"{name} = ?" for name in changes)
        values = [json.dumps(value) if name in AS_JSON else value for name, value in changes.items()]
        self._db.execute(f"UPDATE jobs SET {names} WHERE id = ?", [*values, id])

    def _last(self) -> float:
        return self._db.execute("SELECT coalesce(max(place), 0) FROM jobs").fetchone()[0]
