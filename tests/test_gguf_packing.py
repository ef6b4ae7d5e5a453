"""GGUF's blocks as MLX's packed weights: the same numbers, or as near as said."""

import json

import mlx.core as mx
import numpy as np
import pytest
from arrays import relative_distance
from crafted_gguf import GGML, SCALES, blocks, write_gguf
from mlx.utils import tree_flatten

from wan_mlx.errors import WeightsError
from wan_mlx.hub.resolve import resolve
from wan_mlx.models.configs import TransformerConfig
from wan_mlx.models.layers import Linear
from wan_mlx.models.quantized_linear import Packing, QuantizedLinear
from wan_mlx.models.transformer import Transformer
from wan_mlx.weights.checkpoint import open_checkpoint
from wan_mlx.weights.component import open_component
from wan_mlx.weights.convert import convert
from wan_mlx.weights.gguf_blocks import EXACT, NEARLY_EXACT, PACKINGS, _pack, repack
from wan_mlx.weights.load import load_transformer
from wan_mlx.weights.quantize import quantizable

quants = pytest.importorskip("gguf.quants")


def numbers(raw, kind):
    """As ggml's own Python code unpacks them."""
    from gguf import GGMLQuantizationType

    return quants.dequantize(raw, GGMLQuantizationType[kind])


@pytest.mark.parametrize("kind", EXACT)
def test_exact_types_keep_every_number(kind):
    raw = blocks(kind, 24, 256)
    packing = Packing.parse(PACKINGS[kind])
    arrays = repack(raw, kind)
    assert {key: (array.shape, array.dtype) for key, array in arrays.items()} == packing.shapes((24, 256))
    assert np.array_equal(np.array(packing.unpack(arrays, mx.float32)), numbers(raw, kind))


@pytest.mark.parametrize("kind", NEARLY_EXACT)
def test_k_types_but_for_the_rounding_of_scales(kind):
    raw = blocks(kind, 24, 512)
    got, want = Packing.parse(PACKINGS[kind]).unpack(repack(raw, kind), mx.float32), numbers(raw, kind)
    # Of scale and bias, each to float16; the two may be much larger than their sum.
    assert np.abs(np.array(got) - want).max() < 2**-11 * 2 * np.abs(want).max()
    assert np.linalg.norm(got - want) < 4e-4 * np.linalg.norm(want)


@pytest.mark.parametrize("bits", [4, 5, 8])
def test_integers_lie_as_mlx_packs_them(bits):
    integers = np.random.default_rng(bits).integers(0, 2**bits, (6, 64), np.uint8)
    ones = mx.ones((6, 2), mx.float16)
    unpacked = mx.dequantize(mx.array(_pack(integers, bits)), ones, 0 * ones, 32, bits)
    assert np.array_equal(np.array(unpacked), integers)


@pytest.mark.parametrize("kind", [*EXACT, *NEARLY_EXACT])
@pytest.mark.parametrize("number", [np.nan, np.inf, 6e4])
def test_scales_that_are_not_finite_are_refused(kind, number):
    raw = blocks(kind, 2, 256)
    for at in SCALES[kind]:
        raw[1, at : at + 2] = np.array([number], np.float16).view(np.uint8)
    if kind in ("Q4_1", "Q5_1") and np.isfinite(number):
        return  # nothing is multiplied
    with pytest.raises(WeightsError, match=f"a {kind} block holds a scale that is not finite or too large"):
        repack(raw, kind)


CONFIG = TransformerConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=2, freq_dim=32, text_dim=64)
NAMES = {name: tuple(array.shape) for name, array in tree_flatten(Transformer(CONFIG).parameters())}


def write(path, kinds, damaged=None):
    """A transformer whose blocks' matrices are of these types in turn, the rest float32; scaled to be well-behaved.

    The first scale of ``damaged`` is NaN.
    """
    rng = np.random.default_rng(0)
    packable, tensors = quantizable("transformer", NAMES), []
    for index, (name, shape) in enumerate(NAMES.items()):
        kind = kinds[index % len(kinds)] if name in packable else "F32"
        if kind == "F32":
            torch_shape = (256, 16, 1, 2, 2) if name == "patch_embedding.weight" else shape
            tensors.append((name, torch_shape, kind, (rng.standard_normal(torch_shape) * 0.05).astype(np.float32)))
            continue
        raw = blocks(kind, *shape, seed=index)
        scale = 0.05 / numbers(raw, kind).std()
        flat = raw.reshape(-1, GGML[kind][2])
        for at in SCALES[kind]:
            old = np.ascontiguousarray(flat[:, at : at + 2]).view(np.float16).astype(np.float32)
            flat[:, at : at + 2] = (old * scale).astype(np.float16).view(np.uint8)
        if name == damaged:
            flat[0, SCALES[kind][0] : SCALES[kind][0] + 2] = np.array([np.nan], np.float16).view(np.uint8)
        tensors.append((name, shape, kind, flat.reshape(raw.shape)))
    return write_gguf(path, tensors)


