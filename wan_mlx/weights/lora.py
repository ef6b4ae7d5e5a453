"""LoRA files: small changes to a transformer's weights, in any published naming scheme.

A file changes a weight by ``strength * (alpha / rank) * up @ down``, or by ``strength * diff``; without an alpha the
scale is 1, and where PEFT's configuration says so it is ``alpha / sqrt(rank)``. Keys are resolved against the model's
own parameters. A key without a match is an error; keys of a text encoder are reported as unused.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import WeightsError, some
from ..files.base import WeightsFile
from ..files.fp8 import FP8, fold
from ..files.open import open_weights
from ..storage import sha256
from ..types import LoraChoice
from .layouts import LAYOUTS

log = logging.getLogger(__name__)

# Prefixes of a module's name, by tool: ComfyUI and lightx2v, Diffusers, PEFT, DiffSynth.
PREFIX = re.compile(
    r"(?:base_model\.model\.)?(?:(?:model\.)?diffusion_model\.|transformer\.|unet\.|pipe\.(?:dit|vace)\.|dit\.|model\.)?"
)
# kohya and musubi join a module's names with underscores.
JOINED = re.compile(r"(?:lora_unet|lora_transformer|lycoris)__?(\w+)")
TEXT_ENCODER = re.compile(r"(?:base_model\.model\.)?(?:pipe\.)?(?:text_encoder|lora_te|te|conditioner)\d?[._].+")
# Endings of keys → role for the parameter.
ENDINGS = {
    "down": r"\.(?:lora_down|lora_A|lora\.down)(?:\.\w+)?\.weight",
    "up": r"\.(?:lora_up|lora_B|lora\.up)(?:\.\w+)?\.weight",
    "up_bias": r"\.lora_B(?:\.\w+)?\.bias",
    "alpha": r"\.alpha",
    "diff": r"\.(?:diff|w_norm)",
    "diff_bias": r"\.(?:diff_b|b_norm)",
    "diff_modulation": r"\.diff_m",
}
UNSUPPORTED = {"dora_scale": "DoRA", "lokr_": "LoKr", "hada_": "LoHa", "lora_mid": "LoCon with a middle convolution"}
FLOATS = ("F64", "F32", "F16", "BF16")
# Names of the LoRA file in a folder: PEFT's, Diffusers'.
FOLDER_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
PEFT_CONFIG = "adapter_config.json"


@dataclass
class Part:
    """One file's change of one parameter: keys in the file, and the scale of ``up @ down``."""

    down: str = ""
    up: str = ""
    up_bias: str = ""
    alpha: str = ""
    diff: str = ""
    scale: float = 1.0


@dataclass(frozen=True)
class Lora:
    """A LoRA file at a strength, with its keys resolved against a model.

    Attributes:
        parts: name of a parameter → its change.
        shapes: shape of each of those parameters in this package's layout.
        patch: values of one channel in a patch (see `open_loras`).
        unused: keys for a text encoder.
    """

    path: Path
    strength: float
    file: WeightsFile
    parts: Mapping[str, Part]
    shapes: Mapping[str, tuple[int, ...]]
    patch: int
    unused: Sequence[str] = ()

    def factors(self, name: str) -> tuple[mx.array, mx.array, float] | None:
        """``down`` (rank, inputs), ``up`` (outputs, rank), both float32, and the factor of their product."""
        part = self.parts[name]
        if not part.down:
            return None
        outputs, inputs = self.shapes[name]
        down, up = self._read(part.down, name).reshape(-1, inputs), self._read(part.up).reshape(outputs, -1)
        return down, up, self.strength * part.scale

    def difference(self, name: str) -> mx.array | None:
        """The ``diff`` beside the factors, float32, strength included."""
        part = self.parts[name]
        total = None
        for key, scale in ((part.diff, 1.0), (part.up_bias, part.scale)):
            if key:
                change = self.strength * scale * self._read(key, name).reshape(self.shapes[name])
                total = change if total is None else total + change
        return total

    def apply(self, name: str, array: mx.array) -> mx.array:
        """The changed parameter; ``array`` is float32."""
        factors, difference = self.factors(name), self.difference(name)
        if factors is not None:
            down, up, scale = factors
            array = array + scale * (up @ down)
        return array if difference is None else array + difference

    def _read(self, key: str, over_inputs: str = "") -> mx.array:
        """A tensor, float32; for the inputs of a patch embedding with channels last, as in the model."""
        with mx.stream(mx.cpu):  # read immediately: GPU work must not wait on a file
            array = self.file.read(key).astype(mx.float32)
            if over_inputs.endswith("patch_embedding.weight"):
                array = array.reshape(array.shape[0], -1, self.patch).swapaxes(1, 2)
            mx.eval(array)
        return array


