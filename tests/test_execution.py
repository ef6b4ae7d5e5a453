"""Execution = plain: the same bits in float32 on a CPU, whole or in pieces; plain networks can be transformed."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from wan_mlx.models import attention_execution, vae_execution
from wan_mlx.models.block_execution import run_block
from wan_mlx.models.configs import ImageEncoderConfig, TextEncoderConfig, TransformerConfig, VAEConfig
from wan_mlx.models.execution import Execution, StreamedTextEncoder, encode_images
from wan_mlx.models.image_encoder import ImageEncoder
from wan_mlx.models.pieces import Pacer
from wan_mlx.models.text_encoder import TextEncoder
from wan_mlx.models.transformer import Transformer
from wan_mlx.models.vace import VaceTransformer
from wan_mlx.models.vae import VAE
from wan_mlx.models.vae_execution import VAEExecution

SIZES = dict(dim=48, ffn_dim=80, num_heads=2, num_layers=3, freq_dim=32, text_dim=24, text_len=7)
CONFIGS = {
    "t2v": TransformerConfig("t2v", **SIZES),
    "i2v": TransformerConfig("i2v", **SIZES, in_dim=36, image_dim=32),
    "flf2v": TransformerConfig("flf2v", **SIZES, in_dim=36, image_dim=32),
    "vace": TransformerConfig("vace", **SIZES, vace_layers=(0, 2), vace_in_dim=6),
}
GRIDS = [(1, 2, 2), (3, 6, 10), (2, 14, 6)]
VAE_SIZES = VAEConfig(dim=8, z_dim=4, mean=(0.1, -0.2, 0.3, 0.0), std=(1.0, 2.0, 0.5, 1.5))


def filled(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with random parameters: matrices that keep the size of their input, vectors near where they are."""
    keys = iter(mx.random.split(mx.random.key(seed), 4000))

    def fill(array: mx.array) -> mx.array:
        noise = mx.random.normal(array.shape, key=next(keys))
        return noise * (array.size / len(array)) ** -0.5 if array.ndim > 1 else array + 0.1 * noise

    module.update(tree_map(fill, module.parameters()))
    mx.eval(module.parameters())
    return module


def transformer(kind: str) -> Transformer:
    return filled((VaceTransformer if kind == "vace" else Transformer)(CONFIGS[kind]))


def inputs(kind: str, grid: tuple[int, int, int], batch: int = 1) -> tuple:
    """Arguments of a forward."""
    config, keys = CONFIGS[kind], iter(mx.random.split(mx.random.key(7), 4))

    def random(*shape: int) -> mx.array:
        return mx.random.normal(shape, key=next(keys))

    more: tuple = ()
    latents, context = random(batch, *grid, 16), random(batch, config.text_len, config.text_dim)
    if config.has_image_branch:
        images = 2 * batch if kind == "flf2v" else batch
        more = random(batch, *grid, 20), random(images, 257, 32)
    elif kind == "vace":
        more = random(batch, *grid, 6), 0.7
    return latents, 500.0 if batch == 1 else [500.0, 20.0], context, *more


@pytest.mark.parametrize("tokens_at_once", [4, 7, 1024, 100_000])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_transformer_execution_equals_plain(kind, grid, tokens_at_once):
    model, arguments = transformer(kind), inputs(kind, grid)
    plain = model(*arguments, skip_layers=(1,))
    run = Execution(model, tokens_at_once=tokens_at_once)
    assert mx.array_equal(run(*arguments, skip_layers=(1,)), plain)
    assert mx.isfinite(plain).all() and plain.std() > 0.1


@pytest.mark.parametrize("tokens_at_once", [4, 7, 1024, 100_000])
@pytest.mark.parametrize("grid", GRIDS)
def test_execution_with_given_frames_equals_plain(grid, tokens_at_once):
    model, arguments = transformer("t2v"), inputs("t2v", grid)
    plain = model(*arguments, clean_frames=1)
    assert mx.array_equal(Execution(model, tokens_at_once=tokens_at_once)(*arguments, clean_frames=1), plain)
    assert not mx.array_equal(plain[:, :1], model(*arguments)[:, :1])


@pytest.mark.parametrize("kind", CONFIGS)
def test_transformer_execution_equals_plain_in_a_batch_and_streamed(kind):
    model, arguments = transformer(kind), inputs(kind, (2, 4, 6), batch=2)
    plain = model(*arguments)
    assert mx.array_equal(Execution(model, tokens_at_once=5)(*arguments), plain)

    def blocks(names):
        for name in names:
            kind, index = name.split(".")
            yield model[kind][int(index)]

    assert mx.array_equal(Execution(model, blocks, tokens_at_once=5)(*arguments), plain)


def test_attention_in_dispatches_equals_plain(monkeypatch):
    monkeypatch.setattr(attention_execution, "UNFUSED_SCORES", 2 * 15 * 4)
    model, arguments = transformer("t2v"), inputs("t2v", (3, 6, 10))
    assert mx.array_equal(Execution(model)(*arguments), model(*arguments))


