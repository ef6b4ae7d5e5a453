"""Frames to files and back: what is in the file, the settings inside, and that no half-written file is ever left."""

import base64
import json
import os
import re
import resource
import signal
import struct
import subprocess
import sys
from fractions import Fraction

import av
import imageio_ffmpeg
import mlx.core as mx
import numpy as np
import pytest
from PIL import Image, ImageSequence

from wan_mlx.errors import SamplingError, WanError
from wan_mlx.media import write as media
from wan_mlx.media.video import Video
from wan_mlx.media.write import ENDINGS, VideoWriter, check_output, read_settings, save_video, to_uint8

SETTINGS = {
    "prompt": "一只猫；\"quoted\" 'single'\nsecond line\r\n\ttab ; a=b # no comment \\ \\n back\\\\slash\x00 🐈 \udce9",
    "negative_prompt": "色调艳丽，过曝，" * 100,
    "comment=": "[section]\n;x=1",
    "steps": 50,
    "shift": 5.0,
    "size": [832, 480],
    "seed": 2**53 + 1,
    "image": None,
}


def moving_picture(count: int, height: int, width: int) -> np.ndarray:
    """Smooth colours that drift, uint8 (count, height, width, 3): what a video codec is made for."""
    t, y, x = np.meshgrid(np.arange(count), np.arange(height), np.arange(width), indexing="ij")
    waves = [np.sin(0.05 * x + 0.3 * t), np.cos(0.04 * y - 0.2 * t), np.sin(0.03 * (x + y) + 0.5 * t)]
    return ((np.stack(waves, -1) + 1) * 127.5).astype(np.uint8)


def psnr(got: np.ndarray, want: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / ((got.astype(float) - want) ** 2).mean()))


def read_mp4(path) -> tuple[np.ndarray, str]:
    """Frames uint8 (T, H, W, 3) and how ffmpeg describes the stream."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", f"file:{path}", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run(command, capture_output=True, check=True)
    described = re.search(r"Stream #0:0.* Video: .*", done.stderr.decode("utf-8", "replace"))[0]
    width, height = map(int, re.search(r", (\d+)x(\d+)", described).groups())
    return np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3), described


def values_where_rounding_decides() -> np.ndarray:
    """Every level's exact value and its neighbours in float32, a fine ramp, and values outside [-1, 1]."""
    levels = np.arange(0, 256, 0.5, dtype=np.float32) / np.float32(255) * 2 - 1
    below, above = np.nextafter(levels, np.float32(-2)), np.nextafter(levels, np.float32(2))
    return np.concatenate([levels, below, above, np.linspace(-1.2, 1.2, 20_001, dtype=np.float32)])


class TestToUint8:
    @pytest.mark.parametrize("rounding", [False, True])
    @pytest.mark.parametrize("make", [np.asarray, mx.array], ids=["numpy", "mlx"])
    def test_against_torch(self, rounding, make):
        torch = pytest.importorskip("torch")
        values = values_where_rounding_decides()
        want = torch.from_numpy(values.copy()).clamp(-1, 1)
        want.sub_(-1).div_(2)  # torchvision.utils.make_grid(normalize=True, value_range=(-1, 1))
        want = want.mul(255).add_(0.5).clamp_(0, 255) if rounding else want * 255
        got = to_uint8(make(values), rounding)
        assert got.dtype == np.uint8
        assert np.array_equal(got, want.type(torch.uint8).numpy())

    def test_truncates_or_rounds(self):
        assert to_uint8(np.array([-2, -1, -0.5, 0, 0.5, 1, 2])).tolist() == [0, 0, 63, 127, 191, 255, 255]
        assert to_uint8(np.array([-2, -1, -0.5, 0, 0.5, 1, 2]), rounding=True).tolist() == [
            0,
            0,
            64,
            128,
            191,
            255,
            255,
        ]

    def test_bfloat16_keeps_its_shape(self):
        assert to_uint8(mx.zeros((2, 3, 4, 3), mx.bfloat16)).shape == (2, 3, 4, 3)

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_nan_is_no_colour(self, bad):
        with pytest.raises(SamplingError, match="NaN"):
            to_uint8(mx.array([0.0, bad]))


