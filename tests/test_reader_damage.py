"""Hostile and damaged weight files end in one clear WeightsError; and how little of a good one is read."""

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

import mlx.core as mx
import numpy as np
import pytest
from crafted import (
    DATA,
    EMPTY,
    bytes_of,
    call,
    entry,
    literal,
    mapping,
    name,
    refusal,
    stack_name,
    storage,
    tensor,
    write_safetensors,
)

from wan_mlx.errors import WeightsError
from wan_mlx.files.base import TensorInfo
from wan_mlx.files.open import open_weights

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


def test_too_many_names_are_refused_before_they_are_read(tmp_path, monkeypatch):
    names = (b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(300_000))
    path = write_safetensors(tmp_path / "x.safetensors", b"{" + b",".join(names) + b"}")
    monkeypatch.setattr("json.loads", None)
    assert "at most" in refusal(path)


def test_names_beyond_any_model_are_refused(tmp_path):
    many = {f"{i}": entry("U8", [0], 0, 0) for i in range(100_001)}
    assert "100,001 tensors" in refusal(write_safetensors(tmp_path / "x.safetensors", many))
    assert "named 'kkk" in refusal(write_safetensors(tmp_path / "x.safetensors", {"k" * 2000: many["0"]}))
    index = tmp_path / "x.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(many, "x.safetensors")}))
    assert "100,001 tensors" in refusal(index)


@pytest.mark.parametrize("text", ['{"weight_map": ' * 100_000, '{"weight_map": {"a": ' + "[" * 100_000])
def test_an_index_nested_deeply(tmp_path, text):
    index = tmp_path / "x.safetensors.index.json"
    index.write_text(text)
    assert "damaged JSON" in refusal(index)


def test_a_shard_with_an_endless_name(sharded):
    assert "plain file name" in refusal(sharded(a="x" * 5000))


# --- damage


def test_unfinished_downloads_are_named(two):
    """Of programs that set a file's whole length aside first."""
    control = two.with_name("two.safetensors.aria2")
    control.write_bytes(b"")
    assert "not finished" in refusal(two) and control.name in refusal(two)
    control.unlink()
    two.write_bytes(bytes(two.stat().st_size))
    assert "zeros" in refusal(two) and "download it again" in refusal(two)


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
def test_reads_touch_only_the_returned_tensors(tmp_path, kind):
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
