"""Alibaba PAI's Fun models of Wan2.2 at tiny sizes, from folders as they are published, against the official modules
put together as VideoX-Fun does it, and VACE-Fun against Diffusers' pipeline of two transformers.

The oracle of Fun-Control is stated here in PyTorch: a reference image is one more frame of tokens before the video's.
"""

import json
import shlex
from functools import partial

import mlx.core as mx
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
from safetensors.torch import save_file
from test_sources import write_video
from test_tasks import noise_image, noise_video, official_image
from test_two_experts_official import SIZES, assert_same
from test_vae import scale

from wan_mlx.cli.main import main
from wan_mlx.models.configs import VAE22Config, VAEConfig
from wan_mlx.presets import NEGATIVE_PROMPT, PRESETS
from wan_mlx.weights.load import load_transformer

PROMPT = "a cat boxing on a stage"
STEPS, SEED, NUM_FRAMES = 3, 42, 5
# Kind → channels of the latents, that the transformer reads, and that a reference image has.
KINDS = {"A14B-InP": (16, 36, None), "A14B-Control": (16, 52, 16), "5B-InP": (48, 100, None), "5B-Control": (48, 148, 48)}
FIRST, LAST, REFERENCE = noise_image(50, 75), noise_image(50, 75, seed=1), noise_image(64, 80, seed=2)


@pytest.fixture(autouse=True, scope="module")
def no_gradients():
    with torch.no_grad():
        yield


class Fun(torch.nn.Module):
    """The official WanModel with other channels, and perhaps tokens of a reference image before the video's."""

    def __init__(self, kind: str, seed: int):
        super().__init__()
        out, channels, reference = KINDS[kind]
        self.model = official("modules.model").WanModel(model_type="t2v", **SIZES, in_dim=channels, out_dim=out)
        self.ref_conv = reference and torch.nn.Conv2d(reference, SIZES["dim"], 2, 2)
        randomize(self.eval().requires_grad_(False), seed)

    def published(self) -> dict[str, torch.Tensor]:
        """The tensors under the names of the published files."""
        return {name.removeprefix("model."): tensor for name, tensor in self.state_dict().items()}

    def forward(self, latents, t, text, y, reference=None):
        """Velocity (C, t, h, w) of latents; ``t`` (1,), or a timestep for each token of the video."""
        m = self.model
        x = m.patch_embedding(torch.cat([latents, y])[None])
        grid, x = x.shape[2:], x.flatten(2).transpose(1, 2)
        before = 0
        t = t.expand(x.shape[1])
        if self.ref_conv is not None:
            image = self.ref_conv(reference.transpose(0, 1)).flatten(2).transpose(1, 2)
            before = image.shape[1]
            x, t = torch.cat([image, x], dim=1), torch.cat([t[-1:].expand(before), t])
        positions = torch.tensor([[grid[0] + (before > 0), *grid[1:]]])
        embedded = official("modules.model").sinusoidal_embedding_1d(m.freq_dim, t)[None].float()
        time = m.time_embedding(embedded)
        context = m.text_embedding(torch.nn.functional.pad(text, (0, 0, 0, 512 - len(text)))[None])
        given = dict(e=m.time_projection(time).unflatten(2, (6, m.dim)), seq_lens=torch.tensor([x.shape[1]]),
                     grid_sizes=positions, freqs=m.freqs, context=context, context_lens=None)  # fmt: skip
        for block in m.blocks:
            x = block(x, **given)
        return m.unpatchify(m.head(x, time)[:, before:], torch.tensor([list(grid)]))[0]


def write_folder(folder, kind: str, modules, pair):
    """A repository of alibaba-pai's: config.json names the kind that the model was made of."""
    checkpoints.write_official_folder(folder, modules, "ti2v" if kind.startswith("5B") else "t2v")
    places = {"high": "high_noise_model", "low": "low_noise_model"} if len(pair) > 1 else {"one": "."}
    for file in ("diffusion_pytorch_model.safetensors", "config.json"):
        (folder / file).unlink()
    for name, place in places.items():
        (folder / place).mkdir(exist_ok=True)
        save_file(pair[name].published(), folder / place / "diffusion_pytorch_model.safetensors")
        config = {"_class_name": "WanModel", "model_type": "ti2v" if len(pair) == 1 else "i2v", **SIZES,
                  "in_dim": KINDS[kind][1], "out_dim": KINDS[kind][0], "add_ref_conv": "Control" in kind}  # fmt: skip
        (folder / place / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=KINDS)
def model(request, tmp_path_factory):
    """Kind, networks, transformers, folder."""
    kind = request.param
    modules = checkpoints.networks(kind="ti2v" if kind.startswith("5B") else "t2v")
    names = ("one",) if kind.startswith("5B") else ("high", "low")
    pair = {name: Fun(kind, 20 + seed) for seed, name in enumerate(names)}
    return kind, modules, pair, write_folder(tmp_path_factory.mktemp("fun") / f"Wan2.2-Fun-{kind}", kind, modules, pair)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    for name, image in (("first", FIRST), ("last", LAST), ("reference", REFERENCE)):
        Image.fromarray(image).save(folder / f"{name}.png")
    return folder


