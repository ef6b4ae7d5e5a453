"""Unmerged LoRAs of a loaded transformer: set, changed and removed without loading it again."""

from __future__ import annotations

import math
from collections.abc import Iterable

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from ..models.execution import Execution
from ..models.layers import SIDE_KEYS
from ..models.transformer import Transformer
from ..types import LoraChoice
from .configs import shapes_of
from .lora import normalise_loras, open_loras
from .parameters import dtype_of, is_matrix, locate
from .stream import LoraState, StreamedBlocks


def set_loras(loaded: Transformer | Execution, loras: Iterable[LoraChoice] | LoraChoice | None = ()) -> None:
    """Use ``loras`` unmerged in a loaded transformer, in place of earlier ones; without any it is restored exactly.

    A linear layer adds the low-rank factors' result to its own, so its weights, quantised or not, never change. The
    originals of the few other parameters (biases, norms, modulation) are kept.

    Args:
        loaded: a transformer, resident or streamed.
        loras: each a path, "path:strength", or (path, strength).

    Raises:
        ValueError: an entry is not a LoRA, or the model was loaded with LoRAs merged into its weights.
        WeightsError: a file does not suit the model; nothing has changed then.
    """
    model, blocks = (loaded.model, loaded.blocks) if isinstance(loaded, Execution) else (loaded, None)
    state: LoraState = model.lora_state
    if state.merged:
        raise ValueError("LoRAs were merged into these weights as they were loaded; load the model again without them")
    streamed = blocks.parameters if isinstance(blocks, StreamedBlocks) else None
    shapes = shapes_of(model.config)
    opened = open_loras(normalise_loras(loras), shapes, math.prod(model.config.patch_size))
    opened.report_unused()
    originals, order = state.originals, state.row_order
    parameters = dict(tree_flatten(model.parameters()))
    sides, changed = {}, {}
    resident = {name for name in shapes if name in parameters}
    for name in opened.names & resident:
        kept = dtype_of("transformer", name, model.dtype)
        if is_matrix(name, shapes[name]):
            sides[name] = opened.beside(name, kept, order(name))
        else:
            original = originals.get(name, parameters[name])
            rows = order(name)
            difference = opened.apply(name, mx.zeros(shapes[name]))
            difference = difference if rows is None else difference[rows]
            changed[name] = (original.astype(mx.float32) + difference).astype(original.dtype)
    mx.eval(sides, changed)
    for name in resident:
        if is_matrix(name, shapes[name]):
            parent, index = locate(model, name)
            layer = parent[index]
            for key in SIDE_KEYS:
                layer.pop(key, None)
            for key, array in sides.get(name, {}).items():
                layer[key] = array
    model.update(tree_unflatten(list({**originals, **changed}.items())))
    state.originals = {name: originals.get(name, parameters[name]) for name in changed}
    if streamed:
        streamed.use(opened, merge=False)
