"""Reads images and videos: files, PIL images and numpy arrays → uint8 RGB frames.

As in the official code transparency is dropped, not blended (``convert("RGB")``). Unlike there an image is rotated by
its EXIF orientation or display matrix, and 16-bit greyscale is scaled to 8 bits instead of clipped.

Pillow and PyAV are called without imageio, which hands on no closed list of formats, ends at the first damaged part of
a video, and clips 16-bit greyscale. A received file obeys nobody: both get such lists, limits that are checked before
anything is decoded, and no other file.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import av
import av.filter
import mlx.core as mx
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from PIL import Image, ImageOps, UnidentifiedImageError

from ..geometry import WAN_2_1, Geometry
from ..storage import no_file
from ..types import Source

log = logging.getLogger(__name__)

# Pillow's formats; of others, EPS starts Ghostscript.
PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
# Endings of files that may be meant.
STILLS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
MOVING = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
ANIMATIONS = ("PNG", "WEBP", "GIF", "AVIF")
# FFmpeg's formats; of others, playlists such as ffconcat and HLS read other files.
VIDEOS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,asf,flv,ogg,mxf,nut,ivf,yuv4mpegpipe,h264,hevc,av1,obu,dv,m4v"
# Of FFmpeg's three hundred decoders those that people's videos need; sound and subtitles are never decoded.
CODECS = (
    "h264,hevc,vvc,av1,libdav1d,vp8,vp9,libvpx,libvpx-vp9,mpeg1video,mpeg2video,mpegvideo,mpeg4,msmpeg4v1,msmpeg4v2,"
    "msmpeg4,wmv1,wmv2,wmv3,vc1,h261,h263,h263i,h263p,flv,theora,vp3,vp6,vp6f,mjpeg,prores,dnxhd,cfhd,dvvideo,hap,"
    "ffv1,ffvhuff,huffyuv,utvideo,magicyuv,rawvideo,v210,v308,v410,r210,qtrle,png,jpeg2000,svq1,svq3,cinepak,rpza"
)
MOST_PIXELS = 2**26  # of a picture or frame: 8192x8192
MOST_FRAMES = 200_000  # of a video: nearly two hours
CLOSED = {"format_whitelist": VIDEOS, "codec_whitelist": CODECS, "protocol_whitelist": "none",
          "max_pixels": str(MOST_PIXELS)}  # fmt: skip
STILL_SECONDS = 0.1  # default for a frame without a duration, as in browsers
FAULTS = (av.FFmpegError, OSError)  # the file's own error, if FFmpeg looks for something before its beginning
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
            return _open_with_av(path)
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
        raise ValueError(no_file(kind, path, (*STILLS, *MOVING) if kind == "video" else STILLS))
    return path


def open_picture(path: Path, formats: tuple[str, ...] = PICTURES) -> Image.Image:
    """A picture's file, opened, its pixels not yet decoded.

    Raises:
        ValueError: it is in no such format, damaged, or too large.
    """
    with _pillow(str(path)):
        image = Image.open(path, formats=formats)
    try:
        _check_size(path, image.width, image.height)
    except ValueError:
        image.close()
        raise
    return image


def _check_size(path: Path, width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise ValueError(f"{path} has {width}x{height} pixels, expected at most {MOST_PIXELS} (8192x8192); make it "
                         "smaller")  # fmt: skip


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


def _open_with_av(path: Path) -> Clip:
    """Decode the whole file once for the time of every frame; some files' headers give a wrong rate."""
    starts, end, faults = list[float](), 0.0, set[str]()
    height = width = 0
    for frame in islice(_decoded(path, faults), MOST_FRAMES + 1):
        if not starts:
            height, width, _ = _converted(frame, _to_rgb(frame)).shape
        starts.append(end if frame.time is None else frame.time)
        end = starts[-1] + float(frame.duration * (frame.time_base or 0))
    said = ", ".join(sorted(faults))
    if not starts:
        raise ValueError(f"{path} cannot be read as a video: {said or 'no frames in it'}")
    if len(starts) > MOST_FRAMES:
        raise ValueError(f"{path} has more than {MOST_FRAMES} frames, expected no more; cut it")
    if said:
        log.warning("%s is damaged, %d frames can be read: %s", path, len(starts), said)
    # A frame lasts until the next one: durations stored in a file may leave gaps.
    seconds = np.diff(starts, append=end)
    usual = np.median(seconds[seconds > 0]) if (seconds > 0).any() else STILL_SECONDS
    seconds[seconds < 0] = usual  # a recording was appended, whose clock begins again
    seconds[-1] = seconds[-1] or usual
    return Clip(str(path), height, width, _times(seconds.tolist()), partial(_read_with_av, path))


