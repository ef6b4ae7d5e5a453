"""Loads whole networks from files: the public ``load_*`` functions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import nearest
from ..events import counted, unheard
from ..models.animate_face import Face
from ..models.audio_encoder import AudioEncoder
from ..models.configs import TransformerConfig
from ..models.execution import Execution, StreamedTextEncoder
from ..models.image_encoder import ImageEncoder
from ..models.networks import new_network, new_transformer
from ..models.rope import row_order
from ..models.text_encoder import EncoderBlock
from ..models.transformer import Transformer
from ..models.vae import VAE
from ..types import LoraChoice
from .checkpoint import find_part
from .component import ComponentWeights, only_zeros, open_component
from .configs import network_config
from .lora import normalise_loras, open_loras
from .lora_scale import check_sizes
from .parameters import Parameters
from .parts import Checkpoint, Part
from .quantize import QUANTIZED
from .set_loras import set_loras
from .stream import Progress, load_module, load_streamed, spare_cache, stream_blocks

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}

no_progress: Progress = counted(unheard, "")
# Source of a network: a model, one of its parts, its folder, or the network's own folder or file.
Source = str | Path | Checkpoint | Part


def parse_dtype(dtype: str | mx.Dtype) -> mx.Dtype:
    """A dtype from its name; ValueError for an unknown one."""
    if isinstance(dtype, mx.Dtype):
        return dtype
    if dtype not in DTYPES:
        meant = re.sub(r"^(b?)fp?(?=\d)", r"\1float", str(dtype))  # fp16, bf16
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}{nearest(meant, DTYPES)}")
    return DTYPES[dtype]


def text_dtype(dtype: str) -> str:
    """The text encoder's dtype beside a transformer's: umT5 exceeds float16's range."""
    return "bfloat16" if parse_dtype(dtype) == mx.float16 else dtype


def open_network(source: Source, kind: str) -> tuple[ComponentWeights, Any]:
    """The weights of a whole network and its sizes, such as a `TransformerConfig`; reads no weights.

    Raises:
        WeightsError: there is none, or it lacks tensors or has others than those of its sizes.
    """
    if isinstance(source, Checkpoint):
        part = source.part(kind)
    elif isinstance(source, Part):
        part = source
    else:
        part = find_part(Path(source).expanduser(), kind)
    weights = open_component(part.file, kind, part.module, part.metadata)
    return weights, network_config(weights, part.config)


def modes_of(checkpoint: Checkpoint, quantize: str | None) -> dict[str, str]:
    """A part's name → its mode, for parts to be quantised; ValueError if one cannot be. Reads no weights."""
    found = {
        part.name: Parameters(open_network(part, kind)[0], mx.float32, part.quantize or quantize).quantization
        for kind in QUANTIZED
        for part in checkpoint.of_kind(kind)
    }
    return {name: quantization.mode for name, quantization in found.items() if quantization.packings}


def check_loras(checkpoint: Checkpoint, loras: Iterable[LoraChoice]) -> None:
    """Raise WeightsError, before weights are loaded, if a LoRA does not suit a transformer of ``checkpoint``: one of
    ``loras``, which apply to all of them, or its own."""
    for part in checkpoint.of_kind("transformer"):
        if chosen := [*normalise_loras(loras), *part.loras]:
            weights, config = open_network(part, "transformer")
            check_sizes(open_loras(chosen, config), weights.read)


def load_transformer(
    path: Source,
    dtype: str | mx.Dtype = "bfloat16",
    progress: Progress = no_progress,
    quantize: str | None = None,
    stream: bool = False,
    loras: Iterable[LoraChoice] | LoraChoice | None = None,
    merge: bool = True,
) -> Transformer | Execution:
    """Load the diffusion transformer, a `VaceTransformer` if the weights are VACE's.

    The result is the plain network, which computes everything at once and can be differentiated. `Execution` runs it
    in limited memory; with ``stream`` the result is an `Execution`, called alike.

    Args:
        path: model folder, or the transformer's own folder or file (without config.json, heads are 128 wide).
        dtype: of the wide arrays: "bfloat16", "float16" or "float32"; the time path stays float32.
        progress: wraps the iteration over tensors.
        quantize: quantise the blocks' matrices while reading: "q8", "q6", "q5", "q4", "q3" (also with a group, as in
            "q4-g32"), "mxfp8", "mxfp4", "nvfp4", or "auto", which gives sensitive layers more bits. None takes the
            weights as stored; "none" unpacks quantised ones; "nearest" quantises all of a GGUF's blocks (Q8_0, Q5_0,
            Q5_1, Q4_0 and Q4_1 stay quantised with None too).
        stream: keep no blocks; read each when a forward pass needs it, with at most two resident.
        loras: LoRA files, each a path, "path:strength" or (path, strength).
        merge: merge LoRAs into the weights. They stay unmerged with False, or if weights are quantised or streamed.

    Raises:
        WeightsError: the file is not a whole transformer of Wan, or a LoRA does not suit it.
        ValueError: an unknown dtype or mode, or the weights are already quantised in another mode.
    """
    weights, config = open_network(path, "transformer")
    load, beside = load_streamed if stream else load_module, stream or not merge
    parameters = transformer_parameters(weights, config, parse_dtype(dtype), quantize, None if beside else loras)
    model = load(new_transformer(config), parameters, progress)
    if beside and loras:
        set_loras(model, loras)
    return model


