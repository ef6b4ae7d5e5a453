"""Tiles of the VAE: the same video, in less memory."""

import mlx.core as mx
import numpy as np
import pytest
from tiny_mlx_model import VAE_CONFIGS, random, random_vae

import wan_mlx
from wan_mlx.events import counted
from wan_mlx.hub.resolve import resolve
from wan_mlx.media.write import to_uint8
from wan_mlx.models import vae_tiling as tiling
from wan_mlx.models.vae import ResidualBlock, flow
from wan_mlx.models.vae_execution import VAEExecution
from wan_mlx.models.vae_layers import CausalCache, CausalConv
from wan_mlx.planning.choose import parse_tiling

SAME = dict(rtol=0, atol=1e-5)  # of float32 values around 1


@pytest.fixture(scope="module", params=VAE_CONFIGS)
def vae(request):
    return random_vae(VAE_CONFIGS[request.param])


def chunks_of(frames):
    return [frames[:, :1], *(frames[:, i : i + 4] for i in range(1, frames.shape[1], 4))]


def decoded(vae, latents, tile, **options):
    return np.concatenate(list(tiling.decode(VAEExecution(vae), latents, tile, **options)), axis=1)


@pytest.mark.parametrize("size, tile", [((32, 2), (64, 64)), ((2, 25), (72, 1000)), ((9, 9), (64, 64))])
def test_tiled_decode_equals_whole(vae, size, tile):
    latents = random(1, 2, *size, 4)
    np.testing.assert_allclose(decoded(vae, latents, tile), decoded(vae, latents, None), **SAME)


@pytest.mark.parametrize("size, tile", [((24, 2), (64, 64)), ((2, 17), (72, 1000)), ((9, 9), (64, 64))])
def test_tiled_encode_equals_whole(vae, size, tile):
    chunks = chunks_of(random(1, 5, *(vae.geometry.spatial * n for n in size), 3))
    whole = tiling.encode(VAEExecution(vae), chunks, None)
    assert np.array_equal(whole, vae.encode_chunks(chunks)) and whole.shape == (1, 2, *size, 4)
    np.testing.assert_allclose(tiling.encode(VAEExecution(vae), iter(chunks), tile), whole, **SAME)