def _read_with_av(path: Path, indices: Sequence[int]) -> Iterator[np.ndarray]:
    number, graph = -1, None
    with closing(_decoded(path, set())) as frames:
        for index in indices:
            if number < index:
                frame = next(islice(frames, index - number - 1, None), None)
                if frame is None:
                    raise ValueError(f"{path} ends before frame {index}; was it changed while being read?")
                graph, number = graph or _to_rgb(frame), index
                pixels = _converted(frame, graph)
            yield pixels


def _decoded(path: Path, faults: set[str]) -> Generator[av.VideoFrame, None, None]:
    """The frames of the first video that is no cover picture, as they are stored.

    Damaged parts, at which imageio's reader ends, are passed over; what is wrong with them is added to ``faults``.
    """
    with open_container(path) as container:
        video = next((s for s in container.streams.video if not s.disposition & Disposition.attached_pic), None)
        if video is None:
            return
        decoder = video.codec_context
        if decoder is None or decoder.name not in CODECS.split(","):
            found = "unknown" if decoder is None else decoder.name
            raise ValueError(f"{path} cannot be read as a video: its codec is {found}; convert it to H.264")
        _check_size(path, decoder.width, decoder.height)
        decoder.options, decoder.thread_type = CLOSED, "AUTO"
        packets = container.demux(video)
        while True:
            try:
                frames = next(packets).decode()
            except StopIteration:
                return
            except FAULTS as error:
                faults.add(str(error.strerror))
                continue
            faults.update("frames are incomplete" for frame in frames if frame.is_corrupt)
            yield from frames


@contextmanager
def open_container(path: Path, kind: str = "video", closed: Mapping[str, str] = CLOSED) -> Iterator[InputContainer]:
    """A video's file. Nothing that it says makes FFmpeg open another.

    ``kind``: what it is read as, in which formats ``closed`` says.

    Raises:
        ValueError: it is in no such format, or damaged.
    """
    try:
        with path.open("rb") as file, av.open(file, "r", options=dict(closed)) as container:
            yield container
    except FAULTS as error:
        raise ValueError(f"{path} cannot be read as a {kind}: {error.strerror}; expected a whole file in one of the "
                         f"formats {closed['format_whitelist']}") from error  # fmt: skip


def _to_rgb(first: av.VideoFrame) -> av.filter.Graph:
    """Filters that turn frames upright, and into RGB of the first one's size.

    Unlike ``VideoFrame.reformat`` they see where a frame's colour samples lie.
    """
    stored: Any = first.side_data.get("DISPLAYMATRIX")  # x' = ax + cy, y' = bx + dy
    a, b, _, c, d = (1, 0, 0, 0, 1) if stored is None else np.frombuffer(stored, np.int32)[:5].tolist()
    turned = abs(b) > abs(a)
    filters = [("transpose", "cclock_flip")] * turned + [("hflip", "")] * ((c if turned else a) < 0)
    filters += [("vflip", "")] * ((b if turned else d) < 0) + [("scale", ""), ("format", "rgb24"), ("buffersink", "")]
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=first.width, height=first.height, format=first.format, time_base=first.time_base or Fraction(1, 1000)
    )
    graph.link_nodes(source, *(graph.add(name, arguments) for name, arguments in filters)).configure()
    return graph


def _converted(frame: av.VideoFrame, graph: av.filter.Graph) -> np.ndarray:
    graph.vpush(frame)
    return graph.vpull().to_ndarray()
