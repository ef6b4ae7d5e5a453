"""umT5's sentencepiece model, from any place where a checkpoint has it.

It is its own file (``spiece.model``), or a uint8 tensor ``spiece_model`` in ComfyUI's text encoders, or is rebuilt:
from a GGUF's metadata, as llama.cpp's converter writes it, or from the ``tokenizer.json`` that transformers 5 saves in
place of the model. Both of those have every piece with score and kind, and the normalisation table.
"""

from __future__ import annotations

import base64
import json
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import WeightsError
from .base import WeightsFile
from .open import ShardedFile, format_of, open_weights

EMBEDDED = "spiece_model"  # ComfyUI's tensor
GGUF_TOKENS = "tokenizer.ggml.tokens"
# Places in a folder, relative to it; the first wins.
FILE_NAMES = ("spiece.model", "tokenizer.model", "tokenizer.json")
_MAX_BYTES = 100_000_000  # umT5's tokenizer.json has 17 million
# sentencepiece's kinds of pieces; GGUF uses the same numbers.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_EXTRA_ID = re.compile(r"<extra_id_\d+>")
_PADDING = re.compile(r"\[PAD\d+\]")


@dataclass
class Unigram:
    """A parsed sentencepiece model: pieces as (text, score, kind), special ids (-1 for none), normalisation."""

    pieces: list[tuple[str, float, int]]
    ids: dict[str, int]  # "unk", "bos", "eos", "pad"
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True

    def serialize(self) -> bytes:
        """The model in sentencepiece's format (``sentencepiece_model.proto``: ModelProto)."""
        pieces = b"".join(
            _bytes_field(1, _bytes_field(1, text.encode()) + _float_field(2, score) + _number_field(3, kind))
            for text, score, kind in self.pieces
        )
        trainer = _number_field(3, 1) + _number_field(4, len(self.pieces))  # unigram
        trainer += _number_field(35, any(kind == _BYTE for *_, kind in self.pieces))
        for number, name in enumerate(("unk", "bos", "eos", "pad")):
            index = self.ids.get(name, -1)
            trainer += _number_field(40 + number, index)
            if index >= 0:
                trainer += _bytes_field(45 + number, self.pieces[index][0].encode())
        normalizer = _bytes_field(1, b"user_defined" if self.charsmap else b"identity")
        normalizer += _bytes_field(2, self.charsmap)
        normalizer += _number_field(3, self.add_dummy_prefix) + _number_field(4, self.remove_extra_whitespaces)
        return pieces + _bytes_field(2, trainer) + _bytes_field(3, normalizer)


def _varint(value: int) -> bytes:
    value &= 2**64 - 1  # negative numbers are stored as 64-bit two's complement
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _number_field(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(int(value))


def _float_field(number: int, value: float) -> bytes:
    return _varint(number << 3 | 5) + struct.pack("<f", value)


def _bytes_field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def has_tokenizer(file: WeightsFile) -> bool:
    """Whether a text encoder's file contains its tokenizer."""
    return EMBEDDED in file.tensors or GGUF_TOKENS in file.fields


def find_tokenizer(folder: Path) -> Path | None:
    """The tokenizer in a folder of any layout, or None."""
    places = (folder, folder / "tokenizer", folder / "google/umt5-xxl")
    return next((place / name for place in places for name in FILE_NAMES if (place / name).is_file()), None)


def read_tokenizer(path: str | Path) -> bytes:
    """The serialized sentencepiece model, from a tokenizer file, a folder that has one, or a text encoder's file.

    Raises:
        WeightsError: no such file, no tokenizer in it, or another kind than umT5's.
    """
    path = Path(path)
    if path.is_dir():
        found = find_tokenizer(path)
        if found is None:
            raise WeightsError(f"{path}: no tokenizer in this folder; expected {' or '.join(FILE_NAMES)}")
        path = found
    try:
        with open(path, "rb") as file:
            head = file.read(16)
            if format_of(head) not in (None, ShardedFile):
                return _from_weights(open_weights(path))
            size = os.fstat(file.fileno()).st_size
            if size > _MAX_BYTES:
                raise WeightsError(f"{path}: {size:,} bytes are no tokenizer; expected umT5's spiece.model")
            data = head + file.read()
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror}), expected umT5's spiece.model") from None
    return _from_json(path, data).serialize() if data.lstrip().startswith(b"{") else data


def _from_weights(file: WeightsFile) -> bytes:
    if not has_tokenizer(file):
        raise WeightsError(f"{file.path}: holds no tokenizer; give umT5's spiece.model with --tokenizer")
    if GGUF_TOKENS in file.fields:
        return _from_gguf(file).serialize()
    info = file.tensors[EMBEDDED]
    if info.dtype not in ("U8", "I8") or info.nbytes > _MAX_BYTES:
        raise WeightsError(f"{file.path}: {EMBEDDED} is {info.dtype} {info.shape}, expected bytes in U8")
    with mx.stream(mx.cpu):
        return np.array(file.read(EMBEDDED)).tobytes()


