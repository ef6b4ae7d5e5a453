"""Runs of the command line that start from pictures and videos, against the official pipelines' arithmetic in PyTorch.

Everything from files, as a user has them: a tiny official folder of each kind, PNG pictures, lossless videos.
"""

from types import SimpleNamespace

import numpy as np
import official_checkpoints as checkpoints
import pytest
from oracles import (
    official,
    official_features,
    official_frames,
    official_latents,
    official_text,
    relative_error,
    torch,
    unmasked_attention,
)
from PIL import Image
from test_sources import write_video
from test_tasks import noise_image, noise_video, official_context, official_image, official_y
from test_vae import scale

from wan_mlx.cli.main import main
from wan_mlx.models.configs import VAEConfig
from wan_mlx.presets import NEGATIVE_PROMPT

PROMPT = "a cat boxing on a stage"
AREA, NUM_FRAMES = (48, 32), 9
SAMPLING = dict(steps=4, shift=4.0, guidance=5.0, seed=42)
NEGATIVE = {
    "t2v": NEGATIVE_PROMPT,
    "i2v": "镜头晃动，" + NEGATIVE_PROMPT,
    "flf2v": "镜头切换，镜头晃动，" + NEGATIVE_PROMPT,
    "vace": NEGATIVE_PROMPT,
}
TASKS = {"t2v": "t2i-14B", "i2v": "i2v-14B", "flf2v": "flf2v-14B", "vace": "vace-1.3B"}
SCALE = scale(VAEConfig())

FIRST, LAST = noise_image(75, 50), noise_image(75, 50, seed=1)  # upright, unlike the area
REFERENCES = [noise_image(41, 29, seed=2), noise_image(23, 77, seed=3)]


