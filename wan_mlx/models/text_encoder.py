"""Token ids → text embeddings: the umT5 encoder.

Follows the official ``wan/modules/t5.py`` (``T5Encoder`` with ``shared_pos=False``): T5 1.1's blocks, but each with its
own relative position bias, and attention without scaling. Parameter names are the official checkpoint's.
float16 is not offered: umT5's activations exceed its range (the official code clamps infinities).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .configs import TEXT_LEN, TextEncoderConfig
from .layers import Embedding, Linear, chain


@mx.compile
def gated(x: mx.array, gate: mx.array) -> mx.array:
    """``x * gelu(gate)``, tanh approximation, computed in float32, in x's dtype."""
    return (x.astype(mx.float32) * nn.gelu_approx(gate.astype(mx.float32))).astype(x.dtype)


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of every (query, key) pair: int32 (length, length).

    Keys after the query use the upper half of the buckets. In each half, the first half of the buckets are for one
    distance each; the others widen logarithmically up to ``max_distance``, and the last takes all beyond.
    """
    half = num_buckets // 2
    exact = half // 2
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    distance = np.abs(offset)
    # The official code takes log. Buckets begin at powers of two, where log2 is exact on every machine.
    steps = np.log2(np.maximum(distance, exact) / exact) / math.log2(max_distance / exact)
    wide = np.minimum(exact + (steps * (half - exact)).astype(np.int32), half - 1)
    return (np.where(distance < exact, distance, wide) + half * (offset > 0)).astype(np.int32)


class PositionBias(nn.Module):
    """A learnt bias per head and bucket of relative position."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.num_buckets, self.max_distance = config.num_buckets, config.max_distance
        self.embedding = Embedding(config.num_buckets, config.num_heads)

    def __call__(self, length: int) -> mx.array:
        """(heads, length, length)."""
        buckets = relative_buckets(length, self.num_buckets, self.max_distance)
        return self.embedding(mx.array(buckets)).transpose(2, 0, 1)


class Attention(nn.Module):
    """Self-attention, not scaled; scores and softmax in float32."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.heads = config.num_heads
        self.q, self.k, self.v = (Linear(config.dim, config.dim_attn, bias=False) for _ in range(3))
        self.o = Linear(config.dim_attn, config.dim, bias=False)

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        q, k, v = (p(x).reshape(*x.shape[:2], self.heads, -1).transpose(0, 2, 1, 3) for p in (self.q, self.k, self.v))
        # At 512 tokens the scores fit into an array (64 MB), so the fused kernel with a mask is not needed.
        scores = q.astype(mx.float32) @ k.astype(mx.float32).swapaxes(-1, -2) + bias.astype(mx.float32)
        out = mx.softmax(scores, axis=-1).astype(x.dtype) @ v
        return self.o(out.transpose(0, 2, 1, 3).flatten(2))


class FeedForward(nn.Module):
    """``fc2(fc1(x) * gelu(gate(x)))``."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.gate = [Linear(config.dim, config.dim_ffn, bias=False)]
        self.fc1 = Linear(config.dim, config.dim_ffn, bias=False)
        self.fc2 = Linear(config.dim_ffn, config.dim, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(gated(self.fc1(x), self.gate[0](x)))


class EncoderBlock(nn.Module):
    """One layer: (1, L, dim) → (1, L, dim), in x's dtype."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.dim, config.eps)
        self.attn = Attention(config)
        self.norm2 = nn.RMSNorm(config.dim, config.eps)
        self.ffn = FeedForward(config)
        self.pos_embedding = PositionBias(config)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.attn(self.norm1(x), self.pos_embedding(x.shape[1]))
        return x + self.ffn(self.norm2(x))


class TextEncoder(nn.Module):
    """The umT5 encoder. Full-size models run block by block: `wan_mlx.models.execution.StreamedTextEncoder`."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.config = config
        self.token_embedding = Embedding(config.vocab_size, config.dim)
        self.blocks = [EncoderBlock(config) for _ in range(config.num_layers)]
        self.norm = nn.RMSNorm(config.dim, config.eps)

    def __call__(self, ids: Sequence[Sequence[int]]) -> list[mx.array]:
        """Encode prompts, given the ids of each, not padded → an array (L, dim) of each, in the weights' dtype.

        Raises:
            ValueError: a prompt without ids, or an id outside the vocabulary.
        """
        # Each prompt is computed alone at its true length. The official code pads to 512, gives padded keys the lowest
        # float as score, so zero weight, and drops padded rows at the end: the result is the same.
        prompts = (mx.array(checked_ids(prompt, self.config.vocab_size)) for prompt in ids)
        return [self.norm(chain(self.token_embedding(prompt)[None], self.blocks))[0] for prompt in prompts]


def checked_ids(prompt: Sequence[int], vocab_size: int) -> np.ndarray:
    """The ids of a prompt, int32 (L,); ValueError if there is none, or one outside the vocabulary."""
    ids = np.asarray(prompt, dtype=np.int32)
    if ids.ndim != 1 or not ids.size:
        raise ValueError(f"a prompt has ids of shape {ids.shape}, expected (L,) with L at least 1")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(f"ids run from {ids.min()} to {ids.max()}, expected 0 to {vocab_size - 1}")
    return ids


def pad_context(embedding: mx.array, text_len: int = TEXT_LEN) -> mx.array:
    """(L, dim) → (1, text_len, dim), zero-padded for the transformer's cross-attention; ValueError if L is above."""
    length = embedding.shape[0]
    if length > text_len:
        raise ValueError(f"the text has {length} tokens, expected at most {text_len}")
    return mx.pad(embedding, [(0, text_len - length), (0, 0)])[None]
