"""The clerk, as the server asks it: questions, answered by a process that is replaced if it dies."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from itertools import count
from pathlib import Path
from typing import Any

from .child import Child
from .library import plain
from .refused import Refused

CLERK = "wan_mlx.server.clerk"
PATIENCE = 120.0  # seconds for an answer
STATUS = {"invalid_value": 400, "does_not_fit": 400, "failed": 500}


class Desk:
    """Asks a clerk that works in a folder; any thread may ask.

    Args:
        folder: of the library.
        make_child: starts a clerk; of tests.
    """

    def __init__(self, folder: str, make_child: Callable[..., Child] = Child):
        self._folder, self._make_child = folder, make_child
        self._numbers = count()
        self._open: dict[int, Future] = {}
        self._clerk: Child | None = None
        self._lock = threading.Lock()
        self._is_over = False

    def start(self) -> None:
        """Have a clerk there, before anybody asks."""
        with self._lock:
            self._there()

    def _there(self) -> Child:
        if self._is_over:
            raise Refused(503, "the server is ending")
        if self._clerk is None or not self._clerk.is_alive:
            self._clerk = self._make_child(CLERK, [self._folder], self._hear, self._gone)
        return self._clerk

    def end(self) -> None:
        with self._lock:
            self._is_over, clerk = True, self._clerk
        if clerk is not None:
            clerk.end()

    def put(self, what: str, **question: Any) -> Future:
        """Ask; the future raises `Refused` where the answer is an error, or none comes."""
        future: Future = Future()
        with self._lock:
            number, clerk = next(self._numbers), self._there()
            self._open[number] = future
        clerk.send({"ask": number, "what": what, **question})
        return future

    async def ask(self, what: str, **question: Any) -> Any:
        """The answer.

        Raises:
            Refused: it is an error, or none came in time: then the clerk is replaced.
        """
        future = self.put(what, **question)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), PATIENCE)
        except asyncio.TimeoutError:
            with self._lock:
                if self._clerk is not None:
                    self._clerk.kill()
            raise Refused(503, f"no answer in {PATIENCE:.0f} s; try again", "not_ready") from None

    def _hear(self, line: dict[str, Any]) -> None:
        with self._lock:
            future = self._open.pop(line.get("answer", -1), None)
        if future is None or future.cancelled():
            return
        if "error" in line:
            message = plain(line["error"], Path(self._folder))
            future.set_exception(Refused(STATUS.get(line["code"], 500), message, line["code"]))
        else:
            future.set_result(line["value"])

    def _gone(self, how: str) -> None:
        with self._lock:
            left, self._open = [*self._open.values()], {}
        for future in left:
            if not future.cancelled():
                future.set_exception(Refused(500, f"the process that reads files ended ({how}); try again", "failed"))
