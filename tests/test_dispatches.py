"""No dispatch is longer than half a second on the Mac at hand, whatever the model; in pieces the result is the same.

No Mac is here: its name is faked, and the graph of a true size is built and never computed.
"""

from __future__ import annotations

import json

import mlx.core as mx
import pytest
from test_execution import CONFIGS, filled, inputs, transformer

from wan_mlx.models import attention_execution, chips, kernels, pieces
from wan_mlx.models.attention import SelfAttention
from wan_mlx.models.configs import TransformerConfig, VAEConfig
from wan_mlx.models.execution import Execution
from wan_mlx.models.layers import Linear
from wan_mlx.models.networks import new_transformer
from wan_mlx.models.pieces import Pacer
from wan_mlx.models.quantized_linear import QuantizedLinear
from wan_mlx.models.rope import rope_table
from wan_mlx.models.vae import VAE
from wan_mlx.models.vae_execution import VAEExecution
from wan_mlx.presets import PRESETS

MACS = ("Apple M1", "Apple M2 Max", "Apple M4 Max", "Apple M5")


@pytest.fixture
def mac(monkeypatch):
    """``mac(name)``: the GPU is this chip's, as far as its name goes."""
    chips.measured.cache_clear()

    def is_called(name: str) -> None:
        monkeypatch.setattr(mx.metal, "is_available", lambda: True)
        monkeypatch.setattr(mx, "device_info", lambda *_: {"device_name": name})

    yield is_called
    chips.measured.cache_clear()


@pytest.fixture
def dispatches(monkeypatch):
    """(name, FLOP) of every product, attention and convolution of a graph that is built and not computed."""
    found: list[tuple[str, float]] = []
    attend, convolve = mx.fast.scaled_dot_product_attention, mx.conv2d

    def noting(call):
        def multiply(layer, x):
            y = call(layer, x)
            found.append(("product", 2.0 * x.size * y.shape[-1]))
            return y

        return multiply

    def attention(q, k, v, **options):
        found.append(("attention", 4.0 * q.size * k.shape[2]))
        return attend(q, k, v, **options)

    def convolution(x, weight, *args, **options):
        y = convolve(x, weight, *args, **options)
        found.append(("convolution", 2.0 * y.size * weight.size / len(weight)))
        return y

    for kind in (Linear, QuantizedLinear):
        monkeypatch.setattr(kind, "__call__", noting(kind.__call__))
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(mx, "conv2d", convolution)
    monkeypatch.setattr(mx, "eval", lambda *arrays: None)
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: None)
    monkeypatch.setattr(attention_execution, "has_fused_kernel", lambda *_: True)
    return found


