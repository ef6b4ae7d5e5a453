"""The diffusion transformer against PyTorch, float32, random weights: rope, a block, every kind of model."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from mlx.utils import tree_flatten
from oracles import diffusers_transformer, in_halves, official, randomize, relative_error, unmasked_attention

from wan_mlx.models import attention_execution, chips
from wan_mlx.models.configs import TransformerConfig
from wan_mlx.models.execution import Execution
from wan_mlx.models.pieces import Pacer
from wan_mlx.models.rope import rope_table, scale_and_rotate
from wan_mlx.models.transformer import Transformer
from wan_mlx.weights.layouts import canonical_keys, recognise
from wan_mlx.weights.parameters import dtype_of

BOUND = 2e-5
TINY = dict(dim=48, ffn_dim=80, num_heads=2, num_layers=3, freq_dim=32, text_dim=24)
TEXT_LEN = 512


def to_mlx(array: torch.Tensor) -> mx.array:
    return mx.array(array.detach().float().numpy())


def channels_last(array: torch.Tensor) -> mx.array:
    return to_mlx(array.movedim(1, -1))


def load_state(model: nn.Module, state: dict[str, torch.Tensor], head_dim: int) -> None:
    """Official names, torch layout → ours. Written out here so that the package's loader is not its own judge."""
    weights = {k: v.detach().float().numpy() for k, v in state.items()}
    weights = {name: in_halves(name, array, head_dim) for name, array in weights.items()}
    if "patch_embedding.weight" in weights:
        patch = weights["patch_embedding.weight"]
        weights["patch_embedding.weight"] = patch.transpose(0, 2, 3, 4, 1).reshape(patch.shape[0], -1)
    assert set(weights) == {k for k, _ in tree_flatten(model.parameters())}
    model.load_weights([(k, mx.array(v)) for k, v in weights.items()], strict=True)


@pytest.fixture
def official_model(monkeypatch):
    module = official("modules.model")
    monkeypatch.setattr(module, "flash_attention", unmasked_attention)
    return module


def tiny_config(**changes) -> TransformerConfig:
    return TransformerConfig(**{**TINY, **changes})


