"""Whole networks from files: the public ``load_*`` functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import WeightsError
from ..models.configs import TransformerConfig, VAEConfig
from ..models.execution import Execution, StreamedTextEncoder
from ..models.image_encoder import ImageEncoder, last_block_shapes
from ..models.rope import row_order
from ..models.text_encoder import EncoderBlock, TextEncoder
from ..models.transformer import Transformer
from ..models.vace import VaceTransformer
from ..models.vae import VAE
from ..planning.peak_memory import Networks, text_block_bytes, weight_bytes
from .checkpoint import Checkpoint, find_part
from .component import (
    DTYPES,
    ComponentWeights,
    check_keys,
    image_encoder_config,
    open_component,
    parameter_shapes,
    text_encoder_config,
    transformer_config,
    vae_config,
)
from .lora import LoraChoice, normalise_loras, open_loras
from .parameters import Parameters, load_module, load_streamed, stream_blocks
from .quantize import QUANTIZED
from .set_loras import set_loras

# Wraps an iteration as ``tqdm`` does: progress(items, total=...) → items.
Progress = Callable[..., Iterable]


def no_progress(items: Iterable, total: int | None = None, initial: int = 0) -> Iterable:
    """The silent `Progress`."""
    return items


def parse_dtype(dtype: str | mx.Dtype) -> mx.Dtype:
    """A dtype by name.

    Raises:
        ValueError: unknown name.
    """
    if isinstance(dtype, mx.Dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _open(path: str | Path | Checkpoint, component: str) -> tuple[ComponentWeights, Mapping[str, Any]]:
    """The component's weights and configuration, from a model, its folder, or the component's own folder or file."""
    if isinstance(path, Checkpoint):
        if component not in path.files:
            raise WeightsError(f"{path.path} holds no {component}, only {', '.join(path.files)}")
        file, config = path.files[component], path.configs.get(component, {})
        said = path.configs.get("quantization", {})
        said = said.get(component) if isinstance(said, dict) else said
    else:
        file, config, said = find_part(Path(path).expanduser(), component)
    weights = open_component(file, component)
    found = weights.quantization and weights.quantization.mode
    if said != found:
        raise WeightsError(
            f"{file.parent}: config.json says that its {component}'s quantisation is {said or 'none'}, "
            f"but the file's is {found or 'none'}"
        )
    return weights, config


def modes_of(checkpoint: Checkpoint, quantize: str | None) -> dict[str, str]:
    """Component → the mode it will be packed in, those alone that will be; no weights are read.

    Raises:
        ValueError: a part of ``checkpoint`` cannot be quantised so.
    """
    found = {part: Parameters(_open(checkpoint, part)[0], mx.float32, quantize).quantization for part in QUANTIZED}
    return {component: quantization.mode for component, quantization in found.items() if quantization.packings}


def check_loras(checkpoint: Checkpoint, loras: Iterable[LoraChoice]) -> None:
    """Raise WeightsError, before any weights are read, if a LoRA does not suit the transformer of ``checkpoint``."""
    if loras:
        weights, config = _open(checkpoint, "transformer")
        patch = math.prod(transformer_config(weights, config).patch_size)
        open_loras(normalise_loras(loras), weights.shapes, patch)


def load_transformer(
    path: str | Path | Checkpoint,
    dtype: str | mx.Dtype = "bfloat16",
    progress: Progress = no_progress,
    quantize: str | None = None,
    stream: bool = False,
    loras: Iterable[LoraChoice] | LoraChoice | None = None,
    merge: bool = True,
) -> Transformer | Execution:
    """Load the diffusion transformer, a `VaceTransformer` if the weights are VACE's.

    It is the plain network, which computes whatever it is given at once and can be differentiated. `Execution` runs it
    in the memory there is; with ``stream`` the result is one, called alike.

    Args:
        path: model folder, or the transformer's own folder or file (without config.json, heads are 128 wide).
        dtype: of the wide arrays: "bfloat16", "float16" or "float32"; the time path stays float32.
        progress: wraps the iteration over tensors.
        quantize: pack the blocks' matrices as they are read: "q8", "q6", "q5", "q4", "q3" (also with a group, as in
            "q4-g32"), "mxfp8", "mxfp4", "nvfp4", or "auto", which gives sensitive layers more bits. None takes the
            weights as stored; "none" unpacks packed ones; "nearest" packs all of a GGUF's blocks, of which Q8_0, Q5_0,
            Q5_1, Q4_0 and Q4_1 stay packed with None too.
        stream: keep no blocks but read each when a forward pass comes to it, at most two being resident.
        loras: LoRA files, each a path, "path:strength" or (path, strength).
        merge: merge them into the weights. Packed and streamed weights keep them beside, and with False all do.

    Raises:
        WeightsError: the file is not a whole Wan2.1 transformer, or a LoRA does not suit it.
        ValueError: an unknown dtype or mode, or the weights are packed in another mode already.
    """
    weights, config = _open(path, "transformer")
    config = transformer_config(weights, config)
    network = VaceTransformer if config.model_type == "vace" else Transformer
    load, beside = load_streamed if stream else load_module, stream or not merge
    parameters = transformer_parameters(weights, config, parse_dtype(dtype), quantize, None if beside else loras)
    model = load(network(config), parameters, progress)
    if beside and loras:
        set_loras(model, loras)
    return model


def transformer_parameters(
    weights: ComponentWeights,
    config: TransformerConfig,
    dtype: mx.Dtype,
    quantize: str | None = None,
    loras: Iterable[LoraChoice] | LoraChoice | None = None,
    merge: bool = True,
) -> Parameters:
    """A transformer's parameters as `Transformer` wants them, whole or block by block; see `load_transformer`."""
    order = partial(row_order, dim=config.dim, head_dim=config.head_dim)
    opened = open_loras(normalise_loras(loras), weights.shapes, math.prod(config.patch_size))
    opened.report_unused()
    return Parameters(weights, dtype, quantize, opened, merge, row_order=order)


