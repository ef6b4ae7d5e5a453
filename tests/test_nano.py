"""The bundled model makes the video that the prompt asks for; what it shows is measured from the pixels."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import wan_mlx
from wan_mlx.types import WeightsError
from wan_mlx.weights.checkpoint import open_checkpoint
from wan_mlx.weights.hub import BUNDLED

ROOT = Path(__file__).parent.parent
STILL = dict(num_frames=1, steps=2, seed=3)  # a single frame: seconds, not a minute


@pytest.fixture(scope="module")
def pipe():
    return wan_mlx.WanPipeline.from_pretrained("nano", progress=False)


def evaluate():
    """The measuring part of examples/nano, which needs only numpy."""
    sys.path.insert(0, str(ROOT / "examples/nano"))
    try:
        import evaluate
    finally:
        sys.path.pop(0)
    return evaluate


@pytest.mark.parametrize(
    "change", [{"prompt": "a green square moves up on a black background"}, {"seed": 4}, {"guidance_scale": 1.0},
               {"guidance_scale": 5.0}, {"negative_prompt": "a red circle"}, {"shift": 8.0}, {"solver": "dpm++"}]
)  # fmt: skip
def test_every_setting_changes_the_picture(pipe, change):
    prompt = "a red circle moves right on a blue background"
    assert not np.array_equal(pipe(**{"prompt": prompt, **STILL, **change}).latents, pipe(prompt, **STILL).latents)


def test_same_seed_same_bytes(pipe, tmp_path):
    paths = [pipe("a yellow star spins on a grey background", **STILL).save(tmp_path / f"{i}.png") for i in range(2)]
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("name, most", [("nano", 16_000_000), ("nano-i2v", 8_000_000)])
def test_it_is_small(name, most):
    assert sum(path.stat().st_size for path in BUNDLED[name].iterdir()) <= most


def test_nano_i2v_shares_the_parts_of_nano(tmp_path):
    checkpoint, nano = (open_checkpoint(BUNDLED[name]) for name in ("nano-i2v", "nano"))
    assert checkpoint.model == "nano-i2v" and checkpoint.files["vae"] == BUNDLED["nano"] / "vae.safetensors"
    assert checkpoint.configs["text_encoder"] == nano.configs["text_encoder"]
    assert checkpoint.configs["transformer"]["model_type"] == "i2v"
    config = json.loads((BUNDLED["nano-i2v"] / "config.json").read_bytes())
    for place in ("../nano", "..", "", "/etc", 7):
        (tmp_path / "config.json").write_text(json.dumps(config | {"parts_from": place}))
        with pytest.raises(WeightsError, match="expected the name of a folder beside"):
            open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"parts_from": "nowhere"}))
    with pytest.raises(WeightsError, match="not a complete Wan2.1 folder"):
        open_checkpoint(tmp_path)


def test_videos_show_what_was_asked(tmp_path):
    """The README's first command, and a Chinese one, each in a process of its own as a user runs them."""
    asked = {
        "a red circle moves right on a blue background": ("red", "navy", "right"),
        "一个绿色的方块在黑色背景上向上移动": ("green", "black", "up"),
    }

    def generate(index_and_prompt):
        index, prompt = index_and_prompt
        output = tmp_path / f"{index}.npz"
        command = [sys.executable, "-m", "wan_mlx.generate", "--model", "nano", "--prompt", prompt, "--seed", "1",
                   "--steps", "10", "--output", str(output)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return np.load(output)["frames"]

    with ThreadPoolExecutor(2) as workers:
        clips = list(workers.map(generate, enumerate(asked)))
    for frames, want in zip(clips, asked.values(), strict=True):
        assert frames.shape == (17, 128, 128, 3)
        reading = evaluate().measure(frames)
        assert (reading.colour, reading.background, reading.motion) == want
