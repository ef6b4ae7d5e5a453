"""Pictures and videos that somebody sent: they are read as such or refused in one line, start nothing, open no other
file, and take no more memory than what is wanted of them."""

import json
import os
import struct
import warnings
import zlib

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image
from test_sources import film, write_video

from wan_mlx.cli.main import main
from wan_mlx.errors import WanError
from wan_mlx.media import read
from wan_mlx.media.read import open_video, read_image
from wan_mlx.media.write import read_settings

EPS = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize("read_it", [read_image, open_video])
def test_a_picture_that_is_postscript_starts_no_ghostscript(tmp_path, monkeypatch, read_it):
    program, started = tmp_path / "gs", tmp_path / "started"
    program.write_text(f"#!/bin/sh\ntouch {started}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "x.png").write_text(EPS)
    with pytest.raises(ValueError, match="x.png cannot be read as"):
        read_it(tmp_path / "x.png")
    assert not started.exists()


def test_a_playlist_shows_no_other_file(tmp_path):
    write_video(tmp_path / "private.mkv", film(2))
    (tmp_path / "a.mp4").write_text("ffconcat version 1.0\nfile private.mkv\n")
    (tmp_path / "b.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nprivate.mkv\n#EXT-X-ENDLIST\n")
    for name in ("a.mp4", "b.m3u8"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as a video: Format not on whitelist"):
            open_video(tmp_path / name)


def test_a_drawing_is_no_video(tmp_path):
    (tmp_path / "x.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"></svg>')
    with pytest.raises(ValueError, match="x.svg cannot be read as a video"):
        open_video(tmp_path / "x.svg")


def png_header(width: int, height: int) -> bytes:
    """A PNG of that size by its header, with no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(9000, 9000), (13000, 13000), (60000, 60000)])
def test_a_picture_of_too_many_pixels_is_refused_by_its_header(tmp_path, size):
    path = tmp_path / "big.png"
    path.write_bytes(png_header(*size))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for read_it in (read_image, open_video, read_settings):
            with pytest.raises(ValueError, match=r"big.png .*pixels") as refused:
                read_it(path)
            assert "\n" not in str(refused.value)


def test_a_video_of_too_many_pixels_or_frames_is_refused(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mkv", film(5))
    Image.fromarray(film(1)[0]).save(
        tmp_path / "a.gif", save_all=True, append_images=[Image.fromarray(frame) for frame in film(5)[1:]]
    )
    monkeypatch.setattr(read, "MOST_FRAMES", 4)
    for name, says in (("a.mkv", "more than 4 frames, expected no more"), ("a.gif", "5 frames, expected at most 4")):
        with pytest.raises(ValueError, match=f"{name} has {says}; cut it"):
            open_video(tmp_path / name)
    monkeypatch.setattr(read, "MOST_PIXELS", 100)
    with pytest.raises(ValueError, match="a.mkv cannot be read as a video: Picture size 33x20 exceeds"):
        open_video(tmp_path / "a.mkv")


@pytest.mark.parametrize("ending", ["gif", "webp", "png"])
def test_of_an_animation_only_the_wanted_frames_are_held(tmp_path, monkeypatch, ending):
    first, *rest = (Image.fromarray(frame) for frame in film(8))
    path = tmp_path / f"a.{ending}"
    first.save(path, save_all=True, append_images=rest, duration=100, lossless=True)
    made, rgb = [], read._rgb
    monkeypatch.setattr(read, "_rgb", lambda *args: made.append(rgb(*args)) or made[-1])
    clip = open_video(path)
    assert clip.num_frames == 8 and len(made) <= 1  # its size is asked of the first
    shown = list(clip.read([2, 2, 5]))
    assert len(made) <= 4 and np.array_equal(shown[0], shown[1])
    everything = list(clip.read(range(8)))
    assert np.array_equal(shown[0], everything[2]) and np.array_equal(shown[2], everything[5])


def test_settings_of_an_npz_are_not_unfolded_at_any_size(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, settings=np.array(json.dumps({"prompt": "a" * 3_000_000})))
    assert path.stat().st_size < 100_000
    with pytest.raises(ValueError, match=r"its settings are <U30000\d\d \(\), expected text of at most 10000000"):
        read_settings(path)
    np.savez_compressed(path, settings=np.zeros(10**6, "U1"))
    with pytest.raises(ValueError, match=r"its settings are <U1 \(1000000,\), expected text"):
        read_settings(path)
    np.savez_compressed(path, settings=np.array(json.dumps({"prompt": "a"})))
    assert read_settings(path) == {"prompt": "a"}


def test_an_ffmpeg_that_cannot_be_started_is_one_line(tmp_path, monkeypatch, capsys):
    program = tmp_path / "ffmpeg"
    program.touch()
    write_video(tmp_path / "a.mkv", film(1))
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(program))
    with pytest.raises(WanError, match="ffmpeg cannot be started .* IMAGEIO_FFMPEG_EXE"):
        open_video(tmp_path / "a.mkv")
    flags = ["--model", "nano", "--prompt", "a", "--steps", "1", "--size", "32x32", "--frames", "1", "--quiet"]
    assert main([*flags, "--output", str(tmp_path / "a.mp4")]) == 1
    error = capsys.readouterr().err
    assert "error: ffmpeg cannot be started" in error and "Traceback" not in error
