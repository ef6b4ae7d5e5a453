"""Unmerged LoRAs of a loaded transformer: set, changed and removed without loading it again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..models.execution import Execution
from ..models.layers import SIDE_KEYS
from ..models.transformer import Transformer
from ..types import LoraChoice
from .lora import Loras, merged, normalise_loras, open_loras, side_arrays
from .parameters import Parameters, dtype_of, is_matrix, locate


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
    sides, changed = {}, {}
    for name in own:
        full = prefix + name
        if full in loras:
            order = parameters.row_order(full)
            if is_matrix(name, own[name].shape):
                sides[name] = side_arrays(loras[full], dtype_of(parameters.component, full, parameters.dtype), order)
                mx.eval(sides[name])  # one by one: what is read is float32
            else:
                difference = merged(loras[full], mx.zeros(own[name].shape))
                difference = difference if order is None else difference[order]
                changed[name] = (own[name].astype(mx.float32) + difference).astype(own[name].dtype)
    mx.eval(changed)
    for layer in module.modules():
        for key in SIDE_KEYS:
            layer.pop(key, None)
    for name, arrays in sides.items():
        parent, index = locate(module, name)
        dict.update(parent[index], arrays)  # a module's own would refuse new keys
    module.update(tree_unflatten(list({**originals, **changed}.items())))
    return {name: own[name] for name in changed}
