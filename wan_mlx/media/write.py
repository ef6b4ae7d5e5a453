"""Writes videos: .mp4, .gif, .webp, .png and .npz, with the settings embedded."""

from __future__ import annotations

import json
import os
import platform
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import imageio.v3 as imageio
import mlx.core as mx
import numpy as np
from PIL import Image, PngImagePlugin

from ..errors import SamplingError, WanError, nearest
from ..storage import no_file, parse_json, publish
from .read import open_container, open_picture
from .sound import CopiedSound
from .speech import Speech

ENDINGS = (".mp4", ".gif", ".webp", ".png", ".npz")
MAX_FPS = 240
STRIP_FRAMES = 8
X264 = {
    "crf": "10",  # equals quality=8 of the official code's imageio
    "preset": "faster",  # half the time of x264's default, 10 % fewer bytes, and 0.1 dB
    "threads": "1",  # with several, frames that come slowly gave other bytes now and then on busy cores
    "colorspace": "smpte170m",  # FFmpeg's default matrix: from 720 lines up players guess another one
}
if platform.machine() in ("x86_64", "AMD64"):
    # With AVX-512 x264 (core 165) reads memory that nothing has written, where it weighs macroblocks: other bytes now
    # and then. Without it the bytes are the usual ones, in the same time.
    X264["x264-params"] = "asm=avx"
EXIF_DESCRIPTION = 0x010E
NPZ_SETTINGS_LIMIT = 10_000_000  # bytes that are read of a received file


def to_uint8(frames: mx.array | np.ndarray, rounding: bool = False) -> np.ndarray:
    """Pixels in [-1, 1] → numpy uint8 [0, 255], any shape; values outside are clamped.

    Follows the official ``cache_video``, which truncates; ``rounding=True`` follows ``cache_image``, which
    rounds half up (torchvision's ``make_grid`` and ``save_image``). float32 in their order of operations.

    Raises:
        SamplingError: a value is NaN or infinite.
    """
    on = mx if isinstance(frames, mx.array) else np  # on the GPU if possible: transfers a quarter of the bytes
    frames = frames.astype(on.float32)
    if not on.isfinite(frames).all().item():
        raise SamplingError("the decoded frames hold NaN or infinite values, expected numbers in [-1, 1]; "
                            "look at the VAE's weights: wan-mlx inspect")
    scaled = (on.clip(frames, -1, 1) - -1) / 2 * 255
    if rounding:
        scaled = on.clip(scaled + 0.5, 0, 255)
    return np.array(scaled.astype(on.uint8))


