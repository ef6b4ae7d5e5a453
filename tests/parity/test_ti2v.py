"""Wan2.2 TI2V-5B: whole runs of the command line against the official loop; the size of a picture."""

import json

import numpy as np
import official_checkpoints as checkpoints
import published
import pytest
from oracles import (
    official,
    official_frames,
    official_text,
    randomize,
    relative_error,
    torch,
    unmasked_attention,
)
from PIL import Image
from test_tasks import noise_image
from test_vae import scale
from test_whole_run_images import PROMPT, check, check_same

from wan_mlx import WanPipeline
from wan_mlx.cli.main import main
from wan_mlx.models.configs import VAE22Config
from wan_mlx.presets import NEGATIVE_PROMPT, PRESETS
from wan_mlx.tasks.ti2v import output_size
from wan_mlx.weights.convert import convert

AREA, NUM_FRAMES = (96, 64), 9
SAMPLING = dict(steps=4, shift=5.0, guidance=5.0, seed=42)
FIRST = noise_image(50, 75)
GEOMETRY = PRESETS["ti2v-5B"].geometry
SCALE = scale(VAE22Config())
OPEN = dict(dtype="float32", progress=False, prompt_cache=False)


@pytest.fixture(autouse=True, scope="module")
def no_gradients():
    with torch.no_grad():
        yield


