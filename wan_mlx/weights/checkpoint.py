"""Finds the file of each part: in a folder of any layout, in a single file, or from separately given parts.

Published folders are recognised by their config and fixed names. All other files are opened, headers only, and
recognised by their keys, never by their names.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import UnsupportedModel, WeightsError, nearest, some
from ..files.open import ENDINGS, ShardedFile, format_of, open_weights
from ..files.sentencepiece import EMBEDDED, MAX_TOKENIZER_BYTES, find_tokenizer, has_tokenizer
from ..hub.model_folders import nearest_model
from ..hub.names import DIFFUSERS_FILES, MLX_FILES, OFFICIAL_FILES, one_or_two
from ..presets import COMFYUI_PARTS, COMFYUI_VAE_22, EXPERTS, MODULE, NETWORKS, PRESETS
from ..storage import parse_json
from .component import ComponentWeights, kinds_in, open_component
from .config_files import MLX_FORMAT, boundary_of, check_pipeline, read_config
from .configs import network_config
from .lora import file_of
from .mlx_video import MLX_VIDEO, MLX_VIDEO_FILES, is_mlx_video, metadata_of
from .parts import Checkpoint, Part, check_experts, check_fit, flag_of

# Diffusers' and transformers' names for entries of config.json that shapes cannot show.
DIFFUSERS_NAMES = {
    "transformer": {
        "num_attention_heads": "num_heads",
        "patch_size": "patch_size",
        "image_dim": "image_dim",
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
    "audio_encoder": {"num_attention_heads": "num_heads", "conv_stride": "conv_stride", "layer_norm_eps": "eps"},
}
# Layout of a folder → the names of its files.
FOLDERS = {"mlx": MLX_FILES, "diffusers": DIFFUSERS_FILES, "official": OFFICIAL_FILES}
# Depth and number of files of the search for weight files.
_MAX_DEPTH, _MAX_FILES = 3, 5000


def open_checkpoint(path: str | Path, parts: Mapping[str, str | Path | None] | None = None) -> Checkpoint:
    """Find the parts of a model.

    Args:
        path: a folder (official, Diffusers', ComfyUI's, from ``weights_convert.py``, or any single files), or a single
            file, whose other parts are given separately.
        parts: name in `GIVEN_APART` → a file, or a folder that has it, used in place of the part in ``path``.

    Raises:
        ValueError: no such file or folder.
        WeightsError: parts are missing or found twice, or a config.json is not JSON; says which.
    """
    found = look_at(path, parts)
    if missing := found.missing():
        raise WeightsError(_incomplete(found, missing))
    return found


def check_here(model: Path | None, parts: Mapping[str, Path | None], loras: Collection[Path]) -> None:
    """Raise an error if files on this machine cannot be used; to be asked before the others are downloaded.

    Args:
        model: its folder or file; None if it is not here.
        parts: name in `PARTS` → the place given for it; None if that is not here.
        loras: those that are not on a hub.
    """
    for lora in loras:
        if not lora.exists():
            open_weights(file_of(lora))  # says so
    given = {name: find_part(_existing(place, name), name) for name, place in parts.items() if place}
    found = tuple(given.values())
    if model is not None:
        whole = _look_at_folder(model, parts) if model.is_dir() else look_at(model)
        found = tuple(part for part in joined(whole.parts, given) if part.name in given or part.kind not in parts)
    check_experts(found)
    check_fit(found)


def look_at(path: str | Path, parts: Mapping[str, str | Path | None] | None = None) -> Checkpoint:
    """Like `open_checkpoint`, but the model may be incomplete; WeightsError if nothing was recognised."""
    path = _existing(path, "model")
    given = {kind: place for kind, place in (parts or {}).items() if place is not None}
    if path.is_dir():
        found = _look_at_folder(path, given)
    else:
        found = Checkpoint(path, tuple(_part(kind, path) for kind in kinds_in(path)))
    module = given.pop(MODULE, None)
    apart = {name: find_part(_existing(place, name), name) for name, place in given.items()}
    named = {part.name: part for part in joined(found.parts, apart)}
    # A text encoder's own tokenizer, inside its file or beside it, unless one was given or is part of a whole model.
    if "text_encoder" in named and "tokenizer" not in given and ("text_encoder" in given or "tokenizer" not in named):
        file = named["text_encoder"].file
        own = file if has_tokenizer(open_weights(file)) else None
        if own := own or find_tokenizer(file.parent) or find_tokenizer(file.parent.parent) or _saved_tokenizer(file):
            named["tokenizer"] = _part("tokenizer", own)
    if module is not None:
        file = find_part(_existing(module, MODULE), MODULE).file
        named |= {n: _with_module(part, file) for n, part in named.items() if part.kind == "transformer"}
    check_experts(parts_found := tuple(named.values()))
    found = replace(found, parts=parts_found)
    return found if found.has_experts else replace(found, boundary=None)  # one transformer was given instead


def joined(parts: Iterable[Part], given: Mapping[str, Part]) -> list[Part]:
    """The parts of a model, with those ``given`` apart, name → part, in their places.

    The transformer of a model that has one is the other expert where one is given.
    """
    named = {part.name: part for part in parts}
    for name, part in given.items():
        if name not in EXPERTS:
            named = {n: other for n, other in named.items() if other.kind != part.kind or n == name} | {name: part}
    if experts := {name: part for name, part in given.items() if name in EXPERTS}:
        there = {name: part for name, part in named.items() if part.kind == "transformer"}
        if len(experts) == 1 and "transformer" in there:
            (other,) = set(EXPERTS) - set(experts)
            there = {other: replace(there["transformer"], name=other)}
        there = {name: part for name, part in {**there, **experts}.items() if name in EXPERTS}
        rest = {name: part for name, part in named.items() if part.kind != "transformer"}
        named = {**{name: there[name] for name in EXPERTS if name in there}, **rest}
    return list(named.values())


def _with_module(part: Part, module: Path) -> Part:
    """A text-to-video transformer with VACE's module, without entries of config.json that this changes."""
    base, vace = part.open(), open_component(module, MODULE)
    sizes = network_config(base, part.config)
    if sizes.model_type != "t2v":
        raise WeightsError(f"{module} is VACE's, for a text-to-video transformer; {part.file} is {sizes.model_type}")
    if (width := vace.shapes["vace_patch_embedding.weight"][0]) != sizes.dim:
        raise WeightsError(f"{module} is for a transformer of width {width}; {part.file} has {sizes.dim}")
    config = {name: value for name, value in part.config.items() if not name.startswith(("model_type", "vace"))}
    return replace(part, module=module, config=config)


