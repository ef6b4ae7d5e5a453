"""LoRA files: small changes to a transformer's weights, in any published naming scheme.

A file changes a weight by ``strength * (alpha / rank) * up @ down``, or in another of the kinds of `lora_changes`;
without an alpha the scale is 1, and where PEFT's configuration says so it is ``alpha / sqrt(rank)``. Keys are resolved
against the model's own parameters. A key without a match is an error; keys of a text encoder are reported as unused.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import NoFile, UnsupportedModel, WeightsError, some
from ..files.base import WeightsFile
from ..files.open import open_weights
from ..files.scaled import fold
from ..hub.model_folders import find_model, nearest_model
from ..hub.names import WEIGHT_ENDINGS, parse_location
from ..models.animate_face import FACE
from ..models.configs import TransformerConfig
from ..options import LORAS
from ..other_models import of_keys, of_lora
from ..presets import MODULE, PRESETS
from ..storage import sha256
from ..types import LoraChoice
from .component import FLOATS, PATCHES, networks_of
from .configs import shapes_of
from .layouts import LAYOUTS, pattern
from .lora_changes import LOHA, MAGNITUDES, W1, W2, Change, kind_of
from .lora_config import PEFT_STEM, AdapterConfig, adapter_config, are_of_adapter, check_keys_of_kinds, refused
from .lora_scale import RAW_ALPHA, RAW_RANK, is_raw_lightning, tell_raw_lightning

log = logging.getLogger(__name__)

# Prefixes of a module's name, by tool: ComfyUI and lightx2v, Diffusers, PEFT, DiffSynth.
PREFIX = re.compile(
    r"(?:base_model\.model\.)?(?:(?:model\.)?diffusion_model\.|transformer\.|unet\.|pipe\.(?:dit|vace)\.|dit\.|model\.)?"
)
# kohya and musubi join a module's names with underscores.
JOINED = re.compile(r"(?:lora_unet|lora_transformer|lycoris)__?(\w+)")
TEXT_ENCODER = re.compile(r"(?:base_model\.model\.)?(?:pipe\.)?(?:text_encoders?|lora_te|te|conditioner)\d?[._].+")
# Endings of keys → role for the parameter, and the ending of the parameter's name; the first that the model has.
ENDINGS = {
    r"\.(?:lora_down|lora_A|lora\.down)(?:\.\w+)?\.weight": ("down", "weight"),
    r"\.(?:lora_up|lora_B|lora\.up)(?:\.\w+)?\.weight": ("up", "weight"),
    r"\.lora_B(?:\.\w+)?\.bias": ("up_bias", "bias"),
    r"\.alpha": ("alpha", "weight"),
    r"\.(hada_w[12]_[ab]|lokr_w[12](?:_[ab])?)(?:\.default)?": (r"\2", "weight"),
    r"\.dora_scale": ("dora_scale", "weight"),
    r"\.lora_magnitude_vector(?:\.\w+)*": ("magnitude", "weight"),
    r"\.(?:diff|w_norm)": ("diff", "weight", ""),
    r"\.(?:diff_b|b_norm)": ("diff", "bias"),
    r"\.diff_m": ("diff", "modulation"),
    r"(?:\.base_layer)?\.weight": ("whole", "weight"),
    r"(?:\.base_layer)?\.bias": ("whole", "bias"),
}
# Keys whose tensors have as many inputs as the model is wide.
AS_WIDE = re.compile(
    r".*blocks[._]\d+[._](?:self_attn|attn1)[._](?:to_)?[qkv]\.(?:lora_down|lora_A|lora\.down)(?:\.\w+)?\.weight"
)
INTEGERS = ("I64", "I32", "I16", "I8", "U8")  # which an alpha may be
# Network in a file given as a LoRA → its name, and how to give it.
NOT_LORA = {
    "transformer": ("a whole transformer", "give it as --model, or as --transformer beside one"),
    MODULE: ("VACE's part of a transformer", "give a text-to-video model, and this with --vace-module"),
    **{kind: (f"{name}", f"give it with --{kind.replace('_', '-')}, if it is not the model's own") for kind, name in (
        ("text_encoder", "a text encoder"), ("vae", "a VAE"), ("image_encoder", "an image encoder"),
        ("audio_encoder", "an audio encoder"))},
}  # fmt: skip
# Names of the LoRA file in a folder: PEFT's, Diffusers'.
FOLDER_STEMS = (PEFT_STEM, "pytorch_lora_weights")

# Name of a parameter → its changes by several LoRAs, in order.
Loras = dict[str, list[Change]]


def parse_lora(text: str) -> tuple[str, float]:
    """``path`` or ``path:strength`` → path and strength (1 if none is given); the path may contain colons."""
    path, colon, number = text.rpartition(":")
    if not colon or Path(text).expanduser().exists():
        return text, 1.0
    try:
        return path, float(number)
    except ValueError:
        return text, 1.0


def lora_lists(given: Mapping[str, Any]) -> dict[str, list[tuple[Path, float]]]:
    """The options of `options.LORAS`, normalised: LoRAs for all transformers, and for each of two experts alone.

    ``given``: options by name; "loras" may hold those of the experts, as {"high": …, "low": …}.

    Raises:
        ValueError: as `normalise_loras`, or another key.
    """
    of_all: Any
    of_all, high, low = (given.get(name) for name in LORAS)
    if isinstance(of_all, Mapping):
        if wrong := [key for key in of_all if key not in ("high", "low")]:
            raise ValueError(f"loras has the key {wrong[0]!r}, expected high and low, the experts that they are for")
        if high or low:
            raise ValueError("loras holds those of each expert, and loras_high or loras_low too; leave one out")
        high, low, of_all = of_all.get("high"), of_all.get("low"), None
    return dict(zip(LORAS, map(normalise_loras, (of_all, high, low)), strict=True))


def in_lists(loras: Iterable[tuple[Path, float]], like: Mapping[str, Sequence]) -> dict[str, list[tuple[Path, float]]]:
    """All LoRAs in a row, those of the first list first, in lists again, as long as those they are ``like``."""
    row = iter(loras)
    return {name: list(islice(row, len(one))) for name, one in like.items()}


def normalise_loras(loras: Iterable[LoraChoice] | LoraChoice | None) -> list[tuple[Path, float]]:
    """Paths and strengths of ``loras`` in any accepted form.

    Raises:
        ValueError: an entry is not a path, or not (path, strength) with a finite strength.
    """
    found = []
    if loras is not None and not isinstance(loras, Path | Iterable):
        raise ValueError(f"loras is {loras!r}, expected a path, (path, strength), or a list of them")
    for entry in [loras] if isinstance(loras, str | Path) else loras or ():
        try:
            given: Any = parse_lora(entry) if isinstance(entry, str) else entry
            path, strength = (given, 1.0) if isinstance(given, Path) else given
            path, strength = Path(path).expanduser(), float(strength)
        except (TypeError, ValueError):
            raise ValueError(f"{entry!r} is no LoRA; expected a path, or (path, strength)") from None
        if not math.isfinite(strength):
            raise ValueError(f"the strength of the LoRA {path} is {strength}; expected a finite number such as 0.8")
        found.append((path if os.path.exists(path) else find_model(str(path)) or path, strength))
    return found


def open_loras(loras: Iterable[tuple[Path, float]], config: TransformerConfig) -> Loras:
    """Open LoRA files and resolve them against a transformer's parameters; reads only headers and alphas.

    ``loras``: paths of files, or of folders with one, each with a strength.

    Raises:
        WeightsError: a file cannot be read, has keys without a match, or factors whose shapes differ from the model's.
    """
    shapes, patch = shapes_of(config), math.prod(config.patch_size)
    names, found = spellings(shapes), Loras()
    for path, strength in loras:
        for name, change in _open(fold(open_weights(file_of(path))), strength, shapes, names, patch).items():
            found.setdefault(name, []).append(change)
    return found


def describe_lora(path: Path, strength: float) -> dict[str, Any]:
    """A LoRA's entry in a video's settings; its SHA-256 identifies the file."""
    file = file_of(path)
    return {"file": file.name, "strength": strength, "sha256": _hash(file, file.stat().st_mtime_ns)}


@lru_cache
def _hash(path: Path, modified: int) -> str:
    return sha256(path)


def file_of(path: Path) -> Path:
    """The LoRA file at ``path``, which may be its folder; WeightsError if that has none, or several."""
    if not path.is_dir():
        if path.suffix not in WEIGHT_ENDINGS and not path.parent.is_dir() and parse_location(str(path)):
            hint = f"of a repository give one file: {path}:NAME.safetensors"
            raise NoFile(f"{path}: no such file or folder; {hint}")
        if not path.exists() and (near := nearest_model(path)):
            raise NoFile(f"{path}: no such file{near}")
        return path
    named = [[path / f"{stem}{ending}" for stem in FOLDER_STEMS] for ending in (".safetensors", ".bin")]
    safe, pickled = ([file for file in files if file.is_file()] for files in named)
    others = sorted(file for file in path.glob("*") if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    found = safe or sorted(path.glob("*.safetensors")) or pickled or others
    if len(found) != 1:
        several = f"a folder with {len(found)} LoRA files ({', '.join(file.name for file in found)})"
        raise WeightsError(f"{path}: {several if found else 'a folder without a LoRA file'}; give the file itself")
    return found[0]


def spellings(shapes: Iterable[str]) -> dict[str, str]:
    """All layouts' names of a transformer's parameters, also with underscores in place of dots → the parameters."""
    found = {}
    names = [pair for layout in LAYOUTS if layout.component == "transformer" for pair in layout.names.items()]
    # A LoRA changes no encoder of Animate's face, nor the half of a matrix.
    names = [(theirs, ours) for theirs, ours in names if not ours.startswith(FACE) and "{pair}" not in theirs]
    for name in (name for name in shapes if not name.startswith(FACE)):
        matches = ((theirs, pattern(ours).fullmatch(name)) for theirs, ours in names)
        for spelling in (name, *(theirs.format(**match.groupdict()) for theirs, match in matches if match)):
            found[spelling] = found[spelling.replace(".", "_")] = name
    return found


def resolve(key: str, names: Mapping[str, str]) -> tuple[str, str] | None:
    """The parameter that a LoRA's key changes, and the key's role there; ``names`` are the model's `spellings`."""
    for ending, (role, *kinds) in ENDINGS.items():
        if match := re.fullmatch(rf"(.+?){ending}", key):
            joined = JOINED.fullmatch(match[1])
            module, dot = (joined[1], "_") if joined else (PREFIX.sub("", match[1], count=1), ".")
            found = (names.get(f"{module}{dot}{kind}".rstrip(dot)) for kind in kinds)
            return next(((name, match.expand(role)) for name in found if name is not None), None)
    return None


