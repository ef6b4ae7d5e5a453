"""The noise stream against PyTorch's CPU generator."""

import numpy as np
import pytest
from oracles import torch

from wan_mlx.noise import latent_noise, normal


def randn(shape, seed: int) -> np.ndarray:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).numpy()


@pytest.mark.parametrize("seed", [0, 42, 2**31 + 5, 2**40 + 7, 2**64 - 1])
@pytest.mark.parametrize(
    "shape", [(16,), (17,), (31,), (32,), (2880,), (7, 11, 13), (16, 21, 60, 104)], ids=str
)
def test_stream(shape, seed):
    got = normal(shape, seed)
    assert got.shape == shape and got.dtype == np.float32
    assert np.abs(got - randn(shape, seed)).max() <= 1e-6


@pytest.mark.parametrize("shape", [(16,), (17,), (31,), (2880,), (16, 2, 3, 5)], ids=str)
def test_later_draws_of_the_same_generator(shape):
    generator = torch.Generator("cpu").manual_seed(42)
    for earlier in range(4):
        want = torch.randn(shape, generator=generator).numpy()
        assert np.abs(normal(shape, 42, earlier) - want).max() <= 1e-6


@pytest.mark.parametrize("latent_shape", [(1, 2, 2), (3, 4, 6), (2, 3, 5)])
def test_latents_are_drawn_channels_first(latent_shape):
    got = np.array(latent_noise(latent_shape, 16, 42))
    assert got.shape == (1, *latent_shape, 16) and got.dtype == np.float32
    assert np.abs(got[0] - np.moveaxis(randn((16, *latent_shape), 42), 0, -1)).max() <= 1e-6
