"""Turns stored tensors into parameters of a module: unpacked or kept quantised, changed, cast, reordered.

`Parameters` has the rules for each tensor of one network. Whole networks and streamed blocks (`stream`) both use it,
so a block has the same bits either way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import cuda
from ..cuda import StagingBuffers
from ..errors import WeightsError
from ..models.layers import Linear
from ..models.quantized_linear import QuantizedLinear
from ..models.transformer import FLOAT32_PARAMETERS
from .component import SAFETENSORS_NAMES, ComponentWeights, Fetch, beside, only_zeros, parameter_shapes
from .lora import Loras
from .lora_changes import merged
from .prefetch import Prefetch, prefetch_in_turn, prefetch_lazy
from .quantize import EXPAND, NEAREST, Quantization, check_mode, plan_quantization

# Matrices that are zero before the first step of training, by the official code's initialisation.
MAY_BE_ZERO = r"^head\.head\.|\.(?:before|after)_proj\.|\.middle\.1\.proj\."
# The arrays of one parameter by their keys in its layer: its own, or weight, scales and biases of a quantised one.
Arrays = dict[str, mx.array]
# Name of a parameter → the order of its rows (axis 0), or None for the stored order.
RowOrder = Callable[[str], "mx.array | None"]


def dtype_of(component: str, name: str, dtype: mx.Dtype) -> mx.Dtype:
    """The dtype of a parameter: ``dtype``, or float32 where rounding would be visible."""
    return mx.float32 if component == "transformer" and re.match(FLOAT32_PARAMETERS, name) else dtype


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is a linear layer's weight, which can have an unmerged LoRA."""
    return name.endswith(".weight") and len(shape) == 2


def locate(module: nn.Module, name: str) -> tuple[Any, str | int]:
    """The module with the layer whose weight is called ``name``, and the layer's key there."""
    *path, last, _ = name.split(".")
    for part in path:
        module = module[int(part) if part.isdigit() else part]
    return module, int(last) if last.isdigit() else last


