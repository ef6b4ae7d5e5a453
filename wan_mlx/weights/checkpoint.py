"""Which file holds which network: in a folder of any layout, in a single file, or in a set given part by part.

Published folders are known by their config and their fixed names. Everything else is opened, headers only, and known by
its keys; file names decide nothing.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import WeightsError
from ..files.open import open_weights
from ..files.sentencepiece import find_tokenizer, has_tokenizer
from ..presets import COMFYUI_PARTS, DIFFUSERS_FILES, MLX_FILES, NETWORKS, OFFICIAL_FILES, PARTS
from .component import ComponentWeights, open_component

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
MLX_FORMAT = "wan_mlx"
MAX_CONFIG_BYTES = 4_000_000
# How deep and how far a folder is searched for weight files.
_MAX_DEPTH, _MAX_FILES = 3, 5000


@dataclass(frozen=True)
class Checkpoint:
    """A model: the file of each part, and what config.json says of each.

    ``files`` has all of `PARTS`, but for "image_encoder", which only models that read images come with. ``configs`` has
    an entry per network, and under "quantization" each network's mode where an MLX folder records it.
    """

    path: Path
    files: dict[str, Path]
    configs: dict[str, Any] = field(default_factory=dict)
    model: str | None = None  # the preset's name, where the folder records it
    layout: str = "single files"

    def missing(self) -> list[str]:
        """The parts that a whole model still needs."""
        lacking = [part for part in PARTS if part not in self.files and part != "image_encoder"]
        needs_images = "image_encoder" not in self.files and "transformer" in self.files and self._reads_images()
        return lacking + ["image_encoder"] * needs_images

    def _reads_images(self) -> bool:
        config = self.configs.get("transformer", {})
        if self.layout == "diffusers":  # its config has the width of the image features, or None
            return config.get("image_dim") is not None
        if "model_type" in config:
            return config["model_type"] in ("i2v", "flf2v")
        return "img_emb.proj.1.weight" in ComponentWeights(open_weights(self.files["transformer"])).shapes


def open_checkpoint(path: str | Path, parts: Mapping[str, str | Path | None] | None = None) -> Checkpoint:
    """Find the parts of a model.

    Args:
        path: a folder (official, Diffusers', ComfyUI's, written by ``weights_convert.py``, or single files in any
            order), or a single file, of which the other parts are given apart.
        parts: name in `PARTS` → a file, or a folder that has it, to use instead of what ``path`` has.

    Raises:
        ValueError: no such file or folder.
        WeightsError: parts are missing or found twice, or a config.json is not JSON; says which.
    """
    given = {name: Path(place).expanduser() for name, place in (parts or {}).items() if place is not None}
    found = look_at(path, given)
    if missing := found.missing():
        raise WeightsError(_incomplete(found, missing))
    return found


def look_at(path: str | Path, given: Mapping[str, Path] | None = None) -> Checkpoint:
    """As `open_checkpoint`, but what is found need not be a whole model.

    Raises:
        ValueError: no such file or folder.
        WeightsError: nothing was recognised, or a part was found twice.
    """
    path, given = _existing(Path(path).expanduser(), "model"), given or {}
    found = _look_at_folder(path, given) if path.is_dir() else _look_at_file(path)
    files, configs = dict(found.files), dict(found.configs)
    for part, place in given.items():
        files[part], config, quantization = find_part(_existing(place, part.replace("_", " ")), part)
        configs[part] = config
        packed = {k: v for k, v in (configs.get("quantization") or {}).items() if k != part}
        configs["quantization"] = packed | ({part: quantization} if quantization else {})
    if "text_encoder" in given and "tokenizer" not in given:
        files |= _tokenizer_of(files["text_encoder"])
    elif "text_encoder" in files and "tokenizer" not in files:
        files |= _tokenizer_of(files["text_encoder"])
    return Checkpoint(found.path, files, configs, found.model, found.layout)


def find_part(place: Path, part: str) -> tuple[Path, dict[str, Any], str | None]:
    """The file of one part, what config.json says of it, and its recorded quantisation.

    ``place``: that file, or a folder: a whole model, or the part's own with its config.json.

    Raises:
        WeightsError: it is not there, or is there twice.
    """
    if part == "tokenizer":
        file = find_tokenizer(place) if place.is_dir() else place
        if file is None:
            raise WeightsError(f"{place} holds no tokenizer, expected umT5's spiece.model")
        return file, {}, None
    if not place.is_dir():
        return place, *_config_beside(open_component(place, part))
    found = _look_at_folder(place, {other: place for other in NETWORKS if other != part})
    if part not in found.files:
        raise WeightsError(f"{place} holds no {part}, only {', '.join(found.files) or _listing(place)}")
    quantization = (found.configs.get("quantization") or {}).get(part)
    return found.files[part], found.configs.get(part, {}), quantization


def _look_at_folder(folder: Path, given: Mapping[str, Path]) -> Checkpoint:
    config = _read_config(folder / "config.json")
    if config.get("format") == MLX_FORMAT:
        found = _open_mlx(folder, config)
    elif (folder / "model_index.json").is_file() or (folder / "transformer" / "config.json").is_file():
        found = Checkpoint(folder, _find(folder, DIFFUSERS_FILES), _diffusers_configs(folder), None, "diffusers")
    else:
        files = _find(folder, OFFICIAL_FILES)
        # The transformer's file has the name that Diffusers gives to every network.
        if files.keys() <= {"transformer"} and "num_heads" not in config:
            return _search(folder, given)
        found = Checkpoint(folder, files, {"transformer": config}, None, "official")
    if any(part not in given for part in found.missing()):
        found = _search(folder, given, found)
    return found


def _open_mlx(folder: Path, config: dict[str, Any]) -> Checkpoint:
    """An MLX folder; the parts it lacks are those of the folder beside it that its "parts_from" names, if it does."""
    files, sibling = _find(folder, MLX_FILES), config.get("parts_from")
    if sibling is not None:
        if not isinstance(sibling, str) or sibling in ("", ".", "..") or Path(sibling).name != sibling:
            raise WeightsError(
                f"{folder / 'config.json'} takes parts from {sibling!r}, expected the name of a folder beside {folder}"
            )
        beside = folder.parent / sibling
        others = _read_config(beside / "config.json")
        files = {**_find(beside, MLX_FILES), **files}
        config = {**{part: others.get(part, {}) for part in NETWORKS if part not in config}, **config}
    return Checkpoint(folder, files, config, config.get("model"), "mlx")


def _look_at_file(file: Path) -> Checkpoint:
    return _single_files(file, {(weights := ComponentWeights(open_weights(file))).component: weights})


def _single_files(path: Path, networks: Mapping[str, ComponentWeights]) -> Checkpoint:
    configs: dict[str, Any] = {"quantization": {}}
    for part, weights in networks.items():
        configs[part], quantization = _config_beside(weights)
        if quantization:
            configs["quantization"][part] = quantization
    return Checkpoint(path, {part: weights.path for part, weights in networks.items()}, configs)


def _search(folder: Path, given: Mapping[str, Path], known: Checkpoint | None = None) -> Checkpoint:
    """What the weight files below a folder hold, by their keys; ``known`` parts are taken as they are."""
    known = known or Checkpoint(folder, {})
    networks: dict[str, list[ComponentWeights]] = {}
    refused = []
    for file in _weight_files(folder):
        if file in known.files.values():
            continue
        try:
            weights = ComponentWeights(open_weights(file))
            networks.setdefault(weights.component, []).append(weights)
        except WeightsError as error:
            refused.append(str(error))
    networks = {part: files for part, files in networks.items() if part not in given and part not in known.files}
    for part, files in networks.items():
        if len(files) > 1:
            names = ", ".join(str(weights.path.relative_to(folder)) for weights in files)
            raise WeightsError(f"{folder} holds {len(files)} files of a {part}: {names}; choose one with {_flag(part)}")
    found = _single_files(folder, {part: files[0] for part, files in networks.items()})
    files, configs = {**found.files, **known.files}, {**found.configs, **known.configs}
    if not files and not given:
        why = f"of its files, {refused[0]}" if refused else f"it holds {_listing(folder)}"
        raise WeightsError(f"{folder} is not a complete Wan2.1 folder: no file of a Wan2.1 network in it; {why}")
    if "tokenizer" not in files and (tokenizer := find_tokenizer(folder)):
        files["tokenizer"] = tokenizer
    return Checkpoint(folder, files, configs, known.model, known.layout)


def _weight_files(folder: Path) -> Iterator[Path]:
    """Files whose first bytes are a weight file's, an index in place of its shards; hidden ones are left out."""
    seen = 0
    for place, folders, names in os.walk(folder):
        at = Path(place)
        deep = len(at.relative_to(folder).parts) >= _MAX_DEPTH
        folders[:] = [] if deep else sorted(name for name in folders if not name.startswith("."))
        seen += len(names)
        if seen > _MAX_FILES:
            raise WeightsError(f"{folder} holds more than {_MAX_FILES:,} files; give the files of the model one by one")
        files = [at / name for name in sorted(names) if not name.startswith(".")]
        indexes = [file for file in files if file.name.endswith(".json") and "index" in file.name]
        shards = {at / name for index in indexes for name in _shard_names(index)}
        yield from (index for index in indexes if _shard_names(index))
        yield from (file for file in files if file not in shards and _begins_like_weights(file))


