"""LoRA files: small changes to a transformer's weights, in any published naming scheme.

A file changes a weight by ``strength * (alpha / rank) * up @ down``, or by ``strength * diff``; without an alpha the
scale is 1, and where PEFT's configuration says so it is ``alpha / sqrt(rank)``. Keys are resolved against the model's
own parameters. A key without a match is an error; keys of a text encoder are reported as unused.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import WeightsError, some
from ..files.base import WeightsFile
from ..files.open import open_weights
from ..files.scaled import fold
from ..models.configs import TransformerConfig
from ..storage import parse_json, sha256
from ..types import LoraChoice
from .component import FLOATS, only_zeros
from .configs import shapes_of
from .layouts import LAYOUTS, pattern

log = logging.getLogger(__name__)

# Prefixes of a module's name, by tool: ComfyUI and lightx2v, Diffusers, PEFT, DiffSynth.
PREFIX = re.compile(
    r"(?:base_model\.model\.)?(?:(?:model\.)?diffusion_model\.|transformer\.|unet\.|pipe\.(?:dit|vace)\.|dit\.|model\.)?"
)
# kohya and musubi join a module's names with underscores.
JOINED = re.compile(r"(?:lora_unet|lora_transformer|lycoris)__?(\w+)")
TEXT_ENCODER = re.compile(r"(?:base_model\.model\.)?(?:pipe\.)?(?:text_encoder|lora_te|te|conditioner)\d?[._].+")
# Endings of keys → role for the parameter, and the ending of the parameter's name; the first that the model has.
ENDINGS = {
    r"\.(?:lora_down|lora_A|lora\.down)(?:\.\w+)?\.weight": ("down", "weight"),
    r"\.(?:lora_up|lora_B|lora\.up)(?:\.\w+)?\.weight": ("up", "weight"),
    r"\.lora_B(?:\.\w+)?\.bias": ("up_bias", "bias"),
    r"\.alpha": ("alpha", "weight"),
    r"\.(?:diff|w_norm)": ("diff", "weight", ""),
    r"\.(?:diff_b|b_norm)": ("diff", "bias"),
    r"\.diff_m": ("diff", "modulation"),
}
UNSUPPORTED = {"dora_scale": "DoRA", "lokr_": "LoKr", "hada_": "LoHa", "lora_mid": "LoCon with a middle convolution"}
# Names of the LoRA file in a folder: PEFT's, Diffusers'.
FOLDER_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
PEFT_CONFIG = "adapter_config.json"


@dataclass
class Change:
    """One file's change of one parameter.

    Attributes:
        shape: the parameter's, in this package's layout.
        patch: for a patch embedding, values of one channel in a patch; else 0.
        keys: role, of `ENDINGS` → key in the file.
        scale: of ``up @ down``, beside the strength.
    """

    file: WeightsFile
    strength: float
    shape: tuple[int, ...]
    patch: int
    keys: dict[str, str] = field(default_factory=dict)
    scale: float = 1.0

    def factors(self) -> tuple[mx.array, mx.array, float] | None:
        """``down`` (rank, inputs), ``up`` (outputs, rank), both float32, and the factor of their product."""
        if "down" not in self.keys:
            return None
        outputs, inputs = self.shape
        down, up = self._read("down").reshape(-1, inputs), self._read("up").reshape(outputs, -1)
        if not down.any(stream=mx.cpu).item():  # up is zero before the first step of training, down never
            raise only_zeros(self.file.path, self.keys["down"])
        return down, up, self.strength * self.scale

    def difference(self) -> mx.array | None:
        """The ``diff`` beside the factors, float32, strength included."""
        total = None
        for role, scale in (("diff", 1.0), ("up_bias", self.scale)):
            if role in self.keys:
                array = self.strength * scale * self._read(role).reshape(self.shape)
                total = array if total is None else total + array
        return total

    def _read(self, role: str) -> mx.array:
        """A tensor, float32; over the inputs of a patch embedding with channels last, as in the model."""
        with mx.stream(mx.cpu):  # read immediately: GPU work must not wait on a file
            array = self.file.read(self.keys[role]).astype(mx.float32)
            if self.patch and role in ("down", "diff"):
                array = array.reshape(array.shape[0], -1, self.patch).swapaxes(1, 2)
            mx.eval(array)
        return array


# Name of a parameter → its changes by several LoRAs, in order.
Loras = dict[str, list[Change]]


def merged(changes: Iterable[Change], array: mx.array) -> mx.array:
    """A float32 parameter with its changes."""
    for change in changes:
        factors, difference = change.factors(), change.difference()
        if factors is not None:
            down, up, scale = factors
            array = array + scale * (up @ down)
        array = array if difference is None else array + difference
    return array


def side_arrays(changes: Iterable[Change], dtype: mx.Dtype, order: mx.array | None = None) -> dict[str, mx.array]:
    """Unmerged LoRAs of a matrix: the factors of all of them stacked along the rank, with scales in ``lora_b``.

    ``lora_a`` (ranks, inputs), ``lora_b`` (outputs, ranks), and ``lora_dense`` if a file has a ``diff``, in ``dtype``,
    for a layer with rows in ``order``.
    """
    downs, ups, dense = [], [], None
    for change in changes:
        factors, difference = change.factors(), change.difference()
        if factors is not None:
            down, up, scale = factors
            downs.append(down)
            ups.append(scale * up)
        if difference is not None:
            dense = difference if dense is None else dense + difference
    arrays = {"lora_a": mx.concatenate(downs), "lora_b": mx.concatenate(ups, axis=1)} if downs else {}
    arrays |= {"lora_dense": dense} if dense is not None else {}
    arrays = {key: array.astype(dtype) for key, array in arrays.items()}
    return {key: array if order is None or key == "lora_a" else array[order] for key, array in arrays.items()}


def parse_lora(text: str) -> tuple[str, float]:
    """``path`` or ``path:strength`` → path and strength (1 if none is given); the path may contain colons."""
    path, colon, number = text.rpartition(":")
    if not colon or Path(text).expanduser().exists():
        return text, 1.0
    try:
        return path, float(number)
    except ValueError:
        return text, 1.0


def normalise_loras(loras: Iterable[LoraChoice] | LoraChoice | None) -> list[tuple[Path, float]]:
    """Paths and strengths of ``loras`` in any accepted form.

    Raises:
        ValueError: an entry is not a path, or not (path, strength) with a finite strength.
    """
    found = []
    for entry in [loras] if isinstance(loras, str | Path) else loras or ():
        try:
            given: Any = parse_lora(entry) if isinstance(entry, str) else entry
            path, strength = (given, 1.0) if isinstance(given, Path) else given
            path, strength = Path(path).expanduser(), float(strength)
        except (TypeError, ValueError):
            raise ValueError(f"{entry!r} is no LoRA; expected a path, or (path, strength)") from None
        if not math.isfinite(strength):
            raise ValueError(f"the strength of the LoRA {path} is {strength}; expected a finite number such as 0.8")
        found.append((path, strength))
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
        for name, change in _open(fold(open_weights(_file_of(path))), strength, shapes, names, patch).items():
            found.setdefault(name, []).append(change)
    return found


def describe_lora(path: Path, strength: float) -> dict[str, Any]:
    """A LoRA's entry in a video's settings; its SHA-256 identifies the file."""
    file = _file_of(path)
    return {"file": file.name, "strength": strength, "sha256": _hash(file, file.stat().st_mtime_ns)}


@lru_cache
def _hash(path: Path, modified: int) -> str:
    return sha256(path)


def _file_of(path: Path) -> Path:
    if not path.is_dir():
        return path
    named = [path / name for name in FOLDER_FILES if (path / name).is_file()]
    found = named or sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        holds = ", ".join(p.name for p in found) or "none"
        raise WeightsError(f"{path}: a folder with {len(found)} LoRA files ({holds}); give the file itself")
    return found[0]


def spellings(shapes: Iterable[str]) -> dict[str, str]:
    """All layouts' names of a transformer's parameters, also with underscores in place of dots → the parameters."""
    found = {}
    tables = [layout.names for layout in LAYOUTS if layout.component == "transformer"]
    for name in shapes:
        matches = ((theirs, pattern(ours).fullmatch(name)) for table in tables for theirs, ours in table.items())
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
            return next(((name, role) for name in found if name is not None), None)
    return None


def _open(
    file: WeightsFile, strength: float, shapes: Mapping[str, Any], names: Mapping[str, str], patch: int
) -> dict[str, Change]:
    changes: dict[str, Change] = {}
    unknown, unused = list[str](), list[str]()
    for key, info in file.tensors.items():
        found = resolve(key, names)
        if found is None:
            (unused if TEXT_ENCODER.fullmatch(key) else unknown).append(key)
            continue
        name, role = found
        if info.dtype not in FLOATS:
            raise WeightsError(f"{file.path}: {key} is {info.dtype}; expected floats")
        in_patches = patch if name.endswith("patch_embedding.weight") else 0
        keys = changes.setdefault(name, Change(file, strength, shapes[name], in_patches)).keys
        if keys.setdefault(role, key) != key:
            raise WeightsError(f"{file.path}: two keys for the {role} of {name}: {keys[role]} and {key}")
    if unknown:
        raise WeightsError(_unknown(file, unknown, shapes))
    alphas, stabilised = _peft_config(file)
    for name, change in changes.items():
        # The scale of a bias's up is that of the weight's factors.
        weight = changes.get(name.removesuffix("bias") + "weight", change) if "up_bias" in change.keys else change
        _check(name, change, "down" in weight.keys)
        if "down" in weight.keys:
            change.scale = _scale(weight, alphas, stabilised)
    if not changes:
        raise WeightsError(f"{file.path}: no LoRA keys for the transformer among its {len(file.tensors)} tensors")
    if unused:
        _report_unused(file.path, len(unused), unused[0])
    return changes


@lru_cache
def _report_unused(path: Path, count: int, first: str) -> None:
    """Once for each file, which is opened to be checked and again to be loaded."""
    log.warning("%s: %d keys for a text encoder are not used, such as %s", path, count, first)


def _unknown(file: WeightsFile, unknown: list[str], shapes: Mapping[str, Any]) -> str:
    kinds = sorted({kind for mark, kind in UNSUPPORTED.items() if any(mark in key for key in unknown)})
    if kinds:
        hint = f"; {' and '.join(kinds)} are not supported, only LoRA and differences"
    elif any("_img" in key or "img_emb" in key for key in unknown) and not any("_img" in name for name in shapes):
        hint = "; it was made for an image-to-video model, and this is none"
    elif any("vace" in key for key in unknown):
        hint = "; it was made for a VACE model with other layers, or this is none"
    else:
        hint = "; was it made for another model?"
    return f"{file.path}: {len(unknown)} keys match nothing in this transformer: {some(unknown)}{hint}"


def _check(name: str, change: Change, has_factors: bool) -> None:
    """Check the shapes of one change against its parameter's; ``has_factors``: or those of a bias's weight."""
    keys, shape, path = change.keys, change.shape, change.file.path
    stored = {role: change.file.tensors[key].shape for role, key in keys.items()}
    down, up = stored.get("down"), stored.get("up")
    if (down is None) != (up is None) or ("alpha" in keys and down is None) or ("up_bias" in keys and not has_factors):
        raise WeightsError(f"{path}: {name} has only {', '.join(keys.values())}")
    if down is not None and up is not None:
        fits = len(shape) == 2 and 0 not in (down or (0,)) and up[:2] == (*shape[:1], *down[:1]) and {*up[2:]} <= {1}
        if not (fits and _are_inputs(down[1:], shape[1:], change.patch)):
            raise WeightsError(f"{path}: {keys['down']} {down} and {keys['up']} {up} do not fit {name} {shape}")
    for role in ("diff", "up_bias"):
        found = stored.get(role, shape)
        if found != shape and not (found[:1] == shape[:1] and _are_inputs(found[1:], shape[1:], change.patch)):
            raise WeightsError(f"{path}: {keys[role]} {found} does not fit {name} {shape}")


def _are_inputs(found: tuple[int, ...], inputs: tuple[int, ...], patch: int) -> bool:
    """Whether ``found`` are a matrix's inputs, or the channels and patch of a patch embedding's convolution."""
    kernel = len(found) == 4 and math.prod(found[1:]) == patch
    return (len(found) == 1 or kernel) and (math.prod(found),) == inputs


def _scale(change: Change, alphas: Mapping[str, float], stabilised: bool) -> float:
    """Of ``up @ down``; the other arguments are `_peft_config`'s."""
    file, key = change.file, change.keys.get("alpha")
    rank = file.tensors[change.keys["down"]].shape[0]
    if key is None:
        module = "." + re.split(next(iter(ENDINGS)), change.keys["down"], maxsplit=1)[0]
        alpha = next((alpha for name, alpha in alphas.items() if module.endswith(name)), None)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if stabilised else rank)
    if math.prod(shape := file.tensors[key].shape) != 1:
        raise WeightsError(f"{file.path}: {key} has shape {shape}, not one number")
    alpha = float(file.read(key).astype(mx.float32))
    if not math.isfinite(alpha):
        raise WeightsError(f"{file.path}: {key} is {alpha}, expected a finite number")
    return alpha / rank