@pytest.fixture(autouse=True, scope="module")
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The sources, by name. The video is twice as large as the area and longer than what is asked for."""
    folder = tmp_path_factory.mktemp("sources")
    for name, image in (("first", FIRST), ("last", LAST), ("a", REFERENCES[0]), ("b", REFERENCES[1])):
        Image.fromarray(image).save(folder / f"{name}.png")
    write_video(folder / "video.mkv", source_video())
    write_video(folder / "mask.mkv", source_mask())
    return folder


def source_video() -> np.ndarray:
    """uint8 (14, 64, 96, 3): squares of 8 pixels, of other colours in every frame."""
    return noise_video(14, 8, 12, seed=4).repeat(8, axis=1).repeat(8, axis=2)


def source_mask() -> np.ndarray:
    """White (14, 64, 96, 3) on black, further to the right in every frame; its edges stay edges at half the size."""
    mask = np.zeros((14, 64, 96, 3), np.uint8)
    for number, frame in enumerate(mask):
        frame[12:48, 4 * number : 4 * number + 40] = 255
    return mask


def fitted_to_image() -> tuple[int, int]:
    """(width, height) after the first image, as the official image to video has it."""
    aspect, area = FIRST.shape[0] / FIRST.shape[1], AREA[0] * AREA[1]
    rows, columns = (round(np.sqrt(area * ratio) // 8 // 2 * 2) for ratio in (aspect, 1 / aspect))
    return columns * 8, rows * 8


def fitted_to_video() -> tuple[int, int, int]:
    """(width, height, num_frames) after the source video, as the official ``VaceVideoProcessor`` has it."""
    length, height, width = source_video().shape[:3]
    tokens = (NUM_FRAMES + 3) // 4 * AREA[0] * AREA[1] / 256
    patches = min(tokens, AREA[0] * AREA[1] / 256, (height // 16) * (width // 16))
    latent_frames = min((length - 1) // 4 + 1, int(tokens / patches))
    patches = min(patches, int(tokens / latent_frames))
    rows = round(np.sqrt(patches * height / width))
    return int(patches / rows) * 16, rows * 16, (latent_frames - 1) * 4 + 1


def official_run(kind: str, modules, shape: tuple[int, int, int], extra_latents: int, velocity) -> tuple:
    """Latents, without those of reference images, and frames. ``shape`` is (width, height, num_frames)."""
    tokenizer = checkpoints.sentencepiece_model()
    texts = [official_text(modules["text_encoder"], tokenizer, text) for text in (PROMPT, NEGATIVE[kind])]
    width, height, num_frames = shape
    shape = (16, (num_frames + 3) // 4 + extra_latents, height // 8, width // 8)
    latents = official_latents(velocity, texts, shape, **SAMPLING)[:, extra_latents:]
    return latents, official_frames(modules["vae"], SCALE, latents)


def padded(text: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(text, (0, 0, 0, 512 - len(text)))[None]


def encoders(modules) -> SimpleNamespace:
    return SimpleNamespace(official=lambda video: modules["vae"].encode(video[None], SCALE)[0])


def official_image_to_video(kind: str, modules, images: list[np.ndarray]) -> tuple:
    width, height = fitted_to_image()
    condition = official_y(encoders(modules), images, (width, height), NUM_FRAMES)
    floats = [official_image(image).movedim(0, -1).numpy() for image in images]
    features = official_features(modules["image_encoder"], floats)

    def velocity(latents, t, text):
        given = torch.cat([latents, condition])[None]
        return modules["transformer"](given, t, padded(text), features, return_dict=False)[0][0]

    return official_run(kind, modules, (width, height, NUM_FRAMES), 0, velocity)


def official_vace(modules, names: str, context_scale: float) -> tuple:
    """``names``: v for the source video, m for its mask, each r for a reference image."""
    references = REFERENCES[: names.count("r")]
    shape = fitted_to_video() if "v" in names else (*AREA, NUM_FRAMES)
    sources = dict(video=source_video() if "v" in names else None, mask=source_mask() if "m" in names else None)
    context = official_context(encoders(modules), shape[:2], shape[2], **sources, references=references)[None]
    scales = torch.full((len(checkpoints.KINDS["vace"]["vace_layers"]),), context_scale)

    def velocity(latents, t, text):
        model = modules["transformer"]
        return model(latents[None], t, padded(text), None, context, scales, return_dict=False)[0][0]

    return official_run("vace", modules, shape, len(references), velocity)


def generate(folder, output, *sources) -> int:
    """Our own flags."""
    return main(
        ["--model", str(folder), "--prompt", PROMPT, "--size", "48x32", "--frames", str(NUM_FRAMES), "--steps",
         str(SAMPLING["steps"]), "--shift", str(SAMPLING["shift"]), "--seed", str(SAMPLING["seed"]), "--dtype",
         "float32", "--quiet", "--output", str(output), *map(str, sources)]
    )  # fmt: skip


def generate_officially(task: str, folder, output, *sources, frame_num: int = NUM_FRAMES) -> int:
    """The official flags."""
    return main(
        ["--task", task, "--size", "48*32", "--ckpt_dir", str(folder), "--frame_num", str(frame_num),
         "--sample_steps", str(SAMPLING["steps"]), "--sample_shift", str(SAMPLING["shift"]), "--sample_guide_scale",
         "5.0", "--sample_solver", "unipc", "--base_seed", str(SAMPLING["seed"]), "--offload_model", "True",
         "--prompt", PROMPT, "--save_file", str(output), "--dtype", "float32", "--quiet", *map(str, sources)]
    )  # fmt: skip


def check(path, want_latents: torch.Tensor, want: np.ndarray) -> None:
    assert want.std() > 5  # a picture, not a flat field
    with np.load(path) as got:
        errors = relative_error(got["latents"], want_latents), np.abs(got["frames"].astype(int) - want).max()
        print(f"{got['frames'].shape}: latents {errors[0]:.1e}, pixels {errors[1]}, std {want.std():.0f}")
        assert got["frames"].shape == want.shape and errors[1] <= 2
        assert errors[0] < 1e-4


def check_same(ours, theirs) -> None:
    with np.load(ours) as a, np.load(theirs) as b:
        assert np.array_equal(a["frames"], b["frames"]) and np.array_equal(a["latents"], b["latents"])


def test_image_to_video(models, files, tmp_path):
    modules, folder = models("i2v")
    assert generate(folder, tmp_path / "ours.npz", "--image", files / "first.png") == 0
    check(tmp_path / "ours.npz", *official_image_to_video("i2v", modules, [FIRST]))
    assert generate_officially("i2v-14B", folder, tmp_path / "theirs.npz", "--image", files / "first.png") == 0
    check_same(tmp_path / "ours.npz", tmp_path / "theirs.npz")


def test_first_and_last_frame_to_video(models, files, tmp_path):
    modules, folder = models("flf2v")
    first, last = files / "first.png", files / "last.png"
    assert generate(folder, tmp_path / "ours.npz", "--image", first, "--last-image", last) == 0
    check(tmp_path / "ours.npz", *official_image_to_video("flf2v", modules, [FIRST, LAST]))
    sources = ("--first_frame", first, "--last_frame", last)
    assert generate_officially("flf2v-14B", folder, tmp_path / "theirs.npz", *sources) == 0
    check_same(tmp_path / "ours.npz", tmp_path / "theirs.npz")


@pytest.mark.parametrize("names, context_scale", [("vmr", 1.0), ("rr", 1.0), ("vm", 0.6), ("v", 1.0)])
def test_vace(models, files, tmp_path, names, context_scale):
    modules, folder = models("vace")
    sources = ["--src_video", files / "video.mkv"] if "v" in names else []
    sources += ["--src_mask", files / "mask.mkv"] if "m" in names else []
    if "r" in names:
        sources += ["--src_ref_images", ",".join(str(files / f"{name}.png") for name in "ab"[: names.count("r")])]
    assert generate(folder, tmp_path / "ours.npz", *sources, "--context-scale", context_scale) == 0
    check(tmp_path / "ours.npz", *official_vace(modules, names, context_scale))
    if context_scale == 1:  # the official command line has no flag for it
        assert generate_officially("vace-1.3B", folder, tmp_path / "theirs.npz", *sources) == 0
        check_same(tmp_path / "ours.npz", tmp_path / "theirs.npz")


def test_text_to_image(models, tmp_path, monkeypatch):
    modules, folder = models("t2v")
    monkeypatch.setattr(official("modules.model"), "flash_attention", unmasked_attention)
    _, want = official_run(
        "t2v", modules, (*AREA, 1), 0, lambda latents, t, text: modules["transformer"]([latents], t, [text], 6)[0]
    )
    assert generate_officially("t2i-14B", folder, tmp_path / "cat.png", frame_num=1) == 0
    with Image.open(tmp_path / "cat.png") as image:
        assert image.format == "PNG" and image.mode == "RGB" and image.n_frames == 1
        got = np.asarray(image)
    assert want.std() > 5 and np.abs(got.astype(int) - want[0]).max() <= 2
    assert (got == want[0]).mean() > 0.95  # rounded to the nearest, as the official code does with stills


SOURCES = {
    "t2v": "",
    "i2v": "--image first.png",
    "flf2v": "--first_frame first.png --last_frame last.png",
    "vace": "--src_ref_images a.png,b.png --src_video video.mkv --src_mask mask.mkv",
}


@pytest.mark.parametrize(
    "task, kind, size, video, sampling",
    [
        ("i2v-14B", "i2v", "832*480", "512x768, 81 frames", "40 steps, shift 3, guidance 5"),
        ("i2v-14B", "i2v", "1280*720", "768x1168, 81 frames", "40 steps, shift 5, guidance 5"),
        ("flf2v-14B", "flf2v", "1280*720", "768x1168, 81 frames", "50 steps, shift 16, guidance 5"),
        ("vace-1.3B", "vace", "832*480", "96x64, 13 frames", "50 steps, shift 16, guidance 5"),
        ("t2i-14B", "t2v", "1024*1024", "1024x1024, 1 frames", "50 steps, shift 5, guidance 5"),
    ],
)
def test_official_defaults(models, files, monkeypatch, capsys, task, kind, size, video, sampling):
    """The shortest official commands, with relative paths; the size is that of the source."""
    monkeypatch.chdir(files)
    command = f"--task {task} --size {size} --ckpt_dir {models(kind)[1]} {SOURCES[kind]} --base_seed 7 --dry-run"
    assert main([*command.split(), "--prompt", PROMPT]) == 0
    said = capsys.readouterr().err
    assert f"video     {video} at 16 fps" in said and f"unipc, {sampling}, seed 7" in said
    assert (".png" if task == "t2i-14B" else ".mp4") in said
