"""An adapter's configuration by PEFT or Diffusers, and the adapters that are refused by name, from headers alone."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import WeightsError
from ..files.base import WeightsFile
from ..hub.names import ADAPTER_CONFIG
from ..storage import parse_json

# Of PEFT's files, beside which is their configuration.
PEFT_STEM, OF_PEFT = "adapter_model", re.compile(r"base_model\.model\.")
DIFFUSERS_METADATA = "lora_adapter_metadata"

SUPPORTED = ("LORA", "LOHA", "LOKR")  # of PEFT's ``peft_type``
# Pattern in a key → the kind of adapter that alone has such keys.
REFUSED = {
    r"\.lora_mid\.": "LoCon with a middle convolution (Tucker)",
    r"\.(?:lokr|hada)_t[12]": "LoKr or LoHa with a Tucker core",
    r"\.(?:a1|a2|b1|b2|bm)\.weight|\.glora_": "GLoRA",
    r"\.boft_[rs]\b": "BOFT",
    r"\.oft_(?:blocks|r)\b": "OFT",
    r"\.ia3_l\b|\.on_input$": "IA³",
    r"\bvera_(?:lambda_[bd]|a|b)\b": "VeRA",
    r"\.lora_e\b|\.ranknum": "AdaLoRA",
    r"\.lambda_layer": "T-LoRA",
    r"\.hra_u\b": "HRA",
    r"\.set_weight": "a file with whole weights in place of the model's (set_weight)",
    r"\.reshape_weight": "a LoRA of weights with another shape (reshape_weight)",
}
# Keys that only adapters have.
OF_ADAPTERS = re.compile(
    r"[._]lora[._](?:up|down|A|B|mid|E|magnitude)|\.lora_\w+\.weight$|\.(?:hada|lokr)_|\.(?:diff|diff_b|diff_m)$"
    r"|\.dora_scale$|" + "|".join(REFUSED),
    re.IGNORECASE,
)
# Initialisations, by the beginning of PEFT's name, that take something out of the base weights.
CHANGES_BASE = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "loftq": "LoftQ", "lora_ga": "LoRA-GA"}
# PEFT's settings that give the same keys another meaning.
VARIANTS = {
    "use_qalora": "QA-LoRA", "use_bdlora": "BD-LoRA", "kasa_config": "KaSA", "arrow_config": "Arrow",
    "alora_invocation_tokens": "aLoRA", "layer_replication": "a LoRA with layers replicated",
}  # fmt: skip


@dataclass(frozen=True)
class AdapterConfig:
    """Alphas and ranks: of all modules, and of those that a pattern names.

    Attributes:
        alphas, ranks: pattern → value, the first that matches; "" matches all.
        stabilised: whether an alpha is divided by the root of the rank (rsLoRA).
        has_whole: whether the file also has whole weights: ``modules_to_save``, or biases.
        is_dora: whether the file must have magnitudes.
    """

    alphas: Mapping[str, float] = field(default_factory=dict)
    ranks: Mapping[str, float] = field(default_factory=dict)
    stabilised: bool = False
    has_whole: bool = False
    is_dora: bool = False

    def scale(self, names: Collection[str], rank: int | None) -> float | None:
        """Of the product of a module's factors; None if nothing is said.

        Args:
            names: the module's, with and without the name of what wraps the model.
            rank: as stored, if the shapes tell it.
        """
        alpha = _first(self.alphas, names)
        divisor = float(rank or _first(self.ranks, names) or 0)
        if alpha is None or not divisor:
            return None
        return alpha / (math.sqrt(divisor) if self.stabilised else divisor)


def _first(values: Mapping[str, float], names: Collection[str]) -> float | None:
    """PEFT's way: the pattern matches the whole name, or its end after a dot."""

    def fits(key: str) -> bool:
        return not key or any(re.match(rf"(.*\.)?({key})$", name) for name in names)

    return next((value for key, value in values.items() if fits(key)), None)


def adapter_config(file: WeightsFile) -> AdapterConfig:
    """From the file's own metadata (Diffusers), or from the adapter_config.json beside the file (PEFT).

    Raises:
        WeightsError: it cannot be read, or is of an adapter that is not supported.
    """
    beside, entries = file.path.parent / ADAPTER_CONFIG, {}
    try:
        if DIFFUSERS_METADATA in file.metadata:
            found = parse_json(file.metadata[DIFFUSERS_METADATA])
            entries = {key.removeprefix("transformer."): value for key, value in found.items()}
        elif beside.is_file() and (file.path.stem == PEFT_STEM or any(OF_PEFT.match(key) for key in file.tensors)):
            entries = parse_json(beside.read_text(encoding="utf-8"))
        config = AdapterConfig(
            _values(entries, "alpha_pattern", "lora_alpha", "alpha"),
            _values(entries, "rank_pattern", "r"),
            bool(entries.get("use_rslora")),
            bool(entries.get("modules_to_save")) or entries.get("bias", "none") != "none",
            bool(entries.get("use_dora")),
        )
        kind, start = str(entries.get("peft_type") or "LORA").upper(), str(entries.get("init_lora_weights")).lower()
    except (ValueError, TypeError, AttributeError, OSError, re.error) as error:
        raise WeightsError(f"{file.path}: its LoRA configuration cannot be read ({error})") from None
    if kind not in SUPPORTED:
        raise refused(file.path, kind)
    for beginning, name in CHANGES_BASE.items():
        if start.startswith(beginning):
            raise refused(
                file.path, f"LoRA with {name}, whose factors belong to base weights that it changed",
                "Save it again by PEFT's save_pretrained with path_initial_model_for_weight_conversion",
            )  # fmt: skip
    for setting, name in VARIANTS.items():
        if entries.get(setting):
            raise refused(file.path, name)
    return config


def _values(entries: Mapping[str, Any], patterns: str, *names: str) -> dict[str, float]:
    """Pattern → number, with one for all modules last."""
    found = {str(key): float(value) for key, value in (entries.get(patterns) or {}).items()}
    given = next((entries[name] for name in names if entries.get(name) is not None), None)
    found |= {} if given is None else {"": float(given)}
    for key, value in found.items():
        re.compile(key)
        if not math.isfinite(value):
            raise ValueError(f"{patterns if key else names[0]} has {value}, which is not finite")
    return found


def are_of_adapter(keys: Iterable[str]) -> bool:
    """Whether a file with these keys is a LoRA, or another adapter, and no network."""
    return any(OF_ADAPTERS.search(key) for key in keys)


def check_keys_of_kinds(path: Path, keys: Iterable[str]) -> None:
    """Raise WeightsError if a key tells an adapter of a kind that is not supported."""
    keys = list(keys)
    for mark, name in REFUSED.items():
        if found := next((key for key in keys if re.search(mark, key, re.IGNORECASE)), None):
            raise refused(path, f"{name}, by its key {found}")


def refused(path: Path, kind: str, way_out: str = "") -> WeightsError:
    """The error of an adapter of a kind that is not supported."""
    way_out = way_out or "Merge it into a transformer with the tool that made it, and give that as --transformer"
    return WeightsError(
        f"{path}: {kind}: not supported; LoRA, LoHa, LoKr, DoRA, differences and whole weights are. {way_out}"
    )
