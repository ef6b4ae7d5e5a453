"""Images and videos in: every kind of file that people have, and clear refusals of what cannot be used."""

import json
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from wan_mlx.media.read import cover, in_chunks, open_video, read_image, to_float
from wan_mlx.types import Request, describe_source

HEIGHT, WIDTH = 20, 33
ORIENTATION = 0x0112


def picture(seed: int = 0) -> np.ndarray:
    """uint8 (20, 33, 3), smooth and without symmetry, so that codecs keep it and no turn leaves it as it is."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([x * 7, y * 12, (x + y) * 4 + seed], axis=-1).astype(np.uint8)


def film(num_frames: int) -> np.ndarray:
    return np.stack([picture(3 * i) for i in range(num_frames)])


def write_video(path, frames: np.ndarray, *options: str, rate: float = 16) -> None:
    """Lossless: FFV1, or what ``options`` say."""
    codec = options or ("-c:v", "ffv1", "-pix_fmt", "bgr0")
    height, width = frames.shape[1:3]
    ffmpeg("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(rate), "-i", "-", *codec, path,
           stdin=frames.tobytes())  # fmt: skip


def ffmpeg(*arguments, stdin: bytes = b"") -> None:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    subprocess.run(command, input=stdin, check=True, capture_output=True)


def frames_of(clip) -> np.ndarray:
    return np.stack(list(clip.read(range(clip.num_frames))))


@pytest.mark.parametrize("ending", ["png", "webp", "bmp", "tiff"])
def test_lossless_picture(tmp_path, ending):
    Image.fromarray(picture()).save(tmp_path / f"a.{ending}", lossless=True)
    got = read_image(tmp_path / f"a.{ending}")
    assert got.dtype == np.uint8 and np.array_equal(got, picture())
    assert np.array_equal(read_image(str(tmp_path / f"a.{ending}")), picture())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    """The file holds what a camera held that way would store; read, it is upright again."""
    store = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(np.ascontiguousarray(store(picture()))).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png"), picture())
    assert np.array_equal(frames_of(open_video(tmp_path / "a.png"))[0], picture())


def test_alpha_is_dropped(tmp_path):
    rgba = np.dstack([picture(), np.full((HEIGHT, WIDTH), 7, np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png"), picture())
    assert np.array_equal(read_image(rgba), picture())


def test_palette_with_transparency(tmp_path):
    image = Image.fromarray(picture() // 64 * 64).quantize(64)
    image.save(tmp_path / "a.png", transparency=bytes(range(64)))
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.mode == "P" and isinstance(saved.info["transparency"], bytes)
    assert np.array_equal(read_image(tmp_path / "a.png"), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_sixteen_bits_are_scaled(tmp_path, ending):
    levels = np.linspace(0, 65535, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)
    Image.fromarray(levels).save(tmp_path / f"a.{ending}")
    got = read_image(tmp_path / f"a.{ending}")
    assert got.shape == (HEIGHT, WIDTH, 3) and np.array_equal(got[..., 0], np.rint(levels / 257))
    assert np.array_equal(got[..., 0], got[..., 2]) and got.max() == 255


@pytest.mark.parametrize("pixels", ["rgb48be", "rgba64be", "ya16be"])
def test_sixteen_bits_of_colour_and_alpha(tmp_path, pixels):
    """Pillow keeps the high byte of these: within one level of the nearest."""
    write_video(tmp_path / "a.png", picture()[None], "-frames:v", "1", "-pix_fmt", pixels)
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (WIDTH, HEIGHT)
    want = np.asarray(Image.fromarray(picture()).convert("L").convert("RGB")) if pixels == "ya16be" else picture()
    assert np.abs(read_image(tmp_path / "a.png").astype(int) - want).max() <= (2 if pixels == "ya16be" else 1)


@pytest.mark.parametrize("pixels", ["bgra", "gbrap", "ya8"])
def test_alpha_of_a_video_is_dropped(tmp_path, pixels):
    rgba = np.concatenate([film(3), np.full((3, HEIGHT, WIDTH, 1), 9, np.uint8)], axis=-1)
    codec = "rawvideo" if pixels == "ya8" else "ffv1"
    raw = ["-f", "rawvideo", "-pix_fmt", "rgba", "-s", f"{WIDTH}x{HEIGHT}", "-r", "16", "-i", "-"]
    ffmpeg(*raw, "-c:v", codec, "-pix_fmt", pixels, tmp_path / "a.nut", stdin=rgba.tobytes())
    got = frames_of(open_video(tmp_path / "a.nut"))
    grey = [np.asarray(Image.fromarray(frame).convert("L").convert("RGB")) for frame in film(3)]
    want = np.stack(grey) if pixels == "ya8" else film(3)
    assert np.abs(got.astype(int) - want).max() <= (2 if pixels == "ya8" else 0)


@pytest.mark.parametrize("mode", ["L", "LA", "1", "CMYK"])
def test_other_modes(tmp_path, mode):
    image = Image.fromarray(picture()).convert(mode)
    image.save(tmp_path / "a.tiff")
    assert np.array_equal(read_image(tmp_path / "a.tiff"), np.asarray(image.convert("RGB")))
    assert np.array_equal(read_image(image), np.asarray(image.convert("RGB")))


def test_arrays():
    grey = picture()[..., 0]
    assert np.array_equal(read_image(picture()), picture())
    for array in (grey, grey[..., None]):
        assert np.array_equal(read_image(array), np.dstack([grey] * 3))
    assert np.array_equal(read_image(grey > 99)[..., 1], np.where(grey > 99, 255, 0))
    for array, shape in ((film(5), (5, HEIGHT, WIDTH, 3)), (film(5)[..., 0], (5, HEIGHT, WIDTH, 3)),
                         (picture(), (1, HEIGHT, WIDTH, 3)), (grey, (1, HEIGHT, WIDTH, 3))):  # fmt: skip
        frames = frames_of(open_video(array))
        assert frames.shape == shape and frames.dtype == np.uint8
        assert np.array_equal(frames[0, ..., 0], array.reshape(shape[0], HEIGHT, WIDTH, -1)[0, ..., 0])


@pytest.mark.parametrize("read", [read_image, open_video])
def test_invalid_sources_are_refused(tmp_path, read):
    for source, message in (
        (tmp_path / "none.png", "none.png does not exist, expected a file"),
        (tmp_path, "is a folder, expected a file"),
        (3, "is a int, expected a path, a PIL image or a numpy uint8 array"),
        (picture().astype(np.float32), r"the array is float32 \(20, 33, 3\), expected uint8"),
        (np.zeros((HEIGHT, 0, 3), np.uint8), r"the array is uint8 \(20, 0, 3\)"),
        (np.zeros((2, 3, 4, 5, 3), np.uint8), r"\(2, 3, 4, 5, 3\), expected uint8"),
        (Image.fromarray(np.zeros((4, 4), np.float32)), "floating-point pixels, expected 8 or 16 bits"),
    ):
        with pytest.raises(ValueError, match=message):
            read(source)


def test_damaged_files(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    for name in ("cut", "text", "empty"):
        with pytest.raises(ValueError, match=rf"{name}\.png cannot be read as an image: "):
            read_image(tmp_path / f"{name}.png")
    with pytest.raises(ValueError, match=r"cut\.png cannot be read as an image: "):
        open_video(tmp_path / "cut.png")
    write_video(tmp_path / "whole.mp4", film(9), "-c:v", "mpeg4")
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes()[:900])
    (tmp_path / "text.mp4").write_text("not a video")
    ffmpeg("-f", "lavfi", "-i", "sine=d=0.1", tmp_path / "sound.wav")
    for name in ("cut.mp4", "text.mp4", "sound.wav"):
        with pytest.raises(ValueError, match=rf"{name} cannot be read as a video: (?!\[)") as error:
            open_video(tmp_path / name)
        assert "\n" not in str(error.value)


def test_an_animation_cut_anywhere_is_refused_if_it_cannot_be_read(tmp_path):
    frames = [Image.fromarray(frame) for frame in np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), np.uint8)]
    frames[0].save(tmp_path / "whole.gif", save_all=True, append_images=frames[1:])
    whole, refused = (tmp_path / "whole.gif").read_bytes(), 0
    for length in range(1, len(whole), 50):
        (tmp_path / "cut.gif").write_bytes(whole[:length])
        try:
            open_video(tmp_path / "cut.gif")
        except ValueError as error:  # Pillow itself raises IndexError and struct.error for some
            assert "cut.gif cannot be read as a" in str(error)
            refused += 1
    assert refused > 50


def test_what_comes_after_damage_is_read(tmp_path, caplog):
    noise = np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3), np.uint8)
    write_video(tmp_path / "a.mp4", noise, "-c:v", "libx264", "-g", "5", "-pix_fmt", "yuv420p")
    damaged = bytearray((tmp_path / "a.mp4").read_bytes())
    damaged[len(damaged) // 3 : len(damaged) // 3 + 9000] = bytes(9000)
    (tmp_path / "b.mp4").write_bytes(damaged)
    whole, clip = open_video(tmp_path / "a.mp4"), open_video(tmp_path / "b.mp4")
    assert "b.mp4 is damaged" in caplog.text and 10 <= clip.num_frames < 20
    assert np.array_equal(frames_of(clip)[-5:], frames_of(whole)[-5:])


def test_damage_in_the_middle_is_logged(tmp_path, caplog):
    noise = np.random.default_rng(0).integers(0, 255, (9, 64, 64, 3), np.uint8)
    write_video(tmp_path / "a.avi", noise, "-c:v", "mpeg4", "-q:v", "2")
    damaged = bytearray((tmp_path / "a.avi").read_bytes())
    damaged[len(damaged) // 2 : len(damaged) // 2 + 2000] = bytes(2000)
    (tmp_path / "a.avi").write_bytes(damaged)
    clip = open_video(tmp_path / "a.avi")
    assert "a.avi is damaged" in caplog.text
    assert len(frames_of(clip)) == clip.num_frames > 1


@pytest.mark.parametrize("rate", [8, 16, 24, 29.97, 60])
def test_lossless_video(tmp_path, rate):
    write_video(tmp_path / "a.mkv", film(7), rate=rate)
    clip = open_video(tmp_path / "a.mkv")
    assert (clip.num_frames, clip.height, clip.width) == (7, HEIGHT, WIDTH)
    assert np.array_equal(frames_of(clip), film(7))
    assert clip.times.dtype == np.float32
    np.testing.assert_allclose(clip.times[:, 0], np.arange(7) / rate, atol=1e-3)  # Matroska counts milliseconds
    assert np.array_equal(clip.times[1:, 0], clip.times[:-1, 1])
    np.testing.assert_allclose(clip.times[-1, 1], 7 / rate, atol=2e-3)


def test_only_requested_frames_are_read(tmp_path):
    write_video(tmp_path / "a.mkv", film(9))
    got = np.stack(list(open_video(tmp_path / "a.mkv").read([1, 1, 4, 7])))
    assert np.array_equal(got, film(9)[[1, 1, 4, 7]])
    stopped = open_video(tmp_path / "a.mkv").read(range(9))
    assert np.array_equal(next(stopped), film(1)[0])
    stopped.close()


def test_variable_rate_keeps_every_frame_and_its_time(tmp_path):
    write_video(tmp_path / "even.mkv", film(6), rate=10)
    ffmpeg("-i", tmp_path / "even.mkv", "-vf", "setpts='if(gte(N,3),PTS+0.5/TB,PTS)'", "-fps_mode", "passthrough",
           "-c:v", "ffv1", tmp_path / "a.mkv")  # fmt: skip
    clip = open_video(tmp_path / "a.mkv")
    assert np.array_equal(frames_of(clip), film(6))
    np.testing.assert_allclose(clip.times[:, 0], [0, 0.1, 0.2, 0.8, 0.9, 1.0], atol=1e-3)
    np.testing.assert_allclose(clip.times[2, 1], 0.8, atol=1e-3)  # a frame stands until the next


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_display_matrix(tmp_path, turn):
    write_video(tmp_path / "flat.mp4", film(3), "-c:v", "libx264rgb", "-qp", "0")
    ffmpeg("-display_rotation", turn, "-i", tmp_path / "flat.mp4", "-c", "copy", tmp_path / "a.mp4")
    clip = open_video(tmp_path / "a.mp4")
    want = np.rot90(film(3), turn // 90, axes=(1, 2))  # both count against the clock
    assert (clip.height, clip.width) == want.shape[1:3]
    assert np.array_equal(frames_of(clip), want)


def test_grey_video_and_ten_bits(tmp_path):
    grey = np.repeat(film(3)[..., :1], 3, axis=-1)
    write_video(tmp_path / "a.mkv", grey, "-c:v", "ffv1", "-pix_fmt", "gray16le")
    assert np.abs(frames_of(open_video(tmp_path / "a.mkv")).astype(int) - grey).max() <= 2
    write_video(tmp_path / "b.mkv", film(3), "-c:v", "ffv1", "-pix_fmt", "yuv444p10le")
    assert np.abs(frames_of(open_video(tmp_path / "b.mkv")).astype(int) - film(3)).max() <= 3


HDR = ("-colorspace", "bt2020nc", "-color_primaries", "bt2020", "-color_trc", "smpte2084")


@pytest.mark.parametrize(
    "name, codec",
    [("a.mp4", ("libx264", "yuv420p")), ("b.mkv", ("ffv1", "yuv410p")), ("c.mov", ("prores_ks", "yuv422p10le")),
     ("d.mp4", ("libx265", "yuv420p10le", *HDR)), ("e.nut", ("rawvideo", "nv12")), ("f.avi", ("mjpeg", "yuvj420p"))],
)  # fmt: skip
@pytest.mark.parametrize("turn", [(), ("90",), ("180",), ("270", "-display_hflip"), ("0", "-display_vflip")], ids=str)
def test_pixels_are_those_of_ffmpegs_program(tmp_path, name, codec, turn):
    if turn and not name.endswith(".mp4"):
        return  # other files hold no display matrix
    frames = film(3).repeat(3, 1)[:, :50].repeat(2, 2)  # a 10-bit H.265 of fewer pixels is none
    encoder, pixels, *more = codec
    write_video(tmp_path / name, frames, "-c:v", encoder, "-pix_fmt", pixels, *more)
    if turn:
        (tmp_path / name).rename(tmp_path / "flat.mp4")
        ffmpeg("-display_rotation", *turn, "-i", tmp_path / "flat.mp4", "-c", "copy", tmp_path / name)
    ffmpeg("-i", tmp_path / name, "-f", "rawvideo", "-pix_fmt", "rgb24", tmp_path / "rgb")
    clip = open_video(tmp_path / name)
    want = np.fromfile(tmp_path / "rgb", np.uint8).reshape(3, clip.height, clip.width, 3)
    assert np.array_equal(frames_of(clip), want)


def test_a_cover_is_no_video(tmp_path):
    write_video(tmp_path / "plain.mp4", film(3), "-c:v", "libx264rgb", "-qp", "0")
    Image.fromarray(film(1)[0, ::-1]).save(tmp_path / "cover.png")
    both = ["-i", tmp_path / "cover.png", "-i", tmp_path / "plain.mp4", "-map", "0", "-map", "1", "-c", "copy"]
    ffmpeg(*both, "-disposition:v:0", "attached_pic", tmp_path / "a.mp4")
    assert np.array_equal(frames_of(open_video(tmp_path / "a.mp4")), film(3))


def test_a_recording_after_another_goes_on(tmp_path):
    write_video(tmp_path / "one.ts", film(5)[:, :, :32], "-c:v", "libx264", "-pix_fmt", "yuv420p")
    (tmp_path / "two.ts").write_bytes((tmp_path / "one.ts").read_bytes() * 2)
    np.testing.assert_allclose(open_video(tmp_path / "two.ts").times[:, 1], np.arange(1, 11) / 16, atol=1e-3)


def test_path_that_ffmpeg_might_take_for_something_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video("file:plain.mkv", film(2))
    for name in ("-a.mkv", "http:b.mkv", "c%03d.mkv"):
        (tmp_path / name).write_bytes((tmp_path / "plain.mkv").read_bytes())
        assert open_video(name).num_frames == 2


@pytest.mark.parametrize("ending", ["gif", "webp", "png"])
def test_animation(tmp_path, ending):
    first, *rest = (Image.fromarray(frame).quantize(200).convert("RGB") for frame in film(4))
    first.save(tmp_path / f"a.{ending}", save_all=True, append_images=rest, duration=[100, 50, 50, 200], lossless=True)
    clip = open_video(tmp_path / f"a.{ending}")
    want = np.stack([np.asarray(frame) for frame in (first, *rest)])
    assert np.abs(frames_of(clip).astype(int) - want).mean() < 2
    np.testing.assert_allclose(clip.times, [[0, 0.1], [0.1, 0.15], [0.15, 0.2], [0.2, 0.4]], atol=1e-6)


def test_cover_cuts_the_middle():
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, 10:30] = 200
    assert np.array_equal(cover(wide, 10, 20), wide[:, 10:30])
    assert cover(wide, 16, 16).shape == (16, 16, 3)
    assert np.array_equal(cover(wide, 20, 20), np.full((20, 20, 3), 200))
    assert np.array_equal(cover(wide, 10, 40), wide)


def test_range_and_chunks():
    assert to_float(np.array([0, 255], np.uint8)).tolist() == [-1, 1]
    frames = [np.full((2, 2, 3), i, np.float32) for i in range(9)]
    chunks = list(in_chunks(frames))
    assert [chunk.shape for chunk in chunks] == [(1, 1, 2, 2, 3), (1, 4, 2, 2, 3), (1, 4, 2, 2, 3)]
    assert np.array_equal(np.concatenate(chunks, axis=1)[0], frames)


def test_settings_are_json():
    request = Request(
        "a", "", 48, 32, 5, 1, 5.0, 5.0, "unipc", 1, task="vace", image=picture(), last_image=None,
        src_video="clip.mp4", src_ref_images=(Image.fromarray(picture()), "b.png"),
    )  # fmt: skip
    settings = json.loads(json.dumps(request.settings()))
    assert settings["image"].startswith("array uint8 (20, 33, 3), sha256 ") and settings["last_image"] is None
    assert settings["src_video"] == "clip.mp4" and settings["src_ref_images"][1] == "b.png"
    assert settings["src_ref_images"][0].startswith("image RGB 33x20, sha256 ")
    first, other = describe_source(picture()), describe_source(picture(1))
    assert first != other and first == describe_source(picture())
    assert settings["prompt"] == "a" and settings["context_scale"] == 1.0