@pytest.mark.parametrize("size", [(16, 16), (80, 48), (50, 34)], ids=str)
@pytest.mark.parametrize("fps", [16, 24])
def test_mp4_read_back(tmp_path, size, fps):
    frames = moving_picture(9, size[1], size[0])
    with VideoWriter(tmp_path / "a.mp4", fps, size, SETTINGS) as writer:
        for part in (frames[:1], frames[1:5], frames[5:]):
            writer.write(part)
    got, info = read_mp4(tmp_path / "a.mp4")
    assert got.shape == frames.shape
    assert all(word in info for word in ("h264", "yuv420p(", "smpte170m", f" {fps} fps")), info
    assert min(psnr(a, b) for a, b in zip(got, frames, strict=True)) > 32
    assert os.listdir(tmp_path) == ["a.mp4"]


@pytest.mark.parametrize("size", [(16, 16), (832, 480), (50, 34)], ids=str)
def test_quicktime_plays_it(tmp_path, size):
    """H.264 in 4:2:0 under the tag avc1, even sizes, and the index before the pictures, read from the file."""
    path = save_video(tmp_path / "a.mp4", moving_picture(9, size[1], size[0]), 16, SETTINGS)
    top = list(boxes(path.read_bytes()))
    assert [name for name, _ in top if name != b"free"] == [b"ftyp", b"moov", b"mdat"]
    inside = dict(top)[b"moov"]
    for name in (b"trak", b"mdia", b"minf", b"stbl", b"stsd"):
        inside = dict(boxes(inside))[name]
    ((codec, entry),) = boxes(inside[8:])
    assert codec == b"avc1" and struct.unpack(">HH", entry[24:28]) == size and not any(side % 2 for side in size)
    version, profile, _, level = dict(boxes(entry[78:]))[b"avcC"][:4]
    assert version == 1 and profile == 100 and level <= 52  # High, which every Mac decodes
    assert " yuv420p(" in read_mp4(path)[1]


def boxes(data: bytes):
    """(name, content) of each of the boxes that an MP4 file, or the content of a box, is made of."""
    while data:
        length, name = struct.unpack(">I4s", data[:8])
        assert 8 <= length <= len(data)
        yield name, data[8:length]
        data = data[length:]


def test_mp4_takes_views_and_fractional_fps(tmp_path):
    frames = moving_picture(5, 32, 32)[:, ::-1, ::-1]
    save_video(tmp_path / "a.mp4", frames, 24000 / 1001, {})
    got, info = read_mp4(tmp_path / "a.mp4")
    assert " 23.98 fps" in info and psnr(got, frames) > 32


@pytest.mark.parametrize("ending, unit", [(".gif", 10), (".webp", 1)])
@pytest.mark.parametrize("count", [1, 16])
def test_animation_read_back(tmp_path, ending, unit, count):
    frames = moving_picture(count, 48, 80)
    path = save_video(tmp_path / f"a{ending}", frames, 16, SETTINGS)
    with Image.open(path) as image:
        assert image.n_frames == count
        got, durations = [], []
        for frame in ImageSequence.Iterator(image):
            got.append(np.array(frame.convert("RGB")))
            durations.append(frame.info.get("duration"))
        assert psnr(np.stack(got), frames) > 28
        if count > 1:
            assert image.info["loop"] == 0
            assert abs(sum(durations) - 1000 * count / 16) <= unit and max(durations) - min(durations) <= unit


def test_png_of_one_frame_is_that_frame(tmp_path):
    frames = moving_picture(1, 48, 80)
    with Image.open(save_video(tmp_path / "a.png", frames, 16, SETTINGS)) as image:
        assert image.mode == "RGB" and np.array_equal(np.array(image), frames[0])


@pytest.mark.parametrize("count, chosen", [(5, range(5)), (8, range(8)), (81, [0, 11, 23, 34, 46, 57, 69, 80])])
def test_png_of_several_frames_is_a_strip(tmp_path, count, chosen):
    frames = moving_picture(count, 16, 32)
    with Image.open(save_video(tmp_path / "a.png", frames, 16, SETTINGS)) as image:
        assert np.array_equal(np.array(image), np.concatenate([frames[i] for i in chosen], axis=1))


