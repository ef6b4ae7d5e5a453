"""Weights in few bits in every dialect: the true weight is number × scale; what does not fit together is refused."""

import json

import mlx.core as mx
import numpy as np
import pytest
from arrays import relative_distance
from crafted import call, mapping, refusal, tensor, write_pth
from scaled_files import FORMS, e4m3, e5m2, json_tensor, stored, write

from wan_mlx.files.open import open_weights
from wan_mlx.files.scaled import fold
from wan_mlx.hub.resolve import resolve
from wan_mlx.models.configs import TransformerConfig
from wan_mlx.models.quantized_linear import QuantizedLinear
from wan_mlx.models.transformer import Transformer
from wan_mlx.weights.checkpoint import find_part, open_checkpoint
from wan_mlx.weights.component import ComponentWeights, parameter_shapes
from wan_mlx.weights.convert import convert
from wan_mlx.weights.inspect import inspect_source
from wan_mlx.weights.load import load_transformer
from wan_mlx.weights.quantize import quantizable

CODES = np.arange(12, 12 + 6 * 16).reshape(6, 16).astype(np.uint8)  # 0x0c … 0x6b: finite in both formats
ROWS = np.linspace(0.5, 3, 6).astype(np.float32)


def opened(path):
    return fold(open_weights(path))


W = ("F8_E4M3", CODES)
SCALAR = ("F32", np.float32(0.25))
FORMAT, E5M2, INT8 = (json_tensor({"format": name}) for name in ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise"))
INT8_WEIGHT = {"a.weight": ("I8", CODES), "a.weight_scale": SCALAR}
ROTATED = {"format": "int8_tensorwise", "convrot": True}
METADATA = {
    "_quantization_metadata": json.dumps({"format_version": "1.0", "layers": {"a": {"format": "float8_e4m3fn"}}})
}


@pytest.mark.parametrize("dtype, definition", [("F8_E4M3", e4m3), ("F8_E5M2", e5m2)])
def test_plain_fp8_is_exact(tmp_path, dtype, definition):
    codes = np.arange(256, dtype=np.uint8).reshape(16, 16)
    file = opened(write(tmp_path / "x.safetensors", {"a.weight": (dtype, codes), "b.weight": ("F16", ROWS)}))
    want = np.array([definition(code) for code in range(256)]).reshape(16, 16)
    assert np.array_equal(np.array(file.read("a.weight").astype(mx.float32)), want, equal_nan=True)
    rows = file.rows("a.weight", np.array([3, 9]))
    assert np.array_equal(np.array(rows.astype(mx.float32)), want[[3, 9]])
    assert file.tensors["a.weight"].dtype == dtype and file.read("b.weight").dtype == mx.float16


def test_a_file_without_fp8_stays_as_it_is(two):
    file = open_weights(two)
    assert fold(file) is file


@pytest.mark.parametrize("dtype, definition", [("F8_E4M3", e4m3), ("F8_E5M2", e5m2)])
@pytest.mark.parametrize(
    "scale",
    [np.float32(0.25), np.float32([0.25]), np.float32([[0.25]]), ROWS, ROWS[:, None]],
    ids=lambda s: str(s.shape),
)
@pytest.mark.parametrize("dialect", ["scale_weight", "weight_scale", "comfy_quant", "metadata"])
def test_scales_are_folded_in(tmp_path, dialect, scale, dtype, definition):
    name = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}[dtype]
    tensors = {"a.weight": (dtype, CODES), "a.bias": ("F32", ROWS)}
    tensors["a.scale_weight" if dialect == "scale_weight" else "a.weight_scale"] = "F32", scale
    metadata = None
    if dialect == "scale_weight":
        tensors |= {"scaled_fp8": (dtype, np.zeros(0)), "a.scale_input": SCALAR}
    elif dialect == "comfy_quant":
        tensors |= {
            "a.comfy_quant": json_tensor({"format": name, "full_precision_matrix_mult": True}),
            "a.input_scale": SCALAR,
        }
    elif dialect == "metadata":
        metadata = {"_quantization_metadata": json.dumps({"layers": {"a": {"format": name}}})}
    file = opened(write(tmp_path / "x.safetensors", tensors, metadata))
    assert list(file.tensors) == ["a.weight", "a.bias"]
    want = np.vectorize(definition)(CODES) * scale.reshape(-1, 1).astype(np.float64)
    got = file.read("a.weight")
    assert got.dtype == mx.float32 and np.array_equal(np.array(got), want.astype(np.float32))
    assert np.array_equal(np.array(file.rows("a.weight", np.array([5, 0, 5]))), want[[5, 0, 5]].astype(np.float32))
    assert np.array_equal(np.array(file.read("a.bias")), ROWS)


