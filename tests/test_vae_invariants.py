"""Invariants of the causal VAE that need no PyTorch."""

import ctypes
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny_mlx_model import VAE_CONFIG, VAE_CONFIGS, random, random_vae

from wan_mlx.models.configs import VAEConfig
from wan_mlx.models.vae import VAE, flow
from wan_mlx.models.vae_execution import PacedCache, VAEExecution
from wan_mlx.models.vae_layers import CausalCache
from wan_mlx.presets import BUNDLED
from wan_mlx.weights.load import load_vae


@pytest.fixture(scope="module", params=VAE_CONFIGS)
def vae(request):
    return random_vae(VAE_CONFIGS[request.param])


def pictures(vae, num_frames):
    return random(1, num_frames, *(n * vae.geometry.spatial for n in (2, 3)), 3)


def decoded(vae, latents):
    return np.concatenate(list(vae.decode(latents)), axis=1)


def encoded(vae, frames):
    chunks = [frames[:, :1], *(frames[:, i : i + 4] for i in range(1, frames.shape[1], 4))]
    return VAEExecution(vae).encode_chunks(map(mx.array, chunks))


def test_chunked_encode_equals_whole(vae):
    frames = pictures(vae, 13)
    whole = vae.encode(frames)
    chunks = (mx.array(frames[:, a:b]) for a, b in ((0, 1), (1, 5), (5, 9), (9, 13)))
    assert whole.shape == (1, 4, 2, 3, 4) and whole.dtype == mx.float32
    assert np.array_equal(vae.encode_chunks(chunks), whole)


def test_zeros_stand_before_the_first_frame():
    """nano's VAE: mean |value| of each frame, as Diffusers' has them of the same weights."""
    vae, rng = load_vae(BUNDLED["nano"]), np.random.default_rng(0)
    latents = rng.standard_normal((1, 3, 2, 2, 16), dtype=np.float32)
    frames = rng.uniform(-1, 1, (1, 9, 16, 16, 3)).astype(np.float32)
    of_frames = np.abs(decoded(vae, mx.array(latents))).mean((0, 2, 3, 4))
    of_latents = np.abs(np.array(vae.encode(mx.array(frames)))).mean((0, 2, 3, 4))
    means = [0.54354, 0.40775, 0.4411, 0.48182, 0.48237, 0.47393, 0.47745, 0.49429, 0.49774]
    np.testing.assert_allclose(of_frames, means, rtol=1e-4)
    np.testing.assert_allclose(of_latents, [0.50564, 0.41106, 0.49174], rtol=1e-4)


@pytest.mark.parametrize("prefix", [1, 2, 3])
def test_later_frames_leave_earlier_ones_unchanged(vae, prefix):
    latents = random(1, 4, 2, 3, 4)
    np.testing.assert_allclose(decoded(vae, latents[:, :prefix]), decoded(vae, latents)[:, : 4 * prefix - 3], atol=1e-6)
    frames = pictures(vae, 13)
    np.testing.assert_allclose(vae.encode(frames[:, : 4 * prefix - 3]), vae.encode(frames)[:, :prefix], atol=1e-6)


def test_frames_stream_as_they_are_decoded(vae):
    stream = vae.decode(random(1, 3, 2, 3, 4))
    shapes = [(frames.shape, frames.dtype) for frames in stream]
    assert shapes == [(pictures(vae, n).shape, mx.float32) for n in (1, 4, 4)]


def test_passes_share_no_state(vae):
    latents = random(1, 3, 2, 3, 4)
    first = decoded(vae, latents)
    next(vae.decode(-latents))
    assert np.array_equal(decoded(vae, latents), first)


def test_frames_one_by_one_equal_several_at_a_time(vae, monkeypatch):
    latents, frames = random(1, 4, 2, 3, 4), pictures(vae, 13)
    run = VAEExecution(vae)
    several = decoded(run, latents), encoded(vae, frames)
    for most in (1, 2 * 16 * 24 * 8):  # one frame at a time everywhere, then at most two of the largest
        monkeypatch.setattr("wan_mlx.models.vae_execution.VALUES_AT_ONCE", most)
        np.testing.assert_allclose(decoded(run, latents), several[0], atol=1e-5)
        np.testing.assert_allclose(encoded(vae, frames), several[1], atol=1e-5)


@pytest.mark.parametrize("dim", [1, 2, 4])
def test_a_narrow_vae_encodes(dim):
    """Narrower than the pictures' three channels."""
    narrow = random_vae(replace(VAE_CONFIG, dim=dim))
    frames = random(1, 5, 16, 16, 3)
    np.testing.assert_allclose(encoded(narrow, frames), np.array(narrow.encode(frames)), atol=1e-5)


@pytest.fixture
def exact_allocations():
    """No reuse of freed buffers, which may be larger than what was asked for."""
    limit = mx.set_cache_limit(0)
    mx.clear_cache()
    yield
    mx.set_cache_limit(limit)


