"""The diffusion transformer of Wan: (latents, timestep, context) → velocity.

Follows the official ``wan/modules/model.py``. Parameter names are the official checkpoint's. Wide arrays keep the
weights' dtype; the time path, modulation, norms' statistics, the patch embedding and the head are float32.

Everything here is a function of arrays: it can be differentiated, compiled and compared with the paper.
`wan_mlx.models.execution` decides how it runs on a machine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .attention import CrossAttention, Pairs, SelfAttention, attention
from .configs import TransformerConfig
from .layers import AffineNorm, Linear, chain, gated_add, gelu_tanh, modulated_norm
from .rope import RopeTable, rope_table

T = TypeVar("T")

# Attributes that are lists of blocks, in all transformers.
BLOCK_LISTS = ("blocks", "vace_blocks", "audio_injectors", "face_adapter.fuser_blocks")
BLOCK = re.compile(rf"((?P<list>{'|'.join(map(re.escape, BLOCK_LISTS))})\.(?P<number>\d+))\.")
# Parameters that stay float32 in any dtype: few bytes, and rounding them is visible.
FLOAT32_PARAMETERS = (
    r"(^|.*\.)(time_\w+|\w*patch_embedding|ref_conv|head|modulation|norm\w*|[qk]_norm|emb_pos|"
    r"cond_encoder|frame_packer|casual_audio_encoder|motion_encoder|face_encoder)(\..*|$)"
)


class Modulation(NamedTuple):
    """The timestep's effect on one block, each float32 (B, 1, D); scales multiply a norm's result."""

    shift_attn: mx.array
    scale_attn: mx.array
    gate_attn: mx.array
    shift_ffn: mx.array
    scale_ffn: mx.array
    gate_ffn: mx.array


class Clean(NamedTuple):
    """The tokens of the first frames, where these are given: they have no noise, so their timestep is 0."""

    tokens: slice  # without an end if these are the last ones
    time: mx.array  # as in `ForwardPass`, of timestep 0
    modulation: mx.array


# Runs of tokens with one timestep, each with what that makes of them.
Runs = Sequence[tuple[slice, T]]


def by_runs(function: Callable[..., mx.array], runs: Runs, *arrays: mx.array) -> mx.array:
    """``function(*arrays, row)``, which treats tokens (B, L, D) one by one, of each run with its row."""
    parts = [function(*(array[:, tokens] for array in arrays), row) for tokens, row in runs]
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward, the first and last modulated by the timestep."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.eps = config.eps
        self.self_attn = SelfAttention(config)
        self.norm3 = AffineNorm(config.dim, config.eps)
        self.cross_attn = CrossAttention(config)
        self.ffn: list[Any] = [Linear(config.dim, config.ffn_dim), gelu_tanh, Linear(config.ffn_dim, config.dim)]
        self.modulation = mx.zeros((1, 6, config.dim))

    def __call__(
        self,
        x: mx.array,
        modulation: mx.array,
        context: mx.array,
        image_context: mx.array | None,
        rope: RopeTable,
        clean: Clean | None = None,
    ) -> mx.array:
        """x (B, L, D), modulation float32 (B, 6, D), context (B, 512, D) → (B, L, D)."""
        runs = self.runs(modulation, clean)
        q, k, v = self.self_attn.queries_keys_values(by_runs(self.before_attention, runs, x), rope)
        rest = partial(self.after_attention, self.cross_attn.keys_values(context, image_context))
        return by_runs(rest, runs, x, attention(q, k, v))

    def before_attention(self, x: mx.array, m: Modulation) -> mx.array:
        """The input of self-attention, token by token: x (B, L, D) → (B, L, D)."""
        return modulated_norm(x, m.scale_attn, m.shift_attn, self.eps)

    def after_attention(self, pairs: Pairs, x: mx.array, attended: mx.array, m: Modulation) -> mx.array:
        """The rest of the block, token by token: x and the attention result (B, L, D) → (B, L, D)."""
        x = gated_add(x, self.self_attn.o(attended), m.gate_attn)
        x = x + self.cross_attn(self.norm3(x), pairs)
        y = chain(modulated_norm(x, m.scale_ffn, m.shift_ffn, self.eps), self.ffn)
        return gated_add(x, y, m.gate_ffn)

    def runs(self, modulation: mx.array, clean: Clean | None) -> Runs[Modulation]:
        """The time projection float32 (B, 6, D), and that of clean tokens → this block's modulation of each run."""
        others = self.modulate(modulation)
        return in_runs(others, clean and (clean.tokens, self.modulate(clean.modulation)))

    def modulate(self, modulation: mx.array) -> Modulation:
        """The time projection float32 (B, 6, D) → this block's modulation."""
        shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = mx.split(
            self.modulation + modulation, 6, axis=1
        )
        return Modulation(shift_attn, 1 + scale_attn, gate_attn, shift_ffn, 1 + scale_ffn, gate_ffn)