def _shard_names(index: Path) -> set[str]:
    try:
        owners = json.loads(index.read_bytes()).get("weight_map")
        return {name for name in owners.values() if isinstance(name, str)}
    except (ValueError, AttributeError, OSError, RecursionError):
        return set()


def _begins_like_weights(file: Path) -> bool:
    try:
        if not file.is_file():
            return False
        with open(file, "rb") as opened:
            head = opened.read(9)
    except OSError:
        return False
    return head.startswith((b"GGUF", b"PK\x03\x04")) or head[8:9] == b"{"


def _tokenizer_of(text_encoder: Path) -> dict[str, Path]:
    """The tokenizer inside a text encoder's file, or beside it."""
    if has_tokenizer(open_weights(text_encoder)):
        return {"tokenizer": text_encoder}
    found = find_tokenizer(text_encoder.parent) or find_tokenizer(text_encoder.parent.parent)
    return {"tokenizer": found} if found else {}


def _config_beside(weights: ComponentWeights) -> tuple[dict[str, Any], str | None]:
    """What the config.json in a file's folder says of the network, and its quantisation."""
    part = weights.component
    config = _read_config(weights.path.parent / "config.json")
    if config.get("format") == MLX_FORMAT:
        return config.get(part, {}), (config.get("quantization") or {}).get(part)
    if not (part == "transformer" and "num_heads" in config):
        config = _renamed(config, part)
    return config, weights.quantization and weights.quantization.mode


