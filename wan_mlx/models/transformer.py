"""The Wan2.1 diffusion transformer: (latents, timestep, context) → velocity.

Follows the official ``wan/modules/model.py``. Parameter names are the official checkpoint's. Wide arrays keep the
weights' dtype; the time path, modulation, norms' statistics, the patch embedding and the head are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .attention import attention, whole_tiles
from .configs import TransformerConfig
from .layers import (
    FEED_FORWARD_TOKENS,
    TOKENS_AT_ONCE,
    AffineNorm,
    LateFrees,
    Linear,
    Pacer,
    RMSNorm,
    add_and_norm,
    gated_add,
    gelu_tanh,
    in_token_chunks,
    modulated_norm,
    token_parts,
)
from .rope import norm_and_rotate, rope_table

# Bytes that may wait to be freed; more where all tokens are computed at once, and waiting for less made a forward take
# 8 % longer.
LATE, LATE_WHOLE = 200_000_000, 600_000_000
# Attributes that are lists of blocks, of all transformers.
BLOCK_LISTS = ("blocks", "vace_blocks")
# Parameters that stay float32 whatever the dtype of the rest: few bytes, and rounding them shows.
FLOAT32_PARAMETERS = r"(^|.*\.)(time_\w+|\w*patch_embedding|head|modulation|norm\w*|emb_pos)(\..*|$)"


class Attention(nn.Module):
    """The projections and norms that both kinds of attention have."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.heads, self.eps = config.num_heads, config.eps
        for name in ("q", "k", "v", "o"):
            setattr(self, name, Linear(config.dim, config.dim))
        self.norm_q = RMSNorm(config.dim)
        self.norm_k = RMSNorm(config.dim)


class SelfAttention(Attention):
    """Attention among video tokens, with rotary positions."""

    def queries_keys_values(self, x: mx.array, table: tuple[mx.array, mx.array], pace: Pacer) -> list[mx.array]:
        """Normed tokens (B, L, D) → queries, keys and values (B, L, heads, head_dim), as `attention` takes them.

        Of keys and values there may be a few more: see `whole_tiles`.
        """
        arrays = []
        # While values are made, queries and keys are waited for: what they were made from is gone before attention.
        steps = (self.q, self.norm_q, pace), (self.k, self.norm_k, pace.small), (self.v, None, pace)
        for project, norm, have_computed in steps:
            made = self._heads_of(project(x), norm, table)
            arrays.append(made if project is self.q else whole_tiles(made))
            del made
            have_computed(arrays[-1])
            pace.settle()
        return arrays

    def _heads_of(self, x, norm, table):
        if norm is None:
            return _split_heads(x, self.heads)
        return norm_and_rotate(x, norm.weight, self.heads, table, self.eps)


