"""Finds the file of each part: in a folder of any layout, in a single file, or from separately given parts.

Published folders are recognised by their config and fixed names. All other files are opened, headers only, and
recognised by their keys, never by their names.
"""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import UnsupportedModel, WeightsError, nearest, some
from ..files.open import ENDINGS, ShardedFile, format_of, open_weights
from ..files.sentencepiece import EMBEDDED, MAX_TOKENIZER_BYTES, find_tokenizer, has_tokenizer
from ..hub.names import DIFFUSERS_FILES, MLX_FILES, OFFICIAL_FILES
from ..other_models import ADVICE, of_entries, of_name
from ..presets import COMFYUI_PARTS, MODULE, NETWORKS, PARTS, PRESETS
from ..storage import parse_json
from .component import ComponentWeights, kinds_in, open_component
from .configs import network_config
from .mlx_video import MLX_VIDEO, MLX_VIDEO_FILES, is_mlx_video, metadata_of

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
}
# Diffusers' pipelines for Wan's networks begin with these; SkyReels V2 has the same.
PIPELINES = ("Wan", "SkyReelsV2")
# Layout of a folder → the names of its files.
FOLDERS = {"mlx": MLX_FILES, "diffusers": DIFFUSERS_FILES, "official": OFFICIAL_FILES}
MLX_FORMAT, MLX_VERSION = "wan_mlx", 1
MAX_CONFIG_BYTES = 4_000_000
# Kind of part → its size and the transformer's that must be the same, and words for it.
FITS = {
    "text_encoder": ("dim", "text_dim", "a text encoder {} wide"),
    "vae": ("z_dim", "out_dim", "a VAE of {} latent channels"),
    "image_encoder": ("dim", "image_dim", "an image encoder {} wide"),
}
# Depth and number of files of the search for weight files.
_MAX_DEPTH, _MAX_FILES = 3, 5000


