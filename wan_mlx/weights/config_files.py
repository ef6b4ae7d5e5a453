"""Reads the JSON files beside weights, which say what headers cannot; nothing in them is trusted."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UnsupportedModel, WeightsError
from ..other_models import ADVICE, of_entries
from ..presets import EXPERTS, NETWORKS
from ..storage import parse_json

# Diffusers' pipelines for Wan's networks begin with these; SkyReels V2 has the same.
PIPELINES = ("Wan", "SkyReelsV2")
MLX_FORMAT, MLX_VERSION = "wan_mlx", 1
MAX_CONFIG_BYTES = 4_000_000


def check_pipeline(folder: Path) -> dict[str, Any]:
    """The model_index.json of a folder, empty if there is none; WeightsError if it is another pipeline's than Wan's."""
    index = folder / "model_index.json"
    entries = read_config(index)
    pipeline = str(entries.get("_class_name", "Wan"))
    if not pipeline.startswith(PIPELINES):
        raise UnsupportedModel(f"{index}: this is a {pipeline[:80]!r}, which is not supported; {ADVICE['transformer']}")
    return entries


def boundary_of(folder: Path, config: Mapping[str, Any], index: Mapping[str, Any]) -> float | None:
    """The boundary of two experts that a folder's config.json or model_index.json records."""
    own = None if config.get("dual_model") is False else config.get("boundary")  # mlx-video's, 0 of one transformer
    for file, value in (("config.json", own), ("model_index.json", index.get("boundary_ratio"))):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            raise WeightsError(f"{folder / file} has the boundary {reprlib.repr(value)}, expected a number between 0 "
                               "and 1")  # fmt: skip
        return float(value)
    return None


def read_config(path: Path) -> dict[str, Any]:
    """A config.json, empty if there is none; WeightsError if no MLX folder of this version has such entries."""
    if not path.is_file():
        return {}
    try:
        if (size := path.stat().st_size) > MAX_CONFIG_BYTES:
            raise WeightsError(f"{path} is {size:,} bytes, expected a configuration of at most {MAX_CONFIG_BYTES:,}")
        config = parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise WeightsError(f"{path} is not readable JSON: {str(error)[:200]}") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path} holds a {type(config).__name__}, expected a JSON object")
    if other := of_entries(config):
        raise other.refusal(path)
    if config.get("format") == MLX_FORMAT:
        _check_mlx(path, config)
    _check_quantization(path, config.get("quantization_config"))
    return config


def _check_quantization(path: Path, entry: Any) -> None:
    """Diffusers' and transformers' entry must name a method whose files can be read; `files.scaled` reads them."""
    entry = entry if isinstance(entry, dict) else {"quant_method": 0}
    method, dtype = entry.get("quant_method"), entry.get("weights_dtype", entry.get("weights"))
    if method not in (0, "quanto", "torchao", "gguf") or (method == "quanto" and dtype not in ("int8", "float8")):
        what = str(method) if method != "quanto" else f"quanto {dtype}"
        raise WeightsError(
            f"{path} says that its weights are quantised by {what[:80]!r}, which is not supported; expected quanto or "
            "torchao, int8 or float8 (or give the bf16, fp16 or GGUF weights)"
        )


def _check_mlx(path: Path, config: dict[str, Any]) -> None:
    version = config.get("version", MLX_VERSION)
    if version != MLX_VERSION:
        newer = type(version) is int and version > MLX_VERSION
        why = "it was made by a newer wan_mlx: update this one" if newer else f"expected {MLX_VERSION}"
        raise WeightsError(f"{path} says version = {reprlib.repr(version)}; {why}")
    objects = {name: (dict, "an object") for name in (*NETWORKS, *EXPERTS, "files")}
    wanted = {**objects, "model": (str, "a preset's name"), "quantization": (str | dict, "a mode for all or for each")}
    for name, (kind, words) in wanted.items():
        if not isinstance(config.get(name), kind | None):
            raise WeightsError(f"{path} says {name} = {reprlib.repr(config[name])}, expected {words}")
