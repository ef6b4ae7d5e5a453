"""The network that a configuration is of."""

from __future__ import annotations

from .configs import TransformerConfig
from .transformer import Transformer
from .vace import VaceTransformer

TRANSFORMERS: dict[str, type[Transformer]] = {
    "t2v": Transformer,
    "i2v": Transformer,
    "flf2v": Transformer,
    "vace": VaceTransformer,
}


def new_transformer(config: TransformerConfig) -> Transformer:
    """A transformer of these sizes, without weights."""
    return TRANSFORMERS[config.model_type](config)
