"""More frames a second by RIFE: which frames are made, of a run and of any file; what stays of it; what is refused."""

import json
import signal
from fractions import Fraction
from pathlib import Path

import av
import mlx.core as mx
import numpy as np
import pytest
from hub_server import serving
from paused_process import PausedProcess
from PIL import Image
from rife_files import save_tiny

import wan_mlx
from wan_mlx import smoothing
from wan_mlx.cli.config_file import as_options
from wan_mlx.cli.main import main
from wan_mlx.errors import MemoryPlanError
from wan_mlx.media import interpolate as streams
from wan_mlx.media.interpolate import Between, even_moments, even_rate, frames_at, interpolate, is_cut, moments_of
from wan_mlx.media.read import open_video
from wan_mlx.media.write import read_settings, save_video
from wan_mlx.models.rife import RIFE
from wan_mlx.planning import peak_memory
from wan_mlx.planning.flops import rife_flop
from wan_mlx.presets import BUNDLED
from wan_mlx.weights.rife import DEFAULT, load_rife

BUNDLED_VAE = BUNDLED["nano"] / "vae.safetensors"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("rife") / "rife.safetensors")


@pytest.fixture
def here(weights, tmp_path, monkeypatch):
    """A folder to work in, with the weights in it."""
    monkeypatch.chdir(tmp_path)
    Path("rife.safetensors").write_bytes(weights.read_bytes())
    return tmp_path


def picture(place, size=(24, 16)):
    """A bright square on a dark gradient, uint8 (H, W, 3)."""
    width, height = size
    frame = np.zeros((height, width, 3), np.uint8)
    frame[:] = np.linspace(20, 90, width, dtype=np.uint8)[:, None]
    frame[4:10, place : place + 6] = 230
    return frame


def clip(count):
    return np.stack([picture(place) for place in range(count)])


def names(first, second, share):
    """In place of RIFE: what it was asked for, in the first pixel."""
    made = first.copy()
    made[0, 0] = first[0, 0, 0], second[0, 0, 0], round(100 * share)
    return made


def numbered(count):
    return np.arange(count, dtype=np.uint8).repeat(12).reshape(count, 2, 2, 3)


# Which frames


@pytest.mark.parametrize("count, rate, fps, made", [
    (81, 16, 32, 161), (121, 24, 48, 241), (81, 16, 60, 301), (5, 24, 60, 11), (2, 16, 24, 2),
])  # fmt: skip
def test_frames_reach_from_the_first_to_the_last(count, rate, fps, made):
    assert frames_at(count, Fraction(rate), Fraction(fps)) == made
    chunks = interpolate([numbered(count)], even_moments(Fraction(rate), Fraction(fps)), names)
    assert sum(map(len, chunks)) == made


def test_own_frames_stay_and_the_others_are_asked_for_where_they_lie():
    (made,) = interpolate([numbered(3)], even_moments(Fraction(24), Fraction(60)), names)
    asked = [(0, 0, 0), (0, 1, 40), (0, 1, 80), (1, 2, 20), (1, 2, 60), (2, 2, 2)]
    assert [tuple(frame[0, 0]) for frame in made] == asked
    (made,) = interpolate([numbered(3)], even_moments(Fraction(16), Fraction(32)), names)
    assert np.array_equal(made[::2], numbered(3)) and [frame[0, 0, 2] for frame in made[1::2]] == [50, 50]


def test_chunks_come_as_they_are_decoded_and_change_nothing():
    whole = np.concatenate(list(interpolate([numbered(9)], even_moments(Fraction(16), Fraction(40)), names)))
    chunks = iter([numbered(9)[:1], numbered(9)[1:5], numbered(9)[5:]])
    stream = interpolate(chunks, even_moments(Fraction(16), Fraction(40)), names)
    first = next(stream)
    assert len(first) == 1 and next(chunks, None) is not None, "a chunk is made before the next is asked for"
    chunks = iter([numbered(9)[:1], numbered(9)[1:5], numbered(9)[5:]])
    parts = list(interpolate(chunks, even_moments(Fraction(16), Fraction(40)), names))
    assert len(parts) == 3 and np.array_equal(np.concatenate(parts), whole)


def test_frames_that_do_not_come_evenly_are_shown_when_they_were():
    times = np.array([0, 0.1, 0.5, 0.6])
    assert even_rate(times) is None
    found = list(moments_of(times, Fraction(10)))
    assert [(index, round(share, 2)) for index, share in found] == [
        (0, 0), (1, 0), (1, 0.25), (1, 0.5), (1, 0.75), (2, 0), (3, 0)
    ]  # fmt: skip
    assert even_rate(np.arange(9, dtype=np.float32) * np.float32(1001 / 30000)) == Fraction(30000, 1001)
    for count in (12, 50):
        assert even_rate(np.round(np.arange(count) / 24, 3)) == 24, "as Matroska rounds to milliseconds"