def _from_gguf(file: WeightsFile) -> Unigram:
    """llama.cpp's ``tokenizer.ggml.*`` → the model, without padding to the embedding's number of rows."""
    fields = {name.removeprefix("tokenizer.ggml."): value for name, value in file.fields.items()}
    if fields.get("model") != "t5":
        raise WeightsError(f"{file.path}: its tokenizer is {fields.get('model')!r}, expected 't5' (unigram)")
    texts, scores, kinds = (file.values(f"tokenizer.ggml.{name}") for name in ("tokens", "scores", "token_type"))
    if not len(texts) == len(scores) == len(kinds) or not all(isinstance(text, str) for text in texts):
        raise WeightsError(
            f"{file.path}: damaged tokenizer ({len(texts)} tokens, {len(scores)} scores, {len(kinds)} types)"
        )
    pieces = list(zip(texts, map(float, scores), map(int, kinds), strict=True))
    while pieces and _is_filling(pieces[-1]):
        pieces.pop()
    names = {"unk": "unknown_token_id", "bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id"}
    ids = {ours: fields.get(theirs, -1) for ours, theirs in names.items()}
    ids["unk"] = next((i for i, (*_, kind) in enumerate(pieces) if kind == _UNKNOWN), ids["unk"])
    charsmap = "precompiled_charsmap"
    return _checked(
        file.path,
        Unigram(
            pieces,
            ids,
            bytes(v & 255 for v in file.values(f"tokenizer.ggml.{charsmap}")) if charsmap in fields else b"",
            bool(fields.get("add_space_prefix", True)),
            bool(fields.get("remove_extra_whitespaces", True)),
        ),
    )


def _is_filling(piece: tuple[str, float, int]) -> bool:
    text, _, kind = piece
    return (kind == _UNUSED and bool(_PADDING.fullmatch(text))) or bool(_EXTRA_ID.fullmatch(text))


def _from_json(path: Path, data: bytes) -> Unigram:
    """A ``tokenizer.json`` of the tokenizers library → the model, without its final ``<extra_id_n>``."""
    try:
        config = json.loads(data)
        model, added = config["model"], config.get("added_tokens") or []
        if model["type"] != "Unigram":
            raise WeightsError(f"{path}: a tokenizer of the type {str(model['type'])[:40]}, expected Unigram")
        special = {token["content"] for token in added if token["special"]} | {"<pad>", "</s>", "<s>"}
        vocab = [(text, float(score)) for text, score in model["vocab"]]
        # transformers 5 always stores 2, which is umT5's <s>.
        unknown = next((i for i, (text, _) in enumerate(vocab) if text == "<unk>"), int(model["unk_id"]))
        charsmap = _charsmap(config.get("normalizer"))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise WeightsError(f"{path}: damaged, or not the tokenizer.json of umT5; give its spiece.model") from None
    while vocab and _EXTRA_ID.fullmatch(str(vocab[-1][0])):
        vocab.pop()
    has_bytes = sum(bool(_BYTE_PIECE.fullmatch(str(text))) for text, _ in vocab) == 256

    def kind(index: int, text: str) -> int:
        if index == unknown:
            return _UNKNOWN
        if has_bytes and _BYTE_PIECE.fullmatch(text):
            return _BYTE
        return _CONTROL if text in special else _NORMAL

    pieces = [(text, score, kind(i, text)) for i, (text, score) in enumerate(vocab)]
    index = {text: i for i, (text, *_) in enumerate(pieces)}
    ids = {"unk": unknown, "bos": index.get("<s>", -1), "eos": index.get("</s>", -1), "pad": index.get("<pad>", -1)}
    return _checked(path, Unigram(pieces, ids, charsmap))


def _charsmap(normalizer: dict[str, Any] | None) -> bytes:
    """The normalisation table of a tokenizer.json; Replace and Strip only affect spaces, which are cleaned before."""
    if normalizer is None:
        return b""
    if normalizer["type"] == "Sequence":
        return b"".join(_charsmap(part) for part in normalizer["normalizers"])
    return base64.b64decode(normalizer["precompiled_charsmap"] or "") if normalizer["type"] == "Precompiled" else b""


def _checked(path: Path, model: Unigram) -> Unigram:
    count = len(model.pieces)
    for name, index in model.ids.items():
        if type(index) is not int or not -1 <= index < count:
            raise WeightsError(f"{path}: damaged tokenizer ({name} is the id {index} of {count} pieces)")
    if model.ids["eos"] < 0 or model.ids["unk"] < 0:
        raise WeightsError(f"{path}: a tokenizer without {'</s>' if model.ids['eos'] < 0 else '<unk>'}")
    if not all(isinstance(text, str) and text for text, *_ in model.pieces):
        raise WeightsError(f"{path}: damaged tokenizer (a piece without text)")
    return model