def _saved_tokenizer(encoder: Path) -> Path | None:
    """The tokenizer's own weight file, which ComfyUI's node CLIPSave puts beside a text encoder."""
    for file in filter(_begins_like_weights, sorted(encoder.parent.iterdir())):
        with suppress(WeightsError):
            if file.stat().st_size < MAX_TOKENIZER_BYTES and [*open_weights(file).tensors] == [EMBEDDED]:
                return file
    return None


def find_part(place: Path, name: str) -> Part:
    """One part of a model, by a name in `GIVEN_APART`; WeightsError if it is missing, or found twice.

    ``place``: its file, or a folder: of a whole model, or the part's own with its config.json.
    """
    kind = "transformer" if name in EXPERTS else name
    if kind == "tokenizer":
        file = find_tokenizer(place) if place.is_dir() else place
        if file is None:
            raise WeightsError(f"{place} holds no tokenizer, expected umT5's spiece.model")
        return _part(kind, file)
    if not place.is_dir():
        part = _part(name, place)
        part.open()  # says what is wrong with it
        return part
    found = _look_at_folder(place, [other for other in NETWORKS if other != kind])
    if own := [part for part in found.parts if part.name == name]:
        return own[0]
    if len(found.of_kind(kind)) > 1:
        files = " or ".join(str(part.file) for part in found.of_kind(kind))
        raise WeightsError(f"{place} holds two experts, not one transformer; give the file of one of them, {files}, or "
                           "the folder as a whole model")  # fmt: skip
    if not found.of_kind(kind):
        for file in _weight_files(place):
            kinds_in(file)  # says why, if it is refused
        raise WeightsError(f"{place} holds no {kind}, only {', '.join(found.files) or _listing(place)}")
    return replace(found.part(kind), name=name)


