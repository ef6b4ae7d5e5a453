"""GGUF files: every type against the format's formulas and the ``gguf`` package; hostile headers end in one line."""

import os
import random
import struct
import sys
import tracemalloc

import mlx.core as mx
import numpy as np
import pytest
from crafted import bytes_of, refusal
from crafted_gguf import GGML, SCALES, array, blocks, field, info, write_gguf

from benchmarks.gguf_quantisers import quantise
from wan_mlx.errors import WeightsError, install_command
from wan_mlx.files.base import TensorInfo
from wan_mlx.files.open import open_weights

gguf = pytest.importorskip("gguf")

FLOATS = np.random.default_rng(1).normal(size=(4, 64)).astype(np.float32)


def half(raw, at):
    return raw[:, at : at + 2].copy().view(np.float16).astype(np.float64)


def nibbles(raw):
    return np.concatenate([raw & 15, raw >> 4], axis=1).astype(np.float64)


def fifth_bits(raw):
    return np.unpackbits(raw, axis=1, bitorder="little").astype(np.float64)


def six_bit_pairs(packed):
    """Q4_K's eight scales and eight minimums, of one block, by ggml's ``get_scale_min_k4``."""
    pairs = []
    for j in range(8):
        if j < 4:
            pairs.append((packed[j] & 63, packed[j + 4] & 63))
        else:
            low, high = packed[j + 4] & 15, packed[j + 4] >> 4
            pairs.append((low | packed[j - 4] >> 6 << 4, high | packed[j] >> 6 << 4))
    return pairs