@dataclass(frozen=True)
class Part:
    """One network of a model, or its tokenizer.

    Attributes:
        name: unique in the model. The only part of a kind has the kind's name.
        kind: "transformer", "text_encoder", "vae", "image_encoder" or "tokenizer".
        file: its path; for shards, of the index.
        config: entries of config.json that its weights' shapes cannot show.
        quantize: the quantisation to load it in, if different from the whole model's.
        loras: path and strength of each LoRA for this part, in addition to the whole model's.
        metadata: of the file, told by the config.json beside it.
        module: a file of tensors that this transformer has besides, VACE's.
        timesteps: (a, b): a transformer that is the expert for the timesteps a <= t < b.
    """

    name: str
    kind: str
    file: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    quantize: str | None = None
    loras: tuple[tuple[Path, float], ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    module: Path | None = None
    timesteps: tuple[float, float] = (0.0, math.inf)

    def open(self) -> ComponentWeights:
        """Its weights; WeightsError if the file holds no such network."""
        return open_component(self.file, self.kind, self.module, self.metadata)

    @property
    def label(self) -> str:
        """Its name for people."""
        return self.name.replace("_", " ")

    def serves(self, timestep: float) -> bool:
        """Whether this expert serves a timestep."""
        first, end = self.timesteps
        return first <= timestep < end


@dataclass(frozen=True)
class Checkpoint:
    """A local model: its parts.

    ``parts`` has all kinds in `PARTS`, but "image_encoder" only if the model reads images.
    ``model`` is the preset's name, if the folder records it. ``others``: what was said of files of other models.
    """

    path: Path
    parts: tuple[Part, ...] = ()
    model: str | None = None
    layout: str = "single files"
    others: tuple[str, ...] = ()

    def of_kind(self, kind: str) -> list[Part]:
        """The parts of one kind, in order."""
        return [part for part in self.parts if part.kind == kind]

    def part(self, kind: str) -> Part:
        """The first part of a kind; WeightsError if there is none."""
        for part in self.of_kind(kind):
            return part
        raise WeightsError(f"{self.path} holds no {kind}, only {', '.join(self.files)}")

    @property
    def files(self) -> dict[str, Path]:
        """A part's name → its file."""
        files = [(part.name, part.file) for part in self.parts]
        return dict(files + [(MODULE, part.module) for part in self.parts if part.module])

    def missing(self) -> list[str]:
        """The kinds of parts that are missing."""
        lacking = [kind for kind in PARTS if not self.of_kind(kind)]
        return [kind for kind in lacking if kind != "image_encoder" or any(map(self._reads_images, self.parts))]

    def _reads_images(self, part: Part) -> bool:
        if part.kind != "transformer":
            return False
        if self.layout == "diffusers":  # config.json has the width of the image features, or None
            return part.config.get("image_dim") is not None
        if "model_type" in part.config:
            return part.config["model_type"] in ("i2v", "flf2v")
        return "img_emb.proj.1.weight" in part.open().shapes


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


def check_here(model: Path | None, parts: Mapping[str, Path | None]) -> None:
    """Raise WeightsError if files on this machine cannot be used; to be asked before the others are downloaded.

    Args:
        model: its folder or file; None if it is not here.
        parts: name in `PARTS` → the place given for it; None if that is not here.
    """
    found = [find_part(place, kind) for kind, place in parts.items() if place is not None]
    if model is not None:
        whole = _look_at_folder(model, parts) if model.is_dir() else look_at(model)
        found += [part for part in whole.parts if part.kind not in parts]
    check_fit(found)


def check_fit(parts: Iterable[Part]) -> None:
    """Raise WeightsError if one is no whole network of Wan2.1, or makes what a transformer among them cannot take."""
    sizes = [(part, network_config(part.open(), part.config)) for part in parts if part.kind in NETWORKS]
    for transformer, config in sizes:
        if transformer.kind != "transformer":
            continue
        for part, other in sizes:
            if part.kind not in FITS or (part.kind == "image_encoder" and not config.has_image_branch):
                continue
            made, taken, words = FITS[part.kind]
            if (width := getattr(other, made)) != (wanted := getattr(config, taken)):
                raise WeightsError(
                    f"{part.file}: {words.format(width)}, where the transformer {transformer.file} takes {wanted}; "
                    f"give the one of its model as {_flag(part.kind)}"
                )


def look_at(path: str | Path, parts: Mapping[str, str | Path | None] | None = None) -> Checkpoint:
    """Like `open_checkpoint`, but the model may be incomplete; WeightsError if nothing was recognised."""
    path = _existing(path, "model")
    given = {kind: place for kind, place in (parts or {}).items() if place is not None}
    if path.is_dir():
        found = _look_at_folder(path, given)
    else:
        found = Checkpoint(path, tuple(_part(kind, path) for kind in kinds_in(path)))
    named = {part.name: part for part in found.parts}
    module = given.pop(MODULE, None)
    for kind, place in given.items():
        part = find_part(_existing(place, kind.replace("_", " ")), kind)
        named = {name: other for name, other in named.items() if other.kind != kind or name == kind} | {kind: part}
    # A text encoder's own tokenizer, inside its file or beside it, unless one was given or is part of a whole model.
    if "text_encoder" in named and "tokenizer" not in given and ("text_encoder" in given or "tokenizer" not in named):
        file = named["text_encoder"].file
        own = file if has_tokenizer(open_weights(file)) else None
        if own := own or find_tokenizer(file.parent) or find_tokenizer(file.parent.parent) or _saved_tokenizer(file):
            named["tokenizer"] = _part("tokenizer", own)
    if module is not None:
        file = find_part(_existing(module, "VACE module"), MODULE).file
        named |= {n: _with_module(part, file) for n, part in named.items() if part.kind == "transformer"}
    return replace(found, parts=tuple(named.values()))


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


def find_part(place: Path, kind: str) -> Part:
    """One part of a model; WeightsError if it is missing, or found twice.

    ``place``: its file, or a folder: of a whole model, or the part's own with its config.json.
    """
    if kind == "tokenizer":
        file = find_tokenizer(place) if place.is_dir() else place
        if file is None:
            raise WeightsError(f"{place} holds no tokenizer, expected umT5's spiece.model")
        return _part(kind, file)
    if not place.is_dir():
        part = _part(kind, place)
        part.open()  # says what is wrong with it
        return part
    found = _look_at_folder(place, [other for other in NETWORKS if other != kind])
    if not found.of_kind(kind):
        for file in _weight_files(place):
            kinds_in(file)  # says why, if it is refused
        raise WeightsError(f"{place} holds no {kind}, only {', '.join(found.files) or _listing(place)}")
    return found.part(kind)


def _look_at_folder(folder: Path, given: Collection[str]) -> Checkpoint:
    """The model in a folder, where parts of the kinds ``given`` may be missing."""
    config = read_config(folder / "config.json")
    check_pipeline(folder)
    if config.get("format") == MLX_FORMAT:
        layout, files = "mlx", _mlx_files(folder, config)
    elif is_mlx_video(config):
        layout, files = MLX_VIDEO, _find(folder, MLX_VIDEO_FILES)
    else:
        is_diffusers = (folder / "model_index.json").is_file() or (folder / "transformer" / "config.json").is_file()
        layout = "diffusers" if is_diffusers else "official"
        files = _find(folder, FOLDERS[layout])
    # Diffusers uses this file name for every network, not only the transformer.
    if layout == "official" and files.keys() <= {"transformer"} and "num_heads" not in config:
        return _search(Checkpoint(folder), given)
    parts = tuple(_part(kind, file) for kind, file in files.items())
    found = Checkpoint(folder, parts, config.get("model") if layout == "mlx" else None, layout)
    return found if all(kind in given for kind in found.missing()) else _search(found, given)


def check_pipeline(folder: Path) -> None:
    """Raise WeightsError if the model_index.json of a folder is another pipeline's than Wan2.1's."""
    index = folder / "model_index.json"
    pipeline = str(read_config(index).get("_class_name", "Wan"))
    if not pipeline.startswith(PIPELINES):
        raise UnsupportedModel(f"{index}: this is a {pipeline[:80]!r}, which is not supported; {ADVICE['transformer']}")


def _mlx_files(folder: Path, config: dict[str, Any]) -> dict[str, Path]:
    """The files of an MLX folder; missing ones are those of the neighbouring folder in its "parts_from", if any."""
    sibling = config.get("parts_from")
    if sibling is None:
        return _find(folder, MLX_FILES)
    if not isinstance(sibling, str) or sibling in ("", ".", "..") or Path(sibling).name != sibling:
        raise WeightsError(
            f"{folder / 'config.json'} takes parts from {sibling!r}, expected the name of a folder beside {folder}"
        )
    return {**_find(folder.parent / sibling, MLX_FILES), **_find(folder, MLX_FILES)}


def _part(kind: str, file: Path) -> Part:
    """A part, with the entries of the config.json beside its file."""
    if kind not in NETWORKS:
        return Part(kind, kind, file)
    config, metadata = read_config(file.parent / "config.json"), dict[str, str]()
    if config.get("format") == MLX_FORMAT:
        config = config.get(kind) or {}
    elif is_mlx_video(config):
        metadata = metadata_of(kind, config)
        config = config if kind == "transformer" else {}
    elif kind != "transformer" or config.keys().isdisjoint(("num_heads", "model_type")):
        config = {ours: config[theirs] for theirs, ours in DIFFUSERS_NAMES[kind].items() if theirs in config}
    return Part(kind, kind, file, config, metadata=metadata)


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
            if (other := of_name(names)) and all(of_name(weights.path.relative_to(folder)) for weights in files):
                raise other.refusal(folder)
            raise WeightsError(f"{folder} holds {len(files)} files of a {kind}: {names}; choose one with {_flag(kind)}")
        parts[kind] = _part(kind, files[0].path)
    if not parts and not given:
        refused = others + refused
        why = f"of its files, {refused[0]}" if refused else f"it holds {_listing(folder)}"
        raise WeightsError(f"{folder} is not a complete Wan2.1 folder: no file of a Wan2.1 network in it; {why}")
    if "tokenizer" not in parts and (tokenizer := find_tokenizer(folder)):
        parts["tokenizer"] = _part("tokenizer", tokenizer)
    return replace(known, parts=tuple(parts.values()), others=tuple(others))


def _is_whole(weights: ComponentWeights) -> bool:
    """Whether a file is a network of Wan2.1, and not of another model with more tensors of such names."""
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
        return f"{found.path} is not a complete Wan2.1 folder: missing {lacking}; {holds}"
    flags = " ".join(f"{_flag(part)} FILE" for part in missing)
    published = ", ".join(COMFYUI_PARTS[part] for part in missing if part in COMFYUI_PARTS)
    hint = f" (published: {published})" if published else ""
    others = "".join(f"; {other}" for other in found.others[:1])
    return f"{found.path} holds {some([*found.files])}; missing {some(missing)}: add {flags}{hint}{others}"


def _flag(part: str) -> str:
    return "--" + part.replace("_", "-")


def _existing(given: str | Path, kind: str) -> Path:
    path = Path(given).expanduser()
    if path.exists():
        return path
    is_file, released = path.suffix in ENDINGS, [*PRESETS] if kind == "model" and len(path.parts) == 1 else []
    here = [path.parent / name for name in _names(path.parent)]
    here = [entry for entry in here if entry.suffix in ENDINGS or (entry.is_dir() and not is_file)]
    near = nearest(path, released) or nearest(path, map(str, here), stems=True)
    listed = "; `wan-mlx models` lists those that have a name" if released and not is_file else ""
    raise ValueError(f"{kind} {'file ' * is_file}{path} does not exist{near}{listed}")


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def _listing(folder: Path) -> str:
    return ", ".join(_names(folder)[:8]) or "nothing"


def _find(folder: Path, wanted: Mapping[str, tuple[str, ...]]) -> dict[str, Path]:
    present = {part: [folder / name for name in names if (folder / name).is_file()] for part, names in wanted.items()}
    return {part: files[0] for part, files in present.items() if files}


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
    objects = {name: (dict, "an object") for name in (*NETWORKS, "files")}
    wanted = {**objects, "model": (str, "a preset's name"), "quantization": (str | dict, "a mode for all or for each")}
    for name, (kind, words) in wanted.items():
        if not isinstance(config.get(name), kind | None):
            raise WeightsError(f"{path} says {name} = {reprlib.repr(config[name])}, expected {words}")
