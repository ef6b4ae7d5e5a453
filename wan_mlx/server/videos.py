"""Routes of the queue: videos are asked for, watched, ordered, stopped, fetched and deleted."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse

from ..errors import nearest
from ..runs.queue import DONE, STATES, Queued
from ..storage import parse_json
from .objects import page_of
from .packed import MOST_FILES
from .refused import Refused
from .schema import request_schema
from .studio import Studio

BODY = {
    "requestBody": {
        "required": True,
        "content": {kind: {"schema": request_schema()} for kind in ("application/json", "multipart/form-data")},
    }
}
FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
FOLDERS = ("src_root_path",)  # sources that are folders: several files, or a zip
MOST_AT_ONCE = 100
NO_STORE = {"cache-control": "no-store"}


def job_of(studio: Studio, id: str) -> Queued:
    """The job of that id, or a 404."""
    try:
        return studio.library.queue.get(id)
    except KeyError:
        raise Refused(404, f"there is no video {id[:100]!r}") from None


async def fields_of(request: Request, studio: Studio, kept: list[str]) -> dict[str, Any]:
    """The fields of a JSON or multipart request; files of it are kept as uploads, which are named, and in ``kept``."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in FORMS:
        async with request.form(max_files=MOST_FILES, max_fields=200) as form:
            found: dict[str, Any] = {}
            for name in FOLDERS:
                if files := [file for file in form.getlist(name) if not isinstance(file, str)]:
                    found[name] = (await studio.uploads.keep_several(files))["id"]
                    kept.append(found[name])
            for name, value in form.multi_items():
                if name in found and name in FOLDERS:
                    continue
                if not isinstance(value, str):
                    value = (await studio.uploads.keep(value))["id"]
                    kept.append(value)
                name = name.removesuffix("[]")
                if name in found:
                    found[name] = [*(found[name] if isinstance(found[name], list) else [found[name]]), value]
                else:
                    found[name] = value
            return found
    if kind != "application/json":
        raise Refused(415, f"Content-Type is {kind or 'missing'}, expected application/json or multipart/form-data")
    return json_object(await request.body())


