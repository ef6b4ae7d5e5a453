"""Tokenizer and text encoder without torch: cleaning, special ids, errors, and the encoder's invariants."""

import io
import random

import mlx.core as mx
import numpy as np
import pytest
import sentencepiece
from mlx.utils import tree_flatten, tree_unflatten

from wan_mlx.errors import WeightsError
from wan_mlx.models.configs import TextEncoderConfig
from wan_mlx.models.execution import StreamedTextEncoder
from wan_mlx.models.text_encoder import EncoderBlock, TextEncoder, pad_context, relative_buckets
from wan_mlx.models.tokenizer import EXTRA_IDS, Tokenizer, clean, most_tokens
from wan_mlx.weights.component import parameter_shapes

SENTENCES = [
    "a cat boxing on a stage, realistic style", "two dogs run over the beach at dusk", "the quick brown fox jumps",
    "一只红狐狸走过雪地。", "色调艳丽,过曝,静态", "a naïve café (2024): cost < price > 0; a & b", "web page mask",
]  # fmt: skip
TINY = TextEncoderConfig(vocab_size=50, dim=24, dim_attn=32, dim_ffn=40, num_heads=4, num_layers=3)


def sentencepiece_model(**options) -> bytes:
    """A small model made as umT5's: no normalisation, byte fallback, <s> at 2 and <unk> at 3, user-defined pieces."""
    model = io.BytesIO()
    umt5 = dict(
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, byte_fallback=True, user_defined_symbols=["[MASK]", "[web]"],
        normalization_rule_name="identity", character_coverage=1.0, vocab_size=440, hard_vocab_limit=False,
    )  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        model_writer=model, minloglevel=2, **{"sentence_iterator": iter(SENTENCES * 5), **umt5, **options}
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def model() -> bytes:
    return sentencepiece_model()


@pytest.fixture(scope="module")
def pieces(model):
    return sentencepiece.SentencePieceProcessor(model_proto=model)


@pytest.fixture(scope="module")
def tokenizer(model) -> Tokenizer:
    return Tokenizer(model)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("  a  cat\n\tboxing\r\n ", "a cat boxing"),
        ("cat\u3000on\u00a0a\u2009stage\u2028now\x85", "cat on a stage now…"),  # ftfy reads U+0085 as Windows-1252
        ("salt &amp;amp;amp; pepper &lt;b&gt;", "salt & pepper <b>"),  # ftfy undoes the first of three escapes
        ("<b> salt &amp;amp;amp; pepper", "<b> salt &amp; pepper"),  # but none where there is a tag
        ("ｆｕｌｌ　ｗｉｄｔｈ，", "full width,"),
        ("cafÃ©", "café"),
        ("a\u200bb", "a\u200bb"),
        ("", ""),
        (" \n\u3000", ""),
    ],
)
def test_clean(text, expected):
    assert clean(text) == expected


def test_ordinary_words_are_encoded_as_by_sentencepiece(tokenizer, pieces):
    for text in [*SENTENCES, "foxes", "[web] page"]:
        assert tokenizer(text) == [*pieces.encode(text), 1], text


def test_empty_text_is_the_end_of_sequence(tokenizer):
    assert tokenizer("") == tokenizer(" \n ") == [1]


def test_unknown_characters_are_one_unknown_token_per_run(tokenizer, pieces):
    start, a = pieces.piece_to_id("▁"), pieces.piece_to_id("▁a")
    assert tokenizer("a 🫠🫥") == [a, start, 3, 1]
    assert tokenizer("🫠 🫥") == [start, 3, start, 3, 1]


def test_special_tokens_in_the_text(tokenizer, pieces):
    a, start, size = pieces.piece_to_id("▁a"), pieces.piece_to_id("▁"), pieces.get_piece_size()
    assert tokenizer("</s><pad><s><unk>") == [1, 0, 2, 3, 1]
    assert tokenizer("a </s> a") == [a, start, 1, a, 1]
    assert tokenizer("a</s>a") == [a, 1, a, 1]
    assert tokenizer("<extra_id_299><extra_id_0>") == [size, size + 299, 1]
    assert EXTRA_IDS == 300


def test_truncation_keeps_the_end_of_sequence(tokenizer):
    text = "a cat boxing " * 300
    whole = tokenizer(text, max_length=10_000)
    assert len(whole) > 512
    assert tokenizer(text) == [*whole[:511], 1]
    assert tokenizer(text, max_length=len(whole)) == whole
    assert tokenizer(text, max_length=1) == [1]
    with pytest.raises(ValueError, match="max_length is 0, expected at least 1"):
        tokenizer(text, max_length=0)


@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
def test_no_text_has_more_tokens_than_its_bound(rule):
    """Texts of characters that normalise to many, of no piece, of special tokens, escapes and spaces."""
    letters = [*SENTENCES, *"株式会社\u0635\u0644\u0649\u0627\u0644\u0644\u0647"]
    read = Tokenizer(sentencepiece_model(sentence_iterator=iter(letters * 5), normalization_rule_name=rule))
    parts = ["a", "q", "猫", " ", "  ", "\ufdfa", "㍿", "ﬃ", "ｶﾞ", "e\u0301", "¨", "🫠", "▁", "</s>", "&lt;", "[web]"]
    draw = random.Random(0)
    for text in (*parts, *("".join(draw.choices(parts, k=draw.randrange(12))) for _ in range(300))):
        assert read.length(text) == len(read(text, 10_000)) <= most_tokens(text), text


