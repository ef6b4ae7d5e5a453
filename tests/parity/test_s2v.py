"""Speech to video (Wan2.2 S2V): whole runs of the official commands from official folders, against the official loop.
"""

import json
import sys
import wave

import av
import machines
import numpy as np
import official_checkpoints as checkpoints
import published
import pytest
from official_speech import official_size, official_video
from oracles import torch
from PIL import Image
from test_sources import write_video
from test_speech import tone, write_wav
from test_tasks import noise_image, noise_video

from wan_mlx import WanPipeline
from wan_mlx.cli.main import main
from wan_mlx.presets import PRESETS
from wan_mlx.runs.folder import FrameStore, RunFolder
from wan_mlx.tasks.s2v import output_size
from wan_mlx.weights.convert import convert

pytestmark = [pytest.mark.filterwarnings("ignore:`torch.cuda.amp.autocast:FutureWarning"),
              pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda':UserWarning")]  # fmt: skip
PROMPT = "a cat boxing on a stage"
NEGATIVE = PRESETS["s2v-14B"].negative_prompt
AREA = (64, 64)
OPEN = dict(dtype="float32", progress=False, prompt_cache=False)
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


@pytest.mark.parametrize("pose, start_from_ref", [
    (False, False), (True, True), pytest.param(True, False, marks=pytest.mark.slow),
    pytest.param(False, True, marks=pytest.mark.slow),
])  # fmt: skip
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


def options(folder, files, output) -> list[str]:
    """Two clips of two steps, of 1 and of 4 frames."""
    command = ["--model", folder, "--size", "64x64", "--prompt", PROMPT, "--image", files / "first.png", "--audio",
               files / "talk.wav", "--infer_frames", 4, "--num_clip", 2, "--steps", 2, "--seed", 1, "--dtype",
               "float32", "--output", output, "--quiet"]  # fmt: skip
    return [*map(str, command)]


@pytest.fixture(scope="module")
def whole(models, files, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "whole.mp4"
    assert main(options(models("s2v")[1], files, path)) == 0
    return path


@pytest.mark.parametrize("place", ["step", "decode"])
def test_resume_inside_the_second_clip(models, files, whole, tmp_path, monkeypatch, place):
    """The same bytes as without a break: after a step of the second clip, and while it is decoded."""
    with monkeypatch.context() as patch:
        if place == "step":
            fail(patch, RunFolder, "save_step", lambda step, *_: step.index == 3)
        else:
            fail(patch, FrameStore, "add", lambda frames: len(frames) == 4)
        assert main(options(models("s2v")[1], files, tmp_path / "cut.mp4")) == 1
    assert main(["--resume", str(tmp_path / "cut.mp4"), "--dtype", "float32"]) == 0
    assert (tmp_path / "cut.mp4").read_bytes() == whole.read_bytes()
    with av.open(str(whole)) as file:
        seconds = {stream.type: float(stream.duration * stream.time_base) for stream in file.streams}
    assert seconds["video"] == 5 / 16 and abs(seconds["audio"] - 5 / 16) < 0.01


@pytest.mark.parametrize("mode", ["tokens", pytest.param("cfg", marks=pytest.mark.slow)])
def test_two_machines_make_the_same_bytes(models, files, whole, tmp_path, mode):
    """Both clips: tokens of the picture and of the frames before are divided, too; rank 0 encodes the second clip."""
    words = [*options(models("s2v")[1], files, tmp_path / "two.mp4"), "--parallel", mode]
    processes = machines.start(tmp_path, 2, [sys.executable, "-m", "wan_mlx.generate", *words])
    for code, _, error in machines.ended(processes):
        assert code == 0, error
    assert (tmp_path / "two.mp4").read_bytes() == whole.read_bytes()


def fail(patch, owner, name, when) -> None:
    """``owner.name`` raises ``when`` its arguments are so."""
    real = getattr(owner, name)

    def failing(self, *arguments):
        if when(*arguments):
            raise RuntimeError("the machine failed")
        return real(self, *arguments)

    patch.setattr(owner, name, failing)


@pytest.mark.parametrize("wrong, words", [
    (dict(audio=None), "give the audio with --audio FILE"),
    (dict(image=None), "give the image with --image FILE"),
    (dict(infer_frames=10), "infer_frames is 10, expected a multiple of 4; nearest: 8"),
    (dict(fps=32), "fps is 32, but clips are made at 16"),
    (dict(fit="crop", width=128, height=72), "height is 72, expected a positive multiple of 64; nearest: 64"),
    (dict(audio="short.wav"), "is shorter than a video's frame"),
    (dict(src_video="pose.mkv"), "src_video was given to a s2v model"),
])  # fmt: skip
def test_what_is_refused(models, files, monkeypatch, wrong, words):
    monkeypatch.chdir(files)
    write_sound(files / "short.wav", 0.03)
    pipe = WanPipeline.from_pretrained(models("s2v")[1], dtype="float32", progress=False)
    given = {"image": "first.png", "audio": "talk.wav", **wrong}
    with pytest.raises(ValueError, match=words):
        pipe.request("a", **{name: value for name, value in given.items() if value is not None})


# What is odd about a sound → how it is made, and the line that is said, if it is not refused.
ODD_SOUNDS = {
    "silent": (lambda path: write_wav(path, np.zeros(16000), 16000), "a.wav is silent: there is nothing in it to say"),
    "stereo": (lambda path: write_wav(path, tone(1, 16000)[:, None].repeat(2, axis=1), 16000),
               "a.wav has 2 channels, of which the model hears the mean"),
    "8-bit": (lambda path: write_wav(path, tone(1, 16000), 16000, 1),
              "a.wav has 8 bits a sample, whose noise the model hears, too"),
    "3 seconds": (lambda path: write_wav(path, tone(3, 16000), 16000),
                  "a.wav lasts 3 s: an .mp4 has 48 of the 77 frames"),
    "empty": (lambda path: write_wav(path, np.zeros(0), 16000), "a.wav is empty: there is no sound in it"),
    "no file": (lambda path: None, "a.wav does not exist, expected a file"),
    "cut": (lambda path: path.write_bytes(b"RIFF" + bytes(30)), "a.wav cannot be read as a sound"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD_SOUNDS)
def test_an_odd_sound_is_told_in_one_line(models, files, tmp_path, capsys, kind):
    """What can be heard is made all the same; what cannot is refused before any work."""
    make, said = ODD_SOUNDS[kind]
    make(tmp_path / "a.wav")
    is_refused = kind in ("empty", "no file", "cut")
    command = ["--model", models("s2v")[1], "--size", "64x64", "--prompt", PROMPT, "--image", files / "first.png",
               "--audio", tmp_path / "a.wav", "--dry-run", "--dtype", "float32"]  # fmt: skip
    assert main([*map(str, command)]) == 2 * is_refused
    lines = [line for line in capsys.readouterr().err.splitlines() if "a.wav " in line]
    told = [line for line in lines if said in line]
    assert len(told) == 1 and told[0].startswith("error: ") == is_refused
    assert kind != "3 seconds" or lines == told


def test_no_speech_is_made(models, files, capsys):
    """Official flags that have another model make the sound are taken, with a line that says so."""
    command = ["--model", models("s2v")[1], "--size", "64x64", "--prompt", PROMPT, "--image", files / "first.png",
               "--dry-run", "--enable_tts"]  # fmt: skip
    said = "--enable_tts has no effect here: no speech is made here; give a recording with --audio"
    assert main([*map(str, [*command, "--audio", files / "talk.wav"])]) == 0
    assert capsys.readouterr().err.splitlines().count(said) == 1
    assert main([*map(str, command)]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[0] == said and len(told) == 2 and "give the audio with --audio FILE" in told[1]


def test_silence_makes_a_video(models, files, tmp_path):
    """Of finite pixels: nothing divides by its loudness."""
    write_wav(tmp_path / "a.wav", np.zeros(4000), 16000)
    pipe = WanPipeline.from_pretrained(models("s2v")[1], **OPEN)
    given = dict(image=files / "first.png", audio=tmp_path / "a.wav", infer_frames=4, num_clip=1, steps=1, seed=1)
    assert np.isfinite(pipe(PROMPT, size="64x64", guidance_scale=1, **given).latents).all()


@pytest.mark.parametrize("seconds, frames", [(0.27, 4), (0.6, 5)])
def test_the_sound_of_the_file_is_right_to_a_frame(models, files, tmp_path, seconds, frames):
    """Of a whole run: as long as the frames, whichever of the two ends the file; and they are the sound's first."""
    write_wav(tmp_path / "a.wav", tone(seconds, 44100), 44100)
    command = ["--model", models("s2v")[1], "--size", "64x64", "--prompt", PROMPT, "--image", files / "first.png",
               "--audio", tmp_path / "a.wav", "--infer_frames", 8, "--num_clip", 1, "--steps", 1, "--guidance", 1,
               "--seed", 1, "--dtype", "float32", "--output", tmp_path / "a.mp4", "--quiet"]  # fmt: skip
    assert main([*map(str, command)]) == 0
    with av.open(str(tmp_path / "a.mp4")) as file:
        seen = sum(1 for _ in file.decode(video=0))
    with av.open(str(tmp_path / "a.mp4")) as file:
        rate, heard = file.streams.audio[0].rate, np.concatenate([f.to_ndarray()[0] for f in file.decode(audio=0)])
    assert (seen, rate) == (frames, 44100) and abs(len(heard) / rate - frames / 16) < 1 / 16
    middle = slice(2000, round(frames / 16 * rate) - 2000)
    assert np.abs(heard[middle] - tone(seconds, 44100)[middle]).max() < 0.05


def test_other_models_do_not_hear(files):
    pipe = WanPipeline.from_pretrained("nano", progress=False)
    with pytest.raises(ValueError, match="audio was given to a t2v model.*use --model s2v-14B"):
        pipe.request("a", audio=files / "talk.wav")


@pytest.mark.parametrize("size", [(400, 300), (64, 64), (1920, 1080), (1080, 1920), (900, 901), (3000, 500), (100, 70)])
@pytest.mark.parametrize("area", [1024 * 704, 832 * 480])
def test_the_size_of_a_picture(size, area):
    height, width = official_size(size[1], size[0], area)
    assert output_size(size, area, PRESETS["s2v-14B"].geometry) == (width, height)


def test_every_published_form_is_the_same_model(models, files, tmp_path):
    """ComfyUI's files, a GGUF and an MLX folder give the latents of the official folder."""
    modules, folder = models("s2v")
    state = modules["transformer"].state_dict()
    (tmp_path / "comfy").mkdir(), (tmp_path / "gguf").mkdir()
    published.comfyui_file(tmp_path / "comfy/x.safetensors", state, "model.diffusion_model.")
    published.gguf_file(tmp_path / "gguf/x.gguf", state, "F32")
    config = {"num_heads": checkpoints.DIT["num_heads"], "audio_inject_layers": [0, 1]}
    for place in ("comfy", "gguf"):
        (tmp_path / place / "config.json").write_text(json.dumps(config))
    speech = folder / "wav2vec2-large-xlsr-53-english"
    others = dict(text_encoder=folder, tokenizer=folder, vae=folder, audio_encoder=speech)
    opened = {
        "official": WanPipeline.from_pretrained(folder, **OPEN),
        "comfy": WanPipeline.from_pretrained(tmp_path / "comfy/x.safetensors", **OPEN, **others),
        "gguf": WanPipeline.from_pretrained(tmp_path / "gguf/x.gguf", **OPEN, **others),
        "mlx": WanPipeline.from_pretrained(convert(folder, tmp_path / "mlx", dtype="float32", model="s2v-14B"), **OPEN),
    }
    made = {}
    for name, pipe in opened.items():
        assert pipe.preset.name == "s2v-14B"
        given = dict(image=files / "first.png", audio=files / "talk.wav", infer_frames=4, num_clip=1, steps=1, seed=1)
        made[name] = pipe(PROMPT, size="64x64", guidance_scale=1, **given).latents
        assert np.array_equal(made[name], made["official"]), name


def test_four_steps(models, files):
    """By the recipe of lightx2v, whose LoRAs are of models as wide."""
    pipe = WanPipeline.from_pretrained(models("s2v")[1], **OPEN)
    request = pipe.request("a", recipe="lightx2v-4step", image=files / "first.png", audio=files / "talk.wav")
    assert (request.steps, request.shift, request.guidance_scale, request.passes) == (4, 5.0, 1.0, 1)
    with pytest.raises(ValueError, match="teacache has no published constants for s2v-14B"):
        pipe.request("a", cache="teacache", image=files / "first.png", audio=files / "talk.wav")