def _look_at_folder(folder: Path, given: Collection[str]) -> Checkpoint:
    """The model in a folder, where parts of the kinds ``given`` may be missing."""
    config = read_config(folder / "config.json")
    boundary = boundary_of(folder, config, check_pipeline(folder))
    if {*EXPERTS} <= {*given}:
        given = [*given, "transformer"]
    if config.get("format") == MLX_FORMAT:
        layout, files = "mlx", _mlx_files(folder, config)
    elif is_mlx_video(config):
        layout, files = MLX_VIDEO, one_or_two(_find(folder, MLX_VIDEO_FILES))
    else:
        is_diffusers = (folder / "model_index.json").is_file() or (folder / "transformer" / "config.json").is_file()
        layout = "diffusers" if is_diffusers else "official"
        files = one_or_two(_find(folder, FOLDERS[layout]))
        if boundary is not None and "transformer" in files:  # the second transformer is missing
            files = {"high_noise": files.pop("transformer"), **files}
    # Diffusers uses this file name for every network, not only the transformer.
    if layout == "official" and files.keys() <= {"transformer"} and "num_heads" not in config:
        return _search(Checkpoint(folder), given)
    parts = tuple(_part(kind, file) for kind, file in files.items())
    model = config.get("model") if layout == "mlx" else None
    found = Checkpoint(folder, parts, model, layout, boundary=boundary)
    return found if all(kind in given for kind in found.missing()) else _search(found, given)


def _mlx_files(folder: Path, config: dict[str, Any]) -> dict[str, Path]:
    """The files of an MLX folder; missing ones are those of the neighbouring folder in its "parts_from", if any."""
    sibling = config.get("parts_from")
    if sibling is None:
        return one_or_two(_find(folder, MLX_FILES))
    if not isinstance(sibling, str) or sibling in ("", ".", "..") or Path(sibling).name != sibling:
        raise WeightsError(
            f"{folder / 'config.json'} takes parts from {sibling!r}, expected the name of a folder beside {folder}"
        )
    return one_or_two({**_find(folder.parent / sibling, MLX_FILES), **_find(folder, MLX_FILES)})


def _part(name: str, file: Path) -> Part:
    """A part, with the entries of the config.json beside its file."""
    kind = "transformer" if name in EXPERTS else name
    if kind not in NETWORKS:
        return Part(name, kind, file)
    config, metadata = read_config(file.parent / "config.json"), dict[str, str]()
    if config.get("format") == MLX_FORMAT:
        config = config.get(file.name.split(".")[0]) or config.get(kind) or {}
    elif is_mlx_video(config):
        metadata = metadata_of(kind, config)
        config = config if kind == "transformer" else {}
    elif kind != "transformer" or config.keys().isdisjoint(("num_heads", "model_type")):
        config = {ours: config[theirs] for theirs, ours in DIFFUSERS_NAMES[kind].items() if theirs in config}
    return Part(name, kind, file, config, metadata=metadata)