def _peft_config(file: WeightsFile) -> tuple[dict[str, float], bool]:
    """Alphas by the end of a module's name, and whether they are divided by the root of the rank (rsLoRA).

    From the file's own metadata (Diffusers), or from the adapter_config.json beside the file (PEFT).

    Raises:
        WeightsError: it cannot be read, or is a DoRA's.
    """
    beside, entries = file.path.parent / PEFT_CONFIG, {}
    try:
        if "lora_adapter_metadata" in file.metadata:
            found = parse_json(file.metadata["lora_adapter_metadata"])
            entries = {key.removeprefix("transformer."): value for key, value in found.items()}
        elif file.path.name == FOLDER_FILES[0] and beside.is_file():
            entries = parse_json(beside.read_text(encoding="utf-8"))
        names = entries.get("alpha_pattern") or {}
        alphas = {"." + key.strip("^$").replace("\\.", "."): float(value) for key, value in names.items()}
        if entries.get("lora_alpha") is not None:
            alphas[""] = float(entries["lora_alpha"])
        if not all(map(math.isfinite, alphas.values())):
            raise ValueError("an alpha is not finite")
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise WeightsError(f"{file.path}: its LoRA configuration cannot be read ({error})") from None
    if entries.get("use_dora"):
        raise WeightsError(f"{file.path}: a DoRA, which is not supported, only LoRA")
    return alphas, bool(entries.get("use_rslora"))
