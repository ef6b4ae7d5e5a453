"""GGUF files crafted byte by byte: the format's own rules, apart from the ``gguf`` package and from our reader."""

import struct

import numpy as np

# Numbers of ggml's types: (number, values in a block, bytes of a block).
GGML = {
    "F32": (0, 1, 4), "F16": (1, 1, 2), "BF16": (30, 1, 2), "I32": (26, 1, 4),
    "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22), "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34),
    "Q2_K": (10, 256, 84), "Q3_K": (11, 256, 110), "Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210), "IQ4_NL": (20, 32, 18), "IQ4_XS": (23, 256, 136), "IQ2_XXS": (16, 256, 66),
}  # fmt: skip
# Where a block keeps its float16 numbers; the rest of it may be any bytes.
SCALES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip


def blocks(dtype: str, *shape: int, seed: int = 0) -> np.ndarray:
    """Valid random blocks: uint8 (rows, bytes of a row) for a tensor of ``shape``."""
    _, values, size = GGML[dtype]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (int(np.prod(shape)) // values, size), np.uint8)
    for at in SCALES[dtype]:
        raw[:, at : at + 2] = rng.uniform(0.01, 0.1, (len(raw), 1)).astype(np.float16).view(np.uint8)
    return raw.reshape(*shape[:-1], -1)


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def field(name, kind: int, payload: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + payload


def array(kind: int, count: int, payload: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + payload


def info(name, shape, number: int, offset: int) -> bytes:
    """A tensor's entry; ``shape`` in torch's order."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), number, offset)


def write_gguf(path, tensors=(), fields=(), *, magic=b"GGUF", version=3, counts=None, alignment=32, infos=None):
    """``tensors``: (name, torch shape, type, data); ``fields`` of `field`; ``counts``, ``infos`` replace them."""
    entries, data = [], b""
    for name, shape, dtype, values in tensors:
        data += bytes(-len(data) % alignment)
        entries.append(info(name, shape, GGML[dtype][0], len(data)))
        data += values.tobytes() if isinstance(values, np.ndarray) else values
    entries = entries if infos is None else infos
    tensor_count, field_count = counts or (len(entries), len(fields))
    head = magic + struct.pack("<IQQ", version, tensor_count, field_count) + b"".join([*fields, *entries])
    path.write_bytes(head + bytes(-len(head) % alignment) + data + bytes(-len(data) % alignment))
    return path
