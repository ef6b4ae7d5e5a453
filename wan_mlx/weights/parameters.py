"""Turns stored tensors into parameters of a module: unpacked or kept quantised, changed, cast, reordered.

`Parameters` has the rules for each tensor of one network. `load_module` loads a whole network and `stream_blocks`
one block at a time; both use it, so a block has the same bits either way.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn

from .. import cuda
from ..cuda import StagingBuffers
from ..errors import WeightsError
from ..files.base import ByteRange
from ..models.execution import Execution
from ..models.layers import Linear
from ..models.quantized_linear import QuantizedLinear
from ..models.transformer import BLOCK_LISTS, FLOAT32_PARAMETERS, Transformer
from .component import SAFETENSORS_NAMES, ComponentWeights, Fetch, check_keys, parameter_shapes
from .lora import Loras
from .prefetch import IN_FLIGHT, Prefetch, prefetch_in_turn, prefetch_lazy, prefetch_staged
from .quantize import EXPAND, NEAREST, Quantization, check_mode, keep_packings, plan_quantization

M = TypeVar("M", bound=nn.Module)
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
        loras: changes to apply while loading.
        merge: whether to merge them into the weights. Otherwise, and for quantised matrices, which merging would
            round again, they stay unmerged as low-rank factors.
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
        merge: bool = True,
        row_order: RowOrder | None = None,
    ):
        self.weights, self.dtype = weights, dtype
        self.row_order = row_order or (lambda name: None)
        self.quantization = _quantization(weights, quantize)
        packings = self.quantization.packings
        # Those quantised as stored; the others are quantised from their values, or not at all.
        self.as_stored = {
            name
            for name, packing in packings.items()
            if weights.packable.get(name, weights.nearest.get(name)) == packing and weights.repackable(name)
        }
        self.use(loras or Loras(), merge)

    def use(self, loras: Loras, merge: bool) -> None:
        """From now on apply these LoRAs, in place of earlier ones."""
        self.loras = loras
        self.beside = {
            name
            for name in loras.names
            if is_matrix(name, self.weights.shapes[name]) and (not merge or name in self.quantization.packings)
        }
        self.merged = loras.names - self.beside
        self._ranges: dict[tuple[str, ...], tuple[dict[str, ByteRange] | None, bool]] = {}

    @property
    def component(self) -> str:
        return self.weights.component

    def fit(self, module: nn.Module, prefix: str = "", without: Collection[str] = ()) -> nn.Module:
        """Give ``module`` quantised layers for quantised weights, and parameters for unmerged LoRAs.

        ``prefix``: of its names; ``without``: names that ``module`` does not define.
        """
        for name, packing in self.quantization.packings.items():
            if name.startswith(prefix) and name not in without:
                parent, index = locate(module, name[len(prefix) :])
                layer = parent[index]
                if not isinstance(layer, Linear):
                    raise WeightsError(f"{self.weights.path}: {name} is packed, but a {type(layer).__name__} cannot be")
                rows, columns = layer.weight.shape
                parent[index] = QuantizedLinear(columns, rows, "bias" in layer, packing)
        for name in self.beside:
            if name.startswith(prefix) and name not in without:
                parent, index = locate(module, name[len(prefix) :])
                for key, shape in self.loras.side_shapes(name).items():
                    parent[index][key] = mx.zeros(shape)
        return module

    def start(self, names: Iterable[str], now: bool = False) -> dict[str, dict[str, mx.array]]:
        """Lazy arrays of the stored tensors, on the current stream, with the CPU's share of the work; for `finish`.

        Only reads, casts and reorders: no work for a GPU. ``now``: reads before returning, with several threads.
        """
        fetch = self.weights.file.read_now if now else self.weights.file.read
        return {name: self._changed(name, self._read(name, fetch)) for name in names}

    def start_staged(
        self, names: Iterable[str], staged: Mapping[str, mx.array], copied: bool
    ) -> dict[str, dict[str, mx.array]]:
        """`start` for tensors already read, by their keys in the file; ``copied``: also copies unchanged tensors."""
        found = {}
        for name in names:
            arrays = self._read(name, staged.__getitem__)
            if copied and not self._is_changed(name):
                arrays = {key: mx.where(mx.array(True), array, array) for key, array in arrays.items()}
            found[name] = self._changed(name, arrays)
        return found

    def prefetch(self, names: Iterable[str], staging: StagingBuffers | None = None, kept: bool = False) -> Prefetch:
        """`start`, evaluated in another thread; `finish` takes the result.

        Args:
            names: of the tensors.
            staging: staging buffers, if there are any (`cuda.staging_buffers`).
            kept: whether the result is kept after the next read.
        """
        names = tuple(names)
        if staging is not None:
            ranges, copied = self._staged(names, staging)
            copied = copied or kept
            if ranges is not None:
                buffer = staging.next(staging.bytes_for(ranges), stays_idle=copied)
                start = partial(self.start_staged, names, copied=copied)
                return prefetch_staged(buffer, ranges, start, resident=copied)
        if not self.weights.file.is_lazy:
            return prefetch_in_turn(self.start, names)
        nbytes = {name: self.weights.stored_bytes(name) for name in names}
        return prefetch_lazy(self.start, nbytes, {name for name in nbytes if self._is_changed(name)})

    def _staged(
        self, names: tuple[str, ...], staging: StagingBuffers
    ) -> tuple[dict[str, ByteRange] | None, bool]:
        """`ComponentWeights.byte_ranges`, and whether a block computes only with copies of the buffer's tensors.

        True if most are cast or quantised. Computed once, because every pass reads the blocks.
        """
        if names not in self._ranges:
            sizes = {name: self.weights.stored_bytes(name) for name in names}
            anew = sum(size for name, size in sizes.items() if self._has_work(name) or self._is_changed(name))
            self._ranges[names] = self.weights.byte_ranges(names), staging.one_serves(anew, sum(sizes.values()))
        return self._ranges[names]

    def finish(self, started: dict[str, dict[str, mx.array]], resident: bool = True) -> list[tuple[str, mx.array]]:
        """Merge and quantise the arrays from `start`: name → array pairs, all resident, or only those with work.

        Merging and quantising run on the default device, one parameter at a time, after its inputs were read: on Apple
        silicon GPU work would otherwise wait on the file, and macOS ends GPU work that waits.
        """
        if resident:
            mx.eval(list(started.values()))
        self._check_scales(started)
        finished: list[tuple[str, mx.array]] = []
        for name in list(started):
            arrays = started.pop(name)
            worked = self._has_work(name) or name in self.beside
            if self._has_work(name):
                arrays = self._work(name, arrays)
            if name in self.beside:
                kept = dtype_of(self.component, name, self.dtype)
                side = self.loras.beside(name, kept, self.row_order(name))
                arrays |= {name.removesuffix("weight") + key: array for key, array in side.items()}
            if resident or worked:
                mx.eval(arrays)
            finished += arrays.items()
        return finished

    def _check_scales(self, started: Mapping[str, Mapping[str, mx.array]]) -> None:
        """Raise WeightsError if a tensor quantised as stored has a scale that is not finite."""
        with mx.stream(cuda.device_of_new_weights()):
            good = {}
            for name, arrays in started.items():
                if name in self.as_stored and not self._has_work(name):
                    parts = {key.removeprefix(name.removesuffix("weight")): array for key, array in arrays.items()}
                    good[name] = self.quantization.packings[name].are_finite(parts)
            mx.eval(good)
        bad = [name for name, fine in good.items() if not fine.item()]
        if bad:
            raise WeightsError(f"{self.weights.path}: {bad[0]} has scales that are not finite; download it again")

    def _has_work(self, name: str) -> bool:
        """Whether work remains after the CPU's share while reading."""
        return name in self.merged or (name in self.quantization.packings and name not in self.as_stored)

    def _is_changed(self, name: str) -> bool:
        """Whether loading temporarily needs memory beside the result."""
        if self._has_work(name):
            return False
        if self.row_order(name) is not None:
            return True
        kept = SAFETENSORS_NAMES[dtype_of(self.component, name, self.dtype)]
        return name not in self.as_stored and self.weights.stored_dtype(name) != kept

    def _read(self, name: str, fetch: Fetch) -> dict[str, mx.array]:
        if name in self.as_stored and not self._has_work(name):
            packed = self.weights.packed(name, fetch)
            return {name.removesuffix("weight") + key: array for key, array in packed.items()}
        return {name: self.weights.read(name, fetch)}

    def _changed(self, name: str, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        """The arrays from `_read`, cast and reordered, unless they are merged or quantised first."""
        if self._has_work(name):
            return arrays
        if name not in self.as_stored:
            arrays = {name: arrays[name].astype(dtype_of(self.component, name, self.dtype))}
        return self._reordered(name, arrays)

    def _work(self, name: str, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        array = arrays[name]
        if name in self.merged:
            array = self.loras.apply(name, array.astype(mx.float32))
        if name in self.quantization.packings:
            packed = self.quantization.packings[name].pack(array)
            arrays = {name.removesuffix("weight") + key: part for key, part in packed.items()}
        else:
            arrays = {name: array.astype(dtype_of(self.component, name, self.dtype))}
        return self._reordered(name, arrays)

    def _reordered(self, name: str, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        order = self.row_order(name)
        return arrays if order is None else {key: array[order] for key, array in arrays.items()}


def _quantization(weights: ComponentWeights, quantize: str | None) -> Quantization:
    """The matrices to quantise, and how."""
    check_mode(quantize)
    if quantize == EXPAND:
        return Quantization(EXPAND)
    if weights.quantization is None:
        if quantize == NEAREST:
            return keep_packings(weights.packable | weights.nearest)
        if quantize is None:
            return keep_packings(weights.packable)
        return plan_quantization(weights.component, quantize, weights.shapes)
    stored = weights.quantization.mode
    if quantize not in (None, NEAREST, stored):
        raise ValueError(
            f"{weights.path}: already quantised as {stored}, so quantize={quantize!r} is not possible; "
            "leave it out, or convert the original weights"
        )
    return weights.quantization


def load_module(
    module: M,
    parameters: Parameters,
    progress: Callable[[Iterable[str]], Iterable[str]],
    unread: Mapping[str, tuple[int, ...]] | None = None,
) -> M:
    """Fill ``module`` and return it.

    ``unread``: name → shape of tensors that the file must have too, but ``module`` does not use; not read.
    """
    unread = unread or {}
    check_keys(parameters.weights, {**parameter_shapes(module), **unread})
    parameters.fit(module, without=unread)
    names = [name for name in parameters.weights.shapes if name not in unread]
    staging = cuda.staging_buffers()
    if staging is not None and parameters.weights.byte_ranges(names) is not None:
        module.load_weights(load_staged(parameters, progress(names), staging))
    else:
        module.load_weights(load_in_turn(parameters, progress(names)))
    module.lora_state = LoraState(bool(parameters.merged), parameters.row_order)
    module.eval()
    return module


def load_in_turn(parameters: Parameters, names: Iterable[str]) -> list[tuple[str, mx.array]]:
    """One tensor at a time: while one is read, the previous one is cast and reordered."""
    arrays: list[tuple[str, mx.array]] = []
    before: dict[str, dict[str, mx.array]] = {}
    for name in names:
        with mx.stream(mx.cpu):
            started = parameters.start([name], now=True)
        mx.async_eval(list(started.values()))
        arrays += parameters.finish(before)
        before = started
    return arrays + parameters.finish(before)


def load_staged(
    parameters: Parameters, names: Iterable[str], staging: StagingBuffers
) -> list[tuple[str, mx.array]]:
    """`IN_FLIGHT` bytes at a time, or one tensor, into a staging buffer; cast and reordered from there."""
    arrays: list[tuple[str, mx.array]] = []
    some: list[str] = []
    size = 0

    def load() -> None:
        prefetch = parameters.prefetch(some, staging, kept=True)
        try:
            arrays.extend(parameters.finish(prefetch.result()))
        finally:
            prefetch.stop()  # otherwise it would go on after Ctrl-C

    for name in names:
        more = parameters.weights.stored_bytes(name)
        if some and size + more > IN_FLIGHT:
            load()
            some, size = [], 0
        some.append(name)
        size += more
    if some:
        load()
    return arrays


@dataclass
class LoraState:
    """State of a loaded network for `set_loras`: whether LoRAs are merged, the order of rows, originals."""

    merged: bool
    row_order: RowOrder
    originals: dict[str, mx.array] = field(default_factory=dict)


def stream_blocks(
    places: Sequence[str], make_block: Callable[[str], nn.Module], parameters: Parameters
) -> Iterator[nn.Module]:
    """Yield loaded blocks in the order of ``places``; while one computes, the next is read.

    At most two blocks are resident: a thread reads (`prefetch`); a block is resident when it is yielded, and emptied
    when the next is requested. Before that, the caller must evaluate its results.

    Args:
        places: prefix of the names of each block's parameters, such as "blocks.0".
        make_block: place → a block, not loaded and not quantised.
        parameters: of the whole network, already checked (`check_keys`).

    Raises:
        WeightsError, RuntimeError: the file is damaged; raised when the affected block is requested.
    """
    following: tuple[nn.Module, str, Prefetch] | None = None
    staging = cuda.staging_buffers()

    def start_reading(place: str) -> tuple[nn.Module, str, Prefetch]:
        block, prefix = make_block(place), f"{place}."
        names = [prefix + name for name in parameter_shapes(block)]
        return parameters.fit(block, prefix), prefix, parameters.prefetch(names, staging)

    try:
        following = start_reading(places[0]) if places else None
        for index in range(len(places)):
            assert following is not None, "there is one for every index"
            block, prefix, prefetch = following
            arrays = parameters.finish(prefetch.result(), prefetch.resident)
            block.load_weights([(name.removeprefix(prefix), array) for name, array in arrays])
            del arrays
            following = start_reading(places[index + 1]) if index + 1 < len(places) else None
            yield block.eval()
            block.clear()  # callers that still hold the block hold no weights
    finally:
        if following:
            following[-1].stop()


class StreamedBlocks:
    """A transformer's blocks, read from the file in each pass (`Execution.blocks`).

    Called with places, it yields their blocks like `stream_blocks`. One pass at a time: on the CPU guidance makes
    both passes at once, which would hold four blocks, so the second waits here until the first is done.
    """

    def __init__(self, make_block: Callable[[str], nn.Module], parameters: Parameters):
        self.make_block, self.parameters = make_block, parameters
        self._one_pass = threading.Lock()

    def __call__(self, places: Sequence[str]) -> Iterator[Any]:
        with self._one_pass:
            yield from stream_blocks(places, self.make_block, self.parameters)


def load_streamed(
    model: Transformer, parameters: Parameters, progress: Callable[[Iterable[str]], Iterable[str]]
) -> Execution:
    """Fill all of ``model`` but its blocks, which are streamed."""
    shapes = parameter_shapes(model)
    check_keys(parameters.weights, shapes)
    in_blocks = {name: shape for name, shape in shapes.items() if name.split(".")[0] in BLOCK_LISTS}
    for name in BLOCK_LISTS:
        if name in model:
            model[name] = []
    load_module(model, parameters, progress, unread=in_blocks)
    # Not a method of the model, which would keep the model alive after its last use.
    return Execution(model, StreamedBlocks(partial(type(model).new_block, model.config), parameters))
