"""Video to video: how much of the source stays, which of its frames are taken, and what cannot be asked for."""

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import official_checkpoints as checkpoints
import pytest
from oracles import (
    official,
    official_frames,
    official_latents,
    official_text,
    relative_error,
    torch,
    unmasked_attention,
)
from test_sources import write_video
from test_tasks import StandIns, noise_video, request
from test_vae import scale

from wan_mlx import WanPipeline
from wan_mlx.cli.main import main
from wan_mlx.guidance import guided_velocity
from wan_mlx.media.read import at_rate, open_video
from wan_mlx.media.write import read_settings
from wan_mlx.models.configs import VAEConfig
from wan_mlx.schedulers import SOLVERS
from wan_mlx.tasks import TASKS

SIZE = dict(width=48, height=32)
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def networks(models):
    return models("t2v")[0]


@pytest.fixture(scope="module")
def folder(models):
    return models("t2v")[1]


@pytest.fixture(scope="module")
def pipe(folder):
    return WanPipeline.from_pretrained(folder, dtype="float32", progress=False)


def source(num_frames: int = 5) -> np.ndarray:
    """uint8 (T, 32, 48, 3): squares of 8 pixels."""
    return noise_video(num_frames, 4, 6).repeat(8, axis=1).repeat(8, axis=2)


def encode(pipe, video: np.ndarray) -> np.ndarray:
    asked = pipe.request("a", **SIZE, num_frames=len(video), video=video, strength=0.5, seed=1)
    return np.array(TASKS["t2v"].condition(asked, pipe).source_latents)


def make(pipe, **options):
    return pipe("a cat boxing", **{**SIZE, "num_frames": 5, "steps": 4, "seed": 1, **options})


def test_whole_run_against_the_official_networks(networks, pipe, monkeypatch):
    """Official VAE, text encoder, transformer and solver, the noise added by the solver itself."""
    monkeypatch.setattr(official("modules.model"), "flash_attention", unmasked_attention)
    video = torch.from_numpy(source()).movedim(-1, 0).float() / 127.5 - 1
    vae, prompts = scale(VAEConfig()), ("a cat boxing", "a dog")
    with torch.no_grad():
        texts = [official_text(networks["text_encoder"], checkpoints.sentencepiece_model(), text) for text in prompts]
        latents = official_latents(
            lambda latents, t, text: networks["transformer"]([latents], t, [text], 12)[0], texts, (16, 2, 4, 6),
            steps=5, shift=3.0, guidance=4.0, seed=1,
            begin=2, source=networks["vae"].encode(video[None], vae)[0],
        )  # fmt: skip
        want = official_frames(networks["vae"], vae, latents)
    sampling = dict(steps=5, shift=3.0, guidance_scale=4.0)
    got = make(pipe, video=source(), strength=0.6, negative_prompt="a dog", **sampling)
    assert want.std() > 5 and relative_error(got.latents, latents) < 1e-4
    assert np.abs(got.frames.astype(int) - want).max() <= 2


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_full_strength_is_text_to_video(pipe, solver):
    plain, full = make(pipe, solver=solver), make(pipe, solver=solver, video=source(), strength=1.0)
    assert np.array_equal(plain.latents, full.latents) and np.array_equal(plain.frames, full.frames)


def test_little_strength_keeps_the_source(pipe):
    """The last step of many: what differs is at most its noise level times noise, source and velocity."""
    start = dict(steps=50, shift=1.0, strength=0.02, guidance_scale=1.0, seed=1)
    asked = pipe.request("a cat", **SIZE, num_frames=5, video=source(), **start)
    *_, step = [event for event in pipe.stages(asked) if hasattr(event, "sigma")]
    assert step.total == 1 and 0.01 < step.sigma < 0.03
    latents = encode(pipe, source())
    assert np.abs(np.array(step.latents) - latents).max() < 0.02 * 8 < np.abs(latents).max()


def test_more_strength_is_further_from_the_source(pipe):
    latents = np.moveaxis(encode(pipe, source())[0], -1, 0)
    distances = [
        np.abs(make(pipe, steps=5, video=source(), strength=s).latents - latents).mean() for s in (0.2, 0.6, 1.0)
    ]
    assert distances == sorted(distances) and len(set(distances)) == 3


