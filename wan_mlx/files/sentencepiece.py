"""umT5's sentencepiece model, from any place where a checkpoint has it.

It is its own file (``spiece.model``), or a uint8 tensor ``spiece_model`` in ComfyUI's text encoders, or is rebuilt:
from a GGUF's metadata, as llama.cpp's converter writes it, or from the ``tokenizer.json`` that transformers 5 saves in
place of the model. Both of those have every piece with score and kind, and the normalisation table.
"""

from __future__ import annotations

import base64
import os
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import WeightsError
from ..storage import parse_json
from .base import WeightsFile
from .open import ShardedFile, format_of, open_weights

EMBEDDED = "spiece_model"  # ComfyUI's tensor, in a checkpoint of a whole model with a prefix
GGUF_TOKENS = "tokenizer.ggml.tokens"
# Places in a folder, relative to it; the first wins.
FILE_NAMES = ("spiece.model", "tokenizer.model", "tokenizer.json")
MAX_TOKENIZER_BYTES = 100_000_000  # umT5's tokenizer.json has 17 million
# sentencepiece's kinds of pieces; GGUF uses the same numbers.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_EXTRA_ID = re.compile(r"<extra_id_\d+>")
_PADDING = re.compile(r"\[PAD\d+\]")


def has_tokenizer(file: WeightsFile) -> bool:
    """Whether a text encoder's file contains its tokenizer."""
    return _embedded(file) is not None or GGUF_TOKENS in file.fields


def _embedded(file: WeightsFile) -> str | None:
    """ComfyUI's tensor of the tokenizer."""
    return next((key for key in file.tensors if key.rpartition(".")[2] == EMBEDDED), None)


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
            if size > MAX_TOKENIZER_BYTES:
                raise WeightsError(f"{path}: {size:,} bytes are no tokenizer; expected umT5's spiece.model")
            data = head + file.read()
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror}), expected umT5's spiece.model") from None
    return _from_json(path, data) if data.lstrip().startswith(b"{") else data


def _from_weights(file: WeightsFile) -> bytes:
    if GGUF_TOKENS in file.fields:
        return _from_gguf(file)
    if (key := _embedded(file)) is None:
        raise WeightsError(f"{file.path}: holds no tokenizer; give umT5's spiece.model with --tokenizer")
    info = file.tensors[key]
    if info.dtype not in ("U8", "I8") or info.nbytes > MAX_TOKENIZER_BYTES:
        raise WeightsError(f"{file.path}: {key} is {info.dtype} {info.shape}, expected bytes in U8")
    with mx.stream(mx.cpu):
        return np.array(file.read(key)).tobytes()


def _from_gguf(file: WeightsFile) -> bytes:
    """From llama.cpp's ``tokenizer.ggml.*``, without padding to the embedding's number of rows."""
    fields = {name.removeprefix("tokenizer.ggml."): value for name, value in file.fields.items()}
    if fields.get("model") != "t5":
        raise WeightsError(f"{file.path}: its tokenizer is {fields.get('model')!r}, expected 't5' (unigram)")
    texts, scores, kinds = (file.values(f"tokenizer.ggml.{name}") for name in ("tokens", "scores", "token_type"))
    if not len(texts) == len(scores) == len(kinds):
        raise WeightsError(
            f"{file.path}: damaged tokenizer ({len(texts)} tokens, {len(scores)} scores, {len(kinds)} types)"
        )
    pieces = list(zip(texts, scores, kinds, strict=True))
    while pieces and _is_filling(*pieces[-1]):
        pieces.pop()
    names = {"unk": "unknown_token_id", "bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id"}
    ids = {ours: fields.get(theirs, -1) for ours, theirs in names.items()}
    ids["unk"] = next((i for i, (*_, kind) in enumerate(pieces) if kind == _UNKNOWN), ids["unk"])
    has_charsmap = "precompiled_charsmap" in fields
    charsmap = file.values("tokenizer.ggml.precompiled_charsmap") if has_charsmap else []
    spaces = (bool(fields.get(name, True)) for name in ("add_space_prefix", "remove_extra_whitespaces"))
    return _serialized(file.path, pieces, ids, bytes(value & 255 for value in charsmap), *spaces)


