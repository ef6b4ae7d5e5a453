"""Weight files without torch: what is read, how little of it, and that bad files end in one clear WeightsError."""

import copyreg
import json
import os
import pickle
import random
import resource
import struct
import sys
import tracemalloc
import zipfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from wan_mlx.types import WeightsError
from wan_mlx.weights.reader import TensorInfo, open_weights


def refusal(path, act=open_weights) -> str:
    """The message of the WeightsError that ``path`` ends in: one line that names the file."""
    with pytest.raises(WeightsError) as caught:
        act(path)
    message = str(caught.value)
    assert "\n" not in message and Path(path).name in message
    return message


def bytes_of(array: mx.array) -> bytes:
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return np.array(array).tobytes()


# --- safetensors


def write_safetensors(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def values(dtype, count=6, seed=0):
    raw = np.random.default_rng(seed).integers(0, 2 if dtype == np.bool_ else 100, count)
    return raw.astype(dtype)


TWO = {"a": entry("F32", [2, 3], 0, 24), "b": entry("U8", [4], 24, 28)}
TWO_DATA = values(np.float32).tobytes() + bytes(range(4))


@pytest.fixture
def two(tmp_path):
    return write_safetensors(tmp_path / "two.safetensors", TWO, TWO_DATA)


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
        ({"x": entry("F32", [1], 0, 4)}, 5, "1 bytes too long"),
        ({"x": entry("F32", [10**12 // 4], 0, 10**12)}, 5, "shape"),
        ({"x": []}, 0, "dtype"),
        ({"__metadata__": {"a": 1}}, 0, "__metadata__"),
        (b'{"x":', 0, "header"),
        (b'{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"x":{}}', 0, "twice"),
        (b'{"x":NaN}', 0, "NaN"),
        (b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', 0, "surrogates"),
        (b'{"\xff":1}', 0, "header"),
        (b'{"x":' * 100_000, 0, "header"),
        (b'{"a\\nb": 1}', 0, "dtype"),
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
        (b"GGUF\3\0\0\0" + bytes(50), "GGUF"),
        (b"data".ljust(257, b"\0") + b"ustar\x0000" + bytes(300), "tar"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.", "re-save"),
        (b"PK\5\6" + bytes(18), "zip"),
        (b"{}", "weight_map"),
        (b'{"weight_map": {}}', "weight_map"),
        (b'{"weight_map": ["a"]}', "weight_map"),
        (b"\x89HDF\r\n\x1a\n", "89 48 44 46"),
        (bytes(100), "00 00"),
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


@pytest.fixture
def sharded(tmp_path):
    """An index over two shards; the function writes it with changes to the weight map."""
    write_safetensors(tmp_path / "1.safetensors", {"__metadata__": {"format": "pt", "n": "1"}, **TWO}, TWO_DATA)
    more = {"__metadata__": {"format": "pt", "n": "2"}, "c": entry("U8", [2, 1], 0, 2)}
    write_safetensors(tmp_path / "2.safetensors", more, b"\5\6")
    index = tmp_path / "model.safetensors.index.json"

    def write(**changes):
        weight_map = {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors", **changes}
        index.write_text(json.dumps({"metadata": {"total_size": 30}, "weight_map": weight_map}, indent=1))
        return index

    return write


def test_sharded_set(sharded):
    file = open_weights(sharded())
    assert file.metadata == {"format": "pt"} and list(file.tensors) == ["a", "b", "c"] and file.nbytes("c") == 2
    assert bytes_of(file.read("a")) == TWO_DATA[:24] and bytes_of(file.read("c")) == b"\5\6"
    assert bytes_of(file.rows("c", [1])) == b"\6"
    assert "'d'" in refusal(file.path, lambda _: file.read("d"))


@pytest.mark.parametrize("name", ["/etc/passwd", "../1.safetensors", "..", ".", "", "x/1.safetensors", "x\\y", 3, None])
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


def literal(value) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def name(module, attribute) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def stack_name(module, attribute) -> bytes:
    return literal(module) + literal(attribute) + b"\x93"


EMPTY = name("collections", "OrderedDict") + b")R"


def storage(key="0", kind="FloatStorage", count=6) -> bytes:
    return b"(" + literal("storage") + name("torch", kind) + literal(key) + literal("cpu") + literal(count) + b"tQ"


def tensor(data=None, offset=0, shape=(2, 3), strides=(3, 1)) -> bytes:
    parts = [storage() if data is None else data, *map(literal, (offset, shape, strides, False)), EMPTY]
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + b"".join(parts) + b"tR"


def mapping(**items) -> bytes:
    return b"}(" + b"".join(literal(key) + item for key, item in items.items()) + b"u"


def call(module, attribute, *args: bytes) -> bytes:
    return name(module, attribute) + b"(" + b"".join(args) + b"tR"


DATA = values(np.float32)


def write_pth(path, body=None, entries=None, compression=zipfile.ZIP_STORED):
    """An archive whose data.pkl is ``body`` (with PROTO and STOP put around it) and whose storage 0 is DATA."""
    body = mapping(x=tensor()) if body is None else body
    files = {"data.pkl": b"\x80\x02" + body + b".", "byteorder": b"little", "data/0": DATA.tobytes(), **(entries or {})}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file, data in files.items():
            archive.writestr(f"archive/{file}", data)
    return path


@pytest.fixture
def pth(tmp_path):
    return lambda *args, **kwargs: write_pth(tmp_path / "model.pth", *args, **kwargs)


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
        (mapping(x=tensor(storage(count=-6))), "count"),
        (mapping(x=tensor(storage(count=10**30))), "count"),
        (mapping(x=tensor(storage(key="1"))), "lacks the storage"),
        (mapping(x=tensor(storage(key="../data.pkl"))), "lacks the storage"),
        (mapping(x=tensor(storage(key=("0",)))), "key"),
        (mapping(x=tensor(storage(kind="DoubleStorage"))), "24 bytes"),
        (mapping(x=tensor(storage(kind="float32"))), "not a type of storage"),
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
        (mapping(x=tensor(shape=(1,) * 999, strides=(1,) * 999)), "999 dimensions"),
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


# --- hostile pickles


def shell(canary) -> bytes:
    return call("os", "system", literal(f"touch {canary}"))


def test_hostile_calls_are_refused_by_name(pth, tmp_path):
    canary = tmp_path / "canary"
    touch = literal(f"touch {canary}")
    code = literal(f"open({str(canary)!r}, 'w')")

    class Reduce:
        def __reduce__(self):
            return os.system, (f"touch {canary}",)

    system = f"{os.system.__module__}.system"
    attacks = [
        *(
            (mapping(x=pickle.dumps(Reduce(), protocol)[2 if protocol > 1 else 0 : -1]), system)
            for protocol in range(6)
        ),
        (mapping(x=call("builtins", "eval", code)), "builtins.eval"),
        (mapping(x=call("__builtin__", "eval", code)), "__builtin__.eval"),
        (mapping(x=call("builtins", "getattr", name("torch", "Size"), literal("x"))), "builtins.getattr"),
        (mapping(x=call("torch", "load", literal(str(canary)))), "torch.load"),
        (mapping(x=call("torch.hub", "load", literal("x"))), "torch.hub.load"),
        (mapping(x=call("torch.serialization", "load", literal("x"))), "torch.serialization.load"),
        (mapping(x=call("torch", "FloatStorage.from_file", literal(str(canary)))), "FloatStorage.from_file"),
        (mapping(x=call("numpy", "load", literal("x"))), "numpy.load"),
        (mapping(x=call("torch._utils", "_rebuild_parameter", shell(canary), literal(True), EMPTY)), "os.system"),
        (mapping(x=tensor(shell(canary))), "os.system"),
        (mapping(x=tensor(), y=stack_name("os", "system") + b"(" + touch + b"tR"), "os.system"),
        (mapping(x=stack_name("torch._utils", "os.system") + b"(" + touch + b"tR"), "torch._utils.os.system"),
        (mapping(x=stack_name("collections", "OrderedDict.fromkeys") + b")R"), "OrderedDict.fromkeys"),
        (mapping(x=stack_name("collections.abc", "os\nsystem") + b")R"), "os\\nsystem"),
        (mapping(x=call("collections", "defaultdict", name("os", "system"))), "collections.defaultdict"),
        (mapping(x=call("collections", "OrderedDictEvil")), "collections.OrderedDictEvil"),
        (mapping(x=call("evil.collections", "OrderedDict")), "evil.collections.OrderedDict"),
        (EMPTY + mapping(_metadata=shell(canary)) + b"b", "os.system"),
        (name("torch.nn", "Module") + b")\x81", "torch.nn.Module"),
        (b"(" + touch + b"ios\nsystem\n", "INST"),
        (b"(" + name("os", "system") + touch + b"o", "os.system"),
    ]
    for body, word in attacks:
        assert word in refusal(pth(body)), body
        assert not canary.exists(), body
    os.system(f"touch {canary}")
    assert canary.exists()  # so the attack would have shown


def test_stand_ins_cannot_be_used_for_anything_else(pth):
    state = mapping(__call__=literal(1), dtype=literal("F64"))
    bodies = [
        mapping(x=name("torch._utils", "_rebuild_tensor_v2") + state + b"b"),  # BUILD on a function
        mapping(x=name("torch", "FloatStorage") + b"(N" + state + b"tb"),  # BUILD with slots on a class
        mapping(x=tensor() + state + b"b"),  # BUILD on a tensor
        mapping(x=storage() + state + b"b"),
        mapping(x=call("torch", "float32", literal(1))),  # calls of what is no function
        mapping(x=call("torch", "FloatStorage", literal(1))),
        mapping(x=tensor() + b")R"),
        mapping(x=literal("text") + b")R"),
        mapping(x=name("torch", "Size") + literal(3) + b"R"),  # arguments that are no tuple
        mapping(x=call("torch", "Size", literal("abc"))),
        mapping(x=call("collections", "OrderedDict", literal([("a", 1)]))),
        mapping(x=call("torch._utils", "_rebuild_tensor_v2")),
        mapping(x=call("torch._utils", "_rebuild_parameter", literal({}), literal(True), EMPTY)),
        mapping(x=name("torch", "Size") + b")\x81"),  # NEWOBJ
        mapping(x=tensor() + literal("k") + literal(1) + b"s"),  # items of a tensor
        mapping(x=tensor() + literal(1) + b"a"),
        mapping(x=literal(1) + literal(2) + b"\x93"),  # STACK_GLOBAL of numbers
        mapping(x=b")" * 2 + b"\x93"),
        b"R",
        b"}u",
        b"(b",
        b"(}sq\0",
        b"h\5",
        b"\x82\1",
        b"Pid\n",
    ]
    for body in bodies:
        refusal(pth(body))


def test_registered_extension_codes_are_not_followed(pth):
    copyreg.add_extension("os", "system", 240)
    try:
        assert "EXT1" in refusal(pth(mapping(x=b"\x82\xf0(" + literal("true") + b"tR")))
    finally:
        copyreg.remove_extension("os", "system", 240)


def test_small_files_cannot_become_large(pth):
    deep = b")" + b"\x85" * 200_000
    doubling = b"}" + b"".join(
        b"q%c}(" % i + literal("a") + b"h%c" % i + literal("b") + b"h%cu" % i for i in range(1, 26)
    )
    bombs = [
        b"}" + deep + b"Ns",  # hashing this key would overflow the C stack
        deep + deep + b"\x93",
        b"}r\xff\xff\xff\xff",  # a memo index that pickle's own machine allocates up to
        b"\x8e" + struct.pack("<Q", 2**60),  # bytes of an exabyte
        b"\x96" + struct.pack("<Q", 2**60),
        b"\x8b" + struct.pack("<I", 2**31 - 1),
        b"\x95" + struct.pack("<Q", 2**60),
        b"}q\x09" + literal("x") + b"h\x09s",  # a dict within itself
        b"}" + literal("x") + b"]q\x09h\x09as",
        doubling,
        b"}" + literal("x") + b"](" + b"N" * 200_000 + b"es",
        mapping(x=b"N" + b"0N" * 100),
    ]
    rss = peak_rss()
    for body in bombs:
        refusal(pth(body))
    assert peak_rss() - rss < 300e6


def test_pickle_that_inflates(pth):
    assert "64,000,000" in refusal(pth(b"N0" * 33_000_000, compression=zipfile.ZIP_DEFLATED))


def test_storage_that_inflates_past_its_declared_size(pth):
    path = pth(entries={"data/0": bytes(10_000_000)}, compression=zipfile.ZIP_DEFLATED)
    assert "10,000,000" in refusal(path)
    large = 2**26
    body = mapping(x=tensor(storage(kind="ByteStorage", count=large), shape=(large,), strides=(1,)))
    path = pth(body, entries={"data/0": bytes(large)}, compression=zipfile.ZIP_DEFLATED)
    assert "larger than its file" in refusal(path)


# --- damage


def damaged_copies(path):
    return path.read_bytes(), path.with_name("damaged" + path.suffix)


@pytest.mark.parametrize("kind", ["safetensors", "index", "stored", "deflated"])
def test_truncation_at_every_length(kind, two, sharded, pth):
    source = {"safetensors": two, "index": sharded()}.get(kind)
    source = source or pth(compression=zipfile.ZIP_STORED if kind == "stored" else zipfile.ZIP_DEFLATED)
    open_weights(source)
    whole, path = damaged_copies(source)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        message = refusal(path)
        if kind in ("stored", "deflated") and length > 4:
            assert "cut short" in message


def flipped(whole: bytes, positions: range | list[int], seed: int) -> bytes:
    dice = random.Random(seed)
    damaged = bytearray(whole)
    for _ in range(dice.choice((1, 1, 2, 5))):
        damaged[dice.choice(positions)] ^= dice.choice((1 << dice.randrange(8), dice.randrange(1, 256)))
    return bytes(damaged)


def read_all(file) -> dict[str, tuple[TensorInfo, bytes]]:
    return {key: (info, bytes_of(file.read(key))) for key, info in file.tensors.items()}


def survivors(source, positions, count=400) -> int:
    """Flip bytes at ``positions``: what still opens must hold, under the names and dtypes it had, the data it had."""
    whole, path = damaged_copies(source)
    original, opened = read_all(open_weights(source)), 0
    tracemalloc.start()
    try:
        for seed in range(count):
            path.write_bytes(flipped(whole, positions, seed))
            try:
                got = read_all(open_weights(path))
            except WeightsError as error:
                assert "\n" not in str(error)
                continue
            opened += 1
            for key, (info, data) in got.items():
                if key in original and original[key][0] == info:
                    assert data == original[key][1], (seed, key)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()
    return opened


def test_flipped_bytes_in_a_safetensors_header(two):
    length = int.from_bytes(two.read_bytes()[:8], "little")
    assert survivors(two, range(8 + length)) < 200


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_flipped_bytes_in_a_pth(pth, compression):
    path = pth(mapping(x=tensor(), y=tensor(shape=(3, 2), strides=(1, 3))), compression=compression)
    data = DATA.tobytes()
    at = path.read_bytes().find(data) if compression == zipfile.ZIP_STORED else -1
    inside = range(at, at + len(data)) if at >= 0 else ()  # nothing guards the stored numbers themselves
    survivors(path, [i for i in range(path.stat().st_size) if i not in inside])


def test_flipped_bytes_in_a_pickle_whose_checksum_is_right(pth):
    body = mapping(x=tensor(), y=mapping(z=tensor(shape=(3, 2), strides=(1, 3))), n=literal([1, 2.5, None])) + b"}b"
    assert list(open_weights(pth(body)).tensors) == ["x", "y.z"]
    opened = 0
    for seed in range(400):
        path = pth(flipped(body, range(len(body)), seed))
        try:
            read_all(open_weights(path))
            opened += 1
        except WeightsError as error:
            assert "\n" not in str(error)
    assert 0 < opened < 100


# --- how little is read

HUGE = 2**30  # a sparse file: reading it would cost memory, not disk


def peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def sparse_pth(path, body: bytes) -> None:
    """An archive of one huge stored entry ``archive/data/0`` of zeros, then data.pkl."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + body + b".")
        place = archive.fp.tell()
        info = zipfile.ZipInfo("archive/data/0")
        info.file_size = info.compress_size = HUGE
        info.header_offset, info.CRC = place, 0
        archive.fp.write(info.FileHeader(zip64=False))
        archive.fp.seek(HUGE - 4, os.SEEK_CUR)
        archive.fp.write(b"\1\2\3\4")
        archive.start_dir = archive.fp.tell()
        archive.filelist.append(info)
        archive.NameToInfo[info.filename] = info


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_reads_touch_only_what_they_return(tmp_path, kind):
    path = tmp_path / f"sparse.{kind}"
    rows = HUGE // 4096
    if kind == "safetensors":
        header = {"huge": entry("U8", [rows, 4096], 0, HUGE), "small": entry("U8", [4], HUGE, HUGE + 4)}
        write_safetensors(path, header)
        with open(path, "ab") as file:
            file.truncate(file.tell() + HUGE)
        with open(path, "ab") as file:
            file.write(b"\1\2\3\4")
        last = bytes(4)
    else:
        data = storage(kind="ByteStorage", count=HUGE)
        huge, small = tensor(data, 0, (rows, 4096), (4096, 1)), tensor(data, HUGE - 4, (4,), (1,))
        sparse_pth(path, mapping(huge=huge, small=small, across=tensor(data, 0, (4096, 4096), (1, 4096))))
        last = b"\1\2\3\4"
    rss, held = peak_rss(), mx.get_active_memory()
    mx.reset_peak_memory()
    file = open_weights(path)
    assert file.nbytes("huge") == HUGE
    got = file.rows("huge", np.array([rows - 1, 0]))
    assert got.shape == (2, 4096) and bytes_of(got)[4092:4096] == last
    assert bytes_of(file.read("small")) == b"\1\2\3\4"
    if kind == "safetensors":
        lazy = file.read("huge")
        assert lazy.shape == (rows, 4096)
        del lazy
    else:
        assert file.rows("across", [4095]).shape == (1, 4096)
    assert mx.get_active_memory() - held < 1e6 and mx.get_peak_memory() - held < 10e6
    assert peak_rss() - rss < 100e6