def test_npz_holds_frames_latents_settings(tmp_path):
    frames, latents = moving_picture(5, 16, 16), np.random.default_rng(0).standard_normal((16, 2, 2, 2), np.float32)
    with np.load(save_video(tmp_path / "a.npz", frames, 16, SETTINGS, latents)) as got:
        assert set(got) == {"frames", "latents", "settings"}
        assert got["frames"].dtype == np.uint8 and np.array_equal(got["frames"], frames)
        assert got["latents"].dtype == np.float32 and np.array_equal(got["latents"], latents)
        assert json.loads(str(got["settings"])) == SETTINGS


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("ending", ENDINGS)
def test_settings_round_trip(tmp_path, ending, count):
    path = save_video(tmp_path / f"a{ending.upper()}", moving_picture(count, 16, 16), 16, SETTINGS)
    assert read_settings(path) == SETTINGS
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("name", ["-dash.mp4", "a:b.mp4", "%d '\"; 猫.mp4"])
def test_odd_file_names(tmp_path, monkeypatch, name):
    (tmp_path / "-x:y").mkdir()
    monkeypatch.chdir(tmp_path / "-x:y")
    save_video(name, moving_picture(5, 16, 16), 16, SETTINGS)
    assert os.listdir() == [name] and read_settings(name) == SETTINGS