def held_beyond_the_cache(step, chunks):
    """Bytes that stay allocated after ``step`` has run over chunks, in excess of the frames and of the arrays derived
    from weights in its cache."""
    step(mx.zeros(chunks[0]), PacedCache())  # arrays made of the weights stay
    cache = PacedCache()
    before = mx.get_active_memory()
    for shape in chunks:
        step(mx.random.uniform(-1, 1, shape, key=mx.random.key(0)), cache)
    mx.synchronize()
    kept = {id(frame): frame.nbytes for frames in cache.frames.values() for frame in frames}
    kept |= {id(array): array.nbytes for array in cache._derived.values()}
    return mx.get_active_memory() - before - sum(kept.values())


def test_cache_owns_its_memory(vae, exact_allocations):
    run = VAEExecution(vae)
    decoder = [*vae.decoder.whole, *vae.decoder.local]
    encoder = [*vae.encoder.local, *vae.encoder.whole]
    decode = held_beyond_the_cache(lambda x, cache: list(run.flow(decoder, [x], cache)), [(1, 8, 12, 4)] * 2)
    channels = vae.encoder.conv1.weight.shape[-1]
    encode = held_beyond_the_cache(
        lambda x, cache: list(run.flow(encoder, [x], cache)), [(n, 64, 96, channels) for n in (1, 4)]
    )
    # One frame of pixels kept alive by a slice would be 74 kB.
    assert abs(decode) < 20_000 and abs(encode) < 20_000


def test_weights_that_are_replaced_are_used(vae):
    """Though arrays made of them are kept during a pass."""
    first, other = (type(vae)(vae.config) for _ in range(2))
    run = VAEExecution(first)
    first.update(vae.parameters())
    other.load_weights([(name, 0.9 * array) for name, array in tree_flatten(vae.parameters())])
    latents = mx.random.normal((1, 3, 2, 3, vae.config.z_dim), key=mx.random.key(0))

    before, wanted = decoded(run, latents), decoded(other, latents)
    first.load_weights(tree_flatten(other.parameters()))
    assert np.array_equal(decoded(run, latents), wanted) and not np.allclose(before, wanted, atol=1e-3)


def test_execution_lays_taps_out_so_that_none_is_copied():
    vae = random_vae()
    conv = vae.decoder.conv1
    weight = np.array(conv.weight)
    VAEExecution(vae)
    taps = conv.taps()
    mx.eval(taps)
    for tap, mine in enumerate(taps):
        assert np.array_equal(mine, weight[:, tap])
    assert np.array_equal(conv.weight, weight) and taps[1].shape == (weight.shape[0], 3, 3, weight.shape[-1])
    starts = [ctypes.addressof(ctypes.c_char.from_buffer(tap)) for tap in taps]
    assert [start - starts[0] for start in starts] == [0, taps[0].nbytes, 2 * taps[0].nbytes]


def test_cache_does_not_grow(vae):
    cache, sizes = CausalCache(), []
    for _ in range(4):
        list(flow([*vae.decoder.whole, *vae.decoder.local], [mx.ones((1, 2, 3, 4))], cache))
        sizes.append([frame.shape for frames in cache.frames.values() for frame in frames])
    assert sizes[0] == sizes[1] == sizes[2] == sizes[3]
    assert {len(frames) for frames in cache.frames.values()} == {2}


@pytest.mark.parametrize(
    "shape, message",
    [
        ((1, 6, 16, 24, 3), r"frames is 6, expected 4n\+1 .*; nearest: 5"),
        ((1, 4, 16, 24, 3), r"frames is 4, expected 4n\+1 .*; nearest: 5"),
        ((1, 5, 16, 21, 3), "width is 21, expected a positive multiple of 8; nearest: 24"),
        ((1, 5, 3, 24, 3), "height is 3, .*; nearest: 8"),
        ((1, 3, 5, 16, 24), r"expected \(1, T, H, W, 3\), channels last"),
        ((2, 5, 16, 24, 3), r"expected \(1, T, H, W, 3\)"),
        ((5, 16, 24, 3), r"expected \(1, T, H, W, 3\)"),
        ((1, 0, 16, 24, 3), r"expected \(1, T, H, W, 3\)"),
    ],
)
def test_wrong_frames(shape, message):
    with pytest.raises(ValueError, match=message):
        random_vae().encode(mx.zeros(shape))


@pytest.mark.parametrize(
    "shapes, message", [([1, 3], "chunk 2 has 3 frames, expected 4"), ([4], "expected 1"), ([], "no")]
)
def test_wrong_chunks(shapes, message):
    with pytest.raises(ValueError, match=message):
        random_vae().encode_chunks(mx.zeros((1, t, 16, 24, 3)) for t in shapes)


@pytest.mark.parametrize("shape", [(1, 4, 3, 2, 3), (2, 1, 2, 3, 4), (3, 2, 3, 4), (1, 0, 2, 3, 4)])
def test_wrong_latents_are_refused_at_once(vae, shape):
    with pytest.raises(ValueError, match=r"expected \(1, t, h, w, 4\), channels last"):
        vae.decode(mx.zeros(shape))


@pytest.mark.parametrize(
    "changes, message",
    [({"z_dim": 5}, "mean has 4 values, expected 5"), ({"dim_mult": (1, 2)}, "3 values, expected 1")],
)
def test_config_must_agree_with_itself(changes, message):
    sizes = dict(dim=8, z_dim=4, mean=VAE_CONFIG.mean, std=VAE_CONFIG.std)
    with pytest.raises(ValueError, match=message):
        VAE(VAEConfig(**{**sizes, **changes}))
