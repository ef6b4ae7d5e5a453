"""Prompt → token ids, equal to those of the official ``HuggingfaceTokenizer(clean="whitespace")`` on google/umt5-xxl.

The official code reads the published ``tokenizer.json``, which was made from ``spiece.model``. The two differ for
characters outside the vocabulary (one unknown token for each run of them, not their bytes), and at special tokens,
which are cut out of the text first. So sentencepiece gets one word at a time, and unknown runs are merged.
"""

from __future__ import annotations

import html
import re
import unicodedata
from itertools import groupby
from pathlib import Path

import ftfy
from sentencepiece import SentencePieceProcessor

from ..errors import WeightsError

MODEL_FILE = "spiece.model"
# umT5 numbers <extra_id_299> … <extra_id_0> after the last sentencepiece.
EXTRA_IDS = 300
WORD_START = "▁"
WORDS, CHINESE = re.compile(r"[^\W_]+(?:['’][^\W_]+)*"), re.compile(r"[\u3400-\u9fff]")


def clean(text: str) -> str:
    """Repair mojibake and full-width letters (ftfy), undo HTML escapes twice, make every run of whitespace one space.

    Equal to the official ``whitespace_clean(basic_clean(text))``.
    """
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def most_tokens(text: str) -> int:
    """A bound on the ids of a text, which needs no vocabulary: one for each character as sentencepiece normalises them,
    one for the start of each word, whose space is among those characters, and the end-of-sequence id."""
    text = clean(text)
    return max(len(text), len(unicodedata.normalize("NFKC", text))) + 2


class Tokenizer:
    """umT5's tokenizer, of a sentencepiece model file, a folder with ``spiece.model``, or the serialized model itself.

    Raises:
        WeightsError: the file does not exist, or is not a sentencepiece model with an end-of-sequence token.
    """

    def __init__(self, model: str | Path | bytes):
        name, data = ("the given bytes", model) if isinstance(model, bytes) else _read(Path(model))
        self.pieces = pieces = SentencePieceProcessor()
        try:
            pieces.load_from_serialized_proto(data)
        except RuntimeError as error:
            raise WeightsError(
                f"{name}: not a sentencepiece model ({len(data)} bytes), expected umT5's {MODEL_FILE}"
            ) from error
        self.eos_id, self.unk_id = pieces.eos_id(), pieces.unk_id()
        if self.eos_id < 0:
            raise WeightsError(f"{name}: has no end-of-sequence token, expected umT5's {MODEL_FILE}")
        named = (pieces.pad_id(), self.eos_id, pieces.bos_id(), self.unk_id)
        last = pieces.get_piece_size() + EXTRA_IDS - 1
        self.special_ids = {pieces.id_to_piece(i): i for i in named if i >= 0}
        self.special_ids |= {f"<extra_id_{n}>": last - n for n in range(EXTRA_IDS)}
        self.special_pattern = re.compile(f"({'|'.join(map(re.escape, self.special_ids))})")

    def __call__(self, text: str, max_length: int = 512) -> list[int]:
        """Ids of the cleaned text, at most ``max_length`` with the end-of-sequence id last; no padding.

        Longer texts lose their end, as in the official code. ``</s>``, ``<pad>``, ``<s>``, ``<unk>`` and
        ``<extra_id_0>`` to ``<extra_id_299>`` in the text become those tokens.

        Raises:
            ValueError: ``max_length`` is below 1.
        """
        if max_length < 1:
            raise ValueError(f"max_length is {max_length}, expected at least 1")
        return [*self._ids(text)[: max_length - 1], self.eos_id]

    def length(self, text: str) -> int:
        """How many ids the whole text has, the end-of-sequence id among them."""
        return len(self._ids(text)) + 1

    def unknown(self, text: str) -> list[str]:
        """What this vocabulary has no pieces for, in order, each once: words, or parts of a run of Chinese."""
        found = []
        for word in WORDS.findall(clean(text)):
            pieces = list(zip(self.pieces.encode(word), self.pieces.encode(word, out_type=str), strict=True))
            strange = [piece for i, piece in pieces if i == self.unk_id]
            found += [word] if strange and not CHINESE.search(word) else strange
        return list(dict.fromkeys(found))

    def _ids(self, text: str) -> list[int]:
        ids = []
        for index, part in enumerate(self.special_pattern.split(clean(text))):
            # split() puts matches of the pattern's group at odd places
            ids += [self.special_ids[part]] if index % 2 else self._encode(part)
        return ids

    def _encode(self, text: str) -> list[int]:
        """Ids of text without special tokens. A space beside a special token stays: a word start without a word."""
        if not text:
            return []
        ids: list[int] = []
        for word in text.replace(WORD_START, " ").removeprefix(" ").split(" "):
            pieces = self.pieces.encode(word) if word else [self.pieces.piece_to_id(WORD_START)]
            known = (self.unk_id if self.pieces.is_byte(i) else i for i in pieces)
            for i, run in groupby(known):
                ids.extend([i] if i == self.unk_id else run)
        return ids


def _read(path: Path) -> tuple[Path, bytes]:
    file = path / MODEL_FILE if path.is_dir() else path
    try:
        return file, file.read_bytes()
    except OSError as error:
        raise WeightsError(f"{file}: cannot be read ({error.strerror}), expected umT5's {MODEL_FILE}") from error
