"""Images → features: the vision tower of open-CLIP's XLM-RoBERTa ViT-H/14, up to its penultimate block.

Follows the official ``wan/modules/clip.py`` (``CLIPModel.visual``). Parameter names are the official checkpoint's,
without ``visual.``. They may be float16, as published; the computation is float32, which costs little for 257 tokens.
bfloat16 is not offered: its eight bits would change the features.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..resize import resize_bicubic
from .attention import attention
from .configs import ImageEncoderConfig
from .layers import Linear, chain

# Mean of the RGB channels, in [0, 1], over CLIP's training images.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def preprocess(images: np.ndarray | mx.array, size: int) -> np.ndarray:
    """CLIP's input: images (N, H, W, 3) in [-1, 1] → float32 (N, size, size, 3), not cropped, normalised."""
    # Not clamped: the official code keeps the cubic's overshoot.
    pixels = resize_bicubic(np.asarray(images), size, size) * 0.5 + 0.5
    return (pixels - np.array(MEAN, np.float32)) / np.array(STD, np.float32)


class SelfAttention(nn.Module):
    """Attention among the patches of one image."""

    def __init__(self, config: ImageEncoderConfig):
        super().__init__()
        self.heads = config.num_heads
        self.to_qkv = Linear(config.dim, 3 * config.dim)
        self.proj = Linear(config.dim, config.dim)

    def __call__(self, x: mx.array) -> mx.array:
        qkv = self.to_qkv(x).reshape(*x.shape[:2], 3, self.heads, -1)
        return self.proj(attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]))


class Block(nn.Module):
    """Self-attention and feed-forward, each normed before: (N, L, dim) → (N, L, dim)."""

    def __init__(self, config: ImageEncoderConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, config.eps)
        self.attn = SelfAttention(config)
        self.norm2 = nn.LayerNorm(config.dim, config.eps)
        wide = config.mlp_ratio * config.dim
        self.mlp: list[Any] = [Linear(config.dim, wide), nn.gelu, Linear(wide, config.dim)]

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.attn(self.norm1(x))
        return x + chain(self.norm2(x), self.mlp)


class ImageEncoder(nn.Module):
    """The vision tower without its last block, whose output Wan does not use."""

    def __init__(self, config: ImageEncoderConfig):
        super().__init__()
        self.config = config
        patches = (config.image_size // config.patch_size) ** 2
        self.patch_embedding = Linear(3 * config.patch_size**2, config.dim, bias=False)
        self.cls_embedding = mx.zeros((1, 1, config.dim))
        self.pos_embedding = mx.zeros((1, 1 + patches, config.dim))
        self.pre_norm = nn.LayerNorm(config.dim, config.eps)
        self.transformer = [Block(config) for _ in range(config.num_layers - 1)]

    def __call__(self, images: np.ndarray | mx.array) -> mx.array:
        """Encode images (N, H, W, 3) in [-1, 1], each resized to CLIP's square → float32 (N, 257, dim).

        The class token comes first, then the patches row by row. ValueError: another shape.
        """
        return chain(self.embed(images), self.transformer)

    def embed(self, images: np.ndarray | mx.array) -> mx.array:
        """Images (N, H, W, 3) → class token and embedded patches, with their positions (N, 257, dim)."""
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images have shape {tuple(images.shape)}, expected (N, H, W, 3)")
        n, size, patch = images.shape[0], self.config.image_size, self.config.patch_size
        pixels = preprocess(images, size).reshape(n, size // patch, patch, size // patch, patch, 3).swapaxes(2, 3)
        x = self.patch_embedding(mx.array(pixels.reshape(n, -1, 3 * patch**2)))
        x = mx.concatenate([mx.repeat(self.cls_embedding, n, axis=0), x], axis=1)
        return self.pre_norm(x + self.pos_embedding)


def last_block_shapes(config: ImageEncoderConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of the parameters that every checkpoint has and `ImageEncoder` does not use."""
    last = f"transformer.{config.num_layers - 1}"
    parameters = dict(tree_flatten(Block(config).parameters()))
    return {f"{last}.{name}": tuple(array.shape) for name, array in parameters.items()}