def files(folder, name: str):
    return folder / f"{name}.{'mkv' if name == 'control' else 'png'}"


def stretched(image, size) -> torch.Tensor:
    """As VideoX-Fun's get_image_to_video_latent: Pillow's own resizing; (3, H, W) in [-1, 1]."""
    return official_image(np.array(Image.fromarray(image).resize(size)))


def official_frames_condition(encode, size, first, last, shape) -> torch.Tensor:
    """Mask and latents of a video with the given frames, grey between; all zero where none is given."""
    if first is None and last is None:
        return torch.zeros(4 + shape[0], *shape[1:])
    width, height = size
    video, mask = torch.zeros(3, NUM_FRAMES, height, width), torch.zeros(NUM_FRAMES)
    for at, image in ((0, first), (-1, last)):
        if image is not None:
            video[:, at], mask[at] = stretched(image, size), 1
    mask = torch.cat([mask[:1].repeat(3), mask]).view(-1, 4).T[:, :, None, None].expand(-1, -1, *shape[2:])
    return torch.cat([mask, encode(video)])


def official_run(model, monkeypatch, size, first=None, last=None, control=None, reference=None) -> tuple:
    """Latents and frames of VideoX-Fun's pipelines, with the official solver."""
    monkeypatch.setattr(official("modules.model"), "flash_attention", unmasked_attention)
    kind, modules, pair, _ = model
    preset, (channels, *_) = PRESETS[f"fun-{kind}"], KINDS[kind]
    side = 16 if kind.startswith("5B") else 8
    normal = scale(VAE22Config() if side == 16 else VAEConfig())
    shape = (channels, (NUM_FRAMES + 3) // 4, size[1] // side, size[0] // side)

    def encode(video: torch.Tensor) -> torch.Tensor:
        return modules["vae"].encode(video[None], normal)[0]

    y, given = official_frames_condition(encode, size, first, last, shape), {}
    frames = y[4:]
    if control is not None:
        y = torch.cat([encode(torch.tensor(control).movedim(-1, 0).float() / 127.5 - 1), y])
        given["reference"] = torch.zeros(channels, 1, *shape[2:])
        if reference is not None:
            given["reference"] = encode(stretched(reference, size)[:, None])
    texts = [official_text(modules["text_encoder"], checkpoints.sentencepiece_model(), text)
             for text in (PROMPT, NEGATIVE_PROMPT)]  # fmt: skip
    kept = torch.zeros(1, *shape[1:])
    if side == 16 and first is not None:
        kept[:, 0] = 1
    served = set()

    def velocity(latents, t, text):
        name = "one" if len(pair) == 1 else "high" if t.item() >= 1000 * preset.boundary else "low"
        served.add(name)
        times = ((1 - kept[0, :, ::2, ::2]) * t).flatten() if kept.any() else t
        return pair[name](kept * frames + (1 - kept) * latents, times, text, y, **given)

    latents = official_latents(velocity, texts, shape, steps=STEPS, shift=5.0, guidance=6.0, seed=SEED)
    latents = kept * frames + (1 - kept) * latents
    assert served == set(pair)
    return latents, official_frames(modules["vae"], normal, latents)


def command(model, size, output, *extra: str) -> list[str]:
    kind, _, _, folder = model
    words = f"--task fun-{kind} --ckpt_dir {folder} --size {size[0]}*{size[1]} --frame_num {NUM_FRAMES} --sample_steps " \
        f"{STEPS} --base_seed {SEED} --prompt '{PROMPT}' --save_file {output} --dtype float32 --quiet"  # fmt: skip
    return [*shlex.split(words), *extra]


@pytest.mark.parametrize("names", ["first last", "", "first reference control", "last control"])
def test_whole_run(model, sources, names, tmp_path, monkeypatch):
    kind = model[0]
    if ("Control" in kind) != ("control" in names):
        pytest.skip("of the other kind")
    size = (48, 32) if "A14B" in kind else (96, 64)
    control = noise_video(NUM_FRAMES, size[1], size[0], seed=4)
    write_video(sources / "control.mkv", control, rate=PRESETS[f"fun-{kind}"].fps)
    pictures = {"first": FIRST, "last": LAST, "reference": REFERENCE, "control": control}
    flags = {"first": "--image", "last": "--last-image", "reference": "--src_ref_images", "control": "--src_video"}
    given = {name: pictures[name] for name in names.split()}
    words = [word for name in given for word in (flags[name], str(files(sources, name)))]
    assert main(command(model, size, tmp_path / "a.npz", *words)) == 0
    assert_same(tmp_path / "a.npz", *official_run(model, monkeypatch, size, **given))