@pytest.mark.parametrize("strength, steps, made", [(0.7, 50, 35), (0.29, 100, 29), (0.6, 12, 7), (1, 7, 7)])
def test_number_of_steps(strength, steps, made):
    """Rounded: Diffusers' ``int(steps * strength)`` makes 28 of 0.29 * 100."""
    asked = replace(request("t2v", (48, 32), 5), steps=steps, strength=strength)
    assert asked.steps_made == asked.steps - asked.begin == made


def test_noise_and_source_mix_at_the_first_sigma(pipe):
    asked = pipe.request("a cat", **SIZE, num_frames=5, steps=10, video=source(), strength=0.2, seed=9)
    seen = []
    conditioning = TASKS["t2v"].condition(asked, pipe)
    scheduler = SOLVERS["unipc"](10, 5.0, begin=8)
    start = scheduler.start(conditioning.noise, conditioning.source_latents)
    sigma = scheduler.sigmas[0]
    want = sigma * np.array(conditioning.noise) + (1 - sigma) * encode(pipe, source())
    np.testing.assert_allclose(start, want, atol=1e-6)
    for event in pipe.stages(asked):
        if hasattr(event, "sigma"):
            seen.append(event.sigma)
    whole = 5 * np.linspace(0.999, 0, 11)[:-1] / (1 + 4 * np.linspace(0.999, 0, 11)[:-1])
    np.testing.assert_allclose(seen, whole[8:], atol=1e-6)


@pytest.mark.parametrize("rate", [8, 12, 15, 16, 24, 25, 29.97, 30, 60])
def test_frames_at_sixteen_per_second(tmp_path, rate):
    """Frame k is the one that stands in the middle of its sixteenth of a second; the length is that of the source."""
    seconds = 1.3
    length = round(seconds * rate)
    write_video(tmp_path / "a.mkv", noise_video(length, 16, 16), rate=rate)
    clip = open_video(tmp_path / "a.mkv")
    numbers = at_rate(clip, 16, 1000)
    assert abs(len(numbers) - length / rate * 16) <= 0.6
    want = [min(length - 1, int((k + 0.5) / 16 * rate)) for k in range(len(numbers))]
    assert np.abs(np.array(numbers) - want).max() <= (0 if rate in (16, 8) else 1)
    assert numbers == sorted(numbers) and numbers[0] == int(rate / 32)
    if rate == 16:
        assert numbers == list(range(length))
    assert at_rate(clip, 16, 5) == numbers[:5]


def test_frames_are_taken_from_the_start_and_cut_to_the_size():
    encoders, frames = StandIns(), noise_video(40, 32, 96)
    asked = replace(request("t2v", (48, 32), 9, video=frames), steps=10, strength=0.5)
    fitted = TASKS["t2v"].fit(asked)
    assert fitted == asked
    got = TASKS["t2v"].condition(fitted, encoders)
    middle = frames[:9, :, 24:72].astype(np.float32) / np.float32(127.5) - np.float32(1)
    (want,) = encoders.encode_videos([iter([middle[None, :1], middle[None, 1:5], middle[None, 5:9]])])
    assert mx.array_equal(got.source_latents, want)


@pytest.mark.parametrize("length, num_frames", [(1, 1), (4, 1), (5, 5), (12, 9), (17, 17), (30, 17)])
def test_a_shorter_source_makes_a_shorter_video(length, num_frames):
    fitted = TASKS["t2v"].fit(request("t2v", (48, 32), 17, video=noise_video(length, 32, 48)))
    assert fitted.num_frames == num_frames


@pytest.mark.parametrize(
    "options, message",
    [
        ({"strength": 0.5}, "strength is 0.5, but there is no video"),
        ({"video": source(), "strength": 0.0}, "strength is 0.0, expected above 0 and up to 1; nearest: 0.25"),
        ({"video": source(), "strength": 1.5}, "nearest: 1"),
        ({"video": source(), "strength": float("nan")}, "strength is nan"),
        ({"video": source(), "strength": 0.1}, "strength 0.1 of 4 steps is not one step; nearest: strength 0.25"),
        ({"video": "nowhere.mp4"}, "video nowhere.mp4 does not exist"),
        ({"video": source(), "cfg_zero": True}, "cfg_zero leaves the first steps from noise at zero"),
    ],
)
def test_refused(pipe, options, message):
    with pytest.raises(ValueError, match=message) as error:
        make(pipe, **options)
    assert "\n" not in str(error.value)


