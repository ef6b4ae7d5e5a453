"""The objects that the API answers with, made of the queue's jobs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..option import Option
from ..runs.queue import DONE, FAILED, PAUSED, QUEUED, RUNNING, STOPPED, Queued
from .library import plain
from .schema import served

STATUS = {QUEUED: "queued", PAUSED: "queued", RUNNING: "in_progress", DONE: "completed", FAILED: "failed",
          STOPPED: "failed"}  # fmt: skip
LIVE = ("stage", "step", "steps", "eta_seconds", "active_bytes")  # of a running job, from its events


def as_video(job: Queued, live: Mapping[str, Any], position: int | None, library: Path) -> dict[str, Any]:
    """A job as the API's object "video"; ``live``: what its events have told, ``position``: among those that wait."""
    about = {**job.about, **live}
    size, frames, fps = about.get("size"), about.get("num_frames"), about.get("fps")
    rate = about.get("model_fps") or fps  # RIFE's frames between them make it no longer
    error = None
    if job.state in (FAILED, STOPPED):
        message = job.error or ("it was stopped; what is made of it is kept" if job.state == STOPPED else "it failed")
        error = {"code": job.code or job.state, "message": plain(message, library)}
    return {
        "id": job.id,
        "object": "video",
        "model": plain(about.get("model"), library),
        "status": STATUS[job.state],
        "state": job.state,
        "progress": progress_of(job, about),
        "created_at": int(job.created),
        "started_at": job.started and int(job.started),
        "completed_at": int(job.ended) if job.ended and job.state == DONE else None,
        "error": error,
        "prompt": job.options.get("prompt", ""),
        "size": size and "x".join(map(str, size)),
        "seconds": f"{frames / rate:.6g}" if frames and rate else None,
        "num_frames": frames,
        "fps": fps,
        "seed": job.options.get("seed"),
        "position": position,
        **{name: about.get(name) for name in LIVE},
        "peak_memory_mb": round(job.peak / 2**20) or None,
        "inference_time_s": round(job.seconds, 1) or None,
        "suspect": plain(job.suspect, library),
        "resumed": job.resumed,
        "settings": shown_options(job.options),
        "file": job.output if job.state == DONE else None,
        "kind": "image" if job.output.endswith(".png") else "video",
    }


def progress_of(job: Queued, about: Mapping[str, Any]) -> int:
    """Percent: of the steps, of which decoding stands for a twentieth."""
    if job.state == DONE:
        return 100
    steps, step = about.get("steps"), about.get("step") or 0
    return min(99, int(95 * step / steps + 5 * (about.get("decoded") or 0))) if steps else 0


def shown_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a job as a request may have them: sources by their names in the API."""
    known = {option.name: option for option in served()}
    return {name: _shown(known[name], value) for name, value in options.items() if name in known}


def _shown(option: Option, value: Any) -> Any:
    if isinstance(value, list) and option.place:
        return [_shown(option, one) for one in value]
    if not isinstance(value, str) or not option.place:
        return value
    path = Path(value)
    if option.place == "file":
        if found := re.fullmatch(r"(upload_[0-9a-f]+)\.\w+", path.name):
            return found[1]
        return f"library:{path.name}" if len(path.parts) == 1 else path.name
    return path.name if path.is_absolute() else value


def page_of(rows: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """A list as OpenAI's API has it."""
    return {
        "object": "list",
        "data": rows,
        "first_id": rows[0].get("id") if rows else None,
        "last_id": rows[-1].get("id") if rows else None,
        "has_more": has_more,
    }
