"""Plans quantisation: a mode's name → the packing of every weight."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..errors import WeightsError, nearest
from ..models.quantized_linear import MODE_NAMES, Packing
from ..models.transformer import BLOCK
from ..storage import parse_json

# The matrices of the blocks, nearly all of the bytes. Weights outside the blocks, norms and modulation are not
# quantised: they are few bytes, and every token of every step passes through them.
QUANTIZED = {
    "transformer": (
        r"(?:(?:vace_)?blocks\.\d+\.(?:(?:self|cross)_attn\.\w+|ffn\.[02]|(?:before|after)_proj)"
        r"|audio_injectors\.\d+\.(?:[qkvo]|adain)|face_adapter\.fuser_blocks\.\d+\.linear\w+)\.weight"
    ),
    "text_encoder": r"blocks\.\d+\.(?:attn\.[qkvo]|ffn\.(?:gate\.0|fc1|fc2))\.weight",
}
NOT_MATRICES = r".*\.norm\w*\.weight"
# A mixed mode. On nano (benchmarks/quantisation_sensitivity.py) a forward suffers most from errors in the last blocks,
# and least from those in the queries and keys of cross-attention. So those blocks get q8, these layers q5, the rest q6.
# The text encoder, which is read once and never resident, gets q8.
AUTO = "auto"
LEAST_SENSITIVE = r".*\.cross_attn\.(?:q|k|k_img)\.weight"
# Two more options: unpack quantised weights, and quantise GGUF's blocks to the nearest format.
EXPAND, NEAREST = "none", "nearest"


@dataclass(frozen=True)
class Quantization:
    """How one network is quantised.

    Attributes:
        mode: the user's name.
        packings: weight's name → packing; other weights are not quantised.
    """

    mode: str
    packings: Mapping[str, Packing] = field(default_factory=dict)

    def to_metadata(self) -> dict[str, str]:
        """The entry in a safetensors file's metadata; `from_metadata` reads it."""
        packings = {name: packing.name for name, packing in self.packings.items()}
        return {"quantization": json.dumps({"mode": self.mode, "packings": packings})}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], path) -> Quantization | None:
        """From a file's own metadata; None if nothing is quantised."""
        if "quantization" not in metadata:
            return None
        try:
            entry = parse_json(metadata["quantization"])
            return cls(str(entry["mode"]), {str(k): Packing.parse(v) for k, v in entry["packings"].items()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{path}: its quantization entry is damaged ({error}); convert it again") from None


def check_mode(mode: str | None) -> None:
    """Raise ValueError if ``mode`` is not a quantisation for users."""
    if mode in (None, AUTO, EXPAND, NEAREST):
        return
    try:
        Packing.parse(str(mode))
    except ValueError:
        raise ValueError(
            f"quantize is {mode!r}, expected one of {AUTO}, {', '.join(MODE_NAMES)}, affine modes also with a group as "
            f"in q4-g32 (32, 64 or 128), {NEAREST} for GGUF files, or {EXPAND}{nearest(mode, MODE_NAMES)}"
        ) from None


def plan_quantization(component: str, mode: str, shapes: Mapping[str, tuple[int, ...]]) -> Quantization:
    """The packing of every weight of a ``component`` with these ``shapes`` of parameters; ValueError if none suits."""
    check_mode(mode)
    names = quantizable(component, shapes)
    modes = _auto(component, names) if mode == AUTO else dict.fromkeys(names, mode)
    packings = {name: Packing.parse(modes[name]) for name in names}
    for name, packing in packings.items():
        if shapes[name][1] % packing.group_size:
            raise ValueError(
                f"quantize={mode!r} needs matrices whose inputs are a multiple of {packing.group_size}, "
                f"but {name} has {shapes[name][1]}"
            )
    return Quantization(mode, packings)


def _auto(component: str, names: Iterable[str]) -> dict[str, str]:
    """Each matrix's mode in `AUTO`."""
    if component != "transformer":
        return dict.fromkeys(names, "q8")
    places = {name: match.group("list", "number") for name in names if (match := BLOCK.match(name))}
    counts = Counter(kind for kind, _ in set(places.values()))
    modes = {}
    for name, (kind, index) in places.items():
        in_last_sixth = 6 * int(index) >= 5 * counts[kind]
        modes[name] = "q5" if re.fullmatch(LEAST_SENSITIVE, name) else "q8" if in_last_sixth else "q6"
    return modes


def quantizable(component: str, names: Iterable[str]) -> list[str]:
    """The names of the quantisable matrices."""
    pattern = QUANTIZED.get(component, r"(?!)")
    return [name for name in names if re.fullmatch(pattern, name) and not re.fullmatch(NOT_MATRICES, name)]
