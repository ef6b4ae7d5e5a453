"""Fills networks with their parameters: a whole module, or one block at a time while the one before it computes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn

from .. import cuda, mac
from ..cuda import StagingBuffers
from ..models.execution import Execution
from ..models.transformer import BLOCK_LISTS, Transformer
from .component import ComponentWeights, parameter_shapes
from .parameters import Arrays, Parameters
from .prefetch import Prefetch, batches
from .set_loras import put_beside

M = TypeVar("M", bound=nn.Module)
# Wraps an iteration, as `events.counted` does: progress(items, total=...) → items.
Progress = Callable[..., Iterable]


def load_module(module: M, parameters: Parameters, progress: Progress) -> M:
    """Fill ``module`` with those of the parameters that it has, and return it; the keys are checked (`check_keys`)."""
    own = parameter_shapes(module)
    parameters.fit(module)
    names = [name for name in parameters.weights.shapes if name in own]
    staging = cuda.staging_buffers()
    if staging is not None and parameters.weights.byte_ranges(names) is not None:
        module.load_weights(load_staged(parameters, progress(names), staging))
    else:
        module.load_weights(load_in_turn(parameters, progress(names)))
    parameters.originals = put_beside(module, parameters.unmerged, parameters)
    module.source = parameters
    module.eval()
    return module


def load_in_turn(parameters: Parameters, names: Iterable[str]) -> list[tuple[str, mx.array]]:
    """One tensor at a time: while one is read, the previous one is cast and reordered."""
    arrays: list[tuple[str, mx.array]] = []
    before: dict[str, Arrays] = {}
    for name in names:
        with mx.stream(mx.cpu):
            started = parameters.start([name], parameters.weights.file.read_now)
        mx.async_eval(list(started.values()))
        arrays += parameters.finish(before)
        before = started
    return arrays + parameters.finish(before)


def load_staged(parameters: Parameters, names: Iterable[str], staging: StagingBuffers) -> list[tuple[str, mx.array]]:
    """`IN_FLIGHT` bytes at a time, or one tensor, into a staging buffer; cast and reordered from there."""
    arrays: list[tuple[str, mx.array]] = []
    for group in batches(names, parameters.weights.stored_bytes):
        prefetch = parameters.prefetch(group, staging, kept=True)
        try:
            arrays += parameters.finish(prefetch.result())
        finally:
            prefetch.stop()  # otherwise it would go on after Ctrl-C
    return arrays


def stream_blocks(
    places: Sequence[str], make_block: Callable[[str], nn.Module], parameters: Parameters
) -> Iterator[nn.Module]:
    """Yield loaded blocks in the order of ``places``; while one computes, the next is read.

    At most two blocks are resident: a thread reads (`prefetch`); a block is resident when it is yielded, and emptied
    when the next is requested. Before that, the caller must evaluate its results. Where the file is damaged, the
    affected block raises WeightsError or RuntimeError.

    Args:
        places: prefix of the names of each block's parameters, such as "blocks.0".
        make_block: place → a block, not loaded and not quantised.
        parameters: of the whole network.
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
            put_beside(block, parameters.unmerged, parameters, prefix)
            following = start_reading(places[index + 1]) if index + 1 < len(places) else None
            yield block.eval()
            block.clear()  # callers that still hold the block hold no weights
    finally:
        if following:
            following[-1].stop()


def spare_cache(weights: ComponentWeights) -> None:
    """Have a file that is larger than free memory read past macOS's cache, which every pass would sweep out.

    What other programs keep there would be lost, too, and nothing be found in it at the next pass.
    """
    free = mac.free_memory()
    if free is not None and sum(map(weights.stored_bytes, weights.sources)) > free:
        weights.file.read_past_cache()


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


def load_streamed(model: Transformer, parameters: Parameters, progress: Progress) -> Execution:
    """Fill all of ``model`` but its blocks, which are streamed."""
    for name in BLOCK_LISTS:
        model.block_list(name).clear()
    spare_cache(parameters.weights)
    load_module(model, parameters, progress)
    # Not a method of the model, which would keep the model alive after its last use.
    return Execution(model, StreamedBlocks(partial(type(model).new_block, model.config), parameters))
