"""TAEHV against a PyTorch statement of the same layers, on random weights in float32, both ways."""

import importlib.util
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from oracles import randomize, relative_error
from safetensors.torch import save_file
from torch import nn

from wan_mlx.errors import WeightsError
from wan_mlx.models.configs import VAE22Config
from wan_mlx.models.taehv import TAEHV, TAEHVConfig
from wan_mlx.weights.component import parameter_shapes
from wan_mlx.weights.taehv import load_taehv

BOUND = 2e-5
ROOT = Path(__file__).parents[2]


class Mem(nn.Module):
    def __init__(self, dim):
        super().__init__()
        layers = [nn.Conv2d(2 * dim, dim, 3, padding=1), nn.ReLU(), nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU()]
        self.conv = nn.Sequential(*layers, nn.Conv2d(dim, dim, 3, padding=1))

    def forward(self, x):
        past = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
        return torch.relu(self.conv(torch.cat([x, past], dim=1)) + x)


class Pool(nn.Module):
    def __init__(self, dim, stride):
        super().__init__()
        self.conv, self.stride = nn.Conv2d(dim * stride, dim, 1, bias=False), stride

    def forward(self, x):
        return self.conv(x.reshape(-1, self.stride * x.shape[1], *x.shape[2:]))


class Grow(nn.Module):
    def __init__(self, dim, stride):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim * stride, 1, bias=False)

    def forward(self, x):
        return self.conv(x).reshape(-1, *x.shape[1:])


class Reference(nn.Module):
    """Whole videos (T, C, H, W): frames in [0, 1] ↔ latents."""

    def __init__(self, width=64, widths=(256, 128, 64, 64), z_dim=16, small=False, stored_grows=(1, 2, 2), patch=1):
        super().__init__()
        self.patch = patch
        encoder = [nn.Conv2d(3 * patch**2, width, 3, padding=1), nn.ReLU()]
        for stride in (2, 2, 1):
            encoder += [Pool(width, stride), nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False)]
            encoder += [Mem(width) for _ in range(3)]
        self.encoder = nn.Sequential(*encoder, nn.Conv2d(width, z_dim, 3, padding=1))
        decoder = [nn.Identity(), nn.Conv2d(z_dim, widths[0], 3, padding=1), nn.ReLU()]
        for i, grow in enumerate(stored_grows):
            decoder += [Mem(widths[i]) for _ in range(3)]
            decoder += [nn.Upsample(scale_factor=1 if small else 2), Grow(widths[i], 1 if small else grow)]
            decoder += [nn.Conv2d(widths[i], widths[i + 1], 3, padding=1, bias=False)]
        self.decoder = nn.Sequential(*decoder, nn.ReLU(), nn.Conv2d(widths[3], 3 * patch**2, 3, padding=1))

    def encode(self, frames):
        left = -len(frames) % 4
        padded = torch.cat([frames, frames[-1:].expand(left, -1, -1, -1)])
        return self.encoder(torch.pixel_unshuffle(padded, self.patch))

    def decode(self, latents, dropped=3):
        return torch.pixel_shuffle(self.decoder(torch.tanh(latents / 3) * 3)[dropped:], self.patch).clamp(0, 1)


SIZES = dict(width=6, widths=(10, 8, 6, 5))


@pytest.fixture(scope="module")
def reference():
    model = Reference(**SIZES).eval().requires_grad_(False)
    randomize(model, 3)
    # Colours over most of [0, 1], of which the clamp hides little.
    model.decoder[-1].weight.mul_(2)
    model.decoder[-1].bias.fill_(0.5)
    return model


@pytest.fixture(scope="module")
def taehv(reference, tmp_path_factory):
    path = tmp_path_factory.mktemp("taehv") / "taew2_1.safetensors"
    save_file(reference.state_dict(), path)
    return load_taehv(path)


def frames_of(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (1, count, 16, 24, 3)).astype(np.float32)


def latents_of(count: int, seed: int = 1) -> np.ndarray:
    return 2 * np.random.default_rng(seed).normal(size=(1, count, 2, 3, 16)).astype(np.float32)


def to_torch(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array[0]).permute(0, 3, 1, 2)


def decoded(model, latents, **options) -> list[mx.array]:
    return list(model.decode(mx.array(latents), **options))


@pytest.mark.parametrize("count", [1, 5, 8, 9])
def test_encode(reference, taehv, count):
    frames = frames_of(count)
    want = reference.encode((to_torch(frames) + 1) / 2).permute(0, 2, 3, 1).numpy()
    got = taehv.encode(mx.array(frames))
    assert got.dtype == mx.float32
    assert relative_error(got[0], want) < BOUND


@pytest.mark.parametrize("count", [1, 3])
def test_decode(reference, taehv, count):
    latents = latents_of(count)
    want = reference.decode(to_torch(latents)).permute(0, 2, 3, 1).numpy()
    assert 0.05 < want.std() and (want == 0).mean() < 0.4  # it says something, and the clamp hides little
    frames = decoded(taehv, latents)
    assert [f.shape[1] for f in frames] == [1, *[4] * (count - 1)]
    assert relative_error((np.concatenate(frames, axis=1)[0] + 1) / 2, want) < BOUND


