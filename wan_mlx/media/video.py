"""A finished video: its frames, saved in any format, as a contact sheet, or shown by a notebook."""

from __future__ import annotations

import base64
import html
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL.Image import Image

from ..events import StageEnded
from .write import contact_sheet, save_video, settings_text


@dataclass
class Video:
    """A finished video.

    Attributes:
        frames: numpy uint8 (T, H, W, 3).
        latents: numpy float32 (C, t, h, w), normalised as the transformer sees them.
        fps: frames per second.
        settings: everything needed to make it again; embedded in the saved file.
        stages: seconds and peak memory of each stage.
    """

    frames: Any
    latents: Any
    fps: int = 16
    settings: dict[str, Any] = field(default_factory=dict)
    stages: list[StageEnded] = field(default_factory=list)

    def save(self, path: str | Path, overwrite: bool = True) -> Path:
        """Write to ``path``; the ending picks the format: .mp4 .gif .webp .png .npz.

        Raises:
            ValueError: unknown ending, or the file exists and ``overwrite`` is False.
        """
        return save_video(path, self.frames, self.fps, self.settings, self.latents, overwrite=overwrite)

    def grid(self, columns: int = 4, count: int = 12, width: int = 1280) -> Image:
        """A contact sheet: frames at equal distances, row by row, the first and the last among them.

        Args:
            columns: frames side by side.
            count: how many frames are shown, or all if there are fewer.
            width: the most pixels that the sheet is wide; frames are made smaller for it, never larger.

        Returns:
            a PIL image, which a notebook shows.

        Raises:
            ValueError: ``columns`` or ``count`` is below 1, or ``width`` leaves a column no pixel.
        """
        return contact_sheet(self.frames, columns, count, width)

    def _repr_html_(self) -> str:
        """For notebooks: plays the frames, or shows a single one, with the settings below."""
        ending, kind, tag, closing = ".mp4", "video/mp4", "video controls loop autoplay muted playsinline", "</video>"
        if len(self.frames) == 1:
            ending, kind, tag, closing = ".png", "image/png", "img", ""
        with tempfile.TemporaryDirectory() as folder:
            data = save_video(Path(folder) / f"video{ending}", self.frames, self.fps, {}).read_bytes()
        source = f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
        return (
            f'<figure style="margin:0"><{tag} style="max-width:100%" src="{source}">{closing}'
            f'<figcaption><pre style="white-space:pre-wrap">{html.escape(settings_text(self.settings, indent=1))}</pre>'
            "</figcaption></figure>"
        )
