"""fp8 in every dialect: the true weight is fp8 × scale, and what does not fit together is refused."""

import json

import mlx.core as mx
import numpy as np
import pytest
from crafted import entry, refusal, write_safetensors

from wan_mlx.files.fp8 import fold
from wan_mlx.files.open import open_weights
from wan_mlx.weights.component import ComponentWeights

DTYPES = {"F32": np.float32, "F16": np.float16, "U8": np.uint8, "I8": np.int8, "F8_E4M3": np.uint8, "F8_E5M2": np.uint8}
CODES = np.arange(12, 12 + 6 * 16).reshape(6, 16).astype(np.uint8)  # 0x0c … 0x6b: finite in both formats
ROWS = np.linspace(0.5, 3, 6).astype(np.float32)


def e4m3(code: int) -> float:
    """The value by the format's definition: bias 7, no infinities, NaN only at all ones."""
    code = int(code)
    sign, exponent, mantissa = -1 if code & 128 else 1, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def e5m2(code: int) -> float:
    code = int(code)
    sign, exponent, mantissa = -1 if code & 128 else 1, code >> 2 & 31, code & 3
    if exponent == 31:
        return sign * float("inf") if mantissa == 0 else float("nan")
    return sign * (mantissa / 4 * 2**-14 if exponent == 0 else (1 + mantissa / 4) * 2.0 ** (exponent - 15))


def write(path, tensors, metadata=None):
    """``tensors``: name → (dtype, array)."""
    header, data = {"__metadata__": metadata} if metadata else {}, b""
    for name, (dtype, array) in tensors.items():
        raw = np.asarray(array, DTYPES[dtype])
        header[name] = entry(dtype, list(raw.shape), len(data), len(data) + raw.nbytes)
        data += raw.tobytes()
    return write_safetensors(path, header, data)


def opened(path):
    return fold(open_weights(path))


def json_tensor(value) -> tuple[str, np.ndarray]:
    return "U8", np.frombuffer(json.dumps(value).encode(), np.uint8)


W = ("F8_E4M3", CODES)
SCALAR = ("F32", np.float32(0.25))
FORMAT = json_tensor({"format": "float8_e4m3fn"})
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
        (bad(a__weight=W, a__weight_scale=SCALAR, a__scale_weight=SCALAR), None, "two scales"),
        (bad(a__weight=W, b__weight_scale=SCALAR), None, "b.weight, which the file lacks"),
        (bad(a__weight=("F32", ROWS), a__weight_scale=SCALAR), None, "which is F32"),
        (bad(a__weight=("I8", CODES), a__weight_scale=SCALAR), None, "which is I8"),
        (bad(a__weight=W, a__weight_scale=SCALAR, b__weight=W), None, "no scale: b.weight"),
        (bad(a__weight=W, scaled_fp8=("F8_E4M3", np.zeros(0))), None, "no scale: a.weight"),
        (bad(a__weight=W, a__comfy_quant=json_tensor({"format": "nvfp4"})), None, "stored as 'nvfp4'"),
        (
            bad(a__weight=("I8", CODES), a__comfy_quant=json_tensor({"format": "int8_tensorwise"})),
            None,
            "int8_tensorwise",
        ),
        (bad(a__weight=W, a__comfy_quant=json_tensor({})), None, "stored as 'None'"),
        (bad(a__weight=W, a__comfy_quant=json_tensor([1])), None, "not a JSON object"),
        (bad(a__weight=W, a__comfy_quant=("U8", [123, 255])), None, "not a JSON object"),
        (bad(a__weight=W, a__comfy_quant=("F32", [1.0])), None, "expected JSON in U8"),
        (bad(a__weight=W, a__comfy_quant=("U8", np.zeros(5000))), None, "expected JSON in U8"),
        (bad(a__weight=W, a__comfy_quant=json_tensor({"format": "float8_e5m2"})), None, "declared float8_e5m2"),
        (
            bad(a__weight=W, a__comfy_quant=json_tensor({"format": "float8_e4m3fn", "convrot": True})),
            None,
            "with 'convrot'",
        ),
        (bad(a__weight=W), {"_quantization_metadata": "{"}, "not a JSON object"),
        (bad(a__weight=W), {"_quantization_metadata": '{"layers": 3}'}, "dict of layers"),
        (bad(a__weight=W), {"_quantization_metadata": '{"layers": {"a": {"format": "mxfp8"}}}'}, "stored as 'mxfp8'"),
        (bad(a__weight=W), {"_quantization_metadata": '{"layers": {"a": 3}}'}, "stored as 'None'"),
    ],
)
def test_scales_that_do_not_fit_are_refused(tmp_path, tensors, metadata, word):
    assert word in refusal(write(tmp_path / "x.safetensors", tensors, metadata), opened)


def test_integers_are_no_weights(tmp_path):
    """int8 without a scale beside it would be cast to a wrong picture."""
    keys = ("patch_embedding.weight", "blocks.0.self_attn.q.weight", "head.modulation")
    tensors = {key: ("F16", CODES.reshape(6, 4, 1, 2, 2) if "patch" in key else CODES) for key in keys} | {
        "blocks.0.self_attn.k.weight": ("I8", CODES)
    }
    path = write(tmp_path / "x.safetensors", tensors)
    assert "self_attn.k.weight of dtype I8" in refusal(path, lambda p: ComponentWeights(open_weights(p)))
