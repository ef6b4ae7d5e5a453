"""Weight files without torch: what is read, how little of it, and that bad files end in one clear WeightsError."""

import json
import os
import zipfile

import mlx.core as mx
import numpy as np
import pytest
from crafted import (
    DATA,
    EMPTY,
    TWO,
    TWO_DATA,
    bytes_of,
    call,
    entry,
    literal,
    mapping,
    name,
    refusal,
    storage,
    tensor,
    values,
    write_safetensors,
)

from wan_mlx.errors import WeightsError
from wan_mlx.files.base import TensorInfo
from wan_mlx.files.open import open_weights
from wan_mlx.files.pth import read_index
from wan_mlx.files.safetensors import load_arrays, save_arrays

# --- safetensors


@pytest.mark.parametrize(
    "name, numpy_dtype, mlx_dtype",
    [
        ("F32", np.float32, mx.float32),
        ("F16", np.float16, mx.float16),
        ("BF16", np.uint16, mx.bfloat16),
        ("I64", np.int64, mx.int64),
        ("I32", np.int32, mx.int32),
        ("I16", np.int16, mx.int16),
        ("I8", np.int8, mx.int8),
        ("U32", np.uint32, mx.uint32),
        ("U8", np.uint8, mx.uint8),
        ("BOOL", np.bool_, mx.bool_),
        ("F8_E4M3", np.uint8, mx.uint8),
        ("F8_E5M2", np.uint8, mx.uint8),
    ],
)
def test_safetensors_round_trip(tmp_path, name, numpy_dtype, mlx_dtype):
    want = values(numpy_dtype)
    header = {"__metadata__": {"format": "pt"}, "x": entry(name, [2, 3], 0, want.nbytes)}
    file = open_weights(write_safetensors(tmp_path / "x.safetensors", header, want.tobytes()))
    assert file.metadata == {"format": "pt"}
    assert file.tensors == {"x": TensorInfo((2, 3), name)} and file.nbytes("x") == want.nbytes
    for _ in range(2):  # a tensor may be read again
        got = file.read("x")
        assert got.dtype == mlx_dtype and got.shape == (2, 3) and bytes_of(got) == want.tobytes()
    rows = file.rows("x", np.array([1, 0, 1]))
    assert rows.dtype == mlx_dtype and bytes_of(rows) == want.reshape(2, 3)[[1, 0, 1]].tobytes()


def test_float64_becomes_float32(tmp_path):
    want = np.array([[1.5, 1e300]])
    path = write_safetensors(tmp_path / "x.safetensors", {"x": entry("F64", [1, 2], 0, 16)}, want.tobytes())
    file = open_weights(path)
    assert file.tensors["x"].dtype == "F64"
    assert file.read("x").dtype == mx.float32 and file.read("x").tolist() == [[1.5, float("inf")]]
    assert file.rows("x", [0]).dtype == mx.float32


def test_files_written_by_mlx(tmp_path):
    arrays = {"a": mx.arange(12).reshape(3, 4).astype(mx.bfloat16), "s": mx.array(2.5), "none": mx.zeros((0, 3))}
    mx.save_safetensors(str(tmp_path / "m.safetensors"), arrays)
    file = open_weights(str(tmp_path / "m.safetensors"))
    assert file.metadata == {} and file.path == tmp_path / "m.safetensors"
    for key, want in arrays.items():
        got = file.read(key)
        assert got.dtype == want.dtype and got.shape == want.shape and bytes_of(got) == bytes_of(want)


def test_content_decides_not_the_name(two):
    path = two.rename(two.with_name("two.bin"))
    assert bytes_of(open_weights(path).read("b")) == bytes(range(4))


def test_header_length_that_begins_with_a_brace(tmp_path):
    text = json.dumps({"x": entry("U8", [1], 0, 1)}).encode()
    path = write_safetensors(tmp_path / "x.safetensors", text.ljust(ord("{")), b"\7")
    assert path.read_bytes()[:1] == b"{" and bytes_of(open_weights(path).read("x")) == b"\7"


