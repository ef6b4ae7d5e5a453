"""LoRA's factors: two small matrices beside each trained linear layer of a transformer's blocks.

They are a flat dictionary, ``"blocks.0.self_attn.q.down"`` (rank, inputs) and ``….up`` (outputs, rank), float32. The
layer adds ``alpha / rank * up @ down @ x``. Rows of ``up`` are in the order of the layer's (`models.rope.row_order`).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import nearest
from ..models.configs import TransformerConfig
from ..models.transformer import Block
from ..weights.component import parameter_shapes
from ..weights.parameters import is_matrix

Factors = dict[str, mx.array]

# Groups of layers by name, for ``--targets``; "all" is every linear layer of the blocks, as other trainers take them.
TARGETS = {
    "all": "", "attention": "attn.", "self-attention": "self_attn.", "cross-attention": "cross_attn.", "ffn": "ffn.",
}  # fmt: skip


def layer_shapes(config: TransformerConfig, targets: str = "all") -> dict[str, tuple[int, int]]:
    """Names of the trained layers and the shapes (outputs, inputs) of their weights, without reading any.

    Raises:
        ValueError: ``targets`` is no key of `TARGETS`.
    """
    if targets not in TARGETS:
        raise ValueError(f"targets is {targets!r}, expected one of {', '.join(TARGETS)}{nearest(targets, TARGETS)}")
    shapes = parameter_shapes(Block(config))
    chosen = {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in shapes.items()
        if is_matrix(name, shape) and TARGETS[targets] in name
    }
    return {f"blocks.{i}.{name}": shape for i in range(config.num_layers) for name, shape in chosen.items()}


def new_factors(shapes: Mapping[str, tuple[int, int]], rank: int, seed: int) -> Factors:
    """Factors before the first step: ``down`` uniform within ``1 / sqrt(inputs)`` as PEFT has it, ``up`` zero.

    The same on every machine: each layer's numbers depend on the seed and its name alone.
    """
    factors = {}
    for name, (outputs, inputs) in shapes.items():
        chance = np.random.default_rng([seed, zlib.crc32(name.encode())])
        down = chance.uniform(-1, 1, (rank, inputs)) * inputs**-0.5
        factors[f"{name}.down"] = mx.array(down.astype(np.float32))
        factors[f"{name}.up"] = mx.zeros((outputs, rank))
    return factors


def of_block(factors: Mapping[str, mx.array], place: str) -> Factors:
    """The factors of one block, such as "blocks.3", under their names in it: "self_attn.q.down"."""
    return {name.removeprefix(f"{place}."): array for name, array in factors.items() if name.startswith(f"{place}.")}


@contextmanager
def placed(block: Block, own: Mapping[str, mx.array], scale: float, dtype: mx.Dtype) -> Iterator[None]:
    """Within this block of code the layers of a transformer's block add their factors ``own``, times ``scale``, to what
    they are, with the LoRAs that they have beside their weights.

    The factors are cast where they are used: a float32 one would widen everything after it.
    """
    layers = {name.rpartition(".")[0] for name in own}
    found = {name: _layer(block, name) for name in layers}
    before = {name: (layer.get("lora_a"), layer.get("lora_b")) for name, layer in found.items()}
    try:
        for name, layer in found.items():
            down, up = own[f"{name}.down"].astype(dtype), times(own[f"{name}.up"], scale).astype(dtype)
            a, b = before[name]
            if a is not None:
                down, up = mx.concatenate([a, down]), mx.concatenate([b, up], axis=1)
            # A module's own update would refuse new keys.
            dict.update(layer, lora_a=down, lora_b=up)
        yield
    finally:
        for name, layer in found.items():
            for key, array in zip(("lora_a", "lora_b"), before[name], strict=True):
                layer.pop(key, None)
                if array is not None:
                    dict.update(layer, {key: array})


def _layer(block: Any, name: str) -> Any:
    for step in name.split("."):
        block = block[int(step)] if step.isdecimal() else block[step]
    return block


def times(array: mx.array, number: float) -> mx.array:
    """``array * number``, without an operation where that changes nothing."""
    return array if number == 1 else array * number
