"""Any checkpoint that loads → one MLX folder: our names, our layout, one file per network, ready to be read."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import numpy as np

from .checkpoint import MLX_FILES, MLX_FORMAT, Checkpoint, open_checkpoint
from .load import (
    MLX_LAYOUT,
    SAFETENSORS_NAMES,
    image_encoder_config,
    open_component,
    text_encoder_config,
    transformer_config,
    vae_config,
)
from .networks import Progress, no_progress, parse_dtype
from .parameters import Parameters, dtype_of
from .quantize import QUANTIZED

CONFIG_OF = {
    "transformer": transformer_config,
    "text_encoder": text_encoder_config,
    "vae": vae_config,
    "image_encoder": image_encoder_config,
}


def convert(
    source: str | Path | Checkpoint,
    out: str | Path,
    dtype: str = "bfloat16",
    vae_dtype: str = "float32",
    model: str | None = None,
    progress: Progress = no_progress,
    quantize: str | None = None,
) -> Path:
    """Write ``source`` as an MLX folder.

    Args:
        source: a model folder in any layout that loads.
        out: a folder that does not exist yet.
        dtype: of transformer and text encoder; the transformer's time path, norms and head stay float32.
        vae_dtype: of the VAE. The image encoder stays as it is.
        model: name of the preset whose sampling defaults the folder should use; recorded in its config.json.
        progress: wraps the iteration over tensors.
        quantize: mode to pack the blocks of transformer and text encoder in, as for `load_transformer`.

    Raises:
        ValueError: ``out`` exists, or ``quantize`` is no mode, or not possible for these weights.
        WeightsError: ``source`` cannot be loaded.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} exists already; give a new folder, or remove it first")
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config = {"format": MLX_FORMAT, "version": 1, "model": model or checkpoint.model}
    for component, config_of in CONFIG_OF.items():
        if component not in checkpoint.files:
            continue
        weights = open_component(checkpoint.files[component], component)
        config[component] = asdict(config_of(weights, checkpoint.configs.get(component, {})))
        kept = parse_dtype({"vae": vae_dtype, "image_encoder": "float32"}.get(component, dtype))
        parameters = Parameters(weights, kept, quantize if component in QUANTIZED else None)
        if parameters.quantization.packings:
            config.setdefault("quantization", {})[component] = parameters.quantization.mode
        _write(parameters, partial / MLX_FILES[component][-1], progress)
    shutil.copyfile(checkpoint.files["tokenizer"], partial / MLX_FILES["tokenizer"][0])
    (partial / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, out)  # the folder appears when it is whole
    return out


def _write(parameters: Parameters, path: Path, progress: Progress) -> None:
    """Write one safetensors file a tensor at a time, so that an 11 GB text encoder converts in little memory."""
    header, offset = {"__metadata__": {"layout": MLX_LAYOUT, "component": parameters.component}}, 0
    if parameters.quantization.packings:
        header["__metadata__"] |= parameters.quantization.to_metadata()
    kept = {name: _kept(parameters, name) for name in parameters.weights.shapes}
    for arrays in kept.values():
        for key, (shape, dtype) in arrays.items():
            end = offset + math.prod(shape) * dtype.size
            header[key] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": shape, "data_offsets": (offset, end)}
            offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # data begins on a multiple of eight bytes
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in progress(kept):
            with mx.stream(mx.cpu):
                started = parameters.start([name])
            for key, array in parameters.finish(started):
                with mx.stream(mx.cpu):
                    array = array.astype(kept[name][key][1])
                    file.write(memoryview(np.array(array.flatten().view(mx.uint8))))


def _kept(parameters: Parameters, name: str) -> dict[str, tuple[tuple[int, ...], mx.Dtype]]:
    """Key → shape and dtype of what is stored for one parameter.

    As it would be loaded, but no wider than the source, which would add bytes and no precision.
    """
    weights, packing = parameters.weights, parameters.quantization.packings.get(name)
    if packing is not None:
        stem = name.removesuffix("weight")
        return {stem + key: value for key, value in packing.shapes(weights.shapes[name]).items()}
    wanted = dtype_of(weights.component, name, parameters.dtype)
    stored = weights.file.tensors[weights.sources[name][0]].dtype
    narrow = next((d for d, s in SAFETENSORS_NAMES.items() if s == stored and d.size == 2), wanted)
    return {name: (weights.shapes[name], narrow if wanted == mx.float32 else wanted)}
