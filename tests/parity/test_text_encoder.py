"""The umT5 encoder against the official class and transformers: float32, tiny sizes, random weights."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from oracles import official, randomize, relative_error
from transformers import UMT5Config, UMT5EncoderModel

from wan_mlx.models.configs import TextEncoderConfig
from wan_mlx.models.text_encoder import TextEncoder, relative_buckets
from wan_mlx.weights.component import parameter_shapes

BOUND = 2e-5
CONFIG = TextEncoderConfig(vocab_size=96, dim=48, dim_attn=32, dim_ffn=80, num_heads=4, num_layers=3)
LENGTHS = (1, 7, 64, 512)
TEXT_LEN = 512


@pytest.fixture(autouse=True, scope="module")
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def reference():
    model = official("modules.t5").T5Encoder(
        CONFIG.vocab_size, CONFIG.dim, CONFIG.dim_attn, CONFIG.dim_ffn, CONFIG.num_heads, CONFIG.num_layers,
        CONFIG.num_buckets, shared_pos=False,
    )  # fmt: skip
    randomize(model.eval())
    return model


def ours(state: dict[str, torch.Tensor], dtype: mx.Dtype = mx.float32) -> TextEncoder:
    """An encoder over weights with the official names. Every key is used exactly once."""
    weights = [(name, mx.array(tensor.float().numpy()).astype(dtype)) for name, tensor in state.items()]
    encoder = TextEncoder(CONFIG)
    encoder.load_weights(weights, strict=True)
    return encoder


def prompt(length: int) -> list[int]:
    rng = np.random.default_rng(length)
    return [*rng.integers(2, CONFIG.vocab_size, size=length - 1).tolist(), 1]


def padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask as the official tokenizer gives them: zero-padded to 512."""
    ids = torch.tensor([p + [0] * (TEXT_LEN - len(p)) for p in prompts])
    lengths = torch.tensor([len(p) for p in prompts])
    return ids, (torch.arange(TEXT_LEN)[None] < lengths[:, None]).long()


def test_official_padded_masked_and_trimmed(reference):
    prompts = [prompt(length) for length in LENGTHS]
    expected = reference(*padded(prompts))
    for got, want, length in zip(ours(reference.state_dict())(prompts), expected, LENGTHS, strict=True):
        assert relative_error(got, want[:length]) <= BOUND, length


def test_bfloat16_is_no_further_from_float32_than_the_official_one(reference):
    prompts = [prompt(64), prompt(300)]
    state = {name: tensor.bfloat16() for name, tensor in reference.state_dict().items()}
    coarse = official("modules.t5").T5Encoder(
        CONFIG.vocab_size, CONFIG.dim, CONFIG.dim_attn, CONFIG.dim_ffn, CONFIG.num_heads, CONFIG.num_layers,
        CONFIG.num_buckets, shared_pos=False,
    ).eval().bfloat16()  # fmt: skip
    coarse.load_state_dict(state)
    theirs = coarse(*padded(prompts)).float()
    fine = ours(state)(prompts)
    for got, their, want in zip(ours(state, mx.bfloat16)(prompts), theirs, fine, strict=True):
        error = np.abs(np.asarray(got.astype(mx.float32)) - np.asarray(want))
        official_error = np.abs(their[: len(want)].numpy() - np.asarray(want))
        assert np.sqrt((error**2).mean()) <= 1.05 * np.sqrt((official_error**2).mean())


TRANSFORMERS_NAMES = {
    "layer.0.layer_norm.weight": "norm1.weight",
    "layer.0.SelfAttention.q.weight": "attn.q.weight",
    "layer.0.SelfAttention.k.weight": "attn.k.weight",
    "layer.0.SelfAttention.v.weight": "attn.v.weight",
    "layer.0.SelfAttention.o.weight": "attn.o.weight",
    "layer.0.SelfAttention.relative_attention_bias.weight": "pos_embedding.embedding.weight",
    "layer.1.layer_norm.weight": "norm2.weight",
    "layer.1.DenseReluDense.wi_0.weight": "ffn.gate.0.weight",
    "layer.1.DenseReluDense.wi_1.weight": "ffn.fc1.weight",
    "layer.1.DenseReluDense.wo.weight": "ffn.fc2.weight",
}


def test_transformers():
    model = UMT5EncoderModel(
        UMT5Config(
            vocab_size=CONFIG.vocab_size, d_model=CONFIG.dim, d_kv=CONFIG.dim_attn // CONFIG.num_heads,
            d_ff=CONFIG.dim_ffn, num_heads=CONFIG.num_heads, num_layers=CONFIG.num_layers,
            relative_attention_num_buckets=CONFIG.num_buckets, relative_attention_max_distance=CONFIG.max_distance,
            feed_forward_proj="gated-gelu",
        )
    ).eval()  # fmt: skip
    randomize(model)
    assert torch.equal(model.shared.weight, model.encoder.embed_tokens.weight)
    state = model.state_dict()
    renamed = {
        "token_embedding.weight": state.pop("shared.weight"),
        "norm.weight": state.pop("encoder.final_layer_norm.weight"),
    }
    state.pop("encoder.embed_tokens.weight")
    for name, tensor in state.items():
        _, _, index, rest = name.split(".", 3)
        renamed[f"blocks.{index}.{TRANSFORMERS_NAMES[rest]}"] = tensor
    prompts = [prompt(length) for length in LENGTHS]
    ids, mask = padded(prompts)
    expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
    for got, want, length in zip(ours(renamed)(prompts), expected, LENGTHS, strict=True):
        assert relative_error(got, want[:length]) <= BOUND, length


@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (16, 128), (32, 64), (8, 20)])
def test_every_relative_position(num_buckets, max_distance):
    embedding = official("modules.t5").T5RelativeEmbedding(num_buckets, 1, bidirectional=True, max_dist=max_distance)
    offset = torch.arange(512)[None] - torch.arange(512)[:, None]
    expected = embedding._relative_position_bucket(offset).numpy()
    np.testing.assert_array_equal(relative_buckets(512, num_buckets, max_distance), expected)


def test_full_size_names_and_shapes():
    module = official("modules.t5")
    with torch.device("meta"):
        model = module.umt5_xxl(encoder_only=True, return_tokenizer=False, device="meta")
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert parameter_shapes(TextEncoder(TextEncoderConfig())) == expected