def in_runs(others: T, some: tuple[slice, T] | None) -> Runs[T]:
    """All tokens, or ``some`` and those before and after them."""
    if some is None:
        return [(slice(None), others)]
    start, stop = some[0].start, some[0].stop
    before, after = [(slice(start), others)] * (start > 0), [(slice(stop, None), others)] * (stop is not None)
    return [*before, some, *after]


class Head(nn.Module):
    """Final modulated norm and projection to one patch of velocities per token, in float32."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.eps = config.eps
        self.head = Linear(config.dim, int(np.prod(config.patch_size)) * config.out_dim)
        self.modulation = mx.zeros((1, 2, config.dim))

    def __call__(self, x: mx.array, time: mx.array) -> mx.array:
        """x (B, L, D), time float32 (B, D) → float32 (B, L, patch volume * out_dim)."""
        shift, scale = mx.split(self.modulation + time[:, None], 2, axis=1)
        x = mx.fast.layer_norm(x.astype(mx.float32), None, None, self.eps)
        return self.head(x * (1 + scale) + shift)


class ImageEmbedding(nn.Module):
    """CLIP features (B, 257, 1280), or (2, 257, 1280) for first and last frame → (1 or B, tokens, D)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        assert config.image_dim is not None, "of a model that reads CLIP's features"
        width, dim = config.image_dim, config.dim
        wide: list[Any] = [nn.LayerNorm(width), Linear(width, width), nn.gelu]
        self.proj = [*wide, Linear(width, dim), nn.LayerNorm(dim)]
        if config.model_type == "flf2v":
            self.emb_pos = mx.zeros((1, 2 * 257, width))

    def __call__(self, features: mx.array) -> mx.array:
        x = features.astype(mx.float32)
        if "emb_pos" in self:
            x = x.reshape(-1, 2 * features.shape[1], features.shape[2]) + self.emb_pos
        return chain(x, self.proj)


@dataclass(frozen=True)
class ForwardPass:
    """Values that stay the same in one forward pass, from the first block to the head."""

    grid: tuple[int, int, int]  # patches along (time, height, width)
    time: mx.array  # the time embedding, float32 (B, D)
    modulation: mx.array  # its projection for the blocks, float32 (B, 6, D)
    context: mx.array  # text with the transformer's width (B, length, D)
    image_context: mx.array | None  # CLIP features, likewise
    rope: RopeTable
    clean: Clean | None = None  # the tokens of given frames
    vace_context: mx.array | None = None  # latents of VACE's control video
    vace_scale: float = 1.0  # strength of its hints
    voice: tuple[mx.array, mx.array | None] | None = None  # what each latent frame hears (`s2v.Voice`)
    face: mx.array | None = None  # tokens of Animate's face for each frame of the grid (B, frames, tokens, D)

    @property
    def for_blocks(self) -> tuple[mx.array, mx.array, mx.array | None, RopeTable, Clean | None]:
        """The inputs of `Block` beside the tokens."""
        return self.modulation, self.context, self.image_context, self.rope, self.clean

    @property
    def times(self) -> Runs[mx.array]:
        """The time embedding of each run of tokens."""
        return in_runs(self.time, self.clean and (self.clean.tokens, self.clean.time))


# (tokens before the blocks, this pass, run the blocks) → tokens after the blocks. A hook around the blocks: it runs or
# replaces them.
BlocksHook = Callable[[mx.array, ForwardPass, Callable[[mx.array], mx.array]], mx.array]