def test_nothing_is_blended_over_a_cut(weights):
    rng = np.random.default_rng(0)
    scene, other = picture(3), rng.integers(0, 255, (16, 24, 3), np.uint8)
    assert is_cut(scene, other) and not is_cut(scene, picture(5)) and not is_cut(scene, scene)
    between = Between(load_rife(weights))
    chunks = [np.stack([scene, picture(4), other])]
    (made,) = interpolate(chunks, even_moments(Fraction(16), Fraction(48)), between)
    assert between.cuts == 1 and np.array_equal(made[4], picture(4)) and np.array_equal(made[5], picture(4))
    assert not np.array_equal(made[1], scene), "within the scene there are frames between"


# A run


FLAGS = ("--steps", "1", "--fps", "32", "--interpolate", "rife.safetensors", "--output")


@pytest.fixture(scope="module")
def whole(flags, weights, tmp_path_factory):
    """The .npz of a run without frames between, and of one with them."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("rife.safetensors").write_bytes(weights.read_bytes())
        assert main([*flags, "--steps", "1", "--output", "plain.npz"]) == 0
        assert main([*flags, *FLAGS, "smooth.npz"]) == 0
    return folder / "plain.npz", folder / "smooth.npz"


def test_a_run_writes_the_frames_between_and_says_so(whole, flags, here):
    plain, smooth = map(np.load, whole)
    assert plain["frames"].shape[0] == 9 and smooth["frames"].shape[0] == 17
    assert np.array_equal(smooth["frames"][::2], plain["frames"]), "the model's own frames stay"
    assert np.array_equal(smooth["latents"], plain["latents"])
    settings = read_settings(whole[1])
    assert {name: settings[name] for name in ("fps", "model_fps", "interpolate", "num_frames")} == {
        "fps": 32, "model_fps": 16, "interpolate": "rife.safetensors", "num_frames": 9
    }  # fmt: skip
    assert main(["--config", str(whole[1]), *flags[:2], "--output", "again.npz", "--quiet"]) == 0
    assert np.array_equal(np.load("again.npz")["frames"], smooth["frames"]), "its settings make it again"


def test_a_run_that_is_cut_between_frames_goes_on_to_the_same_bytes(flags, here, monkeypatch, capsys):
    flags = [*flags, *FLAGS]
    assert main([*flags, "whole.mp4"]) == 0
    calls = iter(range(100))

    def cut(self, *frames):
        if next(calls) == 4:
            raise OSError("cut")
        return between(self, *frames)

    between = Between.__call__
    with monkeypatch.context() as patch:
        patch.setattr(Between, "__call__", cut)
        assert main([*flags, "cut.mp4"]) == 1
    assert main(["resume", "cut.mp4"]) == 0
    assert Path("cut.mp4").read_bytes() == Path("whole.mp4").read_bytes()
    calls = iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(Between, "__call__", cut)
        assert main([*flags, "other.mp4"]) == 1
    save_tiny("rife.safetensors", seed=1)
    capsys.readouterr()
    assert main(["resume", "other.mp4"]) == 1
    assert "rife.safetensors is not the file that the run was begun with" in capsys.readouterr().err


def test_python_makes_the_same_and_smooths_what_is_made(pico, here, whole):
    pipe = wan_mlx.WanPipeline.from_pretrained(pico, dtype="float32", progress=False)
    options = dict(size="16x16", num_frames=9, steps=1, seed=3)
    video = pipe("a red circle", **options, interpolate="rife.safetensors")
    assert video.fps == 32 and np.array_equal(video.frames, np.load(whole[1])["frames"])
    for name in ("a.mp4", "a.gif", "a.webp"):
        assert open_video(video.save(name)).times[-1, 1] == pytest.approx(17 / 32, abs=0.02)
    heard = []
    plain = pipe("a red circle", **options)
    later = plain.smooth(times=2, weights="rife.safetensors", progress=heard.append)
    assert np.array_equal(later.frames, video.frames) and later.fps == 32 and len(plain) == 9
    assert later.settings["interpolate"] == "rife.safetensors" and later.settings["prompt"] == "a red circle"
    assert (heard[-1].done, heard[-1].total) == (17, 17)


def test_a_plan_counts_the_frames_between():
    plain, smooth = (wan_mlx.plan("t2v-1.3B", memory="64GB", **more) for more in ({}, {"fps": 32}))
    decode, more = plain.rows[-1], smooth.rows[-1]
    assert more.how == "whole frames, 32 fps" and more.flop - decode.flop == 80 * rife_flop(832, 480)
    assert more.peak - decode.peak == peak_memory.rife(832, 480)
    assert rife_flop(832, 480) / 1e9 == pytest.approx(20.4, rel=0.01)


def test_the_peak_is_as_planned():
    model, frame = RIFE(), mx.zeros((1, 100, 180, 3))
    mx.eval(model.parameters(), frame)
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(model(frame, frame, 0.5, settle=mx.eval))
    needed = mx.get_peak_memory() - held + 4 * 5_664_776
    assert peak_memory.rife(180, 100) == pytest.approx(needed, rel=0.1)


def test_weights_that_are_none_stop_a_run_before_its_first_step(flags, here, capsys):
    Path("other.safetensors").write_bytes(BUNDLED_VAE.read_bytes())
    assert main([*flags, "--interpolate", "other.safetensors", "--output", "a.mp4", "--json"]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "other.safetensors: is no RIFE 4.25" in lines[-1]["message"]
    assert not {"step", "stage_started"} & {line["event"] for line in lines}


def test_a_configuration_keeps_a_rate_that_was_asked_for():
    made = {"prompt": "x", "versions": {}, "fps": 40, "model_fps": 16, "interpolate": "rife"}
    assert as_options(made, Path("a.mp4"), {}) == {"prompt": "x", "fps": 40, "interpolate": "rife"}
    assert as_options({**made, "interpolate": None}, Path("a.mp4"), {}) == {"prompt": "x", "interpolate": None}
    assert as_options({"prompt": "x", "fps": 40}, Path("a.json"), {}) == {"prompt": "x", "fps": 40}


@pytest.mark.parametrize("given, said", [
    (["--fps", "12"], "fps is 12, but the model makes 16 frames a second, and none is left out; nearest: 16"),
    (["--fps", "16", "--interpolate", "rife"], "interpolate adds nothing; leave out one of the two; nearest: 32"),
    (["--fps", "500"], "fps is 500, expected 1 to 240; nearest: 240"),
    (["--frames", "1", "--fps", "32"], "one frame has none between"),
    (["--interpolate", "none.pkl"], "none.pkl"),
])  # fmt: skip
def test_what_cannot_be_is_said_before_any_work(flags, here, capsys, given, said):
    assert main([*flags, *given, "--output", "a.png"]) in (1, 2)
    assert said in capsys.readouterr().err and not Path("a.png").exists()


# Any file


def with_sound(path, codec="aac"):
    """A video of nine frames with a tone in it, made by another program."""
    frames, fps = clip(9), 16
    with av.open(str(path), "w") as file:
        video = file.add_stream("libx264", fps, options={"qp": "0"})
        video.width, video.height, video.pix_fmt = frames.shape[2], frames.shape[1], "yuv444p"
        sound = file.add_stream(codec, 48000)
        for frame in frames:
            file.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        tone = (np.sin(np.arange(24576) / 20) * 9000).astype(np.int16)
        for start in range(0, len(tone), 1024):
            samples = av.AudioFrame.from_ndarray(tone[None, start : start + 1024], format="s16", layout="mono")
            samples.sample_rate, samples.pts = 48000, start
            file.mux(sound.encode(samples))
        file.mux(video.encode(None))
        file.mux(sound.encode(None))
    return path


def packets(path):
    with av.open(str(path)) as file:
        return [(float(p.pts * p.time_base), bytes(p)) for p in file.demux(file.streams.audio[0]) if p.size]


def test_a_video_file_is_smoothed_with_its_sound(here, capsys):
    with_sound("in.mp4")
    own = list(open_video("in.mp4").read(range(9)))
    assert main(["smooth", "in.mp4", "--weights", "rife.safetensors"]) == 0
    said = capsys.readouterr()
    assert said.out == "in_32fps.mp4\n" and "9 frames at 16 fps, 17 at 32" in said.err
    made = open_video("in_32fps.mp4")
    assert made.num_frames == 17 and made.times[-1, 1] == pytest.approx(17 / 32, abs=1e-3)
    assert packets("in_32fps.mp4") == packets("in.mp4")
    assert read_settings("in_32fps.mp4") == {"fps": 32, "interpolate": "rife.safetensors"}
    assert main(["smooth", "in.mp4", "--fps", "40", "-o", "b.npz", "--weights", "rife.safetensors", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[-1]["event"] == "result" and lines[-1]["output"] == "b.npz"
    assert any("the sound (aac) is left out: .npz holds none such" in line.get("text", "") for line in lines)
    frames = np.load("b.npz")["frames"]
    assert len(frames) == 21 and np.array_equal(frames[0], own[0]) and np.array_equal(frames[-1], own[-1])


def test_sound_that_an_mp4_cannot_hold_is_left_out_and_said(here, capsys):
    with_sound("in.mkv", "pcm_s16le")
    assert main(["smooth", "in.mkv", "--weights", "rife.safetensors", "--quiet"]) == 0
    assert "the sound (pcm_s16le) is left out" in capsys.readouterr().err
    with av.open("in_32fps.mp4") as file:
        assert not file.streams.audio


def test_settings_stay_and_a_file_is_never_overwritten_unasked(here, capsys):
    save_video("ours.mp4", clip(3), 16, {"prompt": "a square", "seed": 7, "fps": 16, "versions": {}})
    command = ["smooth", "ours.mp4", "--times", "3", "-o", "out.mp4", "--weights", "rife.safetensors", "--quiet"]
    assert main(command) == 0
    settings = {"prompt": "a square", "seed": 7, "fps": 48, "versions": {}, "interpolate": "rife.safetensors"}
    assert read_settings("out.mp4") == settings
    before = Path("out.mp4").read_bytes()
    assert main(command) == 2 and "exists; choose another name" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0 and Path("out.mp4").read_bytes() == before
    same = ["smooth", "out.mp4", "-o", "out.mp4", "--overwrite", "--weights", "rife.safetensors"]
    assert main(same) == 2 and "out.mp4 is the video itself" in capsys.readouterr().err


def test_animations_and_uneven_frames_are_taken(here):
    pictures = [Image.fromarray(frame) for frame in clip(3)]
    pictures[0].save("in.gif", save_all=True, append_images=pictures[1:], duration=[100, 300, 100])
    path = wan_mlx.smooth("in.gif", "out.webp", fps=20, weights="rife.safetensors", progress=False)
    assert path == Path("out.webp") and open_video("out.webp").times[-1, 1] == pytest.approx(0.45)
    wan_mlx.smooth("in.gif", "out.npz", 20, weights="rife.safetensors", progress=False)
    assert len(np.load("out.npz")["frames"]) == 9


@pytest.mark.parametrize("given, said", [
    (["none.mp4"], "video none.mp4 does not exist"),
    (["text.mp4"], "text.mp4 cannot be read as a video"),
    (["one.png"], "one.png has one frame"),
    (["in.mp4", "--fps", "10"], "fps is 10, and in.mp4 has 16 already: frames are only added; nearest: 32"),
    (["in.mp4", "--fps", "-1"], "fps is -1, and in.mp4 has 16 already"),
    (["in.mp4", "--fps", "nan"], "fps is nan, expected a number above 16; nearest: 32"),
    (["in.mp4", "--fps", "inf"], "fps is inf, expected a number above 16"),
    (["in.mp4", "--times", "1"], "times is 1, expected a whole number from 2 on; nearest: 2"),
    (["in.mp4", "--times", "20"], "fps is 320, expected at most 240"),
    (["in.mp4", "--times", "2", "--fps", "32"], "--fps and --times are both given"),
    (["in.mp4", "-o", "no/out.mp4"], "output folder no does not exist"),
    (["in.mp4", "--weights", "text.mp4"], "text.mp4"),
])  # fmt: skip
def test_bad_input_is_one_line(here, capsys, given, said):
    save_video("in.mp4", clip(3), 16, {})
    Path("text.mp4").write_text("no video")
    Image.fromarray(picture(0)).save("one.png")
    before = sorted(here.iterdir())
    assert main(["smooth", "--weights", "rife.safetensors", *given]) in (1, 2)
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and sorted(here.iterdir()) == before


def test_a_frame_too_large_for_the_memory_is_refused(here, monkeypatch):
    save_video("in.mp4", clip(3), 16, {})
    monkeypatch.setattr(smoothing, "available_memory", lambda: 10_000_000)
    with pytest.raises(MemoryPlanError, match="in.mp4 is 24x16: RIFE needs about"):
        wan_mlx.smooth("in.mp4", weights="rife.safetensors", progress=False)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_nothing_behind(here, signum):
    save_video("in.mp4", clip(9), 16, {})
    running = PausedProcess("encoding", 3, "smooth", "in.mp4", "--weights", "rife.safetensors")
    running.process.send_signal(signum)
    assert running.finish()[0] == 128 + signum
    assert sorted(path.name for path in here.iterdir()) == ["in.mp4", "rife.safetensors"]


def test_the_default_weights_come_from_the_hub(weights, tmp_path, monkeypatch):
    repo, _, name = DEFAULT.partition(":")
    with serving({repo: {name: weights.read_bytes(), "README.md": b"mit"}}, monkeypatch, tmp_path) as hub:
        model = load_rife()
        assert hub.got() == {name: 1}
    want = load_rife(weights)
    frames = mx.random.uniform(shape=(2, 1, 10, 10, 3), key=mx.random.key(0))
    assert mx.array_equal(model(*frames), want(*frames))


def test_weights_given_in_another_place_are_known_for_what_they_are(weights, flags, here, capsys):
    assert main([*flags, "--vae", "rife.safetensors", "--output", "a.mp4"]) == 1
    assert "this is RIFE, which --interpolate takes" in capsys.readouterr().err
    assert streams.CUT == 0.2
