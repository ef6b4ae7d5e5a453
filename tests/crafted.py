"""Weight files crafted byte by byte, good and bad, and how their refusal is read."""

import json
import math
import os
import pickle
import struct
import zipfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from wan_mlx.errors import WeightsError
from wan_mlx.files.open import open_weights


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


def header_only(path, shapes, dtype="BF16", metadata=None):
    """A safetensors file of tensors of these shapes that takes no space: there is a hole in place of its data."""
    sizes = {"BF16": 2, "F32": 4, "F16": 2, "F8_E4M3": 1}
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for key, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * sizes[dtype]
        header[key] = entry(dtype, list(shape), begin, end)
    write_safetensors(path, header)
    os.truncate(path, path.stat().st_size + end)
    return path
