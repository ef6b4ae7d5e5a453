"""The noise stream, on a machine without PyTorch."""

import mlx.core as mx
import numpy as np
import pytest

from wan_mlx.noise import latent_noise, normal

# (how many, seed) → first two and last two values of torch.randn, torch 2.13
GOLDEN = {
    (16, 42): (1.92691529, 1.48728406, -0.76883888, 0.76244539),
    (17, 2147483653): (1.5191803, 0.29982713, 0.12082747, 1.03430521),
    (2880, 0): (-1.12583983, -1.1523602, -0.6486963, 0.41697994),
    (2885, 1099511627783): (-0.82013452, 0.39563116, 0.39108253, 0.73823887),
}


@pytest.mark.parametrize("n, seed", GOLDEN)
def test_golden(n, seed):
    got = normal((n,), seed)
    assert np.abs(got[[0, 1, -2, -1]] - np.array(GOLDEN[n, seed], np.float32)).max() <= 1e-6


def test_only_the_low_32_bits_of_the_seed_count():
    assert np.array_equal(normal((40,), 2**40 + 7), normal((40,), 7))


def test_moments():
    values = normal((200_001,), 1).astype(np.float64)
    assert abs(values.mean()) < 0.01 and abs(values.std() - 1) < 0.01 and abs((values**3).mean()) < 0.03


def test_shapes():
    assert normal((2, 3, 4), 3).shape == (2, 3, 4)
    noise = latent_noise((3, 4, 5), 16, 42)
    assert noise.shape == (1, 3, 4, 5, 16) and noise.dtype == mx.float32
    assert np.array_equal(np.array(noise)[0, ..., 2], normal((16, 3, 4, 5), 42)[2])


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_out_of_range(seed):
    with pytest.raises(ValueError, match=f"seed is {seed}, expected 0 to"):
        normal((4,), seed)


def test_no_global_state_is_touched():
    np.random.seed(5)
    mx.random.seed(5)
    before = np.random.get_state()[1].copy(), np.array(mx.random.state[0])
    latent_noise((1, 2, 2), 16, 0)
    assert np.array_equal(np.random.get_state()[1], before[0])
    assert np.array_equal(np.array(mx.random.state[0]), before[1])