def test_a_hook_around_the_blocks_gets_the_same_from_both():
    model, arguments, seen = transformer("vace"), inputs("vace", (2, 4, 6)), []

    def hook(x, this_pass, run_blocks):
        after = run_blocks(x)
        seen.append((mx.array(x), mx.array(this_pass.modulation), mx.array(after)))
        return 0.5 * after

    results = [run(*arguments, through=hook) for run in (model, Execution(model, tokens_at_once=7))]
    assert mx.array_equal(*results) and all(mx.array_equal(a, b) for a, b in zip(*seen, strict=True))
    assert not mx.array_equal(results[0], model(*arguments))


@pytest.mark.parametrize("most", [1, 2 * 16 * 24 * 8, 10**9])
@pytest.mark.parametrize("size", [(2, 3), (5, 1)])
def test_vae_execution_equals_plain(monkeypatch, most, size):
    """The same bits for pieces of the same size; products of fewer rows may round another way, in their last bit."""
    monkeypatch.setattr(vae_execution, "VALUES_AT_ONCE", most)
    tolerance = 0 if most == 10**9 else 3e-6
    vae = filled(VAE(VAE_SIZES))
    height, width = size
    frames = mx.random.uniform(-1, 1, (1, 9, 8 * height, 8 * width, 3), key=mx.random.key(1))
    latents = mx.random.normal((1, 3, height, width, 4), key=mx.random.key(2))
    encoded, decoded = vae.encode(frames), list(vae.decode(latents))
    run = VAEExecution(vae)
    chunks = [frames[:, :1], frames[:, 1:5], frames[:, 5:]]
    np.testing.assert_allclose(run.encode_chunks(chunks), encoded, rtol=0, atol=tolerance)
    for got, want in zip(run.decode(latents), decoded, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)
    assert encoded.std() > 0.1 and decoded[1].std() > 0.1


def test_vae_attention_in_parts_equals_plain(monkeypatch):
    monkeypatch.setattr(vae_execution, "SCORES_AT_ONCE", 15 * 4)  # of 15 rows, 4 at a time
    vae = filled(VAE(VAE_SIZES))
    latents = mx.random.normal((1, 2, 3, 5, 4), key=mx.random.key(2))
    decoded = list(vae.decode(latents))
    for got, want in zip(VAEExecution(vae).decode(latents), decoded, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=3e-6)


def test_text_encoder_execution_equals_plain():
    config = TextEncoderConfig(vocab_size=50, dim=24, dim_attn=16, dim_ffn=40, num_heads=4, num_layers=3)
    encoder = filled(TextEncoder(config))
    run = StreamedTextEncoder(
        config, lambda ids: encoder.token_embedding(mx.array(ids)), lambda: encoder.blocks, encoder.norm.weight
    )
    prompts = [[5, 6, 1], [7, 8, 9, 10, 11, 12, 1], [1]]
    for got, want in zip(run(prompts), encoder(prompts), strict=True):
        assert mx.array_equal(got, want) and want.std() > 0.1


def test_image_encoder_execution_equals_plain():
    config = ImageEncoderConfig(image_size=28, patch_size=7, dim=32, num_heads=2, num_layers=4)
    encoder = filled(ImageEncoder(config))
    images = mx.random.uniform(-1, 1, (2, 20, 33, 3), key=mx.random.key(1))
    assert mx.array_equal(encode_images(encoder, images), encoder(images))


@pytest.mark.parametrize("kind", ["i2v", "vace"])
def test_plain_transformer_can_be_transformed(kind):
    """`mx.grad`, `mx.vjp`, `mx.checkpoint` and `mx.compile` of the plain call agree."""
    model = transformer(kind)
    latents, timestep, context, *more = inputs(kind, (2, 4, 6))

    def forward(latents: mx.array) -> mx.array:
        return model(latents, timestep, context, *more)

    gradient = mx.grad(lambda x: forward(x).square().sum())(latents)
    assert gradient.std() > 0
    again = mx.grad(lambda x: mx.checkpoint(forward)(x).square().sum())(latents)
    plain = forward(latents)
    _, (pulled,) = mx.vjp(forward, [latents], [2 * plain])
    for other in (again, pulled):
        np.testing.assert_allclose(other, gradient, rtol=0, atol=1e-4 * mx.abs(gradient).max().item())
    np.testing.assert_allclose(mx.compile(forward)(latents), plain, rtol=0, atol=1e-5)


def test_plain_vae_and_encoders_can_be_differentiated():
    vae = filled(VAE(VAE_SIZES))
    frames = mx.random.uniform(-1, 1, (1, 5, 16, 8, 3), key=mx.random.key(1))

    def loss(parameters, frames):
        vae.update(parameters)
        return sum(part.square().sum() for part in vae.decode(vae.encode(frames)))

    of_weights, of_frames = mx.grad(loss, argnums=(0, 1))(vae.trainable_parameters(), frames)
    flat = dict(tree_flatten(of_weights))
    assert of_frames.std() > 0 and all(mx.isfinite(array).all() for array in flat.values())
    assert flat["decoder.upsamples.3.resample.1.weight"].std() > 0 and flat["encoder.conv1.weight"].std() > 0
    images = mx.random.normal((1, 17, 32), key=mx.random.key(1))
    block = filled(ImageEncoder(ImageEncoderConfig(28, 7, 32, 4, 2, 3))).transformer[0]
    assert mx.grad(lambda x: block(x).square().sum())(images).std() > 0