def _open(
    file: WeightsFile, strength: float, shapes: Mapping[str, Any], names: Mapping[str, str], patch: int
) -> dict[str, Change]:
    config = adapter_config(file)
    check_keys_of_kinds(file.path, file.tensors)
    changes: dict[str, Change] = {}
    unknown, unused = list[str](), list[str]()
    for key, info in file.tensors.items():
        found = resolve(key, names)
        if found is None or (found[1] == "whole" and not config.has_whole):
            (unused if TEXT_ENCODER.fullmatch(key) else unknown).append(key)
            continue
        name, role = found
        if info.dtype not in (FLOATS if role != "alpha" else (*FLOATS, *INTEGERS)):
            raise WeightsError(f"{file.path}: {key} is {info.dtype}; expected floats")
        in_patches = patch if name.endswith(PATCHES) else 0
        keys = changes.setdefault(name, Change(file, strength, shapes[name], in_patches)).keys
        if keys.setdefault(role, key) != key:
            raise WeightsError(f"{file.path}: two keys for the {role} of {name}: {keys[role]} and {key}")
    if unknown and not are_of_adapter(file.tensors):
        _check_is_adapter(file)
    if made_for := _other_base(file, unknown, shapes):
        raise UnsupportedModel(f"{file.path}: this LoRA was made for {made_for}")
    if unknown:
        raise WeightsError(_unknown(file, unknown, shapes))
    is_raw = is_raw_lightning(file, changes)
    for name, change in changes.items():
        # The scale of a bias's up is that of the weight's factors.
        weight = changes.get(name.removesuffix("bias") + "weight", change) if "up_bias" in change.keys else change
        _check(name, change, "down" in weight.keys)
        if kind_of(weight.keys):
            change.scale = RAW_ALPHA / RAW_RANK if is_raw else _scale(weight, config)
    if config.is_dora and not any("magnitude" in change.keys for change in changes.values()):
        raise WeightsError(f"{file.path}: a DoRA by its configuration, but without magnitudes; save it again")
    if not changes:
        raise WeightsError(f"{file.path}: no LoRA keys for the transformer among its {len(file.tensors)} tensors")
    if is_raw:
        tell_raw_lightning(file.path)
    if unused:
        _report_unused(file.path, len(unused), unused[0])
    return changes


