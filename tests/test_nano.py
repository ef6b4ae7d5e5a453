"""The bundled models make the videos that prompts ask for; what they show is measured from the pixels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import wan_mlx
from wan_mlx.errors import WeightsError
from wan_mlx.presets import BUNDLED
from wan_mlx.weights.checkpoint import open_checkpoint

ROOT = Path(__file__).parent.parent
PROMPT = "a red circle moves right on a blue background"
STILL = dict(width=64, height=64, num_frames=1, steps=2, seed=3)  # a second, not half a minute
FEW = 6  # steps, of the 12 that nano takes if nothing is said


@pytest.fixture(scope="module")
def pipe():
    return wan_mlx.WanPipeline.from_pretrained("nano", progress=False)


@pytest.fixture(scope="module")
def still(pipe):
    return pipe(PROMPT, **STILL)


@pytest.fixture
def nano(monkeypatch):
    """The modules of examples/nano; processes that they start find them too."""
    monkeypatch.syspath_prepend(str(ROOT / "examples/nano"))
    import evaluate

    return evaluate


# --- settings, sizes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", [{"prompt": "a green square moves up on a black background"}, {"seed": 4}, {"guidance_scale": 1.0},
               {"guidance_scale": 5.0}, {"negative_prompt": "a red circle"}, {"shift": 8.0}, {"solver": "dpm++"}]
)  # fmt: skip
def test_every_setting_changes_the_picture(pipe, still, change):
    assert not np.array_equal(pipe(**{"prompt": PROMPT, **STILL, **change}).latents, still.latents)


def test_same_seed_same_bytes(pipe, still, tmp_path):
    first, second = still.save(tmp_path / "1.png"), pipe(PROMPT, **STILL).save(tmp_path / "2.png")
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("name, most", [("nano", 16_000_000), ("nano-i2v", 8_000_000)])
def test_bundled_models_are_small(name, most):
    assert sum(path.stat().st_size for path in BUNDLED[name].iterdir()) <= most


def test_nano_i2v_shares_the_parts_of_nano(tmp_path):
    checkpoint, nano = (open_checkpoint(BUNDLED[name]) for name in ("nano-i2v", "nano"))
    assert checkpoint.model == "nano-i2v" and checkpoint.files["vae"] == BUNDLED["nano"] / "vae.safetensors"
    assert checkpoint.part("text_encoder") == nano.part("text_encoder")
    assert checkpoint.part("transformer").config["model_type"] == "i2v"
    config = json.loads((BUNDLED["nano-i2v"] / "config.json").read_bytes())
    for place in ("../nano", "..", "", "/etc", 7):
        (tmp_path / "config.json").write_text(json.dumps(config | {"parts_from": place}))
        with pytest.raises(WeightsError, match="expected the name of a folder beside"):
            open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"parts_from": "nowhere"}))
    with pytest.raises(WeightsError, match="not a complete Wan2.1 folder"):
        open_checkpoint(tmp_path)


# --- a few videos -------------------------------------------------------------------------------------------------


def test_the_first_command_of_the_readme(tmp_path, nano):
    output = tmp_path / "demo.npz"
    command = [sys.executable, "-m", "wan_mlx.generate", "--model", "nano", "--steps", str(FEW), "--seed", "1",
               "--prompt", PROMPT, "--output", str(output)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    frames = np.load(output)["frames"]
    assert frames.shape == (17, 128, 128, 3)
    assert nano.measure(frames) == ("red", "navy", "right", "circle")


def test_held_out_prompts_are_shown(nano):
    asks = nano.held_out((4, 0, 1, 0))[3:]
    assert not asks[0].prompt.isascii() and asks[1].size == "160x96, 17 frames"
    rows = nano.evaluate("nano", asks, jobs=2, steps=FEW)
    assert len(rows) == 2 and all(row["right"]["all three"] for row in rows), rows
    assert any(row["right"]["shape"] for row in rows), rows  # settled last: six steps are few for it


def test_a_held_out_image_is_animated_as_prompted(nano):
    pytest.importorskip("torch")  # paints the image
    (row,) = nano.evaluate("nano-i2v", nano.held_out((1, 0, 0, 0), with_images=True), steps=FEW)
    assert row["right"]["all three"] and row["first frame, dB"] >= 28, row


def test_held_out_clips_are_reconstructed(nano):
    pytest.importorskip("torch")
    whole, inside = reconstruction(nano, held_out_scenes(nano, 4), 5)
    assert whole >= 34 and inside >= 28, (whole, inside)


def held_out_scenes(nano, count: int) -> list:
    """The first of the clips that examples/nano/train.py measures."""
    rng = np.random.default_rng([2000, *nano.world.SIZES[0], 1])
    return [nano.world.sample_scene(rng, held=True) for _ in range(count)]


def reconstruction(nano, scenes, frames: int) -> np.ndarray:
    """Mean PSNR in dB of the first ``frames`` frames, whole and within the things' bounding boxes."""
    vae, decibels = wan_mlx.load_vae(open_checkpoint(BUNDLED["nano"])), []
    for clip, boxes in nano.clips(scenes):
        video = mx.array(clip[None, :frames].astype(np.float32) / 127.5 - 1)
        back = np.concatenate([np.array(part) for part in vae.decode(vae.encode(video))], axis=1)
        error = ((back - np.array(video))[0] / 2) ** 2
        decibels.append([-10 * np.log10(error.mean()), -10 * np.log10(error[boxes[:frames]].mean())])
    return np.mean(decibels, axis=0)


# --- as many as the claims are made for: hours on a CPU -----------------------------------------------------------


@pytest.mark.slow
def test_nano_over_many_held_out_prompts(nano):
    asks = nano.held_out((64, 32, 32, 32))
    assert sum(not ask.prompt.isascii() for ask in asks) >= len(asks) // 4
    rows = nano.evaluate("nano", asks, jobs=min(os.cpu_count(), 12))
    sizes = nano.tabulate(rows)
    first, *others = sizes.values()
    assert first["videos"] == 64 and first["all three"] >= 95 and first["shape"] >= 90, sizes
    assert all(row["all three"] >= 85 for row in others), sizes


@pytest.mark.slow
def test_nano_i2v_over_many_held_out_images(nano):
    pytest.importorskip("torch")
    rows = nano.evaluate("nano-i2v", nano.held_out((16, 4, 4, 4), with_images=True), jobs=min(os.cpu_count(), 12))
    assert np.mean([row["right"]["motion"] for row in rows]) >= 0.9, rows
    assert min(row["first frame, dB"] for row in rows) >= 28


@pytest.mark.slow
def test_many_held_out_clips_are_reconstructed(nano):
    pytest.importorskip("torch")
    whole, inside = reconstruction(nano, held_out_scenes(nano, 64), 17)
    assert whole >= 34 and inside >= 28, (whole, inside)