@pytest.mark.parametrize("direction", ["decoder", "encoder"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_margins_are_as_wide_as_the_convolutions_reach(vae, direction, stage):
    """NaN spreads as far as convolutions reach: from outside a stage's span never into the core, from inside it does.

    Random values could not show this: what reaches through a dozen convolutions is too little to see.
    """
    layers, length, core = getattr(vae, direction).local, 48, (24, 26)
    spans = tiling.stage_spans(core, tiling._convolutions(layers), length, decoding=direction == "decoder")
    start, end = spans[stage - 1][1] if stage else spans[0][0]  # what the stage is given, before it resamples
    right, rest = spans[-1][1], [layer for group in tiling._stages(layers)[stage:] for layer in group]
    into = max(0, stage - 1)
    rows, columns = (n << into if direction == "decoder" else n << (3 - into) for n in (length, 1))
    conv = {CausalConv: lambda x: x, ResidualBlock: lambda x: x.residual[2]}.get(type(rest[0]), lambda x: x.resample[1])

    def reached(row):
        """Which rows of the core a NaN in this row of the stage's input reaches."""
        x = np.zeros((1, rows, columns, conv(rest[0]).weight.shape[-1]), np.float32)
        x[:, row] = np.nan
        (y,) = flow(rest, [mx.array(x)], CausalCache())
        return np.isnan(np.array(y)).any(axis=(0, 2, 3))[slice(*right)]

    assert not reached(start - 1).any() and not reached(end).any()
    # Each halving takes pixels in pairs, but of the last pair only one is read.
    spare = 2 ** (4 - max(1, stage)) - 1 if direction == "encoder" else 0
    assert reached(start)[0] and reached(end - 1 - spare)[-1]


@pytest.mark.parametrize("tile", [None, (64, 64)])
def test_progress_goes_to_the_end(vae, tile):
    told = []
    decoded(vae, random(1, 2, 2, 9, 4), tile, progress=counted(told.append, "decoding"))
    counts = [event.done for event in told]
    assert counts == list(range(told[-1].total + 1)) and len(counts) > 2


def test_a_still_and_frames_in_order(vae):
    latents = random(1, 3, 2, 9, 4)
    shapes = [frames.shape for frames in tiling.decode(VAEExecution(vae), latents, (64, 64))]
    size = [vae.geometry.spatial * n for n in (2, 9)]
    assert shapes == [frames.shape for frames in vae.decode(latents)] == [(1, n, *size, 3) for n in (1, 4, 4)]
    np.testing.assert_allclose(decoded(vae, latents[:, :1], (64, 64)), decoded(vae, latents[:, :1], None), **SAME)


def test_finish_and_progress(vae):
    seen = []

    def progress(items, total):
        seen.append(total)
        return items

    latents = random(1, 2, 2, 17, 4)
    tile = (9 * vae.geometry.spatial,) * 2
    pixels = decoded(vae, latents, tile, finish=lambda x: to_uint8(x, rounding=False), progress=progress)
    assert pixels.dtype == np.uint8 and seen == [2 * 2]
    assert np.array_equal(pixels, to_uint8(mx.array(decoded(vae, latents, tile)), rounding=False))


def peak(run):
    """Peak of MLX's memory above what was held before, in bytes."""
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    run()
    return mx.get_peak_memory() - before


def test_tiles_take_less_memory(vae):
    side = vae.geometry.spatial
    latents, frames, tile = random(1, 2, 64, 2, 4), random(1, 5, 64 * side, 2 * side, 3), (10 * side, 10 * side)
    mx.eval(latents, frames)
    small, whole = (peak(lambda tile=tile: decoded(vae, latents, tile)) for tile in (tile, None))
    assert small < 0.5 * whole
    run = VAEExecution(vae)
    small, whole = (peak(lambda tile=tile: tiling.encode(run, chunks_of(frames), tile)) for tile in (tile, None))
    assert small < 0.6 * whole


def test_nano_shows_no_seam():
    """A moving pattern through nano's own VAE: what differs is rounding, at the tiles' borders no more than inside."""
    vae = wan_mlx.load_vae(resolve("nano"))
    times, rows, columns = np.mgrid[:5, :64, :128]
    video = np.stack([np.sin((rows * (1 + c) + columns * (3 - c) + 4 * times) / 10) for c in range(3)], axis=-1)[None]
    chunks = chunks_of(mx.array(video.astype(np.float32)))
    latents = vae.encode_chunks(chunks)
    np.testing.assert_allclose(tiling.encode(VAEExecution(vae), chunks, (64, 64)), latents, rtol=0, atol=1e-4)
    whole, tiled = (decoded(vae, latents, tile) for tile in (None, (64, 64)))
    assert whole.std() > 0.2  # a picture, not grey
    error, at_border = np.abs(tiled - whole), np.zeros(128, bool)
    at_border[62:66] = True
    assert 10 * np.log10(4 / max(1e-20, (error**2).mean())) > 100  # dB, of a range of 2
    rounding = 3e-6
    assert error[..., at_border, :].max() <= max(error[..., ~at_border, :].max(), rounding)
    assert error.max() < 1e-4


def test_the_pipeline_decodes_in_tiles(monkeypatch):
    """``vae_tiling`` reaches the VAE, and the frames stay within a level: pixels are truncated."""
    asked, latents = [], random(1, 1, 2, 24, 16)
    tiles_of = tiling.tiles_of
    monkeypatch.setattr(tiling, "tiles_of", lambda *args, **how: asked.append(args[-1]) or tiles_of(*args, **how))
    frames = {}
    for option in (None, "off", "64x64", "auto"):
        pipe = wan_mlx.WanPipeline.from_pretrained("nano", progress=False, vae_tiling=option)
        frames[option] = np.concatenate(list(pipe.decode(latents))).astype(int)
    assert asked == [(64, 64)]
    assert np.array_equal(frames[None], frames["off"]) and np.array_equal(frames[None], frames["auto"])
    assert frames["off"].shape == (1, 16, 192, 3) and np.abs(frames["64x64"] - frames["off"]).max() <= 1


@pytest.mark.parametrize(
    "given, parsed",
    [(None, "auto"), ("auto", "auto"), ("off", "off"), ("256", (256, 256)), ("384x256", (384, 256)),
     ("384*256", (384, 256)), ((64, 72), (64, 72))],
)  # fmt: skip
def test_parse_tiling(given, parsed):
    assert parse_tiling(given) == parsed


@pytest.mark.parametrize(
    "given, message",
    [("on", "expected auto, off, or"), ("250x256", "nearest to 250: 248"), ("32", "nearest to 32: 64"),
     ((1, 2, 3), "expected auto"), ("1x2x3", "expected auto")],
)  # fmt: skip
def test_refusals(given, message):
    with pytest.raises(ValueError, match=message):
        wan_mlx.WanPipeline.from_pretrained("nano", vae_tiling=given)
