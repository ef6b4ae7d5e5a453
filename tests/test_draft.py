"""Drafts: their size, steps and noise, what a file of one tells, and the video that is made from it."""

import mlx.core as mx
import numpy as np
import pytest
from hub_server import serving
from test_preview import taehv, wan_space  # noqa: F401  # fixtures

import wan_mlx
from wan_mlx.cli.main import main
from wan_mlx.media.write import read_settings
from wan_mlx.noise import latent_noise, normal, pooled
from wan_mlx.presets import PRESETS
from wan_mlx.recipes import scheduler_for
from wan_mlx.request_builder import build_request
from wan_mlx.schedulers import SOLVERS


def draft_of(preset: str = "t2v-14B", **given):
    preset = PRESETS[preset]
    return build_request(preset, preset.transformer, preset.geometry, "a", preset.experts, draft=True, **given)


def test_noise_is_the_coarse_part_of_the_videos():
    whole = normal((16, 3, 60, 104), 7)
    coarse = np.moveaxis(np.array(latent_noise((3, 30, 52), 16, 7, of=(60, 104)))[0], -1, 0)
    want = whole[..., ::2, ::2] + whole[..., ::2, 1::2] + whole[..., 1::2, ::2] + whole[..., 1::2, 1::2]
    assert np.abs(coarse - want / 2).max() < 1e-6
    assert abs(coarse.std() - 1) < 0.01 and abs(coarse.mean()) < 0.01
    assert np.abs(np.corrcoef(coarse[..., 1:].ravel(), coarse[..., :-1].ravel())[0, 1]) < 0.01
    low = [np.fft.fft2(noise)[..., 1:4, 1:4].ravel() for noise in (whole, coarse)]
    assert np.abs(np.vdot(*low)) / np.linalg.norm(low[0]) / np.linalg.norm(low[1]) > 0.97
    odd = normal((2, 1, 45, 80), 7)  # 720p: of 45 rows 44 are taken
    assert np.allclose(pooled(odd, 22, 40), pooled(odd[..., :44, :], 22, 40))


def test_later_noise_too():
    asked = draft_of("t2v-1.3B", recipe="fastwan-3step", seed=5, num_frames=5)
    x = mx.zeros((1, 2, 30, 52, 16))
    drawn = scheduler_for(asked).step(0, x, x)
    sigma = float(scheduler_for(asked).sigmas[1])
    assert np.allclose(np.array(drawn), sigma * np.array(latent_noise((2, 30, 52), 16, 5, 1, (60, 104))))
    assert SOLVERS["dmd"](3, 8.0).noise_size is None


@pytest.mark.parametrize("given, size, steps, of", [
    ({}, (640, 352), 13, (1280, 720, 50)),
    (dict(size="480p", steps=40), (416, 240), 10, (832, 480, 40)),
    (dict(size="480p", steps=6), (416, 240), 6, (832, 480, 6)),
    (dict(size="480p", recipe="lightx2v-4step"), (416, 240), 4, (832, 480, 4)),
    (dict(width=32, height=48, steps=12), (16, 16), 8, (32, 48, 12)),
])  # fmt: skip
def test_size_and_steps(given, size, steps, of):
    asked = draft_of(**given)
    assert ((asked.width, asked.height), asked.steps, asked.draft_of) == (size, steps, of)
    full = draft_of(**given).shift  # of the full size's class
    preset = PRESETS["t2v-14B"]
    assert full == build_request(preset, preset.transformer, preset.geometry, "a", **given).shift


def test_too_small():
    with pytest.raises(ValueError, match="which is 16x64, expected at least 32x32"):
        draft_of(width=16, height=64)


@pytest.fixture(scope="module")
def command(pico):
    asked = "--prompt red --size 64x32 --frames 5 --seed 3 --steps 9 --shift 3 --dtype float32 --quiet".split()
    return ["--model", str(pico), *asked]


def test_from_a_draft(command, pico, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--draft", "--output", "draft.npz"]) == 0
    assert main([*command, "--output", "whole.npz"]) == 0
    model = ["--model", str(pico), "--quiet", "--output"]
    assert main([*model, "made.npz", "--from-draft", "draft.npz"]) == 0
    assert main([*model, "again.npz", "--config", "draft.npz"]) == 0
    frames = {name: np.load(f"{name}.npz")["frames"] for name in ("draft", "whole", "made", "again")}
    assert frames["draft"].shape == (5, 16, 32, 3)
    assert np.array_equal(frames["made"], frames["whole"]) and np.array_equal(frames["again"], frames["draft"])
    settings = read_settings("draft.npz")
    assert settings["draft"] is True and settings["draft_of"] == [64, 32, 9] and settings["steps"] == 8
    assert "draft" not in read_settings("made.npz") and read_settings("made.npz")["draft_of"] is None
    for flags, says in (
        (["--from-draft", "whole.npz"], "whole.npz: it is no draft; --config whole.npz takes its settings as they are"),
        (["--from-draft", "draft.npz", "--config", "draft.npz"], "both take settings from a file; give one of them"),
        (["--from-draft", "none.npz"], "none.npz"),
    ):
        assert main([*model, "other.npz", *flags]) == 2 and says in capsys.readouterr().err


def test_in_python_and_resumed(pico):
    pipe = wan_mlx.WanPipeline.from_pretrained(pico, dtype="float32", progress=False, draft=True)
    asked = pipe.request("red", size="64x32", num_frames=5, steps=9, seed=3)
    events = list(pipe.run(asked).outputs())
    state = wan_mlx.types.RunState(events[0], 4, events[4].state)
    assert np.array_equal(pipe.run(asked, state).video().frames, np.concatenate(events[9:]))
    with pytest.raises(TypeError, match="draft"):
        pipe("red", draft=True)


def test_taehv_is_fetched(wan_space, taehv, tmp_path, monkeypatch):  # noqa: F811
    repos = {"lightx2v/Autoencoders": {"taew2_1.safetensors": taehv.read_bytes()}}
    with serving(repos, monkeypatch, tmp_path) as hub:
        pipe = wan_mlx.WanPipeline.from_pretrained(wan_space, progress=False, draft=True)
        assert hub.got() == {"taew2_1.safetensors": 1}
    settings = pipe.settings(pipe.request("x"))
    assert (settings["draft"], settings["tiny_vae"]) == (True, "taew2_1.safetensors")


def test_a_plan_of_a_draft():
    plans = [wan_mlx.plan("t2v-1.3B", memory="64GB", draft=draft) for draft in (False, True)]
    whole, draft = ({row.stage: row for row in plan.rows} for plan in plans)
    assert "416x240" in plans[1].title and draft["denoise"].flop < whole["denoise"].flop / 16
    assert draft["decode"].how == "by TAEHV" and draft["decode"].flop < whole["decode"].flop / 50
    full = wan_mlx.plan("t2v-1.3B", memory="64GB", tiny_vae=True)
    assert full.rows[-1].flop == pytest.approx(11e12, rel=0.1)  # as TAEHV's work is known to be
