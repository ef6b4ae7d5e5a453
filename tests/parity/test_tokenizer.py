"""The tokenizer against the official wrapper and transformers, on small models made as umT5's and as T5's."""

import json
import unicodedata

import numpy as np
import pytest
import sentencepiece
from oracles import official
from test_text import SENTENCES, sentencepiece_model
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import T5Tokenizer

from wan_mlx.files.sentencepiece import read_tokenizer
from wan_mlx.models.tokenizer import EXTRA_IDS, Tokenizer, clean
from wan_mlx.presets import NEGATIVE_PROMPT

TEXTS = [
    *SENTENCES, NEGATIVE_PROMPT, "", " ", "a", "A Cat  Boxing\n\ton a\r\nstage ", "cat\u3000on\u00a0a\u2009stage\x85",
    "salt &amp;amp; pepper &lt;b&gt; &nbsp; &#x3000; &eacute; &#28;", "ｆｕｌｌ　ｗｉｄｔｈ，！",
    "cafÃ© “quoted” it’s ﬁne", "\x1b[31mred\x1b[0m \x07 \ufeffstart", "é e\u0301 naïve", "[web] page [MASK]x[web]",
    "#$%^&*{}|~`\\", "1234567890", "tom &amp;amp;amp; jerry", "a < b &amp;amp;amp; c",
]  # fmt: skip
UNKNOWN = ["a cat 🫠🫥 boxing 🥊", "🫠 🫥", "日本語と한국어", "x🫠y", "zero\u200bwidth \u200b a", "\ud800 lone"]
SPECIAL = [
    "</s>", "a </s> b", "a</s>b", "<pad><s><unk>", "x <extra_id_0> y<extra_id_299>", "<extra_id_300>", "＜/s＞",
    "&lt;/s&gt;", "a ▁b", "▁▁", "a▁b", "<extra_id_1> ▁ </s>",
]  # fmt: skip
LONG = ["a cat boxing " * 200, "🫠 a" * 400, "一只猫" * 400]


