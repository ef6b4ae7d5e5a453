"""Reads images and videos: files, PIL images and numpy arrays → uint8 RGB frames.

As in the official code transparency is dropped, not blended (``convert("RGB")``). Unlike there an image is rotated by
its EXIF orientation or display matrix, and 16-bit greyscale is scaled to 8 bits instead of clipped.

Pillow and imageio-ffmpeg's program are called without imageio, which gives no times of frames (`at_rate` needs them for
videos without a constant rate), and clips 16-bit greyscale. A received file obeys nobody: both get closed lists of
formats, and limits that are checked before anything is decoded.
"""

from __future__ import annotations

import logging
import re
import subprocess
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import imageio_ffmpeg
import mlx.core as mx
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import WanError
from ..geometry import WAN_2_1, Geometry
from ..types import Source

log = logging.getLogger(__name__)

# Pillow's formats; of others, EPS starts Ghostscript.
PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
ANIMATIONS = ("PNG", "WEBP", "GIF", "AVIF")
# ffmpeg's formats; of others, playlists such as ffconcat and HLS read other files.
VIDEOS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,asf,flv,ogg,mxf,nut,ivf,yuv4mpegpipe,h264,hevc,av1,obu,dv,m4v"
MOST_PIXELS = 2**26  # of a picture or frame: 8192x8192
MOST_FRAMES = 200_000  # of a video: nearly two hours
STILL_SECONDS = 0.1  # default for a frame without a duration, as in browsers
EXPECTED = "a path, a PIL image or a numpy uint8 array"


@dataclass(frozen=True)
class Clip:
    """A video whose frames have not been read yet; a still image is a video of one frame.

    Attributes:
        name: for messages.
        height, width: pixels, as displayed.
        times: float32 (num_frames, 2), start and end of each frame in seconds.
        read: increasing frame numbers → an iterator over these frames, uint8 (height, width, 3).
    """

    name: str
    height: int
    width: int
    times: np.ndarray
    read: Callable[[Sequence[int]], Iterator[np.ndarray]]

    @property
    def num_frames(self) -> int:
        return len(self.times)


def read_image(source: Source | None) -> np.ndarray:
    """An image → uint8 (H, W, 3), upright.

    Args:
        source: a path; a PIL image; or an array uint8 or bool (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).

    Raises:
        ValueError: no such file, not an image, damaged, or an unsupported array.
    """
    if isinstance(source, np.ndarray):
        return _rgb_frames(source, still=True)[0]
    if isinstance(source, Image.Image):
        return _rgb(source, "the PIL image")
    path = _existing(source, "image")
    with open_picture(path) as image:
        return _rgb(image, str(path))


def open_video(source: Source | None, fps: int = 16) -> Clip:
    """A video, an animation or a still image → `Clip`.

    Args:
        source: a path; a PIL image; or an array uint8 or bool: (T, H, W), (T, H, W, 1 or 3 or 4), or one frame
            as `read_image` takes it.
        fps: rate of a video in memory; default: the model's.

    Raises:
        ValueError: no such file, neither a video nor an image, damaged, or an unsupported array.
    """
    if isinstance(source, np.ndarray):
        frames = _rgb_frames(source, still=source.ndim == 2 or (source.ndim == 3 and source.shape[-1] in (1, 3, 4)))
        return _clip_in_memory("the array", frames, [1 / fps] * len(frames))
    if isinstance(source, Image.Image):
        return _clip_in_memory("the PIL image", read_image(source)[None], [1 / fps])
    path = _existing(source, "video")
    try:
        return _open_animation(path)
    except ValueError as error:
        if isinstance(error.__cause__, UnidentifiedImageError):
            return _open_with_ffmpeg(path)
        raise


def at_rate(clip: Clip, fps: float, most: int) -> list[int]:
    """Numbers of the frames to show at ``fps`` frames per second, from the start, at most ``most`` and at least one."""
    count = max(1, min(most, int(float(clip.times[-1, 1]) * fps + 0.5)))
    # Rounding errors of the times cannot reach the middle of a frame if the rates agree.
    middles = (np.arange(count) + 0.5) / fps
    return np.searchsorted(clip.times[:, 1], middles, side="right").clip(max=clip.num_frames - 1).tolist()


def cover(
    image: np.ndarray, height: int, width: int, how: Image.Resampling = Image.Resampling.BICUBIC
) -> np.ndarray:
    """Resize so that the image covers the size, and crop to the centre: uint8 (H, W, 3) → (height, width, 3).

    Follows ``VaceVideoProcessor.resize_crop``: antialiased bicubic in 8 bits, which Pillow and PyTorch round
    differently by one level in less than one pixel of a hundred. Wan2.2 TI2V does the same by Lanczos.
    """
    rows, columns, top, left = placed(image.shape[:2], (height, width))
    return _resized(image, rows, columns, how)[-top : height - top, -left : width - left]


