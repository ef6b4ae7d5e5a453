"""The causal VAE against the official PyTorch class: float32, tiny random models, every quirk of its cache."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from oracles import official, randomize, relative_error

from wan_mlx.models import vae_execution
from wan_mlx.models.configs import VAEConfig
from wan_mlx.models.vae import VAE, AttentionBlock, RMSNorm
from wan_mlx.models.vae_layers import CausalCache

BOUND = 5e-5
HEIGHT, WIDTH = 32, 48
CONFIGS = {
    "wan": dict(dim=8, z_dim=4),
    "nano": dict(dim=8, z_dim=4, dim_mult=(1, 2, 2, 2)),
    "early time": dict(dim=8, z_dim=4, temporal_downsample=(True, True, False), num_res_blocks=1),
    "split time": dict(dim=8, z_dim=3, temporal_downsample=(True, False, True), dim_mult=(2, 1, 2, 1)),
}


def tiny_config(name: str = "wan") -> VAEConfig:
    sizes = CONFIGS[name]
    rng = np.random.default_rng(1)
    mean, std = rng.normal(size=sizes["z_dim"]), rng.uniform(0.5, 3.0, sizes["z_dim"])
    return VAEConfig(**sizes, mean=tuple(mean.tolist()), std=tuple(std.tolist()))


def reference(config: VAEConfig) -> torch.nn.Module:
    return official("modules.vae2_1").WanVAE_(
        dim=config.dim,
        z_dim=config.z_dim,
        dim_mult=list(config.dim_mult),
        num_res_blocks=config.num_res_blocks,
        temperal_downsample=list(config.temporal_downsample),
    )


def convert(key: str, value: torch.Tensor) -> torch.Tensor:
    """Official layout → ours. Written out here so that the package's loader is not its own judge."""
    if key.endswith("gamma"):
        return value.flatten()
    return value.movedim(1, -1) if value.ndim >= 4 else value


def to_mlx(array: torch.Tensor) -> mx.array:
    return mx.array(array.detach().float().contiguous().numpy())


def pair(config: VAEConfig, seed: int = 0) -> tuple[torch.nn.Module, VAE]:
    torch_vae, vae = reference(config).eval().requires_grad_(False), VAE(config)
    randomize(torch_vae, seed)
    weights = {k: to_mlx(convert(k, v)) for k, v in torch_vae.state_dict().items()}
    assert set(weights) == {k for k, _ in tree_flatten(vae.parameters())}
    vae.load_weights(list(weights.items()), strict=True)
    return torch_vae, vae


def scale(config: VAEConfig) -> list[torch.Tensor]:
    return [torch.tensor(config.mean), 1.0 / torch.tensor(config.std)]


def random(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def encode_pair(config, num_frames, dtype=torch.float32):
    torch_vae, vae = pair(config)
    video = random(1, 3, num_frames, HEIGHT, WIDTH).clamp(-1, 1)
    want = torch_vae.to(dtype).encode(video.to(dtype), scale(config)).float().movedim(1, -1)
    return vae, to_mlx(video.movedim(1, -1)), want


def decode_pair(config, latent_frames):
    torch_vae, vae = pair(config)
    latents = random(1, config.z_dim, latent_frames, HEIGHT // 8, WIDTH // 8)
    # Outputs beyond the clip would hide errors.
    torch_vae.decoder.head[2].weight *= 0.1
    vae.decoder.head[2].weight *= 0.1
    want = torch_vae.decode(latents, scale(config)).movedim(1, -1)
    assert want.abs().max() < 1
    return vae, to_mlx(latents.movedim(1, -1)), want


@pytest.mark.parametrize("num_frames", [1, 5, 9, 17])
def test_encode(num_frames):
    vae, video, want = encode_pair(tiny_config(), num_frames)
    assert relative_error(vae.encode(video), want) <= BOUND


@pytest.mark.parametrize("latent_frames", [1, 2, 3, 4, 5])
def test_decode(latent_frames):
    vae, latents, want = decode_pair(tiny_config(), latent_frames)
    chunks = list(vae.decode(latents))
    assert [c.shape[1] for c in chunks] == [1] + [4] * (latent_frames - 1)
    assert relative_error(mx.concatenate(chunks, axis=1), want) <= BOUND


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "wan"])
def test_other_sizes(name):
    config = tiny_config(name)
    vae, video, want = encode_pair(config, 9)
    assert relative_error(vae.encode(video), want) <= BOUND
    vae, latents, want = decode_pair(config, 3)
    assert relative_error(mx.concatenate(list(vae.decode(latents)), axis=1), want) <= BOUND


def test_clipped_to_unit_range():
    config = tiny_config()
    torch_vae, vae = pair(config)
    latents = random(1, config.z_dim, 2, 4, 6)
    want = torch_vae.decode(latents, scale(config)).movedim(1, -1)
    assert want.abs().max() > 1
    got = mx.concatenate(list(vae.decode(to_mlx(latents.movedim(1, -1)))), axis=1)
    assert relative_error(got, want.clamp(-1, 1)) <= BOUND


@pytest.mark.parametrize("scores", [None, 1, 7 * 24, 1 << 24])
def test_attention_whole_and_in_query_chunks(monkeypatch, scores):
    theirs = official("modules.vae2_1").AttentionBlock(16).requires_grad_(False)
    randomize(theirs)
    ours = AttentionBlock(16)
    ours.load_weights([(k, to_mlx(convert(k, v))) for k, v in theirs.state_dict().items()], strict=True)
    x = random(1, 16, 1, 4, 6)
    frame = to_mlx(x[:, :, 0].movedim(1, -1))
    if scores is None:
        got = ours(frame, CausalCache())
    else:
        monkeypatch.setattr(vae_execution, "SCORES_AT_ONCE", scores)
        got = vae_execution.attend_within_frames(ours, frame)
    assert relative_error(got, theirs(x)[:, :, 0].movedim(1, -1)) <= BOUND


@pytest.mark.parametrize("magnitude", [0.0, 1e-15, 1e-9, 1e-3, 1.0, 1e6])
def test_norm_of_any_magnitude(magnitude):
    theirs = official("modules.vae2_1").RMS_norm(24, images=False).requires_grad_(False)
    randomize(theirs)
    ours = RMSNorm(24)
    ours.gamma = to_mlx(theirs.gamma.flatten())
    x = magnitude * random(1, 24, 2, 3, 4)
    got, want = ours(to_mlx(x.movedim(1, -1))), theirs(x).movedim(1, -1)
    if magnitude == 0.0:
        assert not np.asarray(got).any() and not want.any()
    else:
        assert relative_error(got, want) <= BOUND


def test_bfloat16_is_as_close_as_pytorch():
    """Errors of both bfloat16 encoders against float32: ours may not be the larger by more than noise."""
    config = tiny_config()
    vae, video, exact = encode_pair(config, 5)
    theirs = encode_pair(config, 5, torch.bfloat16)[2]
    vae.set_dtype(mx.bfloat16)
    got = vae.encode(video)
    assert got.dtype == mx.float32
    error = np.abs(np.asarray(got) - exact.numpy()).mean()
    assert error <= 1.1 * (theirs - exact).abs().mean().item()


def test_keys_and_shapes_at_full_size():
    config = VAEConfig()
    with torch.device("meta"):
        state = reference(config).state_dict()
    want = {k: tuple(convert(k, v).shape) for k, v in state.items()}
    assert {k: v.shape for k, v in tree_flatten(VAE(config).parameters())} == want
    assert len(want) == 194
