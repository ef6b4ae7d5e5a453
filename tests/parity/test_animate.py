"""Animate: whole runs of the official commands, of folders as they are prepared, against the official loop.

Its network is Diffusers', at a tiny size; `test_animate_network` compares that with the official one, too.
"""

import json
import shlex
import shutil
import sys
import warnings
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import machines
import mlx.core as mx
import numpy as np
import official_checkpoints as checkpoints
import pytest
from mlx.utils import tree_flatten
from oracles import official_animation, official_text, torch
from PIL import Image
from safetensors.torch import save_file
from test_animate_network import randomized
from test_sources import write_video
from test_tasks import noise_image, noise_video
from test_two_experts_official import assert_same
from test_vae import scale

from wan_mlx.cli.main import main
from wan_mlx.models.configs import VAEConfig
from wan_mlx.presets import NEGATIVE_PROMPT, PRESETS
from wan_mlx.runs.folder import RunFolder
from wan_mlx.tasks.animate import bounced, letterbox
from wan_mlx.weights import load
from wan_mlx.weights.layouts import canonical_keys, recognise

SIZE, STEPS, SEED = (48, 32), 2, 42
NETWORK = dict(num_attention_heads=2, attention_head_dim=32, text_dim=32, freq_dim=32, ffn_dim=128, num_layers=6,
               image_dim=80, added_kv_proj_dim=64, motion_encoder_size=512, motion_style_dim=8, motion_dim=5,
               motion_encoder_channel_sizes={str(2**n): 2 - n // 9 for n in range(2, 10)}, motion_encoder_dim=16,
               face_encoder_hidden_dim=16, inject_face_latents_blocks=3)  # fmt: skip
NORMAL = scale(VAEConfig())
OPEN = dict(dtype="float32", progress=False, prompt_cache=False)


@pytest.fixture(autouse=True, scope="module")
def no_gradients():
    with torch.no_grad():
        yield


def published(model) -> dict[str, torch.Tensor]:
    """A transformer's tensors under the official names."""
    state = model.state_dict()
    names = canonical_keys(recognise(state), state)
    return {ours: state[theirs] if isinstance(theirs, str) else torch.cat([state[one] for one in theirs])
            for ours, theirs in names.items()}  # fmt: skip


@pytest.fixture(scope="module")
def model(models):
    """The networks, and their folder."""
    return models("animate")


def write_model(folder: Path) -> dict:
    """Write a folder as it is published, with the relighting LoRA; returns the networks."""
    from diffusers import WanAnimateTransformer3DModel

    modules = checkpoints.networks(5, "i2v", checkpoints.WIDE_TEXT)
    modules["transformer"] = dit = randomized(WanAnimateTransformer3DModel(**NETWORK), 7)
    checkpoints.write_official_folder(folder, {**modules, "transformer": checkpoints.networks()["transformer"]})
    save_file(published(dit), folder / "diffusion_pytorch_model.safetensors")
    sizes = dict(dim=64, ffn_dim=128, num_heads=2, num_layers=6, freq_dim=32, in_dim=36, out_dim=16, text_dim=32)
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanAnimateModel", **sizes}))
    generator, lora = torch.Generator().manual_seed(0), {}
    for name, weight in published(dit).items():
        if name.startswith("blocks.") and name.endswith(".weight") and weight.ndim == 2:
            for end, shape in (("A", (4, weight.shape[1])), ("B", (weight.shape[0], 4))):
                key = f"base_model.model.{name.removesuffix('.weight')}.lora_{end}.weight"
                lora[key] = torch.randn(shape, generator=generator) * 0.2
    torch.save({"state_dict": lora, "step": 1}, folder / "relighting_lora.ckpt")
    return modules


def relit(dit, lora: dict[str, torch.Tensor]):
    """The transformer with the LoRA merged, by its own arithmetic."""
    state = published(dit)
    for key, down in lora.items():
        if "lora_A" in key:
            name = key.removeprefix("base_model.model.").replace("lora_A.", "")
            state[name] = state[name] + lora[key.replace("lora_A", "lora_B")] @ down
    copy = type(dit)(**{k: v for k, v in dit.config.items() if not k.startswith("_")}).eval()
    own = copy.state_dict()
    names = canonical_keys(recognise(own), own)
    for ours, theirs in names.items():
        parts = [theirs] if isinstance(theirs, str) else theirs
        for one, part in zip(parts, state[ours].chunk(len(parts)), strict=True):
            own[one].copy_(part)
    return copy


@cache
def prepared(folder: Path, frames: int) -> dict[str, np.ndarray]:
    """Write a prepared folder; returns its videos by their files' names."""
    width, height = SIZE
    rows = np.linspace(0, 255, 512)[:, None, None]
    faces = np.stack([(rows * (0.4 + 0.1 * n) + np.arange(512)[None, :, None] / 3) % 256 for n in range(frames)])
    mask = np.zeros((frames, height, width, 3), np.uint8)
    mask[:, 8:, 16:40] = 255
    poses, scenes = (noise_video(frames, height, width, seed) for seed in (1, 2))
    videos = {"src_pose.mp4": poses, "src_bg.mp4": scenes, "src_face.mp4": faces.astype(np.uint8).repeat(3, axis=-1),
              "src_mask.mp4": mask}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for name, video in videos.items():
        write_video(folder / "lossless.mkv", video, rate=30)
        (folder / "lossless.mkv").rename(folder / name)
    Image.fromarray(noise_image(40, 40, seed=3)).save(folder / "src_ref.png")
    return videos


def official_run(model, folder: Path, frames: int, clip: int, relighting=False, **options) -> tuple:
    """Latents of the last clip, and frames, of the official class."""
    animate, (modules, place) = official_animation(), model
    dit, made, spm = modules["transformer"], [], checkpoints.sentencepiece_model()
    if relighting:
        dit = relit(dit, torch.load(place / "relighting_lora.ckpt")["state_dict"])

    class Reader:
        def __init__(self, path):
            self.video = prepared(folder, frames)[Path(path).name]

        def __len__(self):
            return len(self.video)

        def get_batch(self, numbers):
            return SimpleNamespace(asnumpy=lambda: self.video[numbers])

    def network(x, t, context, seq_len, clip_fea, y, pose_latents, face_pixel_values):
        text = torch.nn.functional.pad(context[0], (0, 0, 0, 512 - len(context[0])))[None]
        given = torch.cat([x[0], y[0]])[None]
        return list(dit(given, t, text, clip_fea, pose_latents, face_pixel_values.float(), return_dict=False)[0])

    def decode(latents):
        made.append(latents[0])
        return [modules["vae"].decode(one[None], NORMAL)[0].clamp(-1, 1) for one in latents]

    animate.VideoReader = Reader
    official = object.__new__(animate.WanAnimate)
    vars(official).update(
        device=torch.device("cpu"), rank=0, sp_size=1, t5_cpu=True, num_train_timesteps=1000,
        clip=modules["image_encoder"], sample_prompt=PRESETS["animate-14B"].prompt, sample_neg_prompt=NEGATIVE_PROMPT,
        noise_model=network, text_encoder=lambda texts, _: [official_text(modules["text_encoder"], spm, texts[0])],
        vae=SimpleNamespace(encode=lambda videos: [modules["vae"].encode(v[None].float(), NORMAL)[0] for v in videos],
                            decode=decode),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.cuda.amp.autocast
        video = official.generate(str(folder), clip_len=clip, sample_solver="unipc", sampling_steps=STEPS, seed=SEED,
                                  **options)  # fmt: skip
    return made[-1], ((video + 1) / 2 * 255).type(torch.uint8).movedim(0, -1).numpy()


def command(place: Path, folder: Path, clip: int, output: Path, *extra: str) -> list[str]:
    words = f"--task animate-14B --ckpt_dir {place} --src_root_path {folder} --frame_num {clip} " \
        f"--sample_steps {STEPS} --base_seed {SEED} --save_file {output} --dtype float32 --quiet"
    return [*shlex.split(words), *extra]


@pytest.mark.parametrize(
    "frames, clip, words",
    [
        (8, 5, "--refert_num 1"),
        pytest.param(11, 9, "--refert_num 5", marks=pytest.mark.slow),
        (11, 9, "--refert_num 5 --replace_flag --use_relighting_lora"),
        (8, 5, "--refert_num 1 --replace_flag --sample_guide_scale 3"),
    ],
)
def test_official_commands(model, tmp_path_factory, tmp_path, monkeypatch, frames, clip, words):
    """Two clips, of which the second goes beyond the end and back."""
    folder = tmp_path_factory.getbasetemp() / f"prepared{frames}"
    prepared(folder, frames)
    given = words.split()
    options = dict(replace_flag="--replace_flag" in words, refert_num=int(given[1]),
                   guide_scale=3.0 if "--sample_guide_scale" in words else 1)  # fmt: skip
    latents, video = official_run(model, folder, frames, clip, "--use_relighting_lora" in words, **options)
    assert video.shape == (frames, SIZE[1], SIZE[0], 3) and video.std() > 10
    assert main(command(model[1], folder, clip, tmp_path / "a.npz", *given)) == 0
    assert_same(tmp_path / "a.npz", latents, video)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A prepared folder of eight frames."""
    prepared(place := tmp_path_factory.getbasetemp() / "prepared8", 8)
    return place


@pytest.fixture(scope="module")
def whole(model, folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "whole.npz"
    assert main(command(model[1], folder, 5, path)) == 0
    return path


@pytest.mark.parametrize("cut", ["step", "clip"])
def test_a_resumed_run_has_the_same_bits(model, folder, whole, tmp_path, monkeypatch, cut):
    """Cut after the first step of the second clip, and after the first clip, whose last frames are decoded again."""
    output = tmp_path / "a.npz"
    given = command(model[1], folder, 5, output)
    save_step, save_conditioning = RunFolder.save_step, RunFolder.save_conditioning

    def failing_step(self, step, notes):
        save_step(self, step, notes)
        if cut == "step" and step.index == STEPS:
            raise RuntimeError("the machine failed")

    def failing_clip(self, conditioning, how):
        if cut == "clip" and conditioning.clip:
            raise RuntimeError("the machine failed")
        save_conditioning(self, conditioning, how)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_step", failing_step)
        patch.setattr(RunFolder, "save_conditioning", failing_clip)
        assert main(given) == 1
    with RunFolder(output) as kept:
        assert kept.state().conditioning.clip == (cut == "step") and kept.steps_done == STEPS + (cut == "step")
    assert main(["--resume", str(output), "--quiet"]) == 0
    assert output.read_bytes() == whole.read_bytes()


def test_two_machines_make_the_same_bytes(model, folder, tmp_path):
    """Both clips, each with tokens divided within frames."""
    assert main(command(model[1], folder, 5, tmp_path / "whole.npz")) == 0
    words = [*command(model[1], folder, 5, tmp_path / "two.npz"), "--parallel", "tokens"]
    processes = machines.start(tmp_path, 2, [sys.executable, "-m", "wan_mlx.generate", *words])
    for code, _, error in machines.ended(processes):
        assert code == 0, error
    assert (tmp_path / "two.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_in_float32_nothing_is_narrower(model, folder, monkeypatch, tmp_path):
    """Nothing is cast to bfloat16 or float16, nor loaded so: neither weights, nor pixels, nor CLIP's features."""
    cast, networks, kept = [], [], []
    astype, save = mx.array.astype, RunFolder.save_conditioning
    monkeypatch.setattr(mx.array, "astype", lambda self, dtype, **more: cast.append(dtype) or
                        astype(self, dtype, **more))  # fmt: skip
    monkeypatch.setattr(RunFolder, "save_conditioning", lambda self, conditioning, how: kept.append(conditioning) or
                        save(self, conditioning, how))  # fmt: skip
    real = load.load_module
    monkeypatch.setattr(load, "load_module", lambda *given: networks.append(real(*given)) or networks[-1])
    assert main(command(model[1], folder, 5, tmp_path / "a.npz", "--replace_flag", "--use_relighting_lora")) == 0
    found = {array.dtype for network in networks for _, array in tree_flatten(network.parameters())}
    found |= {array.dtype for conditioning in kept for array in conditioning.arrays().values()}
    assert len(networks) > 4 and len(kept) == 2 and found == {mx.float32}
    assert cast and not {mx.bfloat16, mx.float16}.intersection(cast)


SHORT = np.zeros((7, SIZE[1], SIZE[0], 3), np.uint8)
LOW = np.zeros((8, SIZE[1] // 2, SIZE[0], 3), np.uint8)
# What is wrong → a file of the folder, what is there in its place, more words of the command, and what is said.
WRONG_FOLDERS = {
    "a file is missing": ("src_face.mp4", None, "", "lacks src_face.mp4, which the official preprocessing writes"),
    "the picture is missing": ("src_ref.png", None, "", "lacks src_ref.png"),
    "no background": ("src_bg.mp4", None, "--replace_flag",
                      "lacks src_bg.mp4, which the official preprocessing writes (src_"),
    "different length": ("src_mask.mp4", SHORT, "--replace_flag", "src_mask.mp4 has 7 frames, expected 8 as "),
    "shorter poses": ("src_pose.mp4", SHORT[:, :, 1:], "", "src_face.mp4 has 8 frames, expected 7 as "),
    "different size": ("src_bg.mp4", LOW, "--replace_flag", "src_bg.mp4 is of 48x16 pixels, expected 48x32 as "),
    "another face": ("src_face.mp4", SHORT.repeat(2, axis=0)[:8], "",
                     "src_face.mp4 is of 48x32 pixels, expected 512x512"),
    "refert_num": (None, None, "--refert_num 3", "refert_num is 3, expected 1 or 5"),
    "short clips": (None, None, "--refert_num 5",
                    "frames is 5, expected more than refert_num, which is 5; nearest: 9"),
    "nothing to fit": (None, None, "--fit crop", "fit is crop, but there is no picture or video to fit"),
    "a picture": (None, None, "--image a.png", "image was given to a animate model"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_FOLDERS)
def test_a_wrong_folder_is_refused_in_one_line(model, folder, tmp_path, capsys, wrong):
    """Before any work."""
    name, video, words, line = WRONG_FOLDERS[wrong]
    if name is not None:
        folder = Path(shutil.copytree(folder, tmp_path / "broken"))
        (folder / name).unlink()
    if video is not None:
        write_video(folder / "a.mkv", video, rate=30)
        (folder / "a.mkv").rename(folder / name)
    assert main(command(model[1], folder, 5, tmp_path / "a.npz", *words.split(), "--dry-run")) == 2
    error = capsys.readouterr().err
    assert line in error and error.startswith("error: ") and error.count("\n") == 1


def test_no_folder(model, tmp_path, capsys):
    assert main(command(model[1], tmp_path / "none", 5, tmp_path / "a.npz", "--dry-run")) == 2
    assert "none is no folder; expected one with src_pose.mp4, src_face.mp4, src_ref.png" in capsys.readouterr().err


def test_frames_go_back_and_forth():
    assert bounced(4, 2, 7) == [2, 3, 2, 1, 0, 1, 2] and bounced(2, 0, 5) == [0, 1, 0, 1, 0]


def test_the_picture_is_as_opencv_resizes_it():
    """Black at its sides, and elsewhere within a level of OpenCV 4.13, whose weights have eleven bits."""
    image = (np.arange(7 * 9 * 3) * 37 % 256).astype(np.uint8).reshape(7, 9, 3)
    got = letterbox(image, 32, 48).astype(int)
    assert not got[:, :3].any() and not got[:, 44:].any() and got[:, 3].any() and got[:, 43].any()
    assert np.abs(got[5, ::6, 0] - [0, 144, 158, 74, 138, 85, 166, 102]).max() <= 1
    assert np.abs(got[::5, 20, 1] - [152, 134, 107, 79, 52, 193, 170]).max() <= 1
