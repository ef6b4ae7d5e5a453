"""Tensors read straight into MLX's memory by several threads: the same bytes, and errors that name what is wrong."""

import os
import threading

import mlx.core as mx
import numpy as np
import pytest
from crafted import bytes_of, entry, mapping, refusal, storage, tensor, values, write_pth, write_safetensors

from wan_mlx.files import parallel_read as direct
from wan_mlx.files.open import open_weights
from wan_mlx.files.parallel_read import read_tensor
from wan_mlx.files.scaled import fold

COUNT = 3000


@pytest.fixture
def small_pieces(monkeypatch):
    """Tensors of 12,000 bytes come in many pieces, the last of them short."""
    monkeypatch.setattr(direct, "PIECE", 1001)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "bytes"
    path.write_bytes(np.random.default_rng(0).bytes(4 * COUNT + 10))
    return path


def opener(path):
    return lambda: open(path, "rb", buffering=0)


@pytest.mark.parametrize("shape", [(COUNT,), (3, 1000), (0, 2), ()])
def test_the_bytes_are_those_of_the_file(small_pieces, path, shape):
    nbytes = 4 * int(np.prod(shape))
    array = read_tensor(opener(path), 7, "F32", shape, nbytes)
    assert array.dtype == mx.float32 and array.shape == shape
    assert bytes_of(array) == path.read_bytes()[7 : 7 + nbytes]


def test_pieces_are_read_by_several_threads(small_pieces, path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    direct._threads.cache_clear()
    met = threading.Barrier(2, timeout=60)  # passes only when two threads have come to it
    seen = set()

    def open_file():
        if threading.get_ident() not in seen:
            seen.add(threading.get_ident())
            met.wait()
        return open(path, "rb", buffering=0)

    try:
        array = read_tensor(open_file, 0, "U8", (4 * COUNT,), 4 * COUNT)
    finally:
        direct._threads().shutdown()
        direct._threads.cache_clear()
    assert len(seen) == 2 and bytes_of(array) == path.read_bytes()[: 4 * COUNT]


@pytest.mark.parametrize("piece", [1001, direct.PIECE])
def test_a_file_that_ends_early_is_an_error(path, monkeypatch, piece):
    monkeypatch.setattr(direct, "PIECE", piece)
    with pytest.raises(EOFError) as caught:
        read_tensor(opener(path), 20, "F32", (COUNT,), 4 * COUNT)
    assert caught.value.args == (10,)


@pytest.mark.parametrize("piece", [1001, direct.PIECE])
def test_a_file_that_cannot_be_opened_is_an_error(path, monkeypatch, piece):
    monkeypatch.setattr(direct, "PIECE", piece)
    with pytest.raises(FileNotFoundError):
        read_tensor(opener(path.with_name("none")), 0, "F32", (COUNT,), 4 * COUNT)


def test_a_file_that_shrinks_while_it_is_read(small_pieces, tmp_path, monkeypatch):
    """Between the check that it is unchanged and reading: an error of one line, never a signal."""
    path = write_pth(tmp_path / "x.pth", mapping(x=tensor(shape=(6,), strides=(1,))))
    file = open_weights(path)
    start = file._start("x")
    monkeypatch.setattr(file, "check_unchanged", lambda: None)
    os.truncate(path, start + 20)
    assert "ends 4 bytes early" in refusal(path, lambda _: file.read("x"))
    path.unlink()
    assert "x cannot be read (No such file or directory)" in refusal(path, lambda _: file.read("x"))


def test_a_file_replaced_while_it_is_read(tmp_path, monkeypatch):
    path = write_pth(tmp_path / "x.pth")
    file = open_weights(path)
    real = file._start

    def replaced(key):
        write_pth(path, mapping(x=tensor(), y=tensor()))
        return real(key)

    monkeypatch.setattr(file, "_start", replaced)
    assert "changed since it was opened" in refusal(path, lambda _: file.read("x"))


@pytest.mark.parametrize("kind", ["FloatStorage", "BFloat16Storage", "HalfStorage", "ByteStorage", "BoolStorage"])
def test_pth_in_pieces(small_pieces, tmp_path, kind):
    """A view into the middle of a storage."""
    size = {"FloatStorage": 4, "BFloat16Storage": 2, "HalfStorage": 2}.get(kind, 1)
    data = np.random.default_rng(0).integers(0, 2, COUNT * size).astype(np.uint8)
    body = mapping(x=tensor(storage(kind=kind, count=COUNT), 5, (2, COUNT // 2 - 5), (COUNT // 2 - 5, 1)))
    file = open_weights(write_pth(tmp_path / "x.pth", body, {"data/0": data.tobytes()}))
    assert bytes_of(file.read("x")) == bytes_of(file.read_now("x")) == data.tobytes()[5 * size : (COUNT - 5) * size]


def test_reading_now_is_reading(small_pieces, tmp_path, monkeypatch):
    """Of safetensors, their shards and fp8 with scales: what is read at once is what lazy arrays would hold."""
    monkeypatch.setattr("wan_mlx.files.safetensors.PIECE", 1001)
    want, codes = values(np.float32, COUNT), np.arange(COUNT, dtype=np.uint8) % 100
    header = {
        "x": entry("F32", [COUNT], 0, 4 * COUNT),
        "w.weight": entry("F8_E4M3", [2, COUNT // 2], 4 * COUNT, 5 * COUNT),
        "w.scale_weight": entry("F32", [], 5 * COUNT, 5 * COUNT + 4),
    }
    data = want.tobytes() + codes.tobytes() + np.float32(0.5).tobytes()
    path = write_safetensors(tmp_path / "1.safetensors", header, data)
    index = tmp_path / "x.safetensors.index.json"
    index.write_text('{"weight_map": {"x": "1.safetensors", "w.weight": "1.safetensors", '
                     '"w.scale_weight": "1.safetensors"}}')  # fmt: skip
    for opened in (open_weights(path), open_weights(index), fold(open_weights(path)), fold(open_weights(index))):
        for key in opened.tensors:
            now, lazy = opened.read_now(key), opened.read(key)
            assert now.dtype == lazy.dtype and bytes_of(now) == bytes_of(lazy)
    file = open_weights(path)
    monkeypatch.setattr(file, "_load", None)
    assert bytes_of(file.read_now("x")) == want.tobytes()  # not through MLX's own reading of the file
    assert "'y'" in refusal(path, lambda _: file.read_now("y"))
