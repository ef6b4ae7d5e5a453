"""Pictures and videos that somebody sent: they are read as such or refused in one line, start nothing, open no other
file, and take no more memory than what is wanted of them."""

import json
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image
from test_sources import film, write_video

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


def test_a_playlist_shows_no_other_file(tmp_path, monkeypatch):
    write_video(tmp_path / "private.mkv", film(2))
    (tmp_path / "a.mp4").write_text("ffconcat version 1.0\nfile private.mkv\n")
    (tmp_path / "b.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nprivate.mkv\n#EXT-X-ENDLIST\n")
    for name in ("a.mp4", "b.m3u8"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as a video: .*; expected .* of the formats mov,"):
            open_video(tmp_path / name)
    monkeypatch.setitem(read.CLOSED, "format_whitelist", f"{read.VIDEOS},webm,concat,hls")
    for name in ("a.mp4", "b.m3u8"):  # nor if FFmpeg took them for playlists
        with pytest.raises(ValueError, match=f"{name} cannot be read as a video: "):
            open_video(tmp_path / name)
        with monkeypatch.context() as allowed:
            allowed.chdir(tmp_path)
            allowed.setitem(read.CLOSED, "protocol_whitelist", "file")
            assert open_video(name).num_frames == 2


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
    with pytest.raises(ValueError, match="a.mkv has 33x20 pixels, expected at most 100 "):
        open_video(tmp_path / "a.mkv")


def test_a_video_that_grows_is_cut_where_it_is_too_large(tmp_path, monkeypatch, caplog):
    for name, frames in (("a", film(30)[:, :16, :32]), ("b", film(4).repeat(2, 1).repeat(2, 2)[:, :, :64])):
        write_video(tmp_path / f"{name}.h264", frames, "-c:v", "libx264", "-pix_fmt", "yuv420p")
    path = tmp_path / "ab.h264"
    path.write_bytes((tmp_path / "a.h264").read_bytes() + (tmp_path / "b.h264").read_bytes())
    clip = open_video(path)
    assert clip.num_frames == 34 and {frame.shape for frame in clip.read(range(34))} == {(16, 32, 3)}
    monkeypatch.setitem(read.CLOSED, "max_pixels", "1500")  # a row is held as 64 pixels
    assert 20 < open_video(path).num_frames <= 30 and "ab.h264 is damaged" in caplog.text


def test_a_codec_that_nobody_uses_is_refused(tmp_path):
    write_video(tmp_path / "a.avi", film(3), "-c:v", "zmbv")
    with pytest.raises(ValueError, match=r"a.avi cannot be read as a video: its codec is zmbv; convert it to H.264"):
        open_video(tmp_path / "a.avi")


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
