"""How one block runs on this machine: self-attention of all tokens, then everything else for some tokens at a time.

The numbers of live arrays are for `wan_mlx.planning.peak_memory`, as those in `attention_execution` are; changing the
order of the code changes them. ``benchmarks/memory_table.py`` measures them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import mlx.core as mx

from . import kernels
from .animate import FaceBlock
from .attention import Pairs
from .attention_execution import attention, queries_keys_values
from .pieces import FEED_FORWARD_TOKENS, Pacer, in_token_chunks, token_parts, tokens_per_dispatch
from .s2v import AudioInjector, Heard
from .sequence_parallel import DividedPass, attend_with_others
from .transformer import Block, ForwardPass, Modulation, Runs, by_runs

# Arrays as wide as the tokens alive at once in the token-wise pieces: the tokens before and after, and the result of
# attention; when the pieces are joined, these and the whole.
TOKENS_ALIVE_IN_PIECES, TOKENS_ALIVE_AT_JOIN = 3.0, 3.5
# For each of the two pieces in flight: arrays as wide as tokens, and as wide as the feed-forward.
PIECE_TOKENS, PIECE_WIDE = 4.0, 0.75
# Where all tokens, or large pieces, are computed at once, and short work is not waited for: arrays as wide as tokens,
# and as wide as the feed-forward for a piece; and bytes that are freed late with resident blocks, of which the next
# begins at once. Measured on an H200, in all: 10.3 arrays for a streamed 14B, 10.9 for 5B, 11.0 for 5B resident, and
# 13.3 to 14.2 for 1.3B, whose arrays are smaller.
TOKENS_ALIVE_WHOLE, WHOLE_WIDE, WHOLE_RESIDENT = 9.1, 1.7, 230_000_000

# Computes the tokens that the passes of a step share, or takes the other pass's.
Once = Callable[[Callable[[], mx.array]], mx.array]


def run_block(block: Block, x: mx.array, this_pass: ForwardPass, pace: Pacer, once: Once | None = None) -> mx.array:
    """Same as `Block.__call__`: x (B, L, D) → (B, L, D). What precedes the text is by ``once``, if it is given."""
    # In a long video, arrays as wide as x dominate memory: each is released as soon as possible, and all other work
    # waits for the token-wise pieces below.
    runs, pieces = block.runs(this_pass.modulation, this_pass.clean), [x]
    del x
    at_once = min(pace.tokens_at_once, tokens_per_dispatch(block.self_attn.o, pieces[0]))
    rest: Callable[..., mx.array] = _after_attention
    if once is None:
        pieces.append(_attended(block, pieces[0], runs, this_pass, pace))
    else:
        rest = _after_addition
        pieces[:] = [once(partial(_with_attention, block, pieces, runs, this_pass, pace, at_once))]
    pairs = block.cross_attn.keys_values(this_pass.context, this_pass.image_context)
    rests = [(tokens, partial(rest, block, m, pairs, pace)) for tokens, m in runs]
    return in_token_chunks(rests, pieces, pace, at_once)


def _before_attention(block: Block, x: mx.array, m: Modulation) -> mx.array:
    """Same as `Block.before_attention`."""
    return kernels.modulated_norm(x, m.scale_attn, m.shift_attn, block.eps)


def _attended(block: Block, x: mx.array, runs: Runs[Modulation], this_pass: ForwardPass, pace: Pacer) -> mx.array:
    """The result of self-attention, all tokens (B, L, D) at once."""
    normed = by_runs(partial(_before_attention, block), runs, x)
    pace.small(normed)
    tokens = [normed]
    del normed
    if isinstance(this_pass, DividedPass):
        attended = attend_with_others(block.self_attn, tokens, this_pass, pace)
    else:
        heads = queries_keys_values(block.self_attn, tokens.pop(), this_pass.rope, pace)
        attended = attention(*heads, pace)
        del heads
    pace(attended)
    return attended


def _with_attention(
    block: Block, pieces: list[mx.array], runs: Runs[Modulation], this_pass: ForwardPass, pace: Pacer, at_once: int
) -> mx.array:
    """x, the only one of ``pieces``, with the result of self-attention added."""
    pieces.append(_attended(block, pieces[0], runs, this_pass, pace))

    def add(m: Modulation, pieces: list[mx.array]) -> mx.array:
        x = _add_attention(block, m, *pieces)[0]
        pace(x)
        return x

    return in_token_chunks([(tokens, partial(add, m)) for tokens, m in runs], pieces, pace, at_once)


def _add_attention(block: Block, m: Modulation, x: mx.array, attended: mx.array) -> tuple[mx.array, mx.array]:
    """x with the result of attention added, and that normed for cross-attention."""
    norm3 = block.norm3
    return kernels.add_and_norm(
        x, block.self_attn.o(attended), m.gate_attn, norm3.weight, norm3.bias, block.eps
    )


def _after_attention(block: Block, m: Modulation, pairs: Pairs, pace: Pacer, pieces: list[mx.array]) -> mx.array:
    """`Block.after_attention` for some tokens; ``pieces`` are x and the result of attention, and are emptied."""
    pieces[:] = _add_attention(block, m, *pieces)
    return _after_norm(block, m, pairs, pace, pieces)


def _after_addition(block: Block, m: Modulation, pairs: Pairs, pace: Pacer, pieces: list[mx.array]) -> mx.array:
    """The same where the result of attention is in x, the only one of ``pieces``."""
    x, norm3 = pieces[0], block.norm3
    # Adding nothing: the kernel is the one that would have normed x, so the bits are the same.
    pieces[:] = kernels.add_and_norm(x, x, mx.zeros_like(m.gate_attn), norm3.weight, norm3.bias, block.eps)
    del x
    return _after_norm(block, m, pairs, pace, pieces)


def _after_norm(block: Block, m: Modulation, pairs: Pairs, pace: Pacer, pieces: list[mx.array]) -> mx.array:
    """What follows for some tokens; ``pieces`` are x, and x normed for cross-attention, and are emptied."""
    x, y = pieces
    pieces.clear()
    pace.small(x, y)
    attended = block.cross_attn.attend(y, pairs, partial(attention, pace=pace))
    pace(attended)
    cross = block.cross_attn.o(attended)
    del attended
    x, y = kernels.add_and_norm(x, cross, mx.ones_like(m.gate_ffn), m.scale_ffn, m.shift_ffn, block.eps)
    del cross
    pace(x, y)  # the widest arrays come next: all earlier ones are freed first
    pieces.append(y)
    del y

    def feed_forward(pieces: list[mx.array]) -> mx.array:
        up, _, down = block.ffn
        y = down(kernels.gelu_tanh(up(pieces.pop())))
        pace(y)
        return y

    at_once = min(FEED_FORWARD_TOKENS, pace.tokens_at_once, tokens_per_dispatch(block.ffn[0], pieces[0]))
    parts = token_parts(feed_forward, pieces, at_once)
    x = kernels.gated_add(x, parts, m.gate_ffn)
    pace.submit(x)
    return x


def inject(injector: AudioInjector, hearing: Runs[Heard | None], x: mx.array, pace: Pacer) -> mx.array:
    """Same as `AudioInjector.inject` of each latent frame, which hears its own: x (B, L, D) → (B, L, D)."""
    pieces = [x]
    del x
    frames = [(tokens, partial(_inject, injector, heard, pace)) for tokens, heard in hearing]
    at_once = min(pace.tokens_at_once, tokens_per_dispatch(injector.o, pieces[0]))
    return in_token_chunks(frames, pieces, pace, at_once)


def _inject(injector: AudioInjector, heard: Heard | None, pace: Pacer, pieces: list[mx.array]) -> mx.array:
    """`AudioInjector.inject` for some tokens of one latent frame; ``pieces`` are these, and are emptied."""
    x = pieces.pop()
    pieces.clear()
    if heard is not None:
        x = x + injector.o(injector.attend(injector.normed(x, heard), heard[2], partial(attention, pace=pace)))
        pace(x)
    return x


def look_at_face(block: FaceBlock, x: mx.array, this_pass: ForwardPass, pace: Pacer) -> mx.array:
    """Same as `FaceBlock.__call__`, some frames at a time, or a part of one."""
    assert this_pass.face is not None, "`enter` puts it there"
    ((keys, values),) = block.keys_values(this_pass.face)
    batch, frames = this_pass.face.shape[:2]
    each, dispatch = math.prod(this_pass.grid) // frames, tokens_per_dispatch(block.linear1_q, x)
    at_once = max(1, min(pace.tokens_at_once, dispatch))
    several, parts = max(1, at_once // each), list[mx.array]()
    first_token = this_pass.shard.start if isinstance(this_pass, DividedPass) else 0
    for tokens, first, count in _runs_of_frames(first_token, x.shape[1], each, frames, several):
        k, v = (a.reshape(batch, frames, *a.shape[1:])[:, first : first + count].flatten(0, 1) for a in (keys, values))

        def look(pieces: list[mx.array], pairs: Pairs = [(k, v)], count: int = count) -> mx.array:  # noqa: B006
            y = block.look(pieces.pop(), pairs, count)
            pace(y)
            return y

        parts += token_parts(look, [x[:, tokens]], max(at_once, several * each) if several > 1 else at_once)
    whole = kernels.joined(parts)
    if len(parts) > 1:
        pace.submit(whole)
    return whole


def _runs_of_frames(start: int, length: int, each: int, frames: int, several: int) -> Iterator[tuple[slice, int, int]]:
    """Of ``length`` tokens from number ``start`` on, ``each`` of which are a frame: runs of ``several`` whole frames or
    of a part of one, with the first frame and how many it is. What fills up the end counts to the last frame."""
    at = 0
    while at < length:
        frame, inside = divmod(start + at, each)
        whole = 0 if inside else min(several, frames - frame, (length - at) // each)
        end = min(length, at + (whole * each if whole > 0 else each - inside))
        if frame >= frames:
            frame, whole, end = frames - 1, 0, length
        yield slice(at, end), frame, max(whole, 1)
        at = end