def test_convolutions_are_scaled_per_output_channel(tmp_path):
    tensors = {"a.weight": ("F8_E4M3", CODES.reshape(6, 2, 2, 2, 2)), "a.weight_scale": ("F32", ROWS)}
    want = np.vectorize(e4m3)(CODES) * ROWS[:, None]
    got = np.array(opened(write(tmp_path / "x.safetensors", tensors)).read("a.weight"))
    assert np.array_equal(got.reshape(6, 16), want.astype(np.float32))


def bad(**tensors):
    return {name.replace("__", "."): value for name, value in tensors.items()}


@pytest.mark.parametrize(
    "tensors, metadata, word",
    [
        (bad(a__weight=W, a__scale_weight=("F32", np.nan)), None, "a.scale_weight holds nan"),
        (bad(a__weight=W, a__scale_weight=("F32", np.inf)), None, "holds inf"),
        (bad(a__weight=W, a__weight_scale=("F32", -ROWS)), None, "holds -0.5"),
        (bad(a__weight=W, a__weight_scale=("F32", 0 * ROWS)), None, "holds 0.0"),
        (bad(a__weight=W, a__weight_scale=("F32", ROWS[:5])), None, "shape (5,)"),
        (bad(a__weight=W, a__weight_scale=("F32", np.ones((6, 2)))), None, "shape (6, 2)"),
        (bad(a__weight=W, a__weight_scale=("F32", np.ones(0))), None, "shape (0,)"),
        (bad(a__weight=W, a__weight_scale=("U8", np.ones(1))), None, "U8, expected a float"),
        (bad(a__weight=W, a__weight_scale=SCALAR, a__scale_weight=SCALAR), None, "two tensors for its scale"),
        (bad(a__weight=W, b__weight_scale=SCALAR), None, "b.weight, which the file lacks"),
        (bad(a__weight=("F32", ROWS), a__weight_scale=SCALAR), None, "which is F32"),
        (bad(a__weight=("U8", CODES), a__weight_scale=SCALAR), None, "which is U8"),
        (bad(a__weight=("I8", CODES), a__weight_scale=("F8_E8M0", CODES)), None, "is F8_E8M0, expected a float"),
        (bad(a__weight=W, a__weight_scale=SCALAR, b__weight=W), None, "no scale: b.weight"),
        (bad(a__weight=W, scaled_fp8=("F8_E4M3", np.zeros(0))), None, "no scale: a.weight"),
        (bad(a__weight=W, a__comfy_quant=json_tensor({"format": "convrot_w4a4"})), None, "stored as 'convrot_w4a4'"),
        (bad(a__weight=W, a__weight_scale=SCALAR, a__comfy_quant=INT8), None, "is declared I8, but"),
        (bad(a__weight=("I8", CODES), a__comfy_quant=INT8), None, "no scale: a.weight"),
        (bad(a__weight=W, a__comfy_quant=json_tensor({})), None, "stored as 'None'"),
        (bad(a__weight=W, a__comfy_quant=json_tensor([1])), None, "not a JSON object"),
        (bad(a__weight=W, a__comfy_quant=("U8", [123, 255])), None, "not a JSON object"),
        (bad(a__weight=W, a__comfy_quant=("F32", [1.0])), None, "expected JSON in U8"),
        (bad(a__weight=W, a__comfy_quant=("U8", np.zeros(5000))), None, "expected JSON in U8"),
        (bad(a__weight=W, a__weight_scale=SCALAR, a__comfy_quant=E5M2), None, "is declared F8_E5M2, but"),
        (bad(a__weight=W, a__weight_scale=SCALAR, a__weight_scale_2=SCALAR), None, "only nvfp4 has one"),
        (bad(a__weight=W, a__weight_scale=SCALAR, a___weight_zero_point=SCALAR), None, "only I8 has one"),
        (
            bad(a__weight=W, a__comfy_quant=json_tensor({"format": "float8_e4m3fn", "convrot": True})),
            None,
            "with 'convrot'",
        ),
        (INT8_WEIGHT | bad(a__comfy_quant=json_tensor(ROTATED | {"convrot_groupsize": 8})), None, "with 'convrot'"),
        (INT8_WEIGHT | bad(a__comfy_quant=json_tensor(ROTATED | {"convrot_groupsize": 16.0})), None, "with 'convrot'"),
        (bad(a__weight=W, a__comfy_quant=json_tensor({"format": [1]})), None, "stored as '[1]'"),
        (INT8_WEIGHT | bad(a__comfy_quant=json_tensor(ROTATED)), None, "cannot be rotated in groups of 256"),
        (bad(a__weight=W), {"_quantization_metadata": "{"}, "not a JSON object"),
        (bad(a__weight=W), {"_quantization_metadata": '{"layers": 3}'}, "dict of layers"),
        (bad(a__weight=W), {"_quantization_metadata": '{"layers": {"a": {"format": "mxfp8"}}}'}, "no scale: a.weight"),
        (bad(a__weight=W), {"_quantization_metadata": '{"layers": {"a": 3}}'}, "stored as 'None'"),
    ],
)
def test_scales_that_do_not_fit_are_refused(tmp_path, tensors, metadata, word):
    assert word in refusal(write(tmp_path / "x.safetensors", tensors, metadata), opened)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_reads_as_its_true_values(tmp_path, form):
    values = np.random.default_rng(0).standard_normal((160, 96)).astype(np.float32)
    tensors, want = stored("a", values, form)
    file = opened(write(tmp_path / "x.safetensors", tensors | {"a.bias": ("F32", ROWS)}))
    assert list(file.tensors) == ["a.weight", "a.bias"] and file.tensors["a.weight"].shape == (160, 96)
    assert 0 < np.abs(want - values).max() < 0.6  # what is stored is near the weight
    assert file.byte_range("a.weight") is None and file.byte_range("a.bias").nbytes == 24
    for read in (file.read, file.read_now):
        assert np.array_equal(np.array(read("a.weight").astype(mx.float32)), want)
    rows = np.array([159, 0, 159, 31, 130])
    assert np.array_equal(np.array(file.rows("a.weight", rows).astype(mx.float32)), want[rows])