def test_file_folder_and_bytes_are_the_same(tmp_path, model, tokenizer):
    (tmp_path / "spiece.model").write_bytes(model)
    for source in (tmp_path, str(tmp_path), tmp_path / "spiece.model"):
        assert Tokenizer(source)("a cat") == tokenizer("a cat")


def test_unusable_model_files(tmp_path, model):
    with pytest.raises(WeightsError, match=r"spiece\.model: cannot be read \(No such file or directory\)"):
        Tokenizer(tmp_path)
    for content in (b"", b"version https://git-lfs.github.com/spec/v1\n", model[:1000]):
        (tmp_path / "spiece.model").write_bytes(content)
        with pytest.raises(WeightsError, match=rf"spiece\.model: not a sentencepiece model \({len(content)} bytes\)"):
            Tokenizer(tmp_path)
    with pytest.raises(WeightsError, match="the given bytes: has no end-of-sequence token"):
        Tokenizer(sentencepiece_model(eos_id=-1))


def random_blocks(config: TextEncoderConfig, dtype=mx.float32) -> list[EncoderBlock]:
    blocks = []
    for index in range(config.num_layers):
        key = mx.random.key(index)
        block = EncoderBlock(config)
        keys = mx.random.split(key, len(tree_flatten(block.parameters())))
        named = zip(keys, tree_flatten(block.parameters()), strict=True)
        random = [(n, (mx.random.normal(p.shape, key=k) * p.shape[-1] ** -0.5).astype(dtype)) for k, (n, p) in named]
        block.update(tree_unflatten(random))
        blocks.append(block)
    return blocks


def encoder(dtype=mx.float32, blocks=None) -> StreamedTextEncoder:
    table = mx.random.normal((TINY.vocab_size, TINY.dim), key=mx.random.key(99)).astype(dtype)
    held = random_blocks(TINY, dtype)
    norm = mx.ones(TINY.dim, dtype)
    return StreamedTextEncoder(TINY, lambda ids: table[mx.array(ids)], blocks or (lambda: held), norm)


def test_together_equals_alone():
    encode, prompts = encoder(), [[5, 6, 1], [7, 8, 9, 10, 11, 12, 1], [1]]
    for prompt, together in zip(prompts, encode(prompts), strict=True):
        (alone,) = encode([prompt])
        assert together.shape == (len(prompt), TINY.dim) and together.dtype == mx.float32
        np.testing.assert_array_equal(together, alone)


def test_every_block_is_read_once_and_used_for_all_prompts():
    log = []

    class Logged(EncoderBlock):
        def __call__(self, x):
            log.append(x.shape[1])
            return super().__call__(x)

    def blocks():
        for _ in range(TINY.num_layers):
            log.append("read")
            yield Logged(TINY)

    encoder(blocks=blocks)([[1, 2], [1, 2, 3]])
    assert log == ["read", 2, 3] * TINY.num_layers


def test_bfloat16_stays_bfloat16_and_near():
    (coarse,), (fine,) = encoder(mx.bfloat16)([[4, 5, 6, 1]]), encoder()([[4, 5, 6, 1]])
    assert coarse.dtype == mx.bfloat16
    error = mx.abs(coarse.astype(mx.float32) - fine).max() / mx.abs(fine).max()
    assert error.item() < 0.03


def test_parameter_shapes_are_a_block_s_own_for_every_layer():
    shapes = parameter_shapes(TextEncoder(TINY))
    assert len(shapes) == 2 + TINY.num_layers * 10
    assert shapes["token_embedding.weight"] == (50, 24) and shapes["norm.weight"] == (24,)
    assert shapes["blocks.2.ffn.gate.0.weight"] == (40, 24)
    assert shapes["blocks.0.pos_embedding.embedding.weight"] == (32, 4)
    full_size = parameter_shapes(TextEncoder(TextEncoderConfig()))
    assert sum(int(np.prod(shape)) for shape in full_size.values()) == 5_680_910_336


def test_relative_buckets():
    buckets = relative_buckets(200, 32, 128)
    assert buckets.dtype == np.int32 and buckets.shape == (200, 200)
    distances = [0, 1, 7, 8, 11, 12, 15, 16, 31, 32, 63, 64, 127, 128, 199]
    expected = [0, 1, 7, 8, 8, 9, 9, 10, 11, 12, 13, 14, 15, 15, 15]
    assert [buckets[199, 199 - d] for d in distances] == expected
    assert [buckets[0, d] for d in distances[1:]] == [16 + b for b in expected[1:]]


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"shape \(0,\), expected \(L,\) with L at least 1"):
        encoder()([[1], []])
    with pytest.raises(ValueError, match="ids run from 1 to 50, expected 0 to 49"):
        encoder()([[1, 50]])
    with pytest.raises(ValueError, match="ids run from -1 to 1, expected 0 to 49"):
        encoder()([[-1, 1]])


def test_pad_context():
    embedding = mx.random.normal((3, 4), key=mx.random.key(0))
    padded = pad_context(embedding, 5)
    assert padded.shape == (1, 5, 4)
    np.testing.assert_array_equal(padded[0, :3], embedding)
    assert not padded[0, 3:].any().item()
    assert pad_context(embedding).shape == (1, 512, 4)
    with pytest.raises(ValueError, match="the text has 3 tokens, expected at most 2"):
        pad_context(embedding, 2)
