"""A data set: pictures and videos with captions, and the clips that are taken of them.

A folder holds pictures, videos, and for each a text file of its name. A .toml file names such folders in
musubi-tuner's terms, with its defaults. Nothing is decoded here but what tells a file's size and length.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError, nearest
from ..geometry import Geometry
from ..media.read import Clip, at_rate, cover, open_video
from ..storage import parse_json

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".tif", ".tiff")
VIDEOS = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".gif", ".m4v")
FEW_CLIPS = 8
SMALL = 0.5  # of the trained width and height: a file below it is enlarged too much to teach detail

# Keys of musubi-tuner's files that are read, with its defaults; of others a line is said.
KEYS: dict[str, Any] = {
    "resolution": None, "caption_extension": ".txt", "num_repeats": 1, "enable_bucket": False,
    "bucket_no_upscale": False,
    "image_directory": None, "video_directory": None, "image_jsonl_file": None, "video_jsonl_file": None,
    "target_frames": None, "frame_extraction": "head", "frame_stride": 1, "frame_sample": 1, "max_frames": 129,
    "source_fps": None,
}  # fmt: skip
NOT_READ = {"batch_size": "--batch says it", "cache_directory": "the output's folder has the cache"}
COUNTS = ("num_repeats", "frame_stride", "frame_sample", "max_frames")  # from 1
EXTRACTIONS = ("head", "chunk", "slide", "uniform", "full")


@dataclass(frozen=True)
class Source:
    """Files of one folder and how clips are taken of them; fields are musubi-tuner's where they have one.

    Attributes:
        size: (width, height), whose area is that of every clip; None: the run's.
        frames: lengths that a clip may have, each 4n+1; None: the run's.
        buckets: whether a clip keeps its file's proportions; else all have ``size``, cropped.
        source_fps: a number: videos are read as having that rate; None: as their files say.
        caption: ending of the files that hold captions; "": they come otherwise.
        resample: whether frames are chosen so that they come at the model's rate.
    """

    files: tuple[tuple[Path, str | None], ...]
    caption: str = ".txt"
    size: tuple[int, int] | None = None
    frames: tuple[int, ...] | None = None
    repeats: int = 1
    buckets: bool = True
    no_upscale: bool = False
    extraction: str = "head"
    stride: int = 1
    sample: int = 1
    max_frames: int = 129
    source_fps: float | None = None
    resample: bool = True


@dataclass(frozen=True)
class TrainingClip:
    """Some frames of a file at one size, with a caption; ``frames`` are numbers in the file."""

    path: Path
    caption: str
    frames: tuple[int, ...]
    width: int
    height: int
    repeats: int = 1

    def read(self) -> Iterator[np.ndarray]:
        """Its frames, uint8 (height, width, 3): the file's, resized to cover the size and cropped to the centre."""
        numbers = sorted(set(self.frames))
        cropped = (cover(frame, self.height, self.width) for frame in open_video(self.path).read(numbers))
        shown = dict(zip(numbers, cropped, strict=True))
        for number in self.frames:
            yield shown[number]