def _is_filling(text: Any, score: Any, kind: Any) -> bool:
    return bool((kind == _UNUSED and _PADDING.fullmatch(str(text))) or _EXTRA_ID.fullmatch(str(text)))


def _from_json(path: Path, data: bytes) -> bytes:
    """From a ``tokenizer.json`` of the tokenizers library, without its final ``<extra_id_n>``."""
    try:
        config = parse_json(data)
        model, added = config["model"], config.get("added_tokens") or []
        if model["type"] != "Unigram":
            raise WeightsError(f"{path}: a tokenizer of the type {str(model['type'])[:40]!r}, expected Unigram")
        special = {token["content"] for token in added if token["special"]} | {"<pad>", "</s>", "<s>"}
        vocab = [(str(text), float(score)) for text, score in model["vocab"]]
        # transformers 5 always stores 2, which is umT5's <s>.
        unknown = next((i for i, (text, _) in enumerate(vocab) if text == "<unk>"), int(model["unk_id"]))
        charsmap = _charsmap(config.get("normalizer"))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        raise WeightsError(f"{path}: damaged, or not the tokenizer.json of umT5; give its spiece.model") from None
    while vocab and _EXTRA_ID.fullmatch(vocab[-1][0]):
        vocab.pop()
    has_bytes = sum(bool(_BYTE_PIECE.fullmatch(text)) for text, _ in vocab) == 256

    def kind(index: int, text: str) -> int:
        if index == unknown:
            return _UNKNOWN
        if has_bytes and _BYTE_PIECE.fullmatch(text):
            return _BYTE
        return _CONTROL if text in special else _NORMAL

    pieces = [(text, score, kind(i, text)) for i, (text, score) in enumerate(vocab)]
    index = {text: i for i, (text, *_) in enumerate(pieces)}
    ids = {"unk": unknown, "bos": index.get("<s>", -1), "eos": index.get("</s>", -1), "pad": index.get("<pad>", -1)}
    return _serialized(path, pieces, ids, charsmap)


def _charsmap(normalizer: dict[str, Any] | None) -> bytes:
    """The normalisation table of a tokenizer.json; Replace and Strip only affect spaces, which are cleaned before."""
    if normalizer is None:
        return b""
    if normalizer["type"] == "Sequence":
        return b"".join(_charsmap(part) for part in normalizer["normalizers"])
    return base64.b64decode(normalizer["precompiled_charsmap"] or "") if normalizer["type"] == "Precompiled" else b""


def _serialized(
    path: Path,
    pieces: list[tuple[str, float, int]],
    ids: dict[str, int],
    charsmap: bytes,
    add_dummy_prefix: bool = True,
    remove_extra_whitespaces: bool = True,
) -> bytes:
    """A model of ``pieces`` (text, score, kind), with the ids of unk, bos, eos and pad, -1 for none."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    for name, index in ids.items():
        if type(index) is not int or not -1 <= index < len(pieces):
            raise WeightsError(f"{path}: damaged tokenizer ({name} is the id {index} of {len(pieces)} pieces)")
    if ids["eos"] < 0 or ids["unk"] < 0:
        raise WeightsError(f"{path}: a tokenizer without {'</s>' if ids['eos'] < 0 else '<unk>'}")
    model = ModelProto()
    try:
        for text, score, kind in pieces:
            model.pieces.add(piece=text, score=score, type=kind)
    except (ValueError, TypeError) as error:
        raise WeightsError(f"{path}: damaged tokenizer ({str(error)[:80]})") from None
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.vocab_size = trainer.UNIGRAM, len(pieces)
    trainer.byte_fallback = any(kind == _BYTE for *_, kind in pieces)
    for name, index in ids.items():
        setattr(trainer, f"{name}_id", index)
        if index >= 0:
            setattr(trainer, f"{name}_piece", pieces[index][0])
    normalizer.name, normalizer.precompiled_charsmap = "user_defined" if charsmap else "identity", charsmap
    normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces = add_dummy_prefix, remove_extra_whitespaces
    return model.SerializeToString()