def test_block_scales_as_old_files_store_them(tmp_path):
    for form in ("mxfp8", "nvfp4"):
        tensors, want = stored("a", np.random.default_rng(1).standard_normal((32, 64)).astype(np.float32), form)
        tensors["a.weight_scale"] = "U8", tensors["a.weight_scale"][1]
        tensors["a.comfy_quant"] = json_tensor({"format": form, "group_size": {"mxfp8": 32, "nvfp4": 16}[form]})
        file = opened(write(tmp_path / "x.safetensors", tensors))
        assert np.array_equal(np.array(file.read("a.weight").astype(mx.float32)), want)


def test_a_scale_of_1_of_plain_floats_means_nothing(tmp_path):
    """Some files of scaled fp8 have such scales for the layers left in float16; any other number is refused."""
    tensors = {"a.weight": W, "a.scale_weight": SCALAR}
    tensors |= {"b.weight": ("F16", CODES), "b.scale_weight": ("F32", np.ones(()))}
    file = opened(write(tmp_path / "x.safetensors", tensors))
    assert list(file.tensors) == ["a.weight", "b.weight"] and file.read("b.weight").dtype == mx.float16
    assert np.array_equal(np.array(file.read("b.weight")), CODES)
    tensors["b.scale_weight"] = SCALAR
    assert "scale of b.weight, which is F16" in refusal(write(tmp_path / "x.safetensors", tensors), opened)


@pytest.mark.parametrize("settings", [{"convrot": True, "convrot_groupsize": 16}, {"params": {"convrot": True}}])
def test_rotated_int8_is_rotated_back(tmp_path, settings):
    group, four = settings.get("convrot_groupsize", 256), (np.ones((4, 4)) - 2 * np.eye(4)[::-1]) / 2
    matrix = four
    while len(matrix) < group:
        matrix = np.kron(matrix, four)
    values = np.random.default_rng(2).standard_normal((6, 512)).astype(np.float32)
    tensors, rounded = stored("a", (values.reshape(6, -1, group) @ matrix.T).reshape(6, 512), "int8 rows")
    tensors["a.comfy_quant"] = json_tensor({"format": "int8_tensorwise", **settings})
    file = opened(write(tmp_path / "x.safetensors", tensors))
    got = np.array(file.read("a.weight"))
    assert np.abs(got - (rounded.reshape(6, -1, group) @ matrix).reshape(6, 512)).max() < 2e-6
    assert 0 < np.abs(got - values).max() < 0.1
    assert np.array_equal(np.array(file.rows("a.weight", np.array([5, 2]))), got[[5, 2]])