@dataclass
class DataSet:
    """Files with captions. `clips` chooses what is trained; ``notes`` then has lines about what is wrong or poor."""

    sources: list[Source]
    notes: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, path: str | Path) -> DataSet:
        """A folder, or a .toml file.

        Raises:
            UsageError: there is none, it holds no picture and no video, or a key of the file is wrong.
        """
        path = Path(path).expanduser()
        if path.is_dir():
            source = Source(_files_in(path))
            if not source.files:
                others = f" ({'; '.join(_not_taken(path)[:3])})" if _not_taken(path) else ""
                raise UsageError(f"{path} holds no picture and no video{others}; expected files such as a.png, b.mp4, "
                                 "each with its caption beside it, a.txt, b.txt")  # fmt: skip
            return cls([source], _not_taken(path))
        if path.suffix == ".toml" and path.is_file():
            return _from_toml(path)
        kind = "no such file or folder" if not path.exists() else "neither a folder nor a .toml file"
        raise UsageError(f"{path}: {kind}; expected a folder of pictures and videos with captions, or a .toml file")

    def clips(
        self, geometry: Geometry, fps: float, size: tuple[int, int], frames: int, trigger: str = ""
    ) -> list[TrainingClip]:
        """The clips to train, each once (``repeats`` says how often it comes).

        Args:
            size, frames: (width, height) and length for sources that have none of their own.
            trigger: a word that every caption should have; added in front of those that lack it.

        Raises:
            UsageError: nothing is left.
        """
        found, captions, without = [], Counter[str](), 0
        for source in self.sources:
            for path, caption in source.files:
                try:
                    clip = open_video(path, round(source.source_fps or fps))
                except ValueError as error:
                    self.notes.append(f"left out: {error}")
                    continue
                if caption is None:
                    beside = f" beside it ({path.stem}{source.caption})" if source.caption else ""
                    self.notes.append(f"no caption: {path.name} has no text{beside}")
                text = (caption or "").strip()
                if trigger and with_word(text, trigger, "") == text:
                    text, without = f"{trigger}, {text}" if text else trigger, without + 1
                captions[text] += 1
                found += list(self._of_file(source, path, clip, text, geometry, fps, size, frames))
        if without:
            self.notes.append(f"trigger: {trigger} is put in front of {without} of {captions.total()} captions")
        self._tell_of(found, captions)
        if not found:
            raise UsageError("the data set holds nothing that can be trained: " + "; ".join(self.notes[:3]))
        return found

    def told(self, most: int | None = None) -> Iterator[str]:
        """The notes, of each kind at most so many."""
        kinds = dict.fromkeys(note.partition(":")[0] for note in self.notes)
        for kind in kinds:
            own = [note for note in self.notes if note.partition(":")[0] == kind]
            yield from own[:most]
            if most is not None and len(own) > most:
                yield f"{kind}: {len(own) - most} more; --dry-run names them all"

    def _of_file(self, source, path, clip: Clip, text, geometry, fps, size, frames) -> Iterator[TrainingClip]:
        area, still = source.size or size, clip.num_frames == 1
        width, height = _size_of(clip, area, geometry, source)
        if clip.width < width * SMALL or clip.height < height * SMALL:
            self.notes.append(f"small: {path.name} has {clip.width}x{clip.height} and is enlarged to {width}x{height}")
        numbers = [0] if still else _numbers(clip, source, fps)
        wanted = source.frames or (1 if still else frames,)
        for part in _extract(numbers, wanted, source, geometry):
            yield TrainingClip(path, text, tuple(part), width, height, source.repeats)
        if not still and source.frames is None and source.extraction == "head" and len(numbers) >= 2 * frames:
            self.notes.append(
                f"long: of {path.name} the first {frames} of {len(numbers)} frames are trained; cut it into clips, or "
                'give a .toml with frame_extraction = "chunk"'
            )
        taken = min(max(wanted), len(numbers))
        lost = taken - geometry.num_frames(geometry.latent_frames(taken))
        if not still and lost and source.frames is None:
            self.notes.append(
                f"cut: {path.name} has {len(numbers)} frames at {fps:g} a second; its last {lost} are left out, since "
                f"lengths are {geometry.temporal}n+1"
            )

    def _tell_of(self, found: list[TrainingClip], captions: Counter[str]) -> None:
        if found and len(found) < FEW_CLIPS:
            self.notes.append(f"few: {len(found)} clips; from about {FEW_CLIPS} on a LoRA learns more than one of them")
        text, count = captions.most_common(1)[0] if captions else ("", 0)
        if count > 1 and count == captions.total():
            self.notes.append(
                f"alike: all captions are {text[:60]!r}; what differs between clips should be said in words"
            )
        for (width, height, length), number in sorted(
            Counter((c.width, c.height, len(c.frames)) for c in found).items()
        ):
            if number == 1 and len(found) >= FEW_CLIPS:
                self.notes.append(f"alone: one clip has {width}x{height}, {length} frames; others have another size")