def json_object(body: bytes) -> dict[str, Any]:
    try:
        found = parse_json(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise Refused(400, f"the body is a JSON {type(found).__name__}, expected an object such as "
                           '{"prompt": "a cat"}')  # fmt: skip
    return found


def video_routes(studio: Studio) -> APIRouter:
    """Everything under /v1/videos, /v1/queue and /v1/events."""
    routes, queue = APIRouter(tags=["videos"]), studio.library.queue

    @routes.post("/v1/videos", summary="Ask for a video", openapi_extra=BODY)
    async def create(request: Request) -> dict[str, Any]:
        kept: list[str] = []
        try:
            return studio.video(await studio.submit(await fields_of(request, studio, kept), kept))
        except BaseException:
            for id in kept:
                studio.uploads.delete(id)
            raise

    @routes.get("/v1/videos", summary="The videos that were asked for")
    async def listing(
        limit: Annotated[int, Query(ge=1, le=MOST_AT_ONCE)] = 20,
        after: str | None = None,
        order: str = "desc",
        state: str | None = None,
    ) -> dict[str, Any]:
        if order not in ("asc", "desc"):
            raise Refused(400, f"order is {order[:50]!r}, expected asc or desc", param="order")
        states = state.split(",") if state else []
        for one in states:
            if one not in STATES:
                raise Refused(400, f"state is {one[:50]!r}, expected {', '.join(STATES)}{nearest(one, STATES)}",
                              param="state")  # fmt: skip
        jobs = queue.all(*states)
        jobs = jobs[::-1] if order == "desc" else jobs
        if after is not None:
            ids = [job.id for job in jobs]
            if after not in ids:
                raise Refused(404, f"there is no video {after[:100]!r} to list after", param="after")
            jobs = jobs[ids.index(after) + 1 :]
        return page_of([studio.video(job) for job in jobs[:limit]], len(jobs) > limit)

    @routes.get("/v1/queue", summary="What runs and what waits, in order")
    async def waiting() -> dict[str, Any]:
        return {**page_of([studio.video(job) for job in queue.in_order()], False), "worker": studio.worker_state()}

    @routes.get("/v1/videos/{id}", summary="How far a video is")
    async def status(id: str) -> JSONResponse:
        return JSONResponse(studio.video(job_of(studio, id)))  # asked often: it is not validated again

    @routes.get("/v1/videos/{id}/content", summary="The finished file")
    async def content(id: str, download: bool = False) -> Response:
        job = job_of(studio, id)
        if job.state != DONE:
            raise Refused(409, f"{id} is {job.state}; its file is there when it is done", "not_ready")
        return file_of(studio, job.output, download)

    @routes.get("/v1/videos/{id}/preview", summary="What it is becoming; of a finished one, a small picture")
    async def preview(id: str, still: bool = False) -> Response:
        job = job_of(studio, id)
        if job.state == DONE:
            return await poster_of(studio, job.output)
        path = studio.library.previews / f"{job.id}.{'png' if still else 'webp'}"
        try:
            picture = path.read_bytes()  # at once: the worker puts the next in its place
        except FileNotFoundError:
            raise Refused(404, f"{id} has no preview yet; the first comes with its first step", "not_ready") from None
        return Response(picture, media_type=f"image/{path.suffix[1:]}", headers=NO_STORE)

    @routes.get("/v1/videos/{id}/events", summary="Its events, those of --json, as server-sent events")
    async def events(id: str, last_event_id: Annotated[str, Header()] = "") -> StreamingResponse:
        job_of(studio, id)
        return stream(studio, id, last_event_id)

    @routes.get("/v1/events", summary="Events of all videos and downloads, for the page")
    async def everything() -> StreamingResponse:
        return stream(studio, "", "", ends=False)

    def ask(word: str, wish: str, summary: str) -> None:
        @routes.post(f"/v1/videos/{{id}}/{word}", summary=summary)
        async def asked(id: str) -> dict[str, Any]:
            job_of(studio, id)
            try:
                return studio.video(studio.ask(id, wish))
            except ValueError as error:
                raise Refused(409, str(error)) from None

    ask("cancel", "stop", "Stop it; what is made of it is kept")
    ask("pause", "pause", "Let it wait")
    ask("resume", "resume", "Go on where it was")

    @routes.post("/v1/videos/{id}/move", summary="Put it before another one that waits, or to the end")
    async def move(id: str, request: Request) -> dict[str, Any]:
        before = json_object(await request.body()).get("before")
        for one in filter(None, (id, before)):
            job_of(studio, str(one))
        try:
            return studio.video(studio.move(id, before))
        except ValueError as error:
            raise Refused(409, str(error)) from None

    @routes.post("/v1/videos/{id}/again", summary="Ask for it anew, with another seed or other changes")
    async def again(id: str, request: Request) -> dict[str, Any]:
        changes = json_object(await request.body() or b"{}")
        job = job_of(studio, id)
        fields = {**job.options, "seed": None, **changes}
        return studio.video(await studio.submit(fields, [], known=job.options))

    @routes.delete("/v1/videos/{id}", summary="Take it out of the queue; its file goes to the Trash")
    async def delete(id: str) -> dict[str, Any]:
        studio.delete(job_of(studio, id))
        return {"id": id, "object": "video.deleted", "deleted": True}

    return routes


def stream(studio: Studio, channel: str, last: str, ends: bool = True) -> StreamingResponse:
    after = int(last) if last.isdecimal() and len(last) < 12 else 0
    return StreamingResponse(studio.feed.listen(channel, after, ends), media_type="text/event-stream", headers=NO_STORE)


def file_of(studio: Studio, name: str, download: bool) -> Response:
    """A file of the library, of which ranges may be asked for."""
    try:
        path = studio.library.file(name)
    except KeyError:
        raise Refused(404, f"there is no file {name[:100]!r} in the library") from None
    headers = {"cache-control": "private, no-cache"}
    kind = "attachment" if download else "inline"
    return FileResponse(path, filename=path.name, content_disposition_type=kind, headers=headers)


async def poster_of(studio: Studio, name: str) -> Response:
    """A small picture of a file of the library."""
    try:
        path = studio.library.file(name)
    except KeyError:
        raise Refused(404, f"there is no file {name[:100]!r} in the library") from None
    headers = {"cache-control": "private, no-cache"}
    return FileResponse(await studio.poster(path), media_type="image/webp", headers=headers)