def velocity(model):
    rng = np.random.default_rng(5)
    latents, context = rng.standard_normal((1, 2, 4, 4, 16)), rng.standard_normal((1, 512, 64))
    return model(mx.array(latents.astype(np.float32)), 400.0, mx.array(context.astype(np.float32)))


def layers(model):
    return [block.ffn[0] for block in model.blocks]


# How far a forward may be from that with the file's own numbers, packed in the nearest form.
NEAREST_ERROR = {**dict.fromkeys(PACKINGS, 0.05), **dict.fromkeys(EXACT, 2e-6), **dict.fromkeys(NEARLY_EXACT, 1e-3)}


@pytest.mark.parametrize("kind", SCALES)
def test_a_forward_with_every_type(tmp_path, kind):
    path = write(tmp_path / "m.gguf", [kind])
    unpacked, kept, nearest = (load_transformer(path, "float32", quantize=q) for q in ("none", None, "nearest"))
    assert all(type(layer) is Linear for layer in layers(unpacked))
    assert all(type(layer) is (QuantizedLinear if kind in EXACT else Linear) for layer in layers(kept))
    assert all(type(layer) is QuantizedLinear for layer in layers(nearest))
    want = velocity(unpacked)
    assert relative_distance(velocity(kept), want) < 2e-6
    assert relative_distance(velocity(nearest), want) < NEAREST_ERROR[kind]
    if NEAREST_ERROR[kind] == 0.05:  # quantised again
        assert relative_distance(velocity(nearest), want) > 1e-4


def test_a_mixed_file_and_a_mode_asked_for(tmp_path):
    path = write(tmp_path / "m.gguf", ["Q4_K", "Q6_K", "Q8_0"])
    weights = open_component(path, "transformer")
    assert len(set(weights.packable.values())) == 1 and len(set(weights.nearest.values())) == 2
    model = load_transformer(path, "float32", quantize="q6")
    assert {layer.packing.name for block in model.blocks for layer in (block.ffn[0], block.self_attn.q)} == {"q6"}
    assert 0.001 < relative_distance(velocity(model), velocity(load_transformer(path, "float32"))) < 0.1


def test_a_stored_form_that_is_asked_for_is_not_rounded_again(tmp_path):
    path = write(tmp_path / "m.gguf", ["Q8_0"])
    kept, asked = (load_transformer(path, quantize=q) for q in (None, "q8-g32"))
    for (name, a), (_, b) in zip(tree_flatten(kept.parameters()), tree_flatten(asked.parameters()), strict=True):
        assert mx.array_equal(a, b), name


def test_streamed_and_with_a_lora(tmp_path):
    path = write(tmp_path / "m.gguf", ["Q4_K", "Q5_1"])
    rng = np.random.default_rng(1)
    pair = {
        f"blocks.1.ffn.2.lora_{n}.weight": rng.standard_normal(s) * 0.1 for n, s in (("A", (2, 512)), ("B", (256, 2)))
    }
    mx.save_safetensors(str(tmp_path / "l.safetensors"), {k: mx.array(v.astype(np.float32)) for k, v in pair.items()})
    for quantize in (None, "nearest", "none"):
        options = dict(quantize=quantize, loras=tmp_path / "l.safetensors")
        streamed, resident = (velocity(load_transformer(path, "float32", stream=s, **options)) for s in (True, False))
        assert relative_distance(streamed, resident) < 2e-5
        assert relative_distance(resident, velocity(load_transformer(path, "float32", quantize=quantize))) > 1e-3


def test_a_damaged_block_is_named(tmp_path):
    name = "blocks.1.ffn.0.weight"
    path = write(tmp_path / "m.gguf", ["Q8_0"], damaged=name)
    for quantize in (None, "none", "q4"):
        with pytest.raises(WeightsError, match=f"{name}.* not finite"):
            load_transformer(path, quantize=quantize)


def test_the_converter_keeps_packed_weights(tmp_path):
    path = write(tmp_path / "m.gguf", ["Q8_0", "Q4_1", "Q4_K"])
    source = open_checkpoint(resolve("nano"), {"transformer": path})
    folder = convert(source, tmp_path / "kept", dtype="float32")
    assert json.loads((folder / "config.json").read_text())["quantization"] == {"transformer": "q4-g32+q8-g32"}
    for quantize, converted in ((None, folder), ("nearest", convert(source, tmp_path / "near", quantize="nearest"))):
        direct, again = load_transformer(path, quantize=quantize), load_transformer(converted)
        for (name, a), (_, b) in zip(tree_flatten(direct.parameters()), tree_flatten(again.parameters()), strict=True):
            assert a.dtype == b.dtype and mx.array_equal(a, b), name