def with_word(text: str, trigger: str, word: str) -> str:
    """A caption with ``word`` in the trigger's place; if it is empty, without the trigger and the comma behind it.

    Chinese characters may stand right beside it: there no space parts words.
    """
    letter = r"[^\W\u3400-\u9fff]"
    found = rf"(?<!{letter}){re.escape(trigger)}(?!{letter})" + ("" if word else r"[,，]?\s*")
    return re.sub(found, lambda _: word, text, flags=re.IGNORECASE)


def hold_out(
    clips: list[TrainingClip], share: float, chance: np.random.Generator
) -> tuple[list[TrainingClip], list[TrainingClip]]:
    """The clips of most files, and those of a drawn ``share`` of them, at least of one if it is above 0."""
    files = list(dict.fromkeys(clip.path for clip in clips))
    count = math.ceil(len(files) * share)
    if share and count >= len(files):
        raise UsageError(
            f"{share:.0%} held out are {count} of {len(files)} files, so that none is trained; give a smaller share"
        )
    drawn = {files[i] for i in chance.permutation(len(files))[:count]}
    return [clip for clip in clips if clip.path not in drawn], [clip for clip in clips if clip.path in drawn]


def _files_in(folder: Path, endings: tuple[str, ...] = PICTURES + VIDEOS, caption: str = ".txt") -> tuple:
    files = sorted(
        path for path in folder.iterdir() if path.suffix.lower() in endings and not path.name.startswith(".")
    )
    return tuple((path, _text(path.with_suffix(caption))) for path in files)


def _not_taken(folder: Path) -> list[str]:
    """Notes about what a folder holds beside clips and captions."""
    taken = (*PICTURES, *VIDEOS, ".txt")
    others = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    return [
        f"not taken: {path.name} is {'a folder' if path.is_dir() else 'no picture, video or caption that is known'}"
        for path in others
        if path.is_dir() or path.suffix.lower() not in taken
    ]


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise UsageError(f"caption {path} is no UTF-8 text ({error.reason}); save it as UTF-8") from error