# Tokens at once → arrays alive after each evaluation of a block.
ALIVE = {
    400: [
        1.0, 2.0, 2.0, 2.0, 3.0, 3.0, 3.0, 4.0, 4.0, 4.0, 2.0, 2.0, 1.7, 1.7, 2.1, 2.1, 2.1, 2.1, 2.1, 2.1, 1.7,
        2.4, 2.4, 2.4, 2.4, 2.4, 2.4, 2.4, 2.4, 2.1, 2.7, 2.7, 2.6, 2.6, 2.6, 2.6, 2.6, 2.6, 2.3, 3.3, 0.6,
    ],
    100_000: [1.0, 2.0, 2.0, 3.0, 4.0, 4.0, 2.0, 2.0, 2.0, 3.0, 3.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0],
}  # fmt: skip


@pytest.mark.parametrize("on_host, tokens, waiting, late", [
    (None, 32768, 1, 600), (True, 32768, 1, 600), (False, 32768, 2, 1000), (False, 8192, 1, 200)
])  # fmt: skip
def test_two_pieces_wait_among_gpus_where_memory_is_not_short(on_host, tokens, waiting, late):
    """Or each would wait for the other's Python, and for its memory; alone and on Macs it would take memory."""
    run = Execution(transformer("t2v"), tokens_at_once=tokens)
    among = None if on_host is None else SimpleNamespace(group=SimpleNamespace(on_host=on_host))
    assert (run._pacer(among).waiting, run._frees.most) == (waiting, late * 10**6)


class TestOrder:
    """What is alive at once follows from when work is submitted and waited for, and from what is dropped before: the
    numbers of arrays that plans count with stand or fall with it."""

    @pytest.fixture
    def log(self, monkeypatch):
        """(verb, shapes, bytes alive beside the model) of every evaluation, each computed before the next begins."""
        entries, evaluate = [], mx.eval
        start = [0]

        def entry(verb, arrays):
            flat = [array for _, array in tree_flatten(list(arrays)) if isinstance(array, mx.array)]
            if flat:
                evaluate(flat)
                entries.append((verb, *(array.shape[1:] for array in flat), mx.get_active_memory() - start[0]))

        monkeypatch.setattr(mx, "async_eval", lambda *arrays: entry("submit", arrays))
        monkeypatch.setattr(mx, "eval", lambda *arrays: entry("wait", arrays))
        limit = mx.set_cache_limit(0)

        def begin():
            gc.collect()  # or arrays of an earlier test might be freed in between
            mx.clear_cache()
            start[0] = mx.get_active_memory()
            entries.clear()
            return entries

        yield begin
        mx.set_cache_limit(limit)

    def run(self, log, tokens_at_once, grid=(3, 6, 10)):
        model = transformer("t2v")
        x, this_pass = model.enter(*inputs("t2v", grid))
        mx.eval(x, *(array for array in this_pass.for_blocks if isinstance(array, mx.array)), this_pass.rope)
        entries, tokens = log(), [x]
        del x
        pace = Pacer(tokens_at_once)
        after = run_block(model.blocks[0], tokens.pop(), this_pass, pace)
        pace.finish()
        assert after.shape == (1, grid[0] * grid[1] * grid[2] // 4, 48)
        return entries

    def test_a_block_is_submitted_piece_by_piece(self, log):
        entries = self.run(log, 20)
        wide, heads, piece, last = (45, 48), (45, 2, 24), (20, 48), (5, 48)
        tokenwise = [
            ("submit", piece, piece), ("submit", piece), ("submit", piece, piece), ("submit", piece),
            ("submit", piece),
        ]  # fmt: skip
        submitted = [entry[:-1] for entry in entries if entry[0] == "submit"]
        assert submitted == [
            ("submit", wide), ("submit", heads), ("submit", heads), ("submit", heads), ("submit", wide),
            *tokenwise, *tokenwise,
            *[(verb, *(last for _ in shapes)) for verb, *shapes in tokenwise],
            ("submit", wide),
        ]  # fmt: skip
        waited = [entry[:-1] for entry in entries if entry[0] == "wait"]
        assert len(waited) >= 12  # every piece but those too small to wait for

    @pytest.mark.parametrize("tokens_at_once", ALIVE)
    def test_wide_arrays_alive_after_each_evaluation(self, log, tokens_at_once):
        """Beside the weights, in arrays as wide as the tokens; on a GPU other buffers are reused and rounded."""
        if mx.default_device() != mx.cpu:
            pytest.skip("counted on a CPU")
        entries = self.run(log, tokens_at_once, grid=(3, 30, 50))
        wide = 3 * 15 * 25 * 48 * 4
        alive = [round(entry[-1] / wide, 1) for entry in entries]
        assert alive == pytest.approx(ALIVE[tokens_at_once], abs=0.15)
