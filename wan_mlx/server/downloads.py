"""Downloads of models, each by a process that is ended to pause it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from ..options import named
from .child import Child

FETCHER = "wan_mlx.server.fetcher"
RECENT = 20  # events over which the speed is taken
DOWNLOADING, PAUSED, FAILED, DONE = "downloading", "paused", "failed", "done"


class Download:
    """A model's download."""

    def __init__(self, model: str, told: Callable[[Mapping[str, Any]], Any], make_child: Callable[..., Child] = Child):
        self.model, self._told, self._make_child = model, told, make_child
        self.state = PAUSED
        self.error: str | None = None
        self._bytes, self._file = 0, ""
        self._total: int | None = None
        self._seen: deque[tuple[float, int]] = deque(maxlen=RECENT)
        self._child: Child | None = None

    def start(self) -> None:
        """Begin, or go on."""
        if self.state != DOWNLOADING:
            self.state, self.error = DOWNLOADING, None
            self._seen.clear()
            self._child = self._make_child(FETCHER, [self.model, named("source").left_out()], self._hear, self._gone)
            self._tell()

    def pause(self) -> None:
        if self.state == DOWNLOADING and self._child is not None:
            self.state = PAUSED
            self._child.end()
            self._tell()

    end = pause

    def _hear(self, event: dict[str, Any]) -> None:
        if event.get("event") == "download":
            self._bytes, self._total, self._file = event["bytes"], event["total"], event["file"]
            self._seen.append((time.monotonic(), self._bytes))
        elif event.get("event") == "error":
            self.error = event["message"]
        self._tell()

    def _gone(self, how: str) -> None:
        if self.state != DOWNLOADING:  # it was paused
            return
        self.state = DONE if how == "exit code 0" else FAILED
        if self.state == FAILED:
            self.error = self.error or f"the download ended ({how}); start it again, and it goes on"
        self._tell()

    def _tell(self) -> None:
        self._told({"event": "download", "model": self.model, **self.as_json()})

    def as_json(self) -> dict[str, Any]:
        """As the API shows it."""
        speed = None
        if len(self._seen) > 1 and self.state == DOWNLOADING:
            (began, first), (now, last) = self._seen[0], self._seen[-1]
            speed = (last - first) / (now - began) if now > began else None
        left = (self._total - self._bytes) / speed if speed and self._total else None
        return {"state": self.state, "bytes": self._bytes, "total": self._total, "file": self._file,
                "bytes_per_second": speed and round(speed), "seconds_left": left and round(left),
                "error": self.error}  # fmt: skip
