"""The sound of a video file, copied as it is into another file: it is never decoded."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from av.container import InputContainer, OutputContainer
from av.stream import Disposition

from .read import FAULTS, open_container

IN_MP4 = ("aac", "mp3", "mp3float", "ac3", "eac3", "opus", "flac", "alac")  # codecs that an .mp4 file may hold


def sound_of(path: Path) -> str | None:
    """The codec of a video file's sound; None if it has none, or is no such file."""
    try:
        with open_container(path) as container:
            stream = _stream_of(container)
            return None if stream is None else str(stream.codec_context.name)
    except ValueError:
        return None


def fits_mp4(path: Path) -> bool:
    """Whether the file has sound that an .mp4 file may hold."""
    return sound_of(path) in IN_MP4


def _stream_of(container: InputContainer) -> Any:
    """The first sound, if it is known whole without decoding it."""
    known = (s for s in container.streams.audio if s.codec_context is not None and s.codec_context.sample_rate)
    return next(known, None)


class CopiedSound:
    """The packets of a file's sound on their way into another, whose frames come beside them.

    Args:
        source: a file that `fits_mp4`.
        into: the other one, before its first packet.
    """

    def __init__(self, source: Path, into: OutputContainer):
        self._open, self._into = ExitStack(), into
        container = self._open.enter_context(open_container(source))
        stream = _stream_of(container)
        videos = (s for s in container.streams.video if not s.disposition & Disposition.attached_pic)
        video: Any = next(videos, None)
        known = video is not None and video.start_time is not None and video.time_base is not None
        begin = float(video.start_time * video.time_base) if known else 0.0
        self._shift = round(begin / float(stream.time_base))  # the new video's first frame is at 0
        self._stream = into.add_stream_from_template(stream)
        self._packets = container.demux(stream)
        self._next: Any = None

    def copy(self, seconds: float) -> None:
        """Copy what belongs before ``seconds``; of a damaged file what comes before the damage."""
        while (packet := self._next or self._read()) is not None:
            self._next = packet
            if packet.dts * packet.time_base > seconds:
                return
            packet.stream, self._next = self._stream, None
            self._into.mux(packet)

    def _read(self) -> Any:
        try:
            packet = next(self._packets, None)
        except FAULTS:
            return None
        if packet is None or packet.dts is None:  # the last, which is empty
            return None
        packet.dts -= self._shift
        packet.pts = packet.dts if packet.pts is None else packet.pts - self._shift
        return packet

    def close(self) -> None:
        self._open.close()
