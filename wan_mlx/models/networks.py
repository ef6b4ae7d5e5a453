"""The network that a configuration is of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.nn as nn

from .configs import ImageEncoderConfig, TextEncoderConfig, TransformerConfig, VAEConfig
from .image_encoder import ImageEncoder
from .text_encoder import TextEncoder
from .transformer import Transformer
from .vace import VaceTransformer
from .vae import VAE

TRANSFORMERS: dict[str, type[Transformer]] = {
    "t2v": Transformer,
    "i2v": Transformer,
    "flf2v": Transformer,
    "vace": VaceTransformer,
}


def new_transformer(config: TransformerConfig) -> Transformer:
    """A transformer of these sizes, without weights."""
    return TRANSFORMERS[config.model_type](config)


NETWORKS: dict[type, Callable[[Any], nn.Module]] = {
    TransformerConfig: new_transformer,
    TextEncoderConfig: TextEncoder,
    VAEConfig: VAE,
    ImageEncoderConfig: ImageEncoder,
}


def new_network(config: Any) -> nn.Module:
    """The network of these sizes, without weights."""
    return NETWORKS[type(config)](config)
