"""Wan2.2 Animate: the transformer of image to video, which also follows poses and looks at a video of a face.

Follows the official ``wan/modules/animate/model_animate.py`` and ``face_blocks.py``. Parameter names are the official
checkpoint's. The first latent frame is the reference picture of whom is animated; poses and face begin after it.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .animate_face import NORM_EPS
from .attention import Pairs, RMSNorm, attention
from .configs import TransformerConfig
from .layers import Linear
from .transformer import Block, ForwardPass, Transformer

ADAPTER = "face_adapter.fuser_blocks"


class FaceBlock(nn.Module):
    """Attention from each latent frame's tokens to the tokens of the face in that frame."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.heads = config.num_heads
        self.linear1_kv = Linear(config.dim, 2 * config.dim)
        self.linear1_q = Linear(config.dim, config.dim)
        self.linear2 = Linear(config.dim, config.dim)
        self.q_norm = RMSNorm(config.head_dim)
        self.k_norm = RMSNorm(config.head_dim)

    def __call__(self, x: mx.array, face: mx.array) -> mx.array:
        """x (B, L, D), frame by frame, and face (B, frames, tokens, D) → (B, L, D)."""
        return self.look(x, self.keys_values(face), face.shape[1])

    def keys_values(self, face: mx.array) -> Pairs:
        """Keys and values of each frame's face (B * frames, tokens, heads, head_dim)."""
        normed = mx.fast.layer_norm(face, None, None, NORM_EPS).flatten(0, 1)
        k, v = (self._heads(part) for part in mx.split(self.linear1_kv(normed), 2, axis=-1))
        return [(self._normed(k, self.k_norm), v)]

    def look(self, x: mx.array, pairs: Pairs, frames: int) -> mx.array:
        """x (B, L, D), some ``frames`` or a part of one, with what their ``pairs`` say added."""
        q = self._heads(self.linear1_q(mx.fast.layer_norm(x, None, None, NORM_EPS)))
        q = self._normed(q, self.q_norm).reshape(x.shape[0] * frames, -1, *q.shape[2:])
        ((k, v),) = pairs
        return x + self.linear2(attention(q, k, v).reshape(x.shape))

    def _heads(self, x: mx.array) -> mx.array:
        return x.reshape(*x.shape[:2], self.heads, -1)

    def _normed(self, x: mx.array, norm: RMSNorm) -> mx.array:
        return mx.fast.rms_norm(x, norm.weight.astype(x.dtype), NORM_EPS)


class AnimateTransformer(Transformer):
    """The diffusion transformer with a face block after each of ``face_layers``.

    The encoders of the face, which its files have too, are a network of their own: `animate_face.Face`.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.pose_patch_embedding = Linear(math.prod(config.patch_size) * config.out_dim, config.dim)
        self.face_adapter = {"fuser_blocks": [FaceBlock(config) for _ in config.face_layers]}

    @staticmethod
    def new_block(config: TransformerConfig, name: str) -> Any:
        return FaceBlock(config) if name.startswith(ADAPTER) else Block(config)

    def enter(self, *inputs: Any, pose: mx.array, face: mx.array, **named: Any) -> tuple[mx.array, ForwardPass]:  # type: ignore[override]  # with more conditions than the plain transformer's
        """Everything before the blocks: tokens (B, L, D), and the values of this pass.

        Args:
            inputs, named: as for `Transformer.enter`; the first latent frame is the reference's.
            pose: (B, t - 1, h, w, out_dim), latents of the video of poses.
            face: (B, t - 1, tokens, D), of `animate_face.Face`.
        """
        x, this_pass = super().enter(*inputs, **named)
        frames, rows, columns = this_pass.grid
        patch = self.config.patch_size
        expected = (len(x), (frames - 1) * patch[0], rows * patch[1], columns * patch[2], self.config.out_dim)
        if pose.shape != expected:
            raise ValueError(f"pose has shape {pose.shape}, expected {expected} for these latents")
        tokens = self.config.face_dims[1] + 1
        if face.shape != (expected := (len(x), frames - 1, tokens, self.config.dim)):
            raise ValueError(f"face has shape {face.shape}, expected {expected} for these latents")
        posed = self.patchify(pose, self.pose_patch_embedding)[0]
        x = mx.concatenate([x[:, : rows * columns], x[:, rows * columns :] + posed], axis=1)
        unseen = mx.zeros((len(x), 1, tokens, self.config.dim))  # of the reference
        return x, replace(this_pass, face=mx.concatenate([unseen, face], axis=1).astype(self.dtype))

    def run_blocks(self, x: mx.array, this_pass: ForwardPass, skip_layers: Collection[int] = ()) -> mx.array:
        """Tokens (B, L, D) through the blocks, the face looked at between them."""
        for block in map(self.block, self.block_order(skip_layers)):
            x = block(x, this_pass.face) if isinstance(block, FaceBlock) else block(x, *this_pass.for_blocks)
        return x

    def block_order(self, skip_layers: Collection[int] = ()) -> list[str]:
        names, faces = [], {layer: f"{ADAPTER}.{number}" for number, layer in enumerate(self.config.face_layers)}
        for layer in range(self.config.num_layers):
            if layer not in skip_layers:
                names.append(f"blocks.{layer}")
            if layer in faces:
                names.append(faces[layer])
        return names
