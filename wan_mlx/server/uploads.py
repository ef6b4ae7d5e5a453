"""What is sent: pictures and videos, kept in the library's hidden folder, and what requests say of their sources."""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.datastructures import UploadFile

from ..runs.queue import DONE, FOLDER
from .desk import Desk
from .library import Library, is_plain
from .packed import FOLDER_ENDING, MOST_UNPACKED
from .refused import Refused
from .schema import served

ID = re.compile(r"upload_[0-9a-f]{24}")
SOURCE = re.compile(r"(?P<what>upload_[0-9a-f]{24}|video_[0-9a-f]{24}|library:[^#]+)(#(?P<which>first|last))?")
DATA = re.compile(r"data:(?:image|video|audio)/[\w.+-]+;base64,", re.ASCII)
MOST_BYTES = 1 << 28
CHUNK = 1 << 20
OLD = 7 * 86_400  # seconds after which an upload that no job names is forgotten
KINDS = {"image": ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp", "image/tiff", "image/avif"],
         "video": ["video/mp4", "video/quicktime", "video/webm", "video/x-matroska", "video/x-msvideo"],
         "audio": ["audio/wav", "audio/x-wav", "audio/mpeg", "audio/mp4", "audio/flac", "audio/ogg"],
         "folder": ["application/zip"]}  # fmt: skip


def is_here(source: Any) -> bool:
    """Whether a source is a file as it is: neither a frame to be taken out of one, nor sent with the request."""
    several = source if isinstance(source, list) else [source]
    return all(isinstance(one, str) and "#" not in one and bool(SOURCE.fullmatch(one)) for one in several)


