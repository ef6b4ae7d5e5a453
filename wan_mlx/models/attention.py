"""Attention: among video tokens with rotary positions, and from video tokens to text and images.

Follows the official ``wan/modules/model.py``. Parameter names are the official checkpoint's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import mlx.core as mx
import mlx.nn as nn

from .configs import TransformerConfig
from .layers import Linear
from .rope import RopeTable, norm_and_rotate

# Keys and values that tokens attend to, each (B, length, heads, head_dim).
Pairs = list[tuple[mx.array, mx.array]]


def attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Attention without a mask (Wan needs none), softmax in float32, scale 1/sqrt(head_dim).

    Queries (B, Lq, heads, head_dim), keys and values (B, Lk, heads, head_dim) → (B, Lq, heads * head_dim).
    """
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    attended = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)
    return attended.transpose(0, 2, 1, 3).flatten(2)


class RMSNorm(nn.Module):
    """The weight of a query or key norm over all heads."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = mx.ones((dim,))


class Attention(nn.Module):
    """Projections and norms of both kinds of attention."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.heads, self.eps = config.num_heads, config.eps
        for name in ("q", "k", "v", "o"):
            setattr(self, name, Linear(config.dim, config.dim))
        self.norm_q = RMSNorm(config.dim)
        self.norm_k = RMSNorm(config.dim)


class SelfAttention(Attention):
    """Attention among video tokens, with rotary positions."""

    def queries_keys_values(self, x: mx.array, rope: RopeTable) -> tuple[mx.array, mx.array, mx.array]:
        """Normed tokens (B, L, D) → queries, keys and values (B, L, heads, head_dim), as `attention` takes them."""
        q = norm_and_rotate(self.q(x), self.norm_q.weight, self.heads, rope, self.eps)
        k = norm_and_rotate(self.k(x), self.norm_k.weight, self.heads, rope, self.eps)
        return q, k, split_heads(self.v(x), self.heads)


class CrossAttention(Attention):
    """Attention from video tokens to text and, in image-conditioned models, to CLIP features."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        if config.has_image_branch:
            self.k_img = Linear(config.dim, config.dim)
            self.v_img = Linear(config.dim, config.dim)
            self.norm_k_img = RMSNorm(config.dim)

    def keys_values(self, context: mx.array, image_context: mx.array | None) -> Pairs:
        """Keys and values of the text and, if there is one, of the image."""
        pairs = [(self._normed(self.k(context), self.norm_k), split_heads(self.v(context), self.heads))]
        if image_context is not None:
            keys, values = self.k_img(image_context), self.v_img(image_context)
            pairs.append((self._normed(keys, self.norm_k_img), split_heads(values, self.heads)))
        return pairs

    def attend(self, x: mx.array, pairs: Pairs, attention: Callable[..., mx.array] = attention) -> mx.array:
        """Normed tokens (B, L, D) and the keys and values that they attend to → (B, L, D), for ``o``."""
        q = self._normed(self.q(x), self.norm_q)
        return reduce(mx.add, (attention(q, k, v) for k, v in pairs))  # sum() would add them to 0

    def __call__(self, x: mx.array, pairs: Pairs) -> mx.array:
        return self.o(self.attend(x, pairs))

    def _normed(self, x, norm):
        return split_heads(mx.fast.rms_norm(x, norm.weight.astype(x.dtype), self.eps), self.heads)


def split_heads(x: mx.array, heads: int) -> mx.array:
    """(B, L, D) → (B, L, heads, D / heads)."""
    return x.reshape(*x.shape[:2], heads, -1)