def test_small_decode_skips_the_upsampling(reference, taehv):
    """One frame of each latent frame's size: nothing is doubled, and of frames grown only the last is made."""
    small = Reference(**SIZES, small=True).eval().requires_grad_(False)
    state = reference.state_dict()
    kept = small.state_dict()
    small.load_state_dict({name: value[-len(kept[name]) :] for name, value in state.items()})
    want = small.decode(to_torch(latents_of(3)), dropped=0).permute(0, 2, 3, 1).numpy()
    assert want.std() > 0.03
    got = np.concatenate(decoded(taehv, latents_of(3), small=True), axis=1)[0]
    assert relative_error((got + 1) / 2, want) < BOUND


def test_of_wan2_2(tmp_path):
    """taew2_2: 48 channels, patches of 2x2 pixels in PyTorch's order; also without upsampling."""
    reference = Reference(**SIZES, z_dim=48, patch=2).eval().requires_grad_(False)
    randomize(reference, 3)
    reference.decoder[-1].bias.fill_(0.5)
    save_file(reference.state_dict(), tmp_path / "taew2_2.safetensors")
    model = load_taehv(tmp_path / "taew2_2.safetensors")
    assert model.config.geometry == VAE22Config().geometry
    frames = np.random.default_rng(0).uniform(-1, 1, (1, 5, 32, 48, 3)).astype(np.float32)
    latents = reference.encode((to_torch(frames) + 1) / 2)
    assert relative_error(model.encode(mx.array(frames))[0], latents.permute(0, 2, 3, 1).numpy()) < BOUND
    want = reference.decode(latents).permute(0, 2, 3, 1).numpy()
    given = latents.permute(0, 2, 3, 1)[None].numpy()
    got = np.concatenate(decoded(model, given), axis=1)[0]
    assert want.std() > 0.05 and got.shape == (5, 32, 48, 3) and relative_error((got + 1) / 2, want) < BOUND
    assert [f.shape for f in decoded(model, given, small=True)] == [(1, 1, 4, 6, 3)] * 2


def test_published_sizes_of_wan2_2():
    want = {name: tuple(value.shape) for name, value in Reference(z_dim=48, patch=2).state_dict().items()}
    got = parameter_shapes(TAEHV(TAEHVConfig(z_dim=48, patch=2)))
    assert {n: (s[0], s[3], *s[1:3]) if len(s) == 4 else s for n, s in got.items()} == want


@pytest.mark.parametrize("small", [False, True])
def test_flops_equal_the_count_of_torch(small):
    from torch.utils.flop_counter import FlopCounterMode

    spec = importlib.util.spec_from_file_location("preview_cost", ROOT / "benchmarks/preview_cost.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    model = Reference(**SIZES, small=small)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.decode(torch.zeros(3, 16, 2, 4))
    config = TAEHVConfig(encoder_width=SIZES["width"], widths=SIZES["widths"])
    assert benchmark.taehv_flop(config, (3, 2, 4), small) == counter.get_total_flops()


def test_pth_gives_the_same(reference, taehv, tmp_path):
    torch.save(reference.state_dict(), tmp_path / "taew2_1.pth")
    again = load_taehv(tmp_path / "taew2_1.pth")
    assert np.array_equal(decoded(again, latents_of(1))[0], decoded(taehv, latents_of(1))[0])


def test_published_sizes():
    """Names and shapes of taew2_1, as the reference makes them."""
    want = {name: tuple(value.shape) for name, value in Reference().state_dict().items()}
    got = parameter_shapes(TAEHV(TAEHVConfig()))
    assert {n: (s[0], s[3], *s[1:3]) if len(s) == 4 else s for n, s in got.items()} == want


def test_weights_that_grow_more_frames_give_the_last(reference, taehv, tmp_path):
    """As the reference reads them: the first stage of some files was trained to double the frames too."""
    state = reference.state_dict()
    state["decoder.7.conv.weight"] = torch.cat([torch.randn(10, 10, 1, 1), state["decoder.7.conv.weight"]])
    save_file(state, tmp_path / "grown.safetensors")
    again = load_taehv(tmp_path / "grown.safetensors")
    assert np.array_equal(decoded(again, latents_of(1))[0], decoded(taehv, latents_of(1))[0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("decoder.4.conv.2.bias"), "lacks decoder.4.conv.2.bias"),
        (lambda s: s.update(extra=torch.zeros(2)), "holds unexpected extra"),
        (lambda s: s.update({"encoder.3.weight": torch.zeros(6, 6, 1, 1)}), r"encoder.3.weight \(6, 6, 1, 1\) instead"),
        (lambda s: s.update({"decoder.1.weight": torch.zeros(10, 48, 3, 3)}), "48 latent channels"),
        (lambda s: s.pop("decoder.22.weight"), "is no TAEHV"),
        (lambda s: s["decoder.8.weight"].zero_(), "decoder.8.weight holds only zeros"),
    ],
)
def test_other_files_are_refused(reference, tmp_path, change, said):
    state = reference.state_dict()
    change(state)
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=said) as error:
        load_taehv(tmp_path / "other.safetensors")
    assert "\n" not in str(error.value)


def test_wrong_arrays_are_refused(taehv):
    with pytest.raises(ValueError, match="expected a positive multiple of 8"):
        taehv.encode(mx.zeros((1, 1, 12, 16, 3)))
    with pytest.raises(ValueError, match="channels last"):
        taehv.decode(mx.zeros((1, 16, 1, 2, 3)))
