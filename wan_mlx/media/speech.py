"""Sound that a model hears, and that its video is then given: of any format and rate, decoded by FFmpeg.

The official code reads it by ``librosa.load(sr=16000)``: the mean of all channels, resampled by soxr's "HQ". FFmpeg's
resampler, with the filter below, comes within 0.0001 of that (root mean square of speech at 44,100 a second, relative).
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import av.filter
import numpy as np
from av.container import InputContainer, OutputContainer

from ..storage import no_file
from .read import CLOSED, VIDEOS, open_container

RATE = 16_000  # of the sound that a model hears
MOST_SECONDS = 600
# FFmpeg's formats and decoders of sound; a video's do, too.
SOUNDS = f"{VIDEOS},wav,w64,mp3,flac,aac,aiff,caf,au,amr,ac3,eac3"
DECODERS = (
    "aac,aac_latm,mp3,mp3float,mp2,mp2float,flac,alac,vorbis,opus,libopus,ac3,eac3,amrnb,amrwb,libopencore_amrnb,"
    "libopencore_amrwb,wmav1,wmav2,adpcm_ima_wav,adpcm_ms,gsm_ms,pcm_u8,pcm_s8,pcm_s16le,pcm_s16be,pcm_s24le,pcm_s24be,"
    "pcm_s32le,pcm_s32be,pcm_f32le,pcm_f32be,pcm_f64le,pcm_f64be,pcm_alaw,pcm_mulaw"
)
COARSE = ("pcm_u8", "pcm_s8")
OPEN = {**CLOSED, "format_whitelist": SOUNDS, "codec_whitelist": DECODERS}
FILTER = "filter_size=160:cutoff=0.957:filter_type=kaiser:kaiser_beta=9"
AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
AAC_BITS = 192_000  # a second, as officially
AAC_SAMPLES = 1024  # in a packet
SILENT = 1e-4  # what is never louder has nothing to say: 80 decibels below the loudest


def _readable(container: InputContainer, path: Path) -> av.AudioStream:
    """The first sound of an opened file that can be decoded; raises ValueError if there is none."""
    for stream in container.streams.audio:
        if stream.codec_context is not None and stream.codec_context.sample_rate:
            return stream
    raise ValueError(f"{path} has no sound in it that can be read")


def decoded(path: Path) -> Iterator[np.ndarray]:
    """The channels of a file's first sound, float32 (channels, n) at a time, as they are stored.

    Raises:
        ValueError: it cannot be read, or has no sound.
    """
    with open_container(path, "sound", OPEN) as container:
        stream = _readable(container, path)
        stream.codec_context.options = OPEN
        planar = av.AudioResampler(format="fltp")
        for frame in container.decode(stream):
            for part in planar.resample(frame):
                yield part.to_ndarray()


def sound_rate(path: Path) -> int:
    """Samples a second of a file's first sound; as `decoded`."""
    with open_container(path, "sound", OPEN) as container:
        return _readable(container, path).codec_context.sample_rate


def sound_notes(path: Path) -> list[str]:
    """Lines about a sound that is not what a model is used to; as `read_sound`."""
    with open_container(path, "sound", OPEN) as container:
        codec = _readable(container, path).codec_context
        channels, is_coarse = codec.layout.nb_channels, codec.name in COARSE
    lines = []
    if not np.abs(read_sound(path)).max() > SILENT:
        lines.append(f"{path.name} is silent: there is nothing in it to say or sing")
    if channels > 1:
        lines.append(f"{path.name} has {channels} channels, of which the model hears the mean")
    if is_coarse:
        lines.append(f"{path.name} has 8 bits a sample, whose noise the model hears, too")
    return lines


def read_sound(path: str | Path) -> np.ndarray:
    """A file's sound, float32 (samples,), 16,000 a second: the mean of its channels.

    Raises:
        ValueError: there is no such file, no sound in it, or more than ten minutes.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(no_file("sound", path, (".wav", ".mp3", ".flac", ".m4a", ".ogg")))
    about = path.stat()
    return _read(path, about.st_mtime_ns, about.st_size)[0]


def sound_seconds(path: str | Path) -> Fraction:
    """How long it is, exactly; as `read_sound`."""
    read_sound(path)
    about = Path(path).stat()
    return _read(Path(path), about.st_mtime_ns, about.st_size)[1]


def frames_spoken(path: str | Path, fps: float) -> int:
    """How many of a video's frames belong to a sound, at least one; as `read_sound`."""
    return max(1, int(sound_seconds(path) * Fraction(fps).limit_denominator(10_000)))


