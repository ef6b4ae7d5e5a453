"""The scripts of ``examples/``, each run as it stands on tiny weights of its kind of model."""

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_animate import prepared
from test_speech import tone, write_wav

from wan_mlx import presets as configs
from wan_mlx.media.read import open_video, read_image
from wan_mlx.media.write import read_settings
from wan_mlx.types import SOURCE_FIELDS

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = {
    "text_to_video.py": "t2v", "text_to_image.py": "t2v", "video_to_video.py": "t2v", "image_to_video.py": "i2v",
    "first_last_frame.py": "flf2v", "vace_inpaint.py": "vace", "vace_extend.py": "vace", "vace_control.py": "vace",
    "vace_references.py": "vace",
}  # fmt: skip
# Fields of the settings that name what a script gave its model.
GIVEN = {
    "video_to_video.py": ["video"], "image_to_video.py": ["image"], "first_last_frame.py": ["image", "last_image"],
    "vace_inpaint.py": ["src_video", "src_mask"], "vace_extend.py": ["src_video", "src_mask"],
    "vace_control.py": ["src_video"], "vace_references.py": ["src_ref_images"],
}  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    """Small and quick unless a script says otherwise: that it runs is shown, not how well tiny weights paint."""
    for name, preset in configs.PRESETS.items():
        sampling = configs.Sampling(2, 3.0, 3.0)
        quick = replace(preset, size=(32, 32), num_frames=5, sampling=sampling, sampling_480p=None)
        monkeypatch.setitem(configs.PRESETS, name, quick)


def run(monkeypatch, script: Path, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    runpy.run_path(str(script), run_name="__main__")


def test_every_script_is_here():
    tools = {"fit_preview.py"}  # of a developer; tests/test_preview.py looks at what it made
    assert {path.name for path in EXAMPLES.glob("*.py")} - tools == {*SCRIPTS, "speech_to_video.py", "animate.py"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name, models, small, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    _, folder = models(SCRIPTS[name])
    extra = ["--frames", "9"] if name == "vace_extend.py" else []
    run(monkeypatch, EXAMPLES / name, "--model", folder, *extra)
    if name == "text_to_image.py":
        made = [tmp_path / f"stills/seed{seed}.png" for seed in (42, 43, 44)]
        assert len({path.read_bytes() for path in made}) == 3
    else:
        made = [tmp_path / f"{name.removesuffix('.py')}.mp4"]
        clip = open_video(made[0])
        assert (clip.num_frames, clip.height, clip.width) == (9 if extra else 5, 32, 32)
    assert all(str(path.relative_to(tmp_path)) in capsys.readouterr().out for path in made[-1:])
    settings = read_settings(made[0])
    assert settings["seed"] == 42 and settings["task"] == SCRIPTS[name]
    given = [key for key in (*SOURCE_FIELDS, "src_ref_images") if settings[key]]
    assert given == GIVEN.get(name, [])


def test_speech_to_video(models, small, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_wav(tmp_path / "talk.wav", tone(0.3, 16000), 16000)
    words = [EXAMPLES / "sources/first.png", "talk.wav", "--model", models("s2v")[1], "--size", "64x64", "--clips", 1]
    run(monkeypatch, EXAMPLES / "speech_to_video.py", *words)
    settings = read_settings(tmp_path / "speech_to_video.mp4")
    assert settings["audio"] == "talk.wav" and settings["num_clip"] == 1
    assert open_video(tmp_path / "speech_to_video.mp4").num_frames == 4  # as long as the sound


@pytest.mark.parametrize("replace", [False, True])
def test_animate(models, small, monkeypatch, tmp_path, replace):
    monkeypatch.chdir(tmp_path)
    prepared(tmp_path / "prepared", 8)
    words = ["prepared", "--model", models("animate")[1], "--frames", 5, *["--replace"] * replace]
    run(monkeypatch, EXAMPLES / "animate.py", *words)
    settings = read_settings(tmp_path / "animate.mp4")
    assert (settings["replace_flag"], settings["clip_frames"], "loras" in settings) == (replace, 5, replace)
    assert open_video(tmp_path / "animate.mp4").num_frames == 8


def test_example_sources_are_up_to_date(monkeypatch, tmp_path):
    run(monkeypatch, EXAMPLES / "sources/draw.py", tmp_path)
    for name in ("first.png", "last.png", "mask.png"):
        assert np.array_equal(read_image(tmp_path / name), read_image(EXAMPLES / "sources" / name))
    for name in ("clip.mp4", "guide.mp4"):
        ours, theirs = (open_video(folder / name) for folder in (tmp_path, EXAMPLES / "sources"))
        assert ours.num_frames == theirs.num_frames == 17
        for a, b in zip(ours.read(range(17)), theirs.read(range(17)), strict=True):
            assert np.abs(a.astype(int) - b).mean() < 2
    with Image.open(EXAMPLES / "sources/mask.png") as mask:
        assert set(np.unique(np.asarray(mask))) == {0, 255}
    assert sum(path.stat().st_size for path in (EXAMPLES / "sources").iterdir()) < 20_000
