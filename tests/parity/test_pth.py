"""Files written by torch.save: every tensor as torch sees it, and nothing else is let through."""

import collections
import io
import os

import mlx.core as mx
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from wan_mlx.errors import WeightsError  # noqa: E402
from wan_mlx.files.base import TensorInfo  # noqa: E402
from wan_mlx.files.open import open_weights  # noqa: E402

DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64", "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip


def numbers(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(shape, generator=generator) * 9).to(dtype)


def bytes_of(array: mx.array) -> bytes:
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return np.array(array).tobytes()


def torch_bytes(tensor) -> bytes:
    """The bytes `read` should give: row-major, float64 as float32."""
    tensor = tensor.detach().to(torch.float32) if tensor.dtype == torch.float64 else tensor.detach()
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def check(path, want: dict):
    file = open_weights(path)
    assert list(file.tensors) == list(want)
    for key, tensor in want.items():
        info = TensorInfo(tuple(tensor.shape), DTYPES[str(tensor.dtype).removeprefix("torch.")])
        assert file.tensors[key] == info and file.nbytes(key) == tensor.numel() * tensor.element_size(), key
        got = file.read(key)
        assert got.shape == info.shape and bytes_of(got) == torch_bytes(tensor), key
        if tensor.ndim == 2 and len(tensor):
            rows = [len(tensor) - 1, 0, len(tensor) - 1]
            assert bytes_of(file.rows(key, np.array(rows))) == torch_bytes(tensor[rows]), key


@pytest.fixture
def saved(tmp_path):
    def save(state, **options):
        torch.save(state, tmp_path / "model.pth", **options)
        return tmp_path / "model.pth"

    return save


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(saved, dtype):
    state = {"matrix": numbers(5, 7, dtype=getattr(torch, dtype)), "vector": numbers(3, dtype=getattr(torch, dtype))}
    check(saved(state), state)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_protocols(saved, protocol):
    state = torch.nn.Linear(3, 2).state_dict()
    check(saved(state, pickle_protocol=protocol), state)


def test_mlx_dtypes(saved):
    file = open_weights(saved({"b": numbers(2, 2, dtype=torch.bfloat16), "h": numbers(2, dtype=torch.float16)}))
    assert file.read("b").dtype == file.rows("b", [0]).dtype == mx.bfloat16
    assert file.read("h").dtype == mx.float16


def test_views_strides_and_shared_storages(saved):
    base = numbers(6, 8)
    state = {
        "base": base,
        "shared": base,
        "row": base[2],
        "column": base[:, 3],
        "window": base[1:5:2, 2:7:3],
        "transposed": base.t(),
        "permuted": numbers(2, 3, 4).permute(2, 0, 1),
        "channels_last": numbers(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "expanded": numbers(1, 4).expand(3, 4),
        "expanded_scalar": torch.tensor(2.5).expand(2, 2),
        "one": numbers(6, 8)[:, :1],
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "empty_view": base[6:],
        "half": base.to(torch.bfloat16)[::2, ::3],
    }
    check(saved(state), state)


def test_wide_rows_of_a_transposed_tensor(saved):
    state = {"t": numbers(9, 5).t(), "w": numbers(4, 40)[:, ::7]}
    check(saved(state), state)


def test_modules_parameters_and_other_leaves(saved):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2), torch.nn.Embedding(4, 3))
    check(saved(module.state_dict()), module.state_dict())
    parameters = dict(module.named_parameters())
    check(saved(parameters), parameters)
    extras = {"step": 3, "name": "wan", "none": None, "rate": 1e-4, "size": torch.Size((1, 2)), "dtype": torch.float16}
    check(saved({"state_dict": module.state_dict(), **extras}), module.state_dict())
    nested = {"model": {"a": numbers(2)}, "ema": collections.OrderedDict(a=numbers(3))}
    check(saved(nested), {"model.a": nested["model"]["a"], "ema.a": nested["ema"]["a"]})


def test_sharded_bin(tmp_path):
    parts = {"1.bin": {"a": numbers(2, 2)}, "2.bin": {"b": numbers(3)}}
    for file, state in parts.items():
        torch.save(state, tmp_path / file)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text('{"weight_map": {"a": "1.bin", "b": "2.bin"}}')
    check(index, {"a": parts["1.bin"]["a"], "b": parts["2.bin"]["b"]})


def test_many_tensors_with_long_pickles(saved):
    state = {f"blocks.{i}.weight": torch.full((2,), float(i)) for i in range(600)}  # memo beyond 255, LONG_BINPUT
    check(saved(state), state)


class Gadget:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [2, 4])
def test_hostile_values_run_nothing(saved, tmp_path, protocol):
    canary = tmp_path / "canary"
    gadget = Gadget(f"touch {canary}")
    ordered = collections.OrderedDict(a=numbers(2))
    ordered._metadata = gadget
    parameter = torch.nn.Parameter(numbers(2))
    parameter.note = gadget
    for state in ({"a": gadget}, {"a": numbers(2), "b": {"c": [gadget]}}, ordered, {"a": parameter}, gadget):
        with pytest.raises(WeightsError, match="refused"):
            open_weights(saved(state, pickle_protocol=protocol))
    assert not canary.exists()


@pytest.mark.parametrize(
    "make, word",
    [
        (lambda: torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (lambda: {"a": numbers(2).to(torch.complex64)}, "ComplexFloatStorage"),
        (lambda: {"a": numbers(2, 2).to_sparse()}, "_rebuild_sparse_tensor"),
        (lambda: {"a": torch.empty(2, device="meta")}, "_rebuild_meta_tensor_no_storage"),
        (lambda: {"a": torch._neg_view(numbers(2))}, "negative view"),
        (lambda: {"a": np.float32(1)}, "numpy"),
        (lambda: [1, 2], "list"),
        (lambda: {"a": 1}, "no tensor"),
    ],
)
def test_files_without_a_state_dict_are_named(saved, make, word):
    with pytest.raises(WeightsError, match=word):
        open_weights(saved(make()))


def test_torchscript_is_named(tmp_path):
    buffer = torch._C.PyTorchFileWriter(str(tmp_path / "script.pt"))
    for name in ("data.pkl", "constants.pkl"):
        buffer.write_record(name, b"\x80\x02).", 4)
    buffer.write_end_of_file()
    with pytest.raises(WeightsError, match="TorchScript"):
        open_weights(tmp_path / "script.pt")


def test_legacy_format_says_how_to_save_again(saved):
    path = saved({"a": numbers(2)}, _use_new_zipfile_serialization=False)
    with pytest.raises(WeightsError, match="re-save"):
        open_weights(path)


def test_truncation_at_many_lengths(tmp_path):
    buffer = io.BytesIO()
    torch.save({"a": numbers(4, dtype=torch.bfloat16), "b": numbers(2)}, buffer)
    path = tmp_path / "cut.pth"
    for length in range(0, len(buffer.getvalue()), 5):
        path.write_bytes(buffer.getvalue()[:length])
        with pytest.raises(WeightsError, match="cut.pth"):
            open_weights(path)


def test_flipped_bits_in_a_local_header_never_shift_the_data(tmp_path):
    buffer = io.BytesIO()
    torch.save({"a": numbers(40), "b": numbers(2)}, buffer)
    whole, path = buffer.getvalue(), tmp_path / "flipped.pth"
    path.write_bytes(whole)
    want = bytes_of(open_weights(path).read("a"))
    end = whole.index(want)
    for bit in range(8 * (whole.rindex(b"PK\3\4", 0, end)), 8 * end):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            got = bytes_of(open_weights(path).read("a"))
        except WeightsError:
            continue
        assert got == want, bit
