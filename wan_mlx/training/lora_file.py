"""The LoRA's file, as ComfyUI, Diffusers, musubi-tuner and ``--lora`` take it.

Keys are ``diffusion_model.blocks.N.self_attn.q.lora_A.weight`` and ``….lora_B.weight``. The scale is multiplied into
B and there is no alpha: some readers ignore an alpha beside these names, others take a missing one for the rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from ..files.safetensors import save_arrays
from ..models.configs import TransformerConfig
from ..models.rope import row_order
from ..storage import whole_file

PREFIX = "diffusion_model."


def write_lora(
    path: Path, factors: Mapping[str, mx.array], scale: float, config: TransformerConfig, about: Mapping[str, str]
) -> None:
    """Write trained factors, float32; ``about``: metadata, all strings."""
    arrays = {}
    for name, array in factors.items():
        layer, _, which = name.rpartition(".")
        if which == "up":
            array = array * scale
            order = row_order(f"{layer}.weight", config.dim, config.head_dim)
            if order is not None:  # the published order of the rows
                array = array[mx.argsort(order)]
        arrays[f"{PREFIX}{layer}.lora_{'A' if which == 'down' else 'B'}.weight"] = array
    with whole_file(path) as temporary:
        save_arrays(temporary, arrays, dict(about))
