"""Speech to video (Wan2.2 S2V): whole runs of the official commands from official folders, against the official loop.
"""

import wave

import numpy as np
import pytest
from official_speech import official_video
from oracles import torch
from PIL import Image
from test_sources import write_video
from test_tasks import noise_image, noise_video

from wan_mlx.cli.main import main
from wan_mlx.presets import PRESETS

pytestmark = [pytest.mark.filterwarnings("ignore:`torch.cuda.amp.autocast:FutureWarning"),
              pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda':UserWarning")]  # fmt: skip
PROMPT = "a cat boxing on a stage"
NEGATIVE = PRESETS["s2v-14B"].negative_prompt
AREA = (64, 64)
SAMPLING = dict(sampling_steps=3, shift=3.0, guide_scale=4.5, seed=42)
FIRST = noise_image(150, 200)


@pytest.fixture(autouse=True, scope="module")
def no_gradients():
    with torch.no_grad():
        yield


def write_sound(path, seconds: float, rate: int = 16000, seed: int = 0) -> None:
    """Noise of changing loudness, 16 bits."""
    times = np.arange(int(seconds * rate)) / rate
    sound = np.random.default_rng(seed).normal(0, 0.2, len(times)) * (1.2 + np.sin(9 * times))
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(rate)
        file.writeframes((sound.clip(-1, 1) * 32767).astype("<i2").tobytes())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speech")
    Image.fromarray(FIRST).save(folder / "first.png")
    write_sound(folder / "talk.wav", 1.2)
    poses = noise_video(30, 9, 6, seed=4).repeat(8, axis=1).repeat(8, axis=2)  # narrower, and too short
    write_video(folder / "pose.mkv", poses, rate=24)
    return folder


@pytest.mark.parametrize("pose, start_from_ref", [(False, False), (True, True)])
def test_official_commands(models, files, tmp_path, monkeypatch, pose, start_from_ref):
    """Two clips, of 5 or 8 frames and of 8."""
    modules, folder = models("s2v")
    given = ["--pose_video", files / "pose.mkv"] * pose + ["--start_from_ref"] * start_from_ref
    command = [
        "--task", "s2v-14B", "--size", "64*64", "--ckpt_dir", folder, "--offload_model", "True",
        "--convert_model_dtype", "--prompt", PROMPT, "--image", files / "first.png", "--audio", files / "talk.wav",
        "--infer_frames", 8, "--sample_steps", 3, "--base_seed", 42, "--save_file", tmp_path / "ours.npz",
        "--dtype", "float32", "--num_clip", 2, "--quiet", *given,
    ]  # fmt: skip
    assert main([*map(str, command)]) == 0
    ours = np.load(tmp_path / "ours.npz")["frames"]
    theirs = official_video(
        modules, monkeypatch, PROMPT, NEGATIVE, files / "first.png", files / "talk.wav", num_repeat=2,
        pose_video=str(files / "pose.mkv") if pose else None, max_area=AREA[0] * AREA[1], infer_frames=8,
        init_first_frame=start_from_ref, **SAMPLING,
    )  # fmt: skip
    assert ours.shape == theirs.shape == (16 - 3 * (not start_from_ref), *theirs.shape[1:])
    difference = np.abs(ours.astype(int) - theirs.astype(int))
    assert difference.max() <= 2, difference.max(axis=(1, 2, 3))
    assert theirs.std() > 5