class Loras:
    """Several LoRAs as one change of a model's parameters."""

    def __init__(self, loras: Iterable[Lora] = ()):
        self.loras = tuple(loras)
        self.names = {name for lora in self.loras for name in lora.parts}

    def __bool__(self) -> bool:
        return bool(self.names)

    def report_unused(self) -> None:
        """Log the keys for a text encoder, which are not used."""
        for lora in self.loras:
            if lora.unused:
                first, count = lora.unused[0], len(lora.unused)
                log.warning("%s: %d keys for a text encoder are not used, such as %s", lora.file.path, count, first)

    def apply(self, name: str, array: mx.array) -> mx.array:
        """The float32 parameter ``name`` with all LoRAs merged, in order."""
        for lora in self.loras:
            if name in lora.parts:
                array = lora.apply(name, array)
        return array

    def beside(self, name: str, dtype: mx.Dtype, order: mx.array | None = None) -> dict[str, mx.array]:
        """`side` in ``dtype``, for a layer with rows in ``order``."""
        arrays = {key: array.astype(dtype) for key, array in self.side(name).items()}
        if order is not None:
            arrays = {key: array if key == "lora_a" else array[order] for key, array in arrays.items()}
        return arrays

    def side_shapes(self, name: str) -> dict[str, tuple[int, int]]:
        """Shapes of the arrays of `side`."""
        rank, dense = 0, False
        for lora in self.loras:
            part = lora.parts.get(name, Part())
            rank += math.prod(lora.file.tensors[part.down].shape[:1]) if part.down else 0
            dense = dense or bool(part.diff)
        outputs, inputs = next(lora.shapes[name] for lora in self.loras if name in lora.parts)
        shapes = {"lora_a": (rank, inputs), "lora_b": (outputs, rank)} if rank else {}
        return {**shapes, "lora_dense": (outputs, inputs)} if dense else shapes

    def side(self, name: str) -> dict[str, mx.array]:
        """Unmerged LoRAs of a matrix: the factors of all of them stacked along the rank, with scales in ``lora_b``.

        Float32: ``lora_a`` (ranks, inputs), ``lora_b`` (outputs, ranks), and ``lora_dense`` if a file has a ``diff``.
        """
        downs, ups, dense = [], [], None
        for lora in self.loras:
            if name not in lora.parts:
                continue
            factors, difference = lora.factors(name), lora.difference(name)
            if factors is not None:
                down, up, scale = factors
                downs.append(down)
                ups.append(scale * up)
            if difference is not None:
                dense = difference if dense is None else dense + difference
        arrays = {"lora_a": mx.concatenate(downs), "lora_b": mx.concatenate(ups, axis=1)} if downs else {}
        return arrays if dense is None else {**arrays, "lora_dense": dense}


def parse_lora(text: str) -> tuple[str, float]:
    """``path`` or ``path:strength`` → path and strength (1 if none is given); the path may contain colons.

    Raises:
        ValueError: the strength is not finite.
    """
    path, colon, number = text.rpartition(":")
    if not colon or Path(text).expanduser().exists():
        return text, 1.0
    try:
        strength = float(number)
    except ValueError:
        return text, 1.0
    if not math.isfinite(strength):
        raise ValueError(f"the strength of the LoRA {text!r} is not finite; expected a number such as {path}:0.8")
    return path, strength


def normalise_loras(loras: Iterable[LoraChoice] | LoraChoice | None) -> list[tuple[Path, float]]:
    """Paths and strengths of ``loras`` in any accepted form.

    Raises:
        ValueError: an entry is not a path, or not (path, strength) with a finite strength.
    """
    if loras is None:
        return []
    if isinstance(loras, str | Path):
        loras = [loras]
    found = []
    for given in loras:
        entry: Any = given
        if isinstance(entry, str):
            entry = parse_lora(entry)
        elif isinstance(entry, Path):
            entry = entry, 1.0
        try:
            path, strength = entry
            strength = float(strength)
            found.append((Path(path).expanduser(), strength))
        except (TypeError, ValueError):
            raise ValueError(f"{entry!r} is no LoRA; expected a path, or (path, strength)") from None
        if not math.isfinite(strength):
            raise ValueError(f"the strength of the LoRA {path} is {strength}; expected a finite number")
    return found


