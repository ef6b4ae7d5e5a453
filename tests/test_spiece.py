"""The tokenizer inside a text encoder's file: embedded as it is, or built again from a GGUF's metadata."""

import struct

import pytest
import sentencepiece
from crafted import entry, refusal, write_safetensors
from crafted_gguf import array, field, text, write_gguf
from test_text import SENTENCES, sentencepiece_model

from wan_mlx.files.sentencepiece import read_tokenizer
from wan_mlx.models.tokenizer import Tokenizer
from wan_mlx.presets import NEGATIVE_PROMPT

TEXTS = [
    *SENTENCES, NEGATIVE_PROMPT, "", "a", "A Cat  Boxing", "🫠 x🫠y 日本語", "</s> <pad>a<s><unk>", "<extra_id_7>▁ b",
    "ﬁne ① ㎏ Å ﷺ x²", "[web] [MASK]x", "zero\u200bwidth", "1234567890",
]  # fmt: skip


def charsmap(model: bytes) -> bytes:
    spec = sentencepiece.SentencePieceNormalizer(model_proto=model).serialized_normalizer_spec()
    at, length, shift = 2 + spec[1], 0, 0
    if spec[at] != 0x12:
        return b""
    while True:
        at += 1
        length |= (spec[at] & 0x7F) << shift
        shift += 7
        if spec[at] < 0x80:
            return spec[at + 1 : at + 1 + length]


def llama_cpp_fields(model: bytes, extra_ids: bool, rows: int = 64) -> dict[str, bytes]:
    """What llama.cpp's converter writes of a T5 tokenizer: a kind for each piece, filled up to the embedding's rows."""
    spm = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = []
    for i in range(spm.vocab_size()):
        kind = 2 if spm.is_unknown(i) else 3 if spm.is_control(i) else 6 if spm.is_byte(i) else 1
        pieces.append((spm.id_to_piece(i), spm.get_score(i), kind))
    if extra_ids:
        pieces += [(f"<extra_id_{n}>", -1000.0, 4) for n in reversed(range(300))]
    pieces += [(f"[PAD{n}]", -1000.0, 5) for n in range(len(pieces), len(pieces) + rows)]
    count = len(pieces)
    numbers = {"bos_token_id": spm.bos_id(), "eos_token_id": spm.eos_id(), "padding_token_id": spm.pad_id()}
    lists = {
        "tokens": array(8, count, b"".join(text(piece) for piece, *_ in pieces)),
        "scores": array(6, count, struct.pack(f"<{count}f", *(score for _, score, _ in pieces))),
        "token_type": array(5, count, struct.pack(f"<{count}i", *(kind for *_, kind in pieces))),
    }
    if table := charsmap(model):
        lists["precompiled_charsmap"] = array(0, len(table), table)
    fields = {"model": (8, text("t5")), "add_space_prefix": (7, b"\1"), "remove_extra_whitespaces": (7, b"\1")}
    fields |= {name: (4, struct.pack("<I", value)) for name, value in numbers.items() if value >= 0}
    fields |= {name: (9, payload) for name, payload in lists.items()}
    return {name: field(f"tokenizer.ggml.{name}", *value) for name, value in fields.items()}


KINDS = {
    "umT5": {},
    "T5": dict(normalization_rule_name="nmt_nfkc", bos_id=-1, unk_id=2, byte_fallback=False, vocab_size=180),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extra_ids", [True, False])
def test_gguf_gives_the_same_ids(tmp_path, kind, extra_ids):
    model = sentencepiece_model(**KINDS[kind])
    path = write_gguf(tmp_path / "x.gguf", fields=[*llama_cpp_fields(model, extra_ids).values()])
    ours, rebuilt = Tokenizer(model), Tokenizer(read_tokenizer(path))
    for name in ("eos_id", "unk_id", "special_ids"):
        assert getattr(rebuilt, name) == getattr(ours, name)
    assert rebuilt.pieces.get_piece_size() == ours.pieces.get_piece_size()
    for prompt in TEXTS:
        assert rebuilt(prompt) == ours(prompt), prompt


def test_embedded_and_separate_models_are_the_same_bytes(tmp_path):
    model = sentencepiece_model()
    (tmp_path / "google/umt5-xxl").mkdir(parents=True)
    (tmp_path / "google/umt5-xxl/spiece.model").write_bytes(model)
    header = {"spiece_model": entry("U8", [len(model)], 0, len(model))}
    embedded = write_safetensors(tmp_path / "x.safetensors", header, model)
    for path in (tmp_path, tmp_path / "google/umt5-xxl/spiece.model", embedded):
        assert read_tokenizer(path) == model


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(model=field("tokenizer.ggml.model", 8, text("llama"))), "'llama'"),
        (dict(scores=field("tokenizer.ggml.scores", 9, array(6, 1, bytes(4)))), "1 scores"),
        (dict(token_type=None), "no list tokenizer.ggml.token_type"),
        (dict(eos_token_id=field("tokenizer.ggml.eos_token_id", 4, struct.pack("<I", 10**9))), "eos"),
        (dict(eos_token_id=None), "without </s>"),
        (dict(eos_token_id=field("tokenizer.ggml.eos_token_id", 8, text("1"))), "eos"),
    ],
)
def test_damaged_tokenizers_in_a_gguf(tmp_path, change, word):
    fields = llama_cpp_fields(sentencepiece_model(), True) | change
    path = write_gguf(tmp_path / "x.gguf", fields=[value for value in fields.values() if value is not None])
    assert word in refusal(path, read_tokenizer)


def test_files_without_a_tokenizer(tmp_path, two):
    assert "--tokenizer" in refusal(two, read_tokenizer)
    assert "no tokenizer" in refusal(tmp_path, read_tokenizer)
    refusal(tmp_path / "nowhere.model", read_tokenizer)
    bad = write_safetensors(tmp_path / "x.safetensors", {"spiece_model": entry("F32", [1], 0, 4)}, bytes(4))
    assert "expected bytes" in refusal(bad, read_tokenizer)
    huge = '{"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 1%s]]}}' % ("0" * 400)
    for content in ("{}", huge, '{"model": {"type": "BPE"}}', '{"model": 3}', "{" * 100_000):
        (tmp_path / "tokenizer.json").write_text(content)
        refusal(tmp_path / "tokenizer.json", read_tokenizer)
    with open(tmp_path / "huge.model", "wb") as file:
        file.truncate(2**30)
    assert "no tokenizer" in refusal(tmp_path / "huge.model", read_tokenizer)