def q4_k(raw):
    out = np.empty((len(raw), 256))
    for block, target in zip(raw.tolist(), out, strict=True):
        d, low = (float(np.frombuffer(bytes(block[at : at + 2]), np.float16)[0]) for at in (0, 2))
        for j, (scale, minimum) in enumerate(six_bit_pairs(block[4:16])):
            for i in range(32):
                byte = block[16 + j // 2 * 32 + i]
                target[32 * j + i] = d * scale * (byte >> 4 if j % 2 else byte & 15) - low * minimum
    return out


def q6_k(raw):
    out = np.empty((len(raw), 256))
    for block, target in zip(raw.tolist(), out, strict=True):
        d = float(np.frombuffer(bytes(block[208:210]), np.float16)[0])
        scales = np.frombuffer(bytes(block[192:208]), np.int8)
        for n in range(256):
            part, i = divmod(n, 128)
            quarter, i = divmod(i, 32)
            low = block[64 * part + 32 * (quarter % 2) + i] >> (4 * (quarter // 2)) & 15
            high = block[128 + 32 * part + i] >> (2 * quarter) & 3
            target[n] = d * scales[n // 16] * ((low | high << 4) - 32)
    return out


# From ggml-quants.c, written out anew; the other types are held to the gguf package alone.
FORMULAS = {
    "Q8_0": lambda raw: half(raw, 0) * raw[:, 2:].view(np.int8),
    "Q4_0": lambda raw: half(raw, 0) * (nibbles(raw[:, 2:]) - 8),
    "Q4_1": lambda raw: half(raw, 0) * nibbles(raw[:, 4:]) + half(raw, 2),
    "Q5_0": lambda raw: half(raw, 0) * (nibbles(raw[:, 6:]) + 16 * fifth_bits(raw[:, 2:6]) - 16),
    "Q5_1": lambda raw: half(raw, 0) * (nibbles(raw[:, 8:]) + 16 * fifth_bits(raw[:, 4:8])) + half(raw, 2),
    "Q4_K": q4_k,
    "Q6_K": q6_k,
}


@pytest.mark.parametrize("dtype", SCALES)
def test_blocks_become_numbers(tmp_path, dtype):
    raw = blocks(dtype, 5, 512)
    file = open_weights(write_gguf(tmp_path / "x.gguf", [("x", (5, 512), dtype, raw)]))
    assert file.tensors == {"x": TensorInfo((5, 512), dtype)} and file.nbytes("x") == raw.nbytes
    got = np.array(file.read("x"))
    want = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[dtype])
    assert got.dtype == np.float32 and np.array_equal(got, want) and got.std() > 0
    if dtype in FORMULAS:
        independent = FORMULAS[dtype](raw.reshape(-1, GGML[dtype][2])).reshape(5, 512)
        assert np.allclose(got, independent, rtol=1e-6, atol=1e-6)
    assert np.array_equal(np.array(file.rows("x", [4, 0, 4])), got[[4, 0, 4]])
    assert file.rows("x", []).shape == (0, 512)
    assert np.array_equal(file.raw("x"), raw)


@pytest.mark.parametrize(
    "dtype, error",
    [("Q8_0", 0.0053), ("Q6_K", 0.0188), ("Q5_K", 0.038), ("Q5_1", 0.038), ("Q5_0", 0.042), ("Q4_K", 0.078),
     ("Q4_1", 0.078), ("Q4_0", 0.086), ("IQ4_NL", 0.08), ("Q3_K", 0.155), ("Q2_K", 0.327)],
)  # fmt: skip
def test_numbers_come_back_within_the_format(tmp_path, dtype, error):
    """Normal numbers, written by other code than what reads them; ``error`` is relative, of root mean squares."""
    values = np.random.default_rng(2).normal(size=(16, 1024)).astype(np.float32)
    raw = quantise(values, dtype)
    file = open_weights(write_gguf(tmp_path / "x.gguf", [("x", (16, 1024), dtype, raw)]))
    got = np.array(file.read("x"))
    assert 0.9 * error < np.sqrt(((got - values) ** 2).mean() / (values**2).mean()) < 1.1 * error


def test_plain_types(tmp_path):
    half = FLOATS.astype(np.float16)
    brain = FLOATS.view(np.uint32) >> 16
    path = write_gguf(
        tmp_path / "x.gguf",
        [
            ("f32", (4, 64), "F32", FLOATS),
            ("odd", (3,), "F32", FLOATS[0, :3]),
            ("f16", (4, 64), "F16", half),
            ("bf16", (4, 64), "BF16", brain.astype(np.uint16)),
            ("scalar", (), "F32", FLOATS[0, :1]),
        ],
    )
    file = open_weights(path)
    assert bytes_of(file.read("f32")) == FLOATS.tobytes() and file.read("odd").tolist() == FLOATS[0, :3].tolist()
    assert file.read("f16").dtype == mx.float16 and bytes_of(file.read("f16")) == half.tobytes()
    assert file.read("bf16").dtype == mx.bfloat16
    assert file.read("bf16").astype(mx.float32).tolist() == (brain << 16).view(np.float32).tolist()
    assert file.read("scalar").shape == () and bytes_of(file.rows("bf16", [3])) == brain[3].astype(np.uint16).tobytes()
    for key in ("f32", "odd"):
        assert "rows of blocks" in refusal(path, lambda _, k=key: file.raw(k))


def test_files_of_the_gguf_package_are_read(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "pig")
    writer.add_array("tokens", ["a", "▁b"])
    writer.add_array("scores", [0.5, -2.0])
    writer.add_array("nothing", [True])
    writer.add_bool("flag", True)
    writer.add_uint32("number", 7)
    writer.add_tensor("a", FLOATS)
    q = gguf.GGMLQuantizationType.Q8_0
    packed = gguf.quants.quantize(FLOATS, q)
    writer.add_tensor("b", packed, raw_dtype=q)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    file = open_weights(tmp_path / "x.gguf")
    assert file.fields["general.architecture"] == "pig" and file.fields["flag"] is True and file.fields["number"] == 7
    assert file.values("tokens") == ["a", "▁b"] and file.values("scores") == [0.5, -2.0]
    assert "no list" in refusal(file.path, lambda _: file.values("flag"))
    assert bytes_of(file.read("a")) == FLOATS.tobytes()
    assert np.array_equal(np.array(file.read("b")), gguf.quants.dequantize(packed, q))


def test_true_shape_of_reshaped_tensors(tmp_path):
    """ComfyUI's converter flattens what no block divides: here 4 rows of 192 as 3 of 256."""
    raw = blocks("Q4_K", 3, 256)
    true = field("comfy.gguf.orig_shape.x", 9, array(5, 2, struct.pack("<2i", 4, 192)))
    path = write_gguf(tmp_path / "x.gguf", [("x", (3, 256), "Q4_K", raw)], [true])
    file = open_weights(path)
    assert file.tensors["x"].shape == (4, 192)
    want = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q4_K).reshape(4, 192)
    assert np.array_equal(np.array(file.read("x")), want) and file.nbytes("x") == raw.nbytes
    assert np.array_equal(np.array(file.rows("x", [3, 1])), want[[3, 1]])
    assert "rows of blocks" in refusal(path, lambda _: file.raw("x"))
    for count, payload in ((2, struct.pack("<2i", 4, 191)), (2, struct.pack("<2i", -4, -192)), (99, bytes(396))):
        true = field("comfy.gguf.orig_shape.x", 9, array(5, count, payload))
        refusal(write_gguf(path, [("x", (3, 256), "Q4_K", raw)], [true]))


def test_other_alignment(tmp_path):
    align = field("general.alignment", 4, struct.pack("<I", 64))
    tensors = [("x", (3,), "F32", FLOATS[0, :3]), ("y", (2,), "F32", FLOATS[1, :2])]
    file = open_weights(write_gguf(tmp_path / "x.gguf", tensors, [align], alignment=64))
    assert file.read("y").tolist() == FLOATS[1, :2].tolist()


ONE = [("x", (2, 32), "F32", FLOATS[:1])]
RAW = struct.pack


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(version=1), "version 1"),
        (dict(version=3 << 24), "big-endian"),
        (dict(counts=(2**60, 0)), "1,152,921,504,606,846,976 tensors"),
        (dict(counts=(1, 2**60)), "metadata fields"),
        (dict(counts=(2, 0)), "damaged"),
        (dict(counts=(1, 1)), ""),
        (dict(fields=[field("k", 8, RAW("<Q", 2**62))]), "cut short"),
        (dict(fields=[RAW("<Q", 2**62)]), "cut short"),
        (dict(fields=[field("k", 9, array(8, 2**60, b""))]), "cut short"),
        (dict(fields=[field("k", 9, array(4, 2**61, b""))]), "cut short"),
        (dict(fields=[field("k", 9, array(9, 1, array(4, 1, bytes(4))))]), "list of type 9"),
        (dict(fields=[field("k", 99, b"")]), "unknown type 99"),
        (dict(fields=[field(b"\xff", 7, b"\1")]), "UTF-8"),
        (dict(fields=[field("a\nb", 7, b"\1")]), "name"),
        (dict(fields=[field("", 7, b"\1")]), "name"),
        (dict(fields=[field("k" * 2000, 7, b"\1")]), "name"),
        (dict(fields=[field("k", 7, b"\1")] * 2), "twice"),
        (dict(fields=[field("general.alignment", 4, RAW("<I", 24))]), "alignment"),
        (dict(fields=[field("general.alignment", 4, RAW("<I", 0))]), "alignment"),
        (dict(fields=[field("general.alignment", 4, RAW("<I", 2**31))]), "alignment"),
        (dict(fields=[field("general.alignment", 8, RAW("<Q", 1) + b"8")]), "alignment"),
        (dict(fields=[field("split.count", 2, RAW("<H", 3))]), "one of 3 parts"),
        (dict(infos=[info("x", (2, 32), 0, 0)] * 2), "twice"),
        (dict(infos=[info("x", (1,) * 99, 0, 0)]), "99 dimensions"),
        (dict(infos=[info("x", (2**40,), 0, 0)]), "2**31"),
        (dict(infos=[info("x", (2**30, 2**30, 2**30), 0, 0)]), "cut short"),
        (dict(infos=[info("x", (2, 32), 16, 0)]), "IQ2_XXS"),
        (dict(infos=[info("x", (2, 32), 77, 0)]), "number 77"),
        (dict(infos=[info("x", (2, 33), 8, 0)]), "whole 32s"),
        (dict(infos=[info("x", (2, 32), 0, 32)]), "does not follow"),
        (dict(infos=[info("x", (2, 32), 0, 2**63)]), "does not follow"),
        (dict(infos=[info("x", (1, 8), 0, 0), info("y", (1, 8), 0, 16)]), "overlaps"),
        (dict(infos=[info("x", (1, 8), 0, 0), info("y", (1, 8), 0, 0)]), "overlaps"),
        (dict(infos=[info("x", (1, 8), 0, 0), info("y", (1, 8), 0, 64)]), "does not follow"),
        (dict(infos=[info("x", (3, 32), 0, 0)]), "cut short"),
    ],
)
def test_hostile_headers(tmp_path, change, word):
    path = tmp_path / "x.gguf"
    tracemalloc.start()
    try:
        assert word in refusal(write_gguf(path, ONE, **change))
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_texts_are_counted_over_all_lists(tmp_path, monkeypatch):
    monkeypatch.setattr("wan_mlx.files.gguf._MAX_STRINGS", 10)
    fields = [field(name, 9, array(8, 8, bytes(64))) for name in ("a", "b")]
    open_weights(write_gguf(tmp_path / "x.gguf", ONE, fields[:1]))
    assert "at most 10" in refusal(write_gguf(tmp_path / "x.gguf", ONE, fields))


