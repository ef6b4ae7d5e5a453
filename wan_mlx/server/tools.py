"""Tools for agents over the queue of a library, by the Model Context Protocol."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

from .. import __version__
from ..errors import UsageError, WanError
from ..runs.queue import DONE, Queued
from .fields import is_name
from .library import default_library
from .refused import Refused
from .studio import Studio

INSTRUCTIONS = (
    "Videos by the open Wan models on this machine. A video takes minutes to hours, so submit_video returns at once; "
    "ask video_status now and then, and video_result when it is completed. plan_video says what one would need. "
    "The model nano is there at once; other models are downloaded when they are first used."
)


@contextmanager
def told() -> Iterator[None]:
    """Within this block what is refused is told to the agent, in its line; of other failures it hears none."""
    try:
        yield
    except (Refused, WanError, ValueError) as error:
        raise ToolError(str(error)) from error


def tools_of(studio: Studio) -> MCPServer:
    """A server of the tools."""
    server = MCPServer("wan_mlx", instructions=INSTRUCTIONS, version=__version__, lifespan=studio.lifespan)

    def job_of(id: str) -> Queued:
        try:
            return studio.queue.get(id)
        except KeyError:
            raise Refused(404, f"there is no video {id[:100]!r}") from None

    @server.tool()
    async def submit_video(
        prompt: str,
        model: str | None = None,
        size: str | None = None,
        seconds: float | None = None,
        seed: int | None = None,
        options: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Ask for a video, or a picture with {"num_frames": 1} in options; returns its id and status.

        options: any others by name, such as steps, guidance_scale, negative_prompt, loras, quality ("draft", "good",
        "best"); a source such as image is library:NAME, video_ID, video_ID#last or a data: URL.
        """
        named = {"prompt": prompt, "model": model, "size": size, "seconds": seconds, "seed": seed}
        given = {**(options or {}), **{name: value for name, value in named.items() if value is not None}}
        with told():
            return studio.video(await studio.submit(given, []))

    @server.tool()
    async def video_status(id: str) -> dict[str, Any]:
        """How far a video is: status, progress in percent, step, seconds left."""
        with told():
            return studio.video(job_of(id))

    @server.tool()
    async def video_result(id: str) -> dict[str, Any]:
        """The file of a completed video, as a path on this machine."""
        with told():
            job = job_of(id)
            if job.state != DONE:
                raise Refused(409, f"{id} is {job.state}; its file is there when it is done")
            return {"id": id, "path": str(studio.library.file(job.output)), "suspect": job.suspect}

    @server.tool()
    async def plan_video(options: dict[str, Any]) -> dict[str, Any]:
        """What a video would need in memory and time, and whether it fits: options as for submit_video."""
        with told():
            return await studio.plan(options)

    @server.tool()
    async def list_models() -> list[dict[str, Any]]:
        """The models: task, size, whether they are on this machine, whether they fit."""
        shown = ("id", "task", "size", "num_frames", "fps", "here", "fits", "peak_bytes", "vocabulary")
        return [{name: row.get(name) for name in shown} for row in await studio.models()]

    return server


def serve_tools(library: Path | None, model: str) -> int:
    """Answer on standard input and output until that ends; returns the exit code."""
    if not is_name(model):
        raise UsageError(f"--model is {model!r}, expected one that `wan-mlx models` lists, or owner/name on a hub")
    tools_of(Studio((library or default_library()).expanduser(), model)).run()
    return 0