def load_vae(path: str | Path | Checkpoint, dtype: str | mx.Dtype = "float32", progress: Progress = no_progress) -> VAE:
    """Load the VAE from a model folder or its own file.

    Raises:
        WeightsError: the file is not a whole Wan2.1 VAE.
    """
    weights, config = _open(path, "vae")
    return load_module(VAE(vae_config(weights, config)), Parameters(weights, parse_dtype(dtype)), progress)


def load_image_encoder(
    path: str | Path | Checkpoint, dtype: str | mx.Dtype = "float32", progress: Progress = no_progress
) -> ImageEncoder:
    """Load CLIP's vision tower from a model folder or its own file; the last block and the text tower stay unread.

    Args:
        path: model folder, or the encoder's own folder or file (without config.json, heads are 80 wide).
        dtype: of the weights: "float32", or "float16" as the official file has them; computed in float32 either way.
        progress: wraps the iteration over tensors.

    Raises:
        WeightsError: the file is not a whole vision tower, or the folder has none.
        ValueError: bfloat16, which is too coarse for CLIP.
    """
    dtype = parse_dtype(dtype)
    if dtype == mx.bfloat16:
        raise ValueError("bfloat16 is too coarse for CLIP; give float32 or float16")
    weights, config = _open(path, "image_encoder")
    config = image_encoder_config(weights, config)
    return load_module(ImageEncoder(config), Parameters(weights, dtype), progress, unread=last_block_shapes(config))


def load_text_encoder(
    path: str | Path | Checkpoint,
    dtype: str | mx.Dtype = "bfloat16",
    progress: Progress = no_progress,
    quantize: str | None = None,
) -> StreamedTextEncoder:
    """Open the umT5 encoder from a model folder or its own file.

    Its blocks are read from the file as they are needed and never all resident; ``progress`` wraps that iteration.
    ``quantize`` is as for `load_transformer`.

    Raises:
        WeightsError: the file is not a whole umT5 encoder.
        ValueError: float16, whose range umT5 exceeds; or ``quantize`` does not suit.
    """
    weights, config = _open(path, "text_encoder")
    config, dtype = text_encoder_config(weights, config), parse_dtype(dtype)
    if dtype == mx.float16:
        raise ValueError("umT5 overflows float16; give bfloat16 or float32")
    check_keys(weights, parameter_shapes(TextEncoder(config)))
    parameters = Parameters(weights, dtype, quantize)
    return StreamedTextEncoder(
        config,
        embed=lambda ids: weights.rows("token_embedding.weight", ids).astype(dtype),
        blocks=lambda: progress(
            stream_blocks(
                [f"blocks.{i}" for i in range(config.num_layers)], lambda place: EncoderBlock(config), parameters
            ),
            total=config.num_layers,
        ),
        norm_weight=weights.read("norm.weight").astype(dtype),
        dtype=dtype,
    )


def config_of(checkpoint: Checkpoint) -> TransformerConfig:
    """Sizes of the transformer; no weights are read."""
    return transformer_config(*_open(checkpoint, "transformer"))


def vae_config_of(checkpoint: Checkpoint) -> VAEConfig:
    """Sizes of the VAE; no weights are read."""
    return vae_config(*_open(checkpoint, "vae"))


def parameters_of(checkpoint: Checkpoint, dtype: mx.Dtype, quantize: str | None = None) -> Parameters:
    """The transformer's parameters, none of them read.

    Raises:
        ValueError: ``quantize`` does not suit.
    """
    weights, config = _open(checkpoint, "transformer")
    return transformer_parameters(weights, transformer_config(weights, config), dtype, quantize)


def sizes_of(checkpoint: Checkpoint, dtype: mx.Dtype, quantize: str | None = None) -> Networks:
    """What a plan needs to know of a model on this machine; no weights are read.

    Raises:
        ValueError: ``quantize`` does not suit.
    """
    weights, config = _open(checkpoint, "transformer")
    config = transformer_config(weights, config)
    packings = transformer_parameters(weights, config, dtype, quantize).quantization.packings
    stored = {name: weights.stored_bytes(name) for name in weights.sources}
    text, text_config = _open(checkpoint, "text_encoder")
    text_config = text_encoder_config(text, text_config)
    in_blocks = [key for name, keys in text.sources.items() if name.startswith("blocks.") for key in keys]
    text_packings = Parameters(text, dtype, quantize).quantization.packings
    vae, said = _open(checkpoint, "vae")
    images = image_encoder_config(*_open(checkpoint, "image_encoder")) if config.has_image_branch else None
    return Networks(
        config,
        text_config,
        vae_config(vae, said),
        images,
        dtype,
        weight_bytes(config, dtype, packings, stored),
        text_block_bytes(text_config, dtype, text_packings),
        sum(text.file.nbytes(key) for key in in_blocks),
        packings,
    )