def _search(known: Checkpoint, given: Collection[str]) -> Checkpoint:
    """``known`` with more parts: those in the weight files below its folder, by their keys."""
    folder = known.path
    networks: dict[str, list[ComponentWeights]] = {}
    refused, others = list[str](), list[str]()
    for file in _weight_files(folder):
        if file in known.files.values():
            continue
        try:
            for kind in kinds_in(file):
                networks.setdefault(kind, []).append(open_component(file, kind))
        except WeightsError as error:
            (others if isinstance(error, UnsupportedModel) else refused).append(str(error))
    parts = {part.name: part for part in known.parts}
    for kind, files in networks.items():
        if kind in given or known.of_kind(kind):
            continue
        if len(files) > 1:
            files = list(filter(_is_whole, files)) or files
        if len(files) > 1:
            names = ", ".join(str(weights.path.relative_to(folder)) for weights in files)
            two = f", or give two experts as {' and '.join(map(flag_of, EXPERTS))}" * (kind == "transformer")
            raise WeightsError(
                f"{folder} holds {len(files)} files of a {kind}: {names}; choose one with {flag_of(kind)}{two}"
            )
        parts[kind] = _part(kind, files[0].path)
    if not parts and not given:
        refused = others + refused
        why = f"of its files, {refused[0]}" if refused else f"it holds {_listing(folder)}"
        raise WeightsError(f"{folder} is not a complete Wan folder: no file of a Wan network in it; {why}")
    if "tokenizer" not in parts and (tokenizer := find_tokenizer(folder)):
        parts["tokenizer"] = _part("tokenizer", tokenizer)
    return replace(known, parts=tuple(parts.values()), others=tuple(others))


def _is_whole(weights: ComponentWeights) -> bool:
    """Whether a file is a network of Wan, and not of another model with more tensors of such names."""
    try:
        network_config(weights, _part(weights.component, weights.path).config)
    except WeightsError:
        return False
    return True


def _weight_files(folder: Path) -> Iterator[Path]:
    """Weight files, by their first bytes; an index replaces its shards; hidden files are skipped."""
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
        owners = parse_json(index.read_bytes()).get("weight_map")
        return {name for name in owners.values() if isinstance(name, str)}
    except (ValueError, AttributeError, OSError):
        return set()


def _begins_like_weights(file: Path) -> bool:
    try:
        if not file.is_file():
            return False
        with open(file, "rb") as opened:
            return format_of(opened.read(16)) not in (None, ShardedFile)
    except OSError:
        return False


def _incomplete(found: Checkpoint, missing: list[str]) -> str:
    if found.layout in FOLDERS:
        lacking = "; ".join(f"{' or '.join(FOLDERS[found.layout][part])} ({part})" for part in missing)
        holds = found.others[0] if found.others else f"it holds {_listing(found.path)}"
        return f"{found.path} is not a complete Wan folder: missing {lacking}; {holds}"
    flags = " ".join(f"{flag_of(part)} FILE" for part in missing)
    files = {**COMFYUI_PARTS, "vae": COMFYUI_VAE_22} if any(map(_is_ti2v, found.parts)) else COMFYUI_PARTS
    published = ", ".join(files[part] for part in missing if part in files)
    hint = f" (published: {published})" if published else ""
    others = "".join(f"; {other}" for other in found.others[:1])
    return f"{found.path} holds {some([*found.files])}; missing {some(missing)}: add {flags}{hint}{others}"


def _is_ti2v(part: Part) -> bool:
    """Whether it is TI2V-5B's transformer, which has another VAE."""
    with suppress(WeightsError):
        return part.kind == "transformer" and network_config(part.open(), part.config).model_type == "ti2v"
    return False


def _existing(given: str | Path, kind: str) -> Path:
    path = Path(given).expanduser()
    if path.exists():
        return path
    is_file, released = path.suffix in ENDINGS, [*PRESETS] if kind == "model" and len(path.parts) == 1 else []
    here = [path.parent / name for name in _names(path.parent)]
    here = [entry for entry in here if entry.suffix in ENDINGS or (entry.is_dir() and not is_file)]
    near = nearest(path, released) or nearest(path, map(str, here), stems=True) or nearest_model(path)
    kind = "VACE module" if kind == MODULE else kind.replace("_", " ")
    listed = "; `wan-mlx models` lists those that have a name" if released and not is_file else ""
    raise ValueError(f"{kind} {'file ' * is_file}{path} does not exist{near}{listed}")


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def _listing(folder: Path) -> str:
    return ", ".join(_names(folder)[:8]) or "nothing"


def _find(folder: Path, wanted: Mapping[str, tuple[str, ...]]) -> dict[str, Path]:
    present = {part: [folder / name for name in names if (folder / name).is_file()] for part, names in wanted.items()}
    return {part: files[0] for part, files in present.items() if files}