class Parameters:
    """The parameters of one network, as its modules need them.

    Args:
        weights: the stored tensors.
        dtype: of the computation; those of `FLOAT32_PARAMETERS` stay float32.
        quantize: mode for the blocks' matrices; "none" unpacks those stored quantised; "nearest" quantises GGUF's
            blocks to the nearest format; None keeps matrices quantised that are stored so, or can be without a
            change.
        loras: changes to merge while loading; those of quantised matrices, which merging would round again, stay
            ``unmerged`` (see `set_loras`).
        row_order: fixed permutations of rows, applied last.

    Raises:
        ValueError: unknown mode, it does not suit the sizes, or the weights are already quantised in another one.
    """

    def __init__(
        self,
        weights: ComponentWeights,
        dtype: mx.Dtype,
        quantize: str | None = None,
        loras: Loras | None = None,
        row_order: RowOrder | None = None,
    ):
        self.weights, self.dtype, self.component = weights, dtype, weights.component
        self.row_order = row_order or (lambda name: None)
        self.quantization = _quantization(weights, quantize)
        self.packings = self.quantization.packings
        # Those quantised as stored; the others are quantised from their values, or not at all.
        self.as_stored = {name for name, packing in self.packings.items() if weights.stores(name, packing)}
        loras = loras or {}
        self.unmerged = {name: changes for name, changes in loras.items() if name in self.packings}
        self.merged = {name: changes for name, changes in loras.items() if name not in self.packings}
        # Those with work left after the CPU's share while reading.
        self.worked = self.merged.keys() | (self.packings.keys() - self.as_stored)
        self.originals: dict[str, mx.array] = {}  # of those that unmerged LoRAs have changed in a resident network
        self._checked: set[str] = set()

    def fit(self, module: nn.Module, prefix: str = "") -> nn.Module:
        """Give ``module`` quantised layers for quantised weights; ``prefix``: of its names."""
        for own in parameter_shapes(module):
            name = prefix + own
            if name in self.packings:
                parent, index = locate(module, own)
                layer = parent[index]
                if not isinstance(layer, Linear):
                    raise WeightsError(f"{self.weights.path}: {name} is packed, but a {type(layer).__name__} cannot be")
                rows, columns = layer.weight.shape
                parent[index] = QuantizedLinear(columns, rows, "bias" in layer, self.packings[name])
        return module

    def start(self, names: Iterable[str], fetch: Fetch | None = None, copied: bool = False) -> dict[str, Arrays]:
        """Lazy arrays of the stored tensors, on the current stream, with the CPU's share of the work; for `finish`.

        Only reads, casts and reorders: no work for a GPU. ``fetch``: as for `ComponentWeights.read`; ``copied``: also
        copies unchanged tensors.
        """
        found = {}
        for name in names:
            arrays = self._read(name, fetch)
            if copied and not self._is_changed(name):
                arrays = {key: mx.where(mx.array(True), array, array) for key, array in arrays.items()}
            found[name] = self._changed(name, arrays)
        return found

    def prefetch(self, names: Iterable[str], staging: StagingBuffers | None = None, kept: bool = False) -> Prefetch:
        """`start`, evaluated in another thread; `finish` takes the result.

        ``staging``: those of `cuda.staging_buffers`; ``kept``: whether the result is kept after the next read.
        """
        names = tuple(names)
        sizes = {name: self.weights.stored_bytes(name) for name in names}
        changed = {name: size if self._is_changed(name) else 0 for name, size in sizes.items()}
        ranges = None if staging is None else self.weights.byte_ranges(names)
        if staging is not None and ranges is not None:
            # If most are cast or quantised, a block computes with copies of the buffer's tensors only.
            worked = sum(size for name, size in sizes.items() if name in self.worked)
            copied = kept or staging.one_serves(sum(changed.values()) + worked, sum(sizes.values()))
            buffer = staging.next(ranges, stays_idle=copied)
            fill = partial(buffer.fill, buffer.address(), ranges)
            return Prefetch(fill, lambda _: self.start(names, buffer.arrays(ranges).__getitem__, copied), copied)
        if not self.weights.file.is_lazy:
            return prefetch_in_turn(lambda name: self.start([name], self.weights.file.read_now), names)
        return prefetch_lazy(self.start, changed)

    def finish(self, started: dict[str, Arrays], resident: bool = True) -> list[tuple[str, mx.array]]:
        """Merge and quantise the arrays from `start`: name → array pairs, all resident, or only those with work.

        Merging and quantising run on the default device, one parameter at a time, after its inputs were read: on Apple
        silicon GPU work would otherwise wait on the file, and macOS ends GPU work that waits.
        """
        if resident:
            mx.eval(list(started.values()))
        self._check(started)
        finished: list[tuple[str, mx.array]] = []
        for name in list(started):
            arrays = started.pop(name)
            if name in self.worked:
                arrays = self._reordered(name, self._work(name, *arrays.values()))
            if resident or name in self.worked:
                mx.eval(arrays)
            finished += [(beside(name, key), array) for key, array in arrays.items()]
        return finished

    def _check(self, started: Mapping[str, Arrays]) -> None:
        """Look at each tensor once: scales must be finite, and no matrix all zero, as an unfinished download leaves it.

        Of a matrix a few rows are looked at, and the others only if those are zero.

        Raises:
            WeightsError: says which.
        """
        with mx.stream(cuda.device_of_new_weights()):
            finite, has_values = dict[str, mx.array](), dict[str, mx.array]()
            for name in (name for name in started if name not in self._checked):
                if name in self.as_stored:
                    finite[name] = self.packings[name].are_finite(started[name])
                if name.endswith(".weight") and len(self.weights.shapes[name]) > 1 and not re.search(MAY_BE_ZERO, name):
                    has_values[name] = self._has_values(name, started[name], pieces=4)
            mx.eval(finite, has_values)
            if bad := [name for name, fine in finite.items() if not fine.item()]:
                raise WeightsError(f"{self.weights.path}: {bad[0]} has scales that are not finite; download it again")
            for name in (name for name, some in has_values.items() if not some.item()):
                if not self._has_values(name, started[name]).item():
                    raise only_zeros(self.weights.path, name)
        self._checked |= started.keys()

    def _has_values(self, name: str, arrays: Arrays, pieces: int = 0) -> mx.array:
        """Whether a matrix is not all zero, or, with ``pieces``, a row at the start of each."""
        step = max(1, len(next(iter(arrays.values()))) // pieces) if pieces else 1
        rows = {key: array[::step] for key, array in arrays.items()}
        return (self.packings[name].unpack(rows, mx.float32) if name in self.as_stored else rows["weight"]).any()

    def _is_changed(self, name: str) -> bool:
        """Whether loading temporarily needs memory beside the result."""
        if name in self.worked:
            return False
        if self.row_order(name) is not None:
            return True
        kept = SAFETENSORS_NAMES[dtype_of(self.component, name, self.dtype)]
        return name not in self.as_stored and self.weights.stored_dtype(name) != kept

    def _read(self, name: str, fetch: Fetch | None) -> Arrays:
        if name in self.as_stored:
            return self.weights.packed(name, fetch)
        return {name.rpartition(".")[2]: self.weights.read(name, fetch)}

    def _changed(self, name: str, arrays: Arrays) -> Arrays:
        """The arrays from `_read`, cast and reordered, unless they are merged or quantised first."""
        if name in self.worked:
            return arrays
        if name not in self.as_stored:
            kept = dtype_of(self.component, name, self.dtype)
            arrays = {key: array.astype(kept) for key, array in arrays.items()}
        return self._reordered(name, arrays)

    def _work(self, name: str, array: mx.array) -> Arrays:
        """The parameter merged with its LoRAs, and quantised or cast."""
        if name in self.merged:
            array = merged(self.merged[name], array.astype(mx.float32))
        if name in self.packings:
            return self.packings[name].pack(array)
        return {name.rpartition(".")[2]: array.astype(dtype_of(self.component, name, self.dtype))}

    def _reordered(self, name: str, arrays: Arrays) -> Arrays:
        order = self.row_order(name)
        return arrays if order is None else {key: array[order] for key, array in arrays.items()}


def _quantization(weights: ComponentWeights, quantize: str | None) -> Quantization:
    """The matrices to quantise, and how."""
    check_mode(quantize)
    stored = weights.quantization
    if quantize == EXPAND:
        return Quantization(EXPAND)
    if stored and quantize not in (None, NEAREST, stored.mode):
        raise ValueError(
            f"{weights.path}: already quantised as {stored.mode}, so quantize={quantize!r} is not possible; "
            "leave it out, or convert the original weights"
        )
    if stored:
        return stored
    if quantize in (None, NEAREST):
        packings = weights.nearest if quantize else weights.packable
        names = sorted({packing.name for packing in packings.values()})
        return Quantization("+".join(names) or EXPAND, packings)
    return plan_quantization(weights.component, quantize, weights.shapes)
