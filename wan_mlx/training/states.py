"""The kept state of a training run: factors, the optimiser's moments and the number of steps; two are kept."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import WanError
from ..files.safetensors import load_arrays
from ..storage import digest, whole_file
from .factors import Factors

KEPT = 2
State = tuple[int, Factors, dict[str, Any]]  # the step, the factors, the optimiser's arrays
NAME = re.compile(r"step-(\d+)\.safetensors")


def save_state(folder: Path, step: int, factors: Factors, optimizer: Mapping[str, Any]) -> Path:
    """Keep the state after ``step`` steps; older ones but the one before are removed."""
    arrays = {f"factors/{name}": array for name, array in factors.items()}
    # Names of factors have dots, which `tree_flatten` uses itself.
    arrays |= {f"optimizer/{name}": array for name, array in dict(tree_flatten(_slashed(optimizer))).items()}
    mx.eval(arrays)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:07d}.safetensors"
    with whole_file(path) as temporary:
        mx.save_safetensors(str(temporary), arrays, {"step": str(step), "sha256": digest(arrays)})
    for _, old in sorted(states_in(folder))[:-KEPT]:
        old.unlink(missing_ok=True)
    return path


def newest_state(folder: Path) -> State | None:
    """The newest whole state; None if there is none."""
    for step, path in sorted(states_in(folder), reverse=True):
        try:
            arrays, metadata = load_arrays(path)
            mx.eval(arrays)
        except (OSError, RuntimeError, ValueError, WanError):  # damaged: the one before is whole
            continue
        if metadata.get("sha256") != digest(arrays):
            continue
        owned = {owner: _of(arrays, f"{owner}/") for owner in ("factors", "optimizer")}
        return step, owned["factors"], _dotted(tree_unflatten(list(owned["optimizer"].items())))
    return None


def states_in(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    return [(int(match[1]), path) for path in folder.iterdir() if (match := NAME.fullmatch(path.name))]


def _of(arrays: Mapping[str, mx.array], prefix: str) -> dict[str, mx.array]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _slashed(tree: Any) -> Any:
    return {name.replace(".", "/"): _slashed(value) for name, value in tree.items()} if _is_tree(tree) else tree


def _dotted(tree: Any) -> Any:
    return {name.replace("/", "."): _dotted(value) for name, value in tree.items()} if _is_tree(tree) else tree


def _is_tree(value: Any) -> bool:
    return isinstance(value, Mapping)