def test_lazy_arrays_share_one_open_file_and_follow_the_stream(tmp_path):
    count = 100
    header = {f"k{i}": entry("U8", [1], i, i + 1) for i in range(count)}
    file = open_weights(write_safetensors(tmp_path / "x.safetensors", header, bytes(range(count))))
    before = len(os.listdir("/dev/fd"))
    arrays = [file.read(f"k{i}") for i in range(count)]
    assert len(os.listdir("/dev/fd")) <= before + 1
    stream = mx.new_stream(mx.cpu)
    with mx.stream(stream):
        arrays[50] = file.read("k50")
        mx.async_eval(arrays[50])
    mx.eval(arrays)
    assert [a.item() for a in arrays] == list(range(count))


def test_every_read_is_a_new_array(two):
    file = open_weights(two)
    first, second = file.read("a"), file.read("a")
    assert first is not second
    mx.eval(first)
    del first
    assert bytes_of(second) == bytes_of(file.read("a")) == TWO_DATA[:24]


def test_a_dropped_array_is_freed(tmp_path):
    size = 1_000_000
    header = {key: entry("U8", [size], i * size, (i + 1) * size) for i, key in enumerate("abc")}
    file = open_weights(write_safetensors(tmp_path / "x.safetensors", header, bytes(3 * size)))
    held = mx.get_active_memory()
    for key in "abcab":
        array = file.read(key)
        mx.eval(array)
        assert mx.get_active_memory() - held >= size
        del array
        assert mx.get_active_memory() - held < size


def test_a_file_that_changes_while_open(two):
    file = open_weights(two)
    os.truncate(two, 30)
    for act in (lambda _: file.read("a"), lambda _: file.rows("a", [0])):
        assert "changed since it was opened" in refusal(two, act)
    two.unlink()
    refusal(two, lambda _: file.read("a"))


