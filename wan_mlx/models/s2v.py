"""Speech to video (Wan2.2 S2V): a transformer that hears, and sees a reference image, poses and the frames before.

Follows the official ``wan/modules/s2v``. Its tokens are those of the video, then the reference image's, then those of
the frames before, which FramePack makes fewer the older they are. Parameter names are the official checkpoint's, but
for the injectors' (`weights.layouts`), which are blocks here: 12 % of the weights, streamed as the others are.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .attention import CrossAttention, Pairs
from .configs import TransformerConfig
from .layers import Conv1d, Embedding, Linear, modulated_norm
from .rope import RopeTable, joined, rope_of
from .transformer import Block, Clean, ForwardPass, Runs, Transformer, by_runs

MOTION_FRAMES = 73  # frames before a clip, of which its sound counts the first one so often
MOTION_LATENTS = 19  # their latent frames
REFERENCE_TIME = 30  # where in time the reference image stands
# FramePack, from the newest on: projection, its patch (t, h, w), and the latent frames before the clip that it takes.
FRAME_PACK = {"proj": ((1, 2, 2), 1), "proj_2x": ((2, 4, 4), 2), "proj_4x": ((4, 8, 8), 16)}
NORM_EPS, ADAPTIVE_EPS = 1e-6, 1e-5

# What one frame's tokens need of the sound: scale and shift of their norm, and the keys and values they attend to.
Heard = tuple[mx.array, mx.array, Pairs]
# Of each latent frame the sound's tokens (B, t, tokens, D), and the sound as a whole (B, t, D), if it is used.
Voice = tuple[mx.array, mx.array | None]


class CausalConv(nn.Module):
    """A convolution in time that sees no later frame; before the first one there are copies of it."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, kernel: int = 3):
        super().__init__()
        self.before = kernel - 1
        self.conv = Conv1d(inputs, outputs, kernel, stride)

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv(mx.concatenate([mx.repeat(x[:, :1], self.before, axis=1), x], axis=1))