class Uploads:
    """The uploads of a library."""

    def __init__(self, library: Library, desk: Desk):
        self.library, self._desk, self.folder = library, desk, library.uploads

    async def keep(self, file: UploadFile) -> dict[str, Any]:
        """Keep a file that was sent, if it is a picture or a video.

        Raises:
            Refused: it is none, is damaged or too large.
        """
        part = self._part()
        try:
            with part.open("xb") as output:
                while data := await file.read(CHUNK):
                    if output.tell() + len(data) > MOST_BYTES:
                        raise Refused(413, f"the file has more than {MOST_BYTES:,} bytes, which are the most")
                    output.write(data)
            return await self._taken(part, Path(file.filename or "file").name)
        finally:
            part.unlink(missing_ok=True)

    async def keep_several(self, files: Sequence[UploadFile]) -> dict[str, Any]:
        """Keep files that were sent together as a folder, under their own names; one alone as `keep` does."""
        if len(files) == 1:
            return await self.keep(files[0])
        part, room = self._part().with_suffix(FOLDER_ENDING), MOST_UNPACKED
        part.mkdir(mode=0o700)
        try:
            for file in files:
                name = Path(file.filename or "").name
                if not is_plain(name) or (part / name).exists():
                    raise Refused(400, f"a file of the folder is called {name[:100]!r}, expected a plain name, and "
                                       "each its own", param="file")  # fmt: skip
                with (part / name).open("xb") as output:
                    while data := await file.read(CHUNK):
                        room -= len(data)
                        if room < 0:
                            raise Refused(413, f"the files have more than {MOST_UNPACKED:,} bytes, which are the most")
                        output.write(data)
            return await self._taken(part, "folder")
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise

    async def keep_bytes(self, data: bytes, name: str) -> dict[str, Any]:
        """As `keep`."""
        part = self._part()
        try:
            part.write_bytes(data)
            return await self._taken(part, name)
        finally:
            part.unlink(missing_ok=True)

    def _part(self) -> Path:
        return self.folder / f"upload_{secrets.token_hex(12)}.part"

    async def _taken(self, part: Path, name: str) -> dict[str, Any]:
        """A file that is there as a whole becomes an upload."""
        if not part.stat().st_size and not part.is_dir():
            raise Refused(400, "the file is empty, expected a picture or a video", param="file")
        try:
            found = await self._desk.ask("look", path=str(part))
        except Refused as error:
            shutil.rmtree(part.with_suffix(FOLDER_ENDING), ignore_errors=True)  # what was unpacked
            message = str(error).replace(part.name, name).replace(part.stem, name)
            raise Refused(error.status, message, error.code, "file") from None
        path = part.with_suffix(found.pop("ending"))
        about: dict[str, Any] = {}
        if found["kind"] != "folder":  # which is there already
            os.replace(part, path)
            (about,) = await self._desk.ask("describe", paths=[str(path)])
        size = sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size
        whole = {"id": part.stem, "object": "upload", **found, "bytes": size, "filename": name[:200],
                 **{name: about.get(name) for name in ("settings", "settings_note", "made_with")}}  # fmt: skip
        path.with_suffix(".json").write_text(json.dumps(whole), encoding="utf-8")
        return whole

    def path(self, id: str) -> Path:
        """The file of an upload.

        Raises:
            Refused: there is none of that id.
        """
        found = [path for path in self.folder.glob(f"{id}.*") if path.suffix not in (".json", ".part", ".poster")
                 ] if ID.fullmatch(id) else []  # fmt: skip
        if not found:
            raise Refused(404, f"there is no upload {id[:100]!r}")
        return found[0]

    def about(self, id: str) -> dict[str, Any]:
        """What `keep` returned."""
        return json.loads(self.path(id).with_suffix(".json").read_text(encoding="utf-8"))

    def delete(self, id: str) -> None:
        self.path(id)
        for path in self.folder.glob(f"{id}.*"):
            _remove(path)

    def clear(self) -> None:
        """Forget uploads that are old, and that no job has for a source; and what was cut while it came."""
        named = " ".join(json.dumps(job.options) for job in self.library.queue.all())
        for path in self.folder.glob("upload_*"):
            is_old = path.stat().st_mtime < time.time() - OLD
            if path.suffix == ".part" or (is_old and path.name.partition(".")[0] not in named):
                _remove(path)

    # Sources of requests

    async def sources_in(
        self, fields: Mapping[str, Any], kept: list[str], known: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """A request's fields, in which every source is the name of a file, seen from the library.

        Args:
            kept: gets the uploads that are made for it.
            known: fields that are so already.

        Raises:
            Refused: one is not in this library.
        """
        found = dict(fields)
        files = {option.name: option for option in served() if option.place == "file"}
        for name, option in {**files, "input_reference": files["image"]}.items():
            given = found.get(name)
            if not given or given == (known or {}).get(name):
                continue
            if isinstance(given, str) and option.default == ():
                given = [given] if given.startswith("data:") else given.split(",")
            if isinstance(given, list) and option.default != ():
                raise Refused(400, f"{name} is given {len(given)} times, expected once", param=name)
            found[name] = [await self._source(name, one, kept) for one in given] if isinstance(given, list) else \
                await self._source(name, given, kept)  # fmt: skip
        return found

    async def _source(self, name: str, given: Any, kept: list[str]) -> str:
        if not isinstance(given, str):
            raise Refused(400, f"{name} is {type(given).__name__}, expected a file, upload_ID, video_ID, library:NAME "
                               "or a data: URL", param=name)  # fmt: skip
        if head := DATA.match(given):
            try:
                data = base64.b64decode(given[head.end() :], validate=True)
            except (binascii.Error, ValueError):
                raise Refused(400, f"{name} is a data: URL whose base64 is damaged", param=name) from None
            kept.append((await self.keep_bytes(data, name))["id"])
            return self._inside(self.path(kept[-1]))
        found = SOURCE.fullmatch(given)
        if found is None:
            raise Refused(400, f"{name} is {given[:100]!r}, expected a file, upload_ID, video_ID, library:NAME "
                               "(perhaps with #first or #last) or a data: URL", param=name)  # fmt: skip
        path = self._file(found["what"], name)
        if found["which"]:
            kept.append(await self._frame(path, found["which"]))
            path = self.path(kept[-1])
        return self._inside(path)

    def _file(self, what: str, name: str) -> Path:
        if what.startswith("upload_"):
            return self.path(what)
        try:
            if what.startswith("library:"):
                return self.library.file(what.removeprefix("library:"))
            job = self.library.queue.get(what)
            if job.state != DONE:
                line = f"{name}: {what} is {job.state}; its file is there when it is done"
                raise Refused(409, line, "not_ready", name)
            return self.library.file(job.output)
        except KeyError:
            raise Refused(404, f"{name}: there is no {what[:100]!r}", param=name) from None

    async def _frame(self, source: Path, which: str) -> str:
        """A frame of a file, as an upload of its own, whose id this returns."""
        part = self._part().with_suffix(".png")
        try:
            await self._desk.ask("frame", source=str(source), which=which, output=str(part))
            data = part.read_bytes()
        finally:
            part.unlink(missing_ok=True)
        return (await self.keep_bytes(data, f"{source.stem}-{which}.png"))["id"]

    def _inside(self, path: Path) -> str:
        """The path as a run that works in the library has it."""
        return path.name if path.parent == self.library.folder else f"{FOLDER}/uploads/{path.name}"


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