def test_wrong_magic(tmp_path):
    refusal(write_gguf(tmp_path / "x.gguf", ONE, magic=b"GGML"))


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_scale_that_is_not_finite(tmp_path, number):
    raw = blocks("Q4_K", 2, 256)
    raw[1, :2] = np.array([number], np.float16).view(np.uint8)
    file = open_weights(write_gguf(tmp_path / "x.gguf", [("x", (2, 256), "Q4_K", raw)]))
    assert "not finite" in refusal(file.path, lambda _: file.read("x"))
    assert file.rows("x", [0]).shape == (1, 256)
    assert "not finite" in refusal(file.path, lambda _: file.rows("x", [1]))


def test_without_the_gguf_package(tmp_path, monkeypatch):
    plain = write_gguf(tmp_path / "plain.gguf", ONE)
    packed = write_gguf(tmp_path / "packed.gguf", [("x", (1, 32), "Q8_0", blocks("Q8_0", 1, 32))])
    monkeypatch.setattr("wan_mlx.files.gguf.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert open_weights(plain).read("x").shape == (2, 32)
    assert f"Q8_0 blocks need the gguf package: {install_command('gguf')}" in refusal(packed)


def small(path):
    fields = [
        field("general.architecture", 8, struct.pack("<Q", 3) + b"wan"),
        field("k", 9, array(8, 2, struct.pack("<Q", 1) + b"a" + struct.pack("<Q", 2) + b"bc")),
        field("comfy.gguf.orig_shape.y", 9, array(5, 2, struct.pack("<2i", 2, 16))),
    ]
    return write_gguf(path, [*ONE, ("y", (1, 32), "Q8_0", blocks("Q8_0", 1, 32))], fields)


def test_truncation_at_every_length(tmp_path):
    whole = small(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    last_byte = len(whole) - 30  # what follows is padding
    for length in range(last_byte):
        path.write_bytes(whole[:length])
        refusal(path)


def test_flipped_bytes_in_a_header(tmp_path):
    whole = small(tmp_path / "whole.gguf").read_bytes()
    path, opened = tmp_path / "damaged.gguf", 0
    tracemalloc.start()
    try:
        for seed in range(300):
            dice, damaged = random.Random(seed), bytearray(whole)
            for _ in range(dice.choice((1, 1, 2, 5))):
                damaged[dice.randrange(4, 360)] ^= dice.choice((1 << dice.randrange(8), dice.randrange(1, 256)))
            path.write_bytes(damaged)
            try:
                file = open_weights(path)
                [file.read(key) for key in file.tensors]
                [file.values(name) for name in ("k",) if name in file.fields]
                opened += 1
            except WeightsError as error:
                assert "\n" not in str(error)
        assert 0 < opened < 250 and tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_a_file_that_changes_while_open(tmp_path):
    file = open_weights(small(tmp_path / "x.gguf"))
    os.truncate(file.path, 300)
    for act in (lambda _: file.read("y"), lambda _: file.read("x"), lambda _: file.values("k")):
        assert "changed since it was opened" in refusal(file.path, act)