def official_size(width: int, height: int, area: int) -> tuple[int, int]:
    """As the official ``best_output_size`` has it for multiples of 32: of two candidates, which begin with either side,
    the one nearer to the picture's proportions; in doubt the second."""
    wide = int((area * (width / height)) ** 0.5 // 32 * 32)
    high = int(area / (area * (width / height)) ** 0.5 // 32 * 32)
    first, second = (wide, int(area / wide // 32 * 32)), (int(area / high // 32 * 32), high)
    off = [max(width / height * h / w, w / h / (width / height)) for w, h in (first, second)]
    return first if off[0] < off[1] else second


def official_picture(image: np.ndarray, width: int, height: int) -> torch.Tensor:
    """(3, 1, H, W): Lanczos to cover the size, the middle of it, in [-1, 1]."""
    factor = max(width / image.shape[1], height / image.shape[0])
    size = round(image.shape[1] * factor), round(image.shape[0] * factor)
    picture = Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    pixels = np.asarray(picture.crop((left, top, left + width, top + height)))
    return (torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255 - 0.5)[:, None] / 0.5


def official_latents(modules, image: np.ndarray | None, solver: str) -> torch.Tensor:
    """The official loop: a timestep for each token, the given frame put back after each step."""
    texts = [official_text(modules["text_encoder"], checkpoints.sentencepiece_model(), text)
             for text in (PROMPT, NEGATIVE_PROMPT)]  # fmt: skip
    (width, height), channels = AREA, 48
    if image is not None:
        width, height = official_size(*image.shape[1::-1], AREA[0] * AREA[1])
    shape = (channels, (NUM_FRAMES + 3) // 4, height // 16, width // 16)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(SAMPLING["seed"]))
    mask, given = torch.ones(shape), torch.zeros(())
    if image is not None:
        mask[:, 0] = 0
        given = modules["vae"].encode(official_picture(image, width, height)[None], SCALE)[0]
    if solver == "unipc":
        scheduler = official("utils.fm_solvers_unipc").FlowUniPCMultistepScheduler(shift=1)
        scheduler.set_timesteps(SAMPLING["steps"], device="cpu", shift=SAMPLING["shift"])
    else:
        solvers = official("utils.fm_solvers")
        scheduler = solvers.FlowDPMSolverMultistepScheduler(shift=1)
        sigmas = solvers.get_sampling_sigmas(SAMPLING["steps"], SAMPLING["shift"])
        scheduler.set_timesteps(sigmas=sigmas, device="cpu")
    latents = (1 - mask) * given + mask * latents
    for t in scheduler.timesteps:
        timesteps = (mask[0][:, ::2, ::2] * t).flatten()[None]
        cond, uncond = (modules["transformer"]([latents], timesteps, [text], timesteps.shape[1])[0] for text in texts)
        guided = uncond + SAMPLING["guidance"] * (cond - uncond)
        latents = scheduler.step(guided[None], t, latents[None], return_dict=False)[0][0]
        latents = (1 - mask) * given + mask * latents
    return latents


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_official_commands(models, tmp_path, monkeypatch, given, solver):
    """Our own flags and the official ones, within 2 of 255 levels of the official loop."""
    monkeypatch.setattr(official("modules.model"), "flash_attention", unmasked_attention)
    modules, folder = models("ti2v")
    Image.fromarray(FIRST).save(tmp_path / "first.png")
    source = ["--image", str(tmp_path / "first.png")] * given
    common = ["--prompt", PROMPT, "--dtype", "float32", "--quiet", *source]
    ours = ["--model", folder, "--size", "96x64", "--frames", NUM_FRAMES, "--steps", 4, "--seed", 42, "--solver",
            solver, "--output", tmp_path / "ours.npz"]  # fmt: skip
    assert main([*map(str, ours), *common]) == 0
    latents = official_latents(modules, FIRST if given else None, solver)
    check(tmp_path / "ours.npz", latents, official_frames(modules["vae"], SCALE, latents))
    theirs = ["--task", "ti2v-5B", "--size", "96*64", "--ckpt_dir", folder, "--frame_num", NUM_FRAMES,
              "--offload_model", "True", "--convert_model_dtype", "--t5_cpu", "--sample_steps", 4, "--base_seed", 42,
              "--sample_solver", solver, "--save_file", tmp_path / "theirs.npz"]  # fmt: skip
    assert main([*map(str, theirs), *common]) == 0
    check_same(tmp_path / "ours.npz", tmp_path / "theirs.npz")


@pytest.mark.parametrize("area", [1280 * 704, 832 * 480])
def test_the_size_of_a_picture(area):
    for size in [(1280, 704), (704, 1280), (1920, 1080), (1000, 1000), (3000, 1001), (333, 517), (75, 50), (4000, 999)]:
        assert output_size(size, area, GEOMETRY) == official_size(*size, area), size
    with pytest.raises(ValueError, match="an image of 9000x3 is too narrow for a video of .* pixels; crop it"):
        output_size((9000, 3), area, GEOMETRY)


def test_sizes_are_multiples_of_32():
    with pytest.raises(ValueError, match="height is 720, expected a positive multiple of 32; nearest: 704"):
        GEOMETRY.check_size(1280, 720)
    assert GEOMETRY.latent_shape(1280, 704, 121) == (31, 44, 80) and GEOMETRY.seq_len((31, 44, 80)) == 27280


def test_every_published_form_is_the_same_model(models, tmp_path):
    """ComfyUI's files, a GGUF and an MLX folder give the bytes of the official folder."""
    modules, folder = models("ti2v")
    state = modules["transformer"].state_dict()
    config = {"num_heads": checkpoints.DIT["num_heads"]}  # heads of 24; released ones are of 128
    (tmp_path / "comfy").mkdir()
    published.comfyui_file(tmp_path / "comfy/dit/x.safetensors", state, "model.diffusion_model.")
    published.comfyui_file(tmp_path / "comfy/vae/x.safetensors", modules["vae"].state_dict())
    (tmp_path / "gguf").mkdir()
    published.gguf_file(tmp_path / "gguf/x.gguf", state, "F32")
    for place in ("comfy/dit", "gguf"):
        (tmp_path / place / "config.json").write_text(json.dumps(config))
    others = dict(text_encoder=folder, tokenizer=folder)
    comfy_vae = tmp_path / "comfy/vae/x.safetensors"
    opened = {
        "official": WanPipeline.from_pretrained(folder, **OPEN),
        "comfy": WanPipeline.from_pretrained(tmp_path / "comfy/dit/x.safetensors", **OPEN, vae=comfy_vae, **others),
        "gguf": WanPipeline.from_pretrained(tmp_path / "gguf/x.gguf", **OPEN, vae=folder, **others),
        "mlx": WanPipeline.from_pretrained(convert(folder, tmp_path / "mlx", dtype="float32", model="ti2v-5B"), **OPEN),
    }
    made = {}
    for name, pipe in opened.items():
        assert pipe.preset.name == "ti2v-5B" and pipe.geometry == GEOMETRY
        made[name] = pipe(PROMPT, width=64, height=32, num_frames=5, steps=2, seed=1, image=FIRST).latents
        assert np.array_equal(made[name], made["official"]), name


def test_packed_files(models, tmp_path):
    """ComfyUI's scaled fp8, and a quantised GGUF, which stays packed: each is the model of the values that it stores.
    """
    folder = models("ti2v")[1]
    sizes = dict(dim=128, ffn_dim=96, num_heads=1, num_layers=1, freq_dim=32, text_dim=checkpoints.TEXT["dim"])
    model = official("modules.model").WanModel(model_type="ti2v", **sizes, in_dim=48, out_dim=48)
    randomize(model.eval().requires_grad_(False), 5)
    state = model.state_dict()
    stored, of_fp8 = published.scaled_fp8(state, "marker")
    published.comfyui_file(fp8 := tmp_path / "fp8.safetensors", stored)
    of_gguf = published.gguf_file(gguf := tmp_path / "q8.gguf", state, "Q8_0")
    made = {}
    for file, values in ((fp8, of_fp8), (gguf, of_gguf)):
        published.comfyui_file(plain := tmp_path / f"{file.stem}_plain.safetensors", values)
        packed: dict[str, str] = {}
        for one in (file, plain):
            pipe = WanPipeline.from_pretrained(one, **OPEN, text_encoder=folder, tokenizer=folder, vae=folder)
            packed = packed or pipe.quantized
            assert pipe.preset.name == "ti2v-5B"
            given = dict(width=64, height=32, num_frames=5, steps=2, seed=1, image=FIRST)
            made[one] = pipe(PROMPT, **given).latents
        assert relative_error(made[file], made[plain]) < 1e-5, file
        assert packed == ({"transformer": "q8-g32"} if file == gguf else {}) and not pipe.quantized
    assert relative_error(made[fp8], made[gguf]) > 1e-3


@pytest.mark.parametrize("option, words", [
    ("vae", "a VAE of 16 latent channels"), ("image_encoder", "image_encoder was given to a ti2v model"),
])  # fmt: skip
def test_parts_of_other_models_are_refused(models, capsys, option, words):
    """A VAE of Wan2.1, and a CLIP: one line each."""
    other = models({"vae": "t2v", "image_encoder": "i2v"}[option])[1]
    flag = "--" + option.replace("_", "-")
    assert main(["--model", str(models("ti2v")[1]), flag, str(other), "--prompt", "a", "--quiet"]) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1


def test_an_image_and_a_video_are_too_much(models, tmp_path):
    pipe = WanPipeline.from_pretrained(models("ti2v")[1], **OPEN)
    with pytest.raises(ValueError, match="an image and a video were given"):
        pipe.request("a", image=FIRST, video=FIRST[None], num_frames=1)


def test_a_video_to_start_from(models):
    """Without an image it is a text-to-video model, that starts from a video too."""
    pipe = WanPipeline.from_pretrained(models("ti2v")[1], **OPEN)
    video = np.repeat(FIRST[None], 5, axis=0)
    frames = pipe(PROMPT, width=64, height=32, num_frames=5, steps=2, seed=1, video=video, strength=0.5).frames
    assert frames.shape == (5, 32, 64, 3) and frames.std() > 5


def test_the_shortest_official_commands(models, tmp_path, monkeypatch, capsys):
    """Those of the official README, with its defaults: 121 frames at 24 per second, 50 steps, shift 5, guidance 5."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(FIRST).save("i2v_input.JPG")
    start = f"--task ti2v-5B --size 1280*704 --ckpt_dir {models('ti2v')[1]} --offload_model True --convert_model_dtype"
    for more, size in (("", "1280x704"), (" --image i2v_input.JPG", "1152x768")):
        assert main([*f"{start} --t5_cpu{more} --dry-run".split(), "--prompt", PROMPT]) == 0
        said = capsys.readouterr().err
        assert f"video     {size}, 121 frames at 24 fps" in said
        assert "sampling  unipc, 50 steps, shift 5, guidance 5" in said
        assert "--convert_model_dtype has no effect here: " in said
        assert "stretched" not in said
