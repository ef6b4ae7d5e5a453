"""Unmerged LoRAs of a loaded transformer: set, changed and removed without loading it again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..models.execution import Execution
from ..models.layers import SIDE_KEYS
from ..models.quantized_linear import QuantizedLinear
from ..models.transformer import Transformer
from ..types import LoraChoice
from .lora import Loras, normalise_loras, open_loras
from .lora_changes import changed, merged
from .parameters import Parameters, dtype_of, is_matrix, locate


def set_loras(loaded: Transformer | Execution, loras: Iterable[LoraChoice] | LoraChoice | None = ()) -> None:
    """Use ``loras`` unmerged in a loaded transformer, in place of earlier ones; without any it is restored exactly.

    A linear layer adds the changes' result to its own, so its weights, quantised or not, never change. The originals of
    the few other parameters (biases, norms, modulation) are kept. DoRA's norms are those of the weights as loaded.

    Args:
        loaded: a transformer, resident or streamed.
        loras: each a path, "path:strength", or (path, strength).

    Raises:
        ValueError: an entry is not a LoRA, or the model was loaded with LoRAs merged into its weights.
        WeightsError: a file does not suit the model; nothing has changed then.
    """
    model = loaded.model if isinstance(loaded, Execution) else loaded
    parameters: Parameters = model.source
    if parameters.merged:
        raise ValueError("LoRAs were merged into these weights as they were loaded; load the model again without them")
    opened = open_loras(normalise_loras(loras), model.config)
    parameters.originals = put_beside(model, opened, parameters, originals=parameters.originals)
    parameters.unmerged = opened  # of the blocks that are streamed


def put_beside(
    module: nn.Module,
    loras: Loras,
    parameters: Parameters,
    prefix: str = "",
    originals: Mapping[str, mx.array] | None = None,
) -> dict[str, mx.array]:
    """Use ``loras`` unmerged in a loaded module, in place of earlier ones; returns the changed weights' originals.

    ``prefix``: of its names in ``loras``; ``originals``: of weights that the earlier ones changed.
    """
    originals = originals or {}
    own = {**dict(tree_flatten(module.parameters())), **originals}
    sides, altered = {}, {}
    for name in own:
        full = prefix + name
        if full in loras:
            order = parameters.row_order(full)
            if is_matrix(name, own[name].shape):
                parent, index = locate(module, name)
                found = changed(loras[full], partial(_values, parent[index], own[name], order))
                dtype = dtype_of(parameters.component, full, parameters.dtype)
                sides[name] = found.beside(dtype, parameters.weights.shapes[full], order)
                mx.eval(sides[name])  # one by one: what is read is float32
            else:
                array = merged(loras[full], _stored(own[name].astype(mx.float32), order))
                altered[name] = (array if order is None else array[order]).astype(own[name].dtype)
    mx.eval(altered)
    for layer in module.modules():
        for key in SIDE_KEYS:
            layer.pop(key, None)
    for name, arrays in sides.items():
        parent, index = locate(module, name)
        dict.update(parent[index], arrays)  # a module's own would refuse new keys
    module.update(tree_unflatten(list({**originals, **altered}.items())))
    return {name: own[name] for name in altered}


def _values(layer: nn.Module, weight: mx.array, order: mx.array | None) -> mx.array:
    """The matrix of a linear layer, unpacked if it is quantised, float32, its rows as stored."""
    quantised = isinstance(layer, QuantizedLinear)
    return _stored(layer.unpacked(mx.float32) if quantised else weight.astype(mx.float32), order)


def _stored(array: mx.array, order: mx.array | None) -> mx.array:
    return array if order is None else array[mx.argsort(order)]