class MotionEncoder(nn.Module):
    """Features of each frame (B, T, in_dim) → tokens of each latent frame (B, T/4, heads + 1, dim), and, if
    ``whole``, one for all of it (B, T/4, dim)."""

    def __init__(self, in_dim: int, dim: int, heads: int, whole: bool):
        super().__init__()
        self.heads, narrow = heads, dim // 4
        self.conv1_local = CausalConv(in_dim, narrow * heads)
        self.conv2, self.conv3 = CausalConv(narrow, dim // 2, stride=2), CausalConv(dim // 2, dim, stride=2)
        self.padding_tokens = mx.zeros((1, 1, 1, dim))
        if whole:
            self.conv1_global = CausalConv(in_dim, narrow)
            self.final_linear = Linear(dim, dim)

    def __call__(self, x: mx.array) -> Voice:
        b, t, _ = x.shape
        local = self.conv1_local(x).reshape(b, t, self.heads, -1).swapaxes(1, 2).flatten(0, 1)
        local = self._narrowed(local)
        local = local.reshape(b, self.heads, *local.shape[1:]).swapaxes(1, 2)
        last = mx.broadcast_to(self.padding_tokens, (b, local.shape[1], 1, local.shape[-1]))
        tokens = mx.concatenate([local, last], axis=2)
        return tokens, self.final_linear(self._narrowed(self.conv1_global(x))) if "final_linear" in self else None

    def _narrowed(self, x):
        """Four frames become one."""
        for step in (lambda x: x, self.conv2, self.conv3):
            x = nn.silu(mx.fast.layer_norm(step(x), None, None, NORM_EPS))
        return x


class CausalAudioEncoder(nn.Module):
    """All hidden states of wav2vec, mixed, → what latent frames hear."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.weights = mx.zeros((1, config.audio_layers, 1, 1))
        self.encoder = MotionEncoder(config.audio_dim, config.dim, config.audio_tokens, config.audio_adain)

    def __call__(self, states: mx.array) -> Voice:
        """States float32 (B, layers, frames, audio_dim) → of each latent frame, as `MotionEncoder` has it."""
        weights = nn.silu(self.weights)
        return self.encoder((states * (weights / weights.sum())).sum(axis=1))


class AudioInjector(CrossAttention):
    """What a latent frame hears, added to its tokens."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        if config.audio_adain:
            self.adain = Linear(config.dim, 2 * config.dim)

    def heard(self, voice: Voice) -> list[Heard]:
        """Of each latent frame."""
        tokens, whole = voice
        b, frames, count, dim = tokens.shape
        if "adain" in self and whole is not None:
            shift, scale = mx.split(self.adain(nn.silu(whole)).astype(mx.float32), 2, axis=-1)
        else:
            shift = scale = mx.zeros((b, frames, dim))
        ((keys, values),) = self.keys_values(tokens.reshape(b, -1, dim), None)
        cuts = [slice(n * count, (n + 1) * count) for n in range(frames)]
        return [
            (1 + scale[:, n : n + 1], shift[:, n : n + 1], [(keys[:, cut], values[:, cut])])
            for n, cut in enumerate(cuts)
        ]

    def normed(self, x: mx.array, heard: Heard) -> mx.array:
        """Tokens of one latent frame (B, L, D), before attention."""
        return modulated_norm(x, *heard[:2], ADAPTIVE_EPS if "adain" in self else NORM_EPS)

    def inject(self, x: mx.array, heard: Heard | None) -> mx.array:
        """Tokens of one latent frame (B, L, D), or with None of what is no frame, and hears nothing."""
        return x if heard is None else x + self(self.normed(x, heard), heard[2])


class FramePacker(nn.Module):
    """Latents before the clip → tokens, fewer the older they are."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        for name, (patch, _) in FRAME_PACK.items():
            setattr(self, name, Linear(math.prod(patch) * config.out_dim, config.dim))


class S2VTransformer(Transformer):
    """The diffusion transformer with ears: after block ``audio_inject_layers[n]``, injector ``n``."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.cond_encoder = Linear(math.prod(config.patch_size) * config.out_dim, config.dim)
        self.casual_audio_encoder = CausalAudioEncoder(config)
        self.audio_injectors = [
            self.new_block(config, f"audio_injectors.{n}") for n in range(len(config.audio_inject_layers))
        ]
        self.trainable_cond_mask = Embedding(3, config.dim)
        self.frame_packer = FramePacker(config)

    @staticmethod
    def new_block(config: TransformerConfig, name: str) -> Block:
        return Block(config) if name.startswith("blocks.") else AudioInjector(config)  # type: ignore[return-value]

    def enter(  # type: ignore[override]  # other conditions than the plain transformer's
        self,
        latents: mx.array,
        timestep: float | Sequence[float],
        context: mx.array,
        reference: mx.array,
        audio: mx.array,
        motion: mx.array | None = None,
        pose: mx.array | None = None,
    ) -> tuple[mx.array, ForwardPass]:
        """Everything before the blocks: tokens (B, L, D), and the values of this pass.

        Args:
            latents, timestep, context: as for `Transformer.enter`; h and w multiples of 8.
            reference: (B, 1, h, w, C), latents of the reference image.
            audio: float32 (B, layers, frames, audio_dim), wav2vec's hidden states, for each frame of the clip.
            motion: (B, 19, h, w, C), latents of the frames before; None for a clip without.
            pose: (B, t, h, w, C), latents of a video of poses.
        """
        x, this_pass = super().enter(latents, timestep, context)
        for name, given, frames in (("reference", reference, 1), ("motion", motion, MOTION_LATENTS),
                                    ("pose", pose, latents.shape[1])):  # fmt: skip
            expected = (len(latents), frames, *latents.shape[2:])
            if given is not None and given.shape != expected:
                raise ValueError(f"{name} has shape {given.shape}, expected {expected} for these latents")
        # Without poses the official code gives zeros, so that the bias remains.
        x = x + self.patchify(mx.zeros_like(latents) if pose is None else pose, self.cond_encoder)[0]
        still = self.patchify(reference, self.patch_embedding)[0]
        parts, tables = [x, still], [this_pass.rope, self._rope(this_pass.grid, [REFERENCE_TIME], 1)]
        if motion is not None:
            before, table = self.pack(motion, this_pass.grid)
            parts, tables = [*parts, before], [*tables, table]
        masks = self.trainable_cond_mask.weight.astype(x.dtype)
        parts = [part + masks[kind] for kind, part in enumerate(parts)]
        return mx.concatenate(parts, axis=1), replace(
            this_pass,
            rope=joined(tables),
            clean=Clean(slice(x.shape[1], None), *self.times_of(0.0)),
            voice=self.voice(audio),
        )

    def voice(self, audio: mx.array) -> Voice:
        """What each latent frame hears, in the tokens' dtype; the frames before the clip hear its first one."""
        before = mx.repeat(audio[:, :, :1], MOTION_FRAMES, axis=2)
        tokens, whole = self.casual_audio_encoder(mx.concatenate([before, audio], axis=2).astype(mx.float32))
        if whole is not None:
            whole = whole[:, MOTION_LATENTS:].astype(self.dtype)
        return tokens[:, MOTION_LATENTS:].astype(self.dtype), whole

    def pack(self, motion: mx.array, grid: tuple[int, int, int]) -> tuple[mx.array, RopeTable]:
        """Tokens of the frames before (B, L, D), and where they stand: the newest first."""
        parts, tables, before = [], [], 0
        for name, (patch, frames) in FRAME_PACK.items():
            newest = motion.shape[1] - before
            tokens, (count, *_) = self.patchify(motion[:, newest - frames : newest], self.frame_packer[name], patch)
            before += frames
            times = np.linspace(before, before - frames + 1, count).astype(int)
            parts.append(tokens)
            tables.append(self._rope(grid, (-times).tolist(), patch[1] // self.config.patch_size[1]))
        return mx.concatenate(parts, axis=1), joined(tables)

    def _rope(self, grid: tuple[int, int, int], times: Sequence[int], wider: int) -> RopeTable:
        """Of tokens at these ``times``, each so many times wider and higher than the video's."""
        rows, columns = (np.linspace(0, side - 1, side // wider).astype(int).tolist() for side in grid[1:])
        return rope_of((tuple(times), tuple(rows), tuple(columns)), self.config.head_dim)

    def of_video(self, x: mx.array, this_pass: ForwardPass) -> tuple[mx.array, ForwardPass]:
        return x[:, : math.prod(this_pass.grid)], replace(this_pass, clean=None)

    def run_blocks(self, x: mx.array, this_pass: ForwardPass, skip_layers: Collection[int] = ()) -> mx.array:
        """Tokens (B, L, D) through the blocks; after some of them the sound is added."""
        for block in map(self.block, self.block_order(skip_layers)):
            if isinstance(block, AudioInjector):
                x = by_runs(block.inject, self.hearing(block, this_pass), x)
            else:
                x = block(x, *this_pass.for_blocks)
        return x

    def hearing(self, injector: AudioInjector, this_pass: ForwardPass) -> Runs[Heard | None]:
        """What the tokens of each latent frame hear, and the others, which hear nothing."""
        assert this_pass.voice is not None, "`enter` puts it there"
        frames, rows, columns = this_pass.grid
        length = rows * columns
        runs = [(slice(n * length, (n + 1) * length), heard) for n, heard in enumerate(injector.heard(this_pass.voice))]
        return [*runs, (slice(frames * length, None), None)]

    def block_order(self, skip_layers: Collection[int] = ()) -> list[str]:
        names = []
        for layer in range(self.config.num_layers):
            if layer not in skip_layers:
                names.append(f"blocks.{layer}")
            if layer in self.config.audio_inject_layers:
                names.append(f"audio_injectors.{self.config.audio_inject_layers.index(layer)}")
        return names