def open_loras(loras: Iterable[tuple[Path, float]], shapes: Mapping[str, tuple[int, ...]], patch: int) -> Loras:
    """Open LoRA files and resolve them against a transformer's parameters; reads only headers and alphas.

    Args:
        loras: paths of files, or of folders with one, each with a strength.
        shapes: name → shape of every parameter.
        patch: values of one channel in a patch: number of a patch embedding's inputs per channel.

    Raises:
        WeightsError: a file cannot be read, has keys without a match, or factors whose shapes differ from the model's.
    """
    return Loras(_open(path, strength, shapes, patch) for path, strength in loras)


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


def _open(path: Path, strength: float, shapes: Mapping[str, tuple[int, ...]], patch: int) -> Lora:
    file = fold(open_weights(_file_of(path)))
    resolver = _Resolver(shapes)
    parts: dict[Any, Any] = {}
    unknown, unused = list[str](), list[str]()
    for key in file.tensors:
        found = resolver(key)
        if found is None:
            (unused if TEXT_ENCODER.fullmatch(key) else unknown).append(key)
            continue
        name, role = found
        part = parts.setdefault(name, Part())
        if getattr(part, role):
            raise WeightsError(f"{file.path}: two keys for the {role} of {name}: {getattr(part, role)} and {key}")
        setattr(part, role, key)
    if unknown:
        raise WeightsError(_unknown(file, unknown, shapes))
    odd = [key for key in file.tensors if key not in unused and file.tensors[key].dtype not in (*FLOATS, *FP8)]
    if odd:
        raise WeightsError(f"{file.path}: {odd[0]} is {file.tensors[odd[0]].dtype}; expected floats")
    # The scale of a bias's up is that of the weight's factors.
    config = _PeftConfig.of(file)
    for name, part in parts.items():
        factors = parts.get(name.removesuffix("bias") + "weight", part) if part.up_bias else part
        _check(file, name, part, shapes[name], patch, has_factors=bool(factors.down))
        if factors.down:
            part.scale = _scale(file, name, factors, config)
    if not parts:
        raise WeightsError(f"{file.path}: no LoRA keys for the transformer among its {len(file.tensors)} tensors")
    return Lora(path, strength, file, parts, {name: shapes[name] for name in parts}, patch, unused)


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


class _Resolver:
    """A LoRA's key → its parameter and its role there."""

    def __init__(self, shapes: Mapping[str, Any]):
        self.shapes = shapes
        self.joined = {name.replace(".", "_"): name for name in shapes}
        self.rules = [rule for layout in LAYOUTS if layout.component == "transformer" for rule in layout.rules]

    def __call__(self, key: str) -> tuple[str, str] | None:
        for role, pattern in ENDINGS.items():
            match = re.fullmatch(rf"(.+?){pattern}", key)
            if match:
                name = self._parameter(match[1], role)
                role = "diff" if role.startswith("diff") else role
                return (name, role) if name is not None and name in self.shapes else None
        return None

    def _parameter(self, module: str, role: str) -> str | None:
        if role in ("diff_bias", "up_bias"):
            return self._named(module, "bias")
        if role == "diff_modulation":
            return self._named(module, "modulation")
        if role == "diff":  # of a weight, or of a parameter that is not a module's weight
            return self._named(module, "weight") or self._named(module, "")
        return self._named(module, "weight")

    def _named(self, module: str, kind: str) -> str | None:
        joined = JOINED.fullmatch(module)
        if joined:
            return self._joined(f"{joined[1]}_{kind}".rstrip("_"))
        name = f"{PREFIX.sub('', module, count=1)}.{kind}".rstrip(".")
        if name in self.shapes:
            return name
        return next((target for target in self._renamed(name, ".") if target in self.shapes), None)

    def _joined(self, name: str) -> str | None:
        if name in self.joined:
            return self.joined[name]
        targets = (target.replace(".", "_") for target in self._renamed(name, "_"))
        return next((self.joined[target] for target in targets if target in self.joined), None)

    def _renamed(self, name: str, joint: str) -> Iterable[str]:
        """Names from the layouts' rules for a name whose parts are joined by ``joint``."""
        for rule in self.rules:
            pattern = rule.pattern if joint == "." else rule.pattern.replace(r"\.", joint)
            match = re.fullmatch(pattern, name)
            if match and isinstance(rule.target, str):
                yield match.expand(rule.target)


