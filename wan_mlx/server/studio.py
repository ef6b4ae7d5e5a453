"""What the server serves: the library, the model that is meant without one, and the events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from ..runs.queue import WAITING, Queued
from .feed import Feed
from .library import Library
from .objects import as_video
from .refused import Refused


class Studio:
    """A library at work.

    Attributes:
        library: with its queue.
        default_model: of a request without one.
        feed: of events, for all who listen.
        has_token: whether requests must have one.
    """

    def __init__(self, folder: Path, default_model: str = "nano"):
        self.library, self.default_model = Library(folder), default_model
        self.feed = Feed()
        self.has_token = False

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:
        """As long as the server runs."""
        self.feed.begin()
        try:
            yield
        finally:
            self.feed.end()

    def live(self, id: str) -> Mapping[str, Any]:
        """What a job's events have told so far."""
        return {}

    def video(self, job: Queued) -> dict[str, Any]:
        """A job as the API shows it."""
        position = None
        if job.state in WAITING:
            order = [one.id for one in self.library.queue.in_order() if one.state in WAITING]
            position = order.index(job.id) + 1 if job.id in order else None
        return as_video(job, self.live(job.id), position, self.library.folder)

    def worker_state(self) -> dict[str, Any]:
        return {"state": "idle", "message": None, "restarts": 0}

    async def _not_yet(self, *given: Any, **more: Any) -> Any:
        raise Refused(503, "not ready yet")

    submit: Any = _not_yet
    keep_upload: Any = _not_yet
    poster: Any = _not_yet
    describe: Any = _not_yet
    upload_poster: Any = _not_yet
    facts: Any = _not_yet
    models: Any = _not_yet
    download: Any = _not_yet
    pause_download: Any = _not_yet
    plan: Any = _not_yet
    plans: Any = _not_yet
    images: Any = _not_yet
    ask: Any = _not_yet
    move: Any = _not_yet
    delete: Any = _not_yet
    loras: Any = _not_yet
    delete_file: Any = _not_yet
    has_upload: Any = _not_yet
    delete_upload: Any = _not_yet
