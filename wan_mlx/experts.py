"""Whether a checkpoint is one for the task that is asked for: its kind, and its two experts, if the task has two."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .models.configs import TransformerConfig
from .presets import Preset
from .tasks import TASKS
from .weights.parts import Checkpoint


def with_experts(
    checkpoint: Checkpoint, preset: Preset, given: Mapping[str, Any], loras: Mapping[str, list[tuple[Path, float]]]
) -> Checkpoint:
    """A model with its two experts, if it has two, as the options ``given`` have them.

    Raises:
        ValueError: an option of experts was given to a model of one transformer; the preset's model has two, and this
            one does not; or it has two, and no boundary is known.
    """
    boundary = given["boundary"] or checkpoint.boundary or preset.boundary
    if not checkpoint.has_experts:
        boundary = given["boundary"]
        if preset.experts == 2:
            raise ValueError(
                f"{checkpoint.path} holds one transformer, and {preset.name} is a model of two experts; give the other "
                "one with --low-noise FILE, or with --high-noise FILE if this is the low-noise one"
            )
    elif boundary is None and any(part.timesteps == (0, math.inf) for part in checkpoint.of_kind("transformer")):
        raise ValueError(
            f"{checkpoint.path} holds two experts, and {preset.name} is a model of one transformer, which has no "
            "boundary between them; give the task of a model of two, such as t2v-A14B, or a boundary"
        )
    if boundary is not None:
        checkpoint = checkpoint.divided(boundary)
    modes = given["quantize_high"], given["quantize_low"]
    own = tuple(loras["loras_high"]), tuple(loras["loras_low"])
    if any(modes):
        checkpoint = checkpoint.with_experts(quantize=modes)
    return checkpoint.with_experts(loras=own) if any(own) else checkpoint


def check_task(path: Path, config: TransformerConfig, preset: Preset, given: Mapping[str, Any]) -> None:
    """Raise ValueError if a model, found at ``path``, is not one for the task of ``preset``, or reads no images and was
    ``given`` an encoder for them."""
    if preset.transformer.kind != config.kind:
        raise ValueError(
            f"{path} holds {_described(config)}, but the task {preset.name} needs {_described(preset.transformer)}"
        )
    if preset.task not in TASKS:
        raise ValueError(f"{preset.task} models are not supported yet; supported: {', '.join(TASKS)}")
    if given["image_encoder"] and not config.has_image_branch:
        raise ValueError(f"image_encoder was given to a {preset.task} model, which reads no images with it")
    if given["audio_encoder"] and not config.hears:
        raise ValueError(f"audio_encoder was given to a {preset.task} model, which hears nothing")


def _described(config: TransformerConfig) -> str:
    clip = ", with CLIP" if config.has_image_branch else ""
    return f"a {config.model_type} model of {config.out_dim} latent channels{clip}"
