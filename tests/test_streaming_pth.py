"""umT5 from a .pth: a thread reads the next block while one computes, to the same bits as from safetensors."""

import json
import os
import threading

import mlx.core as mx
import numpy as np
import pytest
from crafted import bytes_of, mapping, storage, tensor, write_pth

from wan_mlx.errors import WeightsError
from wan_mlx.files.open import open_weights
from wan_mlx.files.pth import TorchFile
from wan_mlx.models.configs import TextEncoderConfig
from wan_mlx.models.text_encoder import TextEncoder
from wan_mlx.weights.component import parameter_shapes
from wan_mlx.weights.load import load_text_encoder

CONFIG = TextEncoderConfig(vocab_size=40, dim=128, dim_attn=128, dim_ffn=256, num_heads=2, num_layers=4)
IDS = [[3, 7, 7, 1], [0, 39]]
KINDS = {mx.float32: "FloatStorage", mx.bfloat16: "BFloat16Storage"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same weights as .pth and as safetensors; dtype → both paths."""
    folder, rng = tmp_path_factory.mktemp("umt5"), np.random.default_rng(0)

    def write(dtype):
        pth, safetensors = (folder / f"{dtype.size}.{ending}" for ending in ("pth", "safetensors"))
        arrays = {
            name: mx.array(rng.normal(size=shape).astype(np.float32) * shape[-1] ** -0.5).astype(dtype)
            for name, shape in parameter_shapes(TextEncoder(CONFIG)).items()
        }
        mx.save_safetensors(str(safetensors), arrays)
        views = {
            name: tensor(storage(str(i), KINDS[dtype], a.size), 0, a.shape, (a.shape[-1], 1)[-a.ndim :])
            for i, (name, a) in enumerate(arrays.items())
        }
        data = {f"data/{i}": bytes_of(a) for i, a in enumerate(arrays.values())}
        return write_pth(pth, mapping(**views), data), safetensors

    return {dtype: write(dtype) for dtype in KINDS}


def encode(path, dtype):
    return load_text_encoder(path, dtype)(IDS)


@pytest.mark.parametrize(
    "stored, dtype", [(mx.bfloat16, "bfloat16"), (mx.bfloat16, "float32"), (mx.float32, "bfloat16")]
)
def test_same_bits_as_from_safetensors(files, stored, dtype):
    pth, safetensors = files[stored]
    for got, want in zip(encode(pth, dtype), encode(safetensors, dtype), strict=True):
        assert got.dtype == want.dtype and mx.array_equal(got, want) and want.std() > 0.01


def test_the_next_block_is_read_while_one_computes(files, monkeypatch):
    """By a thread: only the embeddings' rows, and what no block holds, are read where they are asked for."""
    names = [name for name in parameter_shapes(TextEncoder(CONFIG)) if name.startswith("blocks.1.")]
    read, done, real = [], threading.Event(), TorchFile.read

    def watched(self, key):
        array = real(self, key)
        read.append((key, threading.current_thread() is threading.main_thread()))
        if {key for key, _ in read} >= set(names):
            done.set()
        return array

    encoder = load_text_encoder(files[mx.bfloat16][0])
    monkeypatch.setattr(TorchFile, "read", watched)
    blocks = iter(encoder.blocks())
    next(blocks)
    assert done.wait(60)  # all of block 1, though only block 0 was asked for
    assert not any(key.startswith("blocks.2.") or main for key, main in read)
    blocks.close()


def test_no_more_than_two_blocks_are_resident(files):
    shapes = parameter_shapes(TextEncoder(CONFIG))
    stored = sum(4 * int(np.prod(shape)) for name, shape in shapes.items() if name.startswith("blocks.0."))
    encoder = load_text_encoder(files[mx.float32][0], "float32")
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in encoder.blocks():
        pass
    assert mx.get_peak_memory() - before <= 2.05 * stored


def test_errors_of_the_prefetch_thread_are_raised_with_their_block(files, tmp_path):
    path = tmp_path / "copy.pth"
    path.write_bytes(files[mx.bfloat16][0].read_bytes())
    encoder = load_text_encoder(path)
    os.truncate(path, 1000)
    with pytest.raises(WeightsError, match="changed since it was opened"):
        next(iter(encoder.blocks()))
    assert len(encode(files[mx.bfloat16][0], "bfloat16")) == 2  # readers are there for the next


def test_an_abandoned_pass_stops_prefetching(files, monkeypatch):
    read, real = [], TorchFile.read
    begun, go_on = threading.Event(), threading.Event()

    def slow(self, key):
        read.append(key)
        if key.startswith("blocks.1."):
            begun.set()
            assert go_on.wait(60)
        return real(self, key)

    encoder = load_text_encoder(files[mx.bfloat16][0])
    monkeypatch.setattr(TorchFile, "read", slow)
    blocks = iter(encoder.blocks())
    next(blocks)
    assert begun.wait(60)
    threading.Timer(0.2, go_on.set).start()
    blocks.close()  # waits for the thread
    assert sum(key.startswith("blocks.1.") for key in read) == 1


def test_which_files_are_lazy(files, tmp_path):
    pth, safetensors = files[mx.bfloat16]
    assert open_weights(safetensors).is_lazy and not open_weights(pth).is_lazy
    index = tmp_path / "x.safetensors.index.json"
    for source in (pth, safetensors):
        shard = tmp_path / source.name
        shard.write_bytes(source.read_bytes())
        index.write_text(json.dumps({"weight_map": dict.fromkeys(parameter_shapes(TextEncoder(CONFIG)), shard.name)}))
        assert open_weights(index).is_lazy == open_weights(source).is_lazy