def random_texts(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    words = ["  ", "cat", "boxing", "</s>", "<extra_id_7>", "▁", "[web]", "\u3000", "&amp;"]
    parts = [*"abcdefghij狐狸走🫠é,.! ", *words]
    return ["".join(rng.choice(parts, size=rng.integers(1, 30))) for _ in range(count)]


@pytest.fixture(scope="module")
def model() -> bytes:
    return sentencepiece_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """google/umt5-xxl as Wan-AI publishes it: spiece.model, the tokenizer.json made from it, and its configuration."""
    folder = tmp_path_factory.mktemp("google") / "umt5-xxl"
    folder.mkdir()
    (folder / "spiece.model").write_bytes(model)
    spm = sentencepiece.SentencePieceProcessor(model_proto=model)
    extra = [f"<extra_id_{n}>" for n in reversed(range(EXTRA_IDS))]
    vocab = [(spm.id_to_piece(i), spm.get_score(i)) for i in range(spm.get_piece_size())] + [(e, 0.0) for e in extra]
    backend = Backend(models.Unigram(vocab, unk_id=spm.unk_id(), byte_fallback=False))
    backend.normalizer = normalizers.Sequence([normalizers.Replace(Regex(" {2,}"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    backend.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    special = ["<pad>", "</s>", "<s>", "<unk>", *extra]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    backend.save(str(folder / "tokenizer.json"))
    names = dict(pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    # transformers 5 builds T5Tokenizer anew around the vocabulary, with 2 as the unknown id. This class takes
    # tokenizer.json as it is, as did the releases that the official code was written for.
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": extra, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def reference(folder):
    return official("modules.tokenizers").HuggingfaceTokenizer(name=str(folder), seq_len=512, clean="whitespace")


def test_cleaning_every_space_and_control_character(reference):
    codes = [c for c in range(0x110000) if unicodedata.category(chr(c)) in ("Cc", "Cf", "Cs", "Zs", "Zl", "Zp")]
    codes = [c for c in codes if not 0xD810 < c < 0xDFF0]  # surrogates are all alike
    for code in codes:
        for template in ("{0}", " {0}a{0} ", "a {0} b{0}{0}c", "&#{1};a&#{1};b", "&amp;#{1};"):
            text = template.format(chr(code), code)
            assert clean(text) == reference._clean(text), (hex(code), template)


@pytest.mark.parametrize(
    "texts",
    [TEXTS, UNKNOWN, SPECIAL, LONG, random_texts(300)],
    ids=["ordinary", "unknown", "special", "long", "random"],
)
def test_same_ids_as_official(folder, reference, texts):
    ids, mask = reference(texts, return_mask=True, add_special_tokens=True)
    ours = Tokenizer(folder)
    for text, row, length in zip(texts, ids.tolist(), mask.sum(1).tolist(), strict=True):
        assert ours(text) == row[:length], text
        assert row[length:] == [0] * (512 - length)


def test_same_ids_as_transformers_5(folder, model):
    """What transformers 5 makes of the same folder agrees where no token is special or unknown."""
    spm = sentencepiece.SentencePieceProcessor(model_proto=model)
    theirs = T5Tokenizer.from_pretrained(folder, extra_ids=EXTRA_IDS)
    ours = Tokenizer(folder)
    compared = 0
    for text in [*TEXTS, "a cat boxing " * 200]:
        ids = ours(text)
        if spm.unk_id() not in ids:
            assert ids == theirs(clean(text), truncation=True, max_length=512).input_ids, text
            compared += 1
    assert compared > 10


def test_tokenizer_json_gives_the_same_ids(folder, model, tmp_path):
    """transformers 5 saves nothing else. Its own, made anew from the folder, names another unknown id."""
    T5Tokenizer.from_pretrained(folder, extra_ids=EXTRA_IDS).save_pretrained(tmp_path)
    ours = Tokenizer(model)
    for path in (folder / "tokenizer.json", tmp_path):
        rebuilt = Tokenizer(read_tokenizer(path))
        assert (rebuilt.eos_id, rebuilt.unk_id, rebuilt.special_ids) == (ours.eos_id, ours.unk_id, ours.special_ids)
        for text in [*TEXTS, *UNKNOWN, *SPECIAL, *LONG, *random_texts(300)]:
            assert rebuilt(text) == ours(text), (path, text)


def charsmap(model: bytes) -> bytes:
    """The normalisation table inside a model: field 2 of its normalizer_spec, which follows the rule's name."""
    spec = sentencepiece.SentencePieceNormalizer(model_proto=model).serialized_normalizer_spec()
    at, length, shift = 2 + spec[1], 0, 0
    assert spec[at] == 0x12
    while True:
        at += 1
        length |= (spec[at] & 0x7F) << shift
        shift += 7
        if spec[at] < 0x80:
            return spec[at + 1 : at + 1 + length]


def test_same_ids_as_t5_with_normalisation(tmp_path):
    """A model as T5's: nmt_nfkc, no <s>, <unk> at 2, no byte fallback."""
    model = sentencepiece_model(
        normalization_rule_name="nmt_nfkc", bos_id=-1, unk_id=2, byte_fallback=False, user_defined_symbols=[],
        vocab_size=180,
    )  # fmt: skip
    spm = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = [(spm.id_to_piece(i), spm.get_score(i)) for i in range(spm.get_piece_size())]
    vocab += [(f"<extra_id_{n}>", 0.0) for n in reversed(range(EXTRA_IDS))]
    theirs = T5Tokenizer(vocab=vocab, extra_ids=EXTRA_IDS, _spm_precompiled_charsmap=charsmap(model))
    theirs.save_pretrained(tmp_path)
    ours, rebuilt = Tokenizer(model), Tokenizer(read_tokenizer(tmp_path))
    for text in [*TEXTS, *UNKNOWN, *LONG, "Å ㎏ ①② x² ﷺ", "a\u200b\u200bb c\u200b"]:
        assert ours(text) == theirs(clean(text), truncation=True, max_length=512).input_ids, text
        assert rebuilt(text) == ours(text), text
        assert ours(text, 10_000) == [*spm.encode(clean(text)), 1], text
