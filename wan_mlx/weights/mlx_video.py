"""Folders of mlx-video (https://github.com/Blaizzy/mlx-video), another port to MLX, as its converter writes them.

Transformer and text encoder have names of their own (`layouts`). Its VAE has the official names with convolutions
channels last, and its packed matrices have MLX's arrays; both are told by the config.json beside them alone, whose
entries become the metadata that a file of ours would have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import WeightsError
from ..models.quantized_linear import Packing
from .component import MLX_LAYOUT
from .quantize import Quantization

MLX_VIDEO = "mlx-video"
MLX_VIDEO_FILES: dict[str, tuple[str, ...]] = {
    "transformer": ("model.safetensors",),
    "high_noise": ("high_noise_model.safetensors",),
    "low_noise": ("low_noise_model.safetensors",),
    "text_encoder": ("t5_encoder.safetensors",),
    "vae": ("vae.safetensors",),
}
# Entries that every config.json of its has, and no other tool's.
_SIGNS = {"model_version", "dual_model", "vae_z_dim", "t5_num_buckets"}
# The matrices of a block that it packs; all of them, whatever their size.
_PACKED = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.k", "cross_attn.v",
           "cross_attn.o", "ffn.0", "ffn.2")  # fmt: skip


def is_mlx_video(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of its folders."""
    return config.keys() >= _SIGNS


def metadata_of(kind: str, config: Mapping[str, Any]) -> dict[str, str]:
    """The metadata that a folder's config.json stands for, of one network; WeightsError if it makes no sense."""
    if kind == "vae":
        return {"layout": MLX_LAYOUT}
    entry = config.get("quantization")
    if kind != "transformer" or entry is None:
        return {}
    try:
        packing = Packing.parse("q{bits}-g{group_size}".format(**entry))
        layers = range(int(config["num_layers"]))
    except (ValueError, TypeError, LookupError):
        said = f"quantization = {str(entry)[:80]}, num_layers = {str(config.get('num_layers'))[:80]}"
        raise WeightsError(
            f"mlx-video's config.json says {said}; expected bits and group_size that MLX has, and a count"
        ) from None
    packings = {f"blocks.{n}.{name}.weight": packing for n in layers for name in _PACKED}
    return Quantization(packing.name, packings).to_metadata()
