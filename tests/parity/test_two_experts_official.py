"""Wan2.2's T2V-A14B and I2V-A14B at tiny sizes: whole runs from official folders through the official commands, against
the official loop with the official solvers; and from Diffusers' folder against Diffusers' own pipeline."""

import json
import shlex
from functools import partial

import numpy as np
import official_checkpoints as checkpoints
import pytest
from oracles import (
    official,
    official_frames,
    official_latents,
    official_text,
    randomize,
    relative_error,
    torch,
    unmasked_attention,
)
from PIL import Image
from published import comfyui_file, gguf_file, scaled_fp8
from safetensors.torch import save_file
from test_tasks import noise_image, official_y
from test_vae import scale
from test_whole_run_images import encoders

from wan_mlx.cli.main import main
from wan_mlx.models.configs import VAEConfig
from wan_mlx.presets import NEGATIVE_PROMPT, PRESETS
from wan_mlx.weights.checkpoint import open_checkpoint

PROMPT = "a cat boxing on a stage"
KINDS = {"t2v": 16, "i2v": 36}  # channels that a transformer reads
STEPS, SHIFT, SEED, SIZE, NUM_FRAMES = 6, 5.0, 42, (48, 32), 5
SCALE = scale(VAEConfig())
PICTURE = noise_image(75, 50)
# Heads 128 wide and rows of 32, as where no config.json tells, and as quantisers want.
SIZES = dict(dim=128, ffn_dim=96, num_heads=1, num_layers=2, freq_dim=32, text_dim=checkpoints.TEXT["dim"])


@pytest.fixture(autouse=True, scope="module")
def no_gradients():
    with torch.no_grad():
        yield


def experts(kind: str, sizes: dict = SIZES) -> dict[str, torch.nn.Module]:
    """High and low: the official class at a tiny size, with other weights each."""
    made = {}
    for seed, name in enumerate(("high", "low")):
        model = official("modules.model").WanModel(model_type=kind, **sizes, in_dim=KINDS[kind], out_dim=16)
        randomize(model.eval().requires_grad_(False), 20 + seed)
        made[name] = model
    return made


def write_expert(folder, model, kind: str) -> None:
    """As published: config.json, shards and their index."""
    folder.mkdir()
    state, owners = model.state_dict(), {}
    for number, keys in enumerate(np.array_split(list(state), 2), 1):
        file = f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        save_file({key: state[key] for key in keys}, folder / file)
        owners |= dict.fromkeys(keys.tolist(), file)
    index = {"metadata": {"total_size": 0}, "weight_map": owners}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    sizes = {name: value for name, value in SIZES.items() if name != "text_dim"}
    config = {"_class_name": "WanModel", "model_type": kind, **sizes, "in_dim": KINDS[kind], "out_dim": 16,
              "eps": 1e-6, "text_len": 512}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def write_folder(folder, modules, pair, kind: str):
    """A repository of Wan-AI's with two experts."""
    checkpoints.write_official_folder(folder, modules)
    for file in ("diffusion_pytorch_model.safetensors", "config.json"):
        (folder / file).unlink()
    for name, model in pair.items():
        write_expert(folder / f"{name}_noise_model", model, kind)
    return folder


@pytest.fixture(scope="module")
def modules():
    return checkpoints.networks()


@pytest.fixture(scope="module", params=KINDS)
def model(request, modules, tmp_path_factory):
    """Kind, experts, official folder."""
    pair = experts(request.param)
    root = tmp_path_factory.mktemp(request.param)
    Image.fromarray(PICTURE).save(root / "i2v_input.png")
    folder = write_folder(root / f"Wan2.2-{request.param.upper()}-A14B", modules, pair, request.param)
    return request.param, pair, folder


