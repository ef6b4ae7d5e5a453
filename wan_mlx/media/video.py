"""A finished video: its frames, saved in any format, as a contact sheet, or shown by a notebook."""

from __future__ import annotations

import base64
import html
import tempfile
import webbrowser
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from ..errors import WanError, duration
from ..events import Listener, Progress, StageEnded
from ..lasting import computes
from ..progress_bars import notebook, progress_of
from ..weights.rife import NAME, find_rife, load_rife
from .interpolate import Between, asked_fps, even_moments, frames_at, interpolate, near_rate, told_in
from .write import contact_sheet, save_video, settings_text

LEAST_WIDTH = 256  # of a player; a smaller video is enlarged, its pixels as they are


@dataclass(repr=False)
class Video:
    """A finished video; a notebook shows it, and `len` is the number of its frames.

    Attributes:
        frames: numpy uint8 (T, H, W, 3).
        latents: numpy float32 (C, t, h, w), normalised as the transformer sees them.
        fps: frames per second.
        settings: everything needed to make it again; embedded in the saved file.
        stages: seconds and peak memory of each stage.
        speech: the file of the sound that an .mp4 of it has, if it speaks.
    """

    frames: Any
    latents: Any
    fps: float = 16
    settings: dict[str, Any] = field(default_factory=dict)
    stages: list[StageEnded] = field(default_factory=list)
    speech: Path | None = None

    @property
    def seed(self) -> int | None:
        """Of the noise that it was made from."""
        return self.settings.get("seed")

    @property
    def prompt(self) -> str | None:
        """The text that it was made from; the extended one, if it was extended."""
        return self.settings.get("prompt")

    def __len__(self) -> int:
        return len(self.frames)

    def __repr__(self) -> str:
        count, height, width, _ = self.frames.shape
        frames = "1 frame" if count == 1 else f"{count} frames"
        length = f", {duration(count / self.fps)}" if count > 1 else ""
        seed = "" if self.seed is None else f", seed {self.seed}"
        return f"Video({frames}, {width}x{height}{length}{seed})"

    def show(self) -> None:
        """Show it: in a notebook below the cell, elsewhere by the system's own player or browser.

        Raises:
            WanError: there is none.
        """
        if shell := notebook():
            shell.display_pub.publish({"text/html": self._repr_html_(), "text/plain": repr(self)})
            return
        ending = ".png" if len(self) == 1 else ".mp4"
        folder = Path(tempfile.mkdtemp(prefix="wan_mlx-"))  # kept: the player reads it when it has started
        path = self.save(folder / f"video{ending}")
        if not webbrowser.open(path.as_uri()):
            raise WanError(f"there is no player or browser here; the video is in {path}, and video.save writes another")

    def save(self, path: str | Path, overwrite: bool = True) -> Path:
        """Write to ``path``; the ending picks the format: .mp4 .gif .webp .png .npz.

        Raises:
            ValueError: unknown ending, or the file exists and ``overwrite`` is False.
        """
        return save_video(path, self.frames, self.fps, self.settings, self.latents, overwrite, self.speech)

    @computes
    def smooth(
        self,
        fps: float | None = None,
        times: int | None = None,
        weights: str | Path = NAME,
        progress: bool | Listener = True,
    ) -> Video:
        """The same video with frames between its own, which RIFE makes; over a cut between scenes nothing is blended.

        Args:
            fps: frames per second that it is to have.
            times: or how many times its own; without either, 2.
            weights: "rife" for RIFE 4.25, which is downloaded (23 MB); or a file of it, or one on a hub.
            progress: show how far it is; or a function, which then hears of it.

        Raises:
            ValueError: it has one frame, or the rate is not above its own.
            WeightsError: the weights cannot be had or used.
        """
        if len(self) < 2:
            raise ValueError("the video has one frame, which has none to move to; expected 2 or more")
        rate = near_rate(self.fps)
        asked, listener = asked_fps(rate, fps, times, "the video"), progress_of(progress)
        between, frames = Between(load_rife(find_rife(weights, listener=listener))), []
        total = frames_at(len(self), rate, asked)
        chunks = (frame[None] for frame in self.frames)
        for made in interpolate(chunks, even_moments(rate, asked), between):
            frames.append(made)
            listener(Progress("smoothing", sum(map(len, frames)), total))
        settings = told_in(self.settings, asked, Path(weights).name)
        return replace(self, frames=np.concatenate(frames), fps=settings["fps"], settings=settings)

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
        """For notebooks: plays the frames, or shows a single one, with the settings folded below."""
        ending, kind, tag, closing = ".mp4", "video/mp4", "video controls loop autoplay muted playsinline", "</video>"
        if len(self.frames) == 1:
            ending, kind, tag, closing = ".png", "image/png", "img", ""
        with tempfile.TemporaryDirectory() as folder:
            path = save_video(Path(folder) / f"video{ending}", self.frames, self.fps, {}, speech=self.speech)
            data = path.read_bytes()
        source = f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
        told = {name: value for name, value in self.settings.items() if value not in (None, [], ())}
        width = self.frames.shape[2]
        times = -(-LEAST_WIDTH // width)
        pixels = "; image-rendering:pixelated" if times > 1 else ""
        return (
            f'<figure style="margin:0"><{tag} width="{times * width}" style="max-width:100%{pixels}" src="{source}">'
            f"{closing}<figcaption><details><summary>{html.escape(repr(self))}</summary>"
            f'<pre style="white-space:pre-wrap">{html.escape(settings_text(told, indent=1))}</pre></details>'
            "</figcaption></figure>"
        )


def export_to_video(video: Video, output_video_path: str | Path, fps: int | None = None) -> Path:
    """Diffusers' name for `Video.save`; takes a `Video`, or its ``frames``.

    Raises:
        ValueError: it is a single frame: here ``video.frames[0]`` is the first frame, not the first video.
    """
    if not isinstance(video, Video):
        frames = np.asarray(video)
        if frames.ndim != 4:
            raise ValueError("export_to_video got no video: here frames[0] is the first frame, where Diffusers has the "
                             "first video; write video.save(path)")  # fmt: skip
        video = Video(frames, None)
    return replace(video, fps=video.fps if fps is None else fps).save(output_video_path)
