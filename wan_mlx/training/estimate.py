"""What a training run would need, before anything is downloaded: bytes, and floating-point operations of a step.

The arrays that are counted stand in `backward`: the inputs that are kept of each block, and the widest of the pieces
that are made again. It is arithmetic: no measurement on a GPU has confirmed it yet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..planning.flops import forward_parts
from ..planning.peak_memory import overhead
from ..planning.plan import FILL
from ..planning.sizes import Networks
from .backward import SCORES_AT_ONCE, TOKENS_AT_ONCE
from .dataset import TrainingClip
from .factors import layer_shapes
from .recipe import Recipe

# Arrays as wide as tokens alive in the widest part of a block's backward pass, and of its token-wise piece as wide as
# the feed-forward, in float32; float32 arrays of scores.
WIDE, FED, SCORES = 14, 12, 5
FLOAT32_COPIES = 4  # of each trained number: itself, its gradient and two moments


@dataclass(frozen=True)
class TrainingPlan:
    """Bytes at most, whether blocks are streamed, and the work of one step."""

    peak: int
    budget: int
    stream: bool
    flop: float
    trained: int

    @property
    def fits(self) -> bool:
        return self.peak <= FILL * self.budget


def plan_training(nets: Networks, clips: Sequence[TrainingClip], recipe: Recipe, budget: int) -> TrainingPlan:
    """With resident blocks where they fit, else streamed."""
    config, geometry = nets.transformer, nets.geometry
    lengths = [geometry.seq_len(geometry.latent_shape(clip.width, clip.height, len(clip.frames))) for clip in clips]
    tokens = max(lengths)
    trained = sum(recipe.rank * (outputs + inputs) for outputs, inputs in layer_shapes(config, recipe.targets).values())
    wide = tokens * config.dim * nets.dtype.size
    kept = (config.num_layers + 1) * wide * recipe.clips
    at_once = min(tokens, TOKENS_AT_ONCE)
    piece = FED * at_once * config.ffn_dim * 4
    scores = SCORES * 4 * min(SCORES_AT_ONCE, config.num_heads * tokens**2)
    rest = FLOAT32_COPIES * 4 * trained + kept + WIDE * wide + max(piece, scores) + overhead()
    weights = nets.weights
    resident, streamed = (weights.all + rest, weights.all - weights.blocks + 2 * weights.largest + rest)
    stream = resident > FILL * budget
    flop = sum(map(_step_flop, [config] * len(lengths), lengths)) / len(lengths) * recipe.clips
    return TrainingPlan(math.ceil(streamed if stream else resident), budget, stream, flop, trained)


def _step_flop(config, tokens: int) -> float:
    """Forward, forward again, and backward: linears three times the forward pass's work, attention 4.5 times."""
    work = forward_parts(config, tokens)
    return sum((4.5 if "attention" in kind else 3.0) * flop for kind, flop in work.items())