@lru_cache
def _report_unused(path: Path, count: int, first: str) -> None:
    """Once for each file, which is opened to be checked and again to be loaded."""
    log.warning("%s: %d keys for a text encoder are not used, such as %s", path, count, first)


def _check_is_adapter(file: WeightsFile) -> None:
    """Raise WeightsError, which says how to give it, if a file holds known networks, or another addition to a model."""
    if other := of_keys(file.tensors):
        raise other.refusal(file.path)
    try:
        kinds = networks_of(file)
    except WeightsError:
        return
    if len(kinds) > 1:
        names = ", ".join(kind.replace("_", " ") for kind in kinds)
        raise WeightsError(f"{file.path}: no LoRA, but a model in one file ({names}): give it as --model")
    name, use = NOT_LORA[kinds[0]]
    raise WeightsError(f"{file.path}: no LoRA, but {name}: {use}")


def _other_base(file: WeightsFile, unknown: list[str], shapes: Mapping[str, Any]) -> str:
    """The model that a LoRA was made for, if that is another one by its ``unknown`` keys, or by its width; else ""."""
    joined = (JOINED.match(key) for key in unknown)
    modules = [match[1] if match else PREFIX.sub("", key, count=1) for key, match in zip(unknown, joined, strict=True)]
    if other := of_lora(modules):
        return f"{other.name}, which is not supported"
    width = next((info.shape[-1] for key, info in file.tensors.items() if AS_WIDE.fullmatch(key) and info.shape), 0)
    own = shapes["head.modulation"][-1]
    name = " or ".join(p.name for p in PRESETS.values() if p.repo and p.transformer.dim == width)
    return f"{name}: it is {width} wide, this transformer {own}" if name and width != own else ""