def contain(image: np.ndarray, height: int, width: int, beyond: Literal["constant", "edge"] = "constant") -> np.ndarray:
    """Resize so that the size covers the image, and put it in the middle: uint8 (H, W, 3) → (height, width, 3).

    The bars beyond it are black, or with "edge" go on as its edge is.
    """
    rows, columns, top, left = placed(image.shape[:2], (height, width), whole=True)
    bars = (top, height - top - rows), (left, width - left - columns), (0, 0)
    return np.pad(_resized(image, rows, columns), bars, beyond)


def placed(old: tuple[int, ...], size: tuple[int, int], whole: bool = False) -> tuple[int, int, int, int]:
    """Where an image of ``old`` (height, width) lies on a canvas of ``size``, which it covers, or in which it lies as a
    ``whole``: its new height and width, and the place of its corner, negative where it is beyond the canvas."""
    ratios = size[0] / old[0], size[1] / old[1]
    scale = min(ratios) if whole else max(ratios)
    rows, columns = (max(1, round(scale * side)) for side in old)
    return rows, columns, int((size[0] - rows) / 2), int((size[1] - columns) / 2)


def _resized(
    image: np.ndarray, height: int, width: int, how: Image.Resampling = Image.Resampling.BICUBIC
) -> np.ndarray:
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), how))


def to_float(image: np.ndarray) -> np.ndarray:
    """uint8 [0, 255] → float32 [-1, 1], any shape."""
    return image.astype(np.float32) / np.float32(127.5) - np.float32(1)


def in_chunks(frames: Iterable[np.ndarray], geometry: Geometry = WAN_2_1) -> Iterator[mx.array]:
    """Frames (H, W, 3) → the VAE's chunks: float32 (1, 1, H, W, 3), then (1, temporal, H, W, 3) each."""
    frames, size = iter(frames), 1
    while chunk := list(islice(frames, size)):
        yield mx.array(np.stack(chunk))[None]
        size = geometry.temporal


def _existing(source: str | Path | None, kind: str) -> Path:
    if not isinstance(source, (str, Path)):
        raise ValueError(f"the {kind} is a {type(source).__name__}, expected {EXPECTED}")
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"{kind} {path} {'is a folder' if path.is_dir() else 'does not exist'}, expected a file")
    return path


def open_picture(path: Path, formats: tuple[str, ...] = PICTURES) -> Image.Image:
    """A picture's file, opened, its pixels not yet decoded.

    Raises:
        ValueError: it is in no such format, damaged, or too large.
    """
    with _pillow(str(path)):
        image = Image.open(path, formats=formats)
    if image.width * image.height > MOST_PIXELS:
        image.close()
        raise ValueError(f"{path} has {image.width}x{image.height} pixels, expected at most {MOST_PIXELS} "
                         "(8192x8192); make it smaller")  # fmt: skip
    return image