def one_block(config: TransformerConfig, tokens: int) -> None:
    """Build the graph of a block, and of VACE's, with this many tokens."""
    small = TransformerConfig(**{**vars(config), "num_layers": 1, "vace_layers": config.vace_layers[:1]})
    model, (t, h, w) = new_transformer(small), (21, 90, 2 * tokens // (21 * 45))
    more = {"vace_context": mx.zeros((1, t, h, w, small.vace_in_dim))} if small.vace_layers else {}
    latents, context = mx.zeros((1, t, h, w, small.out_dim)), mx.zeros((1, small.text_len, small.text_dim))
    Execution(model, tokens_at_once=8192)(latents, 500.0, context, **more)


@pytest.mark.parametrize("name", MACS)
@pytest.mark.parametrize("preset", ["t2v-14B", "vace-14B"])
def test_no_dispatch_of_14b_in_720p_takes_half_a_second(mac, dispatches, name, preset):
    mac(name)
    one_block(PRESETS[preset].transformer, 75_600)
    kinds = {kind: max(flop for found, flop in dispatches if found == kind) for kind in ("product", "attention")}
    seconds = {kind: flop / chips.published_rate(name) for kind, flop in kinds.items()}
    print(name, preset, seconds)
    assert 0.05 < min(seconds.values()) <= max(seconds.values()) <= 0.5
    assert sum(flop for _, flop in dispatches) > 1.5e14  # all of the block was seen


@pytest.mark.parametrize("name", MACS)
def test_no_dispatch_of_the_vae_in_720p_takes_half_a_second(mac, dispatches, name):
    mac(name)
    for _ in VAEExecution(VAE(VAEConfig())).decode(mx.zeros((1, 2, 90, 160, 16))):
        pass
    worst = max(flop for _, flop in dispatches)
    assert {"convolution"} <= {kind for kind, _ in dispatches} and worst / chips.published_rate(name) <= 0.5


def test_without_metal_nothing_is_cut(dispatches, monkeypatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    one_block(PRESETS["t2v-14B"].transformer, 75_600)
    assert chips.dispatch_flop() == 1e18
    products = sorted({flop for kind, flop in dispatches if kind == "product"})
    assert 2.0 * 75_600 * 5120**2 in products  # queries of all tokens at once, as ever
    assert [flop for kind, flop in dispatches if kind == "attention"][0] == 4.0 * 75_600**2 * 5120


@pytest.mark.parametrize("limit", [1, 2 * 48 * 48 * 7, 2 * 48 * 80 * 20, 4 * 45 * 45 * 24])
@pytest.mark.parametrize("kind", CONFIGS)
def test_execution_in_small_dispatches_equals_plain(monkeypatch, kind, limit):
    monkeypatch.setattr(attention_execution, "has_fused_kernel", lambda *_: True)
    model, arguments = transformer(kind), inputs(kind, (3, 6, 10))
    plain = model(*arguments)
    monkeypatch.setattr(chips, "dispatch_flop", lambda: limit)
    assert mx.array_equal(Execution(model)(*arguments), plain)
    assert mx.array_equal(Execution(model, tokens_at_once=20)(*arguments), plain)


def test_pieces_are_alike_and_paced(monkeypatch):
    paced = []
    monkeypatch.setattr(chips, "dispatch_flop", lambda: 2 * 6 * 4 * 10)
    linear, x = filled(Linear(6, 4)), mx.random.normal((1, 21, 6))
    got = pieces.in_dispatches(linear, x, paced.append)
    assert mx.array_equal(got, linear(x)) and [part.shape[1] for part in paced] == [7, 7, 7]


def test_dispatches_hold_no_more_memory(monkeypatch):
    """Joined pieces are as large as a projection and its rotation."""
    config = TransformerConfig("t2v", dim=96, ffn_dim=96, num_heads=2, num_layers=1)
    layer, table = filled(SelfAttention(config)), rope_table((4, 24, 32), 48)

    def peak(limit: float) -> int:
        monkeypatch.setattr(chips, "dispatch_flop", lambda: limit)
        x, pace = mx.random.normal((1, 3072, 96)), Pacer(1024)
        mx.eval(x, table)
        mx.clear_cache(), mx.reset_peak_memory()
        heads = attention_execution.queries_keys_values(layer, x, table, pace)
        pace.finish()
        return mx.get_peak_memory() - sum(a.nbytes for a in (x, *heads))

    assert 0 < peak(2.0 * 96 * 96 * 500) <= peak(1e18) + 3072 * 96 * 4 // 4


@pytest.mark.parametrize(
    "name, teraflops",
    [
        ("Apple M1", 2.275), ("Apple M2 Max", 10.737), ("Apple M4 Max", 13.76), ("Apple M5", 3.232),
        ("Apple M9 Max", 7.8), ("Apple M9", 2.275), ("Apple Paravirtual device", 2.275),
    ],
)  # fmt: skip
def test_the_limit_is_a_quarter_second_at_the_published_rate(mac, name, teraflops):
    """Of the smallest GPU of that name, and of an unknown one of the slowest of its kind."""
    mac(name)
    assert chips.dispatch_flop() == pytest.approx(0.25e12 * teraflops, rel=1e-3)


def test_the_measured_rate_counts_once_there_is_one(mac):
    mac("Apple M2 Max")
    chips.keep_measured({"matmul": 8.0, "attention": 6.0}, ["gelu_tanh 8960 bfloat16"])
    assert chips.dispatch_flop() == 0.25 * 6e12 and chips.measured()["slower"] == {"gelu_tanh 8960 bfloat16"}
    mac("Apple M1")  # the folder came from another Mac
    chips.measured.cache_clear()
    assert chips.dispatch_flop() == pytest.approx(0.25 * 2.275e12) and not chips.measured()["slower"]


@pytest.mark.parametrize("spoiled", ["", "[]", "no", '{"of": 1}', '{"of": "%s", "tflops": {"a": 0}, "slower": []}'])
def test_a_spoiled_record_is_none(mac, spoiled):
    mac("Apple M1")
    chips.keep_measured({"matmul": 8.0}, [])
    text = spoiled.replace('"%s"', json.dumps(chips._identity()))
    (chips.cache_folder() / chips.RECORD).write_text(text)
    chips.measured.cache_clear()
    assert chips.dispatch_flop() == pytest.approx(0.25 * 2.275e12)


def test_a_kernel_that_is_slower_here_is_not_used(mac, monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    mac("Apple M1")
    chips.keep_measured({}, ["gelu_tanh 96 float32"])
    monkeypatch.setattr(kernels.gelu_tanh, "kernel", kernels.gelu_tanh.plain)
    kernels.agrees.cache_clear()
    assert not kernels.gelu_tanh.usable(mx.zeros((1, 2, 96)))
    assert kernels.gelu_tanh.usable(mx.zeros((1, 2, 192)))
    kernels.agrees.cache_clear()