def test_command_line(folder, pipe, tmp_path, capsys):
    write_video(tmp_path / "source.mkv", source())
    common = ["--model", str(folder), "--prompt", "a cat boxing", "--size", "48x32", "--steps", "4", "--seed", "1",
              "--dtype", "float32", "--video", str(tmp_path / "source.mkv")]  # fmt: skip
    assert main([*common, "--frames", "9", "--output", str(tmp_path / "a.npz"), "--strength", "0.5"]) == 0
    said = capsys.readouterr().err
    assert "strength 0.5: the last 2 of the steps" in said
    assert "48x32, 5 frames" in said and "its length is the source's; 9 frames were asked for" in said
    want = make(pipe, video=source(), strength=0.5)
    with np.load(tmp_path / "a.npz") as got:
        assert np.array_equal(got["latents"], want.latents)
    settings = read_settings(tmp_path / "a.npz")
    assert settings["strength"] == 0.5 and settings["video"].endswith("source.mkv")
    assert json.dumps(want.settings) and want.settings["video"].startswith("array uint8 (5, 32, 48, 3)")
    assert main([*common, "--output", str(tmp_path / "b.npz"), "--dry-run"]) == 0
    assert "strength 0.7: the last 3 of the steps" in capsys.readouterr().err


def test_nano_paints_a_clip_anew():
    """The red circle of the example clip turns green on the same ground, and is where it was in every frame."""
    pipe = WanPipeline.from_pretrained("nano", dtype="float32", progress=False)
    start = dict(video=EXAMPLES / "sources/clip.mp4", strength=0.6, guidance_scale=6.0)
    frames = pipe("a green circle moves right on a blue background", steps=6, seed=1, **start).frames
    for frame, centre in zip(frames.astype(int), np.linspace(30, 98, 17), strict=False):  # as sources/draw.py has it
        y, x = np.nonzero(frame[..., 1] > 110)
        assert np.hypot(x.mean() - centre, y.mean() - 64) < 10 and 0.5 < len(x) / (np.pi * 18**2) < 1.6
        red, green, blue = frame[y, x].mean(axis=0)
        assert green > max(red, blue) + 50 and np.abs(frame[:20].mean(axis=(0, 1)) - (22, 34, 116)).max() < 40


def test_a_run_that_was_cut_goes_on(folder, tmp_path, monkeypatch, capsys):
    """With the steps that are made counted, not those of the grid, and without the source, which is encoded."""
    write_video(tmp_path / "source.mkv", source())
    command = ["--model", str(folder), "--prompt", "a cat", "--size", "48x32", "--frames", "5", "--steps", "4",
               "--seed", "1", "--dtype", "float32", "--quiet", "--video", str(tmp_path / "source.mkv"), "--strength",
               "0.75"]  # fmt: skip
    assert main([*command, "--output", str(tmp_path / "whole.npz")]) == 0
    calls = iter(range(99))

    def failing(*args):
        if next(calls) == 2:
            raise RuntimeError("power cut")
        return guided_velocity(*args)

    with monkeypatch.context() as patch:
        patch.setattr("wan_mlx.denoise.guided_velocity", failing)
        assert main([*command, "--output", str(tmp_path / "cut.npz")]) == 1
    (tmp_path / "source.mkv").unlink()
    capsys.readouterr()
    assert main(["--resume", str(tmp_path / "cut.npz")]) == 0
    assert "2 of 3 steps are done" in capsys.readouterr().err
    with np.load(tmp_path / "whole.npz") as whole, np.load(tmp_path / "cut.npz") as cut:
        assert np.array_equal(whole["latents"], cut["latents"]) and np.array_equal(whole["frames"], cut["frames"])