def _unknown(file: WeightsFile, unknown: list[str], shapes: Mapping[str, Any]) -> str:
    if any(key.endswith("self_attn.q.weight") or key.endswith("attn1.to_q.weight") for key in unknown):
        hint = "; whole weights: give a transformer as --model or --transformer"
    elif any("_img" in key or "img_emb" in key for key in unknown) and not any("_img" in name for name in shapes):
        hint = "; it was made for a model that reads pictures by CLIP (Wan2.1's I2V), and this one does not"
    elif any("vace" in key for key in unknown):
        hint = "; it was made for a VACE model with other layers, or this is none"
    else:
        hint = "; was it made for another model?"
    return f"{file.path}: {len(unknown)} keys match nothing in this transformer: {some(unknown)}{hint}"


def _check(name: str, change: Change, has_factors: bool) -> None:
    """Check the shapes of one change against its parameter's; ``has_factors``: or those of a bias's weight."""
    keys, shape, path = change.keys, change.shape, change.file.path
    stored = {role: change.file.tensors[key].shape for role, key in keys.items()}
    kind = kind_of(keys)
    # ComfyUI, too, takes an alpha beside a difference to mean nothing.
    needs_factors = {*MAGNITUDES} if "diff" in keys else {"alpha", *MAGNITUDES}
    if kind is None or (not kind and needs_factors & keys.keys()) or ("up_bias" in keys and not has_factors):
        raise WeightsError(f"{path}: {name} has only {', '.join(keys.values())}")
    if kind:
        fits = len(shape) == 2 and all(
            found[:1] == shape[:1] and 0 not in found and _are_inputs(found[1:], shape[1:], change.patch)
            for found in _matrices(kind, stored)
        )
        if not fits:
            given = " and ".join(f"{keys[role]} {stored[role]}" for role in keys if kind_of([role]) != "")
            raise WeightsError(f"{path}: {given} do not fit {name} {shape}")
    for role in {"diff", "up_bias", "whole"} & keys.keys():
        found = stored[role]
        if found != shape and not (found[:1] == shape[:1] and _are_inputs(found[1:], shape[1:], change.patch)):
            raise WeightsError(f"{path}: {keys[role]} {found} does not fit {name} {shape}")
    for role in {*MAGNITUDES} & keys.keys():
        of_columns = role == "dora_scale" and stored[role][:1] == (1,)
        if of_columns and change.patch:
            kind = f"DoRA over the channels that a convolution reads, by its key {keys[role]} {stored[role]}"
            raise refused(path, kind)
        if math.prod(stored[role]) != shape[1 if of_columns else 0]:
            raise WeightsError(f"{path}: {keys[role]} {stored[role]} are not the norms of {name} {shape}")


