"""Routes of the gallery and of uploads: the files of the library's folder, and what is dropped on the page."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response

from .objects import page_of
from .packed import MOST_FILES
from .refused import Refused
from .studio import Studio
from .videos import file_of, poster_of


def gallery_routes(studio: Studio) -> APIRouter:
    """Everything under /v1/library and /v1/uploads."""
    routes, library = APIRouter(tags=["library"]), studio.library

    def known(name: str) -> None:
        try:
            library.file(name)
        except KeyError:
            raise Refused(404, f"there is no file {name[:100]!r} in the library") from None

    @routes.get("/v1/library", summary="The files of the library, the newest first, with their settings")
    async def listing(limit: Annotated[int, Query(ge=1, le=200)] = 50, after: str | None = None) -> dict[str, Any]:
        names = library.names()
        if after is not None:
            if after not in names:
                raise Refused(404, f"there is no file {after[:100]!r} in the library to list after", param="after")
            rest = names[names.index(after) + 1 :]
        else:
            rest = names
        rows = await studio.describe(rest[:limit])
        return {**page_of(rows, len(rest) > limit), "total": len(names)}

    @routes.get("/v1/library/{name}", summary="A file of the library")
    async def details(name: str) -> dict[str, Any]:
        known(name)
        return (await studio.describe([name]))[0]

    @routes.get("/v1/library/{name}/content", summary="Its bytes")
    async def content(name: str, download: bool = False) -> Response:
        return file_of(studio, name, download)

    @routes.get("/v1/library/{name}/preview", summary="A small picture of it")
    async def preview(name: str) -> Response:
        return await poster_of(studio, name)

    @routes.delete("/v1/library/{name}", summary="Move it to the Trash")
    async def delete(name: str) -> dict[str, Any]:
        known(name)
        studio.delete_file(name)
        return {"name": name, "object": "file.deleted", "deleted": True}

    @routes.post("/v1/uploads", status_code=201,
                 summary="Send a picture or a video; of one made here, its settings; several files are a folder",
                 openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": {
                     "type": "object", "required": ["file"],
                     "properties": {"file": {"type": "string", "format": "binary"}}}}}}})  # fmt: skip
    async def upload(request: Request) -> JSONResponse:
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise Refused(415, "expected multipart/form-data with a field file")
        async with request.form(max_files=MOST_FILES, max_fields=4) as form:
            files = [file for file in form.getlist("file") if not isinstance(file, str)]
            if not files:
                raise Refused(400, "file is missing: send it as the field file of multipart/form-data", param="file")
            return JSONResponse(await studio.uploads.keep_several(files), 201)

    @routes.get("/v1/uploads/{id}", summary="What was sent")
    async def upload_details(id: str) -> dict[str, Any]:
        return studio.uploads.about(id)

    @routes.get("/v1/uploads/{id}/preview", summary="A small picture of it")
    async def upload_preview(id: str) -> Response:
        return FileResponse(await studio.upload_poster(id), media_type="image/webp")

    @routes.delete("/v1/uploads/{id}", summary="Forget it")
    async def forget(id: str) -> dict[str, Any]:
        studio.uploads.delete(id)
        return {"id": id, "object": "upload.deleted", "deleted": True}

    return routes