@pytest.mark.parametrize("ending", ENDINGS)
class TestNeverHalfWritten:
    def test_exception_leaves_nothing(self, tmp_path, ending):
        with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / f"a{ending}", 16, (16, 16), {}) as writer:
            writer.write(moving_picture(3, 16, 16))
            raise KeyboardInterrupt
        assert os.listdir(tmp_path) == []

    def test_partial_file_is_removed(self, tmp_path, monkeypatch, ending):
        def full_disk(path, *_):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setitem(media.SAVERS, ending, full_disk)
        noise = np.random.default_rng(0).integers(0, 256, (200, 64, 64, 3), dtype=np.uint8)
        with pytest.raises(OSError), VideoWriter(tmp_path / f"a{ending}", 16, (64, 64), {}) as writer:
            writer.write(noise)
            if ending == ".mp4":
                assert len(os.listdir(tmp_path)) == 1
                raise OSError
        assert os.listdir(tmp_path) == []

    def test_exception_keeps_the_old_file(self, tmp_path, ending):
        path = tmp_path / f"a{ending}"
        path.write_bytes(b"precious")
        with pytest.raises(RuntimeError), VideoWriter(path, 16, (16, 16), {}, overwrite=True) as writer:
            writer.write(moving_picture(3, 16, 16))
            raise RuntimeError
        assert path.read_bytes() == b"precious" and os.listdir(tmp_path) == [path.name]

    def test_killed_process_leaves_no_target(self, tmp_path, ending):
        script = (
            "import sys, time, numpy as np\n"
            "from wan_mlx.media.write import VideoWriter\n"
            "with VideoWriter(sys.argv[1], 16, (16, 16), {}) as writer:\n"
            "    writer.write(np.zeros((3, 16, 16, 3), np.uint8))\n"
            "    print('written', flush=True)\n"
            "    time.sleep(60)\n"
        )
        target = tmp_path / f"a{ending}"
        with subprocess.Popen(
            [sys.executable, "-c", script, str(target)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout.readline() == "written\n"
            process.send_signal(signal.SIGKILL)
        assert not target.exists()

    def test_overwrite(self, tmp_path, ending):
        path, frames = tmp_path / f"a{ending}", moving_picture(5, 16, 16)
        path.write_bytes(b"precious")
        with pytest.raises(ValueError, match="exists.*--overwrite"):
            VideoWriter(path, 16, (16, 16), {})
        with pytest.raises(ValueError, match="exists.*--overwrite"):
            save_video(path, frames, 16, {}, overwrite=False)
        assert path.read_bytes() == b"precious"
        assert Video(frames, None, settings={"seed": 1}).save(path) == path
        assert read_settings(path) == {"seed": 1} and os.listdir(tmp_path) == [path.name]

    def test_file_that_appears_during_the_run_is_kept(self, tmp_path, ending):
        path = tmp_path / f"a{ending}"
        with pytest.raises(ValueError, match="appeared during the run"):
            with VideoWriter(path, 16, (16, 16), {"seed": 7}) as writer:
                writer.write(moving_picture(3, 16, 16))
                path.write_bytes(b"precious")
        other = next(p for p in tmp_path.iterdir() if p != path)
        assert path.read_bytes() == b"precious" and read_settings(other) == {"seed": 7}
        assert not other.name.startswith(".") and len(os.listdir(tmp_path)) == 2

    def test_no_frames(self, tmp_path, ending):
        with pytest.raises(ValueError, match="no frames"), VideoWriter(tmp_path / f"a{ending}", 16, (16, 16), {}):
            pass
        assert os.listdir(tmp_path) == []


class TestMp4:
    def test_rate_is_exact(self, tmp_path):
        for fps, want in ((16, 16), (24, 24), (24000 / 1001, Fraction(24000, 1001)), (4 / 3, Fraction(4, 3))):
            with av.open(str(save_video(tmp_path / "a.mp4", moving_picture(5, 16, 16), fps, {}))) as file:
                assert file.streams.video[0].average_rate == want

    def test_a_full_disk_is_one_line_and_leaves_nothing(self, tmp_path):
        noise = np.random.default_rng(0).integers(0, 256, (200, 64, 64, 3), dtype=np.uint8)
        for count in (200, 2):  # while frames come, and at the end
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
            try:
                with pytest.raises(WanError, match=f"no video can be written into {tmp_path}: File too large"):
                    save_video(tmp_path / "a.mp4", noise[:count], 16, {})
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
            assert os.listdir(tmp_path) == []

    def test_a_folder_that_is_gone_is_one_line(self, tmp_path):
        (tmp_path / "b").mkdir()
        with pytest.raises(WanError, match="b: No such file"), VideoWriter(tmp_path / "b/a.mp4", 16, (16, 16), {}) as w:
            (tmp_path / "b").rmdir()
            w.write(moving_picture(99, 16, 16))


class TestWrongArguments:
    @pytest.mark.parametrize("name", ["video.avi", "video", "video.mp4.txt", ".mp4", "video."])
    def test_ending(self, tmp_path, name):
        with pytest.raises(ValueError, match=re.escape(".mp4 .gif .webp .png .npz")):
            check_output(tmp_path / name)

    def test_nearest_ending(self, tmp_path):
        with pytest.raises(ValueError, match="nearest: .webp"):
            check_output(tmp_path / "a.webm")

    def test_missing_folder_names_the_nearest(self, tmp_path):
        with pytest.raises(ValueError, match=f"{tmp_path}/no/where does not exist.*nearest: {tmp_path}$"):
            check_output(tmp_path / "no" / "where" / "a.mp4")

    def test_parent_is_a_file(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(ValueError, match="file is not a folder"):
            check_output(tmp_path / "file" / "a.mp4", overwrite=True)
        with pytest.raises(ValueError, match="file is not a folder"):
            save_video(tmp_path / "file" / "a.npz", moving_picture(1, 16, 16), 16, {})

    @pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
    def test_read_only_folder(self, tmp_path):
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(ValueError, match="not writable"):
            check_output(tmp_path / "locked" / "a.mp4")

    def test_unwritable_folder(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        with pytest.raises(ValueError, match="not writable"):
            check_output(tmp_path / "a.mp4")

    def test_target_is_a_folder(self, tmp_path):
        (tmp_path / "a.mp4").mkdir()
        with pytest.raises(ValueError, match="is a folder"):
            check_output(tmp_path / "a.mp4", overwrite=True)

    def test_name_too_long(self, tmp_path):
        with pytest.raises(ValueError, match="cannot be written: File name too long"):
            check_output(tmp_path / ("猫" * 200 + ".mp4"))
        name = "猫" * 83 + ".webp"  # 254 bytes, of 255
        assert read_settings(save_video(tmp_path / name, moving_picture(1, 16, 16), 16, SETTINGS)) == SETTINGS

    def test_a_good_path_is_left_alone(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert str(check_output("a.mp4")) == "a.mp4"
        assert os.listdir(tmp_path) == []

    def test_odd_size(self, tmp_path):
        with pytest.raises(ValueError, match="17x16.*nearest: 16x16"):
            VideoWriter(tmp_path / "a.mp4", 16, (17, 16), {})

    @pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
    def test_fps(self, tmp_path, fps):
        with pytest.raises(ValueError, match="fps is"):
            VideoWriter(tmp_path / "a.gif", fps, (16, 16), {})

    def test_settings(self, tmp_path):
        with pytest.raises(ValueError, match="JSON"):
            VideoWriter(tmp_path / "a.mp4", 16, (16, 16), {"x": object()})
        large = {"prompt": "猫" * 1_000_000}
        assert read_settings(save_video(tmp_path / "a.mp4", moving_picture(1, 16, 16), 16, large)) == large

    @pytest.mark.parametrize(
        "shape, dtype", [((2, 16, 32, 3), "uint8"), ((16, 16, 3), "uint8"), ((2, 16, 16, 3), "f4")]
    )
    def test_frames(self, tmp_path, shape, dtype):
        with pytest.raises(ValueError, match=r"expected uint8 \(n, 16, 16, 3\)"):
            with VideoWriter(tmp_path / "a.mp4", 16, (16, 16), {}) as writer:
                writer.write(np.zeros(shape, dtype))
        assert os.listdir(tmp_path) == []


class TestReadSettings:
    def test_missing_or_unknown(self, tmp_path):
        with pytest.raises(ValueError, match="does not exist"):
            read_settings(tmp_path / "a.mp4")
        with pytest.raises(ValueError, match="expected one of .mp4"):
            read_settings(tmp_path / "a.mkv")

    @pytest.mark.parametrize("ending", ENDINGS)
    @pytest.mark.parametrize("content", [b"", b"garbage" * 50, b"\x89PNG\r\n\x1a\n", b"GIF89a", b"PK\x03\x04"])
    def test_damaged(self, tmp_path, ending, content):
        (tmp_path / f"a{ending}").write_bytes(content)
        with pytest.raises(ValueError, match="was not made by wan_mlx"):
            read_settings(tmp_path / f"a{ending}")

    @pytest.mark.parametrize("ending", [".gif", ".webp", ".png"])
    def test_somebody_elses_picture(self, tmp_path, ending):
        Image.new("RGB", (16, 16)).save(tmp_path / f"a{ending}")
        with pytest.raises(ValueError, match="was not made by wan_mlx"):
            read_settings(tmp_path / f"a{ending}")

    def test_somebody_elses_video(self, tmp_path):
        source = save_video(tmp_path / "a.mp4", moving_picture(3, 16, 16), 16, {})
        ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", source, "-c", "copy", "-metadata"]
        for name, comment in (("none", "comment="), ("text", "comment=a holiday"), ("list", "comment=[1]")):
            subprocess.run([*ffmpeg, comment, tmp_path / f"{name}.mp4"], check=True)
            with pytest.raises(ValueError, match="was not made by wan_mlx"):
                read_settings(tmp_path / f"{name}.mp4")


class TestHtml:
    def test_plays_the_frames(self, tmp_path):
        frames = moving_picture(9, 48, 80)
        page = Video(frames, None, 16, SETTINGS)._repr_html_()
        assert re.search(r"<video [^>]*\bcontrols loop autoplay muted\b", page)
        data = re.search(r'src="data:video/mp4;base64,([^"]+)"', page)[1]
        (tmp_path / "a.mp4").write_bytes(base64.b64decode(data, validate=True))
        got, info = read_mp4(tmp_path / "a.mp4")
        assert got.shape == frames.shape and " 16 fps" in info and psnr(got, frames) > 32

    def test_caption_is_escaped(self):
        page = Video(moving_picture(1, 16, 16), None, settings={"prompt": "</pre><script>alert(1)</script> & 猫"})
        caption = page._repr_html_().split("<figcaption>")[1]
        assert "<script>" not in caption and "&lt;script&gt;alert(1)" in caption and "&amp; 猫" in caption

    def test_any_settings(self):
        page = Video(moving_picture(1, 16, 16), None, 16, SETTINGS | {"long": "猫" * 60_000})._repr_html_()
        assert page.encode("utf-8")


def test_bytes_do_not_depend_on_what_memory_held(tmp_path):
    """x264 with AVX-512 reads memory that nothing has written, which glibc fills as it is told to."""
    code = """import sys, numpy as np
from wan_mlx.media.write import save_video
frames = np.random.default_rng(0).integers(0, 256, (5, 480, 480, 3), dtype=np.uint8) // 2 + 60
save_video(sys.argv[1], frames, 16, {})
"""
    paths = [tmp_path / f"{fill}.mp4" for fill in (85, 170)]
    for path in paths:
        filled = {**os.environ, "MALLOC_PERTURB_": path.stem, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        subprocess.run([sys.executable, "-c", code, path], env=filled, check=True)
    assert paths[0].read_bytes() == paths[1].read_bytes()
