"""The network that a configuration is of."""

from __future__ import annotations

from typing import Any

from .animate import AnimateTransformer
from .audio_encoder import AudioEncoder
from .configs import (
    AudioEncoderConfig,
    ImageEncoderConfig,
    TextEncoderConfig,
    TransformerConfig,
    VAE22Config,
    VAEConfig,
)
from .image_encoder import ImageEncoder
from .s2v import S2VTransformer
from .text_encoder import TextEncoder
from .transformer import Transformer
from .vace import VaceTransformer
from .vae import VAE
from .vae22 import VAE22

TRANSFORMERS = {
    "t2v": Transformer, "i2v": Transformer, "flf2v": Transformer, "vace": VaceTransformer, "ti2v": Transformer,
    "control": Transformer, "s2v": S2VTransformer, "animate": AnimateTransformer,
}  # fmt: skip
NETWORKS = {
    TextEncoderConfig: TextEncoder, VAEConfig: VAE, VAE22Config: VAE22, ImageEncoderConfig: ImageEncoder,
    AudioEncoderConfig: AudioEncoder,
}  # fmt: skip


def new_transformer(config: TransformerConfig) -> Transformer:
    """A transformer of these sizes, without weights."""
    return TRANSFORMERS[config.model_type](config)


def new_network(config: Any) -> Any:
    """The network of these sizes, without weights."""
    return new_transformer(config) if isinstance(config, TransformerConfig) else NETWORKS[type(config)](config)
