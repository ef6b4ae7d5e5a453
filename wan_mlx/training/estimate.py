"""What a training run would need, before anything is downloaded: bytes, and floating-point operations of a step.

The arrays that are counted stand in `block_backward`. ``benchmarks/training.py`` measures them; ten cases on an H200
were within 4 % (benchmarks/LOG.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import UsageError, size
from ..models.configs import TransformerConfig
from ..planning import peak_memory as peaks
from ..planning.choose import TEXT_TOKENS, first_within, tile_choices
from ..planning.flops import forward_parts
from ..planning.peak_memory import overhead
from ..planning.plan import FILL
from ..planning.sizes import Networks
from .attention_backward import SCORES_AT_ONCE, has_fused_gradient
from .backward import keeps_blocks, kept_bytes, shortens_text, threads
from .block_backward import tokens_of_piece
from .dataset import TrainingClip
from .factors import layer_shapes
from .recipe import Recipe

# Arrays as wide as all tokens that are alive in a block's backward pass: in its attention; and in what is made of some
# tokens, beside arrays as wide as these and as their feed-forward. Unpacked matrices in two pieces.
ATTENDING, BESIDE, NARROW, FED, UNPACKED = 17, 7, 12, 6, 4
SCORES = 2 * 14  # bytes for each score that is made at a time, where no kernel keeps them, in two pieces
CAPTION = 64  # rows of text that a step works on, where one stands for the padding: a long caption's
FLOAT32_COPIES = 3  # of each trained number: itself and two moments; its gradient takes the place of kept inputs


@dataclass(frozen=True)
class TrainingPlan:
    """What a run needs.

    Attributes:
        steps, budget: bytes at most that a step needs, and those that there are.
        encoding: bytes at most while clips and captions are encoded, before the first step.
        encode_tile: in which the VAE encodes; None: whole frames.
        stream: whether blocks are read from disk, forward and backward.
        flop, reads: floating-point operations, and bytes read, of one step.
        trained: numbers that are trained.
        lengths: tokens of each clip.
        keeps: whether the forward pass keeps all that blocks make.
        seconds: of one step; None where nothing was timed (`timing.with_seconds`).
    """

    steps: int
    budget: int
    stream: bool
    flop: float
    trained: int
    lengths: tuple[int, ...]
    reads: int
    keeps: bool
    seconds: float | None = None
    encoding: int = 0
    encode_tile: tuple[int, int] | None = None

    @property
    def peak(self) -> int:
        return max(self.steps, self.encoding)

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
    """With resident blocks where they fit, else streamed; clips are encoded in tiles where memory asks for it."""
    shapes = [(clip.width, clip.height, len(clip.frames)) for clip in clips]
    plan = plan_of(nets, shapes, recipe, budget)
    plan = plan if plan.fits else plan_of(nets, shapes, recipe, budget, stream=True)
    largest = max((nets.geometry.latent_shape(*shape) for shape in shapes), key=math.prod)
    images = peaks.encode_images(nets) if nets.transformer.has_image_branch else 0

    def encoding(tile: tuple[int, int] | None) -> int:
        return max(peaks.encode_text(nets, TEXT_TOKENS), peaks.vae(nets.vae, largest, tile, decoding=False) + images)

    tile = first_within(FILL * budget, tile_choices(largest, nets.geometry), encoding)
    return replace(plan, encoding=encoding(tile), encode_tile=tile)


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
    kept = config.num_layers * wide * recipe.clips + (recipe.clips - 1) * wide
    keeps = keeps_blocks(config, nets.dtype, tokens * recipe.clips, stream)
    if keeps:
        kept = kept_bytes(config, nets.dtype, tokens * recipe.clips)
    at_once = tokens_of_piece(tokens) * nets.dtype.size
    piece = BESIDE * wide + at_once * (NARROW * config.dim + FED * config.ffn_dim)
    attending = ATTENDING * wide
    if not has_fused_gradient(nets.dtype, config.head_dim):
        attending += SCORES * min(SCORES_AT_ONCE, config.num_heads * tokens**2)
    weights = nets.weights
    held = weights.outside + 2 * weights.largest + weights.in_flight if stream else weights.all
    held += UNPACKED * weights.unpacked
    at_work = threads(recipe.clips, stream) * max(piece, attending)
    rest = FLOAT32_COPIES * 4 * trained + max(kept, 4 * trained) + at_work + overhead()
    flop = sum(step_flop(config, length, rows_of_text(nets)) for length in lengths) / len(lengths) * recipe.clips
    reads = 2 * weights.stored_blocks * stream
    return TrainingPlan(math.ceil(held + rest), budget, stream, flop, trained, tuple(lengths), reads, keeps)


def rows_of_text(nets: Networks) -> int:
    """So many rows of text does a step work on."""
    config = nets.transformer
    return min(config.text_len, CAPTION) if shortens_text(nets.dtype, config.head_dim) else config.text_len


def step_flop(config: TransformerConfig, tokens: int, text_len: int) -> float:
    """Of one clip: forward, forward again, and backward: linears three times the forward pass's work, attention 4.5
    times; ``text_len``: rows of text, in place of the model's."""
    work = forward_parts(replace(config, text_len=text_len), tokens)
    return sum((4.5 if "attention" in kind else 3.0) * flop for kind, flop in work.items())
