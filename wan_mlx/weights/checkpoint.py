"""Which file of a model folder holds which network."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..types import WeightsError

# The official folder: component → the names it is published under, first one wins.
OFFICIAL_FILES = {
    "transformer": ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors"),
    "text_encoder": ("models_t5_umt5-xxl-enc-bf16.pth",),
    "vae": ("Wan2.1_VAE.pth",),
    "image_encoder": ("models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",),
    "tokenizer": ("google/umt5-xxl/spiece.model",),
}
DIFFUSERS_FILES = {
    "transformer": (
        "transformer/diffusion_pytorch_model.safetensors.index.json",
        "transformer/diffusion_pytorch_model.safetensors",
    ),
    "text_encoder": ("text_encoder/model.safetensors.index.json", "text_encoder/model.safetensors"),
    "vae": ("vae/diffusion_pytorch_model.safetensors",),
    "image_encoder": ("image_encoder/model.safetensors",),
    "tokenizer": ("tokenizer/spiece.model",),
}
# What Diffusers and transformers call the entries of config.json that shapes cannot tell.
DIFFUSERS_NAMES = {
    "transformer": {
        "num_attention_heads": "num_heads",
        "patch_size": "patch_size",
        "eps": "eps",
        "vace_layers": "vace_layers",
        "vace_in_channels": "vace_in_dim",
    },
    "text_encoder": {"relative_attention_max_distance": "max_distance", "layer_norm_epsilon": "eps"},
    "vae": {"latents_mean": "mean", "latents_std": "std"},
    "image_encoder": {
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "layer_norm_eps": "eps",
    },
}
MLX_FILES = {
    **{
        component: (f"{component}.safetensors.index.json", f"{component}.safetensors")
        for component in ("transformer", "text_encoder", "vae", "image_encoder")
    },
    "tokenizer": ("tokenizer.model",),
}
MLX_FORMAT = "wan_mlx"


@dataclass(frozen=True)
class Checkpoint:
    """A complete model: the file of each component, and what config.json says of each.

    Only models that read images come with an "image_encoder".
    """

    path: Path
    files: dict[str, Path]
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    model: str | None = None  # the preset's name, where the folder records it


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Find the parts of a model in a folder: official, Diffusers', or written by ``weights_convert.py``.

    Raises:
        ValueError: no such folder.
        WeightsError: the folder is incomplete, or its config.json is not JSON; says which parts are missing.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        near = difflib.get_close_matches(folder.name, _names(folder.parent), n=1)
        hint = f"; did you mean {folder.parent / near[0]}?" if near else ""
        what = "is a file, not a model folder" if folder.exists() else "does not exist"
        raise ValueError(f"model folder {folder} {what}{hint}")
    config = _read_config(folder / "config.json")
    if config.get("format") == MLX_FORMAT:
        files = _find(folder, MLX_FILES, _reads_images(config.get("transformer", {})))
        return Checkpoint(folder, files, config, config.get("model"))
    if (folder / "model_index.json").is_file() or (folder / "transformer" / "config.json").is_file():
        reads_images = _read_config(folder / "transformer" / "config.json").get("image_dim") is not None
        return Checkpoint(folder, _find(folder, DIFFUSERS_FILES, reads_images), _diffusers_configs(folder))
    return Checkpoint(folder, _find(folder, OFFICIAL_FILES, _reads_images(config)), {"transformer": config})


def _reads_images(config: dict[str, Any]) -> bool:
    """Whether the transformer needs an image encoder beside it; Diffusers says so in another way."""
    return config.get("model_type") in ("i2v", "flf2v")


def _diffusers_configs(folder: Path) -> dict[str, dict[str, Any]]:
    configs = {}
    for component, names in DIFFUSERS_NAMES.items():
        config = _read_config(folder / component / "config.json")
        configs[component] = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
    return configs


def _names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []


def _find(folder: Path, wanted: dict[str, tuple[str, ...]], reads_images: bool) -> dict[str, Path]:
    found, missing = {}, []
    for component, names in wanted.items():
        present = [folder / name for name in names if (folder / name).is_file()]
        if present:
            found[component] = present[0]
        elif component != "image_encoder" or reads_images:
            missing.append(f"{' or '.join(names)} ({component})")
    if missing:
        here = ", ".join(sorted(_names(folder))[:8]) or "nothing"
        raise WeightsError(f"{folder} is not a complete Wan2.1 folder: missing {'; '.join(missing)}; it holds {here}")
    return found


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise WeightsError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path} holds a {type(config).__name__}, expected a JSON object")
    return config