class Transformer(nn.Module):
    """The diffusion transformer of every model here; VACE adds blocks around it (`wan_mlx.models.vace`)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = Linear(int(np.prod(config.patch_size)) * config.in_dim, dim)
        self.text_embedding: list[Any] = [Linear(config.text_dim, dim), gelu_tanh, Linear(dim, dim)]
        self.time_embedding: list[Any] = [Linear(config.freq_dim, dim), nn.silu, Linear(dim, dim)]
        self.time_projection: list[Any] = [nn.silu, Linear(dim, 6 * dim)]
        self.blocks = [self.new_block(config, f"blocks.{i}") for i in range(config.num_layers)]
        self.head = Head(config)
        if config.has_image_branch:
            self.img_emb = ImageEmbedding(config)
        if config.ref_dim is not None:
            self.ref_conv = Linear(int(np.prod(config.patch_size)) * config.ref_dim, dim)

    @property
    def dtype(self) -> mx.Dtype:
        """Dtype of the wide arrays."""
        return self.text_embedding[0].bias.dtype

    def __call__(
        self,
        latents: mx.array,
        timestep: float | Sequence[float],
        context: mx.array,
        *conditions: Any,
        through: BlocksHook | None = None,
        skip_layers: Collection[int] = (),
        **named: Any,
    ) -> mx.array:
        """Predict the velocity (noise minus clean latents), float32 (B, t, h, w, out_dim).

        Args:
            latents, timestep, context, conditions, named: as for `enter`.
            through: called in place of the blocks; may run them.
            skip_layers: numbers of the blocks to leave out, from 0; VACE's hints stay.

        Raises:
            ValueError: an argument has the wrong shape.
        """
        x, this_pass = self.enter(latents, timestep, context, *conditions, **named)
        run_blocks = partial(self.run_blocks, this_pass=this_pass, skip_layers=skip_layers)
        return self.leave(run_blocks(x) if through is None else through(x, this_pass, run_blocks), this_pass)

    def enter(
        self,
        latents: mx.array,
        timestep: float | Sequence[float],
        context: mx.array,
        condition: mx.array | None = None,
        image_features: mx.array | None = None,
        clean_frames: int = 0,
        reference: mx.array | None = None,
    ) -> tuple[mx.array, ForwardPass]:
        """Everything before the blocks: tokens (B, L, D), and the values of this pass.

        Args:
            latents: (B, t, h, w, out_dim), h and w even.
            timestep: in [0, 1000], one for all samples or one for each.
            context: (B, text_len, text_dim), text embeddings zero-padded to ``text_len`` rows; the zero rows count.
            condition: (B, t, h, w, in_dim - out_dim), for image-conditioned models.
            image_features: CLIP features, for image-conditioned models.
            clean_frames: so many first latent frames are given, without noise: their timestep is 0 (Wan2.2 TI2V).
            reference: (B, 1, h, w, ref_dim), for Fun-Control: latents of an image, whose tokens stand before the
                video's as one more frame, and are left out of the velocity.
        """
        self._check(latents, context, condition, image_features, reference)
        if condition is not None:
            latents = mx.concatenate([latents, condition.astype(latents.dtype)], axis=-1)
        x, grid = self.patchify(latents, self.patch_embedding)
        positions, first = grid, 0
        if reference is not None:
            before, (frames, *_) = self.patchify(reference, self.ref_conv)
            x, positions, first = mx.concatenate([before, x], axis=1), (frames + grid[0], *grid[1:]), before.shape[1]
        end = first + clean_frames // self.config.patch_size[0] * math.prod(grid[1:])
        time, modulation = self.times_of(timestep if end - first < x.shape[1] else 0.0)
        clean = None
        if first < end and end - first < x.shape[1]:
            clean = Clean(slice(first, end if end < x.shape[1] else None), *self.times_of(0.0))
        text = self.embed_text(context)
        image = None if image_features is None else self.img_emb(image_features).astype(self.dtype)
        return x, ForwardPass(grid, time, modulation, text, image, rope_table(positions, self.config.head_dim), clean)

    def embed_text(self, context: mx.array) -> mx.array:
        """Rows of text (B, length, text_dim), each by itself, with the transformer's width."""
        return chain(context.astype(self.dtype), self.text_embedding)

    def times_of(self, timestep: float | Sequence[float]) -> tuple[mx.array, mx.array]:
        """The time embedding float32 (B, D) and its projection for the blocks (B, 6, D)."""
        time = chain(mx.array(sinusoid(np.atleast_1d(timestep), self.config.freq_dim)), self.time_embedding)
        return time, chain(time, self.time_projection).reshape(-1, 6, self.config.dim)

    def leave(self, x: mx.array, this_pass: ForwardPass) -> mx.array:
        """Everything after the blocks: tokens (B, L, D) → velocity, float32 (B, t, h, w, out_dim)."""
        x, this_pass = self.of_video(x, this_pass)
        return self.unpatchify(by_runs(self.head, this_pass.times, x), this_pass.grid)

    def of_video(self, x: mx.array, this_pass: ForwardPass) -> tuple[mx.array, ForwardPass]:
        """The tokens that `leave` needs, and their values."""
        return x, this_pass

    def run_blocks(self, x: mx.array, this_pass: ForwardPass, skip_layers: Collection[int] = ()) -> mx.array:
        """Tokens (B, L, D) through the blocks."""
        for block in map(self.block, self.block_order(skip_layers)):
            x = block(x, *this_pass.for_blocks)
        return x

    def block_order(self, skip_layers: Collection[int] = ()) -> list[str]:
        """Names of the blocks, in the order in which they run."""
        return [f"blocks.{layer}" for layer in range(self.config.num_layers) if layer not in skip_layers]

    def block(self, name: str) -> Block:
        """The block of this name."""
        blocks, _, index = name.rpartition(".")
        return self.block_list(blocks)[int(index)]

    def block_list(self, name: str) -> list[Block]:
        """The blocks of this name in `BLOCK_LISTS`; empty if there are none."""
        found: Any = self
        for part in name.split("."):
            found = found.get(part, {})
        return found or []

    @staticmethod
    def new_block(config: TransformerConfig, name: str) -> Block:
        """A block for the parameters whose names begin with ``name``; zero until loaded."""
        return Block(config)

    def _check(self, latents, context, condition, image_features, reference):
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
        expected = None if c.ref_dim is None else (len(latents), 1, *latents.shape[2:4], c.ref_dim)
        if (given := None if reference is None else reference.shape) != expected:
            raise ValueError(f"reference has shape {given}, expected {expected} for this {c.model_type} model")

    def patchify(
        self, latents: mx.array, embedding: Linear, patch: tuple[int, int, int] | None = None
    ) -> tuple[mx.array, tuple[int, int, int]]:
        """Latents (B, t, h, w, channels) → tokens (B, L, D), one embedded patch each, and the patch grid.

        ``patch``: another size than the model's.
        """
        b, t, h, w, c = latents.shape
        pt, ph, pw = patch or self.config.patch_size
        grid = (t // pt, h // ph, w // pw)
        x = latents.reshape(b, grid[0], pt, grid[1], ph, grid[2], pw, c)
        x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, -1, pt * ph * pw * c)
        return embedding(x.astype(mx.float32)).astype(self.dtype), grid

    def unpatchify(self, x: mx.array, grid: tuple[int, int, int]) -> mx.array:
        """Tokens (B, L, patch volume * out_dim), without those before the ``grid``'s → (B, t, h, w, out_dim)."""
        pt, ph, pw = self.config.patch_size
        x = x[:, -math.prod(grid) :].reshape(x.shape[0], *grid, pt, ph, pw, self.config.out_dim)
        x = x.transpose(0, 1, 4, 2, 5, 3, 6, 7)
        return x.reshape(x.shape[0], grid[0] * pt, grid[1] * ph, grid[2] * pw, self.config.out_dim)


def sinusoid(position: np.ndarray, dim: int) -> np.ndarray:
    """Cosines then sines of the timestep at ``dim / 2`` frequencies, built in float64 → float32 (B, dim)."""
    half = dim // 2
    angle = np.outer(position.astype(np.float64), 10000.0 ** (-np.arange(half) / half))
    return np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)

