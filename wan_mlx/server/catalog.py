"""What there is: models and LoRAs, and the library's files with what is in them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..cli.list_models import row_of
from ..hub.model_folders import model_folders, models_in
from ..hub.names import WEIGHT_ENDINGS
from ..presets import PRESETS, Preset
from .desk import Desk
from .library import KINDS, Library
from .refused import Refused
from .schema import qualities_of

FRESH = 5.0  # seconds for which what was found is not looked for again
NAMED_SIZES = ("16:9", "9:16", "1:1")


class Catalog:
    """Of a library and of this machine."""

    def __init__(self, library: Library, desk: Desk):
        self._library, self._desk = library, desk
        self._rows: tuple[float, list[dict[str, Any]]] | None = None
        self._fits: dict[str, Any] | None = None
        self._facts: dict[str, Any] | None = None
        self._files: dict[tuple[str, int, int], dict[str, Any]] = {}
        self._totals: dict[str, int] = {}  # bytes of downloads, as the hub has told

    def forget(self) -> None:
        """A model has come."""
        self._rows = None

    async def facts(self) -> dict[str, Any]:
        """The GPU, and the memory that MLX may hold."""
        if self._facts is None:
            self._facts = await self._desk.ask("facts")
        return self._facts

    async def download_size(self, model: str) -> dict[str, Any]:
        """What a model's download has in bytes; the hub is asked."""
        found = await self._desk.ask("download_size", model=model)
        self._totals[model] = found["bytes"]
        return found

    async def models(self, downloads: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The released models, and those of the folders of ``WAN_MLX_MODELS``."""
        if self._rows is None or time.monotonic() > self._rows[0] + FRESH:
            self._rows = time.monotonic(), await asyncio.to_thread(self._looked_at)
        if self._fits is None:
            try:
                self._fits = await self._desk.ask("fits", models=[*PRESETS])
            except Refused:
                self._fits = None
        rows = []
        for row in self._rows[1]:
            plan = (self._fits or {}).get(row["id"], {})
            rows.append({
                **row,
                "fits": plan.get("fits"), "peak_bytes": plan.get("peak_bytes"), "plan_seconds": plan.get("seconds"),
                "advice": plan.get("advice", []), "recipes": plan.get("recipes", []),
                "bytes_total": self._totals.get(row["id"]), "download": downloads.get(row["id"]),
            })  # fmt: skip
        return rows

    def _looked_at(self) -> list[dict[str, Any]]:
        return [*map(_released, PRESETS.values()), *(_local(path) for path in self._models() if not _is_lora(path))]

    def _models(self) -> list[Path]:
        return [path for folder in model_folders() if folder.is_dir() for path in models_in(folder)]

    def loras(self) -> list[dict[str, Any]]:
        """The LoRAs of those folders."""
        found = [path for path in self._models() if _is_lora(path)]
        return [{"id": path.stem, "name": path.stem, "object": "lora", "bytes": path.stat().st_size} for path in found
                if path.is_file()]  # fmt: skip

    async def describe(self, names: list[str]) -> list[dict[str, Any]]:
        """What is in files of the library; each is read once."""
        stats = {}
        for name in names:
            try:
                stats[name] = self._library.file(name).stat()
            except (KeyError, OSError):  # gone meanwhile
                continue
        keys = {name: (name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
        if new := [name for name, key in keys.items() if key not in self._files]:
            for name, about in zip(new, await self._desk.ask("describe", paths=new), strict=True):
                self._files[keys[name]] = about
        rows = []
        for name, stat in stats.items():
            about = self._files[keys[name]]
            frames, fps = about.get("num_frames"), (about.get("made_with") or {}).get("model_fps") or about.get("fps")
            seconds = about.get("seconds") or (round(frames / fps, 3) if frames and fps and frames > 1 else None)
            rows.append({"name": name, "kind": KINDS[Path(name).suffix.lower()], "bytes": stat.st_size,
                         "modified_at": int(stat.st_mtime), "width": None, "height": None, "num_frames": None,
                         "fps": None, **about, "seconds": seconds})  # fmt: skip
        return rows

    async def poster(self, path: Path) -> Path:
        """A small picture of a file, made once."""
        stat = path.stat()
        found = self._library.posters / f"{path.name}-{stat.st_size}-{stat.st_mtime_ns}.webp"
        if not found.is_file():
            await self._desk.ask("poster", source=str(path), output=str(found))
        return found


def _released(preset: Preset) -> dict[str, Any]:
    known, geometry = row_of(preset), preset.geometry
    guidance = preset.sampling.guidance_scale
    sizes = [preset.size, *(geometry.named_size(name, preset.size) for name in NAMED_SIZES)]
    if preset.size[0] * preset.size[1] > 832 * 480:
        sizes.insert(1, geometry.named_size("480p", preset.size))
    return {
        "id": preset.name, "object": "model", "created": 0, "owned_by": "wan_mlx", "task": preset.task,
        "size": "x".join(map(str, preset.size)),
        "sizes": list(dict.fromkeys("x".join(map(str, size)) for size in sizes)),
        "num_frames": preset.num_frames, "fps": preset.fps, "seconds": round(preset.num_frames / preset.fps, 2),
        "frame_step": geometry.temporal, "side": geometry.side, "steps": preset.usual_steps(*preset.size),
        "guidance_scale": list(guidance) if isinstance(guidance, tuple) else guidance,
        "experts": preset.experts, "vocabulary": list(preset.vocabulary), "repositories": list(preset.repositories),
        "bundled": not preset.repo, "here": known["here"], "bytes_on_disk": known["bytes_on_disk"],
        "parameters": preset.parameters, "qualities": qualities_of(preset.name),
    }  # fmt: skip


def _local(path: Path) -> dict[str, Any]:
    """A model of a folder, whose sizes are known only once it is opened."""
    name = path.stem if path.suffix in WEIGHT_ENDINGS else path.name
    return {"id": name, "object": "model", "created": 0, "owned_by": "local", "task": None, "here": True,
            "bundled": False, "qualities": {}}  # fmt: skip


def _is_lora(path: Path) -> bool:
    return "loras" in path.parts