def _matrices(kind: str, stored: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    """The shapes of matrices that must be a parameter's, from the stored shapes by role; () if factors do not fit."""

    def product(up: str, down: str) -> tuple[int, ...]:
        left, right = stored[up], stored[down]
        fits = len(left) > 1 and left[1] == right[0] > 0 and {*left[2:]} <= {1} if right else False
        return (left[0], *right[1:]) if fits else ()

    if kind == "LoKr":
        left = stored["lokr_w1"] if "lokr_w1" in stored else product(*W1)
        right = stored["lokr_w2"] if "lokr_w2" in stored else product(*W2)
        whole = len(left) == 2 and len(right) > 1
        yield (left[0] * right[0], left[1] * right[1], *right[2:]) if whole else ()
    else:
        for up, down in [("up", "down")] if kind == "LoRA" else [LOHA[:2], LOHA[2:]]:
            yield product(up, down)


def _are_inputs(found: tuple[int, ...], inputs: tuple[int, ...], patch: int) -> bool:
    """Whether ``found`` are a matrix's inputs, or the channels and patch of a patch embedding's convolution."""
    kernel = len(found) == 4 and math.prod(found[1:]) == patch
    return (len(found) == 1 or kernel) and (math.prod(found),) == inputs


def _scale(change: Change, config: AdapterConfig) -> float:
    """Of a kind's matrix."""
    file, key, rank = change.file, change.keys.get("alpha"), change.rank
    if key is None:
        found = config.scale(_names(next(iter(change.keys.values()))), rank)
        return 1.0 if found is None else found
    if math.prod(shape := file.tensors[key].shape) != 1:
        raise WeightsError(f"{file.path}: {key} has shape {shape}, not one number")
    alpha = float(file.read(key).astype(mx.float32))
    if not math.isfinite(alpha):
        raise WeightsError(f"{file.path}: {key} is {alpha}, expected a finite number")
    return 1.0 if rank is None else alpha / rank  # LoKr of two whole matrices: LyCORIS writes an alpha without meaning


def _names(key: str) -> set[str]:
    """The module that a key of PEFT's or Diffusers' names, as the configuration's patterns match it."""
    match = next(match for ending in ENDINGS if (match := re.fullmatch(rf"(.+?){ending}", key)))
    return {match[1].removeprefix("base_model.model."), PREFIX.sub("", match[1], count=1)}