class CrossAttention(Attention):
    """Attention from video tokens to text and, in image-conditioned models, to CLIP features."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        if config.has_image_branch:
            self.k_img = Linear(config.dim, config.dim)
            self.v_img = Linear(config.dim, config.dim)
            self.norm_k_img = RMSNorm(config.dim)

    def keys_values(self, context: mx.array, image_context: mx.array | None) -> list[tuple[mx.array, mx.array]]:
        """Keys and values of the text and, if there is one, of the image: each (B, length, heads, head_dim)."""
        pairs = [self._key_value(context, self.k, self.norm_k, self.v)]
        if image_context is not None:
            pairs.append(self._key_value(image_context, self.k_img, self.norm_k_img, self.v_img))
        return pairs

    def _key_value(self, context, project_k, norm, project_v):
        return self._normed(project_k(context), norm), _split_heads(project_v(context), self.heads)

    def _normed(self, x, norm):
        return _split_heads(mx.fast.rms_norm(x, norm.weight.astype(x.dtype), self.eps), self.heads)

    def __call__(self, x: mx.array, pairs: Sequence[tuple[mx.array, mx.array]], pace: Pacer) -> mx.array:
        q = self._normed(self.q(x), self.norm_q)
        attended = reduce(mx.add, (attention(q, k, v, pace) for k, v in pairs))  # sum() would add them to 0
        pace(attended)
        return self.o(attended)


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward, the first and last modulated by the timestep."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.eps = config.eps
        self.self_attn = SelfAttention(config)
        self.norm3 = AffineNorm(config.dim)
        self.cross_attn = CrossAttention(config)
        self.ffn = [Linear(config.dim, config.ffn_dim), gelu_tanh, Linear(config.ffn_dim, config.dim)]
        self.modulation = mx.zeros((1, 6, config.dim))

    def __call__(
        self,
        x: mx.array,
        modulation: mx.array,
        context: mx.array,
        image_context: mx.array | None,
        table: tuple[mx.array, mx.array],
        pace: Pacer,
    ) -> mx.array:
        """x (B, L, D), modulation float32 (B, 6, D), context (B, 512, D) → (B, L, D)."""
        m = self.modulation + modulation
        shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = (m[:, i : i + 1] for i in range(6))
        # A long video's memory is arrays as wide as x: none is held longer than it is needed, and what can wait for the
        # pieces below does.
        normed = modulated_norm(x, 1 + scale_attn, shift_attn, self.eps)
        pace.small(normed)
        heads = self.self_attn.queries_keys_values(normed, table, pace)
        del normed
        attended = attention(*heads, pace)
        del heads
        pace(attended)
        pairs = self.cross_attn.keys_values(context, image_context)

        def tokenwise(pieces):
            x, attended = pieces
            pieces.clear()
            norm3 = self.norm3
            x, y = add_and_norm(x, self.self_attn.o(attended), gate_attn, norm3.weight, norm3.bias, self.eps)
            del attended
            pace.small(x, y)
            ungated = mx.ones_like(gate_ffn)
            x, y = add_and_norm(x, self.cross_attn(y, pairs, pace), ungated, 1 + scale_ffn, shift_ffn, self.eps)
            pace(x, y)  # the widest arrays are next: nothing of what was before is still there beside them
            pieces.append(y)
            del y
            parts = token_parts(feed_forward, pieces, min(FEED_FORWARD_TOKENS, pace.tokens_at_once))
            x = gated_add(x, parts, gate_ffn)
            pace.submit(x)
            return x

        def feed_forward(pieces):
            y = pieces.pop()
            for layer in self.ffn:
                y = layer(y)
            pace(y)
            return y

        pieces = [x, attended]
        del x, attended
        return in_token_chunks(tokenwise, pieces, pace, pace.tokens_at_once)


class Head(nn.Module):
    """Final modulated norm and projection to one patch of velocities per token, in float32."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.eps = config.eps
        self.head = Linear(config.dim, int(np.prod(config.patch_size)) * config.out_dim)
        self.modulation = mx.zeros((1, 2, config.dim))

    def __call__(self, x: mx.array, time: mx.array, pace: Pacer) -> mx.array:
        """x (B, L, D), time float32 (B, D) → float32 (B, L, patch volume * out_dim)."""
        m = self.modulation + time[:, None]
        shift, scale = m[:, 0:1], m[:, 1:2]

        def project(pieces):
            x = mx.fast.layer_norm(pieces.pop().astype(mx.float32), None, None, self.eps)
            x = self.head(x * (1 + scale) + shift)
            pace(x)
            return x

        return in_token_chunks(project, [x], pace, min(FEED_FORWARD_TOKENS, pace.tokens_at_once))