@pytest.mark.parametrize("grid, heads, head_dim", [((1, 1, 1), 1, 24), ((3, 5, 7), 2, 24), ((21, 4, 3), 1, 128)])
def test_rope_alone(official_model, grid, heads, head_dim):
    length = int(np.prod(grid))
    x = torch.randn(1, length, heads, head_dim, generator=torch.Generator().manual_seed(0))
    spatial = 2 * (head_dim // 6)
    tables = [official_model.rope_params(1024, d) for d in (head_dim - 2 * spatial, spatial, spatial)]
    want = official_model.rope_apply(x, torch.tensor([grid]), torch.cat(tables, dim=1)).numpy()
    x, want = (torch.as_tensor(a).movedim(-1, 0) for a in (x, want))
    x, want = (in_halves("self_attn.q.", a.numpy(), head_dim) for a in (x, want))
    x, want = (np.moveaxis(a, 0, -1) for a in (x, want))
    got = np.array(scale_and_rotate(mx.array(x), mx.ones((heads, head_dim)), rope_table(grid, head_dim)))
    assert relative_error(got, want) < 1e-6


def test_block_alone(official_model):
    config = tiny_config()
    reference = official_model.WanAttentionBlock(config.dim, config.ffn_dim, config.num_heads, cross_attn_norm=True)
    randomize(reference, seed=1)
    model = Transformer(config)
    block = model.blocks[0]
    load_state(block, reference.state_dict(), config.head_dim)
    grid, generator = (2, 3, 5), torch.Generator().manual_seed(2)
    x = torch.randn(1, 30, config.dim, generator=generator)
    e = torch.randn(1, 6, config.dim, generator=generator)
    context = torch.randn(1, 9, config.dim, generator=generator)
    spatial = 2 * (config.head_dim // 6)
    dims = (config.head_dim - 2 * spatial, spatial, spatial)
    freqs = torch.cat([official_model.rope_params(1024, d) for d in dims], dim=1)
    with torch.no_grad():
        want = reference(
            x, e[:, None].expand(1, 30, 6, config.dim), torch.tensor([30]), torch.tensor([grid]), freqs, context, None
        )
    got = block(to_mlx(x), to_mlx(e), to_mlx(context), None, rope_table(grid, config.head_dim))
    assert relative_error(got, want) < BOUND


@pytest.mark.parametrize("grid, text_tokens", [((1, 2, 2), 1), ((3, 6, 10), 7), ((5, 2, 14), 77), ((2, 18, 4), 512)])
def test_text_to_video_official(official_model, grid, text_tokens):
    config = tiny_config()
    kept = {k: v for k, v in TINY.items()}
    reference = official_model.WanModel(model_type="t2v", in_dim=16, out_dim=16, **kept).eval()
    randomize(reference, seed=3)
    model = Transformer(config)
    load_state(model, reference.state_dict(), config.head_dim)
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(16, *grid, generator=generator)
    context = torch.randn(text_tokens, config.text_dim, generator=generator)
    seq_len = int(np.prod(grid)) // 4
    with torch.no_grad():
        want = reference([latents], torch.tensor([731]), [context], seq_len)[0]
    padded = np.zeros((1, TEXT_LEN, config.text_dim), dtype=np.float32)
    padded[0, :text_tokens] = context.numpy()
    got = model(channels_last(latents[None]), 731, mx.array(padded))
    assert relative_error(np.array(got).transpose(0, 4, 1, 2, 3)[0], want) < BOUND


@pytest.mark.parametrize("grid", [(1, 2, 2), (3, 6, 10), (2, 18, 4)])
@pytest.mark.parametrize("clean", [0, 1])
def test_timesteps_of_tokens(official_model, grid, clean):
    """Wan2.2 TI2V: 0 for the tokens of the given first frame, as the official loop makes them of its mask."""
    config = tiny_config(model_type="ti2v", in_dim=48, out_dim=48)
    reference = official_model.WanModel(model_type="ti2v", in_dim=48, out_dim=48, **TINY).eval()
    randomize(reference, seed=3)
    model = Transformer(config)
    load_state(model, reference.state_dict(), config.head_dim)
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(48, *grid, generator=generator)
    context = torch.randn(512, config.text_dim, generator=generator)
    mask = torch.ones(grid)
    mask[:clean] = 0
    timesteps = (mask[:, ::2, ::2] * 731).flatten()[None]
    theirs = diffusers_model(config, seed=0)
    theirs.load_state_dict(from_official(reference.state_dict(), theirs))
    with torch.no_grad():
        want = reference([latents], timesteps, [context], timesteps.shape[1])[0]
        other = theirs(latents[None], timesteps, context[None], return_dict=False)[0][0]
    got = model(channels_last(latents[None]), 731, to_mlx(context[None]), clean_frames=clean)
    assert relative_error(other, want) < BOUND
    assert relative_error(np.array(got).transpose(0, 4, 1, 2, 3)[0], want) < BOUND


def from_official(state: dict[str, torch.Tensor], theirs: WanTransformer3DModel) -> dict[str, torch.Tensor]:
    keys = theirs.state_dict()
    return {key: state[name] for name, key in canonical_keys(recognise(keys), keys).items()}


def diffusers_model(config: TransformerConfig, seed: int) -> WanTransformer3DModel:
    reference = diffusers_transformer(config)
    randomize(reference, seed)
    return reference


def official_state(reference: WanTransformer3DModel) -> dict[str, torch.Tensor]:
    state = reference.state_dict()
    return {name: state[source] for name, source in canonical_keys(recognise(state), state).items()}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", ["t2v", "i2v", "flf2v"])
def test_every_kind_diffusers(kind, batch):
    image = kind != "t2v"
    config = tiny_config(model_type=kind, in_dim=36 if image else 16, image_dim=40)
    reference = diffusers_model(config, seed=5)
    model = Transformer(config)
    load_state(model, official_state(reference), config.head_dim)
    generator = torch.Generator().manual_seed(6)
    latents = torch.randn(batch, config.in_dim, 3, 6, 10, generator=generator)
    context = torch.randn(batch, TEXT_LEN, config.text_dim, generator=generator)
    images = {"t2v": 0, "i2v": batch, "flf2v": 2 * batch}[kind]
    features = torch.randn(images, 257, config.image_dim, generator=generator) if image else None
    timestep = torch.tensor([250.0, 999.0][:batch])
    with torch.no_grad():
        want = reference(latents, timestep, context, encoder_hidden_states_image=features, return_dict=False)[0]
    got = model(
        channels_last(latents[:, :16]),
        timestep.tolist(),
        to_mlx(context),
        channels_last(latents[:, 16:]) if image else None,
        None if features is None else to_mlx(features),
    )
    assert relative_error(np.array(got).transpose(0, 4, 1, 2, 3), want) < BOUND


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_no_further_from_float32_than_diffusers(tmp_path, dtype):
    config = tiny_config(dim=96, ffn_dim=160, num_layers=4)
    reference = diffusers_model(config, seed=7)
    state = official_state(reference)
    generator = torch.Generator().manual_seed(8)
    latents = torch.randn(1, 16, 3, 8, 8, generator=generator)
    context = torch.randn(1, TEXT_LEN, config.text_dim, generator=generator)

    def ours(dtype):
        model = Transformer(config)
        load_state(model, state, config.head_dim)
        weights = [(k, v.astype(dtype_of("transformer", k, dtype))) for k, v in tree_flatten(model.parameters())]
        model.load_weights(weights)
        return np.array(model(channels_last(latents), 500.0, to_mlx(context))).transpose(0, 4, 1, 2, 3)

    def theirs(model, dtype):
        with torch.no_grad():
            out = model(latents.to(dtype), torch.tensor([500.0]), context.to(dtype), return_dict=False)[0]
        return out.float().numpy()

    exact = theirs(reference, torch.float32)
    reference.save_pretrained(tmp_path)  # reloaded as users do it, so that Diffusers keeps its own float32 parts
    narrow = getattr(torch, dtype)
    half = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=narrow).eval()
    want = np.sqrt(np.mean((theirs(half, narrow) - exact) ** 2))
    got = np.sqrt(np.mean((ours(getattr(mx, dtype)) - exact) ** 2))
    print(f"{dtype} rms error: ours {got:.3e}, diffusers {want:.3e}")
    assert got <= want


def test_tokens_in_chunks_equal_whole(monkeypatch):
    config = tiny_config()
    model = Transformer(config)
    load_state(model, official_state(diffusers_model(config, seed=9)), config.head_dim)
    mx.random.seed(0)
    latents, context = mx.random.normal((1, 3, 6, 10, 16)), mx.random.normal((1, TEXT_LEN, config.text_dim))
    whole = np.array(model(latents, 500.0, context))
    monkeypatch.setattr(attention_execution, "UNFUSED_SCORES", 2 * 512 * 3)
    assert relative_error(Execution(model, tokens_at_once=7)(latents, 500.0, context), whole) < 1e-6


@pytest.mark.parametrize("flop", [1, 4 * 45 * 24 * 5, 4 * 45 * 45 * 24, 1e12])
def test_attention_split_as_on_metal_equals_whole(monkeypatch, flop):
    monkeypatch.setattr(chips, "dispatch_flop", lambda: flop)
    monkeypatch.setattr(attention_execution, "has_fused_kernel", lambda *_: True)
    mx.random.seed(1)
    q, k, v = (mx.random.normal((1, 45, 3, 24)) for _ in range(3))
    heads_first = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    want = mx.fast.scaled_dot_product_attention(*heads_first, scale=24**-0.5).transpose(0, 2, 1, 3).flatten(2)
    assert relative_error(attention_execution.attention(q, k, v, Pacer()), want) < 1e-6


@pytest.mark.parametrize(
    "shape, context, message",
    [
        ((1, 1, 3, 4, 16), (1, 512, 24), "multiple of the patch"),
        ((1, 1, 4, 4, 15), (1, 512, 24), "15 channels"),
        ((1, 1, 4, 4, 16), (1, 511, 24), "expected \\(B, 512, 24\\)"),
    ],
)
def test_wrong_shapes_are_named(shape, context, message):
    with pytest.raises(ValueError, match=message):
        Transformer(tiny_config())(mx.zeros(shape), 1.0, mx.zeros(context))