@pytest.mark.parametrize(
    "header, data, word",
    [
        ({"x": entry("F31", [1], 0, 4)}, 4, "F31"),
        ({"x": entry("F32", [-1], 0, 4)}, 4, "[-1]"),
        ({"x": entry("F32", [1.0], 0, 4)}, 4, "[1.0]"),
        ({"x": entry("F32", [True], 0, 4)}, 4, "[True]"),
        ({"x": entry("F32", "1", 0, 4)}, 4, "shape"),
        ({"x": entry("U8", [2**31, 0], 0, 0)}, 0, "2**31"),
        ({"x": entry("U8", [1] * 99, 0, 1)}, 1, "shape"),
        ({"x": entry("F32", [1], 4, 0)}, 4, "data_offsets"),
        ({"x": entry("F32", [1], 0, 8)}, 8, "needs 4"),
        ({"x": entry("F32", [1], 0, 4), "y": entry("F32", [1], 2, 6)}, 6, "overlaps"),
        ({"x": entry("F32", [1], 0, 4), "y": entry("F32", [1], 6, 10)}, 10, "gap"),
        ({"x": entry("F32", [1], 0, 4)}, 3, "4 bytes of data expected, 3 present"),
        ({"x": entry("F32", [1], 0, 4)}, 5, "too long: 4 bytes of data expected, 5 present"),
        ({"x": entry("F32", [10**12 // 4], 0, 10**12)}, 5, "shape"),
        ({"x": []}, 0, "dtype"),
        ({"__metadata__": {"a": 1}}, 0, "__metadata__"),
        (b'{"x":', 0, "header"),
        (b'{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"x":{}}', 0, "twice"),
        (b'{"x":NaN}', 0, "dtype"),
        (b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', 0, r"named '\ud800'"),
        (b'{"\xff":1}', 0, "header"),
        (b'{"x":' * 100_000, 0, "header"),
        (b'{"a\\nb": 1}', 0, "dtype"),
        ({"a\nb": entry("U8", [0], 0, 0)}, 0, "'a\\nb'"),
    ],
)
def test_bad_headers(tmp_path, header, data, word):
    assert word in refusal(write_safetensors(tmp_path / "x.safetensors", header, bytes(data)))


@pytest.mark.parametrize("length, word", [(0, ""), (1, "cut short"), (10_000, "10,008"), (10**8 + 1, "100,000,000")])
def test_bad_header_lengths(tmp_path, length, word):
    assert word in refusal(write_safetensors(tmp_path / "x.safetensors", TWO, TWO_DATA, length))


def test_header_length_without_the_bytes_behind_it(tmp_path):
    path = write_safetensors(tmp_path / "x.safetensors", TWO, TWO_DATA, 2**63)
    assert "header" in refusal(path)


# --- rows and names


def test_rows_arguments(two):
    file = open_weights(two)
    table = values(np.float32).reshape(2, 3)
    assert file.rows("a", np.array([], dtype=np.int32)).shape == (0, 3)
    assert bytes_of(file.rows("a", [1])) == table[1:].tobytes()
    for bad in ([2], [-1], [[0]], [0.5], np.array([True])):
        with pytest.raises(ValueError, match="indices"):
            file.rows("a", bad)
    assert "2-D" in refusal(two, lambda _: file.rows("b", [0]))


def test_unknown_tensor_names_the_nearest(tmp_path):
    header = {"blocks.0.attn.q.weight": entry("U8", [0], 0, 0)}
    path = write_safetensors(tmp_path / "x.safetensors", header)
    for act in ("read", "nbytes"):
        method = getattr(open_weights(path), act)
        assert "blocks.0.attn.q.weight" in refusal(path, lambda _, m=method: m("blocks.0.attn.k.weight"))


# --- which file it is


@pytest.mark.parametrize(
    "head, word",
    [
        (b"", "empty file"),
        (b"\n<!DOCTYPE html><html><body>404</body></html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs"),
        (b"data".ljust(257, b"\0") + b"ustar\x0000" + bytes(300), "tar"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.", "re-save"),
        (b"PK\5\6" + bytes(18), "zip"),
        (b"{}", "weight_map"),
        (b'{"weight_map": {}}', "weight_map"),
        (b'{"weight_map": ["a"]}', "weight_map"),
        (b"\x89HDF\r\n\x1a\n", "89 48 44 46"),
        (bytes(100), "zeros"),
    ],
)
def test_other_files_are_recognised(tmp_path, head, word):
    path = tmp_path / "weights.pth"
    path.write_bytes(head)
    assert word in refusal(path)


def test_missing_files_and_folders(two):
    assert "two.safetensors" in refusal(two.with_name("to.safetensors"))
    assert "no folder" in refusal(two.parent / "nowhere" / "x.pth")
    refusal(two / "x.pth")
    assert "two.safetensors" in refusal(two.parent)
    refusal(two.parent / "a\0b")
    os.mkfifo(two.parent / "pipe")
    assert "regular" in refusal(two.parent / "pipe")


# --- sharded


def test_sharded_set(sharded):
    file = open_weights(sharded())
    assert file.metadata == {"format": "pt"} and list(file.tensors) == ["a", "b", "c"] and file.nbytes("c") == 2
    assert bytes_of(file.read("a")) == TWO_DATA[:24] and bytes_of(file.read("c")) == b"\5\6"
    assert bytes_of(file.rows("c", [1])) == b"\6"
    assert "'d'" in refusal(file.path, lambda _: file.read("d"))


@pytest.mark.parametrize("name", ["/a", "../1.safetensors", "..", ".", "", "x/1.safetensors", "x\\y", "x\n", 3])
def test_shard_names_stay_in_the_folder(sharded, name):
    assert "plain file name" in refusal(sharded(a=name))


def test_index_that_does_not_match(sharded):
    assert "3.safetensors" in refusal(sharded(c="3.safetensors"))
    assert "lack d (1.safetensors)" in refusal(sharded(d="1.safetensors"))
    assert "hold b (1.safetensors)" in refusal(sharded(b="2.safetensors"))
    assert "index" in refusal(sharded(c="model.safetensors.index.json"))


def test_sharded_set_with_a_truncated_shard(sharded):
    index = sharded()
    os.truncate(index.with_name("2.safetensors"), 100)
    with pytest.raises(WeightsError, match="2.safetensors: cut short"):
        open_weights(index)


# --- torch's zip, crafted by hand


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_pth_tensor(pth, compression):
    views = mapping(x=tensor(), t=tensor(shape=(3, 2), strides=(1, 3)), o=tensor(offset=4, shape=(2,), strides=(1,)))
    file = open_weights(pth(views, compression=compression))
    want = DATA.reshape(2, 3)
    assert file.metadata == {} and file.tensors["t"] == TensorInfo((3, 2), "F32") and file.nbytes("o") == 8
    assert file.read("x").dtype == mx.float32 and bytes_of(file.read("x")) == want.tobytes()
    assert bytes_of(file.read("t")) == want.T.tobytes() and bytes_of(file.read("o")) == DATA[4:].tobytes()
    assert bytes_of(file.rows("x", [1, 1])) == want[[1, 1]].tobytes()
    assert bytes_of(file.rows("t", [2, 0])) == want.T[[2, 0]].tobytes()


def test_a_pickle_is_read_again_when_the_file_has_changed(pth):
    path, before = pth(mapping(x=tensor())), read_index.cache_info().misses
    assert open_weights(path).tensors == open_weights(path).tensors and read_index.cache_info().misses == before + 1
    pth(mapping(x=tensor(), y=tensor()))
    assert set(open_weights(path).tensors) == {"x", "y"} and read_index.cache_info().misses == before + 2


def test_strides_that_are_never_stepped_along(pth):
    body = mapping(
        x=tensor(shape=(1, 6), strides=(2**62, 1)),
        e=tensor(shape=(0, 2), strides=(2**62, 2**62)),
        r=tensor(shape=(2, 3), strides=(0, 1)),
    )
    file = open_weights(pth(body))
    assert bytes_of(file.read("x")) == bytes_of(file.rows("x", [0])) == DATA.tobytes()
    assert file.read("e").shape == (0, 2)
    assert bytes_of(file.read("r")) == bytes_of(file.rows("r", [0, 1])) == DATA[:3].tobytes() * 2


def test_wrappers_and_nesting(pth):
    inner = mapping(w=tensor(), n=literal(3))
    assert list(open_weights(pth(mapping(state_dict=inner, epoch=literal(7), args=literal({"a": [1]})))).tensors) == [
        "w"
    ]
    assert list(open_weights(pth(mapping(encoder=inner))).tensors) == ["encoder.w"]
    both = mapping(model=inner, ema=mapping(w=tensor(), v=b"](" + tensor() + b"e"))
    assert list(open_weights(pth(both)).tensors) == ["model.w", "ema.w", "ema.v.0"]
    assert list(open_weights(pth(mapping(model=tensor()))).tensors) == ["model"]


@pytest.mark.parametrize("marker", ["constants.pkl", "second/data.pkl"])
def test_other_archives(pth, marker):
    refusal(pth(entries={marker: b"\x80\x02)."}))


def test_torchscript_and_byte_order_are_named(pth, tmp_path):
    assert "TorchScript" in refusal(pth(entries={"constants.pkl": b"\x80\x02)."}))
    assert "big" in refusal(pth(entries={"byteorder": b"big"}))
    np.savez(tmp_path / "arrays.npz", x=DATA)
    assert "data.pkl" in refusal(tmp_path / "arrays.npz")


@pytest.mark.parametrize(
    "body, word",
    [
        (tensor(), "holds a tensor"),
        (literal([1]), "list"),
        (mapping(a=literal(1)), "holds no tensor"),
        (mapping(x=tensor(storage(count=7))), "24 bytes; the pickle says 28"),
        (mapping(x=tensor(storage(count=-6))), "the pickle says -24"),
        (mapping(x=tensor(storage(count=10**30))), "the pickle says 4,000"),
        (mapping(x=tensor(storage(key="1"))), "lacks the storage"),
        (mapping(x=tensor(storage(key="../data.pkl"))), "lacks the storage"),
        (mapping(x=tensor(storage(key=("0",)))), "no storage"),
        (mapping(x=tensor(storage(kind="DoubleStorage"))), "24 bytes"),
        (mapping(x=tensor(storage(kind="float32"))), "no storage"),
        (mapping(x=tensor(storage(kind="ComplexFloatStorage"))), "torch.ComplexFloatStorage"),
        (mapping(x=tensor(literal("0") + b"Q")), "outside object"),
        (mapping(x=tensor(literal(3))), "not a storage"),
        (mapping(x=tensor(tensor())), "not a storage"),
        (mapping(x=tensor(offset=1)), "outside its storage"),
        (mapping(x=tensor(offset=-1)), "not counts"),
        (mapping(x=tensor(shape=(-2, 3))), "not counts"),
        (mapping(x=tensor(strides=(-3, 1))), "not counts"),
        (mapping(x=tensor(strides=(True, 1))), "not counts"),
        (mapping(x=tensor(shape=(2, 4))), "outside its storage"),
        (mapping(x=tensor(strides=(2**62, 1))), "outside its storage"),
        (mapping(x=tensor(shape=(2,))), "not counts"),
        (mapping(x=tensor(shape=[2, 3])), "not counts"),
        (mapping(x=tensor(shape=(2**31, 0))), "out of bounds"),
        (mapping(x=tensor(shape=(2**30, 2**30), strides=(0, 0))), "larger than its file"),
        (mapping(x=tensor(shape=(1,) * 999, strides=(1,) * 999)), "out of bounds"),
        (mapping(**{"a.b": tensor(), "a": mapping(b=tensor())}), "both named 'a.b'"),
        (mapping(x=tensor(), **{"k" * 2000: tensor()}), "letters"),
    ],
)
def test_bad_tensors(pth, body, word):
    assert word in refusal(pth(body))


def test_tensors_of_an_untyped_storage(pth):
    kind = name("torch.storage", "UntypedStorage")
    untyped = b"(" + literal("storage") + kind + literal("0") + literal("cpu") + literal(24) + b"tQ"
    args = [untyped, *map(literal, (3, (5,), (2,), False)), EMPTY]
    file = open_weights(pth(mapping(x=call("torch._utils", "_rebuild_tensor_v3", *args, name("torch", "uint16")))))
    assert file.tensors == {"x": TensorInfo((5,), "U16")}
    assert file.read("x").tolist() == DATA.view(np.uint16)[3::2].tolist()
    refusal(pth(mapping(x=call("torch._utils", "_rebuild_tensor_v3", *args, name("torch", "FloatStorage")))))
    refusal(pth(mapping(x=tensor(untyped))))


def test_saved_arrays_come_back_and_equal_ones_are_equal_files(tmp_path):
    arrays = {
        "b": mx.arange(6).reshape(2, 3).astype(mx.bfloat16), "a": mx.array(2.5), "c": mx.zeros((0, 3), mx.uint32),
    }  # fmt: skip
    metadata = {str(number): "ü\n" for number in range(9)}  # the library draws their order anew
    for file in ("one", "two"):
        save_arrays(tmp_path / file, arrays, metadata)
    loaded, said = load_arrays(tmp_path / "one")
    assert said == metadata and {key: array.dtype for key, array in loaded.items()} == {
        key: array.dtype for key, array in arrays.items()
    }
    assert all(mx.array_equal(loaded[key], array) for key, array in arrays.items())
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    (tmp_path / "plain").touch()
    assert (tmp_path / "one").stat().st_mode == (tmp_path / "plain").stat().st_mode, "readable as any other file"
    with pytest.raises(OSError, match="No such file"):
        save_arrays(tmp_path / "nowhere" / "one", arrays, metadata)