def check_output(path: str | Path, overwrite: bool = False) -> Path:
    """Check before the run that a video can be written to ``path``.

    Raises:
        ValueError: unknown ending; no such folder, or not a writable one; the file exists and ``overwrite`` is False.
    """
    path = Path(path)
    if path.suffix.lower() not in ENDINGS:
        given = f"the ending {path.suffix!r}" if path.suffix else "no ending"
        raise ValueError(f"output {path} has {given}, expected one of {' '.join(ENDINGS)}"
                         f"{nearest(path.suffix, ENDINGS)}")  # fmt: skip
    folder = path.parent
    if not os.path.isdir(folder):
        above = next((parent for parent in folder.absolute().parents if os.path.isdir(parent)), Path.cwd())
        what = "is not a folder" if os.path.lexists(folder) else "does not exist"
        raise ValueError(f"output folder {folder} {what}, expected an existing folder; nearest: {above}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"output folder {folder} is not writable; choose another, or change its permissions")
    if os.path.isdir(path):
        raise ValueError(f"output {path} is a folder, expected the name of a file")
    try:
        path.lstat()
    except FileNotFoundError:
        return path
    except OSError as error:
        raise ValueError(f"output {path} cannot be written: {error.strerror}") from error
    if not overwrite:
        raise ValueError(f"output {path} exists; choose another name, or allow replacing it with --overwrite "
                         "(overwrite=True)")  # fmt: skip
    return path


class VideoWriter:
    """Writes frames one after the other; the complete file appears when the ``with`` block ends without an exception.

    By ending: ``.mp4`` H.264, 4:2:0; ``.gif`` and ``.webp`` looping animations; ``.png`` the frame, or for several a
    film strip of up to 8 evenly spaced ones side by side; ``.npz`` the arrays ``frames`` uint8 (T, H, W, 3),
    ``latents`` float32 (C, t, h, w) (if set) and the string ``settings``. All but ``.mp4`` hold the frames
    in memory until the end.

    Args:
        path: its ending selects the format.
        size: (width, height) in pixels.
        settings: any JSON value, as it is when the block begins; `read_settings` reads it back from the file.
        overwrite: replace an existing file.
        folder: of the unfinished file, on the same file system; None: beside ``path``.
        sound: a file whose sound an ``.mp4`` is to have, too; one that `media.sound.fits_mp4`.
        speech: a file whose sound it is to have, of any kind, which ends it if it is shorter (`media.speech`).

    Attributes:
        latents: set it before the block ends to store it in an ``.npz``.
        when_whole: called with the finished file's path before it is moved to its place.

    Raises:
        ValueError: as `check_output`; or the settings are not JSON; or the format cannot hold the size or the settings.
    """

    def __init__(
        self,
        path: str | Path,
        fps: float,
        size: tuple[int, int],
        settings: dict[str, Any],
        overwrite: bool = False,
        folder: Path | None = None,
        sound: Path | None = None,
        speech: Path | None = None,
    ):
        self.path, self.fps, self.size, self.overwrite = check_output(path, overwrite), fps, size, overwrite
        self.folder, self._sound, self._speech = self.path.parent if folder is None else folder, sound, speech
        self.latents: np.ndarray | None = None
        self.when_whole: Callable[[Path], None] | None = None
        self._ending = self.path.suffix.lower()
        self.settings = settings
        if not 0 < fps <= MAX_FPS:
            raise ValueError(f"fps is {fps}, expected a number above 0 and up to {MAX_FPS}, such as 16")
        settings_text(settings)
        if self._ending == ".mp4" and (size[0] % 2 or size[1] % 2):
            even = f"{size[0] - size[0] % 2}x{size[1] - size[1] % 2}"
            raise ValueError(f"size is {size[0]}x{size[1]}, expected even numbers for .mp4; nearest: {even}")

    def __enter__(self) -> VideoWriter:
        # On the file system of the target, so that the final move is atomic.
        self._temporary = self.folder / f".wan_mlx-{secrets.token_hex(8)}{self._ending}"
        self._text = settings_text(self.settings)
        self._frames: list[np.ndarray] = []
        self._count = 0
        is_mp4 = self._ending == ".mp4"
        sounds = self._sound, self._speech
        self._mp4 = _Mp4(self._temporary, self.fps, self.size, self._text, *sounds) if is_mp4 else None
        return self

    def write(self, frames: np.ndarray) -> None:
        """Append frames, uint8 (n, H, W, 3).

        Raises:
            ValueError: another dtype or shape.
            WanError: the file cannot be written; says why.
        """
        width, height = self.size
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (height, width, 3):
            raise ValueError(f"frames are {frames.dtype} {frames.shape}, expected uint8 (n, {height}, {width}, 3)")
        if self._mp4 is not None:
            self._mp4.write(frames)
        else:
            self._frames.append(frames.copy())
        self._count += len(frames)

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if kind is not None:
                return
            if self._count == 0:
                raise ValueError(f"no frames were written to {self.path}, expected at least 1")
            if self._mp4 is not None:
                self._mp4.finish()
            else:
                frames = np.concatenate(self._frames)
                SAVERS[self._ending](self._temporary, frames, self.fps, self._text, self.latents)
            if self.when_whole is not None:
                self.when_whole(self._temporary)
            if not self.overwrite and os.path.lexists(self.path):  # another process created it since the check
                kept = self.path.with_name(self._temporary.name.lstrip("."))
                publish(self._temporary, kept)
                raise ValueError(f"output {self.path} appeared during the run; it was kept, and this video is {kept}")
            publish(self._temporary, self.path)
        finally:
            self._frames = []
            if self._mp4 is not None:
                self._mp4.close()
            self._temporary.unlink(missing_ok=True)


def save_video(
    path: str | Path,
    frames: np.ndarray,
    fps: float,
    settings: dict[str, Any],
    latents: np.ndarray | None = None,
    overwrite: bool = True,
    speech: Path | None = None,
) -> Path:
    """Write a whole video, frames uint8 (T, H, W, 3), like `VideoWriter`; returns the path.

    Raises:
        ValueError: as `VideoWriter`.
    """
    height, width = frames.shape[1:3]
    with VideoWriter(path, fps, (width, height), settings, overwrite, speech=speech) as writer:
        writer.write(frames)
        writer.latents = latents
    return Path(path)


def contact_sheet(frames: np.ndarray, columns: int, count: int, width: int) -> Image.Image:
    """``count`` of the frames, uint8 (T, H, W, 3), in ``columns``, at most ``width`` pixels wide; see `Video.grid`."""
    for name, value, least in (("columns", columns, 1), ("count", count, 1), ("width", width, columns)):
        if value < least:
            raise ValueError(f"{name} is {value}, expected at least {least}")
    count = min(count, len(frames))
    columns = min(columns, count)
    chosen = np.linspace(0, len(frames) - 1, count).round().astype(int)
    height, full = frames.shape[1:3]
    cell = min(full, width // columns)
    size = cell, max(1, round(height * cell / full))
    sheet = Image.new("RGB", (columns * size[0], -(-count // columns) * size[1]))
    for place, number in enumerate(chosen):
        picture = Image.fromarray(frames[number])
        row, column = divmod(place, columns)
        picture = picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)
        sheet.paste(picture, (column * size[0], row * size[1]))
    return sheet


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that `VideoWriter` embedded in a file.

    Raises:
        ValueError: unknown ending, a file that cannot be read, or one without settings.
    """
    path = Path(path)
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"{path} is no video of ours, expected one of {' '.join(ENDINGS)}")
    if not path.is_file():
        raise ValueError(no_file("file", path, ENDINGS))
    try:
        settings = parse_json(READERS[path.suffix.lower()](path))
    except Exception as error:  # of many kinds: Pillow's, numpy's, zipfile's
        raise ValueError(f"{path} was not made by wan_mlx, or is damaged ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} was not made by wan_mlx, or is damaged (its settings are no JSON object)")
    return settings


def settings_text(settings: dict[str, Any], indent: int | None = None) -> str:
    """JSON in readable Unicode; half surrogates, which files cannot hold, become JSON escapes."""
    try:
        text = json.dumps(settings, ensure_ascii=False, indent=indent)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the settings cannot be written as JSON: {error}") from error
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class _Mp4:
    """H.264 by PyAV; imageio's writer passes its encoder no options, hence no quality."""

    def __init__(
        self, path: Path, fps: float, size: tuple[int, int], text: str, sound: Path | None, speech: Path | None
    ):
        self._folder, self._fps, self._count = path.absolute().parent, fps, 0
        self._file = av.open(str(path.absolute()), "w", format="mp4", options={"movflags": "+faststart"})
        self._file.metadata["comment"] = text
        self._video = self._file.add_stream("libx264", Fraction(fps).limit_denominator(10_000), options=X264)
        self._video.width, self._video.height, self._video.pix_fmt = *size, "yuv420p"
        self._sound = CopiedSound(sound, self._file) if sound else None
        self._speech = Speech(speech, self._file, fps) if speech else None

    def write(self, frames: np.ndarray) -> None:
        with self._telling():
            for frame in frames[: self._speech and max(0, self._speech.frames - self._count)]:
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                self._file.mux(self._video.encode(picture))
                self._count += 1
                if self._sound is not None:
                    self._sound.copy(self._count / self._fps)
                if self._speech is not None:
                    self._speech.copy(self._count / self._fps)

    def finish(self) -> None:
        with self._telling():
            self._file.mux(self._video.encode(None))
            if self._sound is not None:
                self._sound.copy(float("inf"))
            if self._speech is not None:
                self._speech.finish(self._count / self._fps)
            self._file.close()

    def close(self) -> None:
        with suppress(av.FFmpegError):
            self._file.close()
        if self._sound is not None:
            self._sound.close()

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except av.FFmpegError as error:
            raise WanError(f"no video can be written into {self._folder}: {error.strerror}") from error


def _save_animation(path: Path, frames: np.ndarray, fps: float, text: str, latents: np.ndarray | None) -> None:
    about: dict[str, Any] = {"comment": text.encode("utf-8")}
    unit = 10  # GIF counts hundredths of a second
    if path.suffix == ".webp":
        exif = Image.Exif()
        exif[EXIF_DESCRIPTION] = text.encode("utf-8")
        unit, about = 1, {"exif": exif, "quality": 90}
    # Of the ends, whose rounding errors do not accumulate.
    durations = np.diff(np.rint(np.arange(len(frames) + 1) * 1000 / (fps * unit)).astype(int) * unit).tolist()
    _save_picture(path, frames, save_all=True, loop=0, duration=durations, **about)


def _save_png(path: Path, frames: np.ndarray, fps: float, text: str, latents: np.ndarray | None) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("settings", text)
    sheet = np.asarray(contact_sheet(frames, STRIP_FRAMES, STRIP_FRAMES, STRIP_FRAMES * frames.shape[2]))
    _save_picture(path, sheet[None], pnginfo=info)


def _save_picture(path: Path, frames: np.ndarray, **how: Any) -> None:
    """By Pillow, through imageio. It gets a file, since of a path it makes more, such as the inside of an archive."""
    with path.open("wb") as file:
        imageio.imwrite(file, frames, plugin="pillow", extension=path.suffix, is_batch=True, **how)


def _save_npz(path: Path, frames: np.ndarray, fps: float, text: str, latents: np.ndarray | None) -> None:
    arrays: dict[str, Any] = {"frames": frames, "settings": np.array(text)}
    if latents is not None:
        arrays["latents"] = np.asarray(latents, np.float32)
    np.savez(path, **arrays)


def _read_mp4(path: Path) -> str:
    with open_container(path) as container:
        return container.metadata["comment"]


def _read_picture(path: Path) -> str:
    with open_picture(path, (path.suffix[1:].upper(),)) as image:
        if isinstance(image, PngImagePlugin.PngImageFile):
            return image.text["settings"]
        if image.format == "GIF":
            return image.info["comment"].decode("utf-8")
        return image.getexif()[EXIF_DESCRIPTION].encode("latin-1").decode("utf-8")  # Pillow reads bytes as latin-1


def _read_npz(path: Path) -> str:
    # The array's header is looked at before NumPy makes the array; and NumPy would leave a damaged file open.
    with path.open("rb") as file, np.lib.npyio.NpzFile(file) as arrays:
        assert arrays.zip is not None, "it is open"
        with arrays.zip.open("settings.npy") as stored:
            np.lib.format.read_magic(stored)
            shape, _, dtype = np.lib.format.read_array_header_1_0(stored)
            if shape or dtype.kind != "U" or dtype.itemsize > NPZ_SETTINGS_LIMIT:
                raise ValueError(f"its settings are {dtype} {shape}, expected text of at most {NPZ_SETTINGS_LIMIT}")
            return str(np.frombuffer(stored.read(dtype.itemsize), dtype)[0])


SAVERS = {".gif": _save_animation, ".webp": _save_animation, ".png": _save_png, ".npz": _save_npz}
READERS = {".mp4": _read_mp4, ".npz": _read_npz} | dict.fromkeys((".gif", ".webp", ".png"), _read_picture)


def latents_to_numpy(latents: mx.array) -> np.ndarray:
    """(1, t, h, w, C) → numpy float32 (C, t, h, w), PyTorch's layout."""
    return np.ascontiguousarray(np.moveaxis(np.array(latents[0]), -1, 0))