class ImageEmbedding(nn.Module):
    """CLIP features (B, 257, 1280), or (2, 257, 1280) for first and last frame → (1 or B, tokens, D)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        width = config.image_dim
        self.proj = [
            nn.LayerNorm(width),
            Linear(width, width),
            nn.gelu,
            Linear(width, config.dim),
            nn.LayerNorm(config.dim),
        ]
        if config.model_type == "flf2v":
            self.emb_pos = mx.zeros((1, 2 * 257, width))

    def __call__(self, features: mx.array) -> mx.array:
        x = features.astype(mx.float32)
        if "emb_pos" in self:
            x = x.reshape(-1, 2 * features.shape[1], features.shape[2]) + self.emb_pos
        for layer in self.proj:
            x = layer(x)
        return x


@dataclass(frozen=True)
class ForwardPass:
    """What stays the same in one forward pass, from the first block to the head.

    ``grid`` is in patches, ``time`` the embedding (B, D), ``for_blocks`` what `Block` takes beside the tokens.
    """

    grid: tuple[int, int, int]
    time: mx.array
    pace: Pacer
    for_blocks: tuple

    @property
    def modulation(self) -> mx.array:
        """The time projection that modulates the blocks, float32 (B, 6, D)."""
        return self.for_blocks[0]


# (tokens before the blocks, this pass, run the blocks) → tokens after the blocks. It runs them, or knows better.
Through = Callable[[mx.array, ForwardPass, Callable[[mx.array], mx.array]], mx.array]


class Transformer(nn.Module):
    """The diffusion transformer of every Wan2.1 model; VACE adds blocks around it (`wan_mlx.models.vace`)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = Linear(int(np.prod(config.patch_size)) * config.in_dim, dim)
        self.text_embedding = [Linear(config.text_dim, dim), gelu_tanh, Linear(dim, dim)]
        self.time_embedding = [Linear(config.freq_dim, dim), nn.silu, Linear(dim, dim)]
        self.time_projection = [nn.silu, Linear(dim, 6 * dim)]
        self.tokens_at_once = TOKENS_AT_ONCE  # where tokens are independent; fewer take less memory
        self._late = LateFrees(LATE)
        # Reads the blocks where they are not resident: (their names, in order) → the blocks, each valid until the next.
        self.stream: Callable[[Sequence[str]], Iterator[Block]] | None = None
        self.blocks = [self.new_block(config, f"blocks.{i}") for i in range(config.num_layers)]
        self.head = Head(config)
        if config.has_image_branch:
            self.img_emb = ImageEmbedding(config)

    @property
    def dtype(self) -> mx.Dtype:
        """Dtype of the wide arrays."""
        return self.text_embedding[0].bias.dtype

    def __call__(
        self,
        latents: mx.array,
        timestep: float | Sequence[float],
        context: mx.array,
        condition: mx.array | None = None,
        image_features: mx.array | None = None,
        through: Through | None = None,
        skip_layers: Collection[int] = (),
    ) -> mx.array:
        """Predict the velocity (noise minus clean latents).

        Args:
            latents: (B, t, h, w, out_dim), h and w even.
            timestep: in [0, 1000], one for all or one per sample.
            context: (B, text_len, text_dim), text embeddings zero-padded to ``text_len`` rows; the zero rows count.
            condition: (B, t, h, w, in_dim - out_dim), for image-conditioned models.
            image_features: CLIP features, for image-conditioned models.
            through: called in place of the blocks, with the means to run them.
            skip_layers: numbers of the blocks to leave out, from 0.

        Returns:
            float32 (B, t, h, w, out_dim).

        Raises:
            ValueError: an argument has the wrong shape.
        """
        self._check(latents, context, condition, image_features)
        if condition is not None:
            latents = mx.concatenate([latents, condition.astype(latents.dtype)], axis=-1)
        x, this_pass = self.enter(latents, timestep, context, image_features)

        def run_blocks(x):
            layers = (layer for layer in range(self.config.num_layers) if layer not in skip_layers)
            tokens = [x]
            del x
            for _, block in self.each_block([f"blocks.{layer}" for layer in layers]):
                tokens.append(self.done(block(tokens.pop(), *this_pass.for_blocks)))
            return tokens.pop()

        tokens = [x]
        del x  # or it would be held through all the blocks
        x = run_blocks(tokens.pop()) if through is None else through(tokens.pop(), this_pass, run_blocks)
        return self.leave(x, this_pass)

    @staticmethod
    def new_block(config: TransformerConfig, name: str) -> Block:
        """A block for the parameters whose names begin with ``name``, not loaded."""
        return Block(config)

    def each_block(self, names: Sequence[str]) -> Iterator[tuple[str, Block]]:
        """Names and blocks in order, resident or as they are read."""
        if self.stream is not None:
            yield from zip(names, self.stream(names), strict=True)
            return
        for name in names:
            kind, index = name.split(".")
            yield name, self[kind][int(index)]

    def done(self, *arrays: mx.array) -> mx.array:
        """To be called with all that was computed with a block; returns the last array."""
        if self.stream is not None:
            mx.eval(arrays)  # the block is emptied when the next one is asked for
        return arrays[-1]

    def enter(
        self, latents: mx.array, timestep: float | Sequence[float], context: mx.array, image_features: mx.array | None
    ) -> tuple[mx.array, ForwardPass]:
        """Everything before the blocks: latents (B, t, h, w, in_dim) → tokens (B, L, D), and what comes with them."""
        x, grid = self.patchify(latents, self.patch_embedding)
        time, modulation = self.embed_time(timestep)
        text, image = self.embed_context(context, image_features)
        self._late.most = LATE_WHOLE if self.tokens_at_once > FEED_FORWARD_TOKENS else LATE
        table, pace = rope_table(grid, self.config.head_dim), Pacer(self.tokens_at_once, self._late)
        return x, ForwardPass(grid, time, pace, (modulation, text, image, table, pace))

    def leave(self, x: mx.array, this_pass: ForwardPass) -> mx.array:
        """Everything after the blocks: tokens (B, L, D) → velocity, float32 (B, t, h, w, out_dim)."""
        return self.unpatchify(self.head(x, this_pass.time, this_pass.pace), this_pass.grid)

    def _check(self, latents, context, condition, image_features):
        c = self.config
        given = latents.shape[-1] + (0 if condition is None else condition.shape[-1])
        if latents.ndim != 5 or given != c.in_dim:
            raise ValueError(f"latents with condition have shape {latents.shape} and {given} channels in all, "
                             f"expected (B, t, h, w, C) with {c.in_dim} channels in all")  # fmt: skip
        if any(n % p for n, p in zip(latents.shape[1:4], c.patch_size, strict=True)):
            raise ValueError(f"latents {latents.shape[1:4]} are not a multiple of the patch {c.patch_size}")
        if context.shape[1:] != (c.text_len, c.text_dim):
            raise ValueError(f"context has shape {context.shape}, expected (B, {c.text_len}, {c.text_dim})")
        if c.has_image_branch != (image_features is not None):
            raise ValueError(f"image features are {'missing' if image_features is None else 'not used'} "
                             f"for a {c.model_type} model")  # fmt: skip

    def patchify(self, latents: mx.array, embedding: Linear) -> tuple[mx.array, tuple[int, int, int]]:
        """Latents (B, t, h, w, channels) → tokens (B, L, D), one embedded patch each, and the patch grid."""
        b, t, h, w, c = latents.shape
        pt, ph, pw = self.config.patch_size
        grid = (t // pt, h // ph, w // pw)
        x = latents.reshape(b, grid[0], pt, grid[1], ph, grid[2], pw, c)
        x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, -1, pt * ph * pw * c)
        return embedding(x.astype(mx.float32)).astype(self.dtype), grid

    def unpatchify(self, x: mx.array, grid: tuple[int, int, int]) -> mx.array:
        """Tokens (B, L, patch volume * out_dim) → (B, t, h, w, out_dim)."""
        pt, ph, pw = self.config.patch_size
        x = x.reshape(x.shape[0], *grid, pt, ph, pw, self.config.out_dim).transpose(0, 1, 4, 2, 5, 3, 6, 7)
        return x.reshape(x.shape[0], grid[0] * pt, grid[1] * ph, grid[2] * pw, self.config.out_dim)

    def embed_time(self, timestep: float | Sequence[float]) -> tuple[mx.array, mx.array]:
        """Timestep → its embedding (B, D) and the blocks' modulation (B, 6, D), float32."""
        time = mx.array(sinusoid(np.atleast_1d(timestep), self.config.freq_dim))
        for layer in self.time_embedding:
            time = layer(time)
        modulation = time
        for layer in self.time_projection:
            modulation = layer(modulation)
        return time, modulation.reshape(-1, 6, self.config.dim)

    def embed_context(self, context: mx.array, image_features: mx.array | None) -> tuple[mx.array, mx.array | None]:
        """Text and CLIP embeddings at the width of the transformer."""
        text = context.astype(self.dtype)
        for layer in self.text_embedding:
            text = layer(text)
        image = None if image_features is None else self.img_emb(image_features).astype(self.dtype)
        return text, image


def sinusoid(position: np.ndarray, dim: int) -> np.ndarray:
    """Cosines then sines of the timestep at ``dim / 2`` frequencies, built in float64 → float32 (B, dim)."""
    half = dim // 2
    angle = np.outer(position.astype(np.float64), 10000.0 ** (-np.arange(half) / half))
    return np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def _split_heads(x: mx.array, heads: int) -> mx.array:
    return x.reshape(*x.shape[:2], heads, -1)