def transformer_parameters(
    weights: ComponentWeights,
    config: TransformerConfig,
    dtype: mx.Dtype,
    quantize: str | None = None,
    loras: Iterable[LoraChoice] | LoraChoice | None = None,
) -> Parameters:
    """A transformer's parameters for `Transformer`, whole or block by block; see `load_transformer`."""
    order = partial(row_order, dim=config.dim, head_dim=config.head_dim)
    return Parameters(weights, dtype, quantize, open_loras(normalise_loras(loras), config), order)


def load_vae(path: Source, dtype: str | mx.Dtype = "float32", progress: Progress = no_progress) -> VAE:
    """Load the VAE from a model folder or its own file.

    Args:
        path: model folder, or the VAE's own folder or file.
        dtype: of weights and arithmetic. A `WanPipeline` always decodes in float32. On Metal "bfloat16" also rounds the
            transforms of MLX's Winograd convolutions: frames of nano differ by 0.26 of 255 levels (root mean square),
            at most by 12, where these were simulated.
        progress: wraps the iteration over tensors.

    Raises:
        WeightsError: the file is not a whole VAE of Wan2.1 or Wan2.2.
    """
    weights, config = open_network(path, "vae")
    vae: VAE = new_network(config)
    return load_module(vae, Parameters(weights, parse_dtype(dtype)), progress)


def load_image_encoder(
    path: Source, dtype: str | mx.Dtype = "float32", progress: Progress = no_progress
) -> ImageEncoder:
    """Load CLIP's vision tower from a model folder or its own file; skips the last block and the text tower.

    Args:
        path: model folder, or the encoder's own folder or file (without config.json, heads are 80 wide).
        dtype: of the weights: "float32", or "float16" as in the official file; computed in float32 either way.
        progress: wraps the iteration over tensors.

    Raises:
        WeightsError: the file is not a whole vision tower, or the folder has none.
        ValueError: bfloat16, which is too coarse for CLIP.
    """
    dtype = parse_dtype(dtype)
    if dtype == mx.bfloat16:
        raise ValueError("bfloat16 is too coarse for CLIP; give float32 or float16")
    weights, config = open_network(path, "image_encoder")
    return load_module(ImageEncoder(config), Parameters(weights, dtype), progress)


def load_audio_encoder(path: Source, progress: Progress = no_progress) -> AudioEncoder:
    """Load wav2vec 2.0 from a model folder or its own file; computed in float32.

    Args:
        path: model folder, or the encoder's own folder or file (without config.json, heads are 64 wide).
        progress: wraps the iteration over tensors.

    Raises:
        WeightsError: the file is not a whole wav2vec 2.0 of the large XLSR form, or the folder has none.
    """
    weights, config = open_network(path, "audio_encoder")
    return load_module(AudioEncoder(config), Parameters(weights, mx.float32), progress)


def load_face(path: Source, progress: Progress = no_progress) -> Face:
    """Load the encoders of a face from Animate's transformer, in float32; ``path`` and ``progress``: as for that."""
    weights, config = open_network(path, "transformer")
    return load_module(Face(config), Parameters(weights, mx.float32), progress)


def load_text_encoder(
    path: Source,
    dtype: str | mx.Dtype = "bfloat16",
    progress: Progress = no_progress,
    quantize: str | None = None,
) -> StreamedTextEncoder:
    """Open the umT5 encoder from a model folder or its own file.

    Each pass reads its blocks from the file; they are never all resident. ``progress`` wraps that iteration.
    ``quantize``: as for `load_transformer`.

    Raises:
        WeightsError: the file is not a whole umT5 encoder.
        ValueError: float16, whose range umT5 exceeds; or ``quantize`` does not suit.
    """
    weights, config = open_network(path, "text_encoder")
    dtype = parse_dtype(dtype)
    if dtype == mx.float16:
        raise ValueError("umT5 overflows float16; give bfloat16 or float32")
    spare_cache(weights)
    parameters = Parameters(weights, dtype, quantize)
    some_ids = np.arange(0, config.vocab_size, max(1, config.vocab_size // 16))
    if not weights.rows("token_embedding.weight", some_ids).any().item():
        raise only_zeros(weights.path, "token_embedding.weight")
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
    )


def config_of(checkpoint: Checkpoint, kind: str = "transformer") -> Any:
    """Sizes of a network, by default the `TransformerConfig`; reads no weights."""
    return open_network(checkpoint, kind)[1]


def parameters_of(source: Source, dtype: mx.Dtype, quantize: str | None = None) -> Parameters:
    """The transformer's parameters; reads no weights."""
    return transformer_parameters(*open_network(source, "transformer"), dtype, quantize)