@contextmanager
def _pillow(name: str) -> Iterator[None]:
    """Pillow at work on one file: its many kinds of errors are one, and its warnings are not shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except Exception as error:
            raise ValueError(f"{name} cannot be read as an image: {error}") from error


def _open_animation(path: Path) -> Clip:
    """A picture, or an animation, of which every frame is decoded once and none is held."""
    seconds = []
    with open_picture(path) as image:
        height, width, _ = _rgb(image, str(path)).shape
        with _pillow(str(path)):
            count = getattr(image, "n_frames", 1) if image.format in ANIMATIONS else 1
        if count > MOST_FRAMES:
            raise ValueError(f"{path} has {count} frames, expected at most {MOST_FRAMES}; cut it")
        for number in range(count):
            with _pillow(str(path)):
                image.seek(number)
                image.load()
            seconds.append(image.info.get("duration", 0) / 1000 or STILL_SECONDS)

    def read(indices: Sequence[int]) -> Iterator[np.ndarray]:
        with open_picture(path) as image:
            for index in indices:
                with _pillow(str(path)):
                    image.seek(index)
                yield _rgb(image, str(path))

    return Clip(str(path), height, width, _times(seconds), read)


def _rgb(image: Image.Image, name: str) -> np.ndarray:
    """uint8 (H, W, 3), upright."""
    if image.mode == "F":
        raise ValueError(f"{name} holds floating-point pixels, expected 8 or 16 bits; convert it to 8-bit RGB")
    with _pillow(name):
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            # Pillow treats these as 32-bit and clips them at 255 in convert(); files contain 16 bits.
            levels = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
            image = Image.fromarray(np.rint(levels / 257).astype(np.uint8))
        elif "transparency" in image.info:
            image = image.convert("RGBA")  # same as directly to RGB, without a warning
        return np.asarray(image.convert("RGB"))


def _rgb_frames(array: np.ndarray, still: bool) -> np.ndarray:
    """An array as accepted by `read_image` (``still``) or `open_video` → uint8 (T, H, W, 3)."""
    frames = array[None] if still else array
    if frames.ndim == 3:
        frames = frames[..., None]
    usable = frames.ndim == 4 and frames.shape[-1] in (1, 3, 4) and frames.size > 0
    if not usable or array.dtype not in (np.uint8, np.bool_):
        expected = "(H, W, 3)" if still else "(T, H, W, 3)"
        raise ValueError(f"the array is {array.dtype} {array.shape}, expected uint8 {expected}")
    if frames.dtype == np.bool_:
        frames = frames.astype(np.uint8) * 255
    return np.broadcast_to(frames, (*frames.shape[:3], 3)) if frames.shape[-1] == 1 else frames[..., :3]


def _clip_in_memory(name: str, frames: np.ndarray, seconds: Sequence[float]) -> Clip:
    _, height, width, _ = frames.shape
    return Clip(name, height, width, _times(seconds), lambda indices: (frames[i] for i in indices))


def _times(seconds: Sequence[float]) -> np.ndarray:
    """float32 (T, 2), the start and the end of each frame, from how long each lasts."""
    ends = np.cumsum(seconds)
    return np.stack([ends - seconds, ends], axis=1).astype(np.float32)


def _open_with_ffmpeg(path: Path) -> Clip:
    """Decode the whole file once for the time of every frame; some files' headers give a wrong rate."""
    command = [*_ffmpeg_input(path), "-frames:v", str(MOST_FRAMES + 1), "-f", "framecrc", "-"]
    with start_ffmpeg(*command, stderr=subprocess.PIPE) as process:
        listing, said = (output.decode("utf-8", "replace") for output in process.communicate())
    frames = re.findall(r"^0, *-?\d+, *(-?\d+), *(\d+),", listing, re.MULTILINE)
    if process.returncode or not frames:
        raise ValueError(f"{path} cannot be read as a video: {_first_line(said) or 'no frames in it'}")
    if len(frames) > MOST_FRAMES:
        raise ValueError(f"{path} has more than {MOST_FRAMES} frames, expected no more; cut it")
    if said:
        log.warning("%s is damaged, %d frames can be read: %s", path, len(frames), _first_line(said))
    tick = re.search(r"^#tb 0: (\d+/\d+)", listing, re.MULTILINE)
    size = re.search(r"^#dimensions 0: (\d+)x(\d+)", listing, re.MULTILINE)
    assert tick and size, "framecrc says both of every stream"
    unit, width, height = Fraction(tick[1]), int(size[1]), int(size[2])
    ticks = np.array(frames, dtype=np.int64)
    starts, duration = ticks[:, 0], ticks[-1, 1] or (ticks[-1, 0] - ticks[0, 0]) // max(1, len(ticks) - 1) or 1
    # A frame lasts until the next one: durations stored in a file may leave gaps.
    times = np.stack([starts, np.append(starts[1:], starts[-1] + duration)], axis=1) * float(unit)
    return Clip(str(path), height, width, times.astype(np.float32), partial(_decode, path, height, width))


def _decode(path: Path, height: int, width: int, indices: Sequence[int]) -> Iterator[np.ndarray]:
    size, read = height * width * 3, 0
    with start_ffmpeg(*_ffmpeg_input(path), "-pix_fmt", "rgb24", "-f", "rawvideo", "-") as process:
        assert process.stdout is not None
        try:
            for index in indices:
                while read <= index:
                    pixels = process.stdout.read(size)
                    if len(pixels) < size:
                        raise ValueError(f"{path} ends before frame {index}; was it changed while being read?")
                    read += 1
                yield np.frombuffer(pixels, np.uint8).reshape(height, width, 3)
        finally:
            process.kill()


def _first_line(said: str) -> str:
    """ffmpeg's first message, without the names of its components."""
    return re.sub(r"^(\[.*?\] )*", "", said.strip().split("\n")[0])


def _ffmpeg_input(path: Path) -> list[str]:
    """The start of a command that outputs every frame of the first video (not a cover image) exactly once."""
    closed = ["-protocol_whitelist", "file", "-format_whitelist", VIDEOS, "-max_pixels", str(MOST_PIXELS)]
    return [*closed, "-i", file_url(path), "-map", "0:V:0", "-fps_mode", "passthrough"]


def file_url(path: Path) -> str:
    """Keeps ffmpeg from parsing a leading dash as an option, or a colon as a protocol."""
    return f"file:{path.absolute()}"


def start_ffmpeg(*arguments: str | bytes, **streams: Any) -> subprocess.Popen:
    """imageio-ffmpeg's program at work; unless ``streams`` say otherwise, only its output is read.

    Raises:
        WanError: it cannot be started.
    """
    silent = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    try:
        program = imageio_ffmpeg.get_ffmpeg_exe()
        return subprocess.Popen([program, "-v", "error", *arguments], **silent | streams)
    except (OSError, RuntimeError) as error:
        raise WanError(f"ffmpeg cannot be started ({error}); install imageio-ffmpeg again, or name another in "
                       "IMAGEIO_FFMPEG_EXE") from error  # fmt: skip