def test_biases_and_norms_of_a_scaled_file_are_plain(tmp_path):
    """ComfyUI's ModelSave makes them fp8 too, without scales."""
    vector = "F8_E4M3", CODES[0]
    tensors = {"a.weight": W, "a.weight_scale": SCALAR, "a.bias": vector, "norm.weight": vector}
    tensors["modulation"] = "F8_E4M3", CODES.reshape(1, 6, 16)
    file = opened(write(tmp_path / "x.safetensors", tensors | {"scaled_fp8": ("F8_E4M3", np.zeros(0))}))
    for key in ("a.bias", "norm.weight"):
        assert np.array_equal(np.array(file.read(key).astype(mx.float32)), [e4m3(code) for code in CODES[0]])
    assert file.read("modulation").shape == (1, 6, 16)


CONFIG = TransformerConfig(dim=128, ffn_dim=96, num_heads=1, num_layers=2, freq_dim=32, text_dim=32)
SHAPES = parameter_shapes(Transformer(CONFIG))


def transformer(path, form):
    """A transformer with the blocks' matrices in ``form``; and one with their true values."""
    rng, tensors, true, packable = np.random.default_rng(0), {}, {}, quantizable("transformer", SHAPES)
    for name, shape in SHAPES.items():
        values = rng.standard_normal(shape).astype(np.float32) * 0.1
        if name in packable:
            parts, values = stored(name.removesuffix(".weight"), values, form)
            tensors |= parts
        else:
            values = values.reshape(128, 16, 1, 2, 2) if name == "patch_embedding.weight" else values
            tensors[name] = "F32", values
        true[name] = "F32", values
    return write(path / f"{form}.safetensors", tensors), write(path / "true.safetensors", true)


def velocity(model):
    rng = np.random.default_rng(5)
    latents, context = rng.standard_normal((1, 2, 4, 4, 16)), rng.standard_normal((1, 512, 32))
    return model(mx.array(latents.astype(np.float32)), 400.0, mx.array(context.astype(np.float32)))


@pytest.mark.parametrize("form", FORMS)
def test_a_transformer_of_every_form(tmp_path, form):
    """Its forward is that of the true values; streamed it is the same, bit for bit."""
    path, true = transformer(tmp_path, form)
    model, streamed = (load_transformer(path, "float32", stream=stream) for stream in (False, True))
    assert isinstance(model.blocks[0].ffn[0], QuantizedLinear) == (form == "mxfp8")
    got = velocity(model)
    assert mx.array_equal(velocity(streamed), got)
    assert relative_distance(got, velocity(load_transformer(true, "float32"))) < 2e-6
    assert mx.array_equal(velocity(load_transformer(path, "float32", quantize="none")), got) or form == "mxfp8"
    kinds = {"fp8": "F8_E4M3 20 tensors, one scale per tensor", "int8": "I8 20 tensors, one scale per tensor",
             "mxfp8": "mxfp8 20 tensors", "nvfp4": "nvfp4 20 tensors"}  # fmt: skip
    rows = f"{'I8' if 'int8' in form else 'F8_E4M3'} 20 tensors, one scale per row"
    assert ("", f"quantised: {kinds.get(form, rows)}") in inspect_source(path).rows


@pytest.mark.parametrize("form", ["mxfp8", "nvfp4", "int8 rows", "torchao int8"])
def test_converted_with_a_lora_and_packed_anew(tmp_path, form):
    path, _ = transformer(tmp_path, form)
    folder = convert(open_checkpoint(resolve("nano"), {"transformer": path}), tmp_path / "mlx", dtype="float32")
    packed = json.loads((folder / "config.json").read_text()).get("quantization", {})
    assert packed.get("transformer") == ("mxfp8" if form == "mxfp8" else None)
    want = velocity(load_transformer(path, "float32"))
    assert mx.array_equal(velocity(load_transformer(folder, "float32")), want)
    rng = np.random.default_rng(1)
    pair = {"A": rng.standard_normal((2, 128)), "B": rng.standard_normal((96, 2)) * 0.1}
    lora = {f"blocks.1.ffn.0.lora_{end}.weight": mx.array(array.astype(np.float32)) for end, array in pair.items()}
    mx.save_safetensors(str(tmp_path / "l.safetensors"), lora)
    loras = tmp_path / "l.safetensors"
    with_lora = [velocity(load_transformer(place, "float32", loras=loras)) for place in (path, folder)]
    assert relative_distance(*with_lora) < 2e-6 < 1e-3 < relative_distance(with_lora[0], want)
    assert 1e-4 < relative_distance(velocity(load_transformer(path, "float32", quantize="q8-g32")), want) < 0.05


MX, NV = (stored("a", np.ones((32, 64), np.float32), form)[0] for form in ("mxfp8", "nvfp4"))
TORCHAO = stored("a", np.ones((6, 16), np.float32), "torchao int8")[0]


