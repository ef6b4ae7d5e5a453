"""Wan2.2's VAE against the official class and Diffusers': float32, tiny random models, every quirk of the shortcuts."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import test_layouts
import torch
from diffusers import AutoencoderKLWan
from mlx.utils import tree_flatten
from oracles import official, randomize, relative_error
from safetensors.torch import save_file
from test_full_size_keys import HeaderOnly
from test_vae import BOUND, convert, random, scale, to_mlx

from wan_mlx.models import vae22
from wan_mlx.models.configs import VAE22Config
from wan_mlx.models.vae22 import VAE22
from wan_mlx.weights.component import ComponentWeights, check_keys, parameter_shapes
from wan_mlx.weights.configs import network_config
from wan_mlx.weights.load import load_vae

HEIGHT, WIDTH = 64, 96
# The released VAE's proportions: the decoder wider than the encoder, widths repeated and divided as there.
CONFIGS = {
    "wan": dict(dim=8, decoder_dim=12),
    "early time": dict(dim=4, decoder_dim=8, temporal_downsample=(True, True, False), num_res_blocks=1),
    "other widths": dict(dim=8, decoder_dim=4, dim_mult=(1, 1, 2, 2), temporal_downsample=(True, False, True)),
}


def tiny_config(name: str = "wan") -> VAE22Config:
    rng = np.random.default_rng(1)
    mean, std = rng.normal(size=6), rng.uniform(0.5, 3.0, 6)
    return VAE22Config(**CONFIGS[name], z_dim=6, mean=tuple(mean.tolist()), std=tuple(std.tolist()))


def reference(config: VAE22Config) -> torch.nn.Module:
    return official("modules.vae2_2").WanVAE_(
        dim=config.dim, dec_dim=config.decoder_dim, z_dim=config.z_dim, dim_mult=[*config.dim_mult],
        num_res_blocks=config.num_res_blocks, temperal_downsample=[*config.temporal_downsample],
    )  # fmt: skip


def diffusers_vae(config: VAE22Config) -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=config.dim, decoder_base_dim=config.decoder_dim, z_dim=config.z_dim, dim_mult=[*config.dim_mult],
        num_res_blocks=config.num_res_blocks, temperal_downsample=[*config.temporal_downsample], is_residual=True,
        in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16, latents_mean=[*config.mean],
        latents_std=[*config.std],
    )  # fmt: skip


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    """The official VAE, and ours with its weights."""
    config = tiny_config(request.param)
    theirs, ours = reference(config).eval().requires_grad_(False), VAE22(config)
    randomize(theirs)
    theirs.decoder.head[2].weight *= 0.1  # what is clipped would hide errors
    weights = {k: to_mlx(convert(k, v)) for k, v in theirs.state_dict().items()}
    assert set(weights) == {k for k, _ in tree_flatten(ours.parameters())}
    ours.load_weights(list(weights.items()), strict=True)
    return theirs, ours


def decoded(vae, latents: torch.Tensor) -> mx.array:
    return mx.concatenate(list(vae.decode(to_mlx(latents.movedim(1, -1)))), axis=1)


@pytest.mark.parametrize("num_frames", [1, 5, 9, 17])
def test_encode_and_decode(pair, num_frames):
    theirs, ours = pair
    video = random(1, 3, num_frames, HEIGHT, WIDTH).clamp(-1, 1)
    want = theirs.encode(video, scale(ours.config))
    assert relative_error(ours.encode(to_mlx(video.movedim(1, -1))), want.movedim(1, -1)) <= BOUND
    frames = theirs.decode(want, scale(ours.config)).movedim(1, -1)
    assert frames.shape == (1, num_frames, HEIGHT, WIDTH, 3) and 0.1 < frames.abs().max() < 1
    assert relative_error(decoded(ours, want), frames) <= BOUND


@pytest.mark.parametrize("num_frames", [1, 9])
def test_diffusers(num_frames, tmp_path):
    """A VAE of Diffusers' folder, read by its own names; its results, not those of its tiles (Wan2.2#125)."""
    config = tiny_config()
    theirs = diffusers_vae(config).eval().requires_grad_(False)
    randomize(theirs)
    theirs.decoder.conv_out.weight *= 0.1
    save_file(theirs.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(dict(theirs.config)))
    ours = load_vae(tmp_path)
    assert ours.config == config
    video = random(1, 3, num_frames, HEIGHT, WIDTH).clamp(-1, 1)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.mean, config.std))
    want = theirs.encode(video).latent_dist.mode()
    latents = (want - mean) / std
    assert relative_error(ours.encode(to_mlx(video.movedim(1, -1))), latents.movedim(1, -1)) <= BOUND
    frames = theirs.decode(want).sample.movedim(1, -1)
    assert relative_error(decoded(ours, latents), frames) <= BOUND


@pytest.mark.parametrize("layout", ["official", "diffusers", "comfyui"])
def test_the_released_vae_s_keys_and_shapes(layout):
    """196 tensors: neither a key too many nor one too few, and every shape."""
    shapes = test_layouts.diffusers_vae22() if layout == "diffusers" else test_layouts.official_vae22()
    prefix = "first_stage_model." * (layout == "comfyui")
    weights = ComponentWeights(HeaderOnly({prefix + name: shape for name, shape in shapes.items()}))
    assert weights.component == "vae" and weights.layout.name == layout.replace("comfyui", "official")
    assert network_config(weights, {}) == VAE22Config() and len(weights.shapes) == len(shapes) == 196
    check_keys(weights, parameter_shapes(VAE22(VAE22Config())))


def test_the_released_vae_s_normalisation():
    """The numbers are the official file's own."""
    text = Path(official("modules.vae2_2").__file__).read_text(encoding="utf-8")
    for name in ("mean", "std"):
        body = text.split(f"{name} = torch.tensor(")[1].split("]")[0].strip().removeprefix("[")
        assert tuple(float(number) for number in body.split(",") if number.strip()) == getattr(VAE22Config(), name)


def test_of_a_patch_s_channels_the_width_is_slower():
    """Swapped, pictures are a chequer of two pixels."""
    frames = random(2, 4, 6, 3)
    theirs = official("modules.vae2_2").patchify(frames.permute(3, 0, 1, 2)[None], 2)[0].permute(1, 2, 3, 0)
    patches = vae22.patchify(to_mlx(frames), 2)
    assert np.array_equal(patches, theirs) and np.array_equal(vae22.unpatchify(patches, 2), frames)