def _renamed(config: dict[str, Any], part: str) -> dict[str, Any]:
    return {ours: config[theirs] for theirs, ours in DIFFUSERS_NAMES[part].items() if theirs in config}


def _diffusers_configs(folder: Path) -> dict[str, dict[str, Any]]:
    configs = {part: _renamed(_read_config(folder / part / "config.json"), part) for part in DIFFUSERS_NAMES}
    image_dim = _read_config(folder / "transformer" / "config.json").get("image_dim")
    return configs | ({"transformer": {**configs["transformer"], "image_dim": image_dim}} if image_dim else {})


def _incomplete(found: Checkpoint, missing: list[str]) -> str:
    names = {"mlx": MLX_FILES, "diffusers": DIFFUSERS_FILES, "official": OFFICIAL_FILES}.get(found.layout)
    if names is not None:
        lacking = "; ".join(f"{' or '.join(names[part])} ({part})" for part in missing)
        return f"{found.path} is not a complete Wan2.1 folder: missing {lacking}; it holds {_listing(found.path)}"
    flags = " ".join(f"{_flag(part)} FILE" for part in missing)
    published = ", ".join(COMFYUI_PARTS[part] for part in missing if part in COMFYUI_PARTS)
    hint = f" (published: {published})" if published else ""
    return f"{found.path} holds {_and(list(found.files))}; missing {_and(missing)}: add {flags}{hint}"


def _flag(part: str) -> str:
    return "--" + part.replace("_", "-")


def _and(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names) or "nothing"


def _existing(path: Path, what: str) -> Path:
    if not path.exists():
        near = difflib.get_close_matches(path.name, _names(path.parent), n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        kind = "model folder" if what == "model" else what
        raise ValueError(f"{kind} {path} does not exist{hint}")
    return path


def _names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []


def _listing(folder: Path) -> str:
    return ", ".join(sorted(_names(folder))[:8]) or "nothing"


def _find(folder: Path, wanted: dict[str, tuple[str, ...]]) -> dict[str, Path]:
    present = {part: [folder / name for name in names if (folder / name).is_file()] for part, names in wanted.items()}
    return {part: files[0] for part, files in present.items() if files}


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        if (size := path.stat().st_size) > MAX_CONFIG_BYTES:
            raise WeightsError(f"{path} is {size:,} bytes, expected a configuration of at most {MAX_CONFIG_BYTES:,}")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise WeightsError(f"{path} is not readable JSON: {str(error)[:200]}") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path} holds a {type(config).__name__}, expected a JSON object")
    return config