@pytest.mark.parametrize(
    "tensors, metadata, word",
    [
        (MX | bad(a__weight_scale=("F8_E8M0", np.zeros((32, 2)))), None, "scales of shape (128, 4)"),
        (MX | bad(a__weight=("F8_E4M3", np.zeros((32, 48)))), None, "whole groups of 32"),
        (NV | bad(a__weight_scale_2=("F32", np.zeros(2))), None, "a.weight_scale_2 is F32 (2,); expected 1 numbers"),
        (NV | bad(a__weight_scale_2=("F32", np.nan)), None, "a.weight_scale_2 holds nan"),
        ({key: value for key, value in NV.items() if "_2" not in key}, None, "is the F8_E4M3 scale of a.weight"),
        (MX | bad(a__comfy_quant=json_tensor({"format": "mxfp8", "group_size": 64})), None, "with 'group_size'"),
        (TORCHAO | bad(a___weight_zero_point=("I8", np.zeros(3))), None, "expected 6 numbers for a.weight"),
        ({key: value for key, value in TORCHAO.items() if "scale" not in key}, None, "no scale: a._weight_qdata"),
        (TORCHAO, {"a.weight": '{"_type": "Int4Tensor"}'}, "a.weight is a torchao 'Int4Tensor'"),
        (TORCHAO | bad(a__weight=W), None, "a.weight is stored twice, also as a._weight_qdata"),
        (bad(a__weight=("U8", CODES), a__weight__absmax=SCALAR), None, "bitsandbytes' nf4, fp4 or int8"),
        (bad(a__weight=("I8", CODES), a__SCB=("F32", ROWS)), None, "bitsandbytes' nf4, fp4 or int8"),
        (bad(a__weight___data___data=W, a__weight___shift=SCALAR), None, "optimum-quanto's int4 or int2"),
        (bad(a__weight=("U8", CODES), a__weight_global_scale=SCALAR), None, "lightx2v's nvfp4"),
        (bad(a__qweight=("U8", CODES)), None, "GPTQ's, AWQ's or Nunchaku's"),
    ],
)
def test_other_forms_are_refused_by_name(tmp_path, tensors, metadata, word):
    message = refusal(write(tmp_path / "x.safetensors", tensors, metadata), opened)
    assert word in message


def folder_of(tmp_path, config, tensors=None):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel", **config}))
    write(tmp_path / "diffusion_pytorch_model.safetensors", tensors or {"a.weight": ("F32", ROWS)})
    return tmp_path


@pytest.mark.parametrize(
    "entry, word",
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantised by 'bitsandbytes'"),
        ({"quant_method": "quanto", "weights_dtype": "int4"}, "quantised by 'quanto int4'"),
        ({"quant_method": "quanto", "weights": "int2", "activations": None}, "quantised by 'quanto int2'"),
        ({"quant_method": "modelopt"}, "expected quanto or torchao, int8 or float8"),
        ({"load_in_4bit": True}, "quantised by 'None'"),
    ],
)
def test_a_folder_quantised_by_another_tool(tmp_path, entry, word):
    folder = folder_of(tmp_path, {"quantization_config": entry})
    assert word in refusal(folder / "config.json", lambda _: find_part(folder, "transformer"))


@pytest.mark.parametrize("entry", [{"quant_method": "torchao"}, {"quant_method": "quanto", "weights": "int8"}, None])
def test_a_folder_whose_weights_are_refused_says_why(tmp_path, entry):
    """Its config.json is fine, its file is not."""
    tensors = {"a.weight": ("U8", CODES), "a.weight.absmax": SCALAR}
    folder = folder_of(tmp_path, {"quantization_config": entry}, tensors)
    assert "bitsandbytes' nf4" in refusal(folder, lambda _: find_part(folder, "transformer"))


def test_pickled_tensor_classes_are_refused_by_name(tmp_path):
    """As torch.save writes torchao's."""
    item = call("torch._tensor", "_rebuild_from_type_v2", tensor())
    message = refusal(write_pth(tmp_path / "x.bin", mapping(a=item)))
    assert "such as torchao's" in message and "safe_serialization=True" in message


def test_integers_are_no_weights(tmp_path):
    """int8 without a scale beside it would be cast to a wrong picture."""
    keys = ("patch_embedding.weight", "blocks.0.self_attn.q.weight", "head.modulation")
    tensors = {key: ("F16", CODES.reshape(6, 4, 1, 2, 2) if "patch" in key else CODES) for key in keys} | {
        "blocks.0.self_attn.k.weight": ("I8", CODES)
    }
    path = write(tmp_path / "x.safetensors", tensors)
    assert "self_attn.k.weight of dtype I8" in refusal(path, lambda p: ComponentWeights(open_weights(p)))
