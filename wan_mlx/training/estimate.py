"""What a training run would need, before anything is downloaded: bytes, and floating-point operations of a step.

The arrays that are counted stand in `backward`: the inputs that are kept of each block, and the widest of the pieces
that are made again. It is arithmetic: no measurement on a GPU has confirmed it yet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import UsageError, size
from ..models.configs import TransformerConfig
from ..planning.flops import forward_parts
from ..planning.peak_memory import overhead
from ..planning.plan import FILL
from ..planning.sizes import Networks
from .attention_backward import SCORES_AT_ONCE
from .block_backward import TOKENS_AT_ONCE
from .dataset import TrainingClip
from .factors import layer_shapes
from .recipe import Recipe

# Arrays as wide as tokens alive in the widest part of a block's backward pass, and of its token-wise piece as wide as
# the feed-forward, in float32; float32 arrays of scores.
WIDE, FED, SCORES = 14, 12, 5
FLOAT32_COPIES = 4  # of each trained number: itself, its gradient and two moments


@dataclass(frozen=True)
class TrainingPlan:
    """What a run needs.

    Attributes:
        peak, budget: bytes at most, and those that there are.
        stream: whether blocks are read from disk, forward and backward.
        flop, reads: floating-point operations, and bytes read, of one step.
        trained: numbers that are trained.
        lengths: tokens of each clip.
        seconds: of one step; None where nothing was timed (`timing.with_seconds`).
    """

    peak: int
    budget: int
    stream: bool
    flop: float
    trained: int
    lengths: tuple[int, ...]
    reads: int
    seconds: float | None = None

    @property
    def fits(self) -> bool:
        return self.peak <= FILL * self.budget

    def check(self) -> None:
        """Raise UsageError if it does not fit."""
        if not self.fits:
            raise UsageError(
                f"it needs about {size(self.peak)}, and {size(self.budget)} are free to use; shorter or smaller clips "
                "(--frames, --size), a lower --rank, or -q q8 need less"
            )


def plan_training(nets: Networks, clips: Sequence[TrainingClip], recipe: Recipe, budget: int) -> TrainingPlan:
    """With resident blocks where they fit, else streamed."""
    shapes = [(clip.width, clip.height, len(clip.frames)) for clip in clips]
    plan = plan_of(nets, shapes, recipe, budget)
    return plan if plan.fits else plan_of(nets, shapes, recipe, budget, stream=True)


def plan_of(
    nets: Networks,
    shapes: Sequence[tuple[int, int, int]],
    recipe: Recipe,
    budget: int = 0,
    stream: bool = False,
) -> TrainingPlan:
    """For clips of these (width, height, frames)."""
    config, geometry = nets.transformer, nets.geometry
    lengths = [geometry.seq_len(geometry.latent_shape(*shape)) for shape in shapes]
    tokens = max(lengths)
    trained = sum(recipe.rank * (outputs + inputs) for outputs, inputs in layer_shapes(config, recipe.targets).values())
    wide = tokens * config.dim * nets.dtype.size
    kept = (config.num_layers + 1) * wide * recipe.clips
    at_once = min(tokens, TOKENS_AT_ONCE)
    piece = FED * at_once * config.ffn_dim * nets.dtype.size
    scores = SCORES * 4 * min(SCORES_AT_ONCE, config.num_heads * tokens**2)
    rest = FLOAT32_COPIES * 4 * trained + kept + WIDE * wide + max(piece, scores) + overhead()
    weights = nets.weights
    held = weights.outside + 2 * weights.largest if stream else weights.all
    flop = sum(step_flop(config, length) for length in lengths) / len(lengths) * recipe.clips
    reads = 2 * weights.stored_blocks * stream
    return TrainingPlan(math.ceil(held + rest), budget, stream, flop, trained, tuple(lengths), reads)


def step_flop(config: TransformerConfig, tokens: int, text_len: int | None = None) -> float:
    """Of one clip: forward, forward again, and backward: linears three times the forward pass's work, attention 4.5
    times; ``text_len``: other than the model's."""
    work = forward_parts(config if text_len is None else replace(config, text_len=text_len), tokens)
    return sum((4.5 if "attention" in kind else 3.0) * flop for kind, flop in work.items())
