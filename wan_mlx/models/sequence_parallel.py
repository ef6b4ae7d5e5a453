"""A forward pass whose tokens are divided among machines: each attends with its own queries to everyone's keys."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TypeVar

import mlx.core as mx
import numpy as np

from ..cuda.forward import fill_last_tile
from ..distributed import Shard
from .attention import SelfAttention, split_heads
from .attention_execution import attention, has_fused_kernel, rotated
from .pieces import Pacer, in_dispatches
from .transformer import ForwardPass, Runs

T = TypeVar("T")

# Keys and values of so many groups of heads are gathered one after the other: one arrives while the one before is
# attended to. NCCL is so fast that all of them arrive while values and queries are computed.
HEAD_GROUPS, HEAD_GROUPS_ON_GPU = 4, 1


@dataclass(frozen=True)
class DividedPass(ForwardPass):
    """A forward pass of which this machine computes a share of the tokens; positions and clean tokens are its own's."""

    shard: Shard = None  # type: ignore[assignment]  # always given: fields before it have defaults


def own_runs(runs: Runs[T], this_pass: ForwardPass) -> Runs[T]:
    """Runs of all tokens as they are on this machine, which may have none of some."""
    if not isinstance(this_pass, DividedPass):
        return runs
    here = ((this_pass.shard.span(tokens), row) for tokens, row in runs)
    return [(tokens, row) for tokens, row in here if tokens is not None]


def own_tokens(x: mx.array, this_pass: ForwardPass, shard: Shard) -> tuple[mx.array, ForwardPass]:
    """This machine's share of the tokens x (B, L, D), and what they take of the pass."""
    values = {field.name: getattr(this_pass, field.name) for field in fields(ForwardPass)}
    values["rope"] = tuple(shard.take(table, axis=0) for table in this_pass.rope)
    if (clean := this_pass.clean) is not None:
        here = shard.span(clean.tokens)
        values["clean"] = here and clean._replace(tokens=here)
        if here == slice(0, None):  # all are clean
            values |= {"time": clean.time, "modulation": clean.modulation, "clean": None}
    return shard.take(x), DividedPass(**values, shard=shard)


def attend_with_others(layer: SelfAttention, tokens: list[mx.array], this_pass: DividedPass, pace: Pacer) -> mx.array:
    """The result of self-attention of this machine's ``tokens``, the only one, normed (B, size, D), which is taken.

    Keys and values are on their way, a group of heads after the other, while queries are computed and the group before
    is attended to.
    """
    shard, rope, (x,) = this_pass.shard, this_pass.rope, tokens
    tokens.clear()
    count = min(layer.heads, HEAD_GROUPS if shard.part.group.on_host else HEAD_GROUPS_ON_GPU)
    groups = [slice(group[0], group[-1] + 1) for group in np.array_split(range(layer.heads), count)]
    fill = fill_last_tile if has_fused_kernel(x.dtype, x.shape[-1] // layer.heads) else None
    k = rotated(layer, "k", x, rope, pace)
    pace(k)
    keys = [shard.begin(k[:, :, groups[0]], fill)]
    x = keys[0].before(x)
    v = in_dispatches(layer.v, x, pace, lambda y, tokens: split_heads(y, layer.heads))
    pace(v)
    values = [shard.begin(v[:, :, groups[0]], fill)]
    x = values[0].before(x)
    for group in groups[1:]:
        keys.append(shard.begin(k[:, :, group], fill))
        values.append(shard.begin(v[:, :, group], fill))
    del k, v
    q = rotated(layer, "q", x, rope, pace)
    del x
    pace(q)
    parts = []
    for group in groups:
        k, v = (coming.pop(0).whole() for coming in (keys, values))
        parts.append(attention(q[:, :, group], k, v, pace))
        del k, v
        pace(parts[-1])
    return mx.concatenate(parts, axis=-1)