def official_run(modules, kind: str, pair, monkeypatch, solver: str, low: float, high: float) -> tuple:
    """Latents and frames of the official ``WanT2V`` or ``WanI2V``: the expert and its guidance by the timestep."""
    monkeypatch.setattr(official("modules.model"), "flash_attention", unmasked_attention)
    width, height, condition = *SIZE, None
    boundary = PRESETS[f"{kind}-A14B"].boundary * 1000
    if kind == "i2v":
        aspect, area = PICTURE.shape[0] / PICTURE.shape[1], width * height
        height, width = (int(np.sqrt(area * ratio) // 8 // 2 * 2) * 8 for ratio in (aspect, 1 / aspect))
        condition = official_y(encoders(modules), [PICTURE], (width, height), NUM_FRAMES)
    shape = (16, (NUM_FRAMES + 3) // 4, height // 8, width // 8)
    texts = [official_text(modules["text_encoder"], checkpoints.sentencepiece_model(), text)
             for text in (PROMPT, NEGATIVE_PROMPT)]  # fmt: skip
    served = []

    def velocity(latents, t, text):
        name = "high" if t.item() >= boundary else "low"
        served.append(name)
        y = None if condition is None else [condition]
        return pair[name]([latents], t, [text], shape[1] * shape[2] * shape[3] // 4, y=y)[0]

    latents = official_latents(
        velocity, texts, shape, steps=STEPS, shift=SHIFT, seed=SEED, solver=solver,
        guidance=lambda t: high if t.item() >= boundary else low,
    )  # fmt: skip
    assert set(served) == {"high", "low"}  # the boundary lies inside the schedule
    return latents, official_frames(modules["vae"], SCALE, latents)


def command(kind: str, folder, output, *extra: str) -> list[str]:
    """The official README's, but for the size, and float32."""
    picture = f"--image {folder.parent / 'i2v_input.png'}" if kind == "i2v" else ""
    words = shlex.split(
        f"--task {kind}-A14B --size {SIZE[0]}*{SIZE[1]} --ckpt_dir {folder} --offload_model True --convert_model_dtype "
        f"{picture} --frame_num {NUM_FRAMES} --sample_steps {STEPS} --sample_shift {SHIFT} --base_seed {SEED} "
        f"--prompt '{PROMPT}' --save_file {output} --dtype float32"
    )
    return [*words, *extra]


def without(words: list[str], *flags: str) -> list[str]:
    """The command without these flags and their values."""
    left = list(words)
    for flag in flags:
        del left[(at := left.index(flag)) : at + 2]
    return left


def assert_same(path, latents, frames) -> None:
    with np.load(path) as got:
        assert relative_error(got["latents"], latents) < 1e-4
        assert np.abs(got["frames"].astype(int) - frames.astype(int)).max() <= 2


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_official_command(modules, model, solver, tmp_path, monkeypatch, capsys):
    """Every pixel within two levels, by the model's own guidance scales."""
    kind, pair, folder = model
    low, high = (3.0, 4.0) if kind == "t2v" else (3.5, 3.5)
    latents, frames = official_run(modules, kind, pair, monkeypatch, solver, low, high)
    assert frames.std() > 10  # a picture, not a flat field
    assert main(command(kind, folder, tmp_path / "a.npz", "--sample_solver", solver)) == 0
    assert_same(tmp_path / "a.npz", latents, frames)
    said = capsys.readouterr().err
    assert "--convert_model_dtype has no effect here: --dtype says" in said
    assert f"guidance {'3,4' if kind == 't2v' else '3.5'}, seed 42" in said


def test_one_guidance_scale_for_both(modules, model, tmp_path, monkeypatch):
    """``--sample_guide_scale`` of the official command line takes one number, and sets both."""
    kind, pair, folder = model
    latents, frames = official_run(modules, kind, pair, monkeypatch, "unipc", 6.0, 6.0)
    assert main([*command(kind, folder, tmp_path / "a.npz"), "--sample_guide_scale", "6", "--quiet"]) == 0
    assert_same(tmp_path / "a.npz", latents, frames)


def test_the_wrong_way_round_would_show(modules, model, monkeypatch):
    """Swapped experts, or guidance scales, are further off than a bound of these tests."""
    kind, pair, _ = model
    right = official_run(modules, kind, pair, monkeypatch, "unipc", 3.0, 4.0)[0]
    for wrong in (
        official_run(modules, kind, dict(zip(pair, reversed(pair.values()), strict=True)), monkeypatch, "unipc", 3, 4),
        official_run(modules, kind, pair, monkeypatch, "unipc", 4.0, 3.0),
    ):
        assert relative_error(wrong[0], right) > 0.005


def test_forms_of_a_pair(modules, model, tmp_path, monkeypatch):
    """ComfyUI's fp16 and scaled fp8 files, GGUF, and an MLX folder made of a pair: each against the official loop with
    the values that are stored."""
    kind, pair, folder = model
    parts = [word for part in ("text-encoder", "vae", "tokenizer") for word in (f"--{part}", str(folder))]
    flags = without(command(kind, folder, "x"), "--ckpt_dir", "--save_file")
    states = {name: expert.state_dict() for name, expert in pair.items()}
    forms = {
        "fp16": lambda path, state: (comfyui_file(path, {k: v.half() for k, v in state.items()},
                                                  "model.diffusion_model."), state)[1],
        "fp8": lambda path, state: (lambda stored, true: (comfyui_file(path, stored), true)[1])(
            *scaled_fp8(state, "marker")),
        "gguf": lambda path, state: gguf_file(path, state, "Q8_0"),
    }  # fmt: skip
    for form, write in forms.items():
        files, true = {}, {}
        for name, state in states.items():
            files[name] = tmp_path / f"{form}_{name}_noise.{'gguf' if form == 'gguf' else 'safetensors'}"
            true[name] = write(files[name], state)
            if form == "fp16":
                true[name] = {key: value.half().float() for key, value in state.items()}
        stored = experts(kind)
        for name, values in true.items():
            stored[name].load_state_dict(values)
        low, high = (3.0, 4.0) if kind == "t2v" else (3.5, 3.5)
        want = official_run(modules, kind, stored, monkeypatch, "unipc", low, high)
        given = ["--model", str(files["high"]), "--low-noise", str(files["low"]), *parts]
        output = tmp_path / f"{form}.npz"
        assert main([*given, *flags, "--quiet", "--output", str(output)]) == 0
        assert_same(output, *want)
    mlx = tmp_path / "mlx"
    converting = ["convert", str(files["high"]), str(mlx), "--low-noise", str(files["low"]), *parts, "--dtype",
                  "float32", "--quiet", "--model", f"{kind}-A14B"]  # fmt: skip
    assert main(converting) == 0
    assert {"high_noise.safetensors", "low_noise.safetensors"} <= {file.name for file in mlx.iterdir()}
    flags = without(flags, "--task")  # the folder records it
    assert main(["--model", str(mlx), *flags, "--quiet", "--output", str(tmp_path / "mlx.npz")]) == 0
    assert_same(tmp_path / "mlx.npz", *want)


def test_diffusers_pipeline(tmp_path, modules):
    """A folder that Diffusers wrote, against its pipeline on the official solver: its ``guidance_scale`` is the
    high-noise expert's, its ``transformer`` too."""
    from diffusers import WanPipeline
    from test_diffusers_pipelines import SIZES as DIFFUSERS_SIZES
    from test_diffusers_pipelines import make_pipeline

    one = make_pipeline("t2v", tmp_path)
    second = type(one.transformer)(**DIFFUSERS_SIZES, in_channels=16)
    randomize(second.eval().requires_grad_(False), 77)
    parts = {name: part for name, part in one.components.items() if part is not None}
    pipe = WanPipeline(**parts | {"transformer_2": second}, boundary_ratio=0.875)
    folder = tmp_path / "Wan2.2-T2V-A14B-Diffusers"
    pipe.save_pretrained(folder)
    pipe.scheduler = solver = official("utils.fm_solvers_unipc").FlowUniPCMultistepScheduler(shift=1)
    solver.set_timesteps = partial(solver.set_timesteps, shift=SHIFT)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn((16, 2, 4, 6), generator=torch.Generator().manual_seed(SEED))[None]
    made = pipe(PROMPT, "", height=32, width=48, num_frames=5, num_inference_steps=STEPS, guidance_scale=4.0,
                guidance_scale_2=3.0, latents=noise, output_type="latent").frames  # fmt: skip
    checkpoint = open_checkpoint(folder)
    assert [part.name for part in checkpoint.of_kind("transformer")] == ["high_noise", "low_noise"]
    assert checkpoint.boundary == 0.875 and checkpoint.part("transformer").file.parent.name == "transformer"
    flags = command("t2v", folder, tmp_path / "a.npz")
    assert main([*flags, "--quiet", "--negative-prompt", "", "--sample_guide_scale", "3,4"]) == 0
    with np.load(tmp_path / "a.npz") as got:
        assert relative_error(got["latents"], made[0]) < 1e-4


def test_two_equal_experts_are_one_model(modules, tmp_path):
    """Opened in Python, where equal files are not refused: the same bytes as one transformer's."""
    from dataclasses import replace

    from wan_mlx.pipeline import WanPipeline

    folder = checkpoints.write_official_folder(tmp_path / "one", modules)
    one = open_checkpoint(folder)
    (part,) = one.of_kind("transformer")
    rest = [other for other in one.parts if other is not part]
    two = replace(one, parts=(replace(part, name="high_noise"), replace(part, name="low_noise"), *rest))
    options = dict(width=48, height=32, num_frames=5, steps=4, seed=1, shift=5, guidance_scale=3)
    got = [
        WanPipeline(checkpoint, dtype="float32", progress=False, preset=preset)(PROMPT, **options).frames
        for checkpoint, preset in ((one, "t2v-14B"), (two, "t2v-A14B"))
    ]
    assert got[0].tobytes() == got[1].tobytes()