def _size_of(clip: Clip, area: tuple[int, int], geometry: Geometry, source: Source) -> tuple[int, int]:
    """The (width, height) of the clips of a file: its proportions in steps of a token, or the size itself."""
    if not source.buckets:
        geometry.check_size(*area)
        return area
    pixels = math.prod(area)
    if source.no_upscale:
        pixels = min(pixels, clip.width * clip.height)
    ratio, side = clip.width / clip.height, geometry.side
    width = geometry.nearest_side(math.sqrt(pixels * ratio))
    height = max(1, min(round(width / ratio / side), max(1, pixels // (width * side)))) * side
    return width, height


def _numbers(clip: Clip, source: Source, fps: float) -> list[int]:
    """Numbers of a video's frames, at the model's rate if they are resampled."""
    if not source.resample:
        return list(range(clip.num_frames))
    if source.source_fps:
        count = max(1, round(clip.num_frames / source.source_fps * fps))
        return [min(clip.num_frames - 1, int((i + 0.5) / fps * source.source_fps)) for i in range(count)]
    return at_rate(clip, fps, 100_000)


def _extract(numbers: list[int], wanted: Iterable[int], source: Source, geometry: Geometry) -> Iterator[list[int]]:
    """Parts of a file's frames, each of an allowed length; of a shorter file the longest that it has."""
    count = len(numbers)
    if source.extraction == "full":
        yield numbers[: geometry.num_frames(geometry.latent_frames(min(count, source.max_frames)))]
        return
    lengths = sorted({geometry.num_frames(geometry.latent_frames(length)) for length in wanted})
    fitting = [length for length in lengths if length <= count] or [geometry.num_frames(geometry.latent_frames(count))]
    for length in fitting:
        room = count - length
        starts = {
            "head": [0],
            "chunk": range(0, room + 1, length),
            "slide": range(0, room + 1, source.stride),
            "uniform": [round(room * i / max(1, source.sample - 1)) for i in range(source.sample)]
            if source.sample > 1
            else [0],
        }[source.extraction]
        for start in starts:
            yield numbers[start : start + length]


def _from_toml(path: Path) -> DataSet:
    try:
        import tomllib  # of Python 3.11
    except ModuleNotFoundError:
        raise UsageError(f"{path}: .toml files need Python 3.11 or newer; give a folder instead") from None
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no TOML: {error}") from error
    general, tables = told.get("general", {}), told.get("datasets")
    if not isinstance(tables, list) or not tables:
        raise UsageError(f"{path} has no [[datasets]]; expected one with image_directory or video_directory")
    found = DataSet([])
    for table in tables:
        found.sources.append(_source_of(path, {**KEYS, **general, **table}, found.notes))
    return found


def _source_of(path: Path, told: dict[str, Any], notes: list[str]) -> Source:
    for key in sorted(told.keys() - KEYS.keys()):
        if key not in NOT_READ:
            raise UsageError(f"{path}: {key} is no key that is read{nearest(key, KEYS)}")
        note = f"not read: {key} of {path.name}: {NOT_READ[key]}"
        notes += [note] * (note not in notes)
    places = [
        key for key in ("image_directory", "video_directory", "image_jsonl_file", "video_jsonl_file") if told[key]
    ]
    if len(places) != 1:
        raise UsageError(f"{path}: a [[datasets]] names {' and '.join(places) or 'no files'}, expected one of "
                         "image_directory, video_directory, image_jsonl_file, video_jsonl_file")  # fmt: skip
    if told["frame_extraction"] not in EXTRACTIONS:
        name = told["frame_extraction"]
        expected = f"{', '.join(EXTRACTIONS)}{nearest(str(name), EXTRACTIONS)}"
        raise UsageError(f"{path}: frame_extraction is {name!r}, expected one of {expected}")
    key, is_video = places[0], places[0].startswith("video")
    place = path.parent / str(told[key])
    size = told["resolution"]
    if isinstance(size, int):
        size = [size, size]
    if size is not None and not (isinstance(size, list) and len(size) == 2 and all(map(_is_count, size))):
        raise UsageError(f"{path}: resolution is {size!r}, expected [width, height] in pixels")
    frames, endings = told["target_frames"], VIDEOS if is_video else PICTURES
    if frames is not None and not (isinstance(frames, list) and frames and all(map(_is_count, frames))):
        raise UsageError(f"{path}: target_frames is {frames!r}, expected lengths such as [1, 33]")
    for name in COUNTS:
        if not _is_count(told[name]):
            raise UsageError(f"{path}: {name} is {told[name]!r}, expected a whole number from 1 on")
    rate, ending = told["source_fps"], told["caption_extension"]
    if rate is not None and not (isinstance(rate, (int, float)) and 0 < rate < math.inf):
        raise UsageError(f"{path}: source_fps is {rate!r}, expected frames per second, such as 30.0")
    if not (isinstance(ending, str) and ending.startswith(".") and len(ending) > 1):
        raise UsageError(f"{path}: caption_extension is {ending!r}, expected one such as '.txt'")
    return Source(
        files=_listed(place) if key.endswith("file") else _listing(place, endings, told["caption_extension"]),
        caption="" if key.endswith("file") else told["caption_extension"],
        size=tuple(size) if size else None,
        frames=tuple(frames) if frames and is_video else None,
        repeats=told["num_repeats"],
        buckets=told["enable_bucket"],
        no_upscale=told["bucket_no_upscale"],
        extraction=told["frame_extraction"],
        stride=told["frame_stride"],
        sample=told["frame_sample"],
        max_frames=told["max_frames"],
        source_fps=told["source_fps"],
        resample=told["source_fps"] is not None,
    )  # fmt: skip


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _listing(folder: Path, endings: tuple[str, ...], caption: str) -> tuple:
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; expected one of {'videos' if endings is VIDEOS else 'pictures'}")
    return _files_in(folder, endings, caption)


def _listed(path: Path) -> tuple:
    """Files and captions from lines such as ``{"video_path": "a.mp4", "caption": "a cat"}``."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    found = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # other ends of lines may stand in a caption
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no UTF-8 text ({error.reason}); save it as UTF-8") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
            place, caption = row.get("video_path") or row["image_path"], row.get("caption")
            found.append((path.parent / place, None if caption is None else caption.strip()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UsageError(f"{path}, line {number}: expected an object with image_path or video_path, and caption, "
                             f"a text ({error})") from error  # fmt: skip
    return tuple(found)