def _check(file: WeightsFile, name: str, part: Part, shape: tuple[int, ...], patch: int, has_factors: bool) -> None:
    """Check the shapes of one part against the parameter's."""
    stored = {role: file.tensors[key].shape for role, key in vars(part).items() if role != "scale" and key}
    if bool(part.down) != bool(part.up) or (part.alpha and not part.down) or (part.up_bias and not has_factors):
        raise WeightsError(f"{file.path}: {name} has only {', '.join(vars(part)[role] for role in stored)}")
    if part.down:
        rank, fits = stored["down"][:1], False
        if len(shape) == 2 and rank and rank[0] > 0:
            down, up = stored["down"][1:], stored["up"]
            kernel = len(down) == 1 or (len(down) == 4 and math.prod(down[1:]) == patch)
            fits = kernel and math.prod(down) == shape[1] and up[:2] == (shape[0], rank[0]) and set(up[2:]) <= {1}
        if not fits:
            raise WeightsError(
                f"{file.path}: {part.down} {stored['down']} and {part.up} {stored['up']} do not fit {name} {shape}"
            )
    for role in ("diff", "up_bias"):
        if role in stored and not _same_values(stored[role], shape, patch):
            raise WeightsError(f"{file.path}: {vars(part)[role]} {stored[role]} does not fit {name} {shape}")


def _same_values(stored: tuple[int, ...], shape: tuple[int, ...], patch: int) -> bool:
    if len(stored) == 5 and len(shape) == 2:
        return stored[0] == shape[0] and math.prod(stored[1:]) == shape[1] and math.prod(stored[2:]) == patch
    return stored == shape


def _scale(file: WeightsFile, name: str, part: Part, config: _PeftConfig | None) -> float:
    rank = file.tensors[part.down].shape[0]
    if part.alpha:
        if math.prod(file.tensors[part.alpha].shape) != 1:
            raise WeightsError(f"{file.path}: {part.alpha} has shape {file.tensors[part.alpha].shape}, not one number")
        alpha = float(file.read(part.alpha).astype(mx.float32))
        if not math.isfinite(alpha):
            raise WeightsError(f"{file.path}: {part.alpha} is {alpha}, expected a finite number")
        return alpha / rank
    return config.scale(part.down, rank) if config else 1.0


@dataclass(frozen=True)
class _PeftConfig:
    """A LoRA's configuration, as stored beside the weights by PEFT or Diffusers."""

    path: Path
    alpha: float | None = None
    use_rslora: bool = False
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, file: WeightsFile) -> _PeftConfig | None:
        """From the file's own metadata (Diffusers), or from the adapter_config.json beside the file (PEFT).

        Raises:
            WeightsError: it cannot be read.
        """
        beside = file.path.parent / PEFT_CONFIG
        try:
            if "lora_adapter_metadata" in file.metadata:
                entries = json.loads(file.metadata["lora_adapter_metadata"])
                return cls._from({key.removeprefix("transformer."): value for key, value in entries.items()}, file.path)
            if file.path.name == FOLDER_FILES[0] and beside.is_file():
                return cls._from(json.loads(beside.read_text(encoding="utf-8")), beside)
        except (ValueError, TypeError, AttributeError, OSError, RecursionError) as error:
            raise WeightsError(f"{file.path}: its LoRA configuration cannot be read ({error})") from None
        return None

    @classmethod
    def _from(cls, entries: Mapping[str, Any], path: Path) -> _PeftConfig:
        if entries.get("use_dora"):
            raise WeightsError(f"{path}: a DoRA, which is not supported, only LoRA")
        alpha = entries.get("lora_alpha")
        pattern = entries.get("alpha_pattern") or {}
        pattern = {key.strip("^$").replace("\\.", "."): float(value) for key, value in pattern.items()}
        return cls(path, None if alpha is None else float(alpha), bool(entries.get("use_rslora")), pattern)

    def scale(self, key: str, rank: int) -> float:
        """The scale of the factors whose down is ``key``."""
        module = "." + re.split(ENDINGS["down"], key, maxsplit=1)[0]
        alpha = next((alpha for name, alpha in self.alpha_pattern.items() if module.endswith(f".{name}")), self.alpha)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)