@lru_cache(maxsize=1)
def _read(path: Path, changed: int, size: int) -> tuple[np.ndarray, Fraction]:
    """The sound, and its seconds; kept until another file's is read, since a request looks at it twice."""
    rate, parts, count = sound_rate(path), list[np.ndarray](), 0
    for channels in decoded(path):
        parts.append(channels.mean(axis=0))
        count += channels.shape[1]
        if count > MOST_SECONDS * rate:
            raise ValueError(f"{path} is longer than {MOST_SECONDS} seconds; cut it")
    sound = np.concatenate(parts) if parts else np.empty(0, np.float32)
    if not sound.size:
        raise ValueError(f"{path} is empty: there is no sound in it")
    if not np.isfinite(sound).all():
        raise ValueError(f"{path} holds NaN or infinite samples, expected numbers in [-1, 1]")
    return resampled(sound, rate, RATE), Fraction(count, rate)


def resampled(sound: np.ndarray, rate: int, to: int) -> np.ndarray:
    """Sound float32 (n,) at ``rate`` → float32 (ceil(n * to / rate),), with silence before and after it."""
    if rate == to:
        return sound
    graph, silence = av.filter.Graph(), np.zeros(rate, np.float32)
    source = graph.add("abuffer", f"sample_rate={rate}:sample_fmt=flt:channel_layout=mono:time_base=1/{rate}")
    graph.link_nodes(source, graph.add("aresample", f"{to}:{FILTER}"), graph.add("abuffersink")).configure()
    frame = av.AudioFrame.from_ndarray(np.concatenate([silence, sound, silence])[None], "flt", "mono")
    frame.sample_rate, frame.pts = rate, 0
    graph.push(frame)
    graph.push(None)
    made = list[np.ndarray]()
    try:
        while True:
            made.append(graph.pull().to_ndarray()[0])
    except (av.EOFError, av.BlockingIOError):
        pass
    return np.concatenate(made)[to : to - (-len(sound) * to // rate)]


class Speech:
    """A file's sound, encoded in AAC beside the frames of an .mp4; whichever is shorter ends both, as officially.

    Args:
        source: as `read_sound` takes it.
        into: the other file, before its first packet.
        fps: its frames a second.

    Attributes:
        frames: how many frames belong to the sound, at least one.
    """

    def __init__(self, source: Path, into: OutputContainer, fps: float):
        rate, self.frames = sound_rate(source), frames_spoken(source, fps)
        sound = np.concatenate(list(decoded(source)), axis=1)
        sound = sound if len(sound) <= 2 else sound.mean(axis=0, keepdims=True)
        self._layout, self._rate = ("mono", "stereo")[len(sound) - 1], min(AAC_RATES, key=lambda r: abs(r - rate))
        self._sound = np.stack([resampled(channel, rate, self._rate) for channel in sound])
        self._stream: Any = into.add_stream("aac", rate=self._rate, layout=self._layout)
        self._stream.bit_rate = AAC_BITS
        self._into, self._done = into, 0

    def copy(self, seconds: float) -> None:
        """Encode what belongs before ``seconds``, in whole packets."""
        while self._done + AAC_SAMPLES <= min(round(seconds * self._rate), self._sound.shape[1]):
            self._encode(self._done + AAC_SAMPLES)

    def finish(self, seconds: float) -> None:
        """Encode the rest, but nothing after ``seconds``."""
        self.copy(seconds)
        self._encode(min(round(seconds * self._rate), self._sound.shape[1]))
        self._into.mux(self._stream.encode(None))

    def _encode(self, end: int) -> None:
        if end > self._done:
            samples = np.ascontiguousarray(self._sound[:, self._done : end])
            frame = av.AudioFrame.from_ndarray(samples, "fltp", self._layout)
            frame.sample_rate, frame.pts, frame.time_base = self._rate, self._done, Fraction(1, self._rate)
            self._into.mux(self._stream.encode(frame))
            self._done = end
