"""What the server serves: the library, those who work for it, and the events of both."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from .. import __version__
from ..runs.queue import DONE, QUEUED, RUNNING, STOPPED, WAITING, Queued
from ..storage import free_space
from . import fields
from .catalog import Catalog
from .child import Child
from .desk import Desk
from .downloads import Download
from .feed import Feed
from .foreman import Foreman
from .library import Library, plain
from .machines import Crew, Machine
from .objects import as_video, shown_options
from .refused import Refused
from .uploads import KINDS, MOST_BYTES, Uploads, is_here

ALL = ""  # the channel of everything, for the page
OFTEN = 0.25  # seconds between two tellings of how far a video is, on that channel
SOON = 0.2  # seconds between two looks at pictures that are waited for
MOST_PICTURES = 10


class Studio:
    """A library at work.

    Args:
        folder: the library's.
        default_model: of a request without one.
        machines: others that make its videos, too.
        make_child: starts the processes that work for it; of tests.

    Attributes:
        library: with its queue.
        feed: of events, for all who listen.
        has_token: whether requests must have one.
    """

    def __init__(
        self, folder: Path, default_model: str = "nano", make_child: Callable[..., Child] = Child,
        machines: Sequence[Machine] = (),
    ):  # fmt: skip
        self.library, self.default_model = Library(folder), default_model
        self.queue, self.feed, self.has_token = self.library.queue, Feed(), False
        self.desk = Desk(str(self.library.folder), make_child)
        self.uploads = Uploads(self.library, self.desk)
        self.catalog = Catalog(self.library, self.desk)
        hired = (self.queue, self._hear, [*machines], make_child)
        self.foreman: Foreman = Crew(*hired) if machines else Foreman(self.queue, self._hear, make_child)
        self.downloads: dict[str, Download] = {}
        self._make_child = make_child
        self._told_at: dict[str, float] = {}

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:
        """As long as the server runs."""
        self.feed.begin()
        self.uploads.clear()
        self.desk.start()
        self.foreman.start()
        watching = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watching.cancel()
            self.feed.end()
            for download in self.downloads.values():
                download.end()
            self.foreman.end()
            self.desk.end()

    # Events

    def _hear(self, id: str, event: Mapping[str, Any]) -> None:
        """An event of the foreman's, of a job or of the worker; in its threads."""
        event = plain(event, self.library.folder)
        if not id:
            return self.feed.tell(ALL, event, kept=False)
        if event["event"] == "deleted":
            self._forget(id, event["output"])
            return self.feed.tell(ALL, {"event": "deleted", "id": id}, kept=False)
        if event["event"] == "start":
            self.feed.restart(id)
        elif event["event"] == "preview":
            at = f"/v1/videos/{id}/preview"
            event = {**event, "animation": at, "sheet": f"{at}?still=1"}
        self.feed.tell(id, event)
        if event["event"] in ("state", "step", "stage_started", "result", "error", "preview") or self._is_due(id):
            self._told_at[id] = time.monotonic()
            self._tell(id)
        if event["event"] == "result":
            self.feed.tell(ALL, {"event": "library"}, kept=False)

    def _is_due(self, id: str) -> bool:
        return time.monotonic() > self._told_at.get(id, 0.0) + OFTEN

    def _tell(self, id: str) -> None:
        """Tell the page how far a video is."""
        try:
            self.feed.tell(ALL, {"event": "video", "video": self.video(self.queue.get(id))}, kept=False)
        except KeyError:
            pass

    async def _watch(self) -> None:
        """Tell the page of what other processes have changed: the queue, and the library's folder."""
        version, seen = self.queue.version, self.library.changed_at
        while True:
            await asyncio.sleep(1.0)
            now = self.queue.version, self.library.changed_at
            if now[0] != version:
                self.foreman.look()
                self.feed.tell(ALL, {"event": "queue"}, kept=False)
            if now[1] != seen:
                self.feed.tell(ALL, {"event": "library"}, kept=False)
            version, seen = now

    # Videos

    def video(self, job: Queued) -> dict[str, Any]:
        """A job as the API shows it."""
        position = None
        if job.state in WAITING:
            order = [one.id for one in self.queue.in_order() if one.state in WAITING]
            position = order.index(job.id) + 1 if job.id in order else None
        live = self.foreman.live.get(job.id, {}) if job.state == RUNNING else {}
        return as_video(job, live, position, self.library.folder)

    async def submit(
        self, given: Mapping[str, Any], kept: list[str], known: Mapping[str, Any] | None = None
    ) -> Queued:
        """Put a request's video into the queue.

        Args:
            given: the fields of the request.
            kept: gets the uploads that are made of its sources, for whoever forgets them if it is refused.
            known: the options of an earlier one, of which it may have the sources.

        Raises:
            Refused: a field is wrong.
        """
        with_sources = await self.uploads.sources_in(given, kept, known)
        found = fields.options_of(with_sources, self.default_model)
        try:
            about = {**fields.about(found), **await self.desk.ask("check", given=found)}
        except Refused as error:
            param = next((name for name in found if str(error).startswith(name)), None)
            raise Refused(error.status, str(error), error.code, param) from None
        ending = ".png" if about.get("num_frames") == 1 else ".mp4"
        name = self.library.new_name(found["prompt"], ending)
        job = self.queue.add(found, name, about)
        self.foreman.look()
        self._tell(job.id)
        return job

    def ask(self, id: str, wish: str) -> Queued:
        """Have a job paused, stopped or resumed."""
        job = self.queue.ask(id, wish)
        self.foreman.look()
        self.feed.tell(id, {"event": "state", "state": job.state})
        self._tell(id)
        return job

    def move(self, id: str, before: str | None) -> Queued:
        job = self.queue.move(id, before)
        self.feed.tell(ALL, {"event": "queue"}, kept=False)
        return job

    def delete(self, job: Queued) -> None:
        """Take a job out of the queue, with all that was made of it."""
        if job.state == DONE:
            self._to_trash(job.output)
        if self.queue.delete(job.id):
            self._forget(job.id, job.output)
            self.feed.tell(ALL, {"event": "deleted", "id": job.id}, kept=False)
        self.foreman.look()

    def _forget(self, id: str, output: str) -> None:
        self.library.forget(id, output)
        if (self.library.folder / f"{output}.wan").is_dir():
            self.desk.put("forget", output=output)

    def _to_trash(self, name: str) -> None:
        try:
            self.library.trash(self.library.file(name))
        except KeyError:
            return
        except OSError as error:
            raise Refused(500, f"{name} cannot be moved to the Trash: {error.strerror or error}") from None
        self.feed.tell(ALL, {"event": "library"}, kept=False)

    def delete_file(self, name: str) -> None:
        """Move a file of the library to the Trash; a job that made it goes with it."""
        job = self.queue.of_output(name)
        self._to_trash(name)
        if job is not None and job.state == DONE:
            self.delete(job)

    async def images(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Make pictures and wait for them, as ``POST /v1/images/generations`` asks."""
        wanted = {**given, "num_frames": 1}
        count, form = wanted.pop("n", None) or 1, wanted.pop("response_format", None) or "b64_json"
        if not isinstance(count, int) or not 1 <= count <= MOST_PICTURES:
            raise Refused(400, f"n is {str(count)[:50]}, expected 1 to {MOST_PICTURES}", param="n")
        if form not in ("b64_json", "url"):
            raise Refused(400, f"response_format is {str(form)[:50]!r}, expected b64_json or url",
                          param="response_format")  # fmt: skip
        first = await self.submit(wanted, [])
        jobs = [first]
        for number in range(1, count):
            jobs.append(await self.submit({**wanted, "seed": int(first.options["seed"]) + number}, []))
        while not all((now := self.queue.get(job.id)).is_over for job in jobs):
            await asyncio.sleep(SOON)
        data = []
        for job in jobs:
            now = self.queue.get(job.id)
            if now.state != DONE:
                raise Refused(500, now.error or f"{job.id} is {now.state}", now.code or now.state)
            file = self.library.file(now.output)
            data.append({"url": f"/v1/videos/{job.id}/content"} if form == "url" else
                        {"b64_json": base64.b64encode(file.read_bytes()).decode()})  # fmt: skip
        return {"created": int(first.created), "data": data}

    # Plans and models

    async def plan(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What a request's video would need.

        Raises:
            Refused: a field is wrong.
        """
        wanted = dict(given)
        sources = {name: wanted.pop(name) for name in given if self.is_source(name) and given[name]}
        if sources and all(map(is_here, sources.values())):
            wanted |= await self.uploads.sources_in(sources, [])
        if (sources.get("image") or sources.get("input_reference")) and not wanted.get("model"):
            wanted["model"] = "nano-i2v" if self.default_model == "nano" else self.default_model
        found = fields.options_of(wanted, self.default_model, needs_prompt=False)
        model, measures = found["model"], self.foreman.state == "idle"
        told = await self.desk.ask("plan_of", given=found, known=self.known(model), measures=measures)
        return plain(told, self.library.folder)

    @staticmethod
    def is_source(name: str) -> bool:
        option = next((option for option in fields.served() if option.name == name), None)
        return name == "input_reference" or (option is not None and option.place == "file")

    async def plans(self, several: list[Any]) -> list[dict[str, Any]]:
        """Of each request its plan, or why there is none."""
        found = []
        for one in several:
            try:
                if not isinstance(one, dict):
                    raise Refused(400, f"a request is a JSON {type(one).__name__}, expected an object")
                found.append(await self.plan(one))
            except Refused as error:
                found.append({"object": "plan", "error": {"message": str(error), "code": error.code,
                                                           "param": error.param}})  # fmt: skip
        return found

    def known(self, model: str) -> dict[str, Any] | None:
        """The last video that was made with a model, and how long a step of it took."""
        for job in reversed(self.queue.all(DONE, STOPPED)):
            if job.options.get("model") == model and job.step_seconds:
                return {"options": dict(job.options), "step_seconds": job.step_seconds}
        return None

    async def models(self) -> list[dict[str, Any]]:
        """The models as the API shows them."""
        downloads = {model: download.as_json() for model, download in self.downloads.items()}
        return await self.catalog.models(downloads)

    async def model(self, name: str) -> dict[str, Any]:
        return next(row for row in await self.models() if row["id"] == name)

    def loras(self) -> list[dict[str, Any]]:
        return self.catalog.loras()

    async def download(self, model: str) -> dict[str, Any]:
        """Begin a model's download, or go on with it."""
        if model not in self.downloads:
            told = self._tell_download
            self.downloads[model] = Download(model, told, self._make_child)
        self.downloads[model].start()
        return await self.model(model)

    def _tell_download(self, event: Mapping[str, Any]) -> None:
        if event["state"] == "done":
            self.catalog.forget()
        self.feed.tell(ALL, plain(event, self.library.folder), kept=False)

    async def pause_download(self, model: str) -> dict[str, Any]:
        if model in self.downloads:
            await asyncio.to_thread(self.downloads[model].pause)
        return await self.model(model)

    async def facts(self) -> dict[str, Any]:
        """What this server is, and its machine."""
        here = await self.catalog.facts()
        return {
            "version": __version__, "default_model": self.default_model, "library": self.library.label,
            "has_token": self.has_token, **here, "free_disk_bytes": free_space(self.library.folder),
            "queue_length": len(self.queue.all(QUEUED, RUNNING)), "upload": {"max_bytes": MOST_BYTES, "kinds": KINDS},
        }  # fmt: skip

    def worker_state(self) -> dict[str, Any]:
        return plain(self.foreman.worker, self.library.folder)

    # Files

    async def describe(self, names: list[str]) -> list[dict[str, Any]]:
        """Files of the library as the API shows them."""
        rows = await self.catalog.describe(names)
        for row in rows:
            job = self.queue.of_output(row["name"])
            row["video_id"] = job.id if job else None
            if job is not None:
                row["settings"] = shown_options(job.options)  # of which the sources are still here
        return plain(rows, self.library.folder)

    async def poster(self, path: Path) -> Path:
        return await self.catalog.poster(path)

    async def upload_poster(self, id: str) -> Path:
        path = self.uploads.path(id)
        if path.is_dir():  # of a folder the picture in it
            path = min(path.iterdir(), key=lambda file: (file.suffix.lower() not in (".png", ".jpg"), file.name))
        return await self.catalog.poster(path)
